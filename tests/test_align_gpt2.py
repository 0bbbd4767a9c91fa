"""GPT-2 through conversion and every stage: heads, variants, files, paging, PaddleNLP's classes, what is refused."""

import json

import numpy as np
import pytest
import torch
from align_fixtures import Workshop, all_aligned, torch_model
from conftest import call, fast
from safetensors.numpy import load_file, save_file

import models
from convert.cli import main as convert_main
from convert.gpt2 import FAMILY

HEADS = [head.architecture for head in FAMILY.heads]
LM = HEADS[0]
VARIANTS = {
    "inner": (LM, (), dict(n_inner=48)),
    "epsilon": (LM, (), dict(layer_norm_epsilon=1e-2)),
    "gelu": (LM, (), dict(activation_function="gelu")),
    "relu classifier": ("GPT2ForSequenceClassification", (), dict(activation_function="relu", num_labels=3)),
    "prelu": (LM, (), dict(activation_function="prelu")),
    "unscaled": (LM, (), dict(scale_attn_weights=False)),
    "by layer": ("GPT2ForTokenClassification", (), dict(scale_attn_by_inverse_layer_idx=True, num_labels=5)),
    "as Stanford's": (LM, (), dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    "untied": (LM, (), dict(tie_word_embeddings=False)),
    "one head": ("GPT2Model", (), dict(n_head=1)),
    "heads of one channel": (LM, (), dict(n_head=32)),
    "float16 kept": (LM, (), dict(dtype="float16")),
    "cast to bfloat16": (LM, ("--dtype", "bfloat16"), {}),
    "pdparams": (LM, ("--format", "pdparams"), dict(binary=True)),
    "shards of pdparams, cast": ("GPT2ForQuestionAnswering", ("--format", "pdparams", "--dtype", "float16"), {}),
    "in shards": (LM, ("--shard-size", "20KB"), dict(shard="20KB")),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("gpt2"))


def assert_within(outcomes, limit=1e-5):
    tensors = outcomes["forward"].report["tensors"]
    assert all(tensor["rel_l2"] <= limit for tensor in tensors)
    blocks = [tensor for tensor in tensors if "layers." in tensor["name"]]
    assert len(blocks) >= 3 and all(tensor["isolated"]["rel_l2"] <= limit for tensor in blocks)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_aligned_at_every_stage(workshop, head):
    outcomes = workshop.align_all(workshop.make(head, tokenizer=True))
    assert all_aligned(outcomes)
    assert_within(outcomes)


@pytest.mark.parametrize("variant", fast(
    VARIANTS, "as Stanford's", "untied", "shards of pdparams, cast", "in shards"))
def test_every_variant_is_aligned_at_every_stage(workshop, variant):
    head, flags, options = VARIANTS[variant]
    outcomes = workshop.align_all(workshop.make(head, variant.replace(" ", "-"), flags, **options))
    assert all_aligned(outcomes)
    assert_within(outcomes)


def test_query_key_and_value_are_compared_one_by_one_with_the_thirds_of_what_torch_gives(workshop):
    outcome = workshop.align("forward", workshop.make(LM, "parts"))
    parts = {part["name"] for part in outcome.report["sublayers"]}
    for layer in range(3):
        assert {f"gpt.decoder.layers.{layer}.self_attn.{letter}_proj" for letter in "qkv"} <= parts


@pytest.mark.parametrize("head, options", [
    (LM, dict(dtype="bfloat16")), *(pytest.param(head, options, marks=pytest.mark.full)
                                    for head, options in ((LM, {}), ("GPT2Model", dict(binary=True))))])
def test_paged_and_not_paged_say_the_same(workshop, head, options):
    run = workshop.make(head, f"paged-{head}-{len(options)}-{options.get('dtype')}", **options)
    for stage in ("weights", "forward", "loss"):
        told = [workshop.align(stage, run, "--paging", paging).report for paging in ("on", "off")]
        assert told[0]["verdict"] == "aligned"
        assert told[0]["tensors"] == told[1]["tensors"] and told[0].get("sublayers") == told[1].get("sublayers")


# The files there are --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def today(workshop):
    return load_file(workshop.output(workshop.make(LM, "today")) / "model.safetensors")


def rewritten(source, change):
    """The checkpoint with ``change`` made to its tensors."""
    file = source / "model.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in change(load_file(file)).items()}, file,
              {"format": "pt"})
    return source


def bare(tensors):
    return {name.removeprefix("transformer."): array for name, array in tensors.items()}


def with_masks(tensors):
    mask = np.tril(np.ones((1, 1, 96, 96), np.float32))
    old = {f"transformer.h.{i}.attn.{name}": array for i in range(3)
           for name, array in (("bias", mask), ("masked_bias", np.array(-1e4, np.float32)))}
    return {**tensors, **old}


OLD = {
    "as on the hub: no prefix, with masks": lambda tensors: bare(with_masks(tensors)),
    "with masks": with_masks,
    "with the tied head": lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]},
    "two heads": lambda tensors: {**tensors, "multiple_choice_head.summary.weight": np.ones((1, 32), np.float32),
                                  "multiple_choice_head.summary.bias": np.ones(1, np.float32)},
    "masks and heads": lambda tensors: with_masks({
        **tensors, "lm_head.weight": tensors["transformer.wte.weight"],
        "multiple_choice_head.summary.weight": np.ones((1, 32), np.float32)}),
}


