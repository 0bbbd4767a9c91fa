"""models/gpt2.py against the unmodified classes of transformers, eager attention, eval mode."""

import re

import numpy as np
import paddle
import pytest
import torch
from transformers import DynamicCache, GPT2Config
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2 as reference

from convert.errors import BadInput
from models import gpt2

TINY = dict(
    vocab_size=61,
    n_positions=40,
    n_embd=32,
    n_layer=3,
    n_head=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_labels=2,
)
HEADS = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]
LENGTH = 12
MASKS = {
    "none": None,
    "right": [[1] * 12, [1] * 9 + [0] * 3, [1] * 5 + [0] * 7],
    "left": [[1] * 12, [0] * 3 + [1] * 9, [0] * 7 + [1] * 5],
    "both": [[1] * 12, [0] * 2 + [1] * 7 + [0] * 3, [0] * 5 + [1] * 5 + [0] * 2],
}
NAMES = [  # torch's to PaddleNLP's, in order
    (r"^transformer\.", "gpt."),
    (r"\bwte\.", "embeddings.word_embeddings."),
    (r"\bwpe\.", "embeddings.position_embeddings."),
    (r"\bh\.", "decoder.layers."),
    (r"\bln_f\.", "decoder.norm."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.mlp\.c_fc\.", ".linear1."),
    (r"\.mlp\.act\.", ".activation."),
    (r"\.mlp\.c_proj\.", ".linear2."),
    (r"\.attn\.c_proj\.", ".self_attn.out_proj."),
]
TRANSPOSED = ("score.weight", "classifier.weight", "qa_outputs.weight")


def pair(head, seed=0, **overrides):
    """The class of transformers with random weights of trained scale, and ours with the same weights."""
    config = GPT2Config(**TINY | {"architectures": [head]} | overrides, attn_implementation="eager")
    torch.manual_seed(seed)
    theirs = getattr(reference, head)(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(std=0.2 if weight.dim() == 2 else 0.1)
            if "ln_" in name and name.endswith("weight"):
                weight += 1.0
    ours = getattr(gpt2, head).from_config(config.to_dict())
    ours.load(in_paddle_layout(theirs))
    ours.eval()
    return theirs, ours


def in_paddle_layout(net):
    return dict(paddle_arrays((name, weight.detach().numpy()) for name, weight in net.named_parameters()))


def paddle_arrays(arrays):
    """Torch's arrays by name, as Paddle has them: the fused matrix of Conv1D, [in, 3 out], cut in three."""
    for name, array in arrays:
        for old, new in NAMES:
            name = re.sub(old, new, name)
        if ".attn.c_attn." in name:
            for letter, part in zip("qkv", np.split(array, 3, axis=-1), strict=True):
                yield name.replace(".attn.c_attn.", f".self_attn.{letter}_proj."), part
        else:
            yield name, array.T if name in TRANSPOSED else array


def ids(seed=0, batch=3, length=LENGTH, low=3):
    return np.random.default_rng(seed).integers(low, TINY["vocab_size"], (batch, length))


def run(net, **inputs):
    """The net's outputs by name as numpy arrays, whichever framework it belongs to."""
    module, convert = (
        (torch, torch.tensor) if isinstance(net, torch.nn.Module) else (paddle, paddle.to_tensor)
    )
    with module.no_grad():
        outputs = net(**{name: convert(value) for name, value in inputs.items() if value is not None})
    return {name: value.numpy() for name, value in outputs.items() if hasattr(value, "numpy")}


def recorded(net, **inputs):
    """Outputs of the embeddings, every block and the last norm."""
    if isinstance(net, torch.nn.Module):
        base = getattr(net, "transformer", net)
        drop, blocks, norm = base.drop, base.h, base.ln_f
    else:
        base = getattr(net, "gpt", net)
        drop, blocks, norm = base.embeddings, base.decoder.layers, base.decoder.norm
    layers = {"embeddings": drop, "norm": norm} | {f"block {i}": block for i, block in enumerate(blocks)}
    seen = {}

    def hook(name):
        def record(_, __, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return record

    for name, layer in layers.items():
        register = getattr(layer, "register_forward_post_hook", None) or layer.register_forward_hook
        register(hook(name))
    run(net, **inputs)
    assert len(seen) == len(layers)
    return seen


def distance(actual, expected):
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all() and np.linalg.norm(expected) > 0
    return np.linalg.norm(actual.astype("float64") - expected) / np.linalg.norm(expected.astype("float64"))


def assert_blocks_agree(theirs, ours, **inputs):
    """On every row, padded queries too."""
    expected, actual = recorded(theirs, **inputs), recorded(ours, **inputs)
    for name, value in expected.items():
        assert distance(actual[name], value) <= 1e-5, name


def padded(name, pad=0):
    mask = MASKS[name]
    if mask is None:
        return {"input_ids": ids()}, np.ones((3, LENGTH), int)
    mask = np.array(mask)
    return {"input_ids": np.where(mask == 1, ids(), pad), "attention_mask": mask}, mask


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_block_agrees(head, padding):
    assert_blocks_agree(*pair(head), **padded(padding)[0])


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("tied", [True, False])
def test_language_model(tied, padding):
    theirs, ours = pair("GPT2LMHeadModel", tie_word_embeddings=tied)
    inputs, valid = padded(padding)
    labels = np.where(valid == 1, inputs["input_ids"], -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"], expected["logits"]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_activations(activation):
    theirs, ours = pair("GPT2LMHeadModel", activation_function=activation)
    assert_blocks_agree(theirs, ours, input_ids=ids())


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 1e-3, 1e-2, 0.3])
def test_epsilons(epsilon):
    """Small embeddings, so that the epsilon weighs in."""
    theirs, ours = pair("GPT2LMHeadModel", layer_norm_epsilon=epsilon)
    for table in (theirs.transformer.wte, theirs.transformer.wpe):
        table.weight.data *= 0.1
    ours.load(in_paddle_layout(theirs))
    assert_blocks_agree(theirs, ours, input_ids=ids())


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_scales(scaled, inverse, reordered, padding):
    theirs, ours = pair("GPT2LMHeadModel", scale_attn_weights=scaled, scale_attn_by_inverse_layer_idx=inverse,
                        reorder_and_upcast_attn=reordered)
    assert_blocks_agree(theirs, ours, **padded(padding)[0])


def test_each_attention_scale_changes_the_numbers():
    tokens = ids()
    plain = run(pair("GPT2LMHeadModel")[1], input_ids=tokens)["logits"]
    for changes in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}):
        assert distance(run(pair("GPT2LMHeadModel", **changes)[1], input_ids=tokens)["logits"], plain) > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": 24},
        {"n_head": 1},
        {"n_head": 8},
        {"n_head": 32},
        {"n_layer": 1},
        {"n_embd": 48, "n_head": 3},
        {"n_positions": LENGTH},
    ],
    ids=str,
)
def test_shapes_of_the_net(changes):
    theirs, ours = pair("GPT2LMHeadModel", **changes)
    assert_blocks_agree(theirs, ours, input_ids=ids())
    assert distance(run(ours, input_ids=ids())["logits"], run(theirs, input_ids=ids())["logits"]) <= 1e-5


