"""The catalogue: what a net may compute instead of what the reference computes.

An idea yields variants of the reference at one place. A variant is tried as it is; a dial has one number that is
solved for. Ideas look for modules by their class, and by the spellings below where a class says too little, so that
most of them hold for families that are not named here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..parts import index_of, whole
from ..torch_side import is_rms_norm
from . import surgery
from .place import Layer, Place
from .surgery import Change, together

QUERY, KEY, VALUE = {"q_proj", "query", "q"}, {"k_proj", "key", "k"}, {"v_proj", "value", "v"}
FUSED = "query_key_value"
"""One linear whose rows hold query, key and value by turns, head by head, in Paddle too."""
ATTENTION_OUTPUT = {"out_proj", "attention.output.dense", "self_attention.dense", "SelfAttention.o",
                    "EncDecAttention.o"}
MLP, ATTENTION = {"mlp", "DenseReluDense"}, {"attn", "SelfAttention", "EncDecAttention"}
UNSCALED = {"T5Attention"}
EPSILON = ("eps", "variance_epsilon")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "head_width", "d_head", "d_k", "key_value_proj_dim")
ROTARY, ROTARY_WIDTH, ROTARY_TABLE = "apply_rotary_pos_emb", "rotary_dim", "embed_positions"
FREQUENCIES = "inv_freq"
ALIBI = "build_alibi_tensor"
GELUS = ("gelu", "gelu_new", "quick_gelu", "gelu_10")
OTHER_ACTIVATIONS = ("relu", "silu", "tanh", "sigmoid", "linear", "mish", "leaky_relu", "relu2", "relu6", "laplace")
SAME_ACTIVATION = {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new",
                   "gelu_accurate": "gelu_new", "swish": "silu"}
EPSILONS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.0)
MASKED = -1e30


@dataclass(frozen=True)
class Variant:
    """``change`` makes the reference compute something else; ``told`` follows the subject in a sentence.

    ``extent`` is how many tensors or modules it changes: of two that fit, the narrower one is told.
    """

    kind: str
    subject: str
    told: str
    change: Change
    extent: int = 1


@dataclass(frozen=True)
class Dial:
    """A variant with one positive number in it. ``grid`` is where the search for it starts."""

    kind: str
    subject: str
    told: Callable[[float], str]
    change: Callable[[float], Change]
    grid: tuple[float, ...]
    extent: int = 1

    def at(self, number: float) -> Variant:
        return Variant(self.kind, self.subject, self.told(number), self.change(number), self.extent)


@dataclass(frozen=True)
class Idea:
    about: str
    variants: Callable[[Place], Iterable[Variant | Dial]]


# Parameters -----------------------------------------------------------------------------------------------------------

def transposed(place: Place) -> Iterator[Variant]:
    square = {linear.name: linear.holding(weight=linear["weight"].T) for linear in place.linears
              if linear["weight"].shape[0] == linear["weight"].shape[1]}
    for name, turned in square.items():
        yield Variant("transposed-weight", f"{name}.weight", "is used transposed", surgery.weights(turned))
    if len(square) > 1:
        yield Variant("transposed-weight", place.name, "uses every square weight transposed",
                      together(*map(surgery.weights, square.values())), len(square))


def missing_biases(place: Place) -> Iterator[Variant]:
    biases = dict(layer.holding(bias=layer["bias"]).popitem() for layer in (*place.linears, *place.norms)
                  if "bias" in layer.keys)
    for path, bias in biases.items():
        yield Variant("missing-bias", place.paddle(path), "is not added",
                      surgery.weights({path: torch.zeros_like(bias)}))
    if len(biases) > 1:
        yield Variant("missing-bias", place.name, "adds none of its biases",
                      surgery.weights({path: torch.zeros_like(bias) for path, bias in biases.items()}), len(biases))


def swapped(place: Place) -> Iterator[Variant]:
    """Two modules of one class and shape in each other's place, and the three projections in another order."""
    for one, other in itertools.chain(*(itertools.combinations(kind, 2) for kind in (place.linears, place.norms))):
        if one.keys.keys() == other.keys.keys() and all(one[kind].shape == other[kind].shape for kind in one.keys):
            yield Variant("swapped-weights", f"{one.name}.weight", f"and {other.name}.weight are swapped",
                          surgery.weights(one.taking(other) | other.taking(one)))
    for attention in _attentions(place):
        parts = attention.parts
        if attention.fused:
            continue
        for told, order in (("k, v, q", (1, 2, 0)), ("v, q, k", (2, 0, 1))):
            taken = [part.taking(parts[number]) for part, number in zip(parts, order, strict=True)]
            yield Variant("qkv-order", f"{parts[0].name}.weight",
                          f"and its key and value siblings hold {told}, in this order",
                          together(*map(surgery.weights, taken)))


def fused_orders(place: Place) -> Iterator[Variant]:
    """q, k and v cut from one fused matrix whose rows are ordered otherwise than the cutter thinks."""
    for attention in _attentions(place):
        parts, heads = attention.parts, attention.heads
        if heads is None or attention.fused:
            continue
        kinds = [kind for kind in ("weight", "bias") if all(kind in part.keys for part in parts)]
        for told, cut in (("per head, though the fused rows are ordered q, k, v", _cut_per_head),
                          ("as q, k, v, though the fused rows are ordered per head", _cut_whole)):
            pieces = {kind: cut([part[kind] for part in parts], heads) for kind in kinds}
            tensors = [part.holding(**{kind: pieces[kind][number] for kind in kinds})
                       for number, part in enumerate(parts)]
            yield Variant("qkv-order", f"{attention.name} q, k and v", f"are cut {told}",
                          together(*map(surgery.weights, tensors)))


def fused_layouts(place: Place) -> Iterator[Variant]:
    """One matrix for q, k and v whose rows are laid out otherwise than head by head, q, k, v in turn."""
    for attention in _attentions(place):
        if not attention.fused or not attention.heads:
            continue
        fused, heads = attention.parts[0], attention.heads

        def laid(turn: Callable[[Any], Any], fused: Layer = fused) -> Change:
            return surgery.weights(fused.holding(**{kind: turn(fused[kind]) for kind in fused.keys}))

        def ordered(order: list[int], heads: int = heads) -> Callable[[Any], Any]:
            return lambda held: held.unflatten(0, (heads, 3, -1))[:, order].flatten(0, 2)

        def exchanged(sizes: tuple[int, int]) -> Callable[[Any], Any]:
            return lambda held: held.unflatten(0, (*sizes, -1)).transpose(0, 1).flatten(0, 2)
        subject = f"{fused.name}.weight"
        yield Variant("qkv-order", subject, "holds all of q, then k, then v, and is cut head by head",
                      laid(exchanged((heads, 3))))
        yield Variant("qkv-order", subject, "has been cut as q, k, v, though its rows are ordered head by head",
                      laid(exchanged((3, heads))))
        for told, order in (("k, v, q", [1, 2, 0]), ("v, q, k", [2, 0, 1]), ("k, q, v", [1, 0, 2]),
                            ("q, v, k", [0, 2, 1]), ("v, k, q", [2, 1, 0])):
            yield Variant("qkv-order", subject, f"holds {told} in each head, in this order", laid(ordered(order)))


