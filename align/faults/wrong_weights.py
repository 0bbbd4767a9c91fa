"""Wrong weights: edits of a Paddle checkpoint's tensors, where linears are [in, out]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .names import LAST, MID, Names

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], None]
Turn = Callable[[np.ndarray], np.ndarray]
SEED = 20260707


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
            pieces = fused.reshape(*fused.shape[:-1], names.heads, 3, -1)
            for number, key in enumerate(keys):
                tensors[key] = pieces[..., number, :].reshape(tensors[key].shape)
    return edit


def shift_layers(names: Names) -> Edit:
    """Layer i holds the weights of layer i + 1, the last those of the first."""
    def edit(tensors: Tensors) -> None:
        before = dict(tensors)
        for layer in range(LAST + 1):
            here, there = names.at(layer), names.at((layer + 1) % (LAST + 1))
            for name in [name for name in tensors if name.startswith(f"{here}.")]:
                tensors[name] = before.get(there + name.removeprefix(here), before[name])
    return edit


def change(name: str, function: Turn) -> Edit:
    """One tensor becomes ``function`` of itself, in float32."""
    def edit(tensors: Tensors) -> None:
        tensors[name] = np.asarray(function(tensors[name]), np.float32)
    return edit


def several(*edits: Edit) -> Edit:
    def edit(tensors: Tensors) -> None:
        for one in edits:
            one(tensors)
    return edit


def every(names: Names, function: Turn) -> Edit:
    """All tensors but buffers."""
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if not name.endswith(names.buffers):
                tensors[name] = np.asarray(function(tensors[name]), np.float32)
    return edit


def element(position: int, function: Callable[[np.float32], float]) -> Turn:
    """One element of a flattened array."""
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[position] = function(array.reshape(-1)[position])
        return array
    return apply


def typical_element(function: Callable[[np.float32], float]) -> Turn:
    """The element whose size is nearest to the root mean square of all."""
    def apply(array: np.ndarray) -> np.ndarray:
        position = int(np.abs(np.abs(array) - np.sqrt(np.mean(np.square(array)))).argmin())
        return element(position, function)(array)
    return apply


def random_element(seed: int, factor: float) -> Turn:
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


def noise(size: float) -> Turn:
    return lambda x: x + size * np.random.default_rng(SEED).standard_normal(x.shape)


def low_rank(size: float) -> Turn:
    """Plus an outer product of ``size`` times the norm of the matrix."""
    def apply(array: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng(SEED)
        outer = np.outer(*(generator.standard_normal(length) for length in array.shape))
        return array + outer * (size * np.linalg.norm(array) / np.linalg.norm(outer))
    return apply


def permute_heads(names: Names, axis: int) -> Turn:
    """Heads 0, 1, 2, 3 become 2, 0, 3, 1 along ``axis``: the even ones backwards, then the odd ones."""
    heads = np.concatenate([np.r_[0:names.heads:2][::-1], np.r_[1:names.heads:2][::-1]])

    def apply(array: np.ndarray) -> np.ndarray:
        return np.take(array, np.arange(array.shape[axis]).reshape(names.heads, -1)[heads].ravel(), axis=axis)
    return apply


def permute_units(axis: int, count: int | None = None) -> Turn:
    """The first ``count`` units along ``axis`` in reverse order; all of them by default."""
    def apply(array: np.ndarray) -> np.ndarray:
        order = np.arange(array.shape[axis])
        order[:count] = order[:count][::-1].copy()
        return np.take(array, order, axis=axis)
    return apply


def without_head(names: Names) -> Turn:
    """Rows of the output projection that the second head feeds, zeroed."""
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(names.heads, -1, array.shape[1])[1] = 0
        return array
    return apply


def swap_rows(one: int, other: int) -> Turn:
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[[one, other]] = array[[other, one]]
        return array
    return apply


def copy_row(source: int, to: int) -> Turn:
    def apply(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[to] = array[source]
        return array
    return apply


def used_rows(names: Names, function: Callable[[int, int], Turn]) -> Edit:
    """``function`` of the two ids that the inputs use most, on the table of words."""
    def edit(tensors: Tensors) -> None:
        first, second, *_ = names.used_ids()
        tensors[names.words] = function(first, second)(tensors[names.words])
    return edit


def unused_row(names: Names) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[names.words][names.unused_ids()[0]] += 1
    return edit


def value_bias_made_good(names: Names) -> Edit:
    """The value bias moved through the output projection into the output bias: rows of attention add up to 1."""
    def edit(tensors: Tensors) -> None:
        bias, weight = tensors[names.bias("v", MID)].astype(np.float64), tensors[names.weight("out", MID)]
        tensors[names.bias("out", MID)] = (tensors[names.bias("out", MID)] + bias @ weight).astype(np.float32)
        tensors[names.bias("v", MID)] = np.zeros_like(tensors[names.bias("v", MID)])
    return edit


# One linear for q, k and v ------------------------------------------------------------------------------------------


def of_both(module: str, turn: Turn) -> Edit:
    """``turn`` of the columns of a fused linear's weight, [in, out], and of its bias."""
    return several(*(change(f"{module}.{kind}", turn) for kind in ("weight", "bias")))


def whole_parts(names: Names) -> Turn:
    """Head by head becomes all of q, all of k, all of v."""
    return lambda array: np.moveaxis(_by_head(names, array), -2, -3).reshape(array.shape)


def parts_in_order(names: Names, *order: int) -> Turn:
    """Another order of q, k and v in each head."""
    return lambda array: _by_head(names, array)[..., list(order), :].reshape(array.shape)


def heads_in_order(names: Names, *order: int) -> Turn:
    return lambda array: _by_head(names, array)[..., list(order), :, :].reshape(array.shape)


def of_part(names: Names, number: int, turn: Turn) -> Turn:
    """``turn`` of q, k or v, by its number, [..., heads, width]."""
    def apply(array: np.ndarray) -> np.ndarray:
        changed = _by_head(names, array).copy()
        changed[..., number, :] = turn(changed[..., number, :])
        return changed.reshape(array.shape)
    return apply


def _by_head(names: Names, array: np.ndarray) -> np.ndarray:
    """[…, out] -> […, heads, 3, width]."""
    return array.reshape(*array.shape[:-1], names.heads, 3, -1)
