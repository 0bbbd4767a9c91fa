"""models/gptj.py against the unmodified classes of transformers, eager attention, eval mode."""

import numpy as np
import paddle
import pytest
import torch
from transformers import DynamicCache, GPTJConfig
from transformers.activations import ACT2FN
from transformers.models.gptj import modeling_gptj as reference

from models import gptj

TINY = dict(
    vocab_size=61,
    n_positions=40,
    n_embd=32,
    n_layer=2,
    n_head=4,
    rotary_dim=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_labels=2,
    architectures=["GPTJForCausalLM"],
)
TRANSPOSED = (
    "_proj.weight",
    "fc_in.weight",
    "fc_out.weight",
    "lm_head.weight",
    "score.weight",
    "qa_outputs.weight",
)
HEADS = ["GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"]
LENGTH = 12
MASKS = {
    "none": None,
    "right": [[1] * 12, [1] * 9 + [0] * 3, [1] * 5 + [0] * 7],
    "left": [[1] * 12, [0] * 3 + [1] * 9, [0] * 7 + [1] * 5],
    "both": [[1] * 12, [0] * 2 + [1] * 7 + [0] * 3, [0] * 5 + [1] * 5 + [0] * 2],
}


def pair(head, seed=0, **overrides):
    """The class of transformers with random weights of trained scale, and ours with the same weights."""
    config = GPTJConfig(**TINY | overrides, attn_implementation="eager")
    torch.manual_seed(seed)
    theirs = getattr(reference, head)(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(std=0.2 if weight.dim() == 2 else 0.1)
            if "ln_" in name and name.endswith("weight"):
                weight += 1.0
    ours = getattr(gptj, head).from_config(config.to_dict())
    ours.load(in_paddle_layout(theirs))
    ours.eval()
    return theirs, ours


def in_paddle_layout(net):
    state = {name: weight.detach().numpy() for name, weight in net.named_parameters()}
    return {name: array.T if name.endswith(TRANSPOSED) else array for name, array in state.items()}


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
    base = getattr(net, "transformer", net)
    layers = {"drop": base.drop, "ln_f": base.ln_f} | {f"h.{i}": block for i, block in enumerate(base.h)}
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


def assert_blocks_agree(theirs, ours, valid=None, **inputs):
    expected, actual = recorded(theirs, **inputs), recorded(ours, **inputs)
    valid = np.ones(inputs["input_ids"].shape, bool) if valid is None else np.array(valid, bool)
    for name, value in expected.items():
        assert distance(actual[name][valid], value[valid]) <= 1e-5, name


def padded(name, pad=0):
    mask = MASKS[name]
    if mask is None:
        return {"input_ids": ids()}, None
    mask = np.array(mask)
    return {"input_ids": np.where(mask == 1, ids(), pad), "attention_mask": mask}, mask


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_block_agrees(head, padding):
    inputs, valid = padded(padding)
    assert_blocks_agree(*pair(head), valid, **inputs)


@pytest.mark.parametrize("padding", MASKS)
def test_causal_lm(padding):
    theirs, ours = pair("GPTJForCausalLM")
    inputs, valid = padded(padding)
    valid = np.ones_like(inputs["input_ids"]) if valid is None else valid
    labels = np.where(valid == 1, inputs["input_ids"], -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"][valid == 1], expected["logits"][valid == 1]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_activations(activation):
    theirs, ours = pair("GPTJForCausalLM", activation_function=activation)
    assert_blocks_agree(theirs, ours, input_ids=ids())


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 1e-3, 1e-2, 0.3])
def test_epsilons(epsilon):
    """Small embeddings, so that the epsilon weighs in."""
    theirs, ours = pair("GPTJForCausalLM", layer_norm_epsilon=epsilon)
    small = theirs.transformer.wte.weight.detach().numpy() * 0.1
    theirs.transformer.wte.weight.data = torch.tensor(small)
    ours.load(in_paddle_layout(theirs))
    assert_blocks_agree(theirs, ours, input_ids=ids())


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_dim": 2},
        {"rotary_dim": 6},
        {"rotary_dim": 8},
        {"rotary_dim": None, "n_head": 1},
        {"n_inner": 24},
        {"n_layer": 1, "n_head": 2, "rotary_dim": 16},
        {"tie_word_embeddings": True},
        {"n_positions": LENGTH},
    ],
    ids=str,
)
def test_shapes_of_the_net(changes):
    theirs, ours = pair("GPTJForCausalLM", **changes)
    assert_blocks_agree(theirs, ours, input_ids=ids())
    assert distance(run(ours, input_ids=ids())["logits"], run(theirs, input_ids=ids())["logits"]) <= 1e-5


def test_rotary_dim_none_turns_the_whole_head():
    """transformers itself builds a table of n_embd columns here and fails with more than one head."""
    theirs, _ = pair("GPTJModel", rotary_dim=8)
    ours = gptj.GPTJModel.from_config(TINY | {"rotary_dim": None})
    ours.load(in_paddle_layout(theirs))
    ours.eval()
    assert_blocks_agree(theirs, ours, input_ids=ids())


@pytest.mark.parametrize("width", [2, 6, 64, 128, 256])
def test_rotary_table_far_from_the_start(width):
    expected = reference.create_sinusoidal_positions(2048, width).numpy()
    assert np.abs(gptj.rotary_table(2048, width).numpy() - expected).max() <= 2.4e-7


