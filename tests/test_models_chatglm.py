"""models/chatglm.py against torch code written from the papers' equations, loaded as a checkpoint's own remote code."""

import numpy as np
import paddle
import pytest
import torch
from chatglm_fixtures import SPECIAL, TINY, as_the_tokenizer_pads, config_of, prompts, save_checkpoint, state_of
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from convert.errors import BadInput
from models import chatglm, model_class

TRANSPOSED = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
HEADS = ["ChatGLMModel", "ChatGLMForConditionalGeneration"]
LENGTHS = [(7, 9), (3, 6), (12, 2)]
KINDS = {"2-D": {}, "1-D": {"position_encoding_2d": False}}


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """Classes of the remote code by name."""
    directory = save_checkpoint(tmp_path_factory.mktemp("remote") / "chatglm")
    return lambda name: get_class_from_dynamic_module(f"modeling_chatglm.{name}", directory)


@pytest.fixture(scope="module")
def pair(remote):
    """The remote class with random weights of trained scale in float32, and ours with the same weights."""
    def make(head="ChatGLMForConditionalGeneration", seed=0, **overrides):
        config, bare = config_of(**overrides), head == "ChatGLMModel"
        cls, state = remote(head), state_of(config, seed, bare=bare)
        theirs = cls(cls.config_class(**config)).float()
        theirs.tie_weights()
        theirs.load_state_dict(state)
        ours = getattr(chatglm, head).from_config(config)
        ours.load(in_paddle_layout(state, config, bare))
        ours.eval()
        return theirs.eval(), ours
    return make


def in_paddle_layout(state, config, bare):
    tied = config.get("tie_word_embeddings", True)
    found = {}
    for name, tensor in state.items():
        if name.endswith("inv_freq") or (tied and name == "lm_head.weight"):
            continue
        target = (f"transformer.{name}" if bare else "lm_head.decoder_weight" if name == "lm_head.weight" else
                  f"chatglm.{name}")
        found[target] = tensor.numpy().T if name.endswith(TRANSPOSED) else tensor.numpy()
    return found