def rounded(place: Place) -> Iterator[Variant]:
    held = {f"{path}.{kind}" if path else kind: parameter for path, module in place.modules(nn.Module)
            for kind, parameter in module._parameters.items() if parameter is not None}
    for key in [key for linear in place.linears for key in linear.keys.values() if whole(key) != key]:
        held[key] = held[whole(key)][index_of(key)]
    held = {key: parameter for key, parameter in held.items() if not any(whole(part) == key != part for part in held)}
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        through = {path: parameter.to(dtype).float() for path, parameter in held.items()}
        for path, parameter in through.items():
            yield Variant(f"rounded-to-{name}", place.paddle(path), f"is rounded to {name}",
                          surgery.weights({path: parameter}))
        yield Variant(f"rounded-to-{name}", place.name, f"rounds all of its weights to {name}",
                      surgery.weights(through), len(through))
        matrices = {path: parameter for path, parameter in through.items() if parameter.ndim > 1}
        yield Variant(f"rounded-to-{name}", place.name, f"rounds its matrices to {name}",
                      surgery.weights(matrices), len(matrices))


def other_layers(place: Place) -> Iterator[Variant]:
    """The weights of another block in this one: all of them, or one neighbour's tensor."""
    siblings = {path: module for path, module in place.model.named_modules()
                if path in place.listed and type(module) is type(place.root) and path != place.path}
    if place.whole or not siblings:
        return
    mine = dict(place.root.named_parameters())
    names = {path: name for name, path in place.torch_paths.items()}
    for path, module in siblings.items():
        theirs = dict(module.named_parameters())
        if {name: tensor.shape for name, tensor in theirs.items()} == {name: t.shape for name, t in mine.items()}:
            yield Variant("shifted-layers", place.name, f"uses the weights of {names[path]}", surgery.weights(theirs),
                          len(theirs))
            if abs(place.listed.index(path) - place.listed.index(place.path)) == 1:
                for name, tensor in theirs.items():
                    yield Variant("shifted-layers", place.paddle(name), f"is the one of {names[path]}",
                                  surgery.weights({name: tensor}))


def other_head_weights(place: Place) -> Iterator[Variant]:
    """A head that uses another matrix of its shape, the token embedding above all."""
    if not place.whole or place.start is not None:
        return
    tables = {path: module.weight for path, module in place.model.named_modules()
              if isinstance(module, (nn.Linear, nn.Embedding))}
    for path, module in place.modules(nn.Linear):
        for other, weight in tables.items():
            if weight is not module.weight and weight.shape == module.weight.shape and other != path:
                yield Variant("tied-weights", f"{place.paddle(path)}.weight",
                              f"is tied to {place.paddle(other)}.weight, which it is not in the reference",
                              surgery.weights({f"{path}.weight": weight}))


# Layer norm and activation --------------------------------------------------------------------------------------------

def epsilons(place: Place) -> Iterator[Variant | Dial]:
    norms = dict([*place.modules(nn.LayerNorm, nn.BatchNorm2d), *_rms_norms(place)])
    kinds = {path: "batch norm" if isinstance(norm, nn.BatchNorm2d) else "layer norm" for path, norm in norms.items()}
    groups = [(place.paddle(path), [path]) for path in norms]
    if len(norms) > 1:
        groups.append((f"{place.name} {next(iter(kinds.values()))}s", list(norms)))
    for subject, paths in groups:
        kind = f"{kinds[paths[0]].replace(' ', '-')}-epsilon"
        name = next(name for name in EPSILON if hasattr(norms[paths[0]], name))
        right = getattr(norms[paths[0]], name)

        def change(value: float, paths: list[str] = paths, name: str = name) -> Change:
            return together(*(surgery.attributes(path, {name: value}) for path in paths))

        def told(value: float, right: float = right) -> str:
            return f"has epsilon {value:.3g} instead of {right:g}"
        for value in EPSILONS:
            if value != right:
                yield Variant(kind, subject, told(value), change(value), len(paths))
        yield Dial(kind, subject, told, change, (right or 1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0),
                   len(paths))


def norm_variants(place: Place) -> Iterator[Variant]:
    for path, norm in place.modules(nn.LayerNorm):
        subject = place.paddle(path)
        for kind, told, function in (
                ("layer-norm-missing", "is left out", lambda module, x: x),
                ("layer-norm-variant", "does not subtract the mean", _rms_norm),
                ("layer-norm-variant", "divides by the unbiased standard deviation", _unbiased_norm),
                ("layer-norm-variant", "adds epsilon to the standard deviation, not to the variance", _outside_norm)):
            yield Variant(kind, subject, told, surgery.forward(
                path, lambda module, run, function=function: lambda x: function(module, x)))
        if norm.weight is None:
            continue
        yield Variant("layer-norm-variant", f"{subject}.weight", "is not applied",
                      surgery.weights({f"{path}.weight": torch.ones_like(norm.weight)}))
        yield Variant("layer-norm-variant", f"{subject}.weight", "is applied as 1 + weight",
                      surgery.weights({f"{path}.weight": 1 + norm.weight}))


def rms_norm_variants(place: Place) -> Iterator[Variant]:
    norms = _rms_norms(place)
    for told, function in (
            ("is left out", lambda run, x: x),
            ("subtracts the mean, as a layer norm", lambda run, x: run(x - x.mean(-1, keepdim=True)))):
        kind = "layer-norm-missing" if told == "is left out" else "layer-norm-variant"
        changes = {path: surgery.forward(path, lambda module, run, function=function: lambda x: function(run, x))
                   for path, _ in norms}
        for path, change in changes.items():
            yield Variant(kind, place.paddle(path), told, change)
        if len(changes) > 1:
            yield Variant(kind, f"every norm of {place.name}", told, together(*changes.values()), len(changes))
    for path, norm in norms:
        subject, ones = f"{place.paddle(path)}.weight", torch.ones_like(norm.weight)
        yield Variant("layer-norm-variant", subject, "is not applied", surgery.weights({f"{path}.weight": ones}))
        yield Variant("layer-norm-variant", subject, "is applied as 1 + weight",
                      surgery.weights({f"{path}.weight": ones + norm.weight}))


