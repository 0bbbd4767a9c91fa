"""How a text is continued, in numpy alone: greedy, sampled from a seeded source, by beams, as transformers does it.

Whatever gives logits can be continued. A token is drawn from softmax(x) by adding Gumbel noise, -log(-log u) with u
uniform, to x and taking the largest (Gumbel 1954; Maddison et al. 2014, "A* Sampling"). So both sides that are given
the same noise draw the same tokens, and how close a draw was is a difference of two numbers, as of a greedy choice.
Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from ..scores import log_softmax

NEVER = -1e9
"""What transformers adds to the score of a beam that is not to be taken."""


@dataclass(frozen=True)
class Strategy:
    """``tokens`` new ones at most; a text ends with one of ``ends``, not before ``least`` tokens, then comes ``pad``.

    ``temperature`` None takes the best token; a number draws one, from the ``top_k`` best, or from the fewest that
    have ``top_p`` of the probability together (Holtzman et al. 2020), by the noise of ``seed``. ``beams`` above 1
    searches: a text of n new tokens scores sum log p / n^length_penalty (Wu et al. 2016, without its 5 and 6).
    """

    name: str
    tokens: int
    pad: int
    ends: tuple[int, ...] = ()
    least: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Net(Protocol):
    """What gives logits: float [rows, vocabulary] for what follows ``ids`` [rows, tokens so far], of which ``mask``
    [rows, tokens so far] is 0 for padding. ``select`` is told which rows the next call's rows go on from.
    """

    def next(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray: ...

    def select(self, rows: np.ndarray) -> None: ...


@dataclass
class Written:
    """``tokens`` [rows, strategy.tokens]. Of beams, ``states``: what was under way before each step, [rows, beams,
    tokens so far] each, the new tokens alone.
    """

    tokens: np.ndarray
    states: list[np.ndarray] = field(default_factory=list)


Watch = Callable[[int, np.ndarray, np.ndarray], None]
"""Told the step, the logits [rows, vocabulary] with what may not come yet at -inf, and the tokens taken [rows]."""


def write(net: Net, ids: np.ndarray, mask: np.ndarray, strategy: Strategy,
          watch: Watch = lambda step, logits, taken: None, beams: Beams | None = None) -> Written:
    """Continue the rows of ``ids`` [rows, tokens]; ``watch`` is for what is no search by beams."""
    if strategy.beams > 1:
        return _searched(net, ids, mask, beams or Beams(len(ids), strategy))
    return _one_by_one(net, ids, mask, strategy, watch)


def _one_by_one(net: Net, ids: np.ndarray, mask: np.ndarray, strategy: Strategy, watch: Watch) -> Written:
    found = np.full((len(ids), strategy.tokens), strategy.pad, np.int64)
    ended = np.zeros(len(ids), bool)
    for step in range(strategy.tokens):
        logits = without_early_end(net.next(ids, mask).astype(np.float64), strategy, step)
        taken = np.where(ended, strategy.pad, drawn(logits, strategy, step).argmax(-1))
        watch(step, logits, np.where(ended, -1, taken))
        found[:, step] = taken
        ended = ended | stops(taken, strategy)
        if ended.all():
            break
        ids, mask = behind(ids, mask, taken)
    return Written(found)


def _searched(net: Net, ids: np.ndarray, mask: np.ndarray, search: Beams) -> Written:
    ids, mask = (array.repeat(search.strategy.beams, axis=0) for array in (ids, mask))
    length, states = ids.shape[1], []
    while True:
        states.append(search.under_way)
        logits = net.next(ids, mask).astype(np.float64)
        rows = search.advance(logits.reshape(len(search.running), search.strategy.beams, -1))
        if search.over:
            return Written(search.best, states)
        net.select(rows)
        ids, mask = behind(np.concatenate([ids[rows][:, :length], search.under_way.reshape(len(ids), -1)[:, :-1]], 1),
                           mask, search.under_way.reshape(len(ids), -1)[:, -1])


def behind(ids: np.ndarray, mask: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` and ``mask`` with one token more a row."""
    return (np.concatenate([ids, taken[:, None]], axis=1),
            np.concatenate([mask, np.ones((len(mask), 1), mask.dtype)], axis=1))


