"""Error measures between two arrays, in float64, in chunks; NaN, shape and dtype are failures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .noise import Judgement, Kind, NoiseFloor
from .tolerance import CEILING, DOUBTFUL, LIMITS

CHUNK = 1 << 18


@dataclass(frozen=True)
class Measures:
    """How far a candidate is from its reference. ``worst`` is the index of the largest difference.

    rel_l2 = |candidate - reference| / |reference| in the Euclidean norm.
    """

    max_abs: float
    mean_abs: float
    rel_l2: float
    cosine: float
    worst: tuple[int, ...]
    worst_values: tuple[float, float]


@dataclass(frozen=True)
class TensorResult:
    """One compared tensor. ``measures`` is None where the two cannot be compared; ``failure`` says why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    allowed: float
    passed: bool
    measures: Measures | None = None
    isolated: Measures | None = None
    failure: str | None = None
    judgements: tuple[Judgement, ...] = ()
    floor: float | None = None
    ceiling: float = CEILING
    """Above which isolated error a failure is not doubtful, whatever its share."""

    @property
    def share(self) -> float | None:
        """The largest share of a limit of the noise floor that is used up, None where there is no floor."""
        return max((found.share for found in self.judgements), default=None)

    @property
    def doubtful(self) -> bool:
        """Whether this is a failure by so little that too few runs of torch may be to blame."""
        measured = [found.rel_l2 for found in (self.isolated,) if found]
        return (not self.passed and self.share is not None and 1 < self.share <= DOUBTFUL
                and all(error <= self.ceiling for error in measured))


KINDS: tuple[Kind, ...] = ("propagated", "isolated")


def compare(name: str, reference: np.ndarray, candidate: np.ndarray, allowed: float,
            isolated: np.ndarray | None = None, floors: Mapping[Kind, NoiseFloor] | None = None) -> TensorResult:
    """Judge ``candidate`` against ``reference``: passed when rel_l2 <= ``allowed``, in both runs of a block.

    ``isolated`` is the candidate's output on the reference's input. ``allowed`` 0 asks for equality. With
    ``floors``, every test of the noise floor must pass, and ``allowed`` is a ceiling for the isolated error, which no
    noisy reference lifts. The propagated error has no ceiling then: in a deep model of unruly weights torch's own
    grows to 1e-4, and only the ratio to it means anything.
    """
    measured: list[Measures | None] = []
    for told, array in (("", candidate), ("on the reference's input ", isolated)):
        if array is None:
            measured.append(None)
            continue
        failure = _not_comparable(reference, array)
        if failure:
            return TensorResult(name, reference.shape, str(reference.dtype), allowed, False,
                                failure=f"{name}: {told}{failure}")
        measured.append(measured[0] if measured and array is candidate else measure(reference, array))
    propagated, alone = measured
    given: dict[Kind, np.ndarray | None] = {"isolated": isolated, "propagated": candidate}
    judgements = tuple(judgement for kind, floor in (floors or {}).items() if given[kind] is not None
                       for judgement in floor.judge(given[kind], kind))
    worst = alone if judgements and alone else max((found for found in measured if found),
                                                   key=lambda found: found.rel_l2)
    failed = max((found for found in judgements if not found.passed), key=lambda found: found.share, default=None)
    passed = failed is None and worst.rel_l2 <= allowed and (allowed > 0 or worst.max_abs == 0)
    kind = failed.kind if failed else next((kind for kind in KINDS if judgements and kind in floors), None)
    floor = floors[kind].relative if kind else None
    limit = floors[kind].relative * LIMITS[kind]["total"] if kind else allowed
    shown = propagated if failed and failed.kind == "propagated" else worst
    return TensorResult(name, reference.shape, str(reference.dtype), limit, passed, propagated, alone,
                        None if passed else _sentence(name, shown, allowed, failed), judgements, floor,
                        allowed if kind else CEILING)


def missing(name: str, side: str) -> TensorResult:
    """A tensor that only one side recorded."""
    return TensorResult(name, (), "–", 0.0, False, failure=f"{name}: the {side} did not record it")


def measure(reference: np.ndarray, candidate: np.ndarray) -> Measures:
    """All measures between two finite arrays of one shape, at least one element."""
    left, right = reference.reshape(-1), candidate.reshape(-1)
    total = largest = squares = norm = dot = other = 0.0
    worst = 0
    for start in range(0, left.size, CHUNK):
        a = left[start: start + CHUNK].astype(np.float64)
        b = right[start: start + CHUNK].astype(np.float64)
        difference = np.abs(b - a)
        position = int(difference.argmax())
        if difference[position] > largest:
            largest, worst = float(difference[position]), start + position
        total += float(difference.sum())
        squares += float(difference @ difference)
        norm, other, dot = norm + float(a @ a), other + float(b @ b), dot + float(a @ b)
    rel_l2 = math.sqrt(squares / norm) if norm else (0.0 if squares == 0 else math.inf)
    cosine = dot / math.sqrt(norm * other) if norm and other else float(norm == other)
    index = tuple(int(axis) for axis in np.unravel_index(worst, reference.shape))
    return Measures(largest, total / left.size, rel_l2, cosine, index, (float(left[worst]), float(right[worst])))


def _not_comparable(reference: np.ndarray, candidate: np.ndarray) -> str | None:
    if reference.shape != candidate.shape:
        return f"the shape is {list(candidate.shape)}, the reference's {list(reference.shape)}"
    if reference.dtype != candidate.dtype:
        return f"the dtype is {candidate.dtype}, the reference's {reference.dtype}"
    if reference.size == 0:
        return "there is nothing to compare: the tensor is empty"
    for side, array in (("reference", reference), ("candidate", candidate)):
        broken = array.size - int(np.isfinite(array).sum())
        if broken:
            where = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
            return f"{broken} elements of the {side} are NaN or inf, the first at {[int(axis) for axis in where]}"
    return None


def _sentence(name: str, found: Measures, allowed: float, failed: Judgement | None) -> str:
    ours, theirs = found.worst_values[1], found.worst_values[0]
    if failed is not None:
        told = (f"{_times(failed.ratio)} torch's own noise ({failed.test}, {failed.kind}; allowed {failed.limit:g}x)"
                if math.isfinite(failed.ratio) else f"not equal ({failed.kind}), where torch makes no error at all")
    else:
        told = f"allowed {allowed:.1e}" if allowed else "equality is asked"
    where = f"worst at {list(found.worst)}: " if found.worst else ""
    return f"{name}: rel-L2 {found.rel_l2:.1e}, {told}; {where}{ours:.6g} instead of {theirs:.6g}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
