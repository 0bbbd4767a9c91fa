"""Rows of whole numbers by name: what a side makes of texts and batches, as it is recorded, compared and hashed.

A sheet holds under ``english.input_ids`` a row for each text of a group, [tokens], of whatever length; under
``batch.0.input_ids`` one row, [texts, width]. All are compared for equality, so that a digest of 64 bits a row is as
good as the row itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from ..compare import TensorResult, measure
from ..tolerance import EXACT
from ..trace import RECORDED, Step

Sheet = dict[str, list[np.ndarray]]
LENGTHS = "lengths"
Place = tuple[int, ...]
"""The row, and the position in it."""


def as_step(sheet: Sheet) -> Step:
    """The rows of a name end to end, int64 [numbers], their lengths beside them; a row that stands alone as it is."""
    recorded = {name: rows[0] if _alone(rows) else np.concatenate([*rows, np.zeros(0, np.int64)])
                for name, rows in sheet.items()}
    lengths = {name: np.array([len(row) for row in rows], np.int64) for name, rows in sheet.items() if not _alone(rows)}
    return Step({RECORDED: recorded, LENGTHS: lengths})


def of_step(step: Step) -> Sheet:
    """What :func:`as_step` was given."""
    lengths = step.view(LENGTHS)
    return {name: np.split(array, np.cumsum(lengths[name])[:-1]) if name in lengths else [array]
            for name, array in step.recorded.items()}


def digests(sheet: Sheet, rows: Mapping[str, int]) -> np.ndarray:
    """uint64 [all of ``rows``]: xxh3-64 of every row that ``rows`` counts by name, 0 where the sheet has none."""
    found = []
    for name, count in rows.items():
        held = sheet.get(name, [])
        found += [_digest(held[number]) if number < len(held) else 0 for number in range(count)]
    return np.array(found, np.uint64)


def first_difference(expected: np.ndarray, found: np.ndarray) -> Place | None:
    """Where two rows differ first; where one of them ends earlier, that is where it ends. None where they are equal.

    Rows of more than one axis that have not the same shape differ everywhere.
    """
    if expected.shape != found.shape and expected.ndim != 1:
        return (0,) * expected.ndim
    shared = min(len(expected), len(found)) if expected.ndim == 1 else None
    wrong = np.argwhere(expected[:shared] != found[:shared])
    if len(wrong):
        return tuple(int(axis) for axis in wrong[0])
    return (shared,) if expected.shape != found.shape and shared is not None else None


def differing(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> list[int]:
    """The rows that differ."""
    return [number for number, (left, right) in enumerate(zip(expected, found, strict=True))
            if left.dtype != right.dtype or first_difference(left, right) is not None]


def result(name: str, expected: Sequence[np.ndarray], found: Sequence[np.ndarray], failure: str | None) -> TensorResult:
    """How the rows of a name compare; measures are given where both have as many numbers, and any."""
    left, right = (np.concatenate([row.reshape(-1) for row in rows]) for rows in (expected, found))
    shape = expected[0].shape if _alone(expected) else left.shape
    measures = measure(left, right) if left.shape == right.shape and left.size else None
    return TensorResult(name, shape, str(left.dtype), EXACT, failure is None, measures, failure=failure)


def _alone(rows: Sequence[np.ndarray]) -> bool:
    return len(rows) == 1 and rows[0].ndim != 1


def _digest(row: np.ndarray) -> int:
    hasher = xxhash.xxh3_64(f"{row.dtype} {row.shape}".encode())
    hasher.update(np.ascontiguousarray(row).reshape(-1).view(np.uint8))
    return hasher.intdigest() or 1
