"""What a net is trained with, as data that both sides build from: an optimizer, a schedule, clipping, weight decay.

Every number that torch's and Paddle's defaults could differ in is written out. torch_side.py and paddle_side.py build
from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from convert.errors import BadInput

from ..runs import Run

KINDS = ("sgd", "momentum", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "noam")
RATES = {"sgd": 0.1, "momentum": 0.1, "adam": 1e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    ``lr`` is the largest rate of the schedule, which has ``steps`` updates, the first ``warmup`` of them rising
    linearly from 0 to ``lr``; behind them the rate is constant, falls linearly or as half a cosine to 0, or as a
    polynomial of ``power`` to ``end``. Noam's has the shape of Vaswani et al. 2017, eq. 3, where steps are counted
    from 1: see :attr:`scale`. Each update adds up the gradients of ``accumulate`` micro-batches and clips them by their
    global norm to ``clip``, None for no clipping. ``weight_decay`` is decoupled in AdamW, and added to the gradient as
    L2 in the others; what it is not asked of has none.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    schedule: str = "linear"
    steps: int = 10
    warmup: int = 3
    clip: float | None = 1.0
    accumulate: int = 1
    weight_decay: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    power: float = 2.0
    end: float = 1e-7
    width: int = 512
    """d_model of Noam's schedule."""

    def __post_init__(self) -> None:
        """:class:`BadInput` where it says what no schedule can do."""
        if self.optimizer not in KINDS or self.schedule not in SCHEDULES:
            raise BadInput(f"there is no optimizer {self.optimizer} or no schedule {self.schedule}; there are "
                           f"{', '.join(KINDS)} and {', '.join(SCHEDULES)}.")
        if self.schedule != "constant" and self.warmup >= self.steps:
            raise BadInput(f"a warm-up of {self.warmup} leaves nothing of {self.steps} steps for the schedule "
                           f"{self.schedule}; give --warmup less than the steps.")
        if self.schedule == "noam" and not self.warmup:
            raise BadInput("Noam's schedule divides by its warm-up; give --warmup 1 or more.")
        if self.schedule == "polynomial" and self.end >= self.lr:
            raise BadInput(f"the polynomial schedule ends at {self.end:g}, which is not below its rate {self.lr:g}; "
                           "give a larger --lr.")

    @property
    def scale(self) -> float:
        """The factor before Noam's d_model^-0.5 min(n^-0.5, n warmup^-1.5) that makes ``lr`` its largest value."""
        return self.lr * (self.width * self.warmup) ** 0.5

    def noam(self, number: int) -> float:
        """The rate of update ``number``, counted from 1, by the formula."""
        return self.scale * self.width**-0.5 * min(number**-0.5, number * self.warmup**-1.5)


def decayed(run: Run) -> Mapping[str, bool]:
    """By Paddle's name of a parameter, whether it decays: not where it has one axis, as biases and norms have.

    By the family's rules rather than by a word in a name, so that a table of two axes decays though it is called
    ``relative_attention_bias``.
    """
    return {move.target: len(move.shape) > 1 for move in run.plan.moves if move.rule.moves and not move.filling}
