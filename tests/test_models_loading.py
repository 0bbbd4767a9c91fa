"""models/: finding a net by its config, building it without weights, filling every parameter once."""

import subprocess
import sys

import numpy as np
import paddle
import pytest

from convert.__main__ import family_named
from convert.errors import BadInput
from models import UnknownModel, model_class
from models.bert import BertConfig, BertForMaskedLM, BertForPreTraining
from models.gptj import GPTJConfig, GPTJForCausalLM, GPTJModel
from models.layer import Embedding

GPTJ = dict(model_type="gptj", vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, rotary_dim=4)
BERT = dict(
    model_type="bert",
    vocab_size=31,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)


def state_of(net, seed=0):
    random = np.random.default_rng(seed)
    arrays = {
        id(value): random.normal(size=tuple(value.shape)).astype("float32") for value in net.parameters()
    }
    return {name: arrays[id(value)] for name, value in net.state_dict().items()}


def test_importing_models_does_not_import_paddle():
    code = "import models, sys; assert models.PROJECT == 'paddle-parity'; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dispatch():
    assert model_class({"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}) is GPTJForCausalLM
    assert model_class({"model_type": "bert"}, head="BertForMaskedLM") is BertForMaskedLM


@pytest.mark.parametrize(
    "config,head,sentence",
    [
        ({"model_type": "llama"}, "X", "no net for model_type 'llama': there is no models/llama.py"),
        ({"model_type": "../gptj"}, "X", "is not the name of a family"),
        ({"model_type": "gptj.x"}, "X", "is not the name of a family"),
        ({}, "X", "model_type None"),
        ({"model_type": "bert"}, None, "names no architectures; pass head="),
        (
            {"model_type": "bert"},
            "BertForPoetry",
            "models.bert has no net 'BertForPoetry'. It has: BertForMaskedLM",
        ),
        ({"model_type": "bert"}, "BertConfig", "has no net 'BertConfig'"),
        ({"model_type": "bert"}, "BertPretrained", "has no net 'BertPretrained'"),
        ({"model_type": "gpt2"}, "CausalLM", "has no net 'CausalLM'"),
        ({"model_type": "gpt2"}, "GPT2WithHead", "has no net 'GPT2WithHead'"),
        ({"model_type": "loss"}, "mse", "models.loss has no net 'mse'"),
    ],
)
def test_what_is_unknown_is_said(config, head, sentence):
    with pytest.raises(UnknownModel, match=sentence):
        model_class(config, head)
    assert issubclass(UnknownModel, ValueError)


@pytest.mark.parametrize("family", ["bert", "bloom", "chatglm", "gpt2", "gptj", "opt"])
@pytest.mark.parametrize("heads", [0, 5])
def test_heads_that_do_not_divide_the_width_are_refused(family, heads):
    demo = family_named(family).demo
    key = "n_head" if "n_head" in demo else "num_attention_heads"
    with pytest.raises(BadInput, match=rf"^{family}: .* 64 is not a multiple of .*\b{heads}\b"):
        model_class(demo).from_config({**demo, key: heads})


def test_config_defaults_are_those_of_transformers():
    from dataclasses import asdict

    import transformers

    for ours, theirs in [
        (BertConfig(), transformers.BertConfig()),
        (GPTJConfig(), transformers.GPTJConfig()),
    ]:
        for name, value in asdict(ours).items():
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_labels": 5},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
        {"id2label": {"0": "a"}, "num_labels": 4},
        {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 7},
        {"rotary_dim": None, "n_inner": 9, "made_up": 1},
    ],
)
def test_config_is_read_as_transformers_reads_it(extra):
    from dataclasses import asdict

    import transformers

    ours, theirs = GPTJConfig.from_dict(GPTJ | extra), transformers.GPTJConfig.from_dict(GPTJ | extra)
    for name, value in asdict(ours).items():
        assert getattr(theirs, name) == value, name


@pytest.mark.parametrize("net,config", [(GPTJForCausalLM, GPTJ), (BertForPreTraining, BERT)])
def test_lazy_nets_own_no_weights_until_they_are_loaded(net, config):
    with paddle.LazyGuard():
        lazy = net.from_config(config)
    assert not any(value._is_initialized() for value in lazy.parameters())
    eager = net.from_config(config)
    state = state_of(eager)
    lazy.load(state)
    eager.load(state)
    tokens = paddle.to_tensor([[3, 4, 5]])
    lazy.eval(), eager.eval()
    for name, value in eager(tokens).items():
        np.testing.assert_array_equal(lazy(tokens)[name].numpy(), value.numpy())