def norm_placements(place: Place) -> Iterator[Variant]:
    for name, told, make in PLACEMENTS.get(type(place.root).__name__, ()):
        yield Variant(name, place.name, told, surgery.forward("", lambda module, run, make=make: make(module)))
    for setting, told in SWITCHES.items():
        held = vars(place.root).get(setting)
        if isinstance(held, bool):
            yield Variant("layer-norm-placement", place.name, told[held], surgery.attributes("", {setting: not held}))


def activations(place: Place) -> Iterator[Variant]:
    known = {type(ACT2FN[name]): name for name in reversed(list(ACT2FN)) if name != "prelu"}
    known |= {type(module): "gelu_new" for _, module in place.modules(nn.Module)
              if type(module).__name__ == "BloomGelu"}
    for path, module in place.modules(*known):
        right = SAME_ACTIVATION.get(known[type(module)], known[type(module)])
        gelu = right in GELUS
        for name in GELUS + OTHER_ACTIVATIONS:
            if name != right:
                kind = "gelu-variant" if gelu and name in GELUS else "activation"
                told = f"is {_spoken(name)} instead of {_spoken(right)}"
                yield Variant(kind, f"{place.paddle(path.rpartition('.')[0])} activation", told,
                              surgery.forward(path, lambda module, run, name=name: lambda x: ACT2FN[name](x)))


# Attention ------------------------------------------------------------------------------------------------------------

def scales(place: Place) -> Iterator[Variant | Dial]:
    for attention in _attentions(place)[:1]:  # all attentions of this place alike
        subject, width = f"{attention.name} scale", attention.width
        if width is None:
            continue

        def factor(value: float) -> Change:
            return surgery.scores(query=lambda query: query * value)
        wrong = {"divides the scores by the root of the head width, which the reference does not": width**-0.5} if (
            type(attention.module).__name__ in UNSCALED) else {
            "is missing: scores are not divided by the root of the head width": math.sqrt(width),
            "is 1 / head width instead of its root": 1 / math.sqrt(width),
            "is applied twice over, squared": width**-0.5,
            "multiplies where it should divide": float(width),
            "comes from the hidden width instead of the head's": math.sqrt(1 / attention.heads),
        }
        for told, value in wrong.items():
            yield Variant("attention-scale", subject, told, factor(value))
        yield Dial("attention-scale", subject, lambda value: f"is off by a factor of {value:.7g}", factor,
                   (0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 10.0))


def softmaxes(place: Place) -> Iterator[Variant]:
    for attention in _attentions(place)[:1]:
        subject = f"{attention.name} softmax"
        for told, function in (
                ("is missing", lambda old, x: torch.where(x < MASKED, 0, x)),
                ("runs over the queries instead of the keys", lambda old, x: x.softmax(-2)),
                ("runs over the heads instead of the keys", lambda old, x: x.softmax(1)),
                ("is rounded to bfloat16", lambda old, x: old(x).bfloat16().to(x.dtype)),
                ("is rounded to float16", lambda old, x: old(x).half().to(x.dtype)),
                ("is computed on scores rounded to bfloat16 and rounded to it",
                 lambda old, x: old(x.bfloat16().to(x.dtype)).bfloat16().to(x.dtype))):
            yield Variant("attention-softmax", subject, told, surgery.scores(softmax=function))


def masks(place: Place) -> Iterator[Variant | Dial]:
    """The additive masks that a block is given, made anew: which keys each query may see, and what hides the others."""
    if place.whole:
        return
    for name, attention in zip(("attention_mask", "encoder_attention_mask"), _attentions(place), strict=False):
        if surgery.has_argument(place.root, name) and place.argument(name) is not None:
            yield from _masks(place, name, f"{attention.name} mask")


def _masks(place: Place, name: str, subject: str) -> Iterator[Variant | Dial]:
    """Of the argument ``name``, additive, [batch, 1, queries or 1, keys]."""
    captured = place.argument(name)
    length = captured.shape[-1]
    tokens = torch.from_numpy(place.mask_of(length))
    tril = torch.ones(length, length, dtype=torch.bool).tril()
    real = tokens[:, None, None, :]

    def mask(function: Callable[[Any], Any]) -> Change:
        """In the place of the mask that the block is given, and of GPT-2's own causal one beside it."""
        own = [surgery.attributes(path, {"bias": torch.ones_like(module.bias)}) for path, module in place.modules(
            nn.Module) if module._buffers.get("bias") is not None and module.bias.dtype == torch.bool]
        return together(surgery.argument(name, function), *own)

    def hidden(visible: Any, value: float | None = None) -> Change:
        def make(given: Any) -> Any:
            lowest = torch.finfo(torch.float32).min if value is None else value
            return torch.where(visible, 0.0, lowest).to(given.dtype)
        return mask(make)
    causal = captured.shape[-2] > 1
    seen = captured > MASKED
    yield Variant("mask-missing", subject, "is missing: every query sees every key", hidden(torch.ones_like(seen)))
    if causal:
        yield Variant("causal-mask-missing", subject, "is not causal: queries see the keys behind them",
                      hidden(real.expand(seen.shape)))
        yield Variant("padding-mask-missing", subject, "ignores the padding",
                      hidden(tril[None, None].expand(seen.shape)))
        for offset, told in ((1, "lets each query see one key ahead"), (-1, "hides each query's own key")):
            shifted = torch.ones(length, length, dtype=torch.bool).tril(offset)
            yield Variant("causal-mask-shifted", subject, told, hidden(shifted & real))
        yield Variant("mask-polarity", subject, "is inverted: padding is seen and tokens are hidden",
                      hidden(tril & ~real))
        yield Variant("mask-polarity", subject, "is inverted: what may be seen is hidden, and the other way round",
                      hidden(~seen))
        yield Variant("mask-polarity", subject, "is upside down: queries see only what is behind them",
                      hidden(tril.T & real))
    else:
        if name == "attention_mask":
            yield Variant("causal-mask-added", subject, "is causal, which the reference's is not", hidden(tril & real))
        yield Variant("mask-polarity", subject, "is inverted: padding is seen and tokens are hidden", hidden(~real))
    yield Variant("mask-polarity", subject, "is added to the scores as ones and zeros",
                  mask(lambda given: seen.to(given.dtype)))
    groups = [("hidden keys", ~seen)]
    if causal:
        groups += [("padding", (~real & tril).expand(seen.shape)), ("keys behind the query", (~tril & real))]
    padded = [row for row in range(len(tokens)) if not tokens[row].all()]
    if len(padded) > 1:
        rows = torch.arange(len(tokens))[:, None, None, None]
        padding = ~real & (tril if causal else True)
        groups += [(f"the padding of row {row}", ((rows == row) & padding).expand(seen.shape)) for row in padded]
        groups += [(f"the hidden keys of row {row}", (rows == row) & ~seen) for row in padded if causal]
    for told, group in groups:
        def soft(value: float, group: Any = group) -> Change:
            return mask(lambda given: torch.where(group, torch.full_like(given, -value), given))
        for value in (1.0, 5.0, 10.0, 20.0, 100.0, 1e3, 1e4):
            yield Variant("mask-value", subject, f"adds {-value:g} to {told} instead of the lowest float", soft(value))
        yield Dial("mask-value", subject,
                   lambda value, told=told: f"adds {-value:.4g} to {told} instead of the lowest float", soft,
                   (0.5, 2.0, 7.0, 15.0))


