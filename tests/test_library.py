"""align_models, assert_aligned and load_weights: people's own nets, without a checkpoint; planted faults are named."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch
from paddle import nn as pn
from paddle.nn import functional as pf
from torch import nn as tn
from torch.nn import functional as tf

from align import align_models, assert_aligned, load_weights
from align.oracle import Reordered
from convert.errors import BadInput


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TorchMLP(tn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = tn.Linear(24, 24), tn.LayerNorm(24), tn.Linear(24, 24)
        self.act, self.out = tn.GELU(), tn.Linear(24, 3)

    def forward(self, x):
        return self.out(self.fc2(self.act(self.norm(self.fc1(x)))))


class PaddleMLP(pn.Layer):
    def __init__(self, epsilon: float = 1e-5, tanh: bool = False, swapped: bool = False) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = pn.Linear(24, 24), pn.LayerNorm(24, epsilon=epsilon), pn.Linear(24, 24)
        self.act, self.out, self.swapped = pn.GELU(tanh), pn.Linear(24, 3), swapped

    def forward(self, x):
        x = self.fc1(x)
        x = self.norm(self.act(x)) if self.swapped else self.act(self.norm(x))
        return self.out(self.fc2(x))


def mlps(**given) -> tuple[tn.Module, pn.Layer]:
    torch.manual_seed(0)
    ours, theirs = TorchMLP(), PaddleMLP(**given)
    load_weights(ours, theirs)
    return ours, theirs


def test_loaded_weights_compute_what_the_formula_says_and_are_aligned():
    ours, theirs = mlps()
    x = drawn(8, 24)
    weight, bias = (ours.fc1._parameters[name].detach().numpy() for name in ("weight", "bias"))
    np.testing.assert_array_equal(theirs.fc1.weight.numpy(), weight.T)
    assert np.allclose(theirs.fc1(paddle.to_tensor(x)).numpy(), x @ weight.T + bias, atol=1e-6)
    result = align_models(ours, theirs, (x,))
    assert result.verdict == "aligned" and result.first_divergence is None
    assert [tensor.name for tensor in result.tensors if " " not in tensor.name] == [
        "fc1", "norm", "act", "fc2", "out", "output"]
    assert all(tensor.judgements for tensor in result.tensors)


def test_wrong_epsilon_is_named_and_explained():
    ours, theirs = mlps(epsilon=1e-6)
    result = align_models(ours, theirs, (drawn(32, 24),))
    assert result.verdict == "diverged" and result.first_divergence == "norm"
    assert "epsilon 1e-06 instead of 1e-05" in result.diagnosis.sentence
    x = ours.fc1(torch.tensor(drawn(32, 24))).double()
    parted = [tf.layer_norm(x, (24,), ours.norm.weight.double(), ours.norm.bias.double(), eps) for eps in (1e-5, 1e-6)]
    expected = float((parted[1] - parted[0]).norm() / parted[0].norm())
    norm = next(tensor for tensor in result.tensors if tensor.name == "norm")
    assert norm.isolated.rel_l2 == pytest.approx(expected, rel=0.05)


def test_a_square_weight_that_was_not_transposed_is_named():
    ours, theirs = mlps()
    theirs.fc2.weight.set_value(theirs.fc2.weight.numpy().T.copy())
    with pytest.raises(AssertionError, match=r"(?s)First divergence: fc2\.weight.*fc2\.weight is transposed"):
        assert_aligned(ours, theirs, (drawn(8, 24),))


def test_swapped_weights_say_whose_they_are():
    ours, theirs = mlps()
    first, second = theirs.fc1.weight.numpy(), theirs.fc2.weight.numpy()
    theirs.fc1.weight.set_value(second)
    theirs.fc2.weight.set_value(first)
    result = align_models(ours, theirs, (drawn(8, 24),))
    assert result.first_divergence == "fc1.weight"
    assert "fc1.weight holds fc2.weight" in result.failures[0]


def test_another_gelu_is_named():
    result = align_models(*mlps(tanh=True), (drawn(32, 24),))
    assert result.first_divergence == "act"
    assert "act activation is gelu_new (tanh approximation) instead of gelu (erf)" in result.diagnosis.sentence
    assert next(tensor for tensor in result.tensors if tensor.name == "fc2").isolated.rel_l2 < 1e-6


def test_modules_in_another_order_are_named_where_their_input_differs():
    result = align_models(*mlps(swapped=True), (drawn(32, 24),))
    assert result.verdict == "diverged"
    parts = {part.name: part.passed for part in result.sublayers}
    assert parts["norm: the operation before it"] is False
    assert next(tensor for tensor in result.tensors if tensor.name == "fc1").passed


class TorchPlain(tn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = tn.Linear(16, 16), tn.Linear(16, 4)

    def forward(self, x):
        return self.last(tf.gelu(self.first(x)))


class PaddlePlain(pn.Layer):
    def __init__(self, tanh: bool = False) -> None:
        super().__init__()
        self.lower, self.upper, self.tanh = pn.Linear(16, 16), pn.Linear(16, 4), tanh

    def forward(self, x):
        return self.upper(pf.gelu(self.lower(x), approximate=self.tanh))


NAMES = {"first": "lower", "last": "upper"}


@pytest.mark.parametrize("names", [NAMES, lambda path: path.replace("first", "lower").replace("last", "upper")])
def test_names_are_a_map_or_a_function(names):
    ours, theirs = TorchPlain(), PaddlePlain()
    assert load_weights(ours, theirs, names) == [
        (f"{left}.{leaf}", f"{right}.{leaf}") for left, right in NAMES.items() for leaf in ("weight", "bias")]
    result = align_models(ours, theirs, (drawn(6, 16),), names)
    assert result.verdict == "aligned"
    assert {"lower", "upper", "output"} <= {tensor.name for tensor in result.tensors}


def test_a_function_between_two_modules_is_named():
    ours, theirs = TorchPlain(), PaddlePlain(tanh=True)
    load_weights(ours, theirs, NAMES)
    result = align_models(ours, theirs, (drawn(32, 16),), NAMES)
    assert result.first_divergence == "upper" and result.named == "upper: the operation before it"


def test_names_that_nobody_gave_are_found_by_values_and_told():
    ours, theirs = TorchPlain(), PaddlePlain()
    load_weights(ours, theirs, NAMES)
    result = align_models(ours, theirs, (drawn(6, 16),))
    assert result.verdict == "aligned"
    assert any("first.weight is lower.weight" in note and "by their values" in note for note in result.notes)


def test_without_values_a_guess_is_refused_with_what_it_would_be():
    with pytest.raises(BadInput, match=r"would be a guess.*'first.weight': 'lower.weight'"):
        load_weights(TorchPlain(), PaddlePlain())


# Kinds of nets -------------------------------------------------------------------------------------------------------

class TorchTagger(tn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.words = tn.Embedding(30, 12)
        self.rnn = tn.LSTM(12, 10, 2, batch_first=True, bidirectional=both)
        self.out = tn.Linear(20 if both else 10, 5)

    def forward(self, ids, scale):
        hidden, _ = self.rnn(self.words(ids) * scale.unsqueeze(-1))
        return {"scores": self.out(hidden), "best": self.out(hidden).argmax(-1)}


class PaddleTagger(pn.Layer):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.words = pn.Embedding(30, 12)
        self.rnn = pn.LSTM(12, 10, 2, direction="bidirect" if both else "forward")
        self.out = pn.Linear(20 if both else 10, 5)

    def forward(self, ids, scale):
        hidden, _ = self.rnn(self.words(ids) * scale.unsqueeze(-1))
        return {"scores": self.out(hidden), "best": self.out(hidden).argmax(-1)}


@pytest.mark.parametrize("both", [False, True])
def test_a_recurrent_tagger_of_integers_and_two_inputs(both):
    ours, theirs = TorchTagger(both), PaddleTagger(both)
    load_weights(ours, theirs)
    np.testing.assert_array_equal(theirs.rnn.weight_ih_l0.numpy(), ours.rnn.weight_ih_l0.detach().numpy())
    inputs = {"ids": np.random.default_rng(0).integers(0, 30, (3, 9)), "scale": np.abs(drawn(3, 9)) + 0.5}
    result = align_models(ours, theirs, inputs)
    assert result.verdict == "aligned"
    assert {"words", "rnn", "out", "scores", "best"} <= {one.name for one in result.tensors}


def test_gates_in_another_order_are_named():
    ours, theirs = TorchTagger(False), PaddleTagger(False)
    load_weights(ours, theirs)
    gates = theirs.rnn.weight_hh_l0.numpy().reshape(4, 10, 10)
    theirs.rnn.weight_hh_l0.set_value(gates[[0, 2, 1, 3]].reshape(40, 10))
    inputs = {"ids": np.arange(18).reshape(2, 9), "scale": np.ones((2, 9), np.float32)}
    assert align_models(ours, theirs, inputs).first_divergence == "rnn.weight_hh_l0"


class TorchBlock(tn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = tn.Conv2d(inside, outside, 3, 2, 1, bias=False), tn.BatchNorm2d(outside)
        self.conv2, self.bn2 = tn.Conv2d(outside, outside, 3, 1, 1, bias=False), tn.BatchNorm2d(outside)
        self.downsample = tn.Sequential(tn.Conv2d(inside, outside, 1, 2, bias=False), tn.BatchNorm2d(outside))

    def forward(self, x):
        return tf.relu(self.bn2(self.conv2(tf.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class TorchResNet(tn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = tn.Conv2d(3, 8, 7, 2, 3, bias=False), tn.BatchNorm2d(8)
        self.layer1, self.fc = tn.Sequential(TorchBlock(8, 16), TorchBlock(16, 16)), tn.Linear(16, 20)

    def forward(self, x):
        x = self.layer1(tf.max_pool2d(tf.relu(self.bn1(self.conv1(x))), 3, 2, 1))
        return self.fc(x.mean((2, 3)))


class PaddleBlock(pn.Layer):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = pn.Conv2D(inside, outside, 3, 2, 1, bias_attr=False), pn.BatchNorm2D(outside)
        self.conv2, self.bn2 = pn.Conv2D(outside, outside, 3, 1, 1, bias_attr=False), pn.BatchNorm2D(outside)
        self.downsample = pn.Sequential(pn.Conv2D(inside, outside, 1, 2, bias_attr=False), pn.BatchNorm2D(outside))

    def forward(self, x):
        return pf.relu(self.bn2(self.conv2(pf.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class PaddleResNet(pn.Layer):
    def __init__(self, padding: int = 1, mode: str = "zeros") -> None:
        super().__init__()
        self.conv1 = pn.Conv2D(3, 8, 7, 2, 3, bias_attr=False, padding_mode=mode)
        self.bn1, self.padding = pn.BatchNorm2D(8), padding
        self.layer1, self.fc = pn.Sequential(PaddleBlock(8, 16), PaddleBlock(16, 16)), pn.Linear(16, 20)

    def forward(self, x):
        x = self.layer1(pf.max_pool2d(pf.relu(self.bn1(self.conv1(x))), 3, 2, self.padding))
        return self.fc(x.mean((2, 3)))


def resnets(**given) -> tuple[tn.Module, pn.Layer]:
    torch.manual_seed(0)
    ours, theirs = TorchResNet(), PaddleResNet(**given)
    with torch.no_grad():
        for name, buffer in ours.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(0, 0.2)
    load_weights(ours, theirs)
    return ours, theirs


def test_a_residual_net_with_its_running_statistics():
    ours, theirs = resnets()
    np.testing.assert_array_equal(theirs.bn1._mean.numpy(), ours.bn1.running_mean.numpy())
    result = align_models(ours, theirs, (drawn(2, 3, 33, 40),))
    assert result.verdict == "aligned"
    assert {"layer1.0", "layer1.1", "fc"} <= {tensor.name for tensor in result.tensors}
    assert {"layer1.0.conv1", "layer1.0.downsample.1"} <= {part.name for part in result.sublayers}


def test_running_statistics_that_were_left_out_are_named():
    ours, theirs = resnets()
    theirs.layer1[1].bn2._variance.set_value(np.ones(16, np.float32))
    assert align_models(ours, theirs, (drawn(2, 3, 33, 40),)).first_divergence == "layer1.1.bn2._variance"


@pytest.mark.parametrize(("given", "named"), [({"mode": "reflect"}, "conv1"), ({"padding": 0}, "layer1.0")])
def test_another_padding_is_named(given, named):
    ours, theirs = resnets(**given)
    result = align_models(ours, theirs, (drawn(2, 3, 33, 40),))
    assert result.verdict == "diverged" and result.first_divergence == named


def test_a_pass_that_fails_is_refused_with_where_the_shapes_parted():
    ours, theirs = resnets()
    theirs.layer1[0].conv1 = pn.Conv2D(8, 16, 3, 2, 0, bias_attr=False)
    load_weights(ours, theirs)
    with pytest.raises(BadInput, match=r"failed at test_library.py.*layer1\.0\.conv1 gave \[2, 16, 4, 4\], and torch's "
                                       r"layer1\.0\.conv1 \[2, 16, 5, 5\]"):
        align_models(ours, theirs, (drawn(2, 3, 33, 40),))


def test_a_transformer_layer_whose_projection_is_fused_in_torch():
    ours = tn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu", dropout=0.3)
    theirs = pn.TransformerEncoderLayer(16, 2, 32, activation="gelu", dropout=0.3)
    loaded = load_weights(ours, theirs)
    assert ("self_attn.in_proj_weight", "self_attn.k_proj.weight") in loaded
    np.testing.assert_array_equal(theirs.self_attn.k_proj.weight.numpy(),
                                  ours.self_attn.in_proj_weight.detach().numpy()[16:32].T)
    assert_aligned(ours, theirs, (drawn(3, 10, 16),))
    held = theirs.self_attn.q_proj.weight.numpy()
    theirs.self_attn.q_proj.weight.set_value(held.T.copy())
    assert align_models(ours, theirs, (drawn(3, 10, 16),)).first_divergence == "self_attn.q_proj.weight"


def test_padding_of_an_attention_mask_is_not_compared():
    class Ours(tn.Module):
        def forward(self, x, attention_mask):
            return x * attention_mask.unsqueeze(-1) + 1

    class Theirs(pn.Layer):
        def forward(self, x, attention_mask):
            seen = attention_mask.unsqueeze(-1).astype("float32")
            return pf.relu(x) * seen - pf.relu(-x) * seen + 1 + (1 - seen)
    mask = np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    inputs = {"x": drawn(2, 6, 20), "attention_mask": mask}
    assert align_models(Ours(), Theirs(), inputs).verdict == "aligned"
    assert align_models(Ours(), Theirs(), tuple(inputs.values())).verdict == "diverged"


# Evidence ------------------------------------------------------------------------------------------------------------

class Torch(tn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


class Paddle(pn.Layer):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


@pytest.mark.parametrize(("ours", "theirs", "told"), [
    (lambda x: x * 2, lambda x: (x * 2).reshape([12, 4]), "the shape is [12, 4], the reference's [3, 4, 4]"),
    (lambda x: x * 2, lambda x: (x * 2).astype("float64"), "the dtype is float64"),
    (lambda x: x * 2, lambda x: x * float("nan"), "48 elements of the candidate are NaN"),
    (lambda x: {"a": x, "b": x}, lambda x: {"a": x}, "b: the candidate did not record it"),
    (lambda x: {"a": x}, lambda x: {"a": x, "b": x}, "b: the reference did not record it"),
    (lambda x: (x, x + 1), lambda x: (x + 1, x), "output[0]: rel-L2"),
])
def test_what_is_no_evidence_is_diverged(ours, theirs, told):
    result = align_models(Torch(ours), Paddle(theirs), (drawn(3, 4, 4),))
    assert result.verdict == "diverged" and any(told in failure for failure in result.failures), result.failures


@dataclass
class Held:
    mask: object
    doubled: object


@pytest.mark.parametrize(("ours", "theirs", "wrong"), [
    (lambda x: x.argmax(-1), lambda x: x.argmax(-1), lambda x: x.argmin(-1)),
    (lambda x: x > 0, lambda x: x > 0, lambda x: x >= 0.5),
    (lambda x: (x, x.argmax(-1)), lambda x: (x, x.argmax(-1)), lambda x: (x, x.argmin(-1))),
    (lambda x: torch.fft.rfft(x), lambda x: paddle.fft.rfft(x), lambda x: paddle.fft.rfft(x).conj()),
    (lambda x: torch.fft.rfft(x).conj(), lambda x: paddle.fft.rfft(x).conj(), lambda x: paddle.fft.rfft(x)),
    (lambda x: x.sum().item(), lambda x: x.sum().item(), lambda x: x.mean().item()),
    (lambda x: (x, Held(x > 0, 2 * x)), lambda x: (x, Held(x > 0, 2 * x)), lambda x: (x, Held(x > 0, 3 * x))),
    (lambda x: {"a": x, "found": x.shape[0]}, lambda x: {"a": x, "found": 3}, lambda x: {"a": x, "found": 4}),
])
def test_numbers_of_every_kind_are_compared(ours, theirs, wrong):
    assert align_models(Torch(ours), Paddle(theirs), (drawn(3, 4, 8),)).verdict == "aligned"
    assert align_models(Torch(ours), Paddle(wrong), (drawn(3, 4, 8),)).verdict == "diverged"


def test_whole_numbers_count_where_torch_itself_gives_the_same_in_every_run():
    """The same numbers added up in 32 orders: which sum is the largest is anybody's guess, but not of row 0."""
    orders = np.stack([np.random.default_rng(number).permutation(400) for number in range(32)])
    ahead = np.zeros((5, 32), np.float32)
    ahead[0, 3] = 1

    def of_torch(x):
        sums = x[:, orders] @ torch.ones(400, 1)
        return (sums.squeeze(-1) + torch.from_numpy(ahead)).argmax(-1)

    def given(first):
        return lambda x: paddle.to_tensor([first, 31, 30, 29, 28])
    x = drawn(5, 400)
    assert of_torch(torch.tensor(x)).tolist()[1:] != [31, 30, 29, 28]
    assert align_models(Torch(of_torch), Paddle(given(3)), (x,)).verdict == "aligned"
    assert align_models(Torch(of_torch), Paddle(given(4)), (x,)).verdict == "diverged"


