"""models/opt.py against the unmodified classes of transformers, eager attention, eval mode."""

import re

import numpy as np
import paddle
import pytest
from decoder_fixtures import (
    LENGTH,
    MASKS,
    assert_cache_agrees,
    distance,
    gradients,
    ids,
    laid_out,
    padded,
    pair,
    recorded,
    run,
    worst,
)
from transformers import OPTConfig
from transformers.activations import ACT2FN
from transformers.models.opt import modeling_opt as reference

from convert.errors import BadInput
from models import opt

TINY = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
            max_position_embeddings=40, num_labels=2)
HEADS = ["OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"]
VARIANTS = {
    "125m": {},
    "350m": dict(do_layer_norm_before=False, word_embed_proj_dim=16),
    "350m, not projected": dict(do_layer_norm_before=False),
    "projected": dict(word_embed_proj_dim=24),
    "wider words": dict(word_embed_proj_dim=48),
    "Galactica": dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    "no biases": dict(enable_bias=False),
    "nothing learned in norms": dict(layer_norm_elementwise_affine=False, do_layer_norm_before=False),
    "no final norm": dict(_remove_final_layer_norm=True),
    "untied": dict(tie_word_embeddings=False),
    "untied and projected": dict(tie_word_embeddings=False, word_embed_proj_dim=16),
}
SPELLED = [
    (r"^model\.", "opt."), (r"(^|opt\.)decoder\.embed_tokens", r"\1embeddings.word_embeddings"),
    (r"(^|opt\.)decoder\.embed_positions", r"\1embeddings.position_embeddings"),
    (r"(^|opt\.)decoder\.project_in", r"\1embeddings.project_in"), (r"\.fc([12])\.", r".linear\1."),
    (r"\.self_attn_layer_norm\.", ".norm1."), (r"(layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.activation_fn\.", ".activation."), (r"^lm_head\.weight$", "lm_head.decoder_weight"),
]
TRANSPOSED = re.compile(r"(_proj|linear[12]|project_in|project_out|score|qa_outputs)\.weight$")


def layout(name, array):
    for old, new in SPELLED:
        name = re.sub(old, new, name)
    return name, array.T if TRANSPOSED.search(name) else array


def models(head, seed=0, **overrides):
    config = OPTConfig(**TINY | overrides, attn_implementation="eager")
    return pair(getattr(reference, head), getattr(opt, head), config, layout, seed)


def places(net):
    """Words, positions and what becomes of them, every block, and what follows the last."""
    if isinstance(net, opt.OPTPretrained):
        base = getattr(net, "opt", net)
        words, positions, projected = (getattr(base.embeddings, name) for name in (
            "word_embeddings", "position_embeddings", "project_in"))
        decoder = base.decoder
    else:
        decoder = getattr(net, "model", net).decoder
        words, positions, projected = decoder.embed_tokens, decoder.embed_positions, decoder.project_in
    found = {"words": words, "positions": positions, "project_in": projected,
             **{f"layers.{i}": layer for i, layer in enumerate(decoder.layers)},
             "final_layer_norm": decoder.final_layer_norm, "project_out": decoder.project_out}
    return {name: layer for name, layer in found.items() if layer is not None}


def assert_blocks_agree(theirs, ours, valid, **inputs):
    assert worst(recorded(theirs, places(theirs), **inputs), recorded(ours, places(ours), **inputs), valid) <= 1e-5


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_block_agrees(head, padding):
    inputs, valid = padded(padding, pad=1)
    assert_blocks_agree(*models(head), valid, **inputs)


