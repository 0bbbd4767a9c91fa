"""models/bloom.py against the unmodified classes of transformers, eager attention, eval mode."""

import re

import numpy as np
import paddle
import pytest
import torch
from decoder_fixtures import MASKS, assert_cache_agrees, distance, gradients, ids, padded, pair, recorded, run, worst
from transformers import BloomConfig
from transformers.models.bloom import modeling_bloom as reference

from models import bloom

TINY = dict(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, num_labels=2)
HEADS = ["BloomModel", "BloomForCausalLM", "BloomForSequenceClassification", "BloomForTokenClassification",
         "BloomForQuestionAnswering"]
VARIANTS = {
    "560m": {},
    "residual after the norm": dict(apply_residual_connection_post_layernorm=True),
    "one head": dict(n_head=1),
    "three heads": dict(n_head=3, hidden_size=24),
    "seven heads": dict(n_head=7, hidden_size=28),
    "twelve heads": dict(n_head=12, hidden_size=48),
    "sixteen heads": dict(n_head=16),
    "sliced, fast": dict(pretraining_tp=4),
    "not sliced, slow": dict(slow_but_exact=True),
    "sliced": dict(pretraining_tp=4, slow_but_exact=True),
    "sliced unevenly": dict(pretraining_tp=3, slow_but_exact=True),
    "untied": dict(tie_word_embeddings=False),
}
TRANSPOSED = re.compile(r"(query_key_value|dense|dense_h_to_4h|dense_4h_to_h|score|classifier|qa_outputs)\.weight$")


def layout(name, array):
    name = re.sub(r"^transformer\.", "bloom.", name).replace("lm_head.weight", "lm_head.decoder_weight")
    return name, array.T if TRANSPOSED.search(name) else array


def models(head, seed=0, **overrides):
    config = BloomConfig(**TINY | overrides, attn_implementation="eager")
    return pair(getattr(reference, head), getattr(bloom, head), config, layout, seed)


def places(net):
    """Embeddings, their norm, every block and the last norm."""
    base = getattr(net, "bloom" if isinstance(net, bloom.BloomPretrained) else "transformer", net)
    names = ("word_embeddings", "word_embeddings_layernorm", "ln_f")
    return {name: getattr(base, name) for name in names} | {f"h.{i}": block for i, block in enumerate(base.h)}


def assert_blocks_agree(theirs, ours, valid, **inputs):
    assert worst(recorded(theirs, places(theirs), **inputs), recorded(ours, places(ours), **inputs), valid) <= 1e-5


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_block_agrees(head, padding):
    inputs, valid = padded(padding, pad=0)
    assert_blocks_agree(*models(head), valid, **inputs)