def test_whole_numbers_of_padding_are_not_compared():
    mask = np.ones((2, 6), np.int64)
    mask[1, 4:] = 0
    inputs = {"x": drawn(2, 6, 8), "attention_mask": mask}

    class Ours(tn.Module):
        def forward(self, x, attention_mask):
            return x.argmax(-1) * attention_mask

    class Theirs(pn.Layer):
        def forward(self, x, attention_mask):
            return paddle.where(attention_mask > 0, x.argmax(-1), paddle.full_like(attention_mask, 7))
    assert align_models(Ours(), Theirs(), inputs).verdict == "aligned"
    assert align_models(Ours(), Theirs(), tuple(inputs.values())).verdict == "diverged"


@pytest.mark.parametrize("nothing", [lambda x: None, lambda x: "words", lambda x: SimpleNamespace(logits=x)])
def test_what_holds_no_numbers_is_no_evidence(nothing):
    with pytest.raises(BadInput, match=r"holds no tensor and no number.*nothing to compare"):
        align_models(Torch(nothing), Paddle(nothing), (drawn(3, 4),))
    assert align_models(Torch(lambda x: x), Paddle(nothing), (drawn(3, 4),)).verdict == "diverged"
    both = [lambda x: {"logits": x, "more": nothing(x)}] * 2
    result = align_models(Torch(both[0]), Paddle(both[1]), (drawn(3, 4),))
    assert result.verdict == "aligned"
    assert any("more (" in note and "not compared" in note for note in result.notes) is (nothing(0) is not None)


