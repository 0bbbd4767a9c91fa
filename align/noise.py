"""The noise floor: torch's own rounding error against float64, pooled over runs with their sums reordered.

One torch run is no yardstick: reordering its sums moves its error up to 13-fold. So the errors of the plain run
and of K reordered ones are pooled, and Paddle's error is judged against the pool by five tests. Arrays are
[rows, channels]: one row per real token. With e the candidate's error, e_k those of the torch runs:

    s = elementwise rms of the e_k    T = rms(s)    M = largest |e_k|    eps = 2^-23    x = the float64 output
    total    rms(e)                                 against  max(T, u rms(x))
    peak     max |e|                                         max(M, u max |x|)
    typical  median over rows of rms_c(e) / rms_c(x)         max(the same of s, u)
    channel  largest over channels of rms_r(e)               max(rms_r(s), u rms_r(x)), each channel its own
    row      largest over rows of rms_c(e)                   max(hypot(rms_c(s), typical(s) rms_c(x)), u rms_c(x))

with u = eps / 2, a fraction of a unit in the last place: nobody is asked to be more exact than that, nor, in a channel
or row that torch rounds to exact zeros (a saturated gelu), than eps^2 of the whole tensor's rms; and a row that is no
larger than that counts as 0 in typical (of a token that the last one attends to with 1e-40). The last
three speak of distributions, and are asked only where there are enough rows or channels to have one. A channel of which
a relu leaves fewer rows than that, k, has none: torch's error in it may be small by luck, so what torch's error is in
all of the tensor that is not 0, t, is added: hypot(rms_r(s), t sqrt(k / r)). Where torch makes no error at all (a
lookup), equality is asked. A head of few elements (next-sentence scores, a small classifier) has no distribution at
all, and luck decides how much its sums cancel; there it is

    few      rms(e)                                 against  max(T, max(eps, rho) S),   S = rms(|h| |W|^T + |b|)

alone, with h what enters the head's linear and rho the pooled relative error of h. Where torch's own propagated error
is above FORWARD the model is chaotic: single rows and channels then grow their errors at will, in torch too, and only
total and typical are asked. Where most elements are smaller than torch's error in them, as in a gradient that is 0 but
for rounding, there is rounding alone on either side, which has no distribution in common, and only total is asked.

A single number, such as a mean loss L = sum over t of c_t, has no distribution either: K + 1 runs give K + 1 errors,
all of which may by luck be small. So its s is

    s = hypot(D, I),   D = rms over k of L_k - L,   I^2 = sum over t of the mean over k of (c_k,t - c_t)^2

I is the error that L would have if its terms erred independently: it has as many degrees of freedom as there are
terms and runs, and keeps D from being small by luck. D is what the errors that terms share add to that. Neither is
enough: of 2216 torch runs over 220 random models, held out of the pool, one in 1000 lies beyond 5.4 D and the worst at
8.1 D, none beyond 4.2 s; and where tokens share a chaotic row, D is 5 I.

The unit of a loss is not that of its value alone. -log softmax is the logarithm of a sum that begins with 1 (the
largest score, shifted to 0), so its last digit is never below that of 1: for x, u x is read as u (x + base), base 1.
Of a classifier that is sure and right, loss 1e-3, all torch runs round that logarithm alike, and to a relative 3e-5.
Nor is the unit of a gelu that of its value: h / 2 (1 + erf(h / sqrt 2)) is |h| times a sum that begins with 1, so that
where it goes to 0 on the left its last digit is that of h, and base is |h| there. Behind -5 torch gives some channels
1e-8 from float64, and Paddle 0, which is 3e-7 from it.

Arrays may be a gigabyte each (the gradient of a 6B model's head), so whatever is computed of their elements is computed
in tiles, in float64. x is kept in float64, s in float32, which moves a ratio by less than 1e-6 of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from .tolerance import CANCELLED, FLOOR_UNITS, FORWARD, LIMITS

EPS = 2.0**-23
ENOUGH = 16
TILE, SIDE = 1 << 18, 512
ROBUST = {"total", "typical"}


Kind = Literal["isolated", "propagated"]


@dataclass(frozen=True)
class Judgement:
    """What one of the tests found: ``ratio`` of the candidate's error to the floor, and the ``limit`` of it."""

    kind: Kind
    test: str
    ratio: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.ratio <= self.limit

    @property
    def share(self) -> float:
        """How much of the limit is used up; above 1 the test has failed."""
        return self.ratio / self.limit


