"""What a net of convolutions and batch norms may compute instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import surgery
from ..place import Place
from .variant import Idea, Variant

KERNELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "is turned by 180 degrees, as a convolution in the strict sense has it": (
        "flipped-kernel", lambda kernel: kernel.flip(2, 3)),
    "has height and width exchanged": ("flipped-kernel", lambda kernel: kernel.mT),
    "has input and output channels exchanged": ("transposed-weight", lambda kernel: kernel.transpose(0, 1)),
    "takes its input channels in reverse, as BGR for RGB": ("channel-order", lambda kernel: kernel.flip(1)),
}


def kernels(place: Place) -> Iterator[Variant]:
    for path, module in place.modules(nn.Conv2d):
        for told, (kind, change) in KERNELS.items():
            changed = change(module.weight)
            if changed.shape == module.weight.shape and not torch.equal(changed, module.weight):
                yield Variant(kind, f"{place.paddle(path)}.weight", told, surgery.weights({f"{path}.weight": changed}))


def strides(place: Place) -> Iterator[Variant]:
    """Two convolutions of a block with each other's stride."""
    names = place.traits.shortcut
    found = [(path, module) for path, module in place.modules(nn.Conv2d) if names and path.startswith(
        f"{names.branch}.")]
    for one, first in found:
        for other, second in found:
            if first.stride != second.stride and first is not second and max(first.stride) > 1:
                yield Variant("stride-placement", place.name,
                              f"has its stride in {place.paddle(other).rpartition('.')[2]} instead of "
                              f"{place.paddle(one).rpartition('.')[2]}",
                              surgery.together(surgery.attributes(one, {"stride": second.stride}),
                                               surgery.attributes(other, {"stride": first.stride})))


def paddings(place: Place) -> Iterator[Variant]:
    for path, module in place.modules(nn.Conv2d):
        if any(module.padding):
            for mode in ("reflect", "replicate", "circular"):
                yield Variant("padding-mode", place.paddle(path), f"pads by {mode} instead of zeros",
                              surgery.attributes(path, {"padding_mode": mode}))
            wider = tuple(2 * size for size in module.padding)
            yield Variant("dilation", place.paddle(path), "has dilation 2 instead of 1",
                          surgery.attributes(path, {"dilation": (2, 2), "padding": wider}))


def statistics(place: Place) -> Iterator[Variant]:
    """Batch norms that do not use the running statistics of the file."""
    norms = dict(place.modules(nn.BatchNorm2d))
    groups = [(place.paddle(path), [path]) for path in norms]
    if len(norms) > 1:
        groups.append((f"{place.name} batch norms", list(norms)))
    for subject, paths in groups:
        fresh = surgery.together(*(surgery.weights({
            f"{path}.running_mean": torch.zeros_like(norms[path].running_mean),
            f"{path}.running_var": torch.ones_like(norms[path].running_var)}) for path in paths))
        yield Variant("missing-statistics", subject, "has fresh running statistics, mean 0 and variance 1", fresh,
                      len(paths))
        batch = surgery.together(*(surgery.forward(path, _of_the_batch) for path in paths))
        yield Variant("batch-statistics", subject, "normalises by the batch's own statistics, as in training", batch,
                      len(paths))
    for path in norms:
        yield Variant("batch-norm-missing", place.paddle(path), "is left out",
                      surgery.forward(path, lambda module, run: lambda x: x))


def residuals(place: Place) -> Iterator[Variant]:
    """A block is activation(branch(x) + shortcut(x)) in the reference."""
    names, parts = place.traits.shortcut, dict(place.root.named_children())
    wanted = (names.branch, names.shortcut, names.activation) if names else ()
    if place.whole or not names or not parts.keys() >= set(wanted):
        return
    branch, shortcut, activation = (parts[name] for name in wanted)
    for kind, told, function in (
            ("missing-residual", "does not add its shortcut", lambda x: activation(branch(x))),
            ("missing-branch", "adds nothing to its shortcut", lambda x: activation(shortcut(x))),
            ("residual-placement", "activates before it adds the shortcut", lambda x: activation(branch(x)) + shortcut(
                x)),
            ("skipped-block", "is skipped", lambda x: x)):
        yield Variant(kind, place.name, told, surgery.forward("", lambda module, run, function=function: function))


def poolings(place: Place) -> Iterator[Variant]:
    for path, module in place.modules(nn.MaxPool2d, nn.AdaptiveAvgPool2d):
        subject = place.paddle(path)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            changes = {"takes the largest instead of the mean": lambda x: F.adaptive_max_pool2d(x, (1, 1))}
        else:
            sizes = (module.kernel_size, module.stride, module.padding)
            changes = {
                "takes the mean instead of the largest": lambda x, sizes=sizes: F.avg_pool2d(
                    x, *sizes, count_include_pad=False),
                "takes the mean, padding included, instead of the largest": lambda x, sizes=sizes: F.avg_pool2d(
                    x, *sizes),
                "takes every other place instead of the largest": lambda x: x[..., ::2, ::2],
            }
        for told, change in changes.items():
            yield Variant("pooling-kind", subject, told, surgery.forward(
                path, lambda module, run, change=change: change))


def _of_the_batch(module: Any, run: Any) -> Callable[[Any], Any]:
    return lambda x: F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)


IDEAS = (
    Idea("a kernel turned, or its channels in another order", kernels),
    Idea("a stride in another convolution of the block", strides),
    Idea("another padding, a dilation", paddings),
    Idea("statistics of the batch, or none that were loaded", statistics),
    Idea("a shortcut missing, or added behind the activation", residuals),
    Idea("another kind of pooling", poolings),
)