def run(net, **inputs):
    """The net's outputs by name as numpy arrays, whichever framework it belongs to."""
    module, convert = (torch, torch.tensor) if isinstance(net, torch.nn.Module) else (paddle, paddle.to_tensor)
    with module.no_grad():
        outputs = net(**{name: convert(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in outputs.items() if hasattr(value, "numpy")}


def recorded(net, **inputs):
    """What every block gives, and the sublayers of each, and the last norm."""
    stack = getattr(net, "chatglm", net).transformer if hasattr(net, "transformer") or hasattr(net, "chatglm") else net
    modules = {"final_layernorm": stack.final_layernorm}
    for number, block in enumerate(stack.layers):
        modules |= {f"{number}": block, f"{number}.attention": block.attention, f"{number}.mlp": block.mlp,
                    f"{number}.norm": block.post_attention_layernorm}
    seen = {}

    def hook(name):
        def record(_, __, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()
        return record
    for name, module in modules.items():
        (getattr(module, "register_forward_post_hook", None) or module.register_forward_hook)(hook(name))
    run(net, **inputs)
    assert len(seen) == len(modules)
    return seen


def distance(actual, expected):
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all() and np.linalg.norm(expected) > 0
    return np.linalg.norm(actual.astype("float64") - expected) / np.linalg.norm(expected.astype("float64"))


def assert_blocks_agree(theirs, ours, valid=None, limit=1e-6, **inputs):
    expected, actual = recorded(theirs, **inputs), recorded(ours, **inputs)
    valid = np.ones(inputs["input_ids"].shape, bool) if valid is None else valid
    for name, value in expected.items():
        assert distance(actual[name][valid.T], value[valid.T]) <= limit, name


INPUTS = {
    "from the ids": lambda: {"input_ids": prompts(LENGTHS)},
    "[MASK]": lambda: {"input_ids": prompts(LENGTHS, mask="mask_token_id")},
    "as the tokenizer pads": lambda: as_the_tokenizer_pads(prompts(LENGTHS)),
    "prompts alone": lambda: as_the_tokenizer_pads(prompts([(9, 1), (4, 1), (15, 1)])),
    "long": lambda: {"input_ids": prompts([(60, 36), (30, 66)])},
}


def one_dimension(inputs):
    return inputs | ({"position_ids": inputs["position_ids"][:, 0]} if "position_ids" in inputs else {})


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_every_block_agrees(pair, head, positions, kind):
    inputs = INPUTS[kind]()
    inputs = inputs if positions == "2-D" else one_dimension(inputs)
    valid = inputs["input_ids"] != SPECIAL["pad_token_id"]
    assert_blocks_agree(*pair(head, **KINDS[positions]), valid, **inputs)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_loss(pair, tied, kind):
    theirs, ours = pair(tie_word_embeddings=tied)
    inputs = INPUTS[kind]()
    ids = inputs["input_ids"]
    valid = ids != SPECIAL["pad_token_id"]
    labels = np.where(valid & (np.cumsum(ids == SPECIAL["bos_token_id"], axis=1) > 0), ids, -100)
    expected, actual = run(theirs, **inputs, labels=labels), run(ours, **inputs, labels=labels)
    assert expected["logits"].shape == (*ids.shape, TINY["vocab_size"])
    assert distance(actual["logits"][valid], expected["logits"][valid]) <= 1e-6
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_rows_that_see_nothing_are_uniform_on_both_sides(pair):
    """The tokenizer hides every key from a padded query; scores of -10000 everywhere make a mean of all values."""
    theirs, ours = pair()
    inputs = as_the_tokenizer_pads(prompts(LENGTHS))
    assert inputs["attention_mask"][1, 0, 0].all()
    assert_blocks_agree(theirs, ours, **inputs)


def test_the_mask_from_the_ids_is_bidirectional_in_the_context_and_causal_behind(pair):
    _, ours = pair()
    ids = prompts([(5, 4)])
    base = run(ours, input_ids=ids)["logits"]

    def moved(at):
        other = ids.copy()
        other[0, at] = other[0, at] % 100 + 10
        return (np.abs(run(ours, input_ids=other)["logits"] - base).max(-1) > 0)[0]
    assert moved(3).all()
    assert not moved(7)[:7].any() and moved(7)[7:].all()


def test_a_position_matters_in_each_dimension(pair):
    theirs, ours = pair()
    inputs = as_the_tokenizer_pads(prompts(LENGTHS))
    valid = inputs["input_ids"] != SPECIAL["pad_token_id"]
    base = run(ours, **inputs)["logits"]
    for dimension in (0, 1):
        places = inputs["position_ids"].copy()
        places[:, dimension, 10:] += 3
        other = inputs | {"position_ids": places}
        assert_blocks_agree(theirs, ours, valid, **other)
        assert distance(run(ours, **other)["logits"][valid], base[valid]) > 1e-3


def test_far_positions(pair):
    """Angles are products of whole places and 11-bit frequencies, exact in float32: far places agree like near ones."""
    theirs, ours = pair()
    inputs = as_the_tokenizer_pads(prompts(LENGTHS))
    inputs["position_ids"] = np.random.default_rng(3).integers(0, 2048, inputs["position_ids"].shape)
    valid = inputs["input_ids"] != SPECIAL["pad_token_id"]
    assert_blocks_agree(theirs, ours, valid, **inputs)


@pytest.mark.parametrize("width", [2, 4, 6, 10, 16, 32, 64, 128, 256])
def test_frequencies_are_those_of_the_public_formula_rounded_to_float16(width):
    places = torch.arange(2048).unsqueeze(1)
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    angles = (places.float() * frequencies.half().float()).double().numpy()
    cos, sin = (part.numpy()[:, 0, 0] for part in chatglm.rotary_of(paddle.to_tensor(places.numpy()), width))
    assert np.abs(cos - np.cos(np.concatenate([angles, angles], -1))).max() <= 1.5e-7
    assert np.abs(sin - np.sin(np.concatenate([angles, angles], -1))).max() <= 1.5e-7


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 1e-3, 0.3])
def test_epsilons(pair, epsilon):
    theirs, ours = pair(layernorm_epsilon=epsilon)
    small = theirs.transformer.word_embeddings.weight.detach().numpy() * 1e-2
    theirs.transformer.word_embeddings.weight.data = torch.tensor(small)
    ours.chatglm.transformer.word_embeddings.weight.set_value(paddle.to_tensor(small))
    assert_blocks_agree(theirs, ours, input_ids=prompts(LENGTHS))


@pytest.mark.parametrize("changes", [
    {"num_layers": 1}, {"num_layers": 28}, {"num_attention_heads": 8}, {"num_attention_heads": 1},
    {"inner_hidden_size": 128}, {"hidden_size": 48, "num_attention_heads": 4}], ids=str)
def test_shapes_of_the_net(pair, changes):
    """28 layers too: residuals grow with their number, and scores are divided by that of the layer. So do errors."""
    theirs, ours = pair(**changes)
    inputs = as_the_tokenizer_pads(prompts(LENGTHS))
    valid = inputs["input_ids"] != SPECIAL["pad_token_id"]
    assert_blocks_agree(theirs, ours, valid, limit=5e-6 if changes.get("num_layers") == 28 else 1e-6, **inputs)


@pytest.mark.parametrize("positions", KINDS)
def test_cache_step_by_step(pair, positions):
    theirs, ours = pair(**KINDS[positions])
    inputs = as_the_tokenizer_pads(prompts([(7, 9), (3, 13), (4, 5)]))
    inputs = inputs if positions == "2-D" else one_dimension(inputs)
    ids, masked, places = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    valid = ids != SPECIAL["pad_token_id"]
    whole = run(ours, **inputs)["logits"]
    torch_past = paddle_past = None
    for start, stop in [(0, 12), (12, 13), (13, 16)]:
        step = {"input_ids": ids[:, start:stop], "position_ids": places[..., start:stop],
                "attention_mask": masked[:, :, start:stop, :stop]}
        with torch.no_grad():
            expected = theirs(**{name: torch.tensor(value) for name, value in step.items()}, past_key_values=torch_past,
                              use_cache=True)
        with paddle.no_grad():
            actual = ours(**{name: paddle.to_tensor(value) for name, value in step.items()},
                          past_key_values=paddle_past, use_cache=True)
        torch_past, paddle_past = expected.past_key_values, actual["past_key_values"]
        rows = valid[:, start:stop]
        assert distance(actual["logits"].numpy()[rows], expected.logits.numpy()[rows]) <= 1e-6
        assert distance(actual["logits"].numpy()[rows], whole[:, start:stop][rows]) <= 1e-6
    for theirs_kept, ours_kept in zip(torch_past, paddle_past, strict=True):
        for left, right in zip(theirs_kept, ours_kept, strict=True):
            assert distance(right.numpy()[valid.T], left.numpy()[valid.T]) <= 1e-6


def test_after_a_past_no_mask_sees_all_of_it(pair):
    theirs, ours = pair()
    ids = prompts([(7, 9), (4, 12)])
    places = np.stack([[[6] * 1, [9]], [[3], [12]]])
    pasts = theirs(torch.tensor(ids[:, :-1]), use_cache=True).past_key_values, ours(
        paddle.to_tensor(ids[:, :-1]), use_cache=True)["past_key_values"]
    last = {"input_ids": ids[:, -1:], "position_ids": places}
    expected = theirs(**{name: torch.tensor(value) for name, value in last.items()}, past_key_values=pasts[0])
    actual = ours(**{name: paddle.to_tensor(value) for name, value in last.items()}, past_key_values=pasts[1])
    assert "past_key_values" not in actual
    assert distance(actual["logits"].numpy(), expected.logits.detach().numpy()) <= 1e-6
    assert distance(actual["logits"].numpy(), run(ours, input_ids=ids)["logits"][:, -1:]) <= 1e-6
    with pytest.raises(ValueError, match="position_ids are needed after a past"):
        ours(paddle.to_tensor(ids[:, -1:]), past_key_values=pasts[1])


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_every_parameter(pair, tied):
    theirs, ours = pair(tie_word_embeddings=tied)
    inputs = as_the_tokenizer_pads(prompts(LENGTHS))
    labels = np.where(inputs["input_ids"] == SPECIAL["pad_token_id"], -100, inputs["input_ids"])
    theirs(**{name: torch.tensor(value) for name, value in inputs.items()}, labels=torch.tensor(labels)).loss.backward()
    ours(**{name: paddle.to_tensor(value) for name, value in inputs.items()},
         labels=paddle.to_tensor(labels))["loss"].backward()
    expected = in_paddle_layout({name: weight.grad for name, weight in theirs.named_parameters()},
                                config_of(tie_word_embeddings=tied), bare=False)
    gradients = {name: weight.grad.numpy() for name, weight in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(gradients[name], value) <= 1e-5, name


def test_a_row_without_its_marks_is_told_and_not_guessed(pair):
    _, ours = pair()
    ids = prompts(LENGTHS)
    for mark, word in (("bos_token_id", "bos_token_id"), ("gmask_token_id", "gmask_token_id or mask_token_id")):
        bad = np.where(ids == SPECIAL[mark], 10, ids)
        with pytest.raises(ValueError, match=f"hold the {word}"):
            run(ours, input_ids=bad)


def test_a_mask_of_another_kind_is_refused(pair):
    _, ours = pair()
    ids = prompts(LENGTHS)
    for mask in (np.ones(ids.shape, np.int64), np.zeros((3, 1, 16, 16), np.int64)):
        with pytest.raises(ValueError, match="True where a query may not look"):
            run(ours, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("changes,words", [
    ({"pre_seq_len": 8}, "pre_seq_len"), ({"quantization_bit": 4}, "quantization_bit"),
    ({"num_attention_heads": 5}, "not a multiple of"), ({"hidden_size": 40, "num_attention_heads": 4}, "whole pairs")])
def test_what_the_net_does_not_know_is_said(changes, words):
    if changes.get("hidden_size") == 40:
        changes = changes | {"num_attention_heads": 20}
    with pytest.raises(BadInput, match=words):
        chatglm.ChatGLMForConditionalGeneration.from_config(config_of(**changes))


def test_defaults_are_those_of_the_published_config_class():
    """THUDM/chatglm-6b before April 2023 says neither mask_token_id nor gmask_token_id in its config.json."""
    config = chatglm.ChatGLMConfig.from_dict({"model_type": "chatglm"})
    assert (config.mask_token_id, config.gmask_token_id, config.bos_token_id) == (150000, 150001, 150004)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (28, 4096, 150528)
    assert chatglm.ChatGLMConfig.from_dict({"num_hidden_layers": 5}).num_layers == 5


@pytest.mark.parametrize("head,theirs", [("ChatGLMModel", "ChatGLMModel"),
                                         ("ChatGLMForConditionalGeneration", "ChatGLMForCausalLM")])
def test_keys_and_shapes_are_those_of_paddlenlp(head, theirs):
    from paddlenlp.transformers.chatglm import configuration, modeling
    expected = getattr(modeling, theirs)(configuration.ChatGLMConfig.from_dict(dict(TINY))).state_dict()
    ours = model_class(TINY, head).from_config(TINY).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in expected.items()}
