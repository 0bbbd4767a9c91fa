"""The Paddle side of recompute.py: one pass, whose gates go back their own way and fed what torch's were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import paddle

from ..lockstep import heard_by, in_step, listener_here
from ..paddle_net import PaddleNet
from ..side import in_shape
from ..trace import Step
from .batches import Batch, Gradients, names_of_parameter
from .paddle_side import PaddleGradients
from .recompute import ALONE, ONCE, WHOLE, in_trace, put_together, taken_apart


class PagedPaddleGradients:
    """One pass there and back, whose gates bring their weights in both ways."""

    def __init__(self, side: PaddleNet) -> None:
        self.side, self.run, self.model = side, side.run, side.model
        self._layers = dict(self.model.named_sublayers())
        owners: dict[int, list[str]] = {}
        self._places: dict[str, list[tuple[dict[str, Any], str, str]]] = {}
        self._outside: list[str] = []
        for path, layer in self._layers.items():
            gate = next((gate for gate in side.gates if f"{path}.".startswith(f"{gate}.")), None)
            for key, tensor in layer._parameters.items():
                if tensor is None or not (getattr(tensor, "trainable", True)) or key in ("_mean", "_variance"):
                    continue
                if gate is None and path not in self._outside:
                    self._outside.append(path)
                owners.setdefault(id(tensor), []).append(f"{path}.{key}")
                self._places.setdefault(gate or path, []).append((layer._parameters, key, f"{path}.{key}"))
        self._gate_of = {name: gate for gate, places in self._places.items() for _, _, name in places}
        self._names = {name: names for names in owners.values() for name in names}
        self.gates = [*side.gates, *self._outside]
        self._modules = {name for _, name in self.run.modules}

    def answers(self, batch: Batch, steps: Iterable[Step]) -> Iterator[Step]:
        """For each of the reference's steps the gradients of the same names, and what is left in the end."""
        yield from self._answers(batch, steps, _Listener(self))

    def isolated(self, batch: Batch, steps: Iterable[Step]) -> Iterator[Step]:
        """The same of steps that ask for isolated gradients alone; no others are held."""
        yield from self._answers(batch, steps, _Isolated(self))

    def _answers(self, batch: Batch, steps: Iterable[Step], listener: _Listener) -> Iterator[Step]:
        with self._recomputed(), in_step([lambda: self._pass(listener, batch)], self.side.enter) as walks:
            for step in steps:
                asked = step.view("arriving").keys() & self._modules
                wanted = {name for name in step.view(WHOLE) if name.endswith(ONCE) and not self._is_alias(name)}
                while walks.gate is not None and not (wanted <= listener.found.keys() | listener.absent
                                                      and asked <= listener.passed.keys()):
                    walks.advance()
                for name in asked & listener.passed.keys():
                    self.side.enter(name)
                    listener.alone(name, step)
                self.side.leave()
                if walks.gate is None:
                    listener.tell_shared()
                taken = in_trace({name: listener.found.pop(name) for name in step.view(WHOLE) if name in listener.found
                                  and not self._is_alias(name)})
                yield Step(taken, told={"absent": sorted(listener.absent), "shared": self._aliases})
            while walks.gate is not None:
                walks.advance()
            self.side.leave()
        listener.tell_shared()
        yield Step(in_trace(listener.found))

    def is_shared(self, name: str, calls: Counter[str]) -> bool:
        """Whether more than one of the ``calls`` of gates uses the parameter ``name``."""
        return sum(calls[gate] for gate in {self._gate_of[other] for other in self._names[name]}) > 1

    def named(self, name: str, shape: Sequence[int]) -> list[str]:
        return names_of_parameter(self.run, self._names[name], shape)

    @property
    def _aliases(self) -> dict[str, str]:
        shapes = {move.target: tuple(move.shape) for move in self.run.plan.moves}
        found = {}
        for name, names in self._names.items():
            chosen = next((self.named(one, shapes[one]) for one in names if one in shapes), [name])
            if name not in chosen:
                found[name] = chosen[0]
        return found

    def _is_alias(self, name: str) -> bool:
        return name.partition(" ")[0] in self._aliases

    def places(self, gate: str) -> list[tuple[dict[str, Any], str, str]]:
        """Table, key and name of each parameter of ``gate``."""
        return self._places.get(gate, [])

    def is_module(self, name: str) -> bool:
        return name in self._modules

    def _pass(self, listener: Any, batch: Batch) -> None:
        with heard_by(listener):
            PaddleGradients.loss(self, batch).backward()

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for gate in self.gates:
                layer = self._layers[gate]
                right = layer.forward
                object.__setattr__(layer, "forward", lambda *arguments, gate=gate, right=right, **named: self._apply(
                    gate, right, arguments, named))
                stack.callback(vars(layer).pop, "forward")
                if gate in self._outside:
                    stack.callback(layer.register_forward_pre_hook(
                        lambda *_, gate=gate: self.side.come_to(gate)).remove)
            yield

    def _apply(self, gate: str, right: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if listener_here() is None:
            return right(*arguments, **named)
        listener_here().calls[gate] += 1
        tensors, form = taken_apart((arguments, named), _is_tensor)
        call = _Call(self, gate, right, form)
        anchor = paddle.zeros([1])
        anchor.stop_gradient = False
        given = _Recomputed.apply(call, anchor, *tensors)
        return put_together(call.output_form, given if isinstance(given, (tuple, list)) else [given])


class _Call:
    """One call of a gate, to be repeated."""

    def __init__(self, gradients: PagedPaddleGradients, gate: str, right: Any, form: Any) -> None:
        self.gradients, self.gate, self._right, self._form = gradients, gate, right, form
        self.output_form: Any = None

    def run(self, tensors: Sequence[Any]) -> list[Any]:
        arguments, named = put_together(self._form, tensors)
        found, self.output_form = taken_apart(self._right(*arguments, **named), _is_tensor)
        return found

    def repeat(self, tensors: Sequence[Any], seeds: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
        """Gradients of the gate's parameters, by name, and of ``tensors``."""
        places = self.gradients.places(self.gate)
        asked = [(table[key], table[key].stop_gradient) for table, key, _ in places]
        entering = []
        for one in tensors:
            entering.append(one.detach())
            entering[-1].stop_gradient = not one.is_floating_point()
        try:
            for table, key, _ in places:
                table[key].stop_gradient = False
            with paddle.enable_grad():
                ends = [(one, seed) for one, seed in zip(self.run(entering), seeds, strict=True)
                        if not one.stop_gradient and seed is not None]
                paddle.autograd.backward([one for one, _ in ends], [seed for _, seed in ends])
            return {name: _taken(table[key]) for table, key, name in places}, [one.grad for one in entering]
        finally:
            for tensor, stopped in asked:
                tensor.clear_gradient(False)
                tensor.stop_gradient = stopped

    def main(self, tensors: Sequence[Any]) -> int | None:
        return next((place for place, one in enumerate(tensors) if one.is_floating_point()), None)


class _Recomputed(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Any, *tensors: Any) -> Any:
        ctx.call, ctx.tensors = call, tensors
        with paddle.no_grad():
            given = call.run(tensors)
        return tuple(one.clone() if any(one is other for other in tensors) else one for one in given)

    @staticmethod
    def backward(ctx: Any, *seeds: Any) -> Any:
        call, tensors = ctx.call, ctx.tensors
        call.gradients.side.come_to(call.gate)
        found = listener_here().own_way(call, tensors, seeds)
        return (None, *(None if one.stop_gradient else gradient for one, gradient in zip(tensors, found, strict=True)))


class _Listener:
    def __init__(self, gradients: PagedPaddleGradients) -> None:
        self.gradients = gradients
        self.passed: dict[str, list[tuple[_Call, Sequence[Any], Sequence[Any]]]] = {}
        """By module what its calls were given and gave, until it is fed what torch's was: of two modules that do not
        depend on each other either may come first, and here another one than in torch.
        """
        self.found: Gradients = {}
        self.absent: set[str] = set()
        self.calls: Counter[str] = Counter()
        self._shared: dict[str, Any] = {}

    def own_way(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any]) -> list[Any]:
        found, entering = call.repeat(tensors, seeds)
        for name, gradient in found.items():
            if self.gradients.is_shared(name, self.calls):
                first = self.gradients._names[name][0]
                before = self._shared.get(first)
                self._shared[first] = gradient if before is None else before if gradient is None else before + gradient
            else:
                self._tell(name, gradient, ONCE)
        if self.gradients.is_module(call.gate):
            self.passed.setdefault(call.gate, []).append((call, tensors, seeds))
        return entering

    def alone(self, name: str, step: Step) -> None:
        """The way back through the module ``name``, whose weights are in, fed what is ``entering`` and ``arriving``."""
        run, (call, tensors, seeds) = self.gradients.run, self.passed[name].pop(0)
        if not self.passed[name]:
            del self.passed[name]
        tensors, seeds = list(tensors), list(seeds)
        main = call.main(tensors)
        if main is not None and name in step.view("entering"):
            tensors[main] = _as(run, name, step.view("entering")[name], tensors[main])
        seeds[0] = _as(run, name, step.view("arriving")[name], seeds[0])
        found, again = call.repeat(tensors, seeds)
        for parameter, gradient in found.items():
            if not self.gradients.is_shared(parameter, self.calls):
                self._tell(parameter, gradient, ALONE)
        if main is not None and again[main] is not None:
            self.found[f"{name}{ALONE}"] = run.batch_first(name, again[main].numpy())

    def tell_shared(self) -> None:
        """The sums over gates, once the pass has ended."""
        for name, gradient in self._shared.items():
            self._tell(name, gradient, ONCE)
        self._shared = {}

    def _tell(self, name: str, gradient: np.ndarray | None, suffix: str) -> None:
        if gradient is None:
            self.absent.add(f"{name}{suffix}")
            return
        for one in self.gradients.named(name, gradient.shape):
            self.found[f"{one}{suffix}"] = gradient


class _Isolated(_Listener):
    """Forgets what gates give on their own way."""

    def _tell(self, name: str, gradient: np.ndarray | None, suffix: str) -> None:
        if suffix == ALONE:
            super()._tell(name, gradient, suffix)


def _as(run: Any, name: str, array: np.ndarray, like: Any) -> Any:
    return paddle.to_tensor(np.ascontiguousarray(in_shape(run.batch_first(name, array), like.shape)))


def _taken(parameter: Any) -> np.ndarray | None:
    """The gradient, which is then not held twice."""
    found = None if parameter.grad is None else parameter.grad.numpy()
    parameter.clear_gradient(False)
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, paddle.Tensor)
