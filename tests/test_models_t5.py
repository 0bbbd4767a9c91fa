"""models/t5.py against the unmodified classes of transformers, eager attention, eval mode."""

import numpy as np
import paddle
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5Config
from transformers.activations import ACT2FN
from transformers.models.t5 import modeling_t5 as reference

from convert.errors import BadInput
from models import t5

TINY = dict(
    vocab_size=61,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
    architectures=["T5ForConditionalGeneration"],
)
V1_0 = {"feed_forward_proj": "relu", "tie_word_embeddings": True}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
HEADS = ["T5Model", "T5ForConditionalGeneration", "T5EncoderModel"]
TABLES = ("shared.weight", "relative_attention_bias.weight")
TIME, STEPS = 12, 9
MASKS = {
    "none": None,
    "right": ([12, 9, 5], [9, 6, 2], 0),
    "left": ([12, 9, 5], [9, 6, 2], None),
}


def pair(head="T5ForConditionalGeneration", seed=0, **overrides):
    """The class of transformers with random weights of trained scale, and ours with the same weights."""
    config = T5Config(**TINY | overrides, attn_implementation="eager")
    torch.manual_seed(seed)
    theirs = getattr(reference, head)(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(std=1.0 if name.endswith(TABLES) else 0.2)
            if name.endswith("layer_norm.weight"):
                weight += 1.0
    ours = getattr(t5, head).from_config(config.to_dict())
    ours.load(in_paddle_layout(theirs))
    ours.eval()
    return theirs, ours


def in_paddle_layout(net):
    """PaddleNLP's head holds the backbone as ``t5``; transformers' holds its parts."""
    prefix = "t5." if isinstance(net, reference.T5ForConditionalGeneration) else ""
    return {
        name if name.startswith("lm_head") else prefix + name: in_paddle_shape(name, weight.detach().numpy())
        for name, weight in net.named_parameters()
    }


def in_paddle_shape(name, array):
    return array.T if array.ndim == 2 and not name.endswith(TABLES) else array


def ids(length=TIME, seed=0, batch=3):
    return np.random.default_rng(seed).integers(1, TINY["vocab_size"], (batch, length))


def inputs_of(head, padding="none"):
    """Ids and masks of encoder and decoder, of different lengths; padded at the end, or in front."""
    sides = {"": ids(), "decoder_": ids(STEPS, seed=1)}
    if head == "T5EncoderModel":
        del sides["decoder_"]
    found = {}
    for number, (side, tokens) in enumerate(sides.items()):
        found[f"{side}input_ids"] = tokens
        if MASKS[padding]:
            lengths, at = MASKS[padding][number], MASKS[padding][2]
            mask = np.array([[1] * n + [0] * (tokens.shape[1] - n) for n in lengths])
            mask = mask if at == 0 else mask[:, ::-1].copy()
            found[f"{side}attention_mask"] = mask
            found[f"{side}input_ids"] = np.where(mask == 1, tokens, 0)
    return found


def valid_rows(inputs, length):
    side = "" if length == TIME else "decoder_"
    mask = inputs.get(f"{side}attention_mask")
    return np.ones((3, length), bool) if mask is None else mask == 1


def run(net, **inputs):
    """The net's outputs by name as numpy arrays, whichever framework it belongs to."""
    module, convert = (torch, torch.tensor) if isinstance(net, torch.nn.Module) else (paddle, paddle.to_tensor)
    with module.no_grad():
        outputs = net(**{name: convert(value) for name, value in inputs.items() if value is not None})
    return {name: value.numpy() for name, value in outputs.items() if hasattr(value, "numpy")}


def recorded(net, **inputs):
    """Outputs of every block and every stack's last norm."""
    base = getattr(net, "t5", net)
    layers = {}
    for side in ("encoder", "decoder"):
        stack = getattr(base, side, None)
        if stack is not None:
            layers |= {f"{side}.block.{i}": block for i, block in enumerate(stack.block)}
            layers[f"{side}.final_layer_norm"] = stack.final_layer_norm
    seen = {}

    def hook(name):
        def record(_, __, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return record

    for name, layer in layers.items():
        register = getattr(layer, "register_forward_post_hook", None) or layer.register_forward_hook
        register(hook(name))
    outputs = run(net, **inputs)
    assert len(seen) == len(layers)
    return seen | outputs


def distance(actual, expected):
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all() and np.linalg.norm(expected) > 0
    return np.linalg.norm(actual.astype("float64") - expected) / np.linalg.norm(expected.astype("float64"))


def assert_all_agree(theirs, ours, **inputs):
    """Blocks, norms and outputs, on the rows of real tokens; returns what torch gave."""
    expected, actual = recorded(theirs, **inputs), recorded(ours, **inputs)
    assert expected.keys() - {"loss"} <= actual.keys()
    for name, value in expected.items():
        if value.ndim == 3:
            rows = valid_rows(inputs, value.shape[1])
            assert distance(actual[name][rows], value[rows]) <= 2e-6, name
    return expected, actual


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])
@pytest.mark.parametrize("head", HEADS)
def test_every_block_and_output_agrees(head, version, padding):
    expected, _ = assert_all_agree(*pair(head, **version), **inputs_of(head, padding))
    assert ("encoder_last_hidden_state" in expected) == (head != "T5EncoderModel")