@pytest.mark.parametrize("padding", ["left", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees(variant, padding):
    theirs, ours = models("BloomForCausalLM", **VARIANTS[variant])
    inputs, valid = padded(padding, pad=0)
    labels = np.where(valid, inputs["input_ids"], -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"][valid], expected["logits"][valid]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert_blocks_agree(theirs, ours, valid, **inputs)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 1e-3, 1e-2, 0.3])
def test_epsilons(epsilon):
    """Small embeddings, so that the epsilon weighs in."""
    theirs, ours = models("BloomForCausalLM", layer_norm_epsilon=epsilon)
    with torch.no_grad():
        theirs.transformer.word_embeddings.weight *= 0.1
    ours.load(dict(layout(name, weight.detach().numpy()) for name, weight in theirs.named_parameters()))
    assert_blocks_agree(theirs, ours, np.ones_like(ids(), bool), input_ids=ids())


@pytest.mark.parametrize("heads", range(1, 129))
def test_slopes(heads):
    """[heads, 1, 2] of two real tokens: the second column is the slope times 1. torch's power is a unit off at most."""
    expected = reference.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].numpy()
    assert np.abs(bloom.alibi_slopes(heads) / expected - 1).max() <= 1.2e-7


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_the_bias_counts_real_tokens(padding):
    mask = np.array(MASKS[padding])
    expected = reference.build_alibi_tensor(torch.tensor(mask), 6, torch.float32).numpy().reshape(3, 6, 1, -1)
    assert np.allclose(bloom.alibi_bias(paddle.to_tensor(mask), 6, 12, paddle.float32).numpy(), expected, rtol=2e-7)


def test_left_padding_changes_nothing_but_the_place():
    _, ours = models("BloomForCausalLM")
    tokens, mask = ids(), np.ones_like(ids())
    mask[:, :3] = 0
    alone = run(ours, input_ids=tokens[:, 3:])["logits"]
    assert distance(run(ours, input_ids=tokens, attention_mask=mask)["logits"][:, 3:], alone) <= 1e-5


def test_slices_leave_the_biases_out():
    """transformers adds up products of slices of the weight and never adds the bias of ``dense`` and
    ``dense_4h_to_h``: the logits are those of a model whose biases there are zero."""
    theirs, ours = models("BloomForCausalLM", **VARIANTS["sliced"])
    plain, _ = models("BloomForCausalLM")
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith(("self_attention.dense.bias", "dense_4h_to_h.bias")):
                weight.zero_()
    expected = run(plain, input_ids=ids())["logits"]
    assert distance(run(theirs, input_ids=ids())["logits"], expected) <= 1e-5
    assert distance(run(ours, input_ids=ids())["logits"], expected) <= 1e-5


@pytest.mark.parametrize("padding", ["none", "left", "both"])
@pytest.mark.parametrize("heads", [4, 3])
def test_cache_step_by_step(heads, padding):
    inputs, _ = padded(padding, pad=0)
    assert_cache_agrees(*models("BloomForCausalLM", n_head=heads, hidden_size=8 * heads), inputs["input_ids"],
                        inputs.get("attention_mask"))


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    _, ours = models("BloomModel")
    tokens = paddle.to_tensor(ids())
    past = ours(tokens[:, :7], use_cache=True)["past_key_values"]
    with pytest.raises(ValueError, match="covers 1 positions, past and input are 8"):
        ours(tokens[:, 7:8], attention_mask=paddle.ones([3, 1], "int64"), past_key_values=past)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(
    "num_labels,problem,labels",
    [
        (3, None, [0, 2, 1]),
        (1, None, [0.3, -1.0, 2.5]),
        (3, "regression", [[0.1, 0.2, 0.3], [1.0, -1.0, 0.0], [0.5, 0.5, 0.5]]),
        (3, None, [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_sequence_classification(padding, num_labels, problem, labels):
    theirs, ours = models("BloomForSequenceClassification", num_labels=num_labels, problem_type=problem)
    inputs, _ = padded(padding, pad=0)
    labels = np.array(labels, "int64" if np.array(labels).dtype == int else "float32")
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"], expected["logits"]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


def test_token_classification():
    theirs, ours = models("BloomForTokenClassification", num_labels=5)
    inputs, valid = padded("both", pad=0)
    labels = np.where(valid, np.random.default_rng(3).integers(0, 5, valid.shape), -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"][valid], expected["logits"][valid]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("start,end", [([0, 3, 11], [2, 5, 11]), ([0, 40, -3], [12, 5, 1])])
def test_question_answering(start, end):
    theirs, ours = models("BloomForQuestionAnswering")
    inputs = {"input_ids": ids(), "start_positions": np.array(start), "end_positions": np.array(end)}
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    for name in ("start_logits", "end_logits"):
        assert distance(actual[name], expected[name]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.parametrize("variant", ["560m", "residual after the norm", "three heads", "untied"])
def test_gradients_of_every_parameter(variant):
    theirs, ours = models("BloomForCausalLM", **VARIANTS[variant])
    inputs, valid = padded("both", pad=0)
    labels = np.where(valid, inputs["input_ids"], -100)
    for name, (found, expected) in gradients(theirs, ours, layout, **inputs, labels=labels).items():
        assert distance(found, expected) <= 1e-5, name


def test_the_names_that_the_hub_spells_otherwise():
    """``n_embed`` and ``num_attention_heads`` are in the config of bigscience/bloom."""
    spelled = {"vocab_size": 61, "n_embed": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ours = bloom.BloomModel.from_config(spelled)
    assert (ours.config.hidden_size, len(ours.h), ours.config.n_head) == (32, 2, 4)


@pytest.mark.parametrize("head", ["BloomModel", "BloomForCausalLM", "BloomForSequenceClassification",
                                  "BloomForTokenClassification"])
def test_keys_and_shapes_are_those_of_paddlenlp(head):
    from paddlenlp.transformers.bloom import configuration, modeling

    theirs = getattr(modeling, head)(configuration.BloomConfig(**TINY | {"num_labels": 3})).state_dict()
    ours = getattr(bloom, head).from_config(TINY | {"num_labels": 3}).state_dict()
    expected = {name: tuple(value.shape) for name, value in theirs.items()}
    assert {name: tuple(value.shape) for name, value in ours.items()} == expected
