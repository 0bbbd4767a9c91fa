"""Updates of the torch side, under Paddle's names: of given gradients in float32 and float64, and of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .gradients import Batch, in_paddle
from .noise import NoiseFloor
from .torch_gradients import TorchGradients
from .torch_optimizing import TorchTraining
from .updates import Course, Rounding, floor_of

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

    def given(self, course: Course, gradients: Given) -> tuple[list[float], dict[str, np.ndarray],
                                                               dict[str, NoiseFloor]]:
        """(rate of each update, parameters behind the last, their noise floors) of the ``gradients``, which are scaled
        as the course has it.
        """
        rates: list[float] = []
        plain = self._carried_out(course, gradients, torch.float32, _unwatched, rates)
        rounding = Rounding(course.recipe)
        oracle = self._carried_out(course, gradients, torch.float64, _watching(rounding), [])
        spread = self.in_paddle({name: rounding.spread(self._first(name)) for name in plain})
        plain, oracle = self.in_paddle(plain), self.in_paddle(oracle)
        return rates, plain, {name: floor_of(oracle[name], plain[name], spread[name]) for name in plain}

    def own(self, course: Course, batches: Sequence[Sequence[Batch]], watch: Watch = _unwatched,
            ) -> tuple[list[float], dict[str, np.ndarray]]:
        """(rate of each update, parameters behind the last) of the model's own gradients.

        In float64 where :meth:`modes` has the model in it.
        """
        rates = []
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

    def own_rounding(self, course: Course, batches: Sequence[Sequence[Batch]]) -> dict[str, np.ndarray]:
        """What float32 may do to the updates themselves on the way of :meth:`own`."""
        rounding = Rounding(course.recipe)
        self.own(course, batches, _watching(rounding))
        return self._told({name: rounding.spread(name) for name in self._names})

    def _carried_out(self, course: Course, gradients: Given, dtype: Any, watch: Watch, rates: list[float],
                     ) -> dict[str, np.ndarray]:
        """Parameters, by torch's path and under all of their names, of copies that leave the model as it is."""
        firsts = {self._first(name): None for name in gradients[0]}
        leaves = {name: torch.nn.Parameter(self._names[name].detach().to(dtype, copy=True)) for name in firsts}
        training = TorchTraining(course.recipe, list(leaves.values()))
        for update in range(course.updates):
            for which, factor in course.parts(update):
                for name, leaf in leaves.items():
                    part = torch.from_numpy(gradients[which][name]).to(dtype) * (factor / course.recipe.accumulate)
                    leaf.grad = part if leaf.grad is None else leaf.grad + part
            rates.append(training.rate)
            with watch(leaves):
                training.update()
        return {name: leaves[self._first(name)].detach().numpy() for name in gradients[0]}

    def _first(self, name: str) -> str:
        """The first name of the parameter that goes by ``name``."""
        return self._first_names[id(self._names[name])]

    @cached_property
    def _first_names(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for name, parameter in self._names.items():
            found.setdefault(id(parameter), name)
        return found

    def _told(self, arrays: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        return {name: array for name, array in in_paddle(self.run, arrays).items() if array is not None}