def stops(taken: np.ndarray, strategy: Strategy) -> np.ndarray:
    """Which of these tokens end their text."""
    return np.isin(taken, strategy.ends)


def without_early_end(scores: np.ndarray, strategy: Strategy, step: int) -> np.ndarray:
    """Scores [..., vocabulary] with the ends at -inf as long as the text is too short for one."""
    if step >= strategy.least or not strategy.ends:
        return scores
    scores = scores.copy()
    scores[..., list(strategy.ends)] = -np.inf
    return scores


def drawn(logits: np.ndarray, strategy: Strategy, step: int) -> np.ndarray:
    """What the largest is taken of: logits [rows, vocabulary], warped and with noise where the strategy draws."""
    if strategy.temperature is None:
        return logits
    scores = warmed(logits, strategy.temperature)
    if strategy.top_k is not None:
        scores = best_of(scores, strategy.top_k)
    if strategy.top_p is not None:
        scores = most_probable(scores, strategy.top_p)
    return scores + np.stack([gumbel(strategy.seed, row, step, logits.shape[-1]) for row in range(len(logits))])


def gumbel(seed: int, row: int, step: int, vocabulary: int) -> np.ndarray:
    """-log(-log u) for each token, float32 [vocabulary], of u that only seed, row, step and token decide."""
    return np.random.default_rng((seed, row, step)).gumbel(size=vocabulary).astype(np.float32)