@pytest.mark.parametrize("name", ["relu", "gated-gelu", "gated-silu", "gelu", "silu", "gated-relu", "gelu_new",
                                  *(f"gated-{name}" for name in sorted(ACT2FN) if "-" not in name)])
def test_activations(name):
    assert_all_agree(*pair("T5EncoderModel", feed_forward_proj=name), **inputs_of("T5EncoderModel"))


def test_gated_gelu_is_the_tanh_approximation_and_gelu_is_not():
    assert reference.T5Config(feed_forward_proj="gated-gelu").dense_act_fn == "gelu_new"
    assert t5.T5Config.from_dict({"feed_forward_proj": "gated-gelu"}).dense_act_fn == "gelu_new"
    assert t5.T5Config.from_dict({"feed_forward_proj": "gelu"}).dense_act_fn == "gelu"


def test_what_the_file_says_of_the_activation_overrides_what_the_projection_implies():
    """transformers sets them from the remaining keys of config.json, after it worked them out."""
    overrides = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "silu", "is_gated_act": False}
    theirs, ours = pair("T5EncoderModel", **overrides)
    assert isinstance(theirs.encoder.block[0].layer[1].DenseReluDense, reference.T5DenseActDense)
    assert_all_agree(theirs, ours, **inputs_of("T5EncoderModel"))


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-6, 1e-2, 0.3])
def test_epsilons(epsilon):
    """Small embeddings, so that the epsilon weighs in."""
    theirs, ours = pair(layer_norm_epsilon=epsilon)
    theirs.shared.weight.data *= 0.01
    ours.load(in_paddle_layout(theirs))
    assert_all_agree(theirs, ours, **inputs_of("T5Model"))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "num_decoder_layers": 3},
        {"num_layers": 3, "num_decoder_layers": 1},
        {"num_layers": 2, "num_decoder_layers": None},
        {"d_kv": 5, "num_heads": 3},
        {"d_kv": 16, "num_heads": 6, "d_ff": 20},
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 3},
    ],
    ids=str,
)
def test_shapes_of_the_net(changes):
    assert_all_agree(*pair(**changes), **inputs_of("T5Model", "right"))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets", [4, 6, 8, 12, 20, 32, 64, 128])
def test_buckets_of_all_distances(buckets, bidirectional):
    distances = np.arange(-3000, 3000)
    for farthest in (8, 10, 20, 32, 64, 100, 128, 200, 256, 1000, 1024):
        if farthest <= buckets // 2:
            continue
        expected = reference.T5Attention._relative_position_bucket(
            torch.tensor(distances), bidirectional, buckets, farthest
        )
        actual = t5.relative_position_bucket(paddle.to_tensor(distances), bidirectional, buckets, farthest)
        assert (actual.numpy() == expected.numpy()).all(), farthest


def test_the_farthest_distance_counts():
    """Sequences of more than max_distance tokens; another max_distance gives other numbers."""
    long = {"input_ids": ids(60), "decoder_input_ids": ids(50, seed=1)}
    theirs, ours = pair(relative_attention_max_distance=40)
    state, (_, other) = in_paddle_layout(theirs), pair(relative_attention_max_distance=20)
    other.load(state)
    expected, actual, moved = (run(net, **long)["logits"] for net in (theirs, ours, other))
    assert distance(actual, expected) <= 2e-6
    assert distance(moved, expected) > 1e-2


@pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_shifted_labels(version, ignored):
    """Labels alone: the decoder reads them one step later, -100 as pad."""
    theirs, ours = pair(**version, decoder_start_token_id=7, pad_token_id=3)
    labels = ids(STEPS, seed=2)
    if ignored:
        labels[0, 2:5] = labels[1, 6:] = -100
    inputs = {"input_ids": ids(), "attention_mask": inputs_of("T5Model", "right")["attention_mask"]}
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert distance(actual["logits"], expected["logits"]) <= 2e-6
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    shifted = theirs._shift_right(torch.tensor(labels)).numpy()
    assert (ours.shift_right(paddle.to_tensor(labels)).numpy() == shifted).all()
    assert (shifted[0, 0] == 7 and not ignored) or shifted[0, 3] == 3


