"""OPT and BLOOM through conversion and every stage: heads, variants, files, paging, PaddleNLP's classes, wrong nets."""


import numpy as np
import paddle
import pytest
from align_fixtures import Workshop, all_aligned
from conftest import fast

from align.faults import FAULTS
from align.selftest import prove
from models import bloom

HEADS = ["OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering", "OPTModel", "BloomForCausalLM",
         "BloomForSequenceClassification", "BloomForTokenClassification", "BloomForQuestionAnswering", "BloomModel"]
GALACTICA = dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu")
LIKE_350M = dict(do_layer_norm_before=False, word_embed_proj_dim=16)
VARIANTS = {
    "350m": ("OPTForCausalLM", (), LIKE_350M),
    "350m classifier": ("OPTForSequenceClassification", (), LIKE_350M),
    "350m base": ("OPTModel", (), LIKE_350M),
    "projected": ("OPTForQuestionAnswering", (), dict(word_embed_proj_dim=24)),
    "Galactica": ("OPTForCausalLM", (), GALACTICA),
    "Galactica base": ("OPTModel", (), GALACTICA),
    "no final norm": ("OPTForCausalLM", (), dict(_remove_final_layer_norm=True)),
    "untied OPT": ("OPTForCausalLM", (), dict(tie_word_embeddings=False, word_embed_proj_dim=16)),
    "prelu": ("OPTForCausalLM", (), dict(activation_function="prelu")),
    "OPT, float16 kept": ("OPTForCausalLM", (), dict(dtype="float16") | LIKE_350M),
    "OPT, cast to bfloat16": ("OPTForCausalLM", ("--dtype", "bfloat16"), GALACTICA),
    "OPT, pdparams": ("OPTForCausalLM", ("--format", "pdparams"), {}),
    "OPT, bin in shards": ("OPTForCausalLM", ("--shard-size", "20KB"), dict(shard="20KB", binary=True)),
    "residual after the norm": ("BloomForCausalLM", (), dict(apply_residual_connection_post_layernorm=True)),
    "epsilon 0.1": ("BloomForTokenClassification", (), dict(layer_norm_epsilon=0.1)),
    "three heads": ("BloomForCausalLM", (), dict(n_head=3, hidden_size=24)),
    "twelve heads": ("BloomForCausalLM", (), dict(n_head=12, hidden_size=48)),
    "sliced": ("BloomForCausalLM", (), dict(pretraining_tp=4, slow_but_exact=True)),
    "untied BLOOM": ("BloomForCausalLM", (), dict(tie_word_embeddings=False)),
    "BLOOM, bfloat16 kept": ("BloomForCausalLM", (), dict(dtype="bfloat16")),
    "BLOOM, cast to float16": ("BloomForCausalLM", ("--dtype", "float16"), {}),
    "BLOOM, pdparams": ("BloomForCausalLM", ("--format", "pdparams"), dict(binary=True)),
    "BLOOM in shards": ("BloomForCausalLM", ("--shard-size", "20KB"), dict(shard="20KB")),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("decoders"))


def assert_within(outcomes, limit=1e-5):
    tensors = outcomes["forward"].report["tensors"]
    assert all(tensor["rel_l2"] <= limit for tensor in tensors)
    blocks = [tensor for tensor in tensors if ".h." in f".{tensor['name']}" or "layers." in tensor["name"]]
    assert len(blocks) >= 2 and all(tensor["isolated"]["rel_l2"] <= limit for tensor in blocks)


@pytest.mark.parametrize("head", fast(
    HEADS, "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering", "OPTModel", "BloomForCausalLM",
    "BloomForSequenceClassification", "BloomForTokenClassification"))
def test_every_head_is_aligned_at_every_stage(workshop, head):
    outcomes = workshop.align_all(workshop.make(head, tokenizer=True))
    assert all_aligned(outcomes)
    assert_within(outcomes)


@pytest.mark.parametrize("variant", fast(
    VARIANTS, "350m", "Galactica", "residual after the norm", "untied BLOOM", "prelu", "OPT, cast to bfloat16",
    "OPT, bin in shards", "BLOOM, pdparams"))
