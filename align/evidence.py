"""Weights before behaviour: what the Paddle side really holds, inverted by the plan, against the source bit by bit."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.checkpoint import Checkpoint, cut
from convert.dtypes import BY_NAME, cast, has_nonfinite
from convert.plan import Move

from .candidate import Candidate
from .compare import Measures, TensorResult, compare, missing
from .paging import threads
from .report import ALIGNED
from .runs import Run
from .tolerance import EXACT

if TYPE_CHECKING:
    from .stage import Session

FLOAT32 = BY_NAME["float32"]
PIECE, STRIP = 1 << 17, 64


class Comparison:
    """Takes in what a net holds, tensor by tensor and in any order, and compares each with the source bit by bit."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._moves = {move.target: move for move in run.plan.moves}
        self._again = {name: replace(self._moves[equal], target=name) for name, equal in run.tied.values()}
        self._found: dict[str, TensorResult] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        move = self._moves.get(name) or self._again.get(name)
        self._found[name] = _bitwise(move, self._run.checkpoint, array) if move else missing(name, "source's plan")

    def results(self) -> tuple[list[TensorResult], list[str]]:
        """One result per name of a tensor, in the order of the plan, and what is to be told beside them.

        A buffer that the net computes itself need not be held; anything else that is missing or extra is a failure.
        """
        found, moves = self._found, self._moves
        results = [found[name] if name in found else missing(name, "candidate") for name, move in moves.items()
                   if name in found or not move.filling]
        results += [result for name, result in found.items() if name not in moves]
        absent = [name for name, move in moves.items() if move.filling and name not in found]
        notes = [f"{len(absent)} buffers of the file are not held by this net, which computes them itself: "
                 f"{absent[0]} and the like."] if absent else []
        return results, notes


def compare_weights(run: Run, candidate: Candidate) -> tuple[list[TensorResult], list[str]]:
    """What :class:`Comparison` finds of all that the candidate holds, brought in for this alone."""
    comparison = Comparison(run)
    candidate.show(comparison.add)
    candidate.show_rest()
    return comparison.results()


class Inspection:
    """Weights before behaviour, known before either is told of.

    From its making on, whatever the candidate holds is compared: at once what lies in memory, what is paged when it
    comes in for the first time. While ``align.weights`` found a net of this source aligned, what is held is only
    hashed, and compared where the digest is another than the one found then.
    """

    def __init__(self, session: Session) -> None:
        session.advance("weights")
        self._session = session
        source, self._verified = _verified(session.reports / "weights.json") or (None, None)
        self._comparison = None if source == session.run.conversion.source_digest else Comparison(session.run)
        session.candidate.show(*[self._comparison.add] if self._comparison else [])

    def told(self) -> tuple[str | None, list[str]]:
        """The first parameter that differs, or None, and a sentence on how it is known."""
        run, candidate = self._session.run, self._session.candidate
        dtype = run.conversion.dtype
        rounded = "" if dtype == "keep" else f" rounded to {dtype}, on both sides"
        if self._comparison is None and self._verified == candidate.weights_digest:
            return None, [f"Weights: equal to the source{rounded}, bit by bit, as align.weights found for this very "
                          "digest."]
        candidate.show_rest()
        results, _ = self._comparison.results() if self._comparison else compare_weights(run, candidate)
        wrong = [result for result in results if not result.passed]
        if not wrong:
            return None, [f"Weights: {len(results)} tensors compared with the source{rounded}, equal bit by bit."]
        many = f"{len(wrong)} tensors" if len(wrong) > 1 else "one tensor"
        return wrong[0].name, [f"Weights differ from the source in {many}, so this stage is diverged whatever its "
                               f"outputs say. The first: {wrong[0].failure}."]


