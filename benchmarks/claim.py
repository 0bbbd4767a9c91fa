"""The one shape of every claim: a sentence, a limit, a rival, and how to measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .bench import Bench
from .shapes import Scale, Shape

Names = tuple[str, ...]


@dataclass(frozen=True)
class Limit:
    """What a value may be at most, or must be at least. ``unit`` is x, s, MB, % or a noun."""

    bound: float
    unit: str
    at_least: bool = False

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g} {self.unit}"


@dataclass(frozen=True)
class Measured:
    """What measuring a claim gave.

    ``value`` is what its limit speaks of, in the limit's unit, and ``spread`` the least and the greatest single one.
    ``ours`` and ``rival`` are the samples in ``unit`` (s, B or a noun), ``ratio`` is ours to the rival.
    """

    value: float | None
    unit: str
    ours: tuple[float, ...]
    rival: tuple[float, ...] = ()
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    notes: Names = ()

    @property
    def n(self) -> int:
        return len(self.ours)


@dataclass(frozen=True)
class Claim:
    """``timed``: the value depends on the clock, so it is judged at full scale only. ``limit`` None: told, not judged.

    ``shapes`` are the checkpoints that it needs at a scale; with none of them being there, it is not measured.
    """

    name: str
    sentence: str
    limit: Limit | None
    rival: str
    measure: Callable[[Bench], Measured]
    shapes: Callable[[Scale], tuple[Shape | None, ...]] = lambda scale: ()
    timed: bool = True

    def possible(self, scale: Scale) -> bool:
        return None not in self.shapes(scale)


def paired(ours: Sequence[float], rival: Sequence[float], unit: str, *, inverse: bool = False,
           notes: Names = ()) -> Measured:
    """Pairs of samples: the value is the median of their ratios, ours to the rival's, or ``inverse``."""
    ratios = ratios_of(ours, rival)
    shown = [1 / ratio for ratio in ratios] if inverse else ratios
    return Measured(median(shown), unit, tuple(ours), tuple(rival), median(ratios), (min(shown), max(shown)), notes)


def absolute(ours: Sequence[float], rival: Sequence[float], unit: str, *, scale: float = 1.0,
             pick: Callable[[Sequence[float]], float] = median, notes: Names = ()) -> Measured:
    """Samples that are judged by themselves, as ``pick`` of them / ``scale``, with the ratio of medians beside."""
    ratio = median(ours) / median(rival) if rival else None
    return Measured(pick(ours) / scale, unit, tuple(ours), tuple(rival), ratio,
                    (min(ours) / scale, max(ours) / scale), notes)


def growth(peaks: Mapping[int, int]) -> Measured:
    """How far the peaks in bytes, by number of layers, lie apart, in percent of the least."""
    least, greatest = min(peaks.values()), max(peaks.values())
    told = ", ".join(f"{peak / 1e6:.0f} MB with {layers}" for layers, peak in peaks.items())
    percent = 100 * (greatest - least) / least
    return Measured(percent, "B", tuple(map(float, peaks.values())), notes=(f"{told} layers.",))


def ratios_of(ours: Sequence[float], rival: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [left / right for left, right in zip(ours, rival, strict=True)]