def test_position_ids():
    theirs, ours = pair("GPTJForCausalLM")
    positions = np.random.default_rng(1).integers(0, TINY["n_positions"], (3, LENGTH))
    assert_blocks_agree(theirs, ours, input_ids=ids(), position_ids=positions)
    assert_blocks_agree(theirs, ours, input_ids=ids(), position_ids=positions[:1])
    moved = run(ours, input_ids=ids(), position_ids=positions)["logits"]
    assert distance(moved, run(ours, input_ids=ids())["logits"]) > 1e-2


def test_token_type_ids():
    theirs, ours = pair("GPTJForCausalLM")
    assert_blocks_agree(theirs, ours, input_ids=ids(), token_type_ids=ids(seed=1))


def test_pad_tokens_without_a_mask_are_read():
    theirs, ours = pair("GPTJForCausalLM")
    with_pads = padded("both")[0]["input_ids"]
    assert (with_pads == 0).any()
    assert_blocks_agree(theirs, ours, input_ids=with_pads)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_cache_step_by_step(padding):
    theirs, ours = pair("GPTJForCausalLM")
    inputs, valid = padded(padding)
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    valid = np.ones_like(tokens) if valid is None else valid
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
        keep = np.broadcast_to((valid == 1)[:, None], key.shape[:3])
        assert distance(key.numpy()[keep], layer.keys.numpy()[keep]) <= 1e-5
        assert distance(value.numpy()[keep], layer.values.numpy()[keep]) <= 1e-5


def test_positions_continue_after_the_cache():
    _, ours = pair("GPTJModel")
    tokens = paddle.to_tensor(ids())
    first = ours(tokens[:, :7], use_cache=True)
    second = ours(tokens[:, 7:], past_key_values=first["past_key_values"])
    assert "past_key_values" not in second
    assert (
        distance(second["last_hidden_state"].numpy(), ours(tokens)["last_hidden_state"].numpy()[:, 7:])
        <= 1e-5
    )


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    _, ours = pair("GPTJModel")
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
    theirs, ours = pair("GPTJForSequenceClassification", num_labels=num_labels, problem_type=problem)
    inputs, _ = padded(padding)
    labels = np.array(labels, "int64" if np.array(labels).dtype == int else "float32")
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"], expected["logits"]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


def test_sequence_classification_of_pads_only_and_of_pads_within():
    theirs, ours = pair("GPTJForSequenceClassification")
    tokens = ids()
    tokens[0] = 0
    tokens[1, 3:5] = tokens[1, 8:] = 0
    assert distance(run(ours, input_ids=tokens)["logits"], run(theirs, input_ids=tokens)["logits"]) <= 1e-5


def test_sequence_classification_without_pad_token():
    theirs, ours = pair("GPTJForSequenceClassification", pad_token_id=None)
    one = ids(batch=1)
    assert distance(run(ours, input_ids=one)["logits"], run(theirs, input_ids=one)["logits"]) <= 1e-5
    with pytest.raises(ValueError, match="pad_token_id"):
        run(ours, input_ids=ids())


@pytest.mark.parametrize("start,end", [([0, 3, 11], [2, 5, 11]), ([0, 40, -3], [12, 5, 1])])
def test_question_answering(start, end):
    theirs, ours = pair("GPTJForQuestionAnswering")
    inputs = {"input_ids": ids(), "start_positions": np.array(start), "end_positions": np.array(end)}
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    for name in ("start_logits", "end_logits"):
        assert distance(actual[name], expected[name]) <= 1e-5
    assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_every_parameter(tied):
    theirs, ours = pair("GPTJForCausalLM", tie_word_embeddings=tied, activation_function="prelu")
    inputs, valid = padded("both")
    labels = np.where(valid == 1, inputs["input_ids"], -100)
    theirs(**{k: torch.tensor(v) for k, v in inputs.items()}, labels=torch.tensor(labels)).loss.backward()
    ours(**{k: paddle.to_tensor(v) for k, v in inputs.items()}, labels=paddle.to_tensor(labels))[
        "loss"
    ].backward()
    gradients = {name: weight.grad.numpy() for name, weight in ours.named_parameters()}
    expected = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("act.weight"):  # one number, a sum that nearly cancels
            assert np.abs(gradients[name] - value) <= 1e-6
        else:
            assert distance(gradients[name], value.T if name.endswith(TRANSPOSED) else value) <= 1e-5, name


@pytest.mark.parametrize("head", HEADS)
def test_keys_and_shapes_are_those_of_paddlenlp(head):
    from paddlenlp.transformers.gptj import configuration, modeling

    config = TINY | {"n_ctx": TINY["n_positions"], "num_labels": 3}
    theirs = getattr(modeling, head)(configuration.GPTJConfig(**config)).state_dict()
    ours = getattr(gptj, head).from_config(config).state_dict()
    buffers = {name for name in theirs if name.endswith(("attn.bias", "attn.masked_bias"))}
    assert len(buffers) == 2 * TINY["n_layer"] and all(map(gptj.GPTJModel.unused_buffers.fullmatch, buffers))
    expected = {name: tuple(value.shape) for name, value in theirs.items() if name not in buffers}
    assert {name: tuple(value.shape) for name, value in ours.items()} == expected
