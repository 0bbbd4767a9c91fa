"""How one tensor differs from the one it should be, found on the arrays bit by bit. Both in torch's layout.

Relations are tried from the most particular to the least, and the first that holds exactly is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

FEW = 8
UNRELATED = 0.1

Peers = Callable[[], Iterable[tuple[str, np.ndarray]]]


@dataclass(frozen=True)
class Difference:
    """``told`` follows the parameter's name; ``peer`` is the tensor of the model that it equals, if it does."""

    kind: str
    told: str
    peer: str | None = None


def difference(expected: np.ndarray, held: np.ndarray, peers: Peers, heads: int | None = None) -> Difference:
    """What became of ``expected``: finite or not, of one shape. ``peers`` are the other tensors of the source."""
    expected, held = np.atleast_1d(expected, held)
    if not np.isfinite(held).all():
        broken = held.size - int(np.isfinite(held).sum())
        return Difference("nonfinite-weight", f"holds {broken} elements that are NaN or inf")
    for relation in (_transposed, _kernel, _rounded, _constant, _few_elements, _few_rows, _scaled):
        found = relation(expected, held)
        if found:
            return found
    for name, peer in peers():
        if peer.shape == held.shape and np.array_equal(peer, held):
            return Difference("swapped-weights", f"holds {name}", name)
        if peer.ndim == 2 and peer.T.shape == held.shape and np.array_equal(peer.T, held):
            return Difference("swapped-weights", f"holds {name}, transposed", name)
    return (_fused(expected, held, heads) or _permuted(expected, held, heads) or _shifted(expected, held)
            or _changed(expected, held))


def parts_of(pieces: list[np.ndarray], held: list[np.ndarray], heads: int) -> str | None:
    """How q, k and v were cut from one fused matrix, if ``held`` is a cut of ``pieces`` in another order."""
    whole = np.stack([piece.reshape(heads, -1, *piece.shape[1:]) for piece in pieces])
    per_head = whole.swapaxes(0, 1).reshape(-1, *pieces[0].shape[1:])
    orders = (("per head, though the fused rows are q, k, v in turn",
               np.concatenate(pieces).reshape(heads, 3, -1, *pieces[0].shape[1:]).swapaxes(0, 1).reshape(
                   3, *pieces[0].shape)),
              ("as q, k, v in turn, though the fused rows are ordered per head",
               per_head.reshape(3, *pieces[0].shape)))
    for told, cut in orders:
        if np.array_equal(cut, np.stack(held)):
            return told
    return None


