"""The noise floor of whatever torch computes: a loss, a norm of gradients, a curve.

A stage says how its quantities are measured on the reference. They are measured once in float64 and several times in
float32 with all sums reordered, by the same code on the same unmodified model, and pooled with the ordinary pass. The
candidate has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .noise import NoiseFloor, Pool
from .tolerance import REORDERED_RUNS, SECOND_LOOK

if TYPE_CHECKING:
    from .stage import Session
    from .torch_side import TorchSide


@dataclass(frozen=True)
class Quantity:
    """What one run gave: ``value``, floating, of any shape; float64 where the run was.

    ``terms`` [n] are what a single number is the sum of, where each of them has an error of its own. ``base`` is how
    large the numbers are whose difference the value is, beside itself: see :class:`NoiseFloor`.
    """

    value: np.ndarray
    terms: np.ndarray | None = None
    base: float = 0.0


YARDSTICK = ("Yardstick: torch's own rounding error, pooled over float64 against "
             f"{REORDERED_RUNS + 1} float32 runs with their sums reordered.")
OWN_NOISE = "torch's own noise"
Quantities = Mapping[str, Quantity]
Measure = Callable[[], Quantities]
Modes = Callable[[int], Sequence[AbstractContextManager]]


def modes_of_passes(reordered: int) -> list[AbstractContextManager]:
    """Forward passes in float64, and with their sums in ``reordered`` other orders."""
    from .oracle import Float64, Reordered
    return [Float64(), *map(Reordered, range(1, reordered + 1))]


def floors_of(side: TorchSide, measures: Sequence[Measure], plain: Sequence[Quantities],
              reordered: int = REORDERED_RUNS, modes: Modes = modes_of_passes) -> list[dict[str, NoiseFloor]]:
    """The floors of what each of ``measures`` gives, by name; ``plain`` is what they gave in the ordinary pass.

    A measure calls ``side``, at any time and as often as it is asked to; passes of a paged model go together.
    ``modes(runs)`` gives what is entered for each: float64, then that many ways to reorder.
    """
    pooled = [Pooled() for _ in measures]

    def run(number: int, mode: AbstractContextManager) -> None:
        with mode:
            pooled[number].add(measures[number]())
    numbers = range(len(measures))
    side.sweep([partial(run, number, mode) for of_all in zip(*(modes(reordered) for _ in numbers), strict=True)
                for number, mode in zip(numbers, of_all, strict=True)], OWN_NOISE)
    for one, quantities in zip(pooled, plain, strict=True):
        one.add(quantities)
    return [one.floors() for one in pooled]


def look_again(session: Session, stage: str, doubtful: int, look: Callable[[], int]) -> list[str]:
    """Ask torch more often where nothing fails but by little, which may be the luck of few runs; tells of it.

    ``doubtful`` is how many figures fail so, 0 where any other fails; ``look`` judges them by ``SECOND_LOOK`` reordered
    runs and returns how many are left.
    """
    if not doubtful or session.weights_divergence:
        return []
    told = f"{doubtful} figure{'s lie' if doubtful > 1 else ' lies'} just beyond a limit of {REORDERED_RUNS + 1} runs"
    if session.options.compare:
        return [f"{told} of torch. More runs could tell luck from error, and --compare has no torch to run: python -m "
                f"align.{stage} with both sides at once does."]
    session.advance("a second look")
    left = look()
    return [f"{told} of torch, so it ran {SECOND_LOOK + 1} times: {left or 'none'} of them remain{'s' * (left == 1)}."]


class Pooled:
    """The pools of one measure's quantities; the first run is the oracle."""

    def __init__(self) -> None:
        self._values: dict[str, Pool] = {}
        self._terms: dict[str, Pool] = {}

    def add(self, quantities: Quantities) -> None:
        for name, quantity in quantities.items():
            _put(self._values, name, quantity.value, quantity.base)
            if quantity.terms is not None:
                _put(self._terms, name, quantity.terms)

    def floors(self) -> dict[str, NoiseFloor]:
        found = {name: pool.floor() for name, pool in self._values.items()}
        return found | {name: found[name].of_sum(pool.floor()) for name, pool in self._terms.items()}


def _put(pools: dict[str, Pool], name: str, array: np.ndarray, base: float = 0.0) -> None:
    if name in pools:
        pools[name].add(array)
    else:
        pools[name] = Pool(array, base)
