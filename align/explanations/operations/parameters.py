"""Weights used otherwise: transposed, swapped, cut in another order, rounded, another layer's, tied."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...parts import index_of, whole
from .. import surgery
from ..place import Layer, Place
from ..surgery import Change, together
from .attention import attentions
from .variant import Idea, Variant


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
    for attention in attentions(place):
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
    for attention in attentions(place):
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
    for attention in attentions(place):
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
        matrices = {path: parameter for path, parameter in through.items() if parameter.ndim > 1}
        for told, some in (("all of its weights", through), ("its matrices", matrices)):
            if len(some) > 1:
                yield Variant(f"rounded-to-{name}", place.name, f"rounds {told} to {name}", surgery.weights(some),
                              len(some))


def other_layers(place: Place) -> Iterator[Variant]:
    """The weights of another block in this one: all of them, or one neighbour's tensor."""
    siblings = {path: module for path, module in place.model.named_modules()
                if path in place.listed and type(module) is type(place.root) and path != place.path}
    if place.whole or not siblings:
        return
    mine = _tensors(place.root)
    names = {path: name for name, path in place.torch_paths.items()}
    for path, module in siblings.items():
        theirs = {name: tensor for name, tensor in _tensors(module).items() if name in mine}
        if theirs and all(tensor.shape == mine[name].shape for name, tensor in theirs.items()):
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
                yield Variant("tied-weights", place.paddle(f"{path}.weight"),
                              f"is tied to {place.paddle(f'{other}.weight')}, which it is not in the reference",
                              surgery.weights({f"{path}.weight": weight}))


def _tensors(module: Any) -> dict[str, Any]:
    """Parameters, and the running statistics of batch norms."""
    return dict(module.named_parameters()) | {
        name: buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2].startswith("running_")}


def _cut_per_head(parts: list[Any], heads: int) -> list[Any]:
    fused = torch.cat(parts).unflatten(0, (heads, 3, -1))
    return [fused[:, number].flatten(0, 1) for number in range(3)]


def _cut_whole(parts: list[Any], heads: int) -> list[Any]:
    fused = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1)
    return list(fused.flatten(0, 2).chunk(3))


IDEAS = (
    Idea("a square weight used transposed", transposed),
    Idea("a bias not added", missing_biases),
    Idea("q, k, v, or any two modules of one shape, swapped", swapped),
    Idea("q, k, v cut from a fused matrix in another order", fused_orders),
    Idea("one matrix for q, k and v, laid out otherwise", fused_layouts),
    Idea("the weights of another layer", other_layers),
    Idea("a head tied to another matrix", other_head_weights),
    Idea("weights rounded to float16 or bfloat16 on the way", rounded),
)
