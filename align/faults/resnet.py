"""Faults of ResNet: kernels, batch norms and their statistics, strides, borders, pooling.

All are planted in a bottleneck without a shortcut of its own, the second of the second stage, unless they say where.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from paddle.nn import functional as F

from .names import Names
from .planting import code, config, invisible, weights
from .transformer import Faults
from .wrong_nets import Break, left_out, running, setting
from .wrong_weights import bf16, change, element, exchange, fp16, random_element, several, swap_tensors, transpose

NAMES = Names("resnet", "layer2.{}", {part: part for part in ("conv1", "conv2", "conv3", "bn1", "bn2", "bn3")}, "",
              "conv1", "relu")
BLOCK, CONV, NORM = NAMES.at(1), NAMES("conv2", 1), NAMES("bn2", 1)
STEM, HEAD = ("conv1*",), ("fc*", "logits*")


def wrong_kernels(n: Names) -> Faults:
    kernel, named = f"{CONV}.weight", n.named(1, "conv2")
    yield weights(n, "missed transpose of the classifier", transpose("fc.weight"), "logits", HEAD, "transposed")
    for kind, function, explanation in (
            ("kernel turned", lambda x: x[:, :, ::-1, ::-1], "kernel"),
            ("kernel's height and width exchanged", lambda x: x.swapaxes(2, 3), "kernel"),
            ("input and output channels exchanged", lambda x: x.swapaxes(0, 1), "transposed"),
            ("kernel rounded to fp16", fp16, "rounded to fp16"),
            ("kernel rounded to bf16", bf16, "rounded to bf16")):
        yield weights(n, kind, change(kernel, function), BLOCK, named, explanation)
    yield weights(n, "pictures taken as BGR", change("conv1.weight", lambda x: x[:, ::-1]), "conv1", STEM, "channels",
                  also="permuted")
    yield weights(n, "element of a kernel changed by 1 %", change(kernel, random_element(2, 1.01)), BLOCK, named)
    yield weights(n, "NaN in one kernel", change(kernel, element(11, lambda value: math.nan)), BLOCK, named,
                  also="not finite", why="Paddle's relu makes zeros of it")
    yield weights(n, "shortcut's kernel zeroed", change("layer2.0.downsample.0.weight", np.zeros_like), n.at(0),
                  ("layer2.0.downsample.0*",), also="zeros|branch")
    yield weights(n, "blocks hold each other's weights", exchange((BLOCK, n.at(2))), BLOCK,
                  (BLOCK, n.at(2), "layer2.[12].*"), "layers")
    yield invisible(n, "one ulp in one kernel", change(kernel, element(5, lambda value: np.nextafter(
        value, np.float32(np.inf)))), named, "below the rounding of the sums it enters")


def wrong_norms(n: Names) -> Faults:
    norm, named = n.named(1, "bn2"), n.named
    yield weights(n, "running statistics not loaded", several(
        change(f"{NORM}._mean", np.zeros_like), change(f"{NORM}._variance", np.ones_like)), BLOCK, norm, None,
        also="statistics|zeros|bias missing")
    yield weights(n, "running statistics of another norm", several(
        *(swap_tensors(f"{NORM}.{kind}", f"{n('bn1', 1)}.{kind}") for kind in ("_mean", "_variance"))), BLOCK,
        named(1, "bn1", "bn2"), also="swapped")
    yield weights(n, "standard deviation kept for the variance", change(f"{NORM}._variance", np.sqrt), BLOCK, norm)
    yield weights(n, "variance biased by one in a thousand", change(f"{NORM}._variance", lambda x: x * np.float32(
        0.999)), BLOCK, norm, also="scaled")
    yield weights(n, "batch norm x 1.0005", change(f"{NORM}.weight", lambda x: x * np.float32(1.0005)), BLOCK, norm,
                  also="scaled")
    yield weights(n, "batch norm bias dropped", change(f"{NORM}.bias", np.zeros_like), BLOCK, norm, "bias missing",
                  also="zeros")
    for value in ("1e-3", "1e-6"):
        yield code(n, f"batch norm epsilon {value}", setting(NORM, _epsilon=float(value)), BLOCK, norm, "epsilon")
    yield code(n, "batch norm left in training", running(NORM, normalised_by_the_batch), BLOCK, norm, "of the batch")
    yield code(n, "batch norm missing", left_out(NORM), BLOCK, norm, "batch norm missing")


def wrong_blocks(n: Names) -> Faults:
    relu, wiring = (f"{BLOCK}: relu*", f"{BLOCK} activation*"), n.wiring(1)
    yield code(n, "first relu missing", bottleneck(first=False), BLOCK, relu, "activation")
    yield code(n, "last relu missing", bottleneck(last=False), BLOCK, (*wiring, *relu), "activation")
    yield code(n, "relu of the stem missing", left_out("relu"), "relu", ("relu*",), "activation")
    yield code(n, "shortcut missing", bottleneck(residual=False), BLOCK, wiring, "residual")
    yield code(n, "shortcut behind the relu", bottleneck(late=True), BLOCK, wiring, "late shortcut")
    yield code(n, "block rounded to fp16", bottleneck(rounded=True), BLOCK, wiring)
    yield code(n, "blocks of a stage run in the wrong order", blocks_in_another_order, BLOCK,
               (*wiring, *n.wiring(2)), why="each block by itself is right")


def wrong_geometry(n: Names) -> Faults:
    kernel = n.named(1, "conv2")
    yield code(n, "stride in the first convolution", stride_first, n.at(0), ("layer2.0*",), "stride")
    yield code(n, "borders mirrored", running(CONV, mirrored), BLOCK, kernel, "borders")
    yield code(n, "dilation 2", setting(CONV, _dilation=[2, 2], _updated_padding=[2, 2], _padding=[2, 2]), BLOCK,
               kernel, "dilation")
    yield code(n, "mean instead of the largest", running("maxpool", lambda layer: lambda x: F.avg_pool2d(x, 3, 2, 1)),
               "maxpool", ("maxpool*",), "pooling kind")
    yield code(n, "maps rounded up", setting("maxpool", ceil_mode=True), "maxpool", ("maxpool*",))
    yield code(n, "largest instead of the mean", running(
        "avgpool", lambda layer: lambda x: F.adaptive_max_pool2d(x, 1)), "avgpool", ("avgpool*",), "pooling kind")
    yield config(n, "stride of the config in the first convolution", n.at(0), ("layer[2-4].0*",), "stride",
                 downsample_in_bottleneck=True)
    yield config(n, "stride of the config in the first stage", "layer1.0", ("layer1.0*",), None,
                 downsample_in_first_stage=True)


# Wrong nets ---------------------------------------------------------------------------------------------------------


def bottleneck(first: bool = True, last: bool = True, residual: bool = True, late: bool = False,
               rounded: bool = False) -> Break:
    """Without its first relu, its last, its shortcut; with the shortcut behind the last relu; in float16."""
    def make(block: Any) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            inner = block.bn1(block.conv1(x))
            inner = block.bn2(block.conv2(block.relu(inner) if first else inner))
            found = block.bn3(block.conv3(block.relu(inner)))
            if late:
                return block.relu(found) + x
            found = found + x if residual else found
            found = block.relu(found) if last else found
            return found.astype("float16").astype("float32") if rounded else found
        return forward
    return running(BLOCK, make)


def normalised_by_the_batch(norm: Any) -> Callable[[Any], Any]:
    return lambda x: F.batch_norm(x, norm._mean.clone(), norm._variance.clone(), norm.weight, norm.bias,
                                  training=True, epsilon=norm._epsilon)


def mirrored(layer: Any) -> Callable[[Any], Any]:
    """A 3 x 3 convolution with its input mirrored at the borders."""
    return lambda x: F.conv2d(F.pad(x, [1, 1, 1, 1], mode="reflect"), layer.weight)


def stride_first(names: Names, net: Any) -> None:
    """layer2.0 with the stride of its second convolution in its first."""
    first, second = net.layer2[0].conv1, net.layer2[0].conv2
    first._stride, second._stride = second._stride, first._stride


def blocks_in_another_order(names: Names, net: Any) -> None:
    """layer2.2 runs before layer2.1."""
    first, second, third = net.layer2._sub_layers.values()
    net.layer2.forward = lambda x: second(third(first(x)))


FAULTS = tuple(fault for group in (wrong_kernels, wrong_norms, wrong_blocks, wrong_geometry)
               for faults in group(NAMES) for fault in faults)
