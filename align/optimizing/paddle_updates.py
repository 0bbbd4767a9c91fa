"""Updates of a Paddle net, by its names: of given gradients, and of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle

from ..gradients.batches import Batch
from ..gradients.paddle_side import PaddleGradients
from ..paddle_net import PaddleNet
from .own import OwnOptimizer
from .paddle_side import PaddleTraining
from .updates import Course

Found = tuple[list[float], dict[str, np.ndarray]]


class PaddleUpdates(PaddleGradients):
    """Weights are the same behind it as before, and so is what an optimizer writes into parameters.

    ``own`` is a set-up of the user's; without one it is Paddle's optimizer as :class:`PaddleTraining` has it.
    """

    def __init__(self, side: PaddleNet, decays: Callable[[str], bool], own: OwnOptimizer | None = None) -> None:
        super().__init__(side)
        self._decays, self._own = decays, own

    def given(self, course: Course, gradients: Sequence[Mapping[str, np.ndarray]]) -> Found:
        """(rate of each update, parameters behind the last) of the ``gradients``, which are scaled as the course has
        it; of parameters that have one.
        """
        def backward(update: int, part: int) -> None:
            which, factor = course.parts(update)[part]
            for tensor, names in self._held:
                name = next((name for name in self._named(tensor, names) if name in gradients[which]), None)
                if name is not None and not tensor.stop_gradient:
                    array = gradients[which][name] * np.float32(factor / course.recipe.accumulate)
                    (tensor * paddle.to_tensor(array)).sum().backward()
        rates, found = self._carried_out(course, backward)
        return rates, {name: array for name, array in found.items() if name in gradients[0]}

    def own(self, course: Course, batches: Sequence[Sequence[Batch]]) -> Found:
        """The same of the net's own gradients."""
        def backward(update: int, part: int) -> None:
            self.back(self.loss(batches[update][part]) / len(batches[update]))
        return self._carried_out(course, backward)

    def _carried_out(self, course: Course, backward: Callable[[int, int], None]) -> Found:
        rates, many = [], course.recipe.accumulate
        with self._restored(), self._attributes():
            self._forget()
            training = self._training(course)
            for update in range(course.updates):
                for part in range(many):
                    backward(update, part)
                    if part == many - 1:
                        rates.append(training.rate)
                    training.after_backward(update * many + part + 1)
            training.close()
            found = {name: tensor.numpy() for tensor, names in self._held for name in self._named(tensor, names)}
        return rates, found

    def _training(self, course: Course) -> Any:
        if self._own:
            return self._own.training(self.model, course.recipe.accumulate)
        trained = [(self._named(tensor, names)[0], tensor) for tensor, names in self._held if not tensor.stop_gradient]
        return PaddleTraining(course.recipe, trained, self._decays)

    @contextmanager
    def _attributes(self) -> Iterator[None]:
        held = [(tensor, tensor.regularizer, dict(tensor.optimize_attr), tensor.need_clip) for tensor, _ in self._held]
        try:
            yield
        finally:
            for tensor, regularizer, attributes, clipped in held:
                tensor.regularizer, tensor.optimize_attr, tensor.need_clip = regularizer, attributes, clipped


class PaddleSample:
    """Of a model larger than memory: ``start`` is what is updated of each parameter, by its name."""

    def __init__(self, start: Mapping[str, np.ndarray], decays: Callable[[str], bool]) -> None:
        self._start, self._decays = start, decays

    def given(self, course: Course, gradients: Sequence[Mapping[str, np.ndarray]]) -> Found:
        """As :meth:`PaddleUpdates.given`."""
        held = {name: paddle.create_parameter(list(array.shape), "float32") for name, array in self._start.items()}
        for name, tensor in held.items():
            tensor.set_value(self._start[name])
        training, rates = PaddleTraining(course.recipe, list(held.items()), self._decays), []
        for update in range(course.updates):
            for which, factor in course.parts(update):
                for name, tensor in held.items():
                    array = gradients[which][name] * np.float32(factor / course.recipe.accumulate)
                    (tensor * paddle.to_tensor(array)).sum().backward()
            rates.append(training.rate)
            training.update()
        return rates, {name: tensor.numpy() for name, tensor in held.items()}