def test_a_sequence_is_paired_with_a_mapping_by_order():
    result = align_models(Torch(lambda x: {"a": x, "b": 2 * x}), Paddle(lambda x: (x, 2 * x)), (drawn(3, 4),))
    assert result.verdict == "aligned" and [tensor.name for tensor in result.tensors] == ["a", "b"]


class TorchFused(tn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = tn.Linear(8, 24)

    def forward(self, x):
        first, second, third = self.qkv(x).chunk(3, -1)
        return first * second + third


class PaddleParts(pn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (pn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


@pytest.mark.parametrize("names", [
    {"qkv": ["q", "k", "v"]}, {f"qkv.{leaf}": [f"{part}.{leaf}" for part in "qkv"] for leaf in ("weight", "bias")}])
def test_a_fused_module_or_weight_is_said_to_be_several(names):
    ours, theirs = TorchFused(), PaddleParts()
    load_weights(ours, theirs, names)
    np.testing.assert_array_equal(theirs.k.weight.numpy(), ours.qkv.weight.detach().numpy()[8:16].T)
    assert align_models(ours, theirs, (drawn(4, 8),), names).verdict == "aligned"
    theirs.v.weight.set_value(theirs.v.weight.numpy().T.copy())
    assert align_models(ours, theirs, (drawn(4, 8),), names).first_divergence == "v.weight"


def test_rows_that_nobody_speaks_for_are_not_passed_over():
    ours, theirs = TorchFused(), PaddleParts()
    names = {f"qkv.{leaf}": [f"q.{leaf}", f"k.{leaf}"] for leaf in ("weight", "bias")}
    for look in (lambda: load_weights(ours, theirs, names), lambda: align_models(ours, theirs, (drawn(4, 8),), names)):
        with pytest.raises(BadInput, match=r"qkv.weight is \[24, 8\] in torch.* together have 16 of its rows"):
            look()


class TorchMasked(tn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.end = tn.Linear(8, 8), tn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))


class PaddleMasked(pn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.end = pn.Linear(8, 8), pn.Linear(8, 8)
        self.register_buffer("mask", paddle.zeros([8]))


class PaddleTied(pn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.fc = self.end = pn.Linear(8, 8)
        self.register_buffer("mask", paddle.zeros([8], "bool"))


@pytest.mark.parametrize(("layer", "told"), [
    (PaddleMasked, "mask is bool and mask float32"),
    (PaddleTied, r"fc.weight and end.weight of torch differ, and Paddle holds one for both, end.weight")])
def test_nothing_is_loaded_where_something_cannot_be(layer, told):
    theirs = layer()
    before = theirs.fc.weight.numpy()
    with pytest.raises(BadInput, match=told):
        load_weights(TorchMasked(), theirs)
    np.testing.assert_array_equal(theirs.fc.weight.numpy(), before)


def test_a_weight_on_one_side_only_fails():
    ours, theirs = TorchPlain(), PaddlePlain()
    load_weights(ours, theirs, NAMES)
    theirs.extra = pn.Linear(2, 2)
    result = align_models(ours, theirs, (drawn(6, 16),), NAMES)
    assert result.verdict == "diverged" and result.first_divergence == "extra.weight"
    del theirs.extra
    ours.more = tn.Linear(2, 2)
    result = align_models(ours, theirs, (drawn(6, 16),), NAMES)
    assert result.verdict == "diverged" and result.first_divergence == "more.weight"


# What is refused, and what is left alone ------------------------------------------------------------------------------

@pytest.mark.parametrize(("given", "told"), [
    (lambda: (TorchPlain(), TorchPlain(), (drawn(2, 16),)), "Comparing a framework with itself proves nothing"),
    (lambda: (PaddlePlain(), PaddlePlain(), (drawn(2, 16),)), "Comparing a framework with itself proves nothing"),
    (lambda: (TorchPlain(), "net", (drawn(2, 16),)), "a paddle.nn.Layer is needed"),
    (lambda: (TorchPlain().double(), PaddlePlain(), (drawn(2, 16),)), "Call .float() on it"),
    (lambda: (TorchPlain(), PaddlePlain(), ()), "inputs is empty"),
    (lambda: (TorchPlain(), PaddlePlain(), drawn(2, 16)), "a tuple of arrays"),
    (lambda: (TorchPlain(), PaddlePlain(), (np.array(["a"]),)), "numbers are needed"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(2, 16),), {"frist": "lower"}), "module frist. The nearest: first"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(2, 16),), {"first": "lowr"}), "The nearest: lower"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(2, 5),)), "the torch module TorchPlain failed"),
    (lambda: (TorchPlain(), PaddlePlain(), (np.ones((2, 16), "u2"),)), "0 has dtype uint16; numbers are needed that"),
    (lambda: (TorchPlain(), PaddlePlain(), (np.ones((2, 16), "g"),)), "numbers are needed that both frameworks have"),
    (lambda: (TorchPlain(), PaddlePlain(), ([[1, 2], [3]],)), "input 0 cannot be made an array"),
    (lambda: (TorchPlain(), PaddlePlain(), (torch.ones(2, requires_grad=True),)), "input 0 cannot be made an array"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(0, 16),)), "input 0 is empty, [0, 16]"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(2, 16),), {"first": None}), "first is said to be None; a name"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(2, 16),), lambda path: 3), "first.weight is said to be 3; a name"),
    (lambda: (TorchPlain(), PaddlePlain(), (drawn(2, 16),), [("first", "lower")]), "names is a list; a mapping"),
])
def test_what_cannot_be_compared_is_refused_in_a_sentence(given, told):
    with pytest.raises(BadInput) as refused:
        align_models(*given())
    assert told in str(refused.value) and "\n" not in str(refused.value)


