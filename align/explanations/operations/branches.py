"""What attention, MLP or head contribute, scaled or missing; residuals scaled otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .. import surgery
from ..place import Place
from ..surgery import Change
from .attention import is_attention_output
from .variant import Dial, Idea, Variant


def branches(place: Place) -> Iterator[Variant | Dial]:
    """What a linear, or the whole of attention and MLP, contributes: nothing, or more or less than it should."""
    whole = [path for path, _ in place.root.named_modules() if path.rpartition(".")[2] in place.traits.branches]
    outputs = [linear.path for linear in place.linears if is_attention_output(place, linear)]
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
    names = place.traits.residual_scale, place.traits.residual_depth
    alpha, layers = (getattr(place.root, name, None) if name else None for name in names)
    if place.whole or not isinstance(alpha if layers is None else layers, (int, float)):
        return
    right = float(alpha) if layers is None else math.sqrt(2 * layers)

    def change(value: float) -> Change:
        return surgery.attributes("", {names[0]: value} if layers is None else {names[1]: value**2 / 2})
    yield Dial("residual-scale", place.name, lambda value: (
        f"multiplies its residuals by {value:.6g} instead of {right:.6g}, as with {value**2 / 2:.4g} layers instead of "
        f"{right**2 / 2:.4g}"), change, (0.5, 1.0, 2.0, 4.0, 8.0, 16.0))


IDEAS = (
    Idea("attention, MLP or logits scaled, a block skipped", branches),
    Idea("residuals scaled otherwise", residual_scales),
)
