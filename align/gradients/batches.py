"""What gradients are computed of, and what they are called: batches, settings, and Paddle's names and layout.

A gradient has the layout of its parameter, so the moves that carry a weight from torch to Paddle carry its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ..inputs import SEED, Inputs, seeded
from ..runs import Run
from ..tasks import BARE, TASKS, Labels, numbers

ROWS, TOKENS = 4, 64
TEMPERATURE = 1.0
"""Of a bare encoder's contrastive loss, as in loss.py."""
OTHER, DRAWS = 100_000, 8
Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """``iterations`` of plain SGD with the rate ``lr``; each adds up the gradients of ``accumulate`` micro-batches, of
    which each has its loss divided by their number, and then clips them by their global norm to ``clip``.
    """

    iterations: int
    accumulate: int
    clip: float
    lr: float

    @property
    def kept(self) -> tuple[int, ...]:
        """Which iterations' gradients are compared: the first and the last."""
        return tuple(dict.fromkeys((1, self.iterations)))


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and where its last hidden states [batch, tokens, width] are of real tokens."""

    inputs: Inputs
    labels: Labels

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {**self.inputs.arrays, **self.labels}


@dataclass
class Course:
    """What a side's iterations gave, by iteration: gradients as they are after accumulation and before clipping, and
    the norms of all of them, and the global norm after clipping; and which parameters have no gradient.
    """

    gradients: dict[int, Gradients] = field(default_factory=dict)
    norms: dict[int, np.ndarray] = field(default_factory=dict)
    clipped: dict[int, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Isolated:
    """What enters each recorded module in one pass of torch, and torch's gradient of what it gives, by Paddle's names;
    whole arrays, with the batch in front."""

    entering: Mapping[str, np.ndarray]
    arriving: Mapping[str, np.ndarray]


def batches_of(run: Run, settings: Settings, rows: int = ROWS, tokens: int = TOKENS) -> list[list[Batch]]:
    """By iteration the micro-batches, each drawn anew, padded, and with some labels ignored where they can be."""
    found = [[_batch(run, number * settings.accumulate + part, rows, tokens) for part in range(settings.accumulate)]
             for number in range(settings.iterations)]
    return found


def other_batches(run: Run) -> Iterator[Batch]:
    """Batches as :func:`batches_of` draws them, and none of those."""
    return (_batch(run, OTHER + number, ROWS, TOKENS) for number in range(DRAWS))


def digest_of(batches: Sequence[Sequence[Batch]]) -> str:
    """xxh3-128 over all arrays, in order."""
    hasher = xxhash.xxh3_128()
    for batch in (one for several in batches for one in several):
        hasher.update(Inputs(batch.arrays).digest.encode())
    return hasher.hexdigest()


def _batch(run: Run, number: int, rows: int, tokens: int) -> Batch:
    seed = SEED + 10 * (number + 1)
    inputs = seeded(run.config, run.sizes, kind=run.head.inputs, padded=True, rows=rows, tokens=tokens, seed=seed)
    if run.head.task in BARE:
        return Batch(inputs, {})
    labels = [TASKS[run.head.task].labels(inputs, run.config, run.sizes, np.random.default_rng(seed), ignore)
              for ignore in (True, False)]
    return Batch(inputs, labels[1] if numbers(labels[0]) else labels[0])


def in_paddle(run: Run, found: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray | None]:
    """Gradients by torch's path -> by Paddle's name in Paddle's layout, in the order of execution.

    ``found`` has every parameter under each of its names, None where it has no gradient. What torch has no parameter
    for, which are buffers and what the conversion makes, is left out. A linear's are turned views of ``found``.
    """
    paths = {key: path for path, key in run.plan.keys.items()}
    result: dict[str, np.ndarray | None] = {}
    for move in run.plan.moves:
        names = [paths[key] for key in move.sources]
        if not names or any(name not in found for name in names):
            continue
        given = {key: found[name] for key, name in zip(move.sources, names, strict=True)}
        if all(array is None for array in given.values()):
            result[move.target] = None
            continue
        whole = {key: np.zeros(run.checkpoint.tensors[key].shape, np.float32) if array is None else array
                 for key, array in given.items()}
        result[move.target] = move.turn(move.take(whole.__getitem__))
    return result


def names_of_parameter(run: Run, names: Sequence[str], shape: Sequence[int]) -> list[str]:
    """Which of a Paddle parameter's names its gradient goes by: those that the plan knows in its layout, else the
    one that a net gives it which does not tie it.
    """
    shapes = {move.target: tuple(move.shape) for move in run.plan.moves}
    fitting = [name for name in names if shapes.get(name) == tuple(shape)]
    return fitting or [name for name in names if name in shapes] or list(names[:1])


def backwards(run: Run, names: Sequence[str]) -> list[str]:
    """Parameters' and modules' ``names`` in the order in which a backward pass comes to them.

    A module comes behind its parameters: its name stands for the gradient of what enters it.
    """
    order = {move.target: float(place) for place, move in enumerate(run.plan.moves)}
    last = 0.0
    for _, module in run.modules:
        inside = [place for name, place in order.items() if name.startswith(f"{module}.")]
        last = order[module] = min(inside) - 0.5 if inside else last + 0.25
    return sorted(names, key=lambda name: -order.get(name, -1.0))


def rows_of(batch: Batch, name: str, array: np.ndarray) -> np.ndarray:
    """The rows of real tokens of the gradient of what enters the module ``name``."""
    return batch.inputs.rows(name, array)


def norms_of(gradients: Sequence[Any]) -> np.ndarray:
    """[parameters], float64: the Euclidean norm of each."""
    return np.array([np.sqrt(np.sum(np.square(array, dtype=np.float64))) for array in gradients])
