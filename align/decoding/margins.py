"""How close a step was: by how much logits would have to move for another text to be written.

Every logit may be off by noise / 2, so that two of them may come closer by the noise. A margin is the smallest noise at
which a choice could be another one. For a draw from some of the tokens that is more than the gap to the next best: the
token might leave them, and one that is not among them might enter and win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ..scores import log_softmax
from ..tolerance import PROBABILITY, step_noise
from .search import NEVER, Beams, Strategy, best_places, gumbel, normalised, stops

EPS = 2.0**-23
BISECTIONS = 40


class Replay:
    """What torch gave for each text that it continued, given to our loop. A text that torch never continued gets what
    its first one got, for the loop has parted from transformers' then.
    """

    def __init__(self, found: Any, strategy: Strategy) -> None:
        self._beams, self._found, self._step = strategy.beams, found, 0
        self._start = found.ids[0].shape[1]

    @property
    def states(self) -> list[np.ndarray]:
        """What transformers had under way before each step: the new tokens, [rows, beams, steps so far]."""
        return [ids[:, self._start:].reshape(len(ids) // self._beams, self._beams, -1) for ids in self._found.ids]

    def next(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        step = min(self._step, len(self._found.ids) - 1)
        self._step += 1
        known = {(flat // self._beams, row.tobytes()): flat for flat, row in enumerate(self._found.ids[step])}
        return self._found.logits[step][[known.get((flat // self._beams, row.tobytes()), flat)
                                         for flat, row in enumerate(ids)]]

    def select(self, rows: np.ndarray) -> None: ...


def margin(logits: np.ndarray, taken: int, strategy: Strategy, row: int, step: int) -> tuple[float, float]:
    """(margin, the largest of the numbers compared) of a token drawn by, or the best of, logits [vocabulary].

    With s = logits + temperature * gumbel, in units of logits: another token j needs the noise s[taken] - s[j] to win,
    and what it takes to enter, the larger of the two; ``taken`` may also have to leave.
    """
    finite = logits[np.isfinite(logits)]
    scores = logits
    if strategy.temperature is not None:
        scores = logits + strategy.temperature * gumbel(strategy.seed, row, step, len(logits)).astype(np.float64)
    gaps = scores[taken] - scores
    gaps[taken] = np.inf
    leaving, entering = _crossings(logits, taken, strategy, gaps)
    found = min(leaving, np.maximum(entering, gaps).min())
    return max(found, 0.0), float(max(np.abs(finite).max(), np.abs(scores[np.isfinite(scores)]).max()))


def _crossings(logits: np.ndarray, taken: int, strategy: Strategy, gaps: np.ndarray) -> tuple[float, np.ndarray]:
    """The noise at which ``taken`` leaves the tokens that are drawn from, and that at which each other one enters."""
    if strategy.temperature is None or (strategy.top_k is None and strategy.top_p is None):
        return np.inf, np.zeros(len(logits))
    if strategy.top_k is not None and strategy.top_k >= len(logits):
        return np.inf, np.zeros(len(logits))
    if strategy.top_k is not None:
        ordered = np.sort(logits)[::-1]
        last, next_best = ordered[strategy.top_k - 1: strategy.top_k + 1]
        return logits[taken] - next_best, np.maximum(last - logits, 0.0)
    return _most_probable_crossings(logits, taken, strategy, gaps)


def _most_probable_crossings(logits: np.ndarray, taken: int, strategy: Strategy, gaps: np.ndarray,
                             ) -> tuple[float, np.ndarray]:
    """A token belongs to the most probable as long as those above it have less than top_p together, A.

    At a noise n another is surely above where it is more than n above now, and may be where it is less than n below;
    and the log-odds of A may move by n / temperature. Found by bisection, since all of that grows with n.
    """
    scores = log_softmax(logits / strategy.temperature)
    order = (-logits).argsort(kind="stable")
    descending, shares = -logits[order], np.concatenate([[0.0], np.exp(scores[order]).cumsum()])
    limit = _log_odds(np.array(strategy.top_p))

    def leaves(noise: np.ndarray) -> np.ndarray:
        above = shares[np.searchsorted(descending, -(logits[taken] - noise), "left")] - np.exp(scores[taken])
        return _log_odds(above) + noise / strategy.temperature + PROBABILITY >= limit
    reach = 2 * float(np.ptp(logits[np.isfinite(logits)])) + 1.0
    leaving = float(_smallest(leaves, np.zeros(1), reach)[0])
    outside = np.flatnonzero(_log_odds(shares[np.searchsorted(descending, -logits, "left")]) >= limit)
    rivals = outside[gaps[outside] < leaving]

    def enters(noise: np.ndarray) -> np.ndarray:
        above = shares[np.searchsorted(descending, -(logits[rivals] + noise), "left")]
        return _log_odds(above) - noise / strategy.temperature - PROBABILITY < limit
    entering = np.zeros(len(logits))
    entering[outside] = np.inf
    entering[rivals] = _smallest(enters, np.zeros(len(rivals)), reach)
    return leaving, entering


def _log_odds(share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        return np.log(share) - np.log1p(-share)


def _smallest(holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, reach: float) -> np.ndarray:
    """The smallest noise in [0, reach] at which ``holds(noise)`` is true, element by element; inf where it never is."""
    high = np.full(low.shape, reach)
    never = ~holds(high)
    high = np.where(holds(low), low, high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = holds(middle)
        low, high = np.where(found, low, middle), np.where(found, middle, high)
    return np.where(never, np.inf, high)


# Beams ----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Closest:
    """The decision that was closest: its margin, and the noise of what was compared."""

    margin: float = np.inf
    noise: float = 0.0

    @property
    def ratio(self) -> float:
        return self.margin / self.noise if self.noise > 0 else np.inf

    @staticmethod
    def of(decisions: list[Closest]) -> Closest:
        return min(decisions, key=lambda one: one.ratio, default=Closest())


@dataclass(frozen=True)
class _Kept:
    """The best continuations of one row, the best first, and one more: arrays by place; ``steps`` by beam."""

    scores: np.ndarray
    parents: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray
    errors: np.ndarray
    steps: np.ndarray

    def pair(self, one: int, other: int) -> Closest:
        """How close two of them are."""
        parent, gap = self.parents[one], abs(self.scores[one] - self.scores[other])
        alone = self.steps[parent] + 2 * EPS * abs(self.scores[one])
        noise = alone if parent == self.parents[other] else self.errors[one] + self.errors[other]
        return Closest(float(gap), float(noise))


@dataclass(frozen=True)
class _Ended:
    """A text that has ended, its score and how far that may be off; ``entry`` is what let it count, or kept it out."""

    text: tuple[int, ...]
    score: float
    error: float
    entered: bool
    entry: Closest


class Measured(Beams):
    """A search that measures how close its decisions were. ``measured`` [rows] is torch's own error: see tolerance.

    The score of a text is a sum of log probabilities, each of which may be off by two halves of the noise, its own and
    that of the sum of all; two texts with the same beginning differ by the last logits alone.
    """

    def __init__(self, rows: int, strategy: Strategy, measured: np.ndarray) -> None:
        super().__init__(rows, strategy)
        self.measured = measured
        self.errors = np.zeros((rows, strategy.beams))
        self.closest: list[list[Closest]] = []
        """By step and row, the decision which texts are under way behind it."""
        self.texts: list[list[_Ended]] = [[] for _ in range(rows)]
        self.stopping: list[list[Closest]] = [[] for _ in range(rows)]

    def advance(self, logits: np.ndarray) -> np.ndarray:
        rows, beams, vocabulary = logits.shape
        total = self.continued(logits).reshape(rows, -1)
        kept = best_places(total, min(self.kept + 1, total.shape[1]))
        scores, parents, tokens = np.take_along_axis(total, kept, 1), kept // vocabulary, kept % vocabulary
        steps = self._noise(logits)
        errors = np.take_along_axis(self.errors + steps, parents, 1) + EPS * np.abs(scores)
        ends = stops(tokens, self.strategy) | (self.step + 1 == self.strategy.tokens)
        found = [_Kept(*of_row) for of_row in zip(scores, parents, tokens, ends, errors, steps, strict=True)]
        length, was_improvable, before = self.step + 1, self.improvable.copy(), self.running.copy()
        self.closest.append([self._under_way(one) for one in found])
        places = super().advance(logits)
        for row in np.flatnonzero(was_improvable):
            self._note_ended(row, before[row], found[row], length)
        self.errors = (self.errors + steps).reshape(-1)[places].reshape(rows, beams) + EPS * np.abs(self.scores)
        self._note_stops()
        return places

    def decided(self, row: int) -> Closest:
        """How close the choice among the texts of a row that have ended was."""
        texts = self.texts[row]
        winner = next((one for one in texts if one.entered and one.text == tuple(self.best[row])), None)
        if winner is None:
            return Closest(0.0, 1.0)
        rivals = [self._rivalry(winner, one) for one in texts if one is not winner]
        entries = [one.entry for one in texts if one.entered] if self.strategy.early_stopping is True else []
        return Closest.of([*rivals, winner.entry, *entries, *self.stopping[row]])

    def _rivalry(self, winner: _Ended, rival: _Ended) -> Closest:
        """To win, a text has to have the better score, and to be among those that count."""
        better = Closest(max(winner.score - rival.score, 0.0), winner.error + rival.error)
        return better if rival.entered else max(better, rival.entry, key=lambda one: one.ratio)

    def _noise(self, logits: np.ndarray) -> np.ndarray:
        """How far one more log probability may be off, [rows, beams]."""
        largest = np.abs(np.where(np.isfinite(logits), logits, 0.0)).max(-1)
        return np.array([[step_noise(one, measured) for one in row]
                         for row, measured in zip(largest, self.measured, strict=True)])

    def _under_way(self, found: _Kept) -> Closest:
        going = np.flatnonzero(~found.ends & (found.scores > NEVER / 2))
        chosen, left = going[: self.strategy.beams], going[self.strategy.beams:]
        return Closest.of([found.pair(one, other) for one, other in product(chosen, left)])

    def _note_ended(self, row: int, before: np.ndarray, found: _Kept, length: int) -> None:
        """A text that ends counts only among the best ``beams`` continuations of its step."""
        beams, penalty = self.strategy.beams, self.strategy.length_penalty
        for place in np.flatnonzero(found.ends & (found.scores > NEVER / 2)):
            entered = bool(place < beams)
            others = range(beams, len(found.scores)) if entered else range(beams)
            text = before[found.parents[place]].copy()
            text[length - 1] = found.tokens[place]
            self.texts[row].append(_Ended(
                tuple(text), float(normalised(found.scores[place], length, penalty)),
                float(normalised(found.errors[place], length, penalty)), entered,
                Closest.of([found.pair(place, other) for other in others])))

    def _note_stops(self) -> None:
        """Whether a row is done is decided by the best text under way and the worst that has ended."""
        for row, (possible, worst) in enumerate(zip(self.possible, self.to_beat.min(1), strict=True)):
            if worst > NEVER / 2 and possible > NEVER / 2:
                errors = [one.error for one in self.texts[row] if one.entered]
                mine = normalised(self.errors[row, 0], self.step, self.strategy.length_penalty)
                self.stopping[row].append(Closest(float(abs(possible - worst)), float(mine + max(errors, default=0.0))))