def warmed(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Scores / temperature: below 1 the best token is taken more often (Ackley et al. 1985)."""
    return scores / temperature


def best_of(scores: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` best of each row, and what equals the last of them; -inf for the others (Fan et al. 2018)."""
    least = np.partition(scores, -min(count, scores.shape[-1]), axis=-1)[..., [-min(count, scores.shape[-1])]]
    return np.where(scores < least, -np.inf, scores)


def most_probable(scores: np.ndarray, share: float) -> np.ndarray:
    """The fewest tokens of each row that have ``share`` of the probability together, at least one; -inf for the others.

    A token is left out where it and all that are less probable have 1 - share at most.
    """
    order = scores.argsort(-1, kind="stable")
    below = np.exp(np.take_along_axis(log_softmax(scores), order, -1)).cumsum(-1)
    out = below <= 1 - share
    out[..., -1] = False
    left = np.empty_like(out)
    np.put_along_axis(left, order, out, -1)
    return np.where(left, -np.inf, scores)


class Beams:
    """A search that keeps the ``beams`` best texts of each row under way, and the best of those that have ended.

    As transformers 4.55 has it: a text that ends counts only where it is among the ``beams`` best continuations of its
    step, and a row is done when its best text under way cannot beat the worst that has ended.
    """

    def __init__(self, rows: int, strategy: Strategy) -> None:
        self.strategy, self.step, self.over = strategy, 0, False
        shape = rows, strategy.beams
        self.running = np.full((*shape, strategy.tokens), strategy.pad, np.int64)
        self.scores = np.where(np.arange(strategy.beams) == 0, 0.0, NEVER) * np.ones((rows, 1))
        self.ended = self.running.copy()
        self.ended_scores = np.full(shape, NEVER)
        self.has_ended = np.zeros(shape, bool)
        self.improvable = np.ones(rows, bool)

    @property
    def under_way(self) -> np.ndarray:
        """The new tokens of the texts under way, [rows, beams, steps so far]."""
        return self.running[..., : self.step]

    @property
    def best(self) -> np.ndarray:
        """The best of the texts that have ended, [rows, tokens]."""
        return self.ended[:, 0]

    @property
    def kept(self) -> int:
        """How many continuations of a row are looked at: so many that, all ends left out, ``beams`` remain."""
        return max(2, 1 + len(self.strategy.ends)) * self.strategy.beams

    def advance(self, logits: np.ndarray) -> np.ndarray:
        """One token more, by logits [rows, beams, vocabulary]; which of the flat rows each text goes on from."""
        rows, beams, vocabulary = logits.shape
        total = self.continued(logits).reshape(rows, -1)
        kept = best_places(total, min(self.kept, total.shape[1]))
        scores, parents, tokens = np.take_along_axis(total, kept, 1), kept // vocabulary, kept % vocabulary
        texts = np.take_along_axis(self.running, parents[..., None], 1)
        texts[..., self.step] = tokens
        ends = stops(tokens, self.strategy) | (self.step + 1 == self.strategy.tokens)
        going_on = best_places(scores + ends * NEVER, beams)
        self._end(texts, scores, ends & (np.arange(kept.shape[1]) < beams))
        self.running = np.take_along_axis(texts, going_on[..., None], 1)
        self.scores = np.take_along_axis(scores + ends * NEVER, going_on, 1)
        self.step += 1
        self._look_ahead(ends)
        return (np.take_along_axis(parents, going_on, 1) + beams * np.arange(rows)[:, None]).reshape(-1)

    def continued(self, logits: np.ndarray) -> np.ndarray:
        """The log probability of each text under way with each token behind it, [rows, beams, vocabulary]."""
        return without_early_end(log_softmax(logits), self.strategy, self.step) + self.scores[..., None]

    def _end(self, texts: np.ndarray, scores: np.ndarray, just: np.ndarray) -> None:
        """Texts [rows, kept, tokens] that have ``just`` ended take the place of worse ones that had."""
        full = self.has_ended.all(1) & (self.strategy.early_stopping is True)
        closed = (full[:, None] | ~self.improvable[:, None]) * NEVER + ~just * NEVER
        found = self.normal(scores, self.step + 1) + closed
        merged = np.concatenate([self.ended_scores, found], 1)
        best = best_places(merged, self.strategy.beams)
        self.ended_scores = np.take_along_axis(merged, best, 1)
        self.ended = np.take_along_axis(np.concatenate([self.ended, texts], 1), best[..., None], 1)
        self.has_ended = np.take_along_axis(np.concatenate([self.has_ended, just], 1), best, 1)

    def _look_ahead(self, ends: np.ndarray) -> None:
        """Whether anything can get better, and so whether the search is over."""
        strategy = self.strategy
        self.improvable &= (self.possible[:, None] > self.to_beat).any(1)
        full = self.has_ended.all() and strategy.early_stopping is True
        self.over = not self.improvable.any() or bool(full) or bool(ends.all())

    @property
    def possible(self) -> np.ndarray:
        """The score that the best text under way may come to, [rows]: that of now, or of the longest text."""
        strategy = self.strategy
        to_the_end = strategy.early_stopping == "never" and strategy.length_penalty > 0
        return self.normal(self.scores[:, 0], strategy.tokens if to_the_end else self.step)

    def normal(self, scores: np.ndarray, length: int) -> np.ndarray:
        """Scores of texts of ``length`` new tokens, to be compared with those of other lengths."""
        return normalised(scores, length, self.strategy.length_penalty)

    @property
    def to_beat(self) -> np.ndarray:
        """[rows, beams]: the worst score among those that have ended, where as many have."""
        return np.where(self.has_ended, self.ended_scores.min(1, keepdims=True), NEVER)


def normalised(scores: np.ndarray, length: int, penalty: float) -> np.ndarray:
    """The score of a text of ``length`` new tokens whose log probability is ``scores``."""
    return scores / length**penalty


def best_places(scores: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` largest of each row are, the largest first, [rows, count]."""
    if count >= scores.shape[1]:
        return (-scores).argsort(1, kind="stable")
    found = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
    order = (-np.take_along_axis(scores, found, 1)).argsort(1, kind="stable")
    return np.take_along_axis(found, order, 1)


def stacked(states: Sequence[np.ndarray], strategy: Strategy) -> np.ndarray:
    """States [rows, beams, steps so far] as one array [steps, rows, beams, tokens], -1 for what is not there yet."""
    return np.stack([np.pad(state, ((0, 0), (0, 0), (0, strategy.tokens - state.shape[2])), constant_values=-1)
                     for state in states])


def as_set(texts: Sequence[Sequence[int]]) -> frozenset[tuple[int, ...]]:
    """Texts without their order."""
    return frozenset(tuple(int(token) for token in text) for text in texts)
