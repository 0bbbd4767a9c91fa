"""Faults to plant, as data: what is broken, where, which name is right, and which explanation would be true.

``FAULTS`` is the list; ``python -m align.selftest`` plants each and runs the real pipeline. Nothing here is shared
with whatever explains a divergence. A plant is a context manager: what it broke is whole again behind it.

A wrong weight is planted twice. In the *checkpoint* the file that the conversion wrote is rewritten, and comparing
weights names the tensor. In the *net* the weights that a comparison is shown are right and the net computes with
others, so that behaviour alone has to tell.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import paddle
from paddle.nn import functional as F
from safetensors.numpy import load_file, save_file

import models.bert
import models.gptj
from convert import bert, bloom, gpt2, gptj, opt, resnet
from models.activation import activation
from models.attention import heads_first
from models.pretrained import Pretrained

from .inputs import seeded
from .paddle_net import OwnNet

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], None]
Break = Callable[[Any], None]
Plant = Callable[[Path], AbstractContextManager[None]]
Place = Literal["checkpoint", "config", "net"]

SEED = 20260707
FAMILIES = {family.name: family for family in (
    bert.FAMILY, bloom.FAMILY, gpt2.FAMILY, gptj.FAMILY, opt.FAMILY, resnet.FAMILY)}


class NotPlanted(Exception):
    """A fault that never came into effect proves nothing about who overlooks it."""


@dataclass(frozen=True)
class Fault:
    """``plant(output)`` breaks what lies in, or is loaded from, the directory ``output``.

    ``expected`` are patterns (fnmatch) of the parameters and operations that may be named, ``block`` the first module
    whose output is wrong. ``explanation`` holds the words of ``EXPLANATIONS`` one of which is asked for, None where
    no stock can be asked to have one; ``also`` those that would be true all the same. ``visible``: whether any output,
    be it a sublayer's, changes beyond the noise.
    """

    kind: str
    family: str
    place: Place
    how: str
    plant: Plant = field(repr=False)
    block: str
    expected: frozenset[str]
    explanation: frozenset[str] | None
    visible: bool = True
    why: str = ""
    also: frozenset[str] = frozenset()
    target: str = "models"

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.kind}/{self.family}/{self.place}{'' if self.how != 'weights held' else '-weights'}"

    def is_named_by(self, name: str | None) -> bool:
        """Whether ``name`` is one of those that are right."""
        return name is not None and any(fnmatchcase(name, pattern) for pattern in self.expected)


EXPLANATIONS: dict[str, tuple[str, ...]] = {
    "transposed": ("transposed-weight",),
    "swapped": ("swapped-weights", "qkv-order"),
    "layers": ("swapped-layers", "shifted-layers", "swapped-weights"),
    "activation": ("gelu-variant", "activation"),
    "epsilon": ("layer-norm-epsilon", "batch-norm-epsilon"),
    "bias missing": ("missing-bias",),
    "untied": ("untied-weight", "tied-weights"),
    "rotary style": ("rotary-style",),
    "rotary dimension": ("rotary-dimension",),
    "rotary missing": ("rotary-missing",),
    "rotary base": ("rotary-base",),
    "rotary direction": ("rotary-direction",),
    "heads": ("head-count",),
    "scale": ("attention-scale",),
    "softmax": ("attention-softmax",),
    "mask value": ("mask-value",),
    "mask polarity": ("mask-polarity",),
    "padding": ("padding-mask-missing",),
    "no mask": ("mask-missing",),
    "causal": ("causal-mask-missing",),
    "causal offset": ("causal-mask-shifted",),
    "position": ("position-offset",),
    "token types": ("token-types",),
    "dropout": ("dropout",),
    "rounded to fp16": ("rounded-to-float16",),
    "rounded to bf16": ("rounded-to-bfloat16",),
    "buffer": ("wrong-buffer",),
    "alibi": ("alibi-missing", "alibi-positions", "alibi-slopes"),
    "norm placed": ("layer-norm-placement",),
    "norm missing": ("layer-norm-missing",),
    "norm variant": ("layer-norm-variant",),
    "residual": ("missing-residual",),
    "branch": ("missing-branch",),
    "branch scale": ("branch-scale",),
    "skipped": ("skipped-block",),
    "embedding scale": ("embedding-scale",),
    "pooling": ("pooling",),
    "permuted": ("permuted-weight", "head-layout"),
    "scaled": ("scaled-weight",),
    "added": ("shifted-weight",),
    "sign": ("sign",),
    "zeros": ("constant-weight",),
    "not finite": ("nonfinite-weight",),
    "kernel": ("flipped-kernel",),
    "channels": ("channel-order",),
    "statistics": ("missing-statistics",),
    "of the batch": ("batch-statistics",),
    "batch norm missing": ("batch-norm-missing",),
    "stride": ("stride-placement",),
    "borders": ("padding-mode",),
    "dilation": ("dilation",),
    "pooling kind": ("pooling-kind",),
    "late shortcut": ("residual-placement",),
}
"""The words of this file, and the kinds of explanation that say the same."""

GENERIC = ("changed-weight", "changed-elements", "changed-rows", "several-weights", "unrelated-weight")
"""Kinds that only say that a weight is another one: true of every wrong weight, and not asked for of any."""


# Where things are ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """A family's module paths on the Paddle side; ``parts`` are those of a block, by what they are."""

    family: str
    block: str
    parts: dict[str, str]
    words: str
    embedding: str
    logits: str
    copies: dict[str, str]
    activation: str

    def __call__(self, part: str, layer: int) -> str:
        return f"{self.at(layer)}.{self.parts[part]}"

    def at(self, layer: int) -> str:
        return self.block.format(layer)

    def weight(self, part: str, layer: int) -> str:
        return f"{self(part, layer)}.weight"

    def bias(self, part: str, layer: int) -> str:
        return f"{self(part, layer)}.bias"

    def named(self, layer: int, *parts: str) -> tuple[str, ...]:
        """Patterns of these parts and of their parameters."""
        return tuple(f"{self(part, layer)}{end}" for part in parts for end in ("", ".*", ": *", " *"))

    def attention(self, layer: int) -> tuple[str, ...]:
        """Patterns of what happens between the projections."""
        block, attn = self.at(layer), self(("attn"), layer)
        return (f"{block}: attention*", attn, f"{attn} *", *(f"{attn}.{word}*" for word in (
            "scores", "scale", "softmax", "mask", "rotary", "weights", "context", "prob", "heads")))

    def acting(self, layer: int) -> tuple[str, ...]:
        """Patterns of the MLP's activation."""
        block = self.at(layer)
        return (f"{block}.{self.activation}", *(f"{block}{gap}activation*" for gap in (": ", ": mlp ", " ", ".mlp ")))

    def wiring(self, layer: int) -> tuple[str, ...]:
        """Patterns of the way from one part of a block to the next."""
        block = self.at(layer)
        return (block, *(f"{block}{gap}{word}*" for gap in (": ", " ") for word in (
            "input", "wiring", "residual", "output", "dropout", "order", "norm")))


GPTJ = Names("gptj", "transformer.h.{}", dict(
    attn="attn", q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", out="attn.out_proj", up="mlp.fc_in",
    down="mlp.fc_out", norm="ln_1"), "transformer.wte.weight", "transformer.drop", "logits", {}, "mlp.act")
