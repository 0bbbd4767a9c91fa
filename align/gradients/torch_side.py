"""Gradients of the torch side, under Paddle's names: iterations of SGD, and each module by itself.

Eval mode, so without dropout; but batch norms are trained, by the batch's own statistics. Weights and running
statistics are the same behind it as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from convert.errors import BadInput

from ..lockstep import heard_by
from ..oracle import CHUNK, MATMUL, Float64, Reordered, by_place, in_chunks
from ..runs import Run
from ..side import entering, fed, hooked, in_shape
from ..tolerance import NEAR
from ..torch_side import TorchSide, _is_floating, contrastive, tensors_of
from .batches import TEMPERATURE, Batch, Course, Gradients, Isolated, Settings, in_paddle, norms_of, rows_of

BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm
RELU = {F.relu, torch.relu, torch.Tensor.relu}
CLIP_EPSILON = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm that it divides by; Paddle adds nothing."""


class TorchGradients:
    """Of a side whose weights are all in memory. ``trained``: parameters that do not ask for a gradient are made to."""

    def __init__(self, side: TorchSide, run: Run, trained: bool) -> None:
        self.side, self.run, self.model = side, run, side.model
        self._trained = trained
        self._names = {name: parameter for name, parameter in self.model.named_parameters(remove_duplicate=False)
                       if parameter.is_floating_point()}
        self._parameters = list({id(parameter): parameter for parameter in self._names.values()}.values())
        self._norms = {path: module for path, module in self.model.named_modules()
                       if isinstance(module, BATCH_NORM) and module.running_mean is not None}
        self._statistics = {f"{path}.{key}": getattr(norm, key) for path, norm in self._norms.items()
                            for key in ("running_mean", "running_var")}

    @property
    def trains_statistics(self) -> bool:
        """Whether there are batch norms whose running statistics the iterations move."""
        return bool(self._norms)

    def iterate(self, batches: Sequence[Sequence[Batch]], settings: Settings) -> Course:
        """Carry out the iterations, from the weights that the model has, and give it those back."""
        course = Course()
        with self._learning(), self._restored():
            for number, several in enumerate(batches, 1):
                self._forget()
                for batch in several:
                    (self.loss(batch) / len(several)).backward()
                with torch.no_grad():
                    self._step(course, number, settings)
        return course

    def nearest_kink(self, batch: Batch) -> float:
        """The smallest |x| / rms(x) of what enters a relu, infinite where there is none.

        Rounding decides on which side of 0 an element lies that is nearer than ``NEAR``, and with it all of its
        gradient: there are two right ones.
        """
        if not any(isinstance(module, torch.nn.ReLU) for module in self.model.modules()):
            return math.inf
        with self._learning(), torch.no_grad(), _Kinks() as kinks:
            self.loss(batch)
        return kinks.nearest

    def clipped_apart(self, several: Sequence[Batch], settings: Settings) -> Gradients:
        """What accumulation gives where each micro-batch is clipped by itself: a mistake, to be known by its sum."""
        total: Gradients = {}
        with self._learning():
            for batch in several:
                self._forget()
                (self.loss(batch) / len(several)).backward()
                with torch.no_grad():
                    clip(self._parameters, settings.clip)
                for name, array in self._gradients()[0].items():
                    total[name] = total[name] + array if name in total else array
        return total

    def observe(self, batch: Batch) -> Isolated:
        """What enters the recorded modules, and the gradients of what they give."""
        arrived: dict[str, np.ndarray] = {}
        given: dict[str, Any] = {}

        def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = _entering(arguments, named)[1]
            if _is_floating(value):
                arrived[name] = self.run.batch_first(name, value.detach().numpy()).copy()

        def after(name: str, module: Any, output: Any) -> None:
            first = _first(output)
            if _is_floating(first) and first.requires_grad:
                first.retain_grad()
                given[name] = first
        with self._learning(), self._hooks(before, after):
            self.loss(batch).backward()
            arriving = {name: self.run.batch_first(name, tensor.grad.numpy()).copy()
                        for name, tensor in given.items() if tensor.grad is not None}
        return Isolated(arrived, arriving)

    def isolated(self, batch: Batch, isolated: Isolated) -> tuple[Gradients, list[str]]:
        """Gradients of parameters, and of what enters modules, where every module is fed ``isolated.entering`` and is
        given ``isolated.arriving``; and which parameters have none.
        """
        fed_with: dict[str, Any] = {}
        given: list[tuple[Any, Any]] = []

        def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            place, value = _entering(arguments, named)
            if name not in isolated.entering or not _is_floating(value):
                return None
            array = in_shape(self.run.batch_first(name, isolated.entering[name]), value.shape)
            fed_with[name] = torch.tensor(array, dtype=value.dtype, requires_grad=True)
            return fed(arguments, named, place, fed_with[name])

        def after(name: str, module: Any, output: Any) -> Any:
            first = _first(output)
            if name not in isolated.arriving or not (_is_floating(first) and first.requires_grad):
                return None
            array = in_shape(self.run.batch_first(name, isolated.arriving[name]), first.shape)
            given.append((first, torch.tensor(array, dtype=first.dtype)))
            cut = first.detach()
            return type(output)((cut, *output[1:])) if type(output) in (tuple, list) else _with_first(output, cut)
        with self._learning():
            with self._hooks(before, after):
                loss = self.loss(batch)
            ends = [*given, *([(loss, torch.ones_like(loss))] if loss.requires_grad else [])]
            torch.autograd.backward([tensor for tensor, _ in ends], [seed for _, seed in ends])
            found, absent = self._gradients()
            inputs = {name: rows_of(batch, name, self.run.batch_first(name, tensor.grad.numpy().copy()))
                      for name, tensor in fed_with.items() if tensor.grad is not None}
        return found | inputs, absent

    def loss(self, batch: Batch) -> Any:
        """The model's own; of a bare encoder the contrastive loss of :meth:`TorchSide.contrastive_loss`."""
        outputs = self.side.call(tensors_of(batch.arrays))
        if batch.labels:
            if "loss" not in outputs:
                raise BadInput(f"the torch net returned no loss for the labels {', '.join(batch.labels)}; it returned "
                               f"{', '.join(outputs)}.")
            return outputs["loss"]
        hidden = outputs["last_hidden_state"]
        if hidden.dim() == 4:
            hidden = hidden.flatten(2).mT
        mask = np.ones(hidden.shape[:2]) if "pixel_values" in batch.arrays else batch.inputs.last_mask
        return contrastive(hidden, torch.from_numpy(mask.astype(np.float32)), TEMPERATURE)

    def modes(self, reordered: int) -> list[AbstractContextManager]:
        """In which the noise floor is measured: the model in float64, and ``reordered`` ways to reorder sums."""
        return [self._widened(), *map(ReorderedGradients, range(1, reordered + 1))]

    def _step(self, course: Course, number: int, settings: Settings) -> None:
        if number in settings.kept:
            course.gradients[number], absent = self._gradients()
            course.gradients[number] |= in_paddle(self.run, {name: statistic.numpy().copy() for name, statistic in
                                                             self._statistics.items()})
            course.absent = course.absent or absent
        held = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        course.norms[number] = norms_of([gradient.numpy() for gradient in held])
        clip(self._parameters, settings.clip)
        course.clipped[number] = float(np.linalg.norm(norms_of([gradient.numpy() for gradient in held])))
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter -= settings.lr * parameter.grad

    def _gradients(self) -> tuple[Gradients, list[str]]:
        found = in_paddle(self.run, {name: None if parameter.grad is None else parameter.grad.numpy().copy()
                                     for name, parameter in self._names.items()})
        return ({name: np.ascontiguousarray(array) for name, array in found.items() if array is not None},
                [name for name, array in found.items() if array is None])

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def _learning(self) -> Iterator[None]:
        asked = [parameter.requires_grad for parameter in self._parameters]
        buffers = [(buffer, buffer.clone()) for norm in self._norms.values() for buffer in norm.buffers()]
        try:
            for norm in self._norms.values():
                norm.training = True
            for parameter in self._parameters:
                parameter.grad = None
                parameter.requires_grad_(parameter.requires_grad or self._trained)
            yield
        finally:
            for norm in self._norms.values():
                norm.training = False
            for buffer, before in buffers:
                buffer.copy_(before)
            for parameter, before in zip(self._parameters, asked, strict=True):
                parameter.grad = None
                parameter.requires_grad_(before)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        held = [parameter.detach().clone() for parameter in self._parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(self._parameters, held, strict=True):
                    parameter.copy_(before)

    @contextmanager
    def _widened(self) -> Iterator[None]:
        """The model in double, parameters too, so that their gradients are; float32 again behind it."""
        widened = [*self._parameters, *self._statistics.values()]
        held = [tensor.data for tensor in widened]
        try:
            for tensor in widened:
                tensor.data = tensor.data.double()
            with Float64():
                yield
        finally:
            for tensor, before in zip(widened, held, strict=True):
                tensor.grad = None
                tensor.data = before

    @contextmanager
    def _hooks(self, before: Any, after: Any) -> Iterator[None]:
        with hooked(dict(self.model.named_modules()), "register_forward_hook", self.run.modules, before, after), (
                heard_by(self)):
            yield


class _Kinks(TorchFunctionMode):
    """Looks at what enters relus; exact zeros are no accident of rounding and do not count."""

    nearest = math.inf

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in RELU:
            x = args[0][args[0] != 0].abs()
            self.nearest = min(self.nearest, float(x.min() / x.square().mean().sqrt()) if len(x) else math.inf)
        return func(*args, **(kwargs or {}))


def clip(parameters: Sequence[Any], largest: float) -> None:
    """``clip_grad_norm_`` to the norm ``largest``, without the epsilon by which torch stays below it.

    torch multiplies by min(1, c / (n + 1e-6)), Paddle by c / max(n, c). Of a norm n of 1 that is 1e-6 of every
    gradient, more than all of rounding; it is a difference between two definitions and no error of either.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grad_norm_(parameters, largest * (1 + CLIP_EPSILON / norm) if norm > largest else norm + 1)


def _entering(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    place = entering(arguments, named, _is_floating)
    return place, None if place is None else (arguments or named)[place]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) or hasattr(output, "to_tuple") else output


def _with_first(output: Any, first: Any) -> Any:
    """``output`` with ``first`` in its first place; a tensor is ``first`` itself."""
    if not hasattr(output, "to_tuple"):
        return first
    output[next(iter(output))] = first
    return output


class ReorderedGradients(Reordered):
    """Reordered, in the backward pass too: what a gradient is a sum over is permuted as well.

    The gradient of a linear's weight is a sum over tokens, that of what enters it one over its outputs; a norm's and an
    embedding's are sums over tokens. So these are permuted on the way in and put back on the way out, which permutes
    them in the backward pass.

    torch adds up the gradients of biases and norms in a tree, Paddle one token after the other, as odd seeds do. A sum
    of n nearly equal terms one after the other errs the same way at each, so by n and not by sqrt(n): of a bias behind
    a mean pool, 4 times as far as torch's tree. Tokens in a random order would hide that, so odd seeds leave neighbours
    neighbours: see :meth:`_rows`. And the gradient of a relu jumps: see :meth:`_relu`.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = by_place(func, args, kwargs)
        if torch.is_grad_enabled():
            found = self._turned(func, args, kwargs)
            if found is not None:
                return found
        return super().__torch_function__(func, types, args, kwargs)

    def _turned(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in MATMUL and min(args[0].dim(), args[1].dim()) > 1:
            rows, columns = self._rows(args[0].shape[-2]), self._order(args[1].shape[-1])
            found = super().__torch_function__(func, (), (args[0][..., rows, :], args[1][..., columns]), kwargs)
            return found[..., torch.argsort(rows), :][..., torch.argsort(columns)]
        if func is F.embedding and args[0].dim():
            rows = self._rows(args[0].numel())
            found = func(args[0].reshape(-1)[rows], *args[1:], **kwargs)
            return found[torch.argsort(rows)].view(*args[0].shape, -1)
        if func in RELU and not kwargs.get("inplace", any(args[1:])):
            return self._relu(args[0])
        if func in MULTIPLIED and _is_scale(args):
            scale, x = args if args[0].dim() == 1 else args[::-1]
            rows = self._rows(x.shape[:-1].numel())
            found = self._spread(scale, len(rows)) * x.reshape(-1, x.shape[-1])[rows]
            return found[torch.argsort(rows)].view(x.shape)
        return None

    def _relu(self, x: Any) -> Any:
        """max(0, x), but on which side of the kink an element lies that is nearer to it than ``NEAR`` is drawn by lot:
        rounding decides that, of a step's weights not as of the next one's, and all of its gradient hangs on it.
        """
        values = x.detach()
        far = NEAR * float(values.square().mean().sqrt()) if x.numel() else 0.0
        shift = far * (2 * torch.rand(x.shape, generator=self.generator) - 1)
        return torch.where((values + shift > 0) & (values != 0), x, torch.zeros_like(x))

    def _rows(self, size: int) -> Any:
        """A permutation [size] of tokens; of odd seeds their own order, begun anywhere, forwards or backwards."""
        if not self.other_way:
            return self._order(size)
        order = torch.arange(size).roll(self._lot(max(1, size)))
        return order.flip(0) if self._lot(2) else order

    def _spread(self, parameter: Any, rows: int) -> Any:
        """A ``parameter`` [width] that meets ``rows`` rows; of odd seeds for each row, [rows, width]."""
        return _Shared.apply(parameter, rows) if self.other_way else parameter

    def _linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        rows, order, outputs = (self._rows(x.shape[:-1].numel()), self._order(x.shape[-1]),
                                self._order(weight.shape[0]))
        found = _PermutedLinear.apply(x.reshape(-1, x.shape[-1])[rows], weight, order, outputs)
        if bias is not None:
            found = found + self._spread(bias, len(found))
        return found[torch.argsort(rows)].view(*x.shape[:-1], -1)

    def _layer_norm(self, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                    *rest: Any) -> Any:
        if len(shape) > 1:
            return super()._layer_norm(x, shape, weight, bias, eps, *rest)
        rows = self._rows(x.shape[:-1].numel())
        by_itself = (None, None) if self.other_way else (weight, bias)
        found = super()._layer_norm(x.reshape(-1, x.shape[-1])[rows], shape, *by_itself, eps)
        if self.other_way:
            found = found if weight is None else found * self._spread(weight, len(rows))
            found = found if bias is None else found + self._spread(bias, len(rows))
        return found[torch.argsort(rows)].view(x.shape)

    def _added_matmul(self, func: Any, c: Any, *factors: Any, **named: Any) -> Any:
        if func not in (torch.addmm, torch.Tensor.addmm) or len(factors) != 2 or c.dim() != 1 or named:
            return super()._added_matmul(func, c, *factors, **named)
        return self._linear(factors[0], factors[1].mT, c)

    def _convolution(self, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                     groups: int = 1) -> Any:
        if groups > 1 or x.dim() < weight.dim():
            return super()._convolution(x, weight, bias, stride, padding, dilation, groups)
        rows, outputs = self._order(len(x)), self._order(len(weight))
        found = super()._convolution(x[rows], weight[outputs], None if bias is None else bias[outputs], stride, padding,
                                     dilation, groups)
        return found[torch.argsort(rows)][:, torch.argsort(outputs)]


class _PermutedLinear(torch.autograd.Function):
    """x [n, k] times weight [m, k], summed over k in ``order``; the gradient of x is summed over m in the order of
    ``outputs``. A large weight is permuted in chunks, so that no copy of it lies in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, order: Any, outputs: Any) -> Any:
        ctx.save_for_backward(x, weight, outputs)
        return in_chunks(x[:, order], weight, lambda rows, to: torch.index_select(rows, 1, order, out=to))

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, weight, outputs = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            entering = torch.zeros_like(x)
            for chunk in outputs.split(max(1, CHUNK // weight.shape[1])):
                entering += gradient[:, chunk] @ weight[chunk]
            return entering, gradient.T @ x, None, None


class _Shared(torch.autograd.Function):
    """A parameter [width] for each of n rows, whose gradients are added up one after the other: by numpy, which has one
    order on every machine, where a matmul has that of its CPU.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Any, rows: int) -> Any:
        return parameter.repeat(rows, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return torch.from_numpy(np.add.reduce(np.ascontiguousarray(gradient.numpy()), axis=0)), None


MULTIPLIED = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}


def _is_scale(args: tuple[Any, ...]) -> bool:
    """Whether a parameter [width] multiplies rows of that width."""
    if len(args) != 2 or not all(isinstance(one, torch.Tensor) for one in args):
        return False
    less, more = sorted(args, key=lambda one: one.dim())
    return isinstance(less, torch.nn.Parameter) and less.dim() == 1 < more.dim() and less.shape[0] == more.shape[-1]