def _verified(file: Path) -> tuple[Any, Any] | None:
    try:
        content = json.loads(file.read_text("utf-8"))
        sound = content["verdict"] == ALIGNED and content["stage"] == "weights"
        return (content["reference"]["weights_digest"], content["candidate"]["weights_digest"]) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _bitwise(move: Move, source: Checkpoint, array: np.ndarray) -> TensorResult:
    """``array`` as the net holds it, in float32, against the source cast the way the conversion cast it.

    Part by part while they are equal, so that a matrix is not held three times; what differs is measured whole.
    """
    comparable = move.sources and array.shape == move.shape and array.dtype == np.float32 and array.size
    if comparable and _equal_in_parts(move, source, array):
        first = float(array.flat[0])
        same = Measures(0.0, 0.0, 0.0, 1.0, (0,) * array.ndim, (first, first))
        return TensorResult(move.target, move.source_shape, str(array.dtype), EXACT, True, same)
    expected = expected_of(move, source)
    scalar = expected.size == array.size == 1
    inverted = array.reshape(expected.shape) if scalar else move.turn_back(array)
    result = compare_bits(move.target, expected, inverted)
    if result.passed or move.filling:
        return result
    return replace(result, failure=f"{result.failure}{_transposed_hint(expected, inverted)}")


def compare_bits(name: str, expected: np.ndarray, held: np.ndarray) -> TensorResult:
    """Two arrays in one layout, which are to be equal in every bit."""
    result = compare(name, expected, np.array(held, order="C"), EXACT)
    if result.passed and not np.array_equal(bits_of(expected), bits_of(held)):
        return replace(result, passed=False, failure=f"{name}: equal in value, but not in its bits (-0.0 and 0.0)")
    return result


def _equal_in_parts(move: Move, source: Checkpoint, array: np.ndarray) -> bool:
    """Whether all elements are finite and have the source's bits; on all cores."""
    info = source.tensors[move.sources[0]]
    if not move.source_shape or move.gather is not None or info.strides is not None:
        return False
    source.handle(info)
    rows = move.source_shape[0]
    with ThreadPoolExecutor(threads()) as pool:
        return all(pool.map(lambda part: _equal_rows(move, source, array, part),
                            cut(range(rows), -(-rows // threads()))))


def _equal_rows(move: Move, source: Checkpoint, array: np.ndarray, rows: range) -> bool:
    """:func:`_equal_in_parts` of some rows of the source, in pieces that stay in the cache.

    A transposed matrix is compared in strips of 64 rows of the source, each padded by 64 bytes: at power-of-two widths
    the rows of an unpadded strip fall on the same cache sets and evict each other.
    """
    width = math.prod(move.source_shape[1:])
    some = max(1, PIECE // width)
    high = STRIP if move.transposed else some
    padded = np.empty((high, width + 16), np.float32)[:, :width]
    turned = array if move.transposed else array.reshape(-1, width).T
    for strip in cut(rows, high):
        expected = padded[: len(strip)]
        for part in cut(strip, some):
            stored = source.read_rows(move.sources[0], part.start, part.stop)
            expected[part.start - strip.start: part.stop - strip.start] = _float32(move, stored).reshape(-1, width)
        held = turned[:, strip.start: strip.stop]
        if has_nonfinite(expected, FLOAT32) or not np.array_equal(expected.T.view(np.uint32), held.view(np.uint32)):
            return False
    return True


def expected_of(move: Move, source: Checkpoint) -> np.ndarray:
    array = move.take(source.read) if move.sources else move.filling.make(move.shape)
    return _float32(move, array)


def _float32(move: Move, array: np.ndarray) -> np.ndarray:
    return cast(cast(array, move.source_dtype, move.dtype), move.dtype, FLOAT32)


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.array(array, np.float32, order="C").view(np.uint32)


def _transposed_hint(expected: np.ndarray, inverted: np.ndarray) -> str:
    square = expected.ndim == 2 and expected.shape == inverted.T.shape
    return " (it is the source's transpose)" if square and np.array_equal(expected, inverted.T) else ""
