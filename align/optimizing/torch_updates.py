"""Updates of the torch side, under Paddle's names: of given gradients in float32 and float64, and of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from convert.checkpoint import opened
from convert.dtypes import to_float32

from ..gradients.batches import Batch, in_paddle
from ..gradients.torch_side import TorchGradients
from ..inputs import SEED
from ..noise import NoiseFloor
from ..runs import Run
from .recipe import decayed
from .torch_side import TorchTraining
from .updates import Course, Rounding, floor_of

Arrays = Mapping[str, np.ndarray]
Answer = tuple[list[float], dict[str, np.ndarray], dict[str, NoiseFloor]]
"""Rate of each update, parameters behind the last, their noise floors."""
ROWS = 8
"""Of each parameter of a model larger than memory."""
Watch = Callable[[Mapping[str, Any]], AbstractContextManager[None]]
Given = Sequence[Mapping[str, np.ndarray]]


@contextmanager
def _unwatched(parameters: Mapping[str, Any]) -> Iterator[None]:
    yield


def _watching(rounding: Rounding) -> Watch:
    """``rounding`` is told of each update that is carried out within."""
    @contextmanager
    def watch(parameters: Mapping[str, Any]) -> Iterator[None]:
        before = {name: one.detach().numpy().copy() for name, one in parameters.items()}
        yield
        rounding.add({name: (held, parameters[name].detach().numpy()) for name, held in before.items()})
    return watch


class TorchUpdates(TorchGradients):
    """Weights are the same behind it as before."""

    @property
    def start(self) -> dict[str, np.ndarray]:
        """Every parameter as it is."""
        return self._told({name: parameter.detach().numpy() for name, parameter in self._names.items()})

    def gradients_of(self, batches: Sequence[Batch]) -> list[dict[str, np.ndarray]]:
        """By torch's path the gradients of each batch's loss, without those of parameters that have none."""
        found = []
        with self._learning():
            for batch in batches:
                self._forget()
                self.loss(batch).backward()
                found.append({name: parameter.grad.numpy().copy() for name, parameter in self._names.items()
                              if parameter.grad is not None})
        return found

    def in_paddle(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By Paddle's name and in its layout what there is of ``arrays``, which go by torch's path."""
        return self._told({name: arrays.get(name) for name in self._names})

    def given(self, course: Course, gradients: Given) -> Answer:
        """:func:`given` of copies that leave the model as it is, by Paddle's names."""
        firsts = {name: first for name, first in self._first_names.items() if name in gradients[0]}
        start = {name: self._names[name].detach().numpy() for name in set(firsts.values())}
        rates, plain, oracle, spread = given(course, start, gradients)
        plain, oracle, spread = (self.in_paddle({name: found[first] for name, first in firsts.items()})
                                 for found in (plain, oracle, spread))
        return rates, plain, {name: floor_of(oracle[name], plain[name], spread[name]) for name in plain}

    def own(self, course: Course, batches: Sequence[Sequence[Batch]], rounding: Rounding | None = None,
            ) -> tuple[list[float], dict[str, np.ndarray]]:
        """(rate of each update, parameters behind the last) of the model's own gradients; ``rounding`` is told of each.

        In float64 where :meth:`modes` has the model in it.
        """
        rates, watch = [], _watching(rounding) if rounding else _unwatched
        with self._learning(), self._restored():
            training = TorchTraining(course.recipe, [one for one in self._parameters if one.requires_grad])
            for several in batches:
                for batch in several:
                    (self.loss(batch) / len(several)).backward()
                rates.append(training.rate)
                with watch(self._names):
                    training.update()
            found = {name: parameter.detach().numpy().copy() for name, parameter in self._names.items()}
        return rates, self._told(found)

    def spread(self, rounding: Rounding) -> dict[str, np.ndarray]:
        """What was told to ``rounding``, by Paddle's names."""
        return self._told({name: rounding.spread(name) for name in self._names})

    @cached_property
    def _first_names(self) -> dict[str, str]:
        """By each name of a parameter its first."""
        firsts: dict[int, str] = {}
        return {name: firsts.setdefault(id(parameter), name) for name, parameter in self._names.items()}

    def _told(self, arrays: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        return {name: array for name, array in in_paddle(self.run, arrays).items() if array is not None}


class TorchSample:
    """For a model larger than memory: a few rows of each parameter, and seeded gradients. An update treats every
    element by itself but for the norm that all are clipped by, so some are as good as all; names are Paddle's.
    """

    def __init__(self, run: Run) -> None:
        self.start: dict[str, np.ndarray] = {}
        with opened(run.output) as checkpoint:
            for name in decayed(run):
                shape, dtype = checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype
                rows = checkpoint.read_rows(name, 0, min(shape[0], ROWS)) if shape else checkpoint.read(name)
                self.start[name] = to_float32(rows, dtype.name)

    def gradients_of(self, batches: Sequence[Batch]) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(SEED)
        return [{name: rng.normal(size=array.shape).astype(np.float32) for name, array in self.start.items()}
                for _ in batches]

    def in_paddle(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(arrays)

    def given(self, course: Course, gradients: Given) -> Answer:
        rates, plain, oracle, spread = given(course, self.start, gradients)
        return rates, plain, {name: floor_of(oracle[name], plain[name], spread[name]) for name in plain}


def given(course: Course, start: Arrays, gradients: Given) -> tuple[list[float], Arrays, Arrays, Arrays]:
    """(rate of each update, parameters behind the last, the same in float64, :class:`Rounding` of them), by the names
    of ``start``, which is what the parameters are before; ``gradients`` are scaled as the course has it.
    """
    rates: list[float] = []
    plain = _carried_out(course, start, gradients, torch.float32, _unwatched, rates)
    rounding = Rounding(course.recipe)
    oracle = _carried_out(course, start, gradients, torch.float64, _watching(rounding), [])
    return rates, plain, oracle, {name: rounding.spread(name) for name in start}


def _carried_out(course: Course, start: Arrays, gradients: Given, dtype: Any, watch: Watch, rates: list[float],
                 ) -> dict[str, np.ndarray]:
    leaves = {name: torch.nn.Parameter(torch.tensor(array, dtype=dtype)) for name, array in start.items()}
    training = TorchTraining(course.recipe, list(leaves.values()))
    for update in range(course.updates):
        for which, factor in course.parts(update):
            for name, leaf in leaves.items():
                part = torch.from_numpy(gradients[which][name]).to(dtype) * (factor / course.recipe.accumulate)
                leaf.grad = part if leaf.grad is None else leaf.grad + part
        rates.append(training.rate)
        with watch(leaves):
            training.update()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}