def buffers(place: Place, name: str, held: Any) -> Iterator[Variant]:
    """What a wrong causal mask or fill value of a net that keeps them as buffers does to a block's mask."""
    given = place.argument("attention_mask")
    if given is None or given.dim() != 4:
        return
    length = given.shape[-1]
    real = torch.from_numpy(place.mask)[:, None, None, :]
    tril = torch.ones(length, length, dtype=torch.bool).tril()
    table = torch.from_numpy(held)
    if table.dim() == 4 and table.shape[-1] >= length:
        seen, hidden = table[..., :length, :length] > 0, torch.tensor(torch.finfo(torch.float32).min)
    elif table.numel() == 1:
        seen, hidden = tril, table.reshape(())
    else:
        return

    def make(given: Any) -> Any:
        padding = torch.where(real, 0.0, torch.finfo(torch.float32).min / 2)
        return (torch.where(seen, 0.0, hidden) + padding).to(given.dtype)
    yield Variant("wrong-buffer", name, "is not the one that the family fills in",
                  surgery.argument("attention_mask", make))


def head_counts(place: Place) -> Iterator[Variant]:
    for attention in _attentions(place):
        heads, width = attention.heads, attention.width
        if heads is None:
            continue
        total = heads * width
        for other in (number for number in range(1, total + 1) if total % number == 0 and number != heads):
            if total // other < (getattr(attention.module, ROTARY_WIDTH, None) or 0):
                continue
            subject = f"{attention.name} heads"
            change = together(attention.with_heads(other), _alibi_of(place, other))
            yield Variant("head-count", subject, f"are {other} instead of {heads}", change)
            factor = math.sqrt(total / other / width)
            kept = surgery.scores(query=lambda query, factor=factor: query * factor)
            yield Variant("head-count", subject, f"are {other} instead of {heads}, with the right scale",
                          together(change, kept))
        yield from _head_layouts(place, attention)


def _head_layouts(place: Place, attention: Attention) -> Iterator[Variant]:
    subject, heads, width = f"{attention.name} heads", attention.heads, attention.width

    def unmerged(x: Any) -> Any:
        return x.unflatten(-1, (heads, width)).transpose(1, 2).reshape(x.shape)
    for linear in place.linears:
        if _is_attention_output(linear):
            yield Variant("head-layout", subject, "are put together without being moved back behind the tokens",
                          surgery.first_input(linear.path, unmerged))
            if attention.fused:
                continue
            strided = surgery.first_input(
                linear.path, lambda x: x.unflatten(-1, (heads, width)).transpose(-1, -2).flatten(-2))
            split = [surgery.output(part.path, lambda x: x.unflatten(-1, (width, heads)).transpose(-1, -2).flatten(-2))
                     for part in attention.parts]
            yield Variant("head-layout", subject, "take every n-th channel instead of neighbouring ones",
                          together(*split, strided))
            yield Variant("head-layout", subject, "are split by every n-th channel and put together by neighbours",
                          together(*split))