class TorchRaw(tn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = tn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.table


class PaddleRaw(pn.Layer):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.table, self.transposed = self.create_parameter([6, 6]), transposed

    def forward(self, x):
        return paddle.matmul(x, self.table, transpose_y=self.transposed)


@pytest.mark.parametrize("layout", ["same", "transposed"])
def test_a_square_matrix_of_no_known_layer_is_never_guessed(layout):
    ours, theirs = TorchRaw(), PaddleRaw(layout == "transposed")
    with pytest.raises(BadInput, match=r'layouts=\{"table": "same"\}'):
        load_weights(ours, theirs)
    with pytest.raises(BadInput, match="table is said to be 'tranposed'; same or transposed is needed"):
        load_weights(ours, theirs, layouts={"table": "tranposed"})
    with pytest.raises(BadInput, match=r"tabel is no parameter of the Paddle layer\. The nearest: table"):
        load_weights(ours, theirs, layouts={"tabel": layout})
    load_weights(ours, theirs, layouts={"table": layout})
    assert align_models(ours, theirs, (drawn(4, 6),), layouts={"table": layout}).verdict == "aligned"
    told = align_models(ours, theirs, (drawn(4, 6),))
    assert any("table is square" in note for note in told.notes)
    other = {"same": "transposed", "transposed": "same"}[layout]
    assert align_models(ours, theirs, (drawn(4, 6),), layouts={"table": other}).first_divergence == "table"


def test_an_input_that_holds_nan_is_told():
    """A net may know what to do with it."""
    x = drawn(2, 6)
    x[1, 2] = np.nan
    result = align_models(Torch(lambda x: torch.nan_to_num(x) * 3), Paddle(lambda x: paddle.nan_to_num(x) * 3), (x,))
    assert result.verdict == "aligned" and "Input 0 holds NaN." in result.notes
    assert align_models(Torch(lambda x: x * 3), Paddle(lambda x: x * 3), (x,)).verdict == "diverged"


def test_numbers_in_the_other_order_of_bytes_are_the_same_numbers():
    x = drawn(2, 6).astype(">f4")
    result = align_models(Torch(lambda x: x * 3), Paddle(lambda x: x * 3), (x,))
    assert result.verdict == "aligned" and "float32" in result.tensors[0].dtype


def test_both_are_left_as_they_were():
    ours, theirs = resnets()
    ours.layer1[0].eval()
    theirs.layer1[1].eval()
    ours.fc.weight.grad = torch.ones_like(ours.fc.weight)
    called = []
    ours.fc.register_forward_hook(lambda *_: called.append(1))
    ours.cache, ours.seen = None, []
    theirs.layer1[0].seen = [1]
    theirs.layer1[0].register_forward_pre_hook(lambda layer, given: layer.seen.append(len(layer.seen)))

    def forward(x, plain=ours.forward):
        ours.cache = x.detach()
        ours.seen.append(x.shape)
        return plain(x)
    ours.forward = forward
    modes = [module.training for module in ours.modules()], [layer.training for layer in theirs.sublayers()]
    hooks = [len(layer._forward_pre_hooks) + len(layer._forward_post_hooks) for layer in theirs.sublayers()]
    buffers = [buffer.clone() for buffer in ours.buffers()]
    stopped = [parameter.stop_gradient for parameter in theirs.parameters()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1), paddle.seed(1)
    luck = random.random(), np.random.rand(), torch.rand(1).item(), paddle.rand([1]).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1), paddle.seed(1)
    align_models(ours, theirs, (drawn(2, 3, 33, 40),))
    assert luck == (random.random(), np.random.rand(), torch.rand(1).item(), paddle.rand([1]).item())
    assert modes == ([module.training for module in ours.modules()], [layer.training for layer in theirs.sublayers()])
    assert modes[0].count(True) and modes[0].count(False)
    assert hooks == [len(layer._forward_pre_hooks) + len(layer._forward_post_hooks) for layer in theirs.sublayers()]
    assert [len(module._forward_hooks) for module in ours.modules()].count(1) == 1 and called
    assert ours.seen == [] and theirs.layer1[0].seen == [1]
    assert ours.cache is None and ours.fc.weight.grad.eq(1).all()
    assert all(torch.equal(one, other) for one, other in zip(buffers, ours.buffers(), strict=True))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert stopped == [parameter.stop_gradient for parameter in theirs.parameters()]


