"""Greedy decoding through nothing but a side's ``outputs``, so that what decodes is what the other stages judge.

Each step runs the whole net on all that was decoded so far: caches differ between nets, what they return does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..scores import Arrays, choices
from ..side import Side

TEXT = "text"


@dataclass(frozen=True)
class Limits:
    """The token that a text starts with and the one that ends it, and how many tokens it has at most."""

    start: int
    end: int | None
    steps: int


@dataclass
class _Texts:
    """The texts of a batch as far as they are decoded; ``ids`` [rows, 1 + steps so far] is what the decoder reads."""

    source: Mapping[str, np.ndarray]
    limits: Limits
    ids: np.ndarray = field(init=False)
    ended: np.ndarray = field(init=False)
    chosen: list[Arrays] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = len(next(iter(self.source.values())))
        self.ids = np.full((rows, 1), self.limits.start, np.int64)
        self.ended = np.zeros(rows, bool)

    def extend(self, logits: np.ndarray) -> None:
        """By the best of logits [rows, vocabulary]. A row that has ended goes on with its end, and is not judged."""
        found = choices(TEXT, logits, self.ids[:, -1])
        best = np.where(self.ended, self.ids[:, -1], found[f"{TEXT}.predictions"])
        self.chosen.append({f"{TEXT}.predictions": best,
                            f"{TEXT}.margins": np.where(self.ended, np.inf, found[f"{TEXT}.margins"]),
                            f"{TEXT}.largest": np.where(self.ended, 0, found[f"{TEXT}.largest"])})
        self.ids = np.concatenate([self.ids, best[:, None]], axis=1)
        self.ended |= best == self.limits.end

    def arrays(self) -> Arrays:
        """What was chosen at each step, [rows, steps]; the steps after the last are as those of a row that has ended.

        Float arrays are float32.
        """
        stacked = {name: np.stack([one[name] for one in self.chosen], axis=1) for name in self.chosen[0]}
        missing = self.limits.steps - len(self.chosen)
        fill = {f"{TEXT}.predictions": self.limits.end or 0, f"{TEXT}.margins": np.inf, f"{TEXT}.largest": 0}
        padded = {name: np.pad(array, ((0, 0), (0, missing)), constant_values=fill[name])
                  for name, array in stacked.items()}
        return {name: array if array.dtype.kind == "i" else array.astype(np.float32)
                for name, array in padded.items()}


def greedy(side: Side, sources: Sequence[Mapping[str, np.ndarray]], limits: Limits,
           watch: Callable[[int], None] = lambda step: None) -> Arrays:
    """``text.predictions``, ``.margins`` and ``.largest`` [rows, steps] for the batches ``sources``, in order.

    A paged side brings its weights in once a step, for all batches.
    """
    texts = [_Texts(source, limits) for source in sources]
    for step in range(limits.steps):
        under_way = [text for text in texts if not text.ended.all()]
        if not under_way:
            break
        side.sweep([lambda text=text: text.extend(_next(side, text)) for text in under_way])
        watch(step + 1)
    found = [text.arrays() for text in texts]
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _next(side: Side, text: _Texts) -> np.ndarray:
    return side.outputs({**text.source, "decoder_input_ids": text.ids})["logits"][:, -1]


def reread(side: Side, source: Mapping[str, np.ndarray], chosen: np.ndarray, limits: Limits,
           modes: Sequence[AbstractContextManager], purpose: str) -> list[Arrays]:
    """What :func:`greedy` returns of texts that are decoded already, ``chosen`` [rows, steps], once in each of
    ``modes``: their margins and largest scores, read in one pass.
    """
    begun = np.full((len(chosen), 1), limits.start, np.int64)
    before = np.concatenate([begun, chosen[:, :-1]], axis=1)
    ended = np.logical_or.accumulate(before[:, 1:] == limits.end, axis=1)
    ended = np.concatenate([np.zeros_like(begun, bool), ended], axis=1)
    found: list[Arrays] = []

    def read(mode: AbstractContextManager) -> None:
        with mode:
            logits = side.outputs({**source, "decoder_input_ids": before})["logits"]
        scores = choices(TEXT, logits.reshape(-1, logits.shape[-1]), chosen.reshape(-1))
        found.append({f"{TEXT}.predictions": chosen,
                      f"{TEXT}.margins": np.where(ended, np.inf, scores[f"{TEXT}.margins"].reshape(chosen.shape)),
                      f"{TEXT}.largest": np.where(ended, 0, scores[f"{TEXT}.largest"].reshape(chosen.shape))})
    side.sweep([partial(read, mode) for mode in modes], purpose)
    return found