def alibis(place: Place) -> Iterator[Variant | Dial]:
    """The bias [batch * heads, 1, keys] that a block adds to its scores: slope of the head times place of the key."""
    given = place.argument("alibi")
    if given is None or not _attentions(place):
        return
    subject, tokens = f"{_attentions(place)[0].name} alibi", torch.from_numpy(place.mask)
    heads, keys = given.shape[0] // len(tokens), tokens.shape[1]
    slopes = surgery.globals_of(place.root)[ALIBI](torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    places = (tokens.long().cumsum(-1) - 1) * tokens

    def alibi(slope: Any) -> Change:
        made = slope.reshape(1, heads, 1, 1) * places.reshape(-1, 1, 1, keys)
        return surgery.argument("alibi", lambda given: made.reshape(given.shape).to(given.dtype))
    numbers = torch.arange(1, heads + 1)
    yield Variant("alibi-missing", subject, "is missing", surgery.argument("alibi", torch.zeros_like))
    yield Variant("alibi-positions", subject, "grows with the distance instead of falling", alibi(-slopes))
    for told, slope in (
            ("goes through the heads from the last to the first", slopes.flip(0)),
            ("has 2^(-8 i / heads) for every head i, no power of two", 2.0 ** (-8 * numbers / heads)),
            ("has one slope for all heads, the first", slopes[:1].expand(heads)),
            ("starts its slopes one head too early", slopes / slopes[0]),
            ("starts its slopes one head too late", slopes * slopes[0])):
        if not torch.allclose(slope, slopes):
            yield Variant("alibi-slopes", subject, told, alibi(slope))
    yield Dial("alibi-slopes", subject, lambda value: f"is multiplied by {value:.6g}",
               lambda value: surgery.argument("alibi", lambda given: given * value), (0.1, 0.5, 1.0, 2.0, 10.0))


def _alibi_of(place: Place, heads: int) -> Change:
    """The bias for another number of heads, where a block is given one."""
    if place.whole or not surgery.has_argument(place.root, "alibi"):
        return together()
    build, tokens = surgery.globals_of(place.root)[ALIBI], torch.from_numpy(place.mask).long()
    return surgery.argument("alibi", lambda given: build(tokens, heads, given.dtype))


def rotations(place: Place) -> Iterator[Variant | Dial]:
    for attention in _attentions(place):
        module = attention.module
        if ROTARY not in surgery.globals_of(module):
            continue
        subject = f"{attention.name} rotary"

        def patched(make: Callable[[Any], Any], attention: str = attention.path) -> Change:
            return surgery.function_of(attention, ROTARY, make)
        if hasattr(module, ROTARY_TABLE):
            yield Variant("rotary-style", subject, "turns the halves of a head against each other, not neighbours",
                          patched(lambda old: _halves))
            yield Variant("rotary-style", subject, "pairs neighbours, with the angles of halves",
                          patched(lambda old: lambda x, sin, cos: old(x, *_regrouped(sin, cos))))
        yield Variant("rotary-direction", subject, "turns the other way round",
                      patched(lambda old: lambda x, sin, cos: old(x, -sin, cos)))
        yield Variant("rotary-missing", subject, "is missing", patched(lambda old: lambda x, sin, cos: x))
        for which, number in (("keys", 0), ("queries", 1)):
            yield Variant("rotary-missing", subject, f"leaves the {which} as they are",
                          patched(lambda old, number=number: _on_call(old, number, lambda x, sin, cos: x)))
            for offset in (1, -1):
                for told, move in (("", _turned), (" (the last one goes to the other end)", _rolled)):
                    yield Variant("position-offset", subject,
                                  f"places the {which} {offset:+d} position away from the others{told}",
                                  patched(lambda old, number=number, offset=offset, move=move: _on_call(
                                      old, number, lambda x, sin, cos: old(x, *move(sin, cos, offset)))))
        yield from _rotary_tables(attention, subject)


def frequencies(place: Place) -> Iterator[Variant | Dial]:
    """Other frequencies in modules that keep them as a buffer, all of those in this place alike."""
    held = {path: module.inv_freq for path, module in place.modules(nn.Module)
            if isinstance(module._buffers.get(FREQUENCIES), torch.Tensor)}
    if not held:
        return
    path, right = next(iter(held.items()))
    subject = f"{place.paddle(path)} rotary"

    def exact(base: float) -> Any:
        return 1.0 / base ** (torch.arange(0, 2 * len(right), 2).float() / (2 * len(right)))

    def changed(values: Any) -> Change:
        return together(*(surgery.attributes(path, {FREQUENCIES: values}) for path in held))
    kinds = {"unrounded": exact(10000.0), "rounded to float16": exact(10000.0).half().float(),
             "rounded to bfloat16": exact(10000.0).bfloat16().float()}
    known = next((kind for kind, values in kinds.items() if torch.equal(values, right)), "others")
    for kind, values in kinds.items():
        if kind != known:
            told = f"has its frequencies {kind}; in the reference they are {known}"
            yield Variant("rotary-frequencies", subject, told, changed(values), len(held))
    yield Dial("rotary-base", subject, lambda base: f"has base {base:.6g} instead of 10000",
               lambda base: changed(exact(base).to(torch.float16).float()), (500.0, 1e3, 5e3, 2e4, 1e5, 1e6), len(held))


def _rotary_tables(attention: Attention, subject: str) -> Iterator[Variant | Dial]:
    module = attention.module
    if not hasattr(module, ROTARY_TABLE):
        return
    table, width, head = getattr(module, ROTARY_TABLE), getattr(module, ROTARY_WIDTH, None), attention.width
    turned = width or head
    if head is None or table.shape[1] != turned:
        return

    def tables(dims: int, base: float = 10000.0, over: int | None = None) -> Change:
        return surgery.attributes(attention.path, {
            ROTARY_WIDTH: dims, ROTARY_TABLE: _table(len(table), dims, base, over)})
    for dims in range(2, head + 1, 2):
        if dims != turned:
            yield Variant("rotary-dimension", subject, f"turns {dims} channels of each head instead of {turned}",
                          tables(dims))
            yield Variant("rotary-dimension", subject, f"turns {dims} channels of each head instead of {turned}, "
                          f"with frequencies for {turned}", tables(dims, over=turned))
    for over in sorted({head, head * attention.heads, turned // 2} - {turned, 0}):
        yield Variant("rotary-frequencies", subject,
                      f"spreads its frequencies over {over} channels instead of {turned}", tables(turned, over=over))
    yield Dial("rotary-base", subject, lambda base: f"has base {base:.6g} instead of 10000",
               lambda base: tables(turned, base), (500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 1e5, 5e5, 1e6))


# Embeddings, positions, branches --------------------------------------------------------------------------------------

def positions(place: Place) -> Iterator[Variant]:
    """Of a module that is given positions, or of the whole model up to its first module."""
    if (place.whole and place.start is None) or not surgery.has_argument(place.root, "position_ids"):
        return
    rows, length = place.mask.shape
    if _most_positions(place) is None:
        return
    limit, given = _most_positions(place), place.argument("position_ids")
    numbered = torch.arange(length).expand(rows, length)
    count = numbered if given is None else given.expand(rows, length)
    tokens = torch.from_numpy(place.mask).long()
    subject = f"{place.name} positions"
    last = torch.zeros_like(count)
    last[:, -1] = 1
    last_token = torch.zeros_like(count)
    last_token[torch.arange(rows), (count * tokens).argmax(1)] = 1
    counted = (tokens.cumsum(1) - 1).clamp(min=0)

    least = -getattr(place.root, "offset", 0)  # OPT's table has two rows before the first position's

    def wrapped(ids: Any) -> Any:
        return torch.where((ids < least) | (ids >= limit), ids % limit, ids)

    def held(ids: Any) -> Any:
        return ids.clamp(least, limit - 1)
    choices = [(f"are all off by {offset:+d}{told}", fit(count + offset))
               for offset in (1, -1, 2, -2) for told, fit in ((", and held at the last one", held), ("", wrapped))]
    choices += [(f"are off by {offset:+d} at the last token{told}", fit(count + offset * where))
                for offset in (1, -1) for told, where in ((" of each row", last), (" that is no padding", last_token))
                for fit in (wrapped, held)]
    if not torch.equal(count, numbered):
        choices.append(("are counted over padding too", numbered))
    choices += [("are counted from the first token that is no padding", counted),
                ("are counted over the tokens that are no padding, and 1 on padding",
                 torch.where(tokens == 1, counted, 1))]
    if place.modules(nn.Embedding):  # rotated heads see differences only: these two are no rotation, and the other way
        choices += [("are counted from the end", length - 1 - count), ("are all 0", torch.zeros_like(count))]
    choices += [(f"are counted RoBERTa's way, from {start} on", wrapped(tokens.cumsum(1) * tokens + start - 1))
                for start in (1, 2)]
    for told, ids in choices:
        moved = int((ids != count).any(0).sum())
        yield Variant("position-offset", subject, told,
                      surgery.argument("position_ids", lambda given, ids=ids: ids), moved)


def relative_positions(place: Place) -> Iterator[Variant]:
    """T5's: a learned number for each head and range of distances between query and key."""
    for path, attention in place.modules(nn.Module):
        if not getattr(attention, "has_relative_attention_bias", False):
            continue
        subject = f"{place.paddle(path)} relative positions"
        farthest, buckets = attention.relative_attention_max_distance, attention.relative_attention_num_buckets
        told = ("tell keys before and behind the query apart, as an encoder's" if attention.is_decoder else
                "are one for all keys behind the query, as a decoder's")
        yield Variant("relative-positions", subject, told,
                      surgery.attributes(path, {"is_decoder": not attention.is_decoder}))
        for other in sorted({32, 64, 128, 256, farthest // 2, 2 * farthest} - {farthest}):
            yield Variant("relative-positions", subject, f"end at a distance of {other} instead of {farthest}",
                          surgery.attributes(path, {"relative_attention_max_distance": other}))
        for other in sorted({number for number in (8, 16, 32, buckets // 2) if 4 <= number < buckets}):
            yield Variant("relative-positions", subject, f"are put into {other} buckets instead of {buckets}",
                          surgery.attributes(path, {"relative_attention_num_buckets": other}))
        table = f"{path}.relative_attention_bias"
        yield Variant("relative-positions", subject, "are not added",
                      surgery.weights({f"{table}.weight": torch.zeros_like(attention.relative_attention_bias.weight)}))
        yield Variant("relative-positions", subject, "are of query minus key instead of key minus query",
                      surgery.output(table, lambda x: x.transpose(0, 1)))


def token_types(place: Place) -> Iterator[Variant]:
    embeddings = {path.rpartition(".")[2]: (path, module) for path, module in place.modules(nn.Embedding)}
    for name, (path, module) in embeddings.items():
        told = "is not added" if len(embeddings) > 1 else "is zero"
        kind = ("token-types" if "type" in name else
                "positions-missing" if "position" in place.paddle(path) else "embedding")
        yield Variant(kind, place.paddle(path), told,
                      surgery.weights({f"{path}.weight": torch.zeros_like(module.weight)}))
        factor = math.sqrt(module.weight.shape[1])
        yield Variant("embedding-scale", place.paddle(path), "is multiplied by the root of the hidden size",
                      surgery.weights({f"{path}.weight": module.weight * factor}))
        if "type" in name:
            for told, order in (("is read at type 0 throughout", [0, 0]),
                                ("is read at type 1 throughout", [1, 1]), ("has its two types exchanged", [1, 0])):
                if len(module.weight) > 1:
                    weight = module.weight.clone()
                    weight[:2] = module.weight[order]
                    yield Variant("token-types", place.paddle(path), told, surgery.weights({f"{path}.weight": weight}))


def poolings(place: Place) -> Iterator[Variant]:
    """What a module that reads one token of a row reads instead."""
    pooler = type(place.root).__name__.endswith("Pooler")
    head = place.whole and place.start is None and place.run().ndim == 2 and len(place.run()) == len(place.mask)
    if not pooler and not head:
        return
    paths = [""] if pooler else [linear.path for linear in place.linears]
    right = "the first position" if pooler else "the last token"
    tokens = torch.from_numpy(place.mask)
    last = (torch.arange(tokens.shape[1]) * tokens).argmax(1)
    weights = tokens[..., None] / tokens.sum(1)[:, None, None]
    for told, function in (
            ("the last position", lambda x: x[:, -1:]), ("the first position", lambda x: x[:, :1]),
            ("the last token that is no padding", lambda x: x[torch.arange(len(x)), last][:, None]),
            ("the first token that is no padding", lambda x: x[torch.arange(len(x)), tokens.int().argmax(1)][:, None]),
            ("as many tokens on as there are", lambda x: x[torch.arange(len(x)), tokens.sum(1) - 1][:, None]),
            ("the mean of all positions", lambda x: x.mean(1, keepdim=True)),
            ("the mean of the tokens", lambda x: (x * weights.to(x.dtype)).sum(1, keepdim=True))):
        def read(x: Any, function: Callable[[Any], Any] = function) -> Any:
            return function(x).expand_as(x) if x.dim() == 3 else x
        for path in paths:
            yield Variant("pooling", place.name, f"reads {told} instead of {right}", surgery.first_input(path, read))


def branches(place: Place) -> Iterator[Variant | Dial]:
    """What a linear, or the whole of attention and MLP, contributes: nothing, or more or less than it should."""
    whole = [path for path, _ in place.root.named_modules() if path.rpartition(".")[2] in MLP | ATTENTION]
    outputs = [linear.path for linear in place.linears if _is_attention_output(linear)]
    for path in [*outputs, *whole]:
        subject = place.paddle(path)
        if path in whole:
            yield Variant("missing-branch", subject, "contributes nothing", surgery.output(path, torch.zeros_like))
        if path in outputs or path in whole:
            yield Dial("branch-scale", subject, lambda value: f"is multiplied by {value:.6g}",
                       lambda value, path=path: surgery.output(path, lambda x: x * value), (0.3, 0.7, 1.0, 1.5, 3.0))
    for linear in place.linears:
        if place.whole and place.start is None:
            yield Dial("logits-scale", linear.name, lambda value: f"is multiplied by {value:.6g}",
                       lambda value, path=linear.path: surgery.output(path, lambda x: x * value),
                       (0.01, 0.1, 0.5, 1.0, 2.0, 10.0))
            for name in ("softmax", "log_softmax"):
                yield Variant("logits-normalised", linear.name, f"goes through {name}", surgery.output(
                    linear.path, lambda x, name=name: getattr(x, name)(-1)))
    if not place.whole and place.argument("hidden_states") is not None and place.listed.count(place.path) == 1 and (
            place.linears and not type(place.root).__name__.endswith("Pooler")):
        yield Variant("skipped-block", place.name, "gives back its input",
                      surgery.forward("", lambda module, run: lambda x, *_, **__: (x,)))


def residual_scales(place: Place) -> Iterator[Dial]:
    """Another alpha for residuals that are multiplied by one: DeepNorm's root of twice the number of layers."""
    alpha, layers = (getattr(place.root, name, None) for name in ("alpha", "num_layers"))
    if place.whole or not isinstance(alpha if layers is None else layers, (int, float)):
        return
    right = float(alpha) if layers is None else math.sqrt(2 * layers)

    def change(value: float) -> Change:
        return surgery.attributes("", {"alpha": value} if layers is None else {"num_layers": value**2 / 2})
    yield Dial("residual-scale", place.name, lambda value: (
        f"multiplies its residuals by {value:.6g} instead of {right:.6g}, as with {value**2 / 2:.4g} layers instead of "
        f"{right**2 / 2:.4g}"), change, (0.5, 1.0, 2.0, 4.0, 8.0, 16.0))


# Families -------------------------------------------------------------------------------------------------------------

def _gptj_sequential(block: Any) -> Callable[..., Any]:
    def run(hidden: Any, *rest: Any, **named: Any) -> Any:
        attended = hidden + block.attn(block.ln_1(hidden), *rest, **_only(block.attn, named))[0]
        return (attended + block.mlp(block.ln_1(attended)),)
    return run


def _gptj(mix: Callable[[Any, Any, Any, Any], Any]) -> Callable[[Any], Callable[..., Any]]:
    """``mix(block, hidden, normed, attend)`` as the block's answer."""
    def make(block: Any) -> Callable[..., Any]:
        def run(hidden: Any, *rest: Any, **named: Any) -> Any:
            def attend(x: Any) -> Any:
                return block.attn(x, *rest, **_only(block.attn, named))[0]
            return (mix(block, hidden, block.ln_1(hidden), attend),)
        return run
    return make


def _gpt2(mix: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Callable[..., Any]]:
    """``mix(parts, hidden, attend)`` as the block's answer; attend and feed come without residual and norm."""
    def make(block: Any) -> Callable[..., Any]:
        def run(hidden: Any, past: Any = None, position: Any = None, mask: Any = None, *rest: Any, **named: Any) -> Any:
            def attend(x: Any) -> Any:
                return block.attn(x, attention_mask=named.get("attention_mask", mask))[0]
            return (mix((block.ln_1, block.ln_2, block.mlp), hidden, attend),)
        return run
    return make


def _bert(mix: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Callable[..., Any]]:
    """``mix(parts, hidden, attend)`` as the layer's answer; attend and feed come without residual and norm."""
    def make(layer: Any) -> Callable[..., Any]:
        def run(hidden: Any, mask: Any = None, *rest: Any, **named: Any) -> Any:
            def attend(x: Any) -> Any:
                return layer.attention.output.dense(layer.attention.self(x, named.get("attention_mask", mask))[0])

            def feed(x: Any) -> Any:
                return layer.output.dense(layer.intermediate(x))
            return (mix((layer.attention.output.LayerNorm, layer.output.LayerNorm, feed), hidden, attend),)
        return run
    return make


def _pre_norm(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = hidden + attend(first(hidden))
    return hidden + feed(second(hidden))


def _norm_before_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = hidden + first(attend(hidden))
    return hidden + second(feed(hidden))


def _first_norm_before_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = hidden + first(attend(hidden))
    return second(hidden + feed(hidden))


def _second_norm_before_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = first(hidden + attend(hidden))
    return hidden + second(feed(hidden))


def _no_first_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = first(attend(hidden))
    return second(hidden + feed(hidden))


def _no_second_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    return second(feed(first(hidden + attend(hidden))))


def _residual_of_the_input(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    return second(hidden + feed(first(hidden + attend(hidden))))


def _residual_before_norm(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    attended = hidden + attend(hidden)
    return second(attended + feed(first(attended)))


def _post_norm(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = first(hidden + attend(hidden))
    return second(hidden + feed(hidden))


def _side_by_side(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    return hidden + attend(first(hidden)) + feed(second(hidden))


def _normed_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = first(hidden) + attend(first(hidden))
    return second(hidden) + feed(second(hidden))


def _only_feed_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    hidden = attend(first(hidden))
    return hidden + feed(second(hidden))


def _only_attention_residual(parts: Any, hidden: Any, attend: Any) -> Any:
    first, second, feed = parts
    return feed(second(hidden + attend(first(hidden))))


def _one_norm(parts: Any, hidden: Any, attend: Any) -> Any:
    first, _, feed = parts
    hidden = hidden + attend(first(hidden))
    return hidden + feed(first(hidden))


SWITCHES = {
    "do_layer_norm_before": ("has its layer norms before attention and MLP instead of behind them",
                             "has its layer norms behind attention and MLP instead of before them"),
    "apply_residual_connection_post_layernorm": ("adds the layer norm's output as residual, not its input",
                                                 "adds the layer norm's input as residual, not its output"),
}
"""Settings of a block, and what it does when they are not False, or not True."""

PLACEMENTS: Mapping[str, tuple[tuple[str, str, Callable[[Any], Callable[..., Any]]], ...]] = {
    "GPTJBlock": (
        ("layer-norm-placement", "feeds the MLP the attention's result, one after the other instead of side by side",
         _gptj_sequential),
        ("layer-norm-placement", "feeds the MLP without the layer norm",
         _gptj(lambda block, x, normed, attend: attend(normed) + block.mlp(x) + x)),
        ("layer-norm-placement", "feeds the attention without the layer norm",
         _gptj(lambda block, x, normed, attend: attend(x) + block.mlp(normed) + x)),
        ("layer-norm-placement", "adds the layer norm's output as residual, not its input",
         _gptj(lambda block, x, normed, attend: attend(normed) + block.mlp(normed) + normed)),
        ("layer-norm-placement", "puts the layer norm behind the sum instead of before it",
         _gptj(lambda block, x, normed, attend: block.ln_1(attend(x) + block.mlp(x) + x))),
        ("missing-residual", "does not add its input",
         _gptj(lambda block, x, normed, attend: attend(normed) + block.mlp(normed))),
        ("missing-residual", "adds its input twice",
         _gptj(lambda block, x, normed, attend: attend(normed) + block.mlp(normed) + 2 * x)),
    ),
    "GPT2Block": (
        ("layer-norm-placement", "has its layer norms behind attention and MLP instead of before them",
         _gpt2(_post_norm)),
        ("layer-norm-placement", "has attention and MLP side by side instead of one after the other",
         _gpt2(_side_by_side)),
        ("layer-norm-placement", "adds the layer norms' outputs as residuals, not their inputs",
         _gpt2(_normed_residual)),
        ("layer-norm-placement", "uses its first layer norm twice", _gpt2(_one_norm)),
        ("missing-residual", "has no residual around the attention", _gpt2(_only_feed_residual)),
        ("missing-residual", "has no residual around the MLP", _gpt2(_only_attention_residual)),
    ),
    "BertLayer": (
        ("layer-norm-placement", "has its layer norms before attention and MLP instead of behind them",
         _bert(_pre_norm)),
        ("layer-norm-placement", "norms before it adds the residual", _bert(_norm_before_residual)),
        ("layer-norm-placement", "norms the attention's output before it adds the residual",
         _bert(_first_norm_before_residual)),
        ("layer-norm-placement", "norms the MLP's output before it adds the residual",
         _bert(_second_norm_before_residual)),
        ("layer-norm-placement", "adds what was before the first norm as the second residual",
         _bert(_residual_before_norm)),
        ("missing-residual", "has no residual around the attention", _bert(_no_first_residual)),
        ("missing-residual", "has no residual around the MLP", _bert(_no_second_residual)),
        ("missing-residual", "adds its own input around the MLP, not the attention's result",
         _bert(_residual_of_the_input)),
    ),
}

CATALOGUE = (
    Idea("a square weight used transposed", transposed),
    Idea("a bias not added", missing_biases),
    Idea("q, k, v, or any two modules of one shape, swapped", swapped),
    Idea("q, k, v cut from a fused matrix in another order", fused_orders),
    Idea("one matrix for q, k and v, laid out otherwise", fused_layouts),
    Idea("the weights of another layer", other_layers),
    Idea("a head tied to another matrix", other_head_weights),
    Idea("weights rounded to float16 or bfloat16 on the way", rounded),
    Idea("another gelu, another activation", activations),
    Idea("another layer-norm epsilon", epsilons),
    Idea("a layer norm left out or of another kind", norm_variants),
    Idea("an RMS norm left out or of another kind", rms_norm_variants),
    Idea("a layer norm in the wrong place, a residual missing", norm_placements),
    Idea("another attention scale", scales),
    Idea("a softmax over the wrong axis, or in half precision", softmaxes),
    Idea("the mask missing, inverted, shifted, not causal, too weak", masks),
    Idea("another number of heads, heads laid out otherwise", head_counts),
    Idea("alibi missing, with other slopes", alibis),
    Idea("rotary style, direction, dimension, base, one side only", rotations),
    Idea("other rotary frequencies", frequencies),
    Idea("positions off by one, counted otherwise", positions),
    Idea("relative positions of other distances, other ranges, one direction", relative_positions),
    Idea("token types or positions not added", token_types),
    Idea("another token pooled", poolings),
    Idea("attention, MLP or logits scaled, a block skipped", branches),
    Idea("residuals scaled otherwise", residual_scales),
)


# Helpers --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Attention:
    """Query, key and value of one attention, or the one linear of all three, and the module of torch's they are in."""

    path: str
    name: str
    module: Any
    parts: tuple[Layer, ...]

    @property
    def fused(self) -> bool:
        return len(self.parts) == 1

    @property
    def channels(self) -> int:
        """Of the queries, in all heads."""
        return sum(len(part["weight"]) for part in self.parts) // 3

    @property
    def heads(self) -> int | None:
        found = (getattr(self.module, name, None) for name in HEADS)
        return next((number for number in found if type(number) is int and number > 0), None)

    @property
    def width(self) -> int | None:
        return self.channels // self.heads if self.heads else None

    def with_heads(self, other: int) -> Change:
        """``other`` heads on the same weights, and what the module keeps of their width."""
        width = self.channels // other
        values: dict[str, Any] = {name: other for name in HEADS if hasattr(self.module, name)}
        values |= {name: width for name in HEAD_WIDTHS if hasattr(self.module, name)}
        for power in (0.5, -0.5):
            values |= {name: torch.tensor(width**power) if isinstance(held, torch.Tensor) else width**power
                       for name, held in {**vars(self.module), **self.module._buffers}.items()
                       if _is_number(held) and math.isclose(float(held), self.width**power, rel_tol=1e-6)
                       and name not in values}
        return surgery.attributes(self.path, values)


def _rms_norms(place: Place) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in place.modules(nn.Module) if not isinstance(module, nn.LayerNorm)
            and is_rms_norm(module)]


def _attentions(place: Place) -> list[Attention]:
    """Every attention of this place whose projections go by the usual names in Paddle."""
    found: dict[str, dict[int, Layer]] = {}
    for linear in place.linears:
        name, _, word = linear.name.rpartition(".")
        for number, spellings in enumerate((QUERY, KEY, VALUE)):
            if word in spellings:
                found.setdefault(name, {})[number] = linear
    attentions = []
    for name, parts in found.items():
        path = ".".join(_common([whole(part.path).split(".")[:-1] for part in parts.values()]))
        if len(parts) == 3:
            attentions.append(Attention(path, name, place.root.get_submodule(path), (parts[0], parts[1], parts[2])))
    return attentions + [
        Attention(path, linear.name.rpartition(".")[0], place.root.get_submodule(path), (linear,))
        for linear in place.linears for path, _, word in [linear.path.rpartition(".")] if word == FUSED]


def _common(paths: Iterable[list[str]]) -> list[str]:
    """What all of them begin with."""
    return [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))]


def _is_attention_output(linear: Layer) -> bool:
    return linear.path.endswith(tuple(ATTENTION_OUTPUT)) or linear.name.endswith(".out_proj")


def _is_number(held: Any) -> bool:
    return isinstance(held, float) or (isinstance(held, torch.Tensor) and held.dim() == 0 and held.is_floating_point())


def _cut_per_head(parts: list[Any], heads: int) -> list[Any]:
    fused = torch.cat(parts).unflatten(0, (heads, 3, -1))
    return [fused[:, number].flatten(0, 1) for number in range(3)]


def _cut_whole(parts: list[Any], heads: int) -> list[Any]:
    fused = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1)
    return list(fused.flatten(0, 2).chunk(3))


def _spoken(name: str) -> str:
    return {"gelu": "gelu (erf)", "gelu_new": "gelu_new (tanh approximation)", "linear": "left out"}.get(name, name)


def _rms_norm(module: Any, x: Any) -> Any:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps) * _weight(module) + _bias(module)


def _unbiased_norm(module: Any, x: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(x.var(-1, keepdim=True) + module.eps) * _weight(module) + _bias(module)


def _outside_norm(module: Any, x: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, unbiased=False, keepdim=True).sqrt() + module.eps) * _weight(module) + _bias(module)


def _weight(norm: Any) -> Any:
    return 1.0 if norm.weight is None else norm.weight


def _bias(norm: Any) -> Any:
    return 0.0 if norm.bias is None else norm.bias


def _halves(x: Any, sin: Any, cos: Any) -> Any:
    """x [batch, time, heads, width], sin and cos [batch, time, width / 2]: channel i is turned with i + width / 2."""
    sin, cos = (torch.cat([table, table], -1)[:, :, None, :] for table in (sin, cos))
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


def _regrouped(sin: Any, cos: Any) -> tuple[Any, Any]:
    half = sin.shape[-1] // 2
    order = [number for pair in range(half) for number in (pair, pair + half)] + list(range(2 * half, sin.shape[-1]))
    return sin[..., order], cos[..., order]


def _turned(sin: Any, cos: Any, offset: int) -> tuple[Any, Any]:
    """The tables of positions ``offset`` further on."""
    s, c = offset * sin[:, 1:2], cos[:, 1:2]
    return sin * c + cos * s, cos * c - sin * s


def _rolled(sin: Any, cos: Any, offset: int) -> tuple[Any, Any]:
    return sin.roll(-offset, 1), cos.roll(-offset, 1)


def _on_call(old: Callable[..., Any], number: int, other: Callable[..., Any]) -> Callable[..., Any]:
    """``other`` on every second call: keys are turned first, then queries."""
    calls = itertools.count()
    return lambda *arguments: (other if next(calls) % 2 == number else old)(*arguments)


def _table(rows: int, dims: int, base: float, over: int | None) -> Any:
    frequencies = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.int64) / (over or dims)))
    angles = torch.outer(torch.arange(rows, dtype=torch.int64).float(), frequencies).float()
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _most_positions(place: Place) -> int | None:
    """None where positions are not numbered from 0 to a limit."""
    tables = [len(module.weight) for path, module in place.modules(nn.Embedding) if "position" in place.paddle(path)]
    config = getattr(place.model, "config", None)
    return min(tables, default=getattr(config, "max_position_embeddings", None))


def _only(module: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if surgery.has_argument(module, name)}