def test_every_variant_is_aligned_at_every_stage(workshop, variant):
    head, flags, options = VARIANTS[variant]
    outcomes = workshop.align_all(workshop.make(head, variant.replace(" ", "-"), flags, **options))
    assert all_aligned(outcomes)
    assert_within(outcomes)


# Paging ---------------------------------------------------------------------------------------------------------------

SAME = ("verdict", "first_divergence", "tensors", "sublayers", "values", "candidate", "reference", "inputs_digest",
        "named")
PAGED = [
    ("OPTForCausalLM", "models", {}),
    ("OPTForCausalLM", "paddlenlp", {}),
    ("OPTModel", "models", LIKE_350M),
    ("OPTModel", "paddlenlp", LIKE_350M),
    ("OPTForQuestionAnswering", "models", GALACTICA),
    ("BloomForCausalLM", "models", {}),
    ("BloomForCausalLM", "paddlenlp", {}),
    ("BloomForSequenceClassification", "models", dict(n_head=3, hidden_size=24)),
    ("BloomModel", "models", dict(apply_residual_connection_post_layernorm=True)),
]


@pytest.mark.parametrize("case", fast(range(len(PAGED)), 1, 5))
def test_paged_equals_unpaged(workshop, case):
    head, target, options = PAGED[case]
    run = workshop.make(head, f"paged-{head}-{target}", tokenizer=True, **options)
    for stage in ("weights", "forward", "metric", "loss"):
        whole, paged = (workshop.align(stage, run, "--target", target, "--paging", word) for word in ("off", "on"))
        assert whole.report and whole.code == paged.code, paged.stderr
        assert [whole.report[key] for key in SAME] == [paged.report[key] for key in SAME]
        assert target == "paddlenlp" or paged.code == 0


# PaddleNLP's own classes ----------------------------------------------------------------------------------------------

ALL = ("weights", "forward", "metric", "loss")
RIGHT, LOSS_WRONG = dict.fromkeys(ALL, 0), dict.fromkeys(ALL, 0) | {"loss": 1}
PADDLENLP = {
    "OPT": ("OPTForCausalLM", {}, LOSS_WRONG),
    "OPT, base": ("OPTModel", {}, RIGHT),
    "OPT, post-norm": ("OPTForCausalLM", dict(do_layer_norm_before=False), LOSS_WRONG),
    "OPT, 350m base": ("OPTModel", LIKE_350M, RIGHT),
    "OPT, 350m": ("OPTForCausalLM", LIKE_350M, dict.fromkeys(ALL, 2)),
    "OPT, untied": ("OPTForCausalLM", dict(tie_word_embeddings=False), LOSS_WRONG),
    "OPT, no biases": ("OPTForCausalLM", GALACTICA | dict(activation_function="relu"), LOSS_WRONG),
    "OPT, gelu": ("OPTForCausalLM", GALACTICA, {"weights": 0, "forward": 1, "metric": 1, "loss": 1}),
    "OPT, no final norm": ("OPTForCausalLM", dict(_remove_final_layer_norm=True), dict.fromkeys(ALL, 1)),
    "BLOOM": ("BloomForCausalLM", {}, LOSS_WRONG),
    "BLOOM, base": ("BloomModel", {}, RIGHT),
    "BLOOM, classifier": ("BloomForSequenceClassification", {}, {"weights": 0, "forward": 1, "metric": 0, "loss": 1}),
    "BLOOM, tokens": ("BloomForTokenClassification", {}, LOSS_WRONG),
    "BLOOM, three heads": ("BloomForCausalLM", dict(
        n_head=3, hidden_size=24, apply_residual_connection_post_layernorm=True), LOSS_WRONG),
    "BLOOM, untied": ("BloomForCausalLM", dict(tie_word_embeddings=False), dict.fromkeys(ALL, 1)),
    "BLOOM, sliced": ("BloomForCausalLM", dict(pretraining_tp=4, slow_but_exact=True),
                      {"weights": 0, "forward": 2, "metric": 2, "loss": 2}),
}
WHY = {"OPT, gelu": "gelu_new (tanh approximation) instead of gelu (erf)",
       "BLOOM, classifier": "as many tokens on as there are"}


