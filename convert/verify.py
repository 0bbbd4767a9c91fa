"""Reading the result back: its own header, every tensor inverted by its rule, every bit against the source."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, opened
from .plan import Move, Plan
from .stream import Advance, Buffers, alike, cast_flow, flow, in_one_order, made, run_all, together


class NotBitExact(Exception):
    """The result does not hold what the plan promises. A fault of ours, or of the disk."""


def verify(plan: Plan, source: Checkpoint, result: Path, advance: Advance = lambda nbytes: None) -> None:
    """Compare the checkpoint at ``result`` with ``source``, bit by bit; raises :class:`NotBitExact`."""
    with opened(result) as held:
        _compare_headers(plan, held)
        for info in held.tensors.values():
            held.handle(info)
        reading = _Reading(source, held, advance)
        run_all([partial(reading.compare, *group) if group[0].sources else partial(reading.compare_made, group)
                 for group in alike(plan.moves)], reading.stop)


def _compare_headers(plan: Plan, held: Checkpoint) -> None:
    promised = {move.target: move for move in plan.moves}
    if promised.keys() != held.tensors.keys():
        raise NotBitExact(f"the result holds other tensors than planned: {promised.keys() ^ held.tensors.keys()}")
    for name, info in held.tensors.items():
        move = promised[name]
        scalar = move.shape == () and info.shape == (1,)  # as PaddleNLP's safetensors reader needs it
        if (info.shape != move.shape and not scalar) or info.dtype != move.dtype:
            raise NotBitExact(f"{name} came out as {info.dtype.name} {list(info.shape)}")


class _Reading:
    """What the threads share."""

    def __init__(self, source: Checkpoint, held: Checkpoint, advance: Advance) -> None:
        self.source, self.held, self.advance = source, held, advance
        self.stop = threading.Event()

    def compare(self, move: Move, buffers: Buffers) -> None:
        """The result, inverted, against the source."""
        source, inverted = in_one_order(move.take(self.source.matrix), move.turn_back(self.held.matrix(move.target)))
        right = cast_flow(flow(source, buffers), move.source_dtype, move.dtype)
        for expected, found in together(right, flow(inverted, buffers)):
            if self.stop.is_set():
                return
            self._require_equal(move, found, expected)

    def compare_made(self, moves: Sequence[Move], buffers: Buffers) -> None:
        """Tensors that are made alike are made once more, each time for all of them."""
        for move in moves:
            held = self.held.matrix(move.target)
            for expected, found in together(made(move.filling, move.shape, move.dtype), flow(held, buffers)):
                if self.stop.is_set():
                    return
                self._require_equal(move, found, expected)

    def _require_equal(self, move: Move, held: np.ndarray, expected: np.ndarray) -> None:
        if not np.array_equal(held.view(move.dtype.bits), expected.view(move.dtype.bits)):
            raise NotBitExact(f"{move.target} read back is not {move.origin}, bit for bit")
        self.advance(held.nbytes)
