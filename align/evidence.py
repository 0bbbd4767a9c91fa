"""Weights before behaviour: what the Paddle side really holds, inverted by the plan, against the source bit by bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.dtypes import BY_NAME, cast
from convert.plan import Move

from .answers import Candidate
from .compare import Measures, TensorResult, compare, missing
from .report import ALIGNED
from .runs import Run
from .tolerance import EXACT

if TYPE_CHECKING:
    from .stage import Session

FLOAT32 = BY_NAME["float32"]
PART, STRIP = 16 << 20, 64


def compare_weights(run: Run, candidate: Candidate) -> tuple[list[TensorResult], list[str]]:
    """One result per tensor, in the order of the plan, and what is to be told beside them.

    A buffer that the net computes itself need not be held; anything else that is missing or extra is a failure.
    """
    moves = {move.target: move for move in run.plan.moves}
    found = {name: _bitwise(moves[name], run.checkpoint, array) if name in moves else missing(name, "source's plan")
             for name, array in candidate.hashed_state()}
    results = [found[name] if name in found else missing(name, "candidate") for name, move in moves.items()
               if name in found or not move.filling]
    results += [result for name, result in found.items() if name not in moves]
    absent = [move.target for move in run.plan.moves if move.filling and move.target not in found]
    notes = [f"{len(absent)} buffers of the file are not held by this net, which computes them itself: "
             f"{absent[0]} and the like."] if absent else []
    return results, notes


def evidence(session: Session) -> tuple[str | None, list[str]]:
    """Weights before behaviour: the first parameter that differs, or None, and a sentence on how it is known.

    The comparison is skipped only while what the net holds has the digest that ``align.weights`` found aligned.
    """
    session.advance("weights")
    dtype = session.run.conversion.dtype
    rounded = "" if dtype == "keep" else f" rounded to {dtype}, on both sides,"
    verified = _verified(session.reports / "weights.json")
    if verified is not None and verified == (session.run.source_digest, session.candidate.weights_digest):
        return None, [f"Weights: equal to the source{rounded} bit by bit, as align.weights found for this very digest."]
    results, _ = compare_weights(session.run, session.candidate)
    wrong = [result for result in results if not result.passed]
    if not wrong:
        return None, [f"Weights: {len(results)} tensors compared with the source{rounded}, equal bit by bit."]
    many = f"{len(wrong)} tensors" if len(wrong) > 1 else "one tensor"
    return wrong[0].name, [f"Weights differ from the source in {many}, so this stage is diverged whatever its outputs "
                           f"say. The first: {wrong[0].failure}."]


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
    comparable = move.source is not None and array.shape == move.shape and array.dtype == np.float32 and array.size
    if comparable and _equal_in_parts(move, source, array):
        first = float(array.flat[0])
        same = Measures(0.0, 0.0, 0.0, 1.0, (0,) * array.ndim, (first, first))
        return TensorResult(move.target, move.source_shape, str(array.dtype), EXACT, True, same)
    expected = expected_of(move, source)
    scalar = expected.size == array.size == 1
    inverted = array.reshape(expected.shape) if scalar else array if move.filling else move.rule.invert(array)
    result = compare(move.target, expected, np.array(inverted, order="C"), EXACT)
    if result.passed and not np.array_equal(bits_of(expected), bits_of(inverted)):
        return replace(result, passed=False,
                       failure=f"{move.target}: equal in value, but not in its bits (-0.0 and 0.0)")
    if result.passed or move.filling:
        return result
    return replace(result, failure=f"{result.failure}{_transposed_hint(expected, inverted)}")


def _equal_in_parts(move: Move, source: Checkpoint, array: np.ndarray) -> bool:
    """Whether all elements are finite and have the source's bits.

    A transposed matrix is turned back in strips of 64 rows, each padded by 64 bytes, as in ``convert/stream.py``.
    """
    if not move.source_shape or source.tensors[move.source].strides is not None:
        return False
    rows, width = move.source_shape[0], math.prod(move.source_shape[1:])
    strip = np.empty((STRIP, width + 16), np.float32)[:, :width] if move.transposed else None
    many = max(1, PART // (4 * width) // STRIP) * STRIP
    for start in range(0, rows, many):
        expected = _float32(move, source.read_rows(move.source, start, min(start + many, rows)))
        if not np.isfinite(expected).all():
            return False
        bits = expected.view(np.uint32)
        if strip is None:
            if not np.array_equal(array[start: start + len(bits)].view(np.uint32), bits):
                return False
            continue
        for first in range(0, len(bits), STRIP):
            part = bits[first: first + STRIP]
            strip[: len(part)] = array[:, start + first: start + first + len(part)].T
            if not np.array_equal(strip[: len(part)].view(np.uint32), part):
                return False
    return True


def expected_of(move: Move, source: Checkpoint) -> np.ndarray:
    array = move.filling.make(move.shape) if move.source is None else source.read(move.source)
    return _float32(move, array)


def _float32(move: Move, array: np.ndarray) -> np.ndarray:
    return cast(cast(array, move.source_dtype, move.dtype), move.dtype, FLOAT32)


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.array(array, np.float32, order="C").view(np.uint32)


def _transposed_hint(expected: np.ndarray, inverted: np.ndarray) -> str:
    square = expected.ndim == 2 and expected.shape == inverted.T.shape
    return " (it is the source's transpose)" if square and np.array_equal(expected, inverted.T) else ""
