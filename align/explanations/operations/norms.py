"""A norm with another epsilon, of another kind, or left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...torch_side import is_rms_norm
from .. import surgery
from ..place import Place
from ..surgery import Change, together
from .variant import Dial, Idea, Variant

EPSILON = ("eps", "variance_epsilon")
EPSILONS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.0)


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


def _rms_norms(place: Place) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in place.modules(nn.Module) if not isinstance(module, nn.LayerNorm)
            and is_rms_norm(module)]


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


IDEAS = (
    Idea("another layer-norm epsilon", epsilons),
    Idea("a layer norm left out or of another kind", norm_variants),
    Idea("an RMS norm left out or of another kind", rms_norm_variants),
)
