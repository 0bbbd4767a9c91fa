"""A fine-tuning as both sides carry it out: its settings, the loop, and what is kept of it.

The loop is the same on both sides; what it calls, losses, gradients, optimizer and schedule, is each framework's own.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from convert.errors import BadInput

from ..gradients.batches import Batch, Gradients
from ..optimizing.recipe import Recipe
from .checkpoints import Checkpoint

EARLY = 3
"""After so many steps the weights are compared, before small errors have grown into others."""


@dataclass(frozen=True)
class Settings:
    """``recipe`` says how weights are moved, ``seed`` in which order rows come and what is dropped.

    ``dropout`` is None where nothing is dropped, 0 where each net drops at its own rate, else the rate at every place
    where it could drop.
    """

    recipe: Recipe
    dropout: float | None
    seed: int

    @classmethod
    def told(cls, content: Mapping[str, Any]) -> Settings:
        """Of what :meth:`as_json` gave."""
        return cls(Recipe(**content["recipe"]), content["dropout"], content["seed"])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def steps(self) -> int:
        return self.recipe.steps

    @property
    def early(self) -> int:
        return min(EARLY, self.steps)


@dataclass
class Course:
    """What a training gave: by step loss, global norm before clipping and learning rate; how far each weight and
    running statistic was from where it began after :attr:`Settings.early` steps, by Paddle's names; and which calls of
    dropout the first pass made.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    moved: Gradients = field(default_factory=dict)
    drops: list[list[Any]] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.losses)


class Trainer(Protocol):
    """A side in training mode, with its optimizer."""

    def learn(self, batch: Batch, step: int, part: int, share: int) -> float:
        """The loss of a micro-batch, the ``part``-th of ``share``; its gradient, divided by ``share``, is added up.

        What a loop does behind a backward pass may be done here already, or in :meth:`step`.
        """

    def step(self) -> float:
        """Clip, move the weights, and go on in the schedule; the global norm before clipping."""

    @property
    def rate(self) -> float:
        """What the next step takes."""

    def moved(self) -> Gradients:
        """How far weights and running statistics are from where they began."""

    @property
    def drops(self) -> list[list[Any]]:
        """The calls of dropout of the first pass, as JSON holds them."""

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next step depends on: arrays, and what JSON holds."""

    def load(self, arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""


def carry_out(side: Trainer, batches: Sequence[Sequence[Batch]], settings: Settings, kept: Checkpoint,
              advance: Callable[[str], None]) -> Course:
    """Train ``side``, from where ``kept`` was left if that is asked for. A first Ctrl-C waits for the step to end."""
    course = _resumed(side, kept)
    if course.done:
        print(f"{kept.name}: goes on behind step {course.done} of {settings.steps}.", file=sys.stderr)
    with _asked_to_stop() as asked:
        while course.done < settings.steps:
            _take_step(side, batches[course.done], course)
            advance(f"{kept.name}, step {course.done} of {settings.steps}")
            if course.done == settings.early:
                course.moved = side.moved()
            if kept.is_due(course.done) or course.done == settings.steps or asked():
                _keep(side, course, kept)
            if asked():
                print(f"{kept.name}: step {course.done} of {settings.steps} is kept; --resume goes on from there.",
                      file=sys.stderr)
                raise KeyboardInterrupt
    return course


def _take_step(side: Trainer, several: Sequence[Batch], course: Course) -> None:
    step = course.done
    rate = side.rate
    losses = [side.learn(batch, step, part, len(several)) for part, batch in enumerate(several)]
    norm = side.step()
    if step == 0:
        course.drops = side.drops
    course.losses.append(float(np.mean(losses)))
    course.rates.append(rate)
    course.norms.append(norm)


def _keep(side: Trainer, course: Course, kept: Checkpoint) -> None:
    arrays, told = side.state()
    curves = {f"curve/{name}": np.array(getattr(course, name)) for name in CURVES}
    kept.save({**{f"state/{name}": array for name, array in arrays.items()}, **curves,
               **{f"moved/{name}": array for name, array in course.moved.items()}}, {"state": told,
                                                                                    "drops": course.drops})


CURVES = ("losses", "norms", "rates")


def _resumed(side: Trainer, kept: Checkpoint) -> Course:
    found = kept.load()
    if found is None:
        if kept.resume:
            print(f"{kept.name}: nothing of it is kept, so it begins at its first step.", file=sys.stderr)
        return Course()
    arrays, told = found
    side.load(_below("state/", arrays), told["state"])
    return Course(*(arrays[f"curve/{name}"].tolist() for name in CURVES), _below("moved/", arrays), told["drops"])


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile; a second one interrupts at once. Elsewhere than in the main thread never.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGINT, before)


def key_of(settings: Settings, **digests: str | None) -> dict[str, Any]:
    """What a checkpoint belongs to: another training is not resumed from it."""
    return {**asdict(settings.recipe), "dropout": settings.dropout, "seed": settings.seed, **digests}


def require_finite(course: Course) -> None:
    """:class:`BadInput` where a loss or gradient of torch's own is no number, so that there is nothing to compare with;
    in a run that spans the band, too: beside an infinite one every candidate would lie within it.
    """
    for told, curve in (("loss", course.losses), ("global norm of gradients", course.norms)):
        bad = next((step for step, value in enumerate(curve, 1) if not math.isfinite(value)), None)
        if bad is not None:
            raise BadInput(f"torch's own {told} is no finite number in step {bad}, so there is nothing to compare "
                           "with. Give a smaller --lr, or --warmup.")


def require_moved(course: Course, settings: Settings) -> None:
    """:class:`BadInput` where torch's own weights are not moved, so that two nets would agree which do nothing."""
    if not any(course.rates):
        raise BadInput(f"the rate is 0 in all {settings.steps} steps, of {settings.recipe.warmup} of warm-up, so "
                       "nothing is trained. Give more --steps or less --warmup.")
    if not any(course.norms):
        raise BadInput("torch's own gradients are 0 in every step, so nothing is trained. A loss over one class, or "
                       "over one pair of a bare encoder, is 0: give a --batch-size of 2 or more, or another head.")
