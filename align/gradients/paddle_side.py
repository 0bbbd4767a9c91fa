"""Gradients of a Paddle net, by its names: iterations of SGD, and each layer by itself.

Eval mode, so without dropout; but batch norms are trained, by the batch's own statistics. Weights and running
statistics are the same behind it as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import paddle

from convert.errors import BadInput

from ..lockstep import heard_by
from ..paddle_net import PaddleNet
from ..side import entering, fed, hooked, in_shape
from .batches import TEMPERATURE, Batch, Course, Gradients, Isolated, Settings, names_of_parameter, norms_of, rows_of

STATISTICS = ("_mean", "_variance")
"""Of Paddle's batch norm."""


class PaddleGradients:
    """Of a net whose weights are all in memory."""

    def __init__(self, side: PaddleNet) -> None:
        self.side, self.run, self.model = side, side.run, side.model
        held: dict[int, tuple[Any, list[str]]] = {}
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, paddle.base.framework.EagerParamBase):
                held.setdefault(id(tensor), (tensor, []))[1].append(name)
        self._held = list(held.values())
        self._norms = [_Norm(path, layer) for path, layer in self.model.named_sublayers()
                       if {*STATISTICS} <= layer._parameters.keys() | layer._buffers.keys()]

    @property
    def shared(self) -> dict[str, str]:
        """By another name of a parameter the one that its gradient goes by."""
        return {name: self._named(tensor, names)[0] for tensor, names in self._held for name in names
                if name not in self._named(tensor, names)}

    @property
    def frozen(self) -> list[str]:
        """Which parameters ask for no gradient."""
        return [name for tensor, names in self._held if tensor.stop_gradient for name in self._named(tensor, names)]

    def iterate(self, batches: Sequence[Sequence[Batch]], settings: Settings) -> Course:
        """Carry out the iterations, from the weights that the net has, and give it those back."""
        course = Course()
        with self._restored(), self._trained():
            for number, several in enumerate(batches, 1):
                self._accumulate(several)
                self._step(course, number, settings)
        return course

    def isolated(self, batch: Batch, isolated: Isolated) -> tuple[Gradients, list[str]]:
        """As :meth:`TorchGradients.isolated`."""
        fed_with: dict[str, Any] = {}
        given: list[tuple[Any, Any]] = []

        def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            place = entering(arguments, named, _is_floating)
            value = None if place is None else (arguments or named)[place]
            if name not in isolated.entering or not _is_floating(value):
                return None
            array = in_shape(self.run.batch_first(name, isolated.entering[name]), value.shape)
            fed_with[name] = paddle.to_tensor(np.ascontiguousarray(array), stop_gradient=False)
            return fed(arguments, named, place, fed_with[name])

        def after(name: str, layer: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if name not in isolated.arriving or not _is_floating(first) or first.stop_gradient:
                return None
            array = in_shape(self.run.batch_first(name, isolated.arriving[name]), first.shape)
            given.append((first, paddle.to_tensor(np.ascontiguousarray(array))))
            cut = first.detach()
            return type(output)((cut, *output[1:])) if isinstance(output, (tuple, list)) else cut
        self._forget()
        with self._hooks(before, after), self._trained():
            loss = self.loss(batch)
        ends = [*given, *([] if loss.stop_gradient else [(loss, paddle.ones_like(loss))])]
        with self.side.blamed():
            paddle.autograd.backward([tensor for tensor, _ in ends], [seed for _, seed in ends])
        found, absent = self._gradients()
        inputs = {name: rows_of(batch, name, self.run.batch_first(name, tensor.grad.numpy()))
                  for name, tensor in fed_with.items() if tensor.grad is not None}
        self._forget()
        return found | inputs, absent

    def loss(self, batch: Batch) -> Any:
        """The net's own; of a bare encoder the contrastive loss, with ``models.loss``."""
        outputs = self.side.call({name: paddle.to_tensor(array) for name, array in batch.arrays.items()})
        if batch.labels:
            if outputs.get("loss") is None:
                raise BadInput(f"the Paddle net returned no loss for the labels {', '.join(batch.labels)}; it returned "
                               f"{', '.join(outputs)}.")
            if outputs["loss"].size != 1:
                raise BadInput(f"the Paddle net returned a loss of the shape {outputs['loss'].shape}, where one number "
                               "is needed: the mean over what has a label.")
            return outputs["loss"]
        from models.loss import contrastive_loss, mean_pool
        hidden = outputs.get("last_hidden_state")
        if hidden is None:
            raise BadInput(f"the Paddle net returned no last_hidden_state; it returned {', '.join(outputs)}.")
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose([0, 2, 1])
        mask = np.ones(hidden.shape[:2]) if "pixel_values" in batch.arrays else batch.inputs.last_mask
        first, second = paddle.split(mean_pool(hidden, paddle.to_tensor(mask.astype(np.int64))), 2)
        return contrastive_loss(first, second, TEMPERATURE)

    def back(self, loss: Any) -> None:
        """The backward pass of ``loss``."""
        with self.side.blamed():
            loss.backward()

    def _accumulate(self, several: Sequence[Batch]) -> None:
        self._forget()
        for batch in several:
            self.back(self.loss(batch) / len(several))

    def _step(self, course: Course, number: int, settings: Settings) -> None:
        if number in settings.kept:
            course.gradients[number], absent = self._gradients()
            course.gradients[number] |= {name: array for norm in self._norms for name, array in norm.statistics()}
            course.absent = course.absent or absent
        pairs = [(tensor, tensor.grad) for tensor, _ in self._held if tensor.grad is not None]
        course.norms[number] = norms_of([gradient.numpy() for _, gradient in pairs])
        clipped = paddle.nn.ClipGradByGlobalNorm(settings.clip)(pairs)
        course.clipped[number] = float(np.linalg.norm(norms_of([gradient.numpy() for _, gradient in clipped])))
        with paddle.no_grad():
            for tensor, gradient in clipped:
                tensor.set_value(tensor - settings.lr * gradient)

    def _gradients(self) -> tuple[Gradients, list[str]]:
        named = [(name, tensor) for tensor, names in self._held for name in self._named(tensor, names)]
        return ({name: tensor.grad.numpy() for name, tensor in named if tensor.grad is not None},
                [name for name, tensor in named if tensor.grad is None])

    def _named(self, tensor: Any, names: Sequence[str]) -> list[str]:
        return names_of_parameter(self.run, names, tensor.shape)

    def _forget(self) -> None:
        for tensor, _ in self._held:
            tensor.clear_gradient(False)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        held = [tensor.numpy() for tensor, _ in self._held]
        try:
            yield
        finally:
            self._forget()
            for (tensor, _), before in zip(self._held, held, strict=True):
                tensor.set_value(before)

    @contextmanager
    def _trained(self) -> Iterator[None]:
        """Batch norms in train mode, and as they were behind it."""
        with ExitStack() as stack:
            for norm in self._norms:
                stack.enter_context(norm.trained())
            yield

    @contextmanager
    def _hooks(self, before: Any, after: Any) -> Iterator[None]:
        pairs = [(name, name) for _, name in self.run.modules]
        with hooked(dict(self.model.named_sublayers()), "register_forward_post_hook", pairs, before, after), (
                heard_by(self)):
            yield


class _Norm:
    """A batch norm, whose running statistics [channels] its batches move."""

    def __init__(self, path: str, layer: Any) -> None:
        self.path, self._layer = path, layer

    @contextmanager
    def trained(self) -> Iterator[None]:
        layer = self._layer
        before = {key: getattr(layer, key).numpy() for key in STATISTICS}
        training, layer.training = layer.training, True
        try:
            yield
        finally:
            layer.training = training
            for key, array in before.items():
                getattr(layer, key).set_value(array)

    def statistics(self) -> Iterator[tuple[str, np.ndarray]]:
        """By name, float32 [channels]."""
        for key in STATISTICS:
            yield f"{self.path}.{key}", getattr(self._layer, key).numpy()


def _is_floating(value: Any) -> bool:
    return isinstance(value, paddle.Tensor) and value.is_floating_point()