def test_the_number_of_heads_changes_no_shape_and_all_numbers():
    """The story of the home-made GPT with 8 heads instead of 12: the weights fit, the net is another."""
    theirs, _ = pair("GPT2LMHeadModel", n_embd=48, n_head=12)
    wrong = gpt2.GPT2LMHeadModel.from_config(TINY | {"n_embd": 48, "n_head": 8})
    wrong.load(in_paddle_layout(theirs))
    wrong.eval()
    assert distance(run(wrong, input_ids=ids())["logits"], run(theirs, input_ids=ids())["logits"]) > 1e-2


def test_position_ids():
    theirs, ours = pair("GPT2LMHeadModel")
    positions = np.random.default_rng(1).integers(0, TINY["n_positions"], (3, LENGTH))
    assert_blocks_agree(theirs, ours, input_ids=ids(), position_ids=positions)
    assert_blocks_agree(theirs, ours, input_ids=ids(), position_ids=positions[:1])


def test_token_type_ids():
    theirs, ours = pair("GPT2LMHeadModel")
    assert_blocks_agree(theirs, ours, input_ids=ids(), token_type_ids=ids(seed=1))


def test_pad_tokens_without_a_mask_are_read():
    theirs, ours = pair("GPT2LMHeadModel")
    with_pads = padded("both")[0]["input_ids"]
    assert (with_pads == 0).any()
    assert_blocks_agree(theirs, ours, input_ids=with_pads)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_cache_step_by_step(padding):
    theirs, ours = pair("GPT2LMHeadModel")
    inputs, valid = padded(padding)
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    positions = np.clip(np.cumsum(valid, axis=1) - 1, 0, None)
    whole = run(ours, **inputs, position_ids=positions)["logits"]
    torch_cache, paddle_cache = DynamicCache(), None
    for start, stop in [(0, 8), (8, 9), (9, 12)]:
        step = {"input_ids": tokens[:, start:stop], "position_ids": positions[:, start:stop]}
        if mask is not None:
            step["attention_mask"] = mask[:, :stop]
        with torch.no_grad():
            expected = theirs(**{k: torch.tensor(v) for k, v in step.items()}, past_key_values=torch_cache)
        with paddle.no_grad():
            actual = ours(
                **{k: paddle.to_tensor(v) for k, v in step.items()},
                past_key_values=paddle_cache,
                use_cache=True,
            )
        paddle_cache = actual["past_key_values"]
        rows = valid[:, start:stop] == 1
        assert distance(actual["logits"].numpy()[rows], expected.logits.numpy()[rows]) <= 1e-5
        assert distance(actual["logits"].numpy()[rows], whole[:, start:stop][rows]) <= 1e-5
    for layer, (key, value) in zip(torch_cache.layers, paddle_cache, strict=True):
        assert distance(key.numpy(), layer.keys.numpy()) <= 1e-5
        assert distance(value.numpy(), layer.values.numpy()) <= 1e-5