@pytest.mark.parametrize("kind", OLD)
def test_files_of_every_age_make_the_same_checkpoint(workshop, today, kind):
    run = workshop.convert("gpt2", rewritten(workshop.source(LM, f"old {kind}"), OLD[kind]), kind.split(":")[0])
    made = load_file(workshop.output(run) / "model.safetensors")
    assert made.keys() == today.keys() and all(np.array_equal(made[name], today[name]) for name in made)
    assert all_aligned({stage: workshop.align(stage, run) for stage in ("weights", "forward")})
    dropped = {entry["source"]: entry["why"] for entry in json.loads(
        (workshop.reports / run / "convert.json").read_text())["dropped"]}
    for name in dropped:
        assert "c_attn" not in name
    if "masks" in kind:
        assert sum("causal mask" in why for why in dropped.values()) == 6
    if "head" in kind:
        assert any("multiple_choice_head" in name or name == "lm_head.weight" for name in dropped)


def test_names_of_which_half_have_the_prefix_are_read_here_and_not_by_transformers(workshop):
    source = rewritten(workshop.source(LM, "half"), lambda tensors: {
        **bare(tensors), "lm_head.weight": tensors["transformer.wte.weight"]})
    outcome = workshop.align("forward", workshop.convert("gpt2", source, "half"))
    assert outcome.code == 2 and "transformers itself cannot load" in outcome.stderr


def test_a_double_heads_model_becomes_its_language_model(workshop):
    source = workshop.root / "double"
    torch_model("GPT2DoubleHeadsModel").save_pretrained(source)
    run = workshop.convert("gpt2", source, "double")
    report = json.loads((workshop.reports / run / "convert.json").read_text())
    assert report["head"] == LM
    assert [entry["why"] for entry in report["dropped"] if "multiple_choice" in entry["source"]] == 2 * [
        "the second head of GPT2DoubleHeadsModel, which PaddleNLP has no class for"]


def test_the_query_is_the_first_third_of_the_columns(workshop):
    """Against torch's own ``split`` in GPT2Attention; the shapes alone would also fit rows, or k, q, v."""
    run = workshop.make(LM, "thirds")
    fused = torch_model(LM).transformer.h[1].attn.c_attn
    held = load_file(workshop.output(run) / "model.safetensors")
    for kind in ("weight", "bias"):
        for letter, part in zip("qkv", getattr(fused, kind).split(32, dim=-1), strict=True):
            assert np.array_equal(held[f"gpt.decoder.layers.1.self_attn.{letter}_proj.{kind}"], part.detach().numpy())


@pytest.mark.parametrize("changes, says", [
    ({"add_cross_attention": True}, "add_cross_attention is set"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is set"),
    ({"n_embd": 48}, "the config asks for [257, 48]"),
    ({"n_layer": 4}, "config.json (n_layer) says 4 layers, model.safetensors holds 3"),
])
def test_what_is_not_supported_is_said(workshop, changes, says):
    source = workshop.source(LM, f"refused {'-'.join(changes)}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    output = workshop.root / "out" / "refused"
    code, _, err = call(convert_main, FAMILY, ["--source", str(source), "--output", str(output)])
    assert code == 2 and says in err and not output.exists()


# PaddleNLP ------------------------------------------------------------------------------------------------------------


def test_paddlenlps_class_holds_the_file_and_computes_it(workshop):
    outcomes = workshop.align_all(workshop.make(LM, "paddlenlp", tokenizer=True), "--target", "paddlenlp")
    assert all_aligned({stage: outcomes[stage] for stage in ("weights", "forward", "metric")})
    assert outcomes["loss"].code == 1
    assert outcomes["loss"].failing == ["loss.plain", "loss.padded", "loss.ignored"]


@pytest.mark.parametrize("changes, verdict", [
    (dict(n_inner=48), 0), (dict(scale_attn_weights=False), 0), (dict(activation_function="gelu"), 1),
    *(pytest.param(changes, verdict, marks=pytest.mark.full) for changes, verdict in (
        (dict(reorder_and_upcast_attn=True), 0), (dict(layer_norm_epsilon=1e-3), 1),
        (dict(scale_attn_by_inverse_layer_idx=True), 1), (dict(activation_function="silu"), 1))),
], ids=str)
def test_what_paddlenlps_class_makes_of_the_config(workshop, changes, verdict):
    run = workshop.make(LM, f"paddlenlp-{'-'.join(f'{key}-{value}' for key, value in changes.items())}", **changes)
    outcome = workshop.align("forward", run, "--target", "paddlenlp")
    assert outcome.code == verdict, outcome.stderr
    assert workshop.align("forward", run).code == 0


def test_a_head_that_paddlenlp_has_not_is_said(workshop):
    outcome = workshop.align("forward", workshop.make("GPT2ForQuestionAnswering", "no-counterpart"),
                             "--target", "paddlenlp")
    assert outcome.code == 2 and "PaddleNLP has no counterpart of GPT2ForQuestionAnswering" in outcome.stderr


def test_the_converted_net_is_what_the_source_is(workshop):
    """Not through align: logits of both, and generation by the cache equals generation without."""
    import paddle
    run = workshop.make(LM, "plain")
    net, source = models.from_pretrained(workshop.output(run)), torch_model(LM)
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    with torch.no_grad():
        expected = source(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(net(paddle.to_tensor(ids))["logits"].numpy(), expected, rtol=1e-4, atol=1e-4)