@dataclass(frozen=True)
class NoiseFloor:
    """The pooled error of torch at one place of the model: x as ``oracle``, float64 [rows, channels], s as ``spread``,
    float32, of its shape, M as ``largest``.

    ``few`` is max(eps, rho) S for a head of few elements, else 0. ``base`` is the magnitude of what a number of any
    size is the difference of: 1 for the logarithm of a sum that begins with 1, |h| [rows, channels] for a gelu of h,
    else 0.
    """

    oracle: np.ndarray
    spread: np.ndarray
    largest: float
    few: float = 0.0
    base: float | np.ndarray = 0.0

    @property
    def exact(self) -> bool:
        """Whether no run of torch makes any error here."""
        return self.largest == 0

    @cached_property
    def relative(self) -> float:
        """max(T, u (rms(x) + base)) / rms(x): torch's own relative L2 error."""
        norm = _rms(self.oracle)
        least = max(FLOOR_UNITS * EPS * (norm + _rms(_rows(self.base))), self.few)
        return max(_rms(self.spread), least) / norm if norm and not self.exact else 0.0

    @cached_property
    def is_rounding(self) -> bool:
        """Whether there is nothing but torch's rounding in most elements, as in a gradient that is 0 in exact numbers.
        """
        return self.relative > CANCELLED and _middle(self.spread) >= _middle(self.oracle) > 0

    def of_sum(self, terms: NoiseFloor) -> NoiseFloor:
        """This floor of a single number, given that of the ``terms`` whose sum it is: s = hypot(D, I)."""
        spread = np.hypot(self.spread, _norm(terms.spread))
        return replace(self, spread=spread, largest=max(self.largest, float(spread.max())))

    def judge(self, candidate: np.ndarray, kind: Kind) -> list[Judgement]:
        """All tests that apply, for a finite ``candidate`` of as many elements as the oracle has."""
        found = _Sums.of(self.oracle, self.spread, candidate.reshape(self.oracle.shape))
        x, s, e = found.rms
        if self.few:
            return [Judgement(kind, "few", e / max(s, self.few), LIMITS[kind]["few"])]
        unit, least = (0.0, 0.0) if self.exact else (FLOOR_UNITS * EPS, EPS**2 * x)
        base = _rows(self.base)
        ratios = {
            "total": _ratio(e, max(s, unit * (x + _rms(base)))),
            "peak": _ratio(found.peaks[1], max(self.largest, unit * (found.peaks[0] + np.abs(base).max(initial=0.0)))),
        }
        rows, columns = found.by_row, found.by_channel
        length, channels = self.oracle.shape
        if channels >= ENOUGH:
            there = rows[0] > EPS**2 * x
            typical = _typical(rows[1], rows[0], there)
            scale = rows[0] + _rms_along(base, 1)
            ratios["typical"] = _ratio(_typical(rows[2], rows[0], there),
                                       max(typical, unit * _typical(scale, rows[0], there)))
            floor = np.maximum(np.hypot(rows[1], typical * rows[0]), unit * scale + least)
            ratios["row"] = _largest_ratio(rows[2], floor)
        elif channels == 1 and length >= ENOUGH:
            ratios["typical"] = self._typical_of_a_vector(np.abs(candidate.reshape(self.oracle.shape) - self.oracle),
                                                          unit)
        if length >= ENOUGH:
            floor = np.maximum(found.spread_of_channels, unit * (columns[0] + _rms_along(base, 0)) + least)
            ratios["channel"] = _largest_ratio(columns[2], floor)
        asked = ratios.keys()
        if kind == "propagated" and self.relative > FORWARD:
            asked &= ROBUST
        if self.is_rounding:
            asked &= {"total"}
        return [Judgement(kind, test, ratios[test], LIMITS[kind][test]) for test in ratios if test in asked]

    def _typical_of_a_vector(self, e: np.ndarray, unit: float) -> float:
        """median(e) / median(s) of what lives, so that no few chaotic tokens hide what is wrong with all the others."""
        live = (self.oracle != 0) | (self.spread != 0) | (e != 0)
        if live.sum() < ENOUGH:
            return 0.0
        x, s, e = (float(np.median(np.abs(array[live]))) for array in (self.oracle, self.spread, e))
        return _ratio(e, max(s, unit * (x + float(np.median(np.abs(self.base))))))