def test_positions_continue_after_the_cache():
    _, ours = pair("GPT2Model")
    tokens = paddle.to_tensor(ids())
    first = ours(tokens[:, :7], use_cache=True)
    second = ours(tokens[:, 7:], past_key_values=first["past_key_values"])
    assert "past_key_values" not in second
    whole = ours(tokens)["last_hidden_state"].numpy()
    assert distance(second["last_hidden_state"].numpy(), whole[:, 7:]) <= 1e-5


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    _, ours = pair("GPT2Model")
    tokens = paddle.to_tensor(ids())
    past = ours(tokens[:, :7], use_cache=True)["past_key_values"]
    with pytest.raises(ValueError, match="covers 1 positions, past and input are 8"):
        ours(tokens[:, 7:8], attention_mask=paddle.ones([3, 1]), past_key_values=past)


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
    theirs, ours = pair("GPT2ForSequenceClassification", num_labels=num_labels, problem_type=problem)
    inputs, _ = padded(padding)
    labels = np.array(labels, "int64" if np.array(labels).dtype == int else "float32")
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"], expected["logits"]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


def test_sequence_classification_without_pad_token():
    theirs, ours = pair("GPT2ForSequenceClassification", pad_token_id=None)
    one = ids(batch=1)
    assert distance(run(ours, input_ids=one)["logits"], run(theirs, input_ids=one)["logits"]) <= 1e-5
    with pytest.raises(ValueError, match="pad_token_id"):
        run(ours, input_ids=ids())