def test_loss_with_the_decoders_own_ids():
    theirs, ours = pair()
    inputs = inputs_of("T5Model", "left")
    labels = np.where(inputs["decoder_attention_mask"] == 1, ids(STEPS, seed=3), -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_row_that_is_only_padding():
    theirs, ours = pair()
    inputs = inputs_of("T5Model", "right")
    inputs["attention_mask"][1] = inputs["decoder_attention_mask"][1] = 0
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    assert distance(actual["logits"], expected["logits"]) <= 2e-6


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_cache_step_by_step(padding):
    """Each step's logits are torch's with its cache, and those of the whole sequence at once."""
    theirs, ours = pair()
    inputs = inputs_of("T5Model", padding)
    tokens, mask = inputs.pop("decoder_input_ids"), inputs.pop("decoder_attention_mask", None)
    given = {} if mask is None else {"decoder_attention_mask": mask}
    whole = run(ours, **inputs, decoder_input_ids=tokens, **given)
    valid = np.ones_like(tokens) if mask is None else mask
    torch_cache, paddle_cache = EncoderDecoderCache(DynamicCache(), DynamicCache()), None
    encoded = paddle.to_tensor(whole["encoder_last_hidden_state"])
    encoder_mask = {} if mask is None else {"attention_mask": paddle.to_tensor(inputs["attention_mask"])}
    for start, stop in [(0, 4), (4, 5), (5, 9)]:
        step = {"decoder_input_ids": tokens[:, start:stop]}
        if mask is not None:
            step["decoder_attention_mask"] = mask[:, :stop]
        with torch.no_grad():
            expected = theirs(
                **{k: torch.tensor(v) for k, v in (inputs | step).items()}, past_key_values=torch_cache
            ).logits.numpy()
        with paddle.no_grad():
            actual = ours(
                **encoder_mask,
                **{k: paddle.to_tensor(v) for k, v in step.items()},
                encoder_outputs=encoded,
                past_key_values=paddle_cache,
                use_cache=True,
            )
        paddle_cache = actual["past_key_values"]
        rows = valid[:, start:stop] == 1
        assert distance(actual["logits"].numpy()[rows], expected[rows]) <= 2e-6
        assert distance(actual["logits"].numpy()[rows], whole["logits"][:, start:stop][rows]) <= 2e-6
    for layer, ((key, value), (cross_key, cross_value)) in enumerate(paddle_cache):
        own, cross = torch_cache.self_attention_cache.layers[layer], torch_cache.cross_attention_cache.layers[layer]
        assert cross_key.shape[2] == cross_value.shape[2] == TIME
        keep = np.broadcast_to((valid == 1)[:, None], key.shape[:3])
        assert distance(key.numpy()[keep], own.keys.numpy()[keep]) <= 2e-6
        assert distance(value.numpy()[keep], own.values.numpy()[keep]) <= 2e-6
        seen = np.broadcast_to(valid_rows(inputs, TIME)[:, None], cross_key.shape[:3])
        assert distance(cross_key.numpy()[seen], cross.keys.numpy()[seen]) <= 2e-6


@pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])
def test_gradients_of_every_parameter(version):
    theirs, ours = pair(**version)
    inputs = inputs_of("T5Model", "right")
    labels = np.where(inputs["decoder_attention_mask"] == 1, inputs["decoder_input_ids"], -100)
    theirs(**{k: torch.tensor(v) for k, v in inputs.items()}, labels=torch.tensor(labels)).loss.backward()
    tensors = {k: paddle.to_tensor(v) for k, v in inputs.items()}
    ours(**tensors, labels=paddle.to_tensor(labels))["loss"].backward()
    gradients = {name: weight.grad.numpy() for name, weight in ours.named_parameters()}
    expected = {name if name.startswith("lm_head") else f"t5.{name}": in_paddle_shape(name, weight.grad.numpy())
                for name, weight in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(gradients[name], value) <= 1e-5, name


@pytest.mark.parametrize("version", [V1_0, V1_1, {"feed_forward_proj": "gated-silu"}],
                         ids=["v1.0", "v1.1", "gated-silu"])
@pytest.mark.parametrize("head", HEADS)
def test_keys_and_shapes_are_those_of_paddlenlp(head, version):
    from paddlenlp.transformers.t5 import configuration, modeling

    theirs = getattr(modeling, head)(configuration.T5Config(**TINY | version)).state_dict()
    ours = getattr(t5, head).from_config(TINY | version).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }


def test_the_table_is_one_parameter_under_all_its_names():
    _, ours = pair(**V1_1)
    state = ours.state_dict()
    assert state["t5.shared.weight"] is state["t5.encoder.embed_tokens.weight"] is (
        state["t5.decoder.embed_tokens.weight"])
    assert "lm_head.weight" in state
    assert "lm_head.weight" not in pair(**V1_0)[1].state_dict()


def test_names_of_config_that_other_families_use():
    config = t5.T5Config.from_dict(
        {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 4}
    )
    assert (config.d_model, config.num_layers, config.decoder_layers, config.num_heads, config.d_kv) == (8, 3, 3, 2, 4)


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"feed_forward_proj": "gelu-gated"}, "feed_forward_proj 'gelu-gated'"),
        ({"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj 'gated-gelu-new'"),
        ({"feed_forward_proj": "tanhh"}, "unknown activation 'tanhh'"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets 2"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance 4"),
    ],
    ids=str,
)
def test_configs_that_are_refused(changes, told):
    with pytest.raises(BadInput, match=told):
        t5.T5Model.from_config(TINY | changes)


def test_a_decoder_without_ids_and_labels_without_a_start_are_refused():
    _, ours = pair()
    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        ours(paddle.to_tensor(ids()))
    _, ours = pair(decoder_start_token_id=None)
    with pytest.raises(ValueError, match="no decoder_start_token_id"):
        ours(paddle.to_tensor(ids()), labels=paddle.to_tensor(ids()))