@pytest.mark.parametrize("padding", ["left", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees(variant, padding):
    theirs, ours = models("OPTForCausalLM", **VARIANTS[variant])
    inputs, valid = padded(padding, pad=1)
    labels = np.where(valid, inputs["input_ids"], -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"][valid], expected["logits"][valid]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert_blocks_agree(theirs, ours, valid, **inputs)


@pytest.mark.parametrize("variant", ["350m", "Galactica", "no final norm"])
@pytest.mark.parametrize("head", ["OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering"])
def test_every_head_of_a_variant(head, variant):
    theirs, ours = models(head, **VARIANTS[variant])
    inputs, valid = padded("both", pad=1)
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    for name in actual:
        per_token = actual[name].shape[:2] == valid.shape
        kept = valid if per_token else slice(None)
        assert distance(actual[name][kept], expected[name][kept]) <= 1e-5


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_activations(activation):
    theirs, ours = models("OPTForCausalLM", activation_function=activation)
    assert_blocks_agree(theirs, ours, np.ones_like(ids(), bool), input_ids=ids())


@pytest.mark.parametrize("changes", [dict(num_attention_heads=1), dict(num_attention_heads=8, ffn_dim=20),
                                     dict(num_hidden_layers=1), dict(max_position_embeddings=LENGTH)], ids=str)
def test_shapes_of_the_net(changes):
    theirs, ours = models("OPTForCausalLM", **changes)
    assert_blocks_agree(theirs, ours, np.ones_like(ids(), bool), input_ids=ids())


def test_positions_are_counted_over_real_tokens_and_padding_reads_the_row_before_the_first():
    """Of [0, 0, 1, 1]: -1, -1, 0, 1, which are rows 1, 1, 2, 3 of the table. Pads behind the tokens read row 1 too."""
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
    found = opt.positions(paddle.to_tensor(mask), 3, 0, 4).numpy()
    assert found.tolist() == [[-1, -1, 0, 1], [0, 1, -1, -1], [0, -1, 1, 2]]
    theirs, ours = models("OPTModel")
    table = theirs.decoder.embed_positions.weight.detach().numpy()
    inputs = {"input_ids": ids(length=4), "attention_mask": mask}
    for net in (theirs, ours):
        read = recorded(net, {"positions": places(net)["positions"]}, **inputs)["positions"]
        assert np.array_equal(read, table[found + 2])


def test_left_padding_changes_nothing_but_the_place():
    _, ours = models("OPTForCausalLM")
    tokens = ids()
    alone = run(ours, input_ids=tokens[:, 3:])["logits"]
    mask = np.ones_like(tokens)
    mask[:, :3] = 0
    assert distance(run(ours, input_ids=tokens, attention_mask=mask)["logits"][:, 3:], alone) <= 1e-5


def test_position_ids():
    theirs, ours = models("OPTForCausalLM")
    positions = np.random.default_rng(1).integers(-1, TINY["max_position_embeddings"], (3, LENGTH))
    everything = np.ones_like(ids(), bool)
    assert_blocks_agree(theirs, ours, everything, input_ids=ids(), position_ids=positions)
    moved = run(ours, input_ids=ids(), position_ids=positions)["logits"]
    assert distance(moved, run(ours, input_ids=ids())["logits"]) > 1e-2


@pytest.mark.parametrize("padding", ["none", "left", "both"])
@pytest.mark.parametrize("variant", ["125m", "350m"])
def test_cache_step_by_step(variant, padding):
    inputs, _ = padded(padding, pad=1)
    assert_cache_agrees(*models("OPTForCausalLM", **VARIANTS[variant]), inputs["input_ids"],
                        inputs.get("attention_mask"))


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    _, ours = models("OPTModel")
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
    theirs, ours = models("OPTForSequenceClassification", num_labels=num_labels, problem_type=problem)
    inputs, _ = padded(padding, pad=1)
    labels = np.array(labels, "int64" if np.array(labels).dtype == int else "float32")
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"], expected["logits"]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.parametrize("start,end", [([0, 3, 11], [2, 5, 11]), ([0, 40, -3], [12, 5, 1])])
def test_question_answering(start, end):
    theirs, ours = models("OPTForQuestionAnswering")
    inputs = {"input_ids": ids(), "start_positions": np.array(start), "end_positions": np.array(end)}
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    for name in ("start_logits", "end_logits"):
        assert distance(actual[name], expected[name]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.parametrize("variant", ["125m", "350m", "Galactica", "untied and projected"])
def test_gradients_of_every_parameter(variant):
    theirs, ours = models("OPTForCausalLM", **{"activation_function": "gelu"} | VARIANTS[variant])
    inputs, valid = padded("both", pad=1)
    labels = np.where(valid, inputs["input_ids"], -100)
    for name, (found, expected) in gradients(theirs, ours, layout, **inputs, labels=labels).items():
        if name.endswith("k_proj.bias"):  # zero by mathematics: it adds one number to all scores of a query
            assert np.abs(found).max() <= 1e-6
        else:
            assert distance(found, expected) <= 1e-5, name


@pytest.mark.parametrize("head", ["OPTModel", "OPTForCausalLM"])
@pytest.mark.parametrize("before", [True, False])
def test_keys_and_shapes_are_those_of_paddlenlp(head, before):
    """PaddleNLP calls do_layer_norm_before normalize_before, and owns the head's weight instead of tying it."""
    from paddlenlp.transformers.opt import configuration, modeling

    config = TINY | {"do_layer_norm_before": before}
    theirs = getattr(modeling, head)(configuration.OPTConfig.from_dict(
        config | {"word_embed_proj_dim": 32, "normalize_before": before})).state_dict()
    ours = getattr(opt, head).from_config(config).state_dict()
    expected = {name: tuple(value.shape) for name, value in theirs.items()}
    assert {name: tuple(value.shape) for name, value in ours.items()} == expected


def test_the_projections_have_paddlenlps_names_and_shapes():
    from paddlenlp.transformers.opt import configuration, modeling

    config = TINY | VARIANTS["350m"]
    theirs = modeling.OPTModel(configuration.OPTConfig.from_dict(config | {"normalize_before": False})).state_dict()
    ours = opt.OPTModel.from_config(config).state_dict()
    expected = {name: tuple(value.shape) for name, value in theirs.items()}
    assert {name: tuple(value.shape) for name, value in ours.items()} == expected


def test_the_weights_of_every_variant_are_all_used():
    """A parameter of torch's that ours has no place for, or the other way round, is refused when loading."""
    for changes in VARIANTS.values():
        theirs, ours = models("OPTForCausalLM", **changes)
        state = laid_out(theirs, layout)
        for name in state:
            with pytest.raises(BadInput, match="missing"):
                ours.load({other: array for other, array in state.items() if other != name})