def test_token_classification():
    theirs, ours = pair("GPT2ForTokenClassification", num_labels=5)
    labels = np.where(padded("right")[1] == 1, ids(seed=3) % 5, -100)
    inputs = padded("right")[0] | {"labels": labels}
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    assert distance(actual["logits"], expected["logits"]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.parametrize(
    "given",
    [{}, {"classifier_dropout": 0.3}, {"hidden_dropout": 0.2}, {"classifier_dropout": 0.0, "hidden_dropout": 0.2}],
    ids=str,
)
def test_dropout_of_the_token_classifier(given):
    theirs, ours = pair("GPT2ForTokenClassification", **given)
    assert ours.dropout.p == theirs.dropout.p


@pytest.mark.parametrize("start,end", [([0, 3, 11], [2, 5, 11]), ([0, 40, -3], [12, 5, 1])])
def test_question_answering(start, end):
    theirs, ours = pair("GPT2ForQuestionAnswering")
    inputs = {"input_ids": ids(), "start_positions": np.array(start), "end_positions": np.array(end)}
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    for name in ("start_logits", "end_logits"):
        assert distance(actual[name], expected[name]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_every_parameter(tied):
    """Of a key bias the gradient is zero by mathematics, so it is held against the query bias's."""
    theirs, ours = pair("GPT2LMHeadModel", tie_word_embeddings=tied)
    inputs, valid = padded("both")
    labels = np.where(valid == 1, inputs["input_ids"], -100)
    theirs(**{k: torch.tensor(v) for k, v in inputs.items()}, labels=torch.tensor(labels)).loss.backward()
    ours(**{k: paddle.to_tensor(v) for k, v in inputs.items()}, labels=paddle.to_tensor(labels))["loss"].backward()
    gradients = {name: weight.grad.numpy() for name, weight in ours.named_parameters()}
    expected = dict(paddle_arrays((name, weight.grad.numpy()) for name, weight in theirs.named_parameters()))
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("k_proj.bias"):
            scale = np.abs(expected[name.replace("k_proj", "q_proj")]).max()
            assert np.abs(gradients[name] - value).max() <= 1e-5 * scale, name
        else:
            assert distance(gradients[name], value) <= 1e-5, name


def test_fresh_weights_have_the_spread_of_transformers():
    config = TINY | {"n_embd": 128, "vocab_size": 2000}
    torch.manual_seed(0)
    theirs = in_paddle_layout(reference.GPT2LMHeadModel(GPT2Config(**config)))
    paddle.seed(0)
    ours = {name: weight.numpy() for name, weight in gpt2.GPT2LMHeadModel.from_config(config).named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.std() == pytest.approx(theirs[name].std(), rel=0.05), name


@pytest.mark.parametrize(
    "changes,says",
    [({"n_head": 5}, "not a multiple of n_head 5"), ({"add_cross_attention": True}, "add_cross_attention"),
     ({"pruned_heads": {0: [1]}}, "pruned_heads")],
    ids=str,
)
def test_what_the_net_does_not_support_is_refused(changes, says):
    with pytest.raises(BadInput, match=says):
        gpt2.GPT2Model.from_config(TINY | changes)


PADDLENLP = {"GPT2Model": "GPTModel", "GPT2LMHeadModel": "GPTLMHeadModel",
             "GPT2ForSequenceClassification": "GPTForSequenceClassification",
             "GPT2ForTokenClassification": "GPTForTokenClassification"}


@pytest.mark.parametrize("head", PADDLENLP)
def test_keys_and_shapes_are_those_of_paddlenlp(head):
    from paddlenlp.transformers.gpt import configuration, modeling

    config = configuration.GPTConfig(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                     intermediate_size=128, max_position_embeddings=40, num_labels=3)
    theirs = getattr(modeling, PADDLENLP[head])(config).state_dict()
    ours = getattr(gpt2, head).from_config(TINY | {"num_labels": 3}).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()}