class Grown(NoiseFloor):
    """Of errors that many steps have grown, in whatever elements they pleased: only their size all together is judged.
    """

    def judge(self, candidate: np.ndarray, kind: Kind) -> list[Judgement]:
        error = candidate.astype(np.float64).reshape(self.oracle.shape) - self.oracle
        unit = 0.0 if self.exact else FLOOR_UNITS * EPS * (_rms(self.oracle) + _rms(_rows(self.base)))
        return [Judgement(kind, "total", _ratio(_rms(error), max(_rms(self.spread), unit)), LIMITS[kind]["total"])]


def is_few(rows: np.ndarray) -> bool:
    """Whether an output [rows, channels] has too few of both for tests of a distribution."""
    return max(_rows(rows).shape) < ENOUGH


class Pool:
    """Errors of torch's runs against one oracle, taken in one at a time."""

    def __init__(self, oracle: np.ndarray, base: float = 0.0) -> None:
        self._oracle, self._base = _rows(oracle).astype(np.float64), base
        self._spread = np.zeros_like(self._oracle, np.float32)
        self._lent = False
        self._largest = 0.0
        self._runs = 0

    def add(self, run: np.ndarray) -> None:
        """``run``: what torch gave in float32, of the oracle's shape."""
        if self._lent:
            self._spread, self._lent = self._spread.copy(), False
        run = run.reshape(self._oracle.shape)
        share = 1 / (self._runs + 1)
        for tile in _tiles(run):
            with np.errstate(invalid="ignore"):
                squares = np.square(run[tile] - self._oracle[tile])
            largest = float(np.sqrt(squares.max(initial=0.0)))
            if np.isfinite(largest):
                self._largest = max(self._largest, largest)
            else:
                squares = _finite(squares)
            squares *= share
            squares += np.square(self._spread[tile], dtype=np.float64) * (1 - share)
            self._spread[tile] = np.sqrt(squares)
        self._runs += 1

    def floor(self) -> NoiseFloor:
        """As of now; what is added later does not change it."""
        self._lent = True
        return NoiseFloor(self._oracle, self._spread, self._largest, base=self._base)

    def with_run(self, run: np.ndarray) -> NoiseFloor:
        """:meth:`floor` as it would be after :meth:`add` of ``run``."""
        other = copy(self)
        other._lent = True
        other.add(run)
        return other.floor()


