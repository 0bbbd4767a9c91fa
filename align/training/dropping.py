"""Dropout with the same masks on both sides, from one seeded source; calls are known by their place.

Two frameworks draw other masks from the same seed. So the mask of each call is drawn by numpy, seeded by the step, by
the recorded module that the call lies in and by its number among the calls there, and each side's own dropout is
replaced by a product with it while it trains. A call that only one side makes moves no other mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import xxhash

from ..compare import TensorResult

UPSCALED, DOWNSCALED = "upscale_in_train", "downscale_in_infer"


@dataclass(frozen=True)
class Call:
    """One call of dropout at the rate ``p``: the ``number``-th in ``place``, Paddle's path of a recorded module or
    nothing outside of all. ``mode`` is Paddle's word for what it scales; torch has the first of the two alone.
    """

    place: str
    number: int
    p: float
    training: bool
    mode: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.place or 'model'} (dropout {self.number})"


class Drops:
    """The masks of a side's passes; ``rate`` None drops nothing, 0 at each call's own rate, else at this one.

    Calls that drop nothing at their own rate are not counted then, as some nets leave them out.
    """

    def __init__(self, seed: int, rate: float | None) -> None:
        self._seed, self._rate = seed, rate
        self._pass = (0, 0)
        self._counts: dict[str, int] = {}
        self.places: list[str] = []
        """The recorded modules that are under way, the innermost last."""
        self.calls: list[Call] = []
        """Those of the first pass."""

    def begin(self, step: int, part: int) -> None:
        """A pass begins: of the ``part``-th micro-batch of a step."""
        self._pass, self._counts = (step, part), {}
        self.places.clear()

    def scale(self, p: float, training: bool, mode: str, shape: Sequence[int]) -> np.ndarray | float:
        """What the call's input is to be multiplied by: float32 of its ``shape``, or a number."""
        if self._rate is None or (self._rate == 0 and p == 0):
            return 1.0
        place = self.places[-1] if self.places else ""
        number = self._counts[place] = self._counts.get(place, 0) + 1
        if self._pass == (0, 0):
            self.calls.append(Call(place, number, float(p), bool(training), mode, tuple(shape)))
        rate = self._rate or p
        if not training:
            return 1.0 if mode == UPSCALED else 1.0 - rate
        generator = np.random.default_rng([self._seed, *self._pass, xxhash.xxh3_64_intdigest(place.encode()), number])
        kept = generator.random(int(np.prod(shape)), np.float32) >= rate
        return np.where(kept, np.float32(1.0 if mode == DOWNSCALED or rate >= 1 else 1 / (1 - rate)),
                        np.float32(0)).reshape(shape)


def packed(calls: Sequence[Call]) -> list[list[Any]]:
    """As JSON holds them."""
    return [[list(part) if isinstance(part, tuple) else part for part in astuple(call)] for call in calls]


def unpacked(rows: Sequence[Sequence[Any]]) -> list[Call]:
    return [Call(*row[:5], tuple(row[5])) for row in rows]


def differing(reference: Sequence[Call], candidate: Sequence[Call]) -> dict[str, str]:
    """What is wrong with the candidate's calls, by name, in the order of torch's."""
    theirs, ours = ({(call.place, call.number): call for call in calls} for calls in (reference, candidate))
    told = {call.name: found for key, call in theirs.items() if (found := _difference(call, ours.get(key)))}
    return told | {call.name: f"this net drops at rate {call.p:g} where torch drops nothing"
                   for key, call in ours.items() if key not in theirs}


def _difference(expected: Call, given: Call | None) -> str | None:
    if given is None:
        return f"torch drops at rate {expected.p:g} here, and this net drops nothing"
    if expected.training and not given.training:
        return "this net drops nothing while it trains: it is in eval mode here"
    if given.p != expected.p:
        return f"the rate is {given.p:g}, torch's is {expected.p:g}"
    if given.mode != expected.mode:
        return (f"the mode is {given.mode}: what is kept is not divided by 1 - {expected.p:g} in training, as torch "
                "does")
    if np.prod(given.shape) != np.prod(expected.shape):
        return f"what is dropped from has the shape {list(given.shape)}, torch's {list(expected.shape)}"
    return None


def judged(told: Mapping[str, str]) -> list[TensorResult]:
    """A failure each."""
    return [TensorResult(name, (), "–", 0.0, False, failure=f"{name}: {why}") for name, why in told.items()]
