"""Courses of updates: the same gradients for both sides, or each side's own; as data, without a framework.

The same gradients are torch's of two seeded batches, taken by turns and times powers of two, so that what each side is
given is the same to the bit, and its norm lies now above and now below the one that it is clipped to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..gradients.batches import Batch, Settings, batches_of
from ..inputs import SEED
from ..noise import NoiseFloor
from ..runs import Run
from ..tolerance import SYSTEMATIC
from .recipe import Recipe

Arrays = Mapping[str, np.ndarray]
SMALL = ", small gradients"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
GIVEN = 2
"""How many batches have their gradients given by turns."""


@dataclass(frozen=True)
class Course:
    """``updates`` updates by ``recipe``. ``factors`` [updates x accumulate] are what the gradients of each micro-batch
    are times; empty where each side has its own.
    """

    name: str
    recipe: Recipe
    updates: int
    factors: Sequence[float] = ()

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> Course:
        """What :attr:`as_told` says."""
        return cls(**{**told, "recipe": Recipe(**told["recipe"])})

    @property
    def as_told(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"name": self.name, "recipe": vars(self.recipe), "updates": self.updates, "factors": list(self.factors)}

    def parts(self, update: int) -> list[tuple[int, float]]:
        """Of an update, counted from 0: for each micro-batch which of the gradients it is given, and times what."""
        first, many = update * self.recipe.accumulate, self.recipe.accumulate
        return [(number % GIVEN, self.factors[number]) for number in range(first, first + many)]


def courses_of(recipes: Sequence[Recipe], updates: int, norm: float, typical: float) -> list[Course]:
    """The courses of given gradients, whose global norm is ``norm`` and rms ``typical``.

    Adam adds its epsilon to the root of the second moment, which shows only where gradients are as small as that: those
    optimizers have a second course, with gradients of some epsilons.
    """
    found = []
    for recipe in recipes:
        rng = np.random.default_rng(SEED)
        drawn = rng.choice(FACTORS, updates * recipe.accumulate)
        base = _power_of_two((recipe.clip or 1.0) / norm)
        found.append(Course(recipe.optimizer, recipe, updates, (base * drawn).tolist()))
        if recipe.optimizer.startswith("adam") and recipe.epsilon > 0:
            small = _power_of_two(4 * recipe.epsilon / typical)
            found.append(replace(found[-1], name=f"{recipe.optimizer}{SMALL}", factors=(small * drawn).tolist()))
    return found


def own_batches(run: Run, course: Course) -> list[list[Batch]]:
    """By update the micro-batches of a course in which each side has its own gradients."""
    recipe = course.recipe
    return batches_of(run, Settings(course.updates, recipe.accumulate, recipe.clip or np.inf, recipe.lr))


UNIT = 2.0**-24


class Rounding:
    """How far float32 may lead a parameter from what its updates are in float64, element by element, by running error
    analysis (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3).

    With u = 2^-24, p_t the parameter and d_t what update t adds to it: each store of p_t rounds by u |p_t|, and these
    errors are independent, so their squares add up. What all elements have in common, a rate and a factor of clipping
    in float32 and the operations of an update, is off by ``SYSTEMATIC`` u of each d_t, and may be so each time alike.

    Adam divides by 1 - beta^t. Kept in float32, as Paddle's kernels do and torch's own where its betas are tensors,
    beta^t is off by u sqrt(t) after t products, and d_t by hypot(b_1, b_2 / 2), b_i = u sqrt(t) beta_i^t / (1 -
    beta_i^t): at t = 2 by 2e-5 with the usual beta of 0.999, which is more than everything else.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._updates = recipe, 0
        self._squares: dict[str, np.ndarray] = {}
        self._alike: dict[str, np.ndarray] = {}

    def add(self, moved: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """The next update: of each parameter, by name, what it was and what it is."""
        self._updates += 1
        of_powers = self._of_powers(self._updates)
        for name, (before, after) in moved.items():
            far = np.abs(after.astype(np.float64) - before)
            squares = np.square(UNIT * after) + np.square(of_powers * far)
            self._squares[name] = self._squares.get(name, 0.0) + squares
            self._alike[name] = self._alike.get(name, 0.0) + SYSTEMATIC * UNIT * far

    def spread(self, name: str) -> np.ndarray:
        return np.hypot(np.sqrt(self._squares[name]), self._alike[name])

    def _of_powers(self, number: int) -> float:
        if not self._recipe.optimizer.startswith("adam"):
            return 0.0
        off = [UNIT * number**0.5 * beta**number / (1 - beta**number)
               for beta in (self._recipe.beta1, self._recipe.beta2)]
        return float(np.hypot(off[0], off[1] / 2))


def with_rounding(floor: NoiseFloor, spread: np.ndarray) -> NoiseFloor:
    """The noise of gradients, and that of the updates by which they come into parameters."""
    whole = np.hypot(floor.spread, spread.reshape(floor.spread.shape))
    return replace(floor, spread=whole, largest=max(floor.largest, float(whole.max(initial=0.0))))


def floor_of(oracle: np.ndarray, plain: np.ndarray, spread: np.ndarray) -> NoiseFloor:
    """Of updates of given gradients: torch's own error in float32, ``plain`` against the ``oracle``, and ``spread``."""
    rows = [array.astype(np.float64).reshape(len(array), -1) if array.ndim else array.astype(np.float64).reshape(1, 1)
            for array in (oracle, plain, spread)]
    whole = np.hypot(rows[1] - rows[0], rows[2])
    return NoiseFloor(rows[0], whole, float(whole.max(initial=0.0)))


def _power_of_two(number: float) -> float:
    return float(2.0 ** np.round(np.log2(number)))