def _transposed(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    if expected.ndim == 2 and expected.T.shape == held.shape and np.array_equal(expected.T, held):
        return Difference("transposed-weight", "is transposed")
    return None


def _kernel(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    """A convolution's, [out, in, height, width]."""
    if expected.ndim != 4:
        return None
    for kind, told, changed in (
            ("flipped-kernel", "is turned by 180 degrees", expected[:, :, ::-1, ::-1]),
            ("flipped-kernel", "has height and width exchanged", expected.swapaxes(2, 3)),
            ("transposed-weight", "has input and output channels exchanged", expected.swapaxes(0, 1)),
            ("channel-order", "has its input channels in reverse", expected[:, ::-1])):
        if np.array_equal(changed, held):
            return Difference(kind, told)
    return None


def _rounded(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    with np.errstate(over="ignore"):
        if np.array_equal(expected.astype(np.float16).astype(np.float32), held):
            return Difference("rounded-to-float16", "is rounded to float16")
    bits = expected.astype(np.float32).view(np.uint32)
    for told, kept in (("rounded", (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16), ("cut off", bits >> 16 << 16)):
        if np.array_equal(kept.view(np.float32), held):
            return Difference("rounded-to-bfloat16", f"is {told} to bfloat16")
    return None


def _constant(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    if (held == held.flat[0]).all():
        value = float(held.flat[0])
        kind = "missing-bias" if value == 0 and held.ndim == 1 else "constant-weight"
        return Difference(kind, "is all zeros" if value == 0 else f"is {value:g} everywhere" if (
            held.size > 1) else f"is {value:g} instead of {float(expected.flat[0]):g}")
    return None


def _few_elements(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    places = np.argwhere(expected != held)
    if not 0 < len(places) <= min(FEW, held.size // 2):
        return None
    where = tuple(int(axis) for axis in places[0])
    more = f", and {len(places) - 1} more" if len(places) > 1 else ""
    return Difference("changed-elements", f"is changed at {list(where)}: {held[where]:.6g} instead of "
                                          f"{expected[where]:.6g}{more}")


def _few_rows(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    if expected.ndim != 2:
        return None
    rows = np.flatnonzero((expected != held).any(1))
    if not 0 < len(rows) <= min(FEW, len(held) // 8):
        return None
    told = "is all zeros" if not held[rows].any() else "differs"
    return Difference("changed-rows", f"{told} in {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))}")


def _scaled(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    """Times one number, up to the last bit of a float32 product."""
    left, right = expected.astype(np.float64).ravel(), held.astype(np.float64).ravel()
    if not left.any() or left.size < 3:
        return None
    if np.array_equal(-expected, held):
        return Difference("sign", "has the opposite sign")
    factor = float(left @ right / (left @ left))
    if factor and np.allclose(right, factor * left, rtol=2.0**-22, atol=0):
        return Difference("scaled-weight", f"is multiplied by {factor:.7g}")
    difference = right - left
    offset = float(np.median(difference))
    if np.allclose(right, left + offset, rtol=2.0**-22, atol=2.0**-23 * float(np.abs(left).max())):
        return Difference("shifted-weight", f"has {offset:.6g} added to every element")
    return None


def _fused(expected: np.ndarray, held: np.ndarray, heads: int | None) -> Difference | None:
    """One linear's rows for q, k and v, laid out otherwise than head by head or part by part."""
    if not heads or expected.ndim != 2 or len(expected) != 3 * expected.shape[1] or len(expected) % (3 * heads):
        return None
    by_head = expected.reshape(heads, 3, -1, expected.shape[1])
    by_part = expected.reshape(3, heads, -1, expected.shape[1])
    layouts = {"holds all of q, then k, then v, and not head by head": by_head.swapaxes(0, 1),
               "holds q, k and v head by head, and not one behind the other": by_part.swapaxes(0, 1)}
    for order in list(itertools.permutations(range(3)))[1:]:
        told = f"holds {', '.join('qkv'[number] for number in order)}"
        layouts |= {f"{told} in each head, in this order": by_head[:, order],
                    f"{told}, in this order": by_part[list(order)]}
    return next((Difference("qkv-order", told) for told, layout in layouts.items()
                 if np.array_equal(layout.reshape(held.shape), held)), None)


def _permuted(expected: np.ndarray, held: np.ndarray, heads: int | None) -> Difference | None:
    for axis, told in enumerate(("rows", "columns")[:expected.ndim]):
        one, other = (np.ascontiguousarray(np.moveaxis(array, axis, 0)) for array in (expected, held))
        order = _order(one, other)
        if order is not None:
            if expected.ndim == 1:
                told = "elements"
            return Difference("permuted-weight", f"has its {told} {_named(order, heads)}")
    return None


def _order(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """``order`` with other = one[order], if there is one."""
    rows = {}
    for number, row in enumerate(one):
        rows.setdefault(row.tobytes(), []).append(number)
    order = []
    for row in other:
        places = rows.get(row.tobytes())
        if not places:
            return None
        order.append(places.pop(0))
    return np.array(order)


def _named(order: np.ndarray, heads: int | None) -> str:
    count = len(order)
    straight = np.arange(count)
    for offset in range(1, min(count, 64)):
        for sign in (1, -1):
            if np.array_equal(order, np.roll(straight, sign * offset)):
                return f"moved on by {sign * offset:+d}, the last ones to the front" if sign > 0 else (
                    f"moved back by {offset}, the first ones to the end")
    if np.array_equal(order, straight[::-1]):
        return "in reverse order"
    if heads and heads > 1 and count % heads == 0:
        blocks = straight.reshape(heads, -1)
        width = count // heads
        firsts = order.reshape(heads, -1)[:, 0] // width
        if sorted(firsts) == list(range(heads)) and np.array_equal(order, blocks[firsts].ravel()):
            return f"permuted by whole heads, in the order {', '.join(map(str, firsts))}"
        if width % 2 == 0:
            for told, inner in (("from neighbours to halves", blocks.reshape(heads, -1, 2).swapaxes(1, 2)),
                                ("from halves to neighbours", blocks.reshape(heads, 2, -1).swapaxes(1, 2))):
                if np.array_equal(order, inner.ravel()):
                    return f"reordered within each head, {told}, as between two rotary styles"
        for told, inner in (("as if split by every n-th channel", straight.reshape(-1, heads).T),
                            ("as if split by every n-th channel, undone twice", straight.reshape(heads, -1).T)):
            if np.array_equal(order, inner.ravel()):
                return f"regrouped between heads, {told}"
    moved = int((order != straight).sum())
    return f"permuted: {moved} of {count} are elsewhere"


def _shifted(expected: np.ndarray, held: np.ndarray) -> Difference | None:
    """Rows moved on, with something new at the free end."""
    if expected.ndim != 2:
        return None
    for offset in range(1, min(5, len(expected))):
        if np.array_equal(expected[:-offset], held[offset:]):
            return Difference("permuted-weight", f"has its rows moved on by {offset}")
        if np.array_equal(expected[offset:], held[:-offset]):
            return Difference("permuted-weight", f"has its rows moved back by {offset}")
    return None


def _changed(expected: np.ndarray, held: np.ndarray) -> Difference:
    left, right = expected.astype(np.float64).ravel(), held.astype(np.float64).ravel()
    norm = float(np.linalg.norm(left))
    error = float(np.linalg.norm(right - left)) / norm if norm else float("inf")
    both = norm * float(np.linalg.norm(right))
    alike = float(left @ right) / both if both else 0.0
    changed = int((left != right).sum())
    if abs(alike) < max(UNRELATED, 4 / left.size**0.5) and changed > left.size // 2:
        return Difference("unrelated-weight", f"has nothing to do with the source's (cosine {alike:.2f}): random, or "
                                              "another model's")
    return Difference("changed-weight", f"differs from the source in {changed:,} of {left.size:,} elements, by "
                                        f"{error:.1e} relative to its norm")


def numbered(names: Iterable[str]) -> Iterator[str]:
    """The layer number in each name, where there is one."""
    for name in names:
        yield next((part for part in name.split(".") if part.isdigit()), "")