def test_the_result_is_that_of_align_forward(tmp_path: Path):
    result = align_models(*mlps(), (drawn(8, 24),), name="mine")
    assert result.save(tmp_path) == tmp_path / "forward.md"
    content = json.loads((tmp_path / "forward.json").read_text("utf-8"))
    assert {"schema", "run", "family", "stage", "verdict", "first_divergence", "tensors", "reference", "candidate",
            "inputs_digest", "seconds", "peak_rss_bytes"} <= content.keys()
    assert (content["run"], content["stage"], content["verdict"]) == ("mine", "forward", "aligned")
    assert (content["reference"]["framework"], content["candidate"]["framework"]) == ("torch", "paddle")
    assert content["reference"]["weights_digest"] != content["candidate"]["weights_digest"]
    assert "mine: forward **aligned**" in (tmp_path / "forward.md").read_text("utf-8")


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_what_the_readme_shows(readme, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / readme).read_text("utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "align_models" in block)
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(code, known)
    assert "1 has epsilon 1e-06 instead of 1e-05" in capsys.readouterr().out
    assert (tmp_path / "reports/two-nets/forward.json").is_file() and code.count("\n") <= 12
    with pytest.raises(AssertionError, match="First divergence: 1"):
        known["assert_aligned"](known["mine"], known["ours"], known["inputs"])


def test_the_package_imports_nothing_heavy():
    code = "import align, sys; print(sorted({'numpy', 'torch', 'paddle'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [
    tn.LSTM(12, 10, 2, batch_first=True, bidirectional=True), tn.GRU(12, 10, 2), tn.RNN(12, 10), tn.Conv1d(5, 4, 3),
    tn.ConvTranspose1d(5, 4, 3), tn.MultiheadAttention(12, 3)])
def test_reordered_sums_are_the_same_in_exact_arithmetic(module):
    given = [torch.tensor(drawn(3, 5, 12))] * (3 if isinstance(module, tn.MultiheadAttention) else 1)

    def flat(answer) -> list[np.ndarray]:
        return [part for one in answer for part in flat(one)] if isinstance(answer, tuple) else [answer.numpy()]
    with torch.no_grad():
        plain = flat(module.eval()(*given))
        with Reordered(1):
            other = flat(module(*given))
        exact = flat(module.double()(*(one.double() for one in given)))
        with Reordered(1):
            again = flat(module(*(one.double() for one in given)))
    assert all(np.allclose(one, two, rtol=0, atol=1e-13) for one, two in zip(exact, again, strict=True))
    assert any((one != two).any() for one, two in zip(plain, other, strict=True))