@dataclass(frozen=True)
class _Sums:
    """Of x, s and e in this order: sums of squares by row [3, rows] and by channel [3, channels], float64. ``live``
    [channels] is in how many rows any of them is not 0; ``peaks`` are the largest |x| and |e|.
    """

    rows: np.ndarray
    channels: np.ndarray
    live: np.ndarray
    peaks: tuple[float, float]

    @classmethod
    def of(cls, oracle: np.ndarray, spread: np.ndarray, candidate: np.ndarray) -> _Sums:
        length, width = oracle.shape
        rows, channels, live, peaks = np.zeros((3, length)), np.zeros((3, width)), np.zeros(width), (0.0, 0.0)
        for tile in _tiles(oracle):
            x, s = oracle[tile], spread[tile].astype(np.float64)
            e = candidate[tile] - x
            for number, array in enumerate((x, s, e)):
                squares = np.square(array)
                rows[number, tile[0]] += squares.sum(axis=1)
                channels[number, tile[1]] += squares.sum(axis=0)
            live[tile[1]] += ((x != 0) | (s != 0) | (e != 0)).sum(axis=0)
            peaks = tuple(max(before, float(np.abs(array).max(initial=0.0)))
                          for before, array in zip(peaks, (x, e), strict=True))
        return cls(rows, channels, live, peaks)

    @property
    def by_row(self) -> np.ndarray:
        """rms_c [3, rows]."""
        return np.sqrt(self.rows / max(1, self.channels.shape[1]))

    @property
    def by_channel(self) -> np.ndarray:
        """rms_r [3, channels]."""
        return np.sqrt(self.channels / max(1, self.rows.shape[1]))

    @property
    def rms(self) -> list[float]:
        size = self.rows.shape[1] * self.channels.shape[1]
        return [float(total) for total in np.sqrt(self.rows.sum(axis=1) / max(1, size))]

    @property
    def spread_of_channels(self) -> np.ndarray:
        """rms_r(s) of each channel; one with few ``live`` rows is given what s is in all of the tensor that lives,
        too."""
        everywhere = np.sqrt(self.rows[1].sum() / max(1, self.live.sum()))
        spread = self.by_channel[1]
        return np.where(self.live >= ENOUGH, spread, np.hypot(spread, everywhere * np.sqrt(
            self.live / self.rows.shape[1])))


def _tiles(rows: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Of [rows, channels], some ``TILE`` elements at a time, of no less than ``SIDE`` rows and channels where there are
    so many: arrays may lie in memory by rows or by channels.
    """
    length, width = rows.shape
    across = min(width, max(SIDE, TILE // max(1, length)))
    down = max(1, TILE // max(1, across))
    return ((slice(top, top + down), slice(left, left + across))
            for top in range(0, length, down) for left in range(0, width, across))


def _finite(squares: np.ndarray) -> np.ndarray:
    """Of errors: NaN for what is not finite: a floor of NaN passes nothing, an infinite one everything."""
    return np.where(np.isfinite(squares), squares, np.nan)


def _rows(array: np.ndarray | float) -> np.ndarray:
    """[rows, channels]; a vector has one channel."""
    array = np.asarray(array)
    return array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)


def _norm(array: np.ndarray) -> float:
    """The Euclidean norm of [rows, channels]."""
    return float(np.sqrt(sum(float(np.square(array[tile], dtype=np.float64).sum()) for tile in _tiles(array))))


def _rms(array: np.ndarray) -> float:
    return _norm(array) / float(np.sqrt(array.size)) if array.size else 0.0


def _rms_along(array: np.ndarray, axis: int) -> np.ndarray:
    """Of [rows, channels] over one of both."""
    return np.sqrt(np.square(array, dtype=np.float64).mean(axis=axis))


def _middle(array: np.ndarray) -> float:
    """The median magnitude, of every n-th element where there are many."""
    return float(np.median(np.abs(array.reshape(-1)[::1 + array.size // TILE])))


def _typical(error: np.ndarray, scale: np.ndarray, there: np.ndarray) -> float:
    return float(np.median(np.divide(error, scale, out=np.zeros_like(error), where=there)))


def _ratio(error: float, floor: float) -> float:
    return float(error / floor) if floor > 0 else (0.0 if error == 0 else float("inf"))


def _largest_ratio(error: np.ndarray, floor: np.ndarray) -> float:
    impossible = (floor == 0) & (error > 0)
    ratios = np.divide(error, floor, out=np.zeros_like(error), where=floor > 0)
    return float("inf") if impossible.any() else float(ratios.max(initial=0.0))