@pytest.mark.parametrize("case", fast(
    PADDLENLP, "OPT", "OPT, 350m", "OPT, gelu", "OPT, no final norm", "BLOOM, base", "BLOOM, classifier",
    "BLOOM, untied", "BLOOM, sliced"))
def test_paddlenlps_class_gets_its_true_verdict(workshop, case):
    head, options, wanted = PADDLENLP[case]
    run = workshop.make(head, "nlp-" + case.replace(" ", "-").replace(",", ""), tokenizer=True, **options)
    outcomes = workshop.align_all(run, "--target", "paddlenlp")
    assert {stage: outcome.code for stage, outcome in outcomes.items()} == wanted
    refused = [outcome.stderr for outcome in outcomes.values() if outcome.code == 2]
    assert all("PaddleNLP's" in told and " failed at " in told for told in refused)
    if case in WHY:
        assert WHY[case] in outcomes["forward"].report["diagnosis"]["sentence"]


@pytest.mark.parametrize("head", ["OPTForSequenceClassification", "OPTForQuestionAnswering",
                                  "BloomForQuestionAnswering"])
def test_what_paddlenlp_does_not_have_is_said(workshop, head):
    run = workshop.make(head, f"none-{head}")
    for stage in ALL:
        outcome = workshop.align(stage, run, "--target", "paddlenlp")
        assert outcome.code == 2 and f"PaddleNLP has no counterpart of {head}" in outcome.stderr


# Planted faults -------------------------------------------------------------------------------------------------------

SAMPLE = {
    "position offset 1/opt/net": "position-offset",
    "positions counted over padding too/opt/net": "position-offset",
    "norms behind/opt/net": "layer-norm-placement",
    "missed transpose of q/opt/net-weights": "transposed-weight",
    "key bias changed/opt/checkpoint": None,
    "holds q, k, v one behind the other/bloom/net-weights": "qkv-order",
    "alibi through the heads backwards/bloom/net": "alibi-slopes",
    "scale off by 1e-4/bloom/net": "attention-scale",
    "residual of the config/bloom/config": "layer-norm-placement",
    "heads of the config halved/bloom/config": "head-count",
    "MLP units permuted on both sides/bloom/checkpoint": None,
}
MORE = {
    "positions counted over padding too/opt/net",
    "key bias changed/opt/checkpoint",
    "residual of the config/bloom/config",
    "MLP units permuted on both sides/bloom/checkpoint",
}
"""For ``make test-full``, as ``python -m align.selftest`` plants all there are."""


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "more"])
def proof(tmp_path_factory, request):
    """Of the sample without ``MORE``, and of ``MORE``."""
    return prove([fault for fault in FAULTS if fault.name in SAMPLE and (fault.name in MORE) is request.param],
                 tmp_path_factory.mktemp("planted"))


def test_planted_faults_are_caught_named_and_explained(proof):
    assert proof.false_alarms == []
    assert {outcome.fault.name for outcome in proof.outcomes} in (MORE, SAMPLE.keys() - MORE)
    for outcome in proof.outcomes:
        assert outcome.caught and outcome.in_right_block and outcome.named_right, (outcome.fault.name, outcome.named)
        if SAMPLE[outcome.fault.name]:
            assert outcome.explanation == SAMPLE[outcome.fault.name], outcome.fault.name


def test_counting_padding_in_alibi_changes_no_real_token():
    """Softmax does not see what is added to all scores of a row: where padding lies at the ends, alibi may count it."""
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 0]])
    given, counting = (bloom.alibi_bias(None if every else paddle.to_tensor(mask), 4, 8, paddle.float32).numpy()
                       for every in (False, True))
    shift = (counting - given)[..., mask[0] == 1]
    assert np.abs(shift).max() > 0.1 and np.ptp(shift, axis=-1).max() < 1e-6