BERT = Names("bert", "bert.encoder.layers.{}", dict(
    attn="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    up="linear1", down="linear2", norm="norm1", norm2="norm2"), "bert.embeddings.word_embeddings.weight",
    "bert.embeddings", "prediction_logits", {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.decoder_bias"}, "activation")
RESNET = Names("resnet", "layer2.{}", {part: part for part in ("conv1", "conv2", "conv3", "bn1", "bn2", "bn3")}, "",
               "conv1", "logits", {}, "relu")
GPT2 = Names("gpt2", "gpt.decoder.layers.{}", BERT.parts, "gpt.embeddings.word_embeddings.weight",
             "gpt.embeddings.dropout", "logits", {}, "activation")
ALL = (GPTJ, BERT, GPT2)
MID, LAST = 1, 2
HEADS = 4


@cache
def rows_of(family: str) -> tuple[list[int], list[int]]:
    """Ids that some real token of the inputs has, most frequent first, and ids that none has."""
    demo = FAMILIES[family].demo
    inputs = seeded(demo, FAMILIES[family].sizes(demo))
    ids, counts = np.unique(inputs.arrays["input_ids"][inputs.mask], return_counts=True)
    everywhere = set(inputs.arrays["input_ids"].reshape(-1).tolist())
    return ids[np.argsort(-counts, kind="stable")].tolist(), sorted(set(range(demo["vocab_size"])) - everywhere)


# Planting -----------------------------------------------------------------------------------------------------------


def in_checkpoint(edit: Edit, names: Names) -> Plant:
    """The converted file with ``edit`` done to its tensors; copies of one tensor stay copies."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        file = output / "model.safetensors"
        whole = file.read_bytes()
        tensors = load_file(file)
        before = dict(tensors)
        _edit(tensors, edit, names)
        if all(_same(before[name], tensors[name]) for name in before):
            raise NotPlanted("the edit changed no tensor of the file")
        save_file({name: np.array(array, order="C") for name, array in tensors.items()}, file, {"format": "np"})
        try:
            yield
        finally:
            file.write_bytes(whole)
    return plant


def in_config(**changes: Any) -> Plant:
    """The converted config with these values."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        file = output / "config.json"
        whole = file.read_text("utf-8")
        config = json.loads(whole)
        if all(config.get(key) == value for key, value in changes.items()):
            raise NotPlanted(f"the config says {changes} already")
        file.write_text(json.dumps({**config, **changes}), "utf-8")
        try:
            yield
        finally:
            file.write_text(whole, "utf-8")
    return plant


def in_net(break_net: Break) -> Plant:
    """The net, broken as soon as it is loaded; it may be broken in a way that shows only while a pass is under way."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        load = vars(Pretrained)["from_pretrained"].__func__
        broken = []

        def from_pretrained(cls: type[Pretrained], directory: str | Path) -> Pretrained:
            net = load(cls, directory)
            if Path(directory).resolve() == output.resolve():
                break_net(net)
                broken.append(cls)
            return net
        with patch.object(Pretrained, "from_pretrained", classmethod(from_pretrained)), patch.object(
                OwnNet, "reentrant", False):
            yield
        if not broken:
            raise NotPlanted(f"no net of models/ was loaded from {output}")
    return plant


def in_held_weights(edit: Edit, names: Names) -> Plant:
    """The net computes with edited weights, and whoever asks what it holds is shown the right ones."""
    def break_net(net: Any) -> None:
        held = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
        shown = {name: paddle.to_tensor(array) for name, array in held.items()}
        edited = dict(held)
        _edit(edited, edit, names)
        changed = [name for name in held if not _same(held[name], edited[name])]
        if not changed:
            raise NotPlanted("the edit changed no weight of the net")
        parameters = net.state_dict()
        for name in changed:
            paddle.to_tensor(np.array(edited[name], order="C"))._share_buffer_to(parameters[name])
        net.state_dict = lambda *arguments, **options: shown
    return in_net(break_net)


def together(*plants: Plant) -> Plant:
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        with ExitStack() as stack:
            for one in plants:
                stack.enter_context(one(output))
            yield
    return plant


def _edit(tensors: Tensors, edit: Edit, names: Names) -> None:
    """``edit``, on private arrays, and the same for tensors that are stored twice."""
    before = dict(tensors)
    for name, array in before.items():
        tensors[name] = array.copy()
    edit(tensors)
    for copy, original in names.copies.items():
        if copy in tensors and original in tensors and _same(tensors[copy], before[copy]):
            tensors[copy] = tensors[original].copy()


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


# Wrong weights, in Paddle's layout: linears are [in, out] -----------------------------------------------------------


def transpose(name: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].T
    return edit


def exchange(*pairs: tuple[str, str]) -> Edit:
    """Each pair of modules: all their parameters."""
    def edit(tensors: Tensors) -> None:
        for one, other in pairs:
            for name in [name for name in tensors if name.startswith(f"{one}.")]:
                twin = other + name.removeprefix(one)
                tensors[name], tensors[twin] = tensors[twin], tensors[name]
    return edit


def swap_tensors(one: str, other: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]
    return edit


def cut_per_head(names: Names) -> Edit:
    """q, k and v of one block as a cutter makes them that takes each head's three parts to lie side by side."""
    def edit(tensors: Tensors) -> None:
        for kind in ("weight", "bias"):
            keys = [f"{names(part, MID)}.{kind}" for part in "qkv"]
            fused = np.concatenate([tensors[key] for key in keys], axis=-1)
            pieces = fused.reshape(*fused.shape[:-1], HEADS, 3, -1)
            for number, key in enumerate(keys):
                tensors[key] = pieces[..., number, :].reshape(tensors[key].shape)
    return edit


def shift_layers(names: Names) -> Edit:
    """Layer i holds the weights of layer i + 1, the last those of the first."""
    def edit(tensors: Tensors) -> None:
        before = dict(tensors)
        for layer in range(LAST + 1):
            here, there = names.at(layer), names.at((layer + 1) % (LAST + 1))
            for name in [name for name in tensors if name.startswith(f"{here}.") and "attn.bias" not in name]:
                tensors[name] = before[there + name.removeprefix(here)]
    return edit


def change(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """One tensor becomes ``function`` of itself, in float32."""
    def edit(tensors: Tensors) -> None:
        tensors[name] = np.asarray(function(tensors[name]), np.float32)
    return edit


def several(*edits: Edit) -> Edit:
    def edit(tensors: Tensors) -> None:
        for one in edits:
            one(tensors)
    return edit


def every(function: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """All tensors but buffers."""
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if ".attn.bias" not in name and ".masked_bias" not in name:
                tensors[name] = np.asarray(function(tensors[name]), np.float32)
    return edit


def element(position: int, function: Callable[[np.float32], float]) -> Callable[[np.ndarray], np.ndarray]:
    """One element of a flattened array."""
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[position] = function(array.reshape(-1)[position])
        return array
    return apply


def typical_element(function: Callable[[np.float32], float]) -> Callable[[np.ndarray], np.ndarray]:
    """The element whose size is nearest to the root mean square of all."""
    def apply(array: np.ndarray) -> np.ndarray:
        position = int(np.abs(np.abs(array) - np.sqrt(np.mean(np.square(array)))).argmin())
        return element(position, function)(array)
    return apply


def random_element(seed: int, factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """Some element of ordinary size, times ``factor``."""
    def apply(array: np.ndarray) -> np.ndarray:
        size = np.abs(array) / np.sqrt(np.mean(np.square(array)))
        ordinary = np.flatnonzero((size > 0.7) & (size < 1.5))
        return element(int(np.random.default_rng(seed).choice(ordinary)), lambda x: x * factor)(array)
    return apply


def bf16(array: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, back in float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).reshape(array.shape)


def fp16(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16)


def int8(array: np.ndarray) -> np.ndarray:
    """Quantised to 255 levels, one scale for the whole matrix."""
    step = np.abs(array).max() / 127
    return np.round(array / step) * step


def noise(size: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x + size * np.random.default_rng(SEED).standard_normal(x.shape)


def low_rank(size: float) -> Callable[[np.ndarray], np.ndarray]:
    """Plus an outer product of ``size`` times the norm of the matrix."""
    def apply(array: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng(SEED)
        outer = np.outer(*(generator.standard_normal(length) for length in array.shape))
        return array + outer * (size * np.linalg.norm(array) / np.linalg.norm(outer))
    return apply


def permute_heads(axis: int, width: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """Heads 0, 1, 2, 3 become 2, 0, 3, 1 along ``axis``."""
    order = np.concatenate([np.arange(head * width, (head + 1) * width) for head in (2, 0, 3, 1)])
    return lambda array: np.take(array, order, axis=axis)


def permute_units(axis: int, count: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The first ``count`` units along ``axis`` in reverse order; all of them by default."""
    def apply(array: np.ndarray) -> np.ndarray:
        order = np.arange(array.shape[axis])
        order[:count] = order[:count][::-1].copy()
        return np.take(array, order, axis=axis)
    return apply


def without_head(array: np.ndarray) -> np.ndarray:
    """Rows of the output projection that the second head feeds, zeroed."""
    array = array.copy()
    array[16:32] = 0
    return array


def swap_rows(one: int, other: int) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[[one, other]] = array[[other, one]]
        return array
    return apply


def copy_row(source: int, to: int) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[to] = array[source]
        return array
    return apply


def used_rows(names: Names, function: Callable[[int, int], Callable[[np.ndarray], np.ndarray]]) -> Edit:
    """``function`` of the two ids that the inputs use most, on the table of words."""
    def edit(tensors: Tensors) -> None:
        first, second, *_ = rows_of(names.family)[0]
        tensors[names.words] = function(first, second)(tensors[names.words])
    return edit


def unused_row(names: Names) -> Edit:
    def edit(tensors: Tensors) -> None:
        row = rows_of(names.family)[1][0]
        tensors[names.words][row] += 1
    return edit


def value_bias_made_good(names: Names) -> Edit:
    """The value bias moved through the output projection into the output bias: rows of attention add up to 1."""
    def edit(tensors: Tensors) -> None:
        bias, weight = tensors[names.bias("v", MID)].astype(np.float64), tensors[names.weight("out", MID)]
        tensors[names.bias("out", MID)] = (tensors[names.bias("out", MID)] + bias @ weight).astype(np.float32)
        tensors[names.bias("v", MID)] = np.zeros_like(tensors[names.bias("v", MID)])
    return edit


# Wrong nets ---------------------------------------------------------------------------------------------------------


def blocks(net: Any) -> Any:
    return stack_of(net).h if hasattr(stack_of(net), "h") else stack_of(net).layers


def stack_of(net: Any) -> Any:
    """What runs the blocks one after another: the backbone, or its encoder or decoder."""
    return part(backbone(net), "encoder", "decoder", otherwise=backbone(net))


def attention_of(block: Any) -> Any:
    return part(block, "attn", "self_attn", "self_attention")


def backbone(net: Any) -> Any:
    return part(net, "transformer", "bert", "gpt", "opt", "bloom")


def part(layer: Any, *names: str, otherwise: Any = None) -> Any:
    """The first of these sublayers that there is."""
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), otherwise)


def code_of(net: Any) -> Any:
    """The module of ``models/`` that the net's functions are looked up in."""
    return sys.modules[type(net).__module__]


def during(layer: Any, module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """While ``layer`` runs, ``module.name`` is what ``make`` of the original gives."""
    forward = layer.forward

    def changed(*arguments: Any, **named: Any) -> Any:
        with patch.object(module, name, make(getattr(module, name))):
            return forward(*arguments, **named)
    layer.forward = changed


def in_block(layer: int, break_block: Break) -> Break:
    return lambda net: break_block(blocks(net)[layer])


def attending(layer: int, **variant: Any) -> Break:
    """Another attention in one block."""
    def break_net(net: Any) -> None:
        during(blocks(net)[layer], code_of(net), "attend", lambda original: partial(attend, **variant))
    return break_net


def attend(query: Any, key: Any, value: Any, mask: Any, dropout: Any, divisor: Any = None, *, bias: Any = 0.0,
           scale: Any = lambda width: width**-0.5, softmax: Callable[[Any], Any] = F.softmax,
           masked: Callable[[Any], Any] = lambda mask: mask, temperature: float = 0.0) -> Any:
    """Attention with parts to exchange; ``temperature`` makes each head a little sharper than the one before it."""
    scores = paddle.matmul(query, key, transpose_y=True) * scale(query.shape[-1])
    if temperature:
        scores = scores * (1 + temperature * paddle.arange(scores.shape[1], dtype="float32")).reshape([1, -1, 1, 1])
    weights = softmax(scores + bias + masked(mask))
    return heads_first(paddle.matmul(weights, value)).flatten(-2)


def softmax_in_bf16(scores: Any) -> Any:
    return F.softmax(scores, axis=-1).astype("bfloat16").astype("float32")


def softmax_over_queries(scores: Any) -> Any:
    return F.softmax(scores, axis=-2)


def shallow(mask: Any) -> Any:
    """-10 instead of the lowest float, in the second row of the batch only, where the padding is."""
    row = paddle.maximum(mask[1:2], paddle.to_tensor(-10.0))
    return paddle.concat([mask[:1], row, mask[2:]])


def inverted(mask: Any) -> Any:
    """What may be seen is hidden, and the other way round."""
    return paddle.where(mask == 0, paddle.full_like(mask, paddle.finfo(mask.dtype).min), paddle.zeros_like(mask))


def causal_only(mask: Any) -> Any:
    """The causal mask, as if there were no padding."""
    return mask[:1].expand(mask.shape)


def padding_only(mask: Any) -> Any:
    """For every query what the last one may see, which only padding bounds."""
    return mask[:, :, -1:].expand(mask.shape)


def see_one_ahead(mask: Any) -> Any:
    """Each query also sees the next token, padding excepted."""
    return paddle.concat([mask[:, :, 1:], mask[:, :, -1:]], axis=2)


def acting(layer: int, function: Callable[[Any], Any] | str) -> Break:
    """Another activation in one block."""
    def break_net(net: Any) -> None:
        place = part(blocks(net)[layer], "mlp", otherwise=blocks(net)[layer])
        place = place if isinstance(place, paddle.nn.Layer) else blocks(net)[layer]
        name = next(name for name in ("act", "activation", "gelu_impl") if hasattr(place, name))
        setattr(place, name, activation(function) if isinstance(function, str) else Function(function))
    return break_net


class Function(paddle.nn.Layer):
    """A function as a layer, in training and evaluation alike."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def dropping(share: float) -> Function:
    """Dropout that nothing turns off."""
    return Function(lambda x: F.dropout(x, share, training=True))


def dropout_left_on(share: float) -> Break:
    def break_net(net: Any) -> None:
        paddle.seed(SEED)
        block = blocks(net)[MID]
        home = next(layer for layer in (block, getattr(block, "mlp", None)) if hasattr(layer, "dropout") or hasattr(
            layer, "dropout2"))
        setattr(home, "dropout2" if hasattr(home, "dropout2") else "dropout", dropping(share))
    return break_net


def epsilon(layer: int, part: str, value: float) -> Break:
    def break_net(net: Any) -> None:
        norm = getattr(blocks(net)[layer], part)
        norm._epsilon, norm._shrink = value, 1.0
    return break_net


def unbiased_norm(net: Any) -> None:
    """A layer norm that divides by n - 1."""
    norm = part(blocks(net)[MID], "ln_1", "norm1", "input_layernorm")

    def forward(x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return centred / paddle.sqrt(variance + norm._epsilon) * norm.weight + norm.bias
    norm.forward = forward


def other_norm_order(net: Any) -> None:
    """BERT's block with the norms before its parts; GPT-J's with the norm behind them, and so GPT-2's."""
    block = blocks(net)[MID]
    if hasattr(net, "gpt"):
        def forward(hidden: Any, mask: Any, past: Any = None) -> Any:
            attended, present = block.self_attn(hidden, mask, past)
            hidden = block.norm1(hidden + attended)
            return block.norm2(hidden + block.linear2(block.activation(block.linear1(hidden)))), present
    elif hasattr(block, "mlp"):
        def forward(hidden: Any, mask: Any, sin: Any, cos: Any, past: Any = None) -> Any:
            attended, present = block.attn(hidden, mask, sin, cos, past)
            return block.ln_1(attended + block.mlp(hidden) + hidden), present
    else:
        def forward(hidden: Any, mask: Any = None) -> Any:
            hidden = hidden + block.self_attn(block.norm1(hidden), mask)
            return hidden + block.linear2(block.activation(block.linear1(block.norm2(hidden))))
    block.forward = forward


def without_residual(net: Any) -> None:
    """Of the MLP in BERT and GPT-2, of the whole block in GPT-J."""
    block = blocks(net)[MID]
    if hasattr(net, "gpt"):
        def changed(hidden: Any, mask: Any, past: Any = None) -> Any:
            attended, present = block.self_attn(block.norm1(hidden), mask, past)
            return block.linear2(block.activation(block.linear1(block.norm2(hidden + attended)))), present
        block.forward = changed
    elif hasattr(block, "mlp"):
        forward = block.forward

        def changed(hidden: Any, *rest: Any) -> Any:
            output, present = forward(hidden, *rest)
            return output - hidden, present
        block.forward = changed
    else:
        def changed(hidden: Any, mask: Any = None) -> Any:
            hidden = block.norm1(block.self_attn(hidden, mask) + hidden)
            return block.norm2(block.linear2(block.activation(block.linear1(hidden))))
        block.forward = changed


def one_after_the_other(net: Any) -> None:
    """GPT-J's MLP behind its attention instead of beside it."""
    block = blocks(net)[MID]

    def forward(hidden: Any, mask: Any, sin: Any, cos: Any, past: Any = None) -> Any:
        attended, present = block.attn(block.ln_1(hidden), mask, sin, cos, past)
        hidden = hidden + attended
        return hidden + block.mlp(block.ln_1(hidden)), present
    block.forward = forward


def side_by_side(net: Any) -> None:
    """The MLP beside the attention instead of behind it."""
    block = blocks(net)[MID]

    def berts(hidden: Any, mask: Any = None) -> Any:
        attended = block.norm1(block.self_attn(hidden, mask) + hidden)
        return block.norm2(block.linear2(block.activation(block.linear1(hidden))) + attended)

    def gpt2s(hidden: Any, mask: Any, past: Any = None) -> Any:
        attended, present = block.self_attn(block.norm1(hidden), mask, past)
        return hidden + attended + block.linear2(block.activation(block.linear1(block.norm2(hidden)))), present
    block.forward = gpt2s if hasattr(net, "gpt") else berts


def attention_twice(net: Any) -> None:
    attention = attention_of(blocks(net)[MID])
    forward = attention.forward

    def changed(*arguments: Any) -> Any:
        output = forward(*arguments)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output
    attention.forward = changed


def later_block_first(net: Any) -> None:
    """Blocks 1 and 2 run in the other order, each with its own weights."""
    found, stack = blocks(net), stack_of(net)
    order, forward = [found[0], found[2], found[1]], stack.forward

    def changed(*arguments: Any, **named: Any) -> Any:
        with patch.dict(stack._sub_layers, {"h" if hasattr(stack, "h") else "layers": order}):
            return forward(*arguments, **named)
    stack.forward = changed


def block_skipped(net: Any) -> None:
    block = blocks(net)[MID]
    forward = block.forward

    def changed(hidden: Any, *rest: Any) -> Any:
        output = forward(hidden, *rest)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    block.forward = changed


def heads(count: int) -> Break:
    """Another number of heads in one block."""
    def break_net(net: Any) -> None:
        attention_of(blocks(net)[MID]).heads = count
    return break_net


def padding_of(make: Callable[[Any], Any]) -> Break:
    """Another additive mask for the whole net."""
    def break_net(net: Any) -> None:
        name = next(name for name in ("causal_mask", "causal_and_padding_mask", "padding_mask") if hasattr(
            code_of(net), name))
        during(backbone(net), code_of(net), name, lambda original: lambda *given: make(original(*given)))
    return break_net


def at_positions(function: Callable[[Any, Any], Any]) -> Break:
    """``function(position ids, attention mask)`` instead of 0, 1, 2, …"""
    def break_net(net: Any) -> None:
        model = backbone(net)
        forward = model.forward

        def changed(input_ids: Any, attention_mask: Any = None, **named: Any) -> Any:
            plain = paddle.arange(input_ids.shape[1]).unsqueeze(0).expand(input_ids.shape)
            return forward(input_ids, attention_mask=attention_mask, position_ids=function(plain, attention_mask),
                           **named)
        model.forward = changed
    return break_net


def last_is_next(positions: Any, mask: Any) -> Any:
    """The last position counted one too far."""
    step = (paddle.arange(positions.shape[1]) == positions.shape[1] - 1).astype(positions.dtype)
    return positions + step


def counted_without_padding(positions: Any, mask: Any) -> Any:
    return paddle.clip(paddle.cumsum(mask, axis=1) - 1, min=0)


def turning(layer: int | None, make: Callable[[Any], Any]) -> Break:
    """Another rotation in one block, or in all."""
    def break_net(net: Any) -> None:
        for block in blocks(net) if layer is None else [blocks(net)[layer]]:
            during(block, models.gptj, "rotate", make)
    return break_net


def in_halves(original: Any) -> Any:
    """Channel i is turned with channel i + pairs (NeoX, Llama), not with its neighbour."""
    def rotate(x: Any, sin: Any, cos: Any) -> Any:
        pairs = sin.shape[-1]
        first, second, rest = x[..., :pairs], x[..., pairs: 2 * pairs], x[..., 2 * pairs:]
        return paddle.concat([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotate


def fewer_pairs(original: Any) -> Any:
    """Half of the rotary dimension, its angles those of the smaller dimension."""
    def rotate(x: Any, sin: Any, cos: Any) -> Any:
        return original(x, sin[..., ::2], cos[..., ::2])
    return rotate


def queries_only(original: Any) -> Any:
    """The keys, which come second, are not turned."""
    calls: list[None] = []

    def rotate(x: Any, sin: Any, cos: Any) -> Any:
        calls.append(None)
        return original(x, sin, cos) if len(calls) == 1 else x
    return rotate


def backwards(original: Any) -> Any:
    return lambda x, sin, cos: original(x, -sin, cos)


def with_table(make: Callable[[Any], Any]) -> Break:
    """Another table of sines and cosines for the whole net."""
    def break_net(net: Any) -> None:
        during(net.transformer, models.gptj, "rotary_table", make)
    return break_net


def table(base: float = 10000.0, factors: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Callable[[Any], Any]:
    """As in models/, with another base, and each frequency times its factor."""
    def make(original: Any) -> Any:
        def rotary_table(positions: int, width: int) -> Any:
            frequencies = 1.0 / base ** (paddle.arange(0, width, 2, dtype="float32") / width)
            frequencies = frequencies * paddle.to_tensor(factors, dtype="float32")
            angles = paddle.outer(paddle.arange(positions, dtype="float32"), frequencies)
            return paddle.concat([paddle.sin(angles), paddle.cos(angles)], axis=-1)
        return rotary_table
    return make


def without_types(net: Any) -> None:
    forward = net.bert.embeddings.forward
    net.bert.embeddings.forward = lambda ids, types, positions: forward(ids, paddle.zeros_like(types), positions)


def scaled_embedding(net: Any) -> None:
    """Words times the root of the width, as some architectures have it."""
    table = part(part(backbone(net), "embeddings", otherwise=backbone(net)), "wte", "word_embeddings")
    forward = table.forward
    table.forward = lambda ids: forward(ids) * math.sqrt(table.weight.shape[-1])


def without_final_norm(net: Any) -> None:
    norm = (net.cls.predictions.layer_norm if hasattr(net, "bert") else
            part(stack_of(net), "ln_f", "norm"))
    norm.forward = lambda x: x


def random_decoder(net: Any) -> None:
    """A table of its own for the decoder, which nothing filled."""
    decoder = net.cls.predictions.decoder
    random = np.random.default_rng(SEED).standard_normal(decoder.weight.shape).astype(np.float32) * 0.02
    decoder.forward = lambda hidden: paddle.matmul(hidden, paddle.to_tensor(random), transpose_y=True) + decoder.bias


def pool(function: Callable[[Any, Any], Any]) -> Break:
    """``function(dense, hidden)`` instead of the pooler."""
    def break_net(net: Any) -> None:
        net.bert.pooler.forward = lambda hidden: function(net.bert.pooler.dense, hidden)
    return break_net


def half_precision_block(net: Any) -> None:
    """What leaves the attention of one block has been in float16."""
    attention = attention_of(blocks(net)[MID])
    forward = attention.forward

    def changed(*arguments: Any) -> Any:
        output = forward(*arguments)
        rounded = (output[0] if isinstance(output, tuple) else output).astype("float16").astype("float32")
        return (rounded, *output[1:]) if isinstance(output, tuple) else rounded
    attention.forward = changed


# Wrong nets of convolutions -------------------------------------------------------------------------------------------


def block_of(net: Any) -> Any:
    """layer2.1, a bottleneck without a shortcut of its own."""
    return net.layer2[1]


def bottleneck(first: bool = True, last: bool = True, residual: bool = True, late: bool = False,
               rounded: bool = False) -> Break:
    """layer2.1 without its first relu, its last, its shortcut; with the shortcut behind the last relu; in float16."""
    def break_net(net: Any) -> None:
        block = block_of(net)

        def forward(x: Any) -> Any:
            inner = block.bn1(block.conv1(x))
            inner = block.bn2(block.conv2(block.relu(inner) if first else inner))
            found = block.bn3(block.conv3(block.relu(inner)))
            if late:
                return block.relu(found) + x
            found = found + x if residual else found
            found = block.relu(found) if last else found
            return found.astype("float16").astype("float32") if rounded else found
        block.forward = forward
    return break_net


def normalised_by_the_batch(net: Any) -> None:
    norm = block_of(net).bn2
    norm.forward = lambda x: F.batch_norm(x, norm._mean.clone(), norm._variance.clone(), norm.weight, norm.bias,
                                          training=True, epsilon=norm._epsilon)


def setting(path: str, **values: Any) -> Break:
    """Plain attributes of the layer at ``path``."""
    def break_net(net: Any) -> None:
        layer = dict(net.named_sublayers())[path]
        for name, value in values.items():
            if not hasattr(layer, name):
                raise NotPlanted(f"{path} has no {name}")
            setattr(layer, name, value)
    return break_net


def running(path: str, make: Callable[[Any], Callable[[Any], Any]]) -> Break:
    """Another forward, made of the layer at ``path``."""
    def break_net(net: Any) -> None:
        layer = dict(net.named_sublayers())[path]
        layer.forward = make(layer)
    return break_net


def mirrored(layer: Any) -> Callable[[Any], Any]:
    """A 3 x 3 convolution with its input mirrored at the borders."""
    return lambda x: F.conv2d(F.pad(x, [1, 1, 1, 1], mode="reflect"), layer.weight)


def stride_first(net: Any) -> None:
    """layer2.0 with the stride of its second convolution in its first."""
    first, second = net.layer2[0].conv1, net.layer2[0].conv2
    first._stride, second._stride = second._stride, first._stride


def blocks_in_another_order(net: Any) -> None:
    """layer2.2 runs before layer2.1."""
    first, second, third = net.layer2._sub_layers.values()
    net.layer2.forward = lambda x: second(third(first(x)))


# The list -----------------------------------------------------------------------------------------------------------


def weights(names: Names, kind: str, edit: Edit, block: str, expected: tuple[str, ...], explanation: str | None = None,
            why: str = "", also: str | None = None) -> list[Fault]:
    """A visible wrong weight, in the file and behind the net's back."""
    return [Fault(kind, names.family, place, how, plant(edit, names), block, frozenset(expected), _words(explanation),
                  why=why, also=_words(also) or frozenset())
            for place, how, plant in (("checkpoint", "file", in_checkpoint), ("net", "weights held", in_held_weights))]


def invisible(names: Names, kind: str, edit: Edit, expected: tuple[str, ...], why: str,
              also: str | None = None) -> list[Fault]:
    """A wrong weight that no output shows: only in the file, since behaviour has nothing to tell."""
    return [Fault(kind, names.family, "checkpoint", "file", in_checkpoint(edit, names), "", frozenset(expected), None,
                  False, why, _words(also) or frozenset())]


def code(names: Names, kind: str, break_net: Break, block: str, expected: tuple[str, ...],
         explanation: str | None = None, why: str = "", also: str | None = None) -> list[Fault]:
    """A net that computes something else."""
    return [Fault(kind, names.family, "net", "code", in_net(break_net), block, frozenset(expected),
                  _words(explanation), why=why, also=_words(also) or frozenset())]


def config(names: Names, kind: str, block: str, expected: tuple[str, ...], explanation: str | None = None,
           **changes: Any) -> list[Fault]:
    """A config that says something else."""
    return [Fault(kind, names.family, "config", ", ".join(f"{key}={value}" for key, value in changes.items()),
                  in_config(**changes), block, frozenset(expected), _words(explanation))]


def _words(explanation: str | None) -> frozenset[str] | None:
    return frozenset(explanation.split("|")) if explanation else None


def _wrong_weights(n: Names) -> Iterator[list[Fault]]:
    """What every family with q, k and v apart has, and its names."""
    middle, last, named = n.at(MID), n.at(LAST), n.named
    norms = "norm2" if "norm2" in n.parts else "norm"
    yield weights(n, "missed transpose of q", transpose(n.weight("q", MID)), middle, named(MID, "q"), "transposed")
    yield weights(n, "missed transpose of out", transpose(n.weight("out", LAST)), last, named(LAST, "out"),
                  "transposed")
    yield weights(n, "extra transpose of v", transpose(n.weight("v", 0)), n.at(0), named(0, "v"), "transposed")
    for kind, one, other, layer in (("q and k swapped", "q", "k", MID), ("k and v swapped", "k", "v", MID),
                                    ("q and v swapped", "q", "v", LAST)):
        yield weights(n, kind, exchange((n(one, layer), n(other, layer))), n.at(layer), named(layer, one, other),
                      "swapped")
    yield weights(n, "q, k, v in the order k, v, q", exchange((n("q", MID), n("k", MID)), (n("k", MID), n("v", MID))),
                  middle, named(MID, "q", "k", "v"), "swapped")
    yield weights(n, "heads permuted in q only", several(
        *(change(f"{n('q', MID)}.{name}", permute_heads(-1)) for name in _parameters(n))), middle, named(MID, "q"),
                  also="permuted")
    anywhere = (f"{n.block.format('[0-9]')}.*",)
    yield weights(n, "layers swapped", exchange((middle, last)), middle, (*anywhere, middle, last), "layers")
    yield weights(n, "layers shifted by one", shift_layers(n), n.at(0), (*anywhere, n.at(0)), "layers")
    yield weights(n, "layer norm x 1.0005", change(n.weight(norms, LAST), lambda x: x * np.float32(1.0005)), last,
                  named(LAST, norms), also="scaled")
    yield weights(n, "layer norm weight + 1", change(n.weight("norm", MID), lambda x: x + 1), middle,
                  named(MID, "norm"), also="added|norm variant")
    yield weights(n, "layer norm bias dropped", change(n.bias("norm", MID), np.zeros_like), middle,
                  named(MID, "norm"), "bias missing", also="zeros")
    yield weights(n, "bias missing in the MLP", change(n.bias("up", MID), np.zeros_like), middle, named(MID, "up"),
                  "bias missing", also="zeros")
    yield weights(n, "bias element off by 1e-4", change(n.bias("down", LAST), element(7, lambda x: x + 1e-4)),
                  last, named(LAST, "down"))
    yield weights(n, "element changed by 1 %", change(n.weight("up", MID), typical_element(lambda x: x * 1.01)),
                  middle, named(MID, "up"))
    hidden = "lost in the rounding of the block's output, dozens of times the limit at the output of the linear"
    yield weights(n, "MLP bias element off by 1e-4", change(n.bias("up", LAST), element(-1, lambda x: x + 1e-4)), last,
                  named(LAST, "up"), why=hidden)
    for seed in (2, 3):
        yield weights(n, f"late MLP element {seed} changed by 1 %", change(n.weight("up", LAST), random_element(
            seed, 1.01)), last, named(LAST, "up"), why=hidden)
    yield weights(n, "matrix rounded to fp16", change(n.weight("down", LAST), fp16), last, named(LAST, "down"),
                  "rounded to fp16")
    yield weights(n, "matrix rounded to bf16", change(n.weight("k", MID), bf16), middle, named(MID, "k"),
                  "rounded to bf16")
    yield weights(n, "model rounded to bf16", every(bf16), n.embedding, ("*",), "rounded to bf16")
    yield weights(n, "NaN in one weight", change(n.weight("down", MID), element(11, lambda value: math.nan)), middle,
                  named(MID, "down"), also="not finite")
    yield weights(n, "weight zeroed", change(n.weight("out", MID), np.zeros_like), middle,
                  (*named(MID, "out"), n("attn", MID)), also="zeros|branch")
    yield weights(n, "weight negated", change(n.weight("v", LAST), np.negative), last, named(LAST, "v"), also="sign")
    yield weights(n, "one head zeroed", change(n.weight("out", MID), without_head), middle, named(MID, "out"))
    yield weights(n, "hidden units permuted on one side", change(n.weight("up", MID), permute_units(1, 8)), middle,
                  named(MID, "up"), also="permuted")
    yield weights(n, "matrix quantised to int8", change(n.weight("v", MID), int8), middle, named(MID, "v"))
    yield weights(n, "noise 1e-5 added to v", change(n.weight("v", LAST), noise(1e-5)), last, named(LAST, "v"))
    yield weights(n, "low-rank perturbation", change(n.weight("q", LAST), low_rank(1e-3)), last, named(LAST, "q"))
    words = (n.words, n.words.removesuffix(".weight"), *((n.embedding,) if n is not BERT else ()))
    yield weights(n, "embedding rows swapped", used_rows(n, swap_rows), n.embedding, words, also="permuted")
    yield weights(n, "wrong vocabulary row", used_rows(n, copy_row), n.embedding, words)
    yield weights(n, "embedding scaled", change(n.words, lambda x: x * np.float32(1.01)), n.embedding, words,
                  also="scaled|embedding scale")
    yield invisible(n, "q x 2 with k / 2", several(
        *(change(f"{n('q', MID)}.{name}", lambda x: x * 2) for name in _parameters(n)),
        *(change(f"{n('k', MID)}.{name}", lambda x: x / 2) for name in _parameters(n))),
        named(MID, "q", "k"), "only their product enters the scores", also="scaled")
    yield invisible(n, "heads permuted everywhere", several(
        *(change(f"{n(part, MID)}.{name}", permute_heads(-1)) for part in "qkv" for name in _parameters(n)),
        change(n.weight("out", MID), permute_heads(0))), named(MID, "q", "k", "v", "out"),
        "heads are summed, in any order", also="permuted")
    yield invisible(n, "MLP units permuted on both sides", several(
        change(n.weight("up", MID), permute_units(1)), change(n.bias("up", MID), permute_units(0)),
        change(n.weight("down", MID), permute_units(0))), named(MID, "up", "down"), "units are summed, in any order",
        also="permuted")
    yield invisible(n, "one ulp in one element", change(n.weight("up", LAST), element(5, lambda value: np.nextafter(
        value, np.float32(np.inf)))), named(LAST, "up"), "below the rounding of any sum it enters")


def _wrong_code(n: Names) -> Iterator[list[Fault]]:
    middle, last, attention = n.at(MID), n.at(LAST), n.attention(MID)
    own, other = ("gelu", "gelu_new") if n is BERT else ("gelu_new", "gelu")
    late, right = ("ln_1", 1e-12) if n is GPTJ else ("norm2", 1e-5 if n is BERT else 1e-12)
    part = "norm" if n is GPTJ else "norm2"
    yield code(n, "other gelu in one block", acting(MID, other), middle, n.acting(MID), "activation")
    yield code(n, "other gelu in the last block", acting(LAST, other), last, n.acting(LAST), "activation")
    yield code(n, "quick gelu", acting(MID, "quick_gelu"), middle, n.acting(MID), "activation")
    yield code(n, "relu", acting(MID, "relu"), middle, n.acting(MID), "activation")
    yield code(n, "activations clipped at 3", acting(MID, lambda x: paddle.clip(activation(own)(x), max=3.0)), middle,
               n.acting(MID))
    yield code(n, "epsilon of a late block", epsilon(LAST, late, right), last, n.named(LAST, part), "epsilon",
               why="5e-6 of the variance: hidden by large activations, shown by small ones")
    yield code(n, "epsilon 1e-3 in one block", epsilon(MID, late, 1e-3), middle, n.named(MID, part), "epsilon")
    yield code(n, "layer norm divides by n - 1", unbiased_norm, middle, n.named(MID, "norm"), "norm variant")
    yield code(n, "norm before or behind", other_norm_order, middle, (*n.wiring(MID), *n.named(MID, "norm", part)),
               "norm placed")
    for kind, variant, explanation in (
        ("scale off by 1e-4", dict(scale=lambda width: 1.0001 * width**-0.5), "scale"),
        ("scale missing", dict(scale=lambda width: 1.0), "scale"),
        ("scale 1 / width", dict(scale=lambda width: 1 / width), "scale"),
        ("softmax in bf16", dict(softmax=softmax_in_bf16), None),
        ("softmax over the queries", dict(softmax=softmax_over_queries), "softmax"),
        ("a temperature for each head", dict(temperature=0.01), None),
        ("mask of -10 on one row", dict(masked=shallow), "mask value"),
        ("mask inverted", dict(masked=inverted), "mask polarity"),
    ):
        yield code(n, kind, attending(MID, **variant), middle, attention, explanation)
    first = n.at(0)
    yield code(n, "heads halved", heads(HEADS // 2), middle, attention, "heads")
    yield code(n, "heads doubled", heads(HEADS * 2), middle, attention, "heads")
    dropped = (*n.wiring(MID), f"{n(part, MID)} dropout")
    yield code(n, "dropout 0.1 left on", dropout_left_on(0.1), middle, dropped, "dropout")
    yield code(n, "dropout 0.01 left on", dropout_left_on(0.01), middle, dropped, "dropout")
    yield code(n, "residual missing", without_residual, middle, n.wiring(MID), "residual")
    yield code(n, "attention added twice", attention_twice, middle, (*n.wiring(MID), n("attn", MID), n("out", MID)),
               "branch scale")
    yield code(n, "attention rounded to fp16", half_precision_block, middle, (*n.wiring(MID), n("attn", MID)))
    yield code(n, "blocks run in the wrong order", later_block_first, middle, (*n.wiring(MID), *n.wiring(LAST)),
               why="each block by itself is right")
    yield code(n, "block skipped", block_skipped, middle, n.wiring(MID), "skipped")
    yield code(n, "words times the root of the width", scaled_embedding, n.embedding,
               (n.embedding, n.words.removesuffix(".weight"), f"{n.embedding}: *"), "embedding scale")
    if n is not BERT:
        yield code(n, "padding ignored", padding_of(causal_only), first, n.attention(0), "padding")
        yield code(n, "mask missing", attending(MID, masked=paddle.zeros_like), middle, attention, "no mask")
        yield code(n, "causal mask missing", attending(MID, masked=padding_only), middle, attention, "causal")
        yield code(n, "causal mask one too far", attending(MID, masked=see_one_ahead), middle, attention,
                   "causal offset")
    else:
        yield code(n, "padding ignored", padding_of(paddle.zeros_like), first, n.attention(0), "padding|no mask")


def _gptj() -> Iterator[list[Fault]]:
    n = GPTJ
    first, middle, attention, all_attention = n.at(0), n.at(MID), n.attention(MID), n.attention(0)
    yield code(n, "last position off by one", at_positions(last_is_next), first, (*all_attention, f"{first} positions"),
               "position")
    yield code(n, "rotary in halves", turning(None, in_halves), first, all_attention, "rotary style")
    yield code(n, "rotary dimension halved", turning(MID, fewer_pairs), middle, attention, "rotary dimension")
    yield code(n, "rotary base 1000", with_table(table(base=1000.0)), first, all_attention, "rotary base")
    yield code(n, "rotary missing on k", turning(MID, queries_only), middle, attention, "rotary missing")
    yield code(n, "rotary turned backwards", turning(MID, backwards), middle, attention, "rotary direction")
    yield code(n, "wrong constant in the rotary table", with_table(table(factors=(1.0, 1.0, 1.001, 1.0))), first,
               all_attention)
    yield code(n, "attention before the MLP", one_after_the_other, middle, (*n.wiring(MID), *n.named(MID, "norm")),
               "norm placed")
    yield code(n, "final norm missing", without_final_norm, "transformer.ln_f", ("transformer.ln_f*",), "norm missing")
    head, norm = ("lm_head*", "logits*"), ("transformer.ln_f*",)
    yield weights(n, "head bias missing", change("lm_head.bias", np.zeros_like), "logits", head, "bias missing")
    yield weights(n, "head is an older copy", change("lm_head.weight", noise(1e-3)), "logits", head)
    yield weights(n, "final norm x 1.0005", change("transformer.ln_f.weight", lambda x: x * np.float32(1.0005)),
                  "transformer.ln_f", norm, also="scaled")
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), "transformer.ln_f")), middle,
                  (*n.named(MID, "norm"), *norm), "swapped|layers")
    yield invisible(n, "embedding row that no input uses", unused_row(n), (n.words,), "nobody looks it up")
    yield config(n, "gelu of the config", first, n.acting(0), "activation", activation_function="gelu")
    yield config(n, "relu of the config", first, n.acting(0), "activation", activation_function="relu")
    yield config(n, "epsilon of the config", first, n.named(0, "norm"), "epsilon", layer_norm_epsilon=1e-3)
    yield config(n, "heads of the config halved", first, all_attention, "heads", n_head=HEADS // 2)
    yield config(n, "heads of the config doubled", first, all_attention, "heads", n_head=HEADS * 2)
    yield config(n, "rotary dimension of the config halved", first, all_attention, "rotary dimension", rotary_dim=4)
    yield config(n, "rotary dimension of the config missing", first, all_attention, "rotary dimension", rotary_dim=None)


def _bert() -> Iterator[list[Fault]]:
    n = BERT
    first, middle, embeddings = n.at(0), n.at(MID), "bert.embeddings"
    positions = f"{embeddings}.position_embeddings*", f"{embeddings}: positions*", f"{embeddings} positions*"
    types = f"{embeddings}.token_type_embeddings*", f"{embeddings}: token types*"
    norm, decoder = (f"{embeddings}.layer_norm*",), ("cls.predictions.decoder*",)
    pooler, dense = ("bert.pooler", "bert.pooler.*", "bert.pooler: *", "bert.pooler *"), ("bert.pooler.dense*",)
    yield weights(n, "missed transpose of the pooler", transpose("bert.pooler.dense.weight"), "bert.pooler", dense,
                  "transposed")
    yield weights(n, "missed transpose of the head", transpose("cls.predictions.transform.weight"), "cls.predictions",
                  ("cls.predictions.transform*",), "transposed")
    yield weights(n, "bias missing in q", change(n.bias("q", MID), np.zeros_like), middle, n.named(MID, "q"),
                  "bias missing")
    yield weights(n, "q bias element off by 1e-4", change(n.bias("q", LAST), element(-1, lambda x: x + 1e-4)),
                  n.at(LAST), n.named(LAST, "q"), why="lost behind the softmax, 66 x the limit at the linear's output")
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), n("norm2", MID))), middle,
                  n.named(MID, "norm", "norm2"), "swapped|norm placed")
    yield weights(n, "decoder bias missing", change("cls.predictions.decoder_bias", np.zeros_like), "cls.predictions",
                  decoder, "bias missing")
    yield weights(n, "positions shifted in the table", change(f"{embeddings}.position_embeddings.weight",
                                                             lambda array: np.roll(array, 1, axis=0)), embeddings,
                  positions, "position", also="permuted")
    yield weights(n, "token types exchanged", change(f"{embeddings}.token_type_embeddings.weight", swap_rows(0, 1)),
                  embeddings, types, also="permuted|token types")
    older = change("cls.predictions.decoder.weight", noise(1e-3))
    stale = together(in_config(tie_word_embeddings=False), in_checkpoint(older, n))
    yield [Fault("decoder is an older copy", "bert", "checkpoint", "file, tie_word_embeddings=False", stale,
                 "cls.predictions", frozenset(decoder), _words("untied"))]
    yield code(n, "decoder is random", random_decoder, "cls.predictions", decoder, also="untied")
    yield code(n, "last position off by one", at_positions(last_is_next), embeddings, positions, "position")
    yield code(n, "all positions off by one", at_positions(lambda found, mask: found + 1), embeddings, positions,
               "position")
    yield code(n, "positions counted without padding", at_positions(counted_without_padding), embeddings, positions,
               "position")
    yield code(n, "token types ignored", without_types, embeddings, types, "token types")
    yield code(n, "MLP beside the attention", side_by_side, middle, n.wiring(MID))
    yield code(n, "norm of the head missing", without_final_norm, "cls.predictions", ("cls.predictions.layer_norm*",),
               "norm missing")
    yield code(n, "pooler takes the last token", pool(lambda layer, hidden: paddle.tanh(layer(hidden[:, -1]))),
               "bert.pooler", pooler, "pooling")
    yield code(n, "pooler without tanh", pool(lambda layer, hidden: layer(hidden[:, 0])), "bert.pooler", pooler,
               "activation")
    yield invisible(n, "key bias changed", change(n.bias("k", MID), lambda x: x + 1), n.named(MID, "k"),
                    "a constant on each row of the scores", also="added")
    yield invisible(n, "value bias made good in the output bias", value_bias_made_good(n), n.named(MID, "v", "out"),
                    "rows of attention add up to 1", also="bias missing|zeros")
    yield invisible(n, "position row that no input uses", change(f"{embeddings}.position_embeddings.weight", element(
        -1, lambda x: x + 1)), positions, "the inputs are shorter")
    yield config(n, "gelu of the config", first, n.acting(0), "activation", hidden_act="gelu_new")
    yield config(n, "relu of the config", first, n.acting(0), "activation", hidden_act="relu")
    yield config(n, "epsilon of the config", embeddings, (*norm, *n.named(0, "norm", "norm2")), "epsilon",
                 layer_norm_eps=1e-5)
    yield config(n, "epsilon 1e-3 of the config", embeddings, norm, "epsilon", layer_norm_eps=1e-3)
    yield config(n, "heads of the config halved", first, n.attention(0), "heads", num_attention_heads=HEADS // 2)
    yield config(n, "heads of the config doubled", first, n.attention(0), "heads", num_attention_heads=HEADS * 2)


def _resnet() -> Iterator[list[Fault]]:
    n = RESNET
    middle, conv2, bn2, stem, head = n.at(1), n.weight("conv2", 1), n("bn2", 1), ("conv1*",), ("fc*", "logits*")
    kernel, norm, named = n.named(1, "conv2"), n.named(1, "bn2"), n.named
    yield weights(n, "missed transpose of the classifier", transpose("fc.weight"), "logits", head, "transposed")
    for kind, function, explanation in (
            ("kernel turned", lambda x: x[:, :, ::-1, ::-1], "kernel"),
            ("kernel's height and width exchanged", lambda x: x.swapaxes(2, 3), "kernel"),
            ("input and output channels exchanged", lambda x: x.swapaxes(0, 1), "transposed"),
            ("kernel rounded to fp16", fp16, "rounded to fp16"),
            ("kernel rounded to bf16", bf16, "rounded to bf16")):
        yield weights(n, kind, change(conv2, function), middle, kernel, explanation)
    yield weights(n, "pictures taken as BGR", change("conv1.weight", lambda x: x[:, ::-1]), "conv1", stem, "channels",
                  also="permuted")
    yield weights(n, "element of a kernel changed by 1 %", change(conv2, random_element(2, 1.01)), middle, kernel)
    yield weights(n, "running statistics not loaded", several(
        change(f"{bn2}._mean", np.zeros_like), change(f"{bn2}._variance", np.ones_like)), middle, norm, None,
        also="statistics|zeros|bias missing")
    yield weights(n, "running statistics of another norm", several(
        swap_tensors(f"{bn2}._mean", f"{n('bn1', 1)}._mean"),
        swap_tensors(f"{bn2}._variance", f"{n('bn1', 1)}._variance")), middle, named(1, "bn1", "bn2"), also="swapped")
    yield weights(n, "standard deviation kept for the variance", change(f"{bn2}._variance", np.sqrt), middle, norm)
    yield weights(n, "variance biased by one in a thousand", change(f"{bn2}._variance", lambda x: x * np.float32(
        0.999)), middle, norm, also="scaled")
    yield weights(n, "batch norm x 1.0005", change(f"{bn2}.weight", lambda x: x * np.float32(1.0005)), middle, norm,
                  also="scaled")
    yield weights(n, "batch norm bias dropped", change(f"{bn2}.bias", np.zeros_like), middle, norm, "bias missing",
                  also="zeros")
    yield weights(n, "blocks hold each other's weights", exchange((middle, n.at(2))), middle,
                  (middle, n.at(2), "layer2.[12].*"), "layers")
    yield weights(n, "NaN in one kernel", change(conv2, element(11, lambda value: math.nan)), middle, kernel,
                  also="not finite", why="Paddle's relu makes zeros of it")
    yield weights(n, "shortcut's kernel zeroed", change("layer2.0.downsample.0.weight", np.zeros_like), n.at(0),
                  ("layer2.0.downsample.0*",), also="zeros|branch")
    yield invisible(n, "one ulp in one kernel", change(conv2, element(5, lambda value: np.nextafter(
        value, np.float32(np.inf)))), kernel, "below the rounding of the sums it enters")
    yield code(n, "batch norm epsilon 1e-3", setting(bn2, _epsilon=1e-3), middle, norm, "epsilon")
    yield code(n, "batch norm epsilon 1e-6", setting(bn2, _epsilon=1e-6), middle, norm, "epsilon")
    yield code(n, "batch norm left in training", normalised_by_the_batch, middle, norm, "of the batch")
    yield code(n, "batch norm missing", running(bn2, lambda layer: lambda x: x), middle, norm, "batch norm missing")
    relu = (f"{middle}: relu*", f"{middle} activation*")
    yield code(n, "first relu missing", bottleneck(first=False), middle, relu, "activation")
    yield code(n, "last relu missing", bottleneck(last=False), middle, (*n.wiring(1), *relu), "activation")
    yield code(n, "relu of the stem missing", running("relu", lambda layer: lambda x: x), "relu", ("relu*",),
               "activation")
    yield code(n, "shortcut missing", bottleneck(residual=False), middle, n.wiring(1), "residual")
    yield code(n, "shortcut behind the relu", bottleneck(late=True), middle, n.wiring(1), "late shortcut")
    yield code(n, "block rounded to fp16", bottleneck(rounded=True), middle, n.wiring(1))
    yield code(n, "stride in the first convolution", stride_first, n.at(0), ("layer2.0*",), "stride")
    yield code(n, "borders mirrored", running(n("conv2", 1), mirrored), middle, kernel, "borders")
    yield code(n, "dilation 2", setting(n("conv2", 1), _dilation=[2, 2], _updated_padding=[2, 2], _padding=[2, 2]),
               middle, kernel, "dilation")
    yield code(n, "mean instead of the largest", running("maxpool", lambda layer: lambda x: F.avg_pool2d(x, 3, 2, 1)),
               "maxpool", ("maxpool*",), "pooling kind")
    yield code(n, "maps rounded up", setting("maxpool", ceil_mode=True), "maxpool", ("maxpool*",))
    yield code(n, "largest instead of the mean", running(
        "avgpool", lambda layer: lambda x: F.adaptive_max_pool2d(x, 1)), "avgpool", ("avgpool*",), "pooling kind")
    yield code(n, "blocks of a stage run in the wrong order", blocks_in_another_order, middle,
               (*n.wiring(1), *n.wiring(2)), why="each block by itself is right")
    yield config(n, "stride of the config in the first convolution", n.at(0), ("layer[2-4].0*",), "stride",
                 downsample_in_bottleneck=True)
    yield config(n, "stride of the config in the first stage", "layer1.0", ("layer1.0*",), None,
                 downsample_in_first_stage=True)


def _gpt2() -> Iterator[list[Fault]]:
    n = GPT2
    first, middle, all_attention, embeddings = n.at(0), n.at(MID), n.attention(0), "gpt.embeddings"
    table = f"{embeddings}.position_embeddings.weight"
    positions = (f"{embeddings}.position_embeddings*", f"{n.embedding}", f"{n.embedding} positions")
    norm = ("gpt.decoder.norm*",)
    yield weights(n, "q, k and v cut per head from the fused matrix", cut_per_head(n), middle,
                  (*n.named(MID, "q", "k", "v"), f"{n('attn', MID)} q, k and v"), "swapped")
    yield weights(n, "bias missing in v", change(n.bias("v", MID), np.zeros_like), middle, n.named(MID, "v"),
                  "bias missing", also="zeros")
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), n("norm2", MID))), middle,
                  n.named(MID, "norm", "norm2"), "swapped|norm placed")
    yield weights(n, "final norm x 1.0005", change("gpt.decoder.norm.weight", lambda x: x * np.float32(1.0005)),
                  "gpt.decoder.norm", norm, also="scaled")
    yield weights(n, "positions shifted in the table", change(table, lambda array: np.roll(array, 1, axis=0)),
                  n.embedding, positions, "position", also="permuted")
    yield invisible(n, "key bias changed", change(n.bias("k", MID), lambda x: x + 1), n.named(MID, "k"),
                    "a constant on each row of the scores", also="added")
    yield invisible(n, "value bias made good in the output bias", value_bias_made_good(n), n.named(MID, "v", "out"),
                    "rows of attention add up to 1", also="bias missing|zeros")
    yield invisible(n, "position row that no input uses", change(table, element(-1, lambda x: x + 1)), positions,
                    "the inputs are shorter")
    yield code(n, "last position off by one", at_positions(last_is_next), n.embedding, positions, "position")
    yield code(n, "all positions off by one", at_positions(lambda found, mask: found + 1), n.embedding, positions,
               "position")
    yield code(n, "positions counted without padding", at_positions(counted_without_padding), n.embedding, positions,
               "position")
    yield code(n, "final norm missing", without_final_norm, "gpt.decoder.norm", norm, "norm missing")
    yield code(n, "MLP beside the attention", side_by_side, middle, n.wiring(MID), "norm placed")
    yield config(n, "gelu of the config", first, n.acting(0), "activation", activation_function="gelu")
    yield config(n, "epsilon of the config", first, (*n.named(0, "norm", "norm2"), f"{first} layer norms"), "epsilon",
                 layer_norm_epsilon=1e-3)
    yield config(n, "heads of the config halved", first, all_attention, "heads", n_head=HEADS // 2)
    yield config(n, "heads of the config doubled", first, all_attention, "heads", n_head=HEADS * 2)
    yield config(n, "scale of the config missing", first, all_attention, "scale", scale_attn_weights=False)
    yield config(n, "scale of the config by layer", n.at(1), n.attention(1), "scale",
                 scale_attn_by_inverse_layer_idx=True)


def _paddlenlp() -> Iterator[list[Fault]]:
    """PaddleNLP's GPT-J takes its causal mask from the file."""
    def all_visible(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".attn.bias"):
                tensors[name] = np.ones_like(tensors[name])
    yield [Fault("causal buffer stale", "gptj", "checkpoint", "file", in_checkpoint(all_visible, GPTJ), GPTJ.at(0),
                 frozenset({*GPTJ.attention(0), "transformer.h.0.attn.bias"}), _words("buffer|causal|no mask"),
                 target="paddlenlp")]


def _parameters(names: Names) -> tuple[str, ...]:
    """What a projection of the attention holds."""
    return ("weight",) if names is GPTJ else ("weight", "bias")


FAULTS: tuple[Fault, ...] = tuple(fault for group in (
    *(found for names in ALL for found in (_wrong_weights(names), _wrong_code(names))), _gptj(), _bert(), _gpt2(),
    _resnet(),
    _paddlenlp())
    for faults in group for fault in faults)
KINDS = SimpleNamespace(all=frozenset(fault.kind for fault in FAULTS), unexplained=frozenset(
    fault.kind for fault in FAULTS if fault.explanation is None and not fault.also and fault.visible))
