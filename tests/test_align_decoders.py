"""OPT and BLOOM through conversion and every stage: heads, variants, files, paging, PaddleNLP's classes, wrong nets."""


import pytest
from align_fixtures import Workshop, all_aligned

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


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_aligned_at_every_stage(workshop, head):
    outcomes = workshop.align_all(workshop.make(head, tokenizer=True))
    assert all_aligned(outcomes)
    assert_within(outcomes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_aligned_at_every_stage(workshop, variant):
    head, flags, options = VARIANTS[variant]
    outcomes = workshop.align_all(workshop.make(head, variant.replace(" ", "-"), flags, **options))
    assert all_aligned(outcomes)
    assert_within(outcomes)
