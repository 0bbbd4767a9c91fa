"""Reading the result back: its own header, every tensor inverted by its rule, every bit against the source."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, opened
from .dtypes import cast
from .plan import Move, Plan
from .stream import THREADS, Advance, chunks_of, column_tiles, strips_of


class NotBitExact(Exception):
    """The result does not hold what the plan promises. A fault of ours, or of the disk."""


def verify(plan: Plan, source: Checkpoint, result: Path, advance: Advance = lambda nbytes: None) -> None:
    """Compare the checkpoint at ``result`` with ``source``, bit by bit; raises :class:`NotBitExact`."""
    with opened(result) as held:
        _compare_headers(plan, held)
        for info in held.tensors.values():
            held.handle(info)

        def compare(move: Move) -> None:
            _comparison(move)(move, source, held)
            advance(move.nbytes)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(compare, plan.moves))


def _comparison(move: Move) -> Callable[[Move, Checkpoint, Checkpoint], None]:
    if move.source is None:
        return _compare_made
    return _compare_transposed if move.transposed else _compare_copied


def _compare_headers(plan: Plan, held: Checkpoint) -> None:
    promised = {move.target: move for move in plan.moves}
    if promised.keys() != held.tensors.keys():
        raise NotBitExact(f"the result holds other tensors than planned: {promised.keys() ^ held.tensors.keys()}")
    for name, info in held.tensors.items():
        move = promised[name]
        scalar = move.shape == () and info.shape == (1,)  # as PaddleNLP's safetensors reader needs it
        if (info.shape != move.shape and not scalar) or info.dtype != move.dtype:
            raise NotBitExact(f"{name} came out as {info.dtype.name} {list(info.shape)}")


def _compare_made(move: Move, source: Checkpoint, held: Checkpoint) -> None:
    made = cast(move.filling.make(move.shape), move.source_dtype, move.dtype)
    _require_equal(move, held.read(move.target).reshape(-1), made.reshape(-1))


def _compare_copied(move: Move, source: Checkpoint, held: Checkpoint) -> None:
    start = 0
    for chunk in chunks_of(source, move.source):
        stop = start + len(chunk)
        _require_equal(move, held.read_elements(move.target, start, stop), cast(chunk, move.source_dtype, move.dtype))
        start = stop


def _compare_transposed(move: Move, source: Checkpoint, held: Checkpoint) -> None:
    for start, stop in column_tiles(move.source_shape, move.dtype.size):
        inverted = move.rule.invert(held.read_rows(move.target, start, stop))
        for first, strip in strips_of(source, move.source, start, stop):
            expected = cast(strip, move.source_dtype, move.dtype)
            _require_equal(move, inverted[first: first + len(strip)], expected)


def _require_equal(move: Move, held: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(held.view(move.dtype.bits), expected.view(move.dtype.bits)):
        raise NotBitExact(f"{move.target} read back is not {move.source or move.filling.name}, bit for bit")