def test_a_lazily_built_net_can_be_trained():
    with paddle.LazyGuard():
        net = GPTJForCausalLM.from_config(GPTJ)
    net.load(state_of(net))
    before = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=net.parameters())
    tokens = paddle.to_tensor([[3, 4, 5]])
    net(tokens, labels=tokens)["loss"].backward()
    optimizer.step()
    assert all((value.numpy() != before[name]).any() for name, value in net.state_dict().items())


def test_what_is_loaded_is_a_copy():
    net = GPTJModel.from_config(GPTJ)
    state = state_of(net)
    expected = {name: array.copy() for name, array in state.items()}
    state = {name: array.T.copy().T for name, array in state.items()}
    net.load(state)
    for array in state.values():
        array[...] = 0
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name])


@pytest.mark.parametrize(
    "change,sentence",
    [
        (lambda state: state.pop("ln_f.bias"), "1 tensors are missing: ln_f.bias"),
        (
            lambda state: state.update({"h.0.attn.rotary": np.zeros(3)}),
            "1 tensors are left over: h.0.attn.rotary",
        ),
        (
            lambda state: state.update({"xh.0.attn.bias": np.zeros(3)}),
            "1 tensors are left over: xh.0.attn.bias",
        ),
        (
            lambda state: state.update({"wte.weight": np.zeros([8, 31])}),
            r"wte.weight is \[8, 31\], not \[31, 8\]",
        ),
        (lambda state: [state.pop(name) for name in list(state)], r"23 tensors are missing.*\+15 more"),
    ],
)
def test_whatever_does_not_fit_is_named(change, sentence):
    net = GPTJModel.from_config(GPTJ)
    state = state_of(net)
    change(state)
    with pytest.raises(BadInput, match=sentence):
        net.load(state)


def test_causal_buffers_are_not_wanted():
    net = GPTJForCausalLM.from_config(GPTJ)
    net.load(
        state_of(net)
        | {
            "transformer.h.1.attn.bias": np.ones([1, 1, 16, 16]),
            "transformer.h.1.attn.masked_bias": np.array([-1e9]),
        }
    )


@pytest.mark.parametrize(
    "left_out",
    [
        [],
        ["cls.predictions.decoder.weight"],
        ["bert.embeddings.word_embeddings.weight"],
        ["cls.predictions.decoder.bias"],
        ["cls.predictions.decoder_bias"],
    ],
)
def test_one_name_of_a_tied_parameter_is_enough(left_out):
    net = BertForMaskedLM.from_config(BERT)
    state = state_of(net)
    net.load({name: array for name, array in state.items() if name not in left_out})
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name])


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_tied_names_that_differ_are_refused(name):
    net = BertForMaskedLM.from_config(BERT)
    state = state_of(net)
    state[name] = state[name] + 1
    with pytest.raises(BadInput, match=r"differs from .*, but this net ties the two"):
        net.load(state)


def test_a_tied_head_may_be_stored_as_a_linear():
    """PaddleNLP's GPT-J does not tie: its files carry the transposed embeddings as lm_head.weight."""
    net = GPTJForCausalLM.from_config(GPTJ | {"tie_word_embeddings": True})
    state = state_of(net)
    net.load(state | {"lm_head.weight": state["transformer.wte.weight"].T})
    net.load({name: array for name, array in state.items() if name != "lm_head.weight"})
    with pytest.raises(BadInput, match=r"lm_head\.weight differs from transformer\.wte.weight"):
        net.load(state | {"lm_head.weight": -state["transformer.wte.weight"].T})


@pytest.mark.parametrize("family", ["bloom", "chatglm", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_its_own_is_made_only_for_an_untied_head(family, tied, monkeypatch):
    demo, made, make = family_named(family).demo, [], Embedding.__init__
    monkeypatch.setattr(Embedding, "__init__", lambda self, rows, *rest, **named: made.append(rows) or make(
        self, rows, *rest, **named))
    model_class(demo).from_config({**demo, "tie_word_embeddings": tied})
    assert made.count(demo["vocab_size"]) == (1 if tied else 2)
