"""The torch side of recompute.py: several passes go back through the gates together, in float64 and reordered too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from convert.errors import BadInput

from ..lockstep import heard_by, in_step, listener_here
from ..oracle import Float64
from ..reference import Reference
from ..runs import Run
from ..side import in_shape
from ..trace import Step
from .batches import Batch, in_paddle
from .recompute import ALONE, ONCE, Arrays, Passage, Pools, in_trace, put_together, taken_apart
from .torch_side import ReorderedGradients, TorchGradients


class PagedTorchGradients:
    """One pass there and back, whose gates bring their weights in both ways."""

    def __init__(self, side: Reference, run: Run) -> None:
        self.side, self.run, self.model = side, run, side.model
        self.loss = TorchGradients(side, run, trained=False).loss
        modules = dict(self.model.named_modules())
        held = {f"{path}.{key}": parameter for path, module in modules.items()
                for key, parameter in module._parameters.items() if parameter is not None}
        inside = dict.fromkeys(path for path in (name.rpartition(".")[0] for name in held)
                               if not any(f"{path}.".startswith(f"{gate}.") for gate in side.gates))
        beside = [path for path in inside if any(modules[path].children())]
        if beside:
            raise BadInput(f"{beside[0] or 'the model'} holds parameters beside its modules, and these cannot be "
                           "paged for gradients. Use --paging off.")
        self.gates = [*side.gates, *inside]
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        self._names = {name: names for names in groups.values() for name in names}
        self._gate_of = {name: next(gate for gate in self.gates if name.startswith(f"{gate}.")) for name in held}
        self._paddle = dict(run.modules)

    def steps(self, batch: Batch, reordered: int, advance: Callable[[str], None] = lambda told: None,
              ) -> Iterator[Step]:
        """Two steps for each gate, from the last to the first, and one for the parameters that several gates share;
        ``advance`` is told what the passes go through.

        One is of the passes' own way; the other, of a recorded module, is fed what the plain pass was. Between them
        all passes halt once more, so that only one of the two is in memory. The plain pass goes last: what it gave need
        not be held while the others are pooled.
        """
        plain, pools = _Plain(self), Pools()
        pooled = [_Pooled(self, plain, pools, mode) for mode in (Float64(), *map(
            ReorderedGradients, range(1, reordered + 1)))]
        passes: list[Callable[[], None]] = [lambda one=one: self._pass(one, batch, one.mode) for one in pooled]
        passes.append(lambda: self._pass(plain, batch, nullcontext()))
        seen: set[str] = set()
        with self._recomputed(), in_step(passes, self.side.enter) as walks:
            while walks.gate is not None:
                advance(f"torch {walks.gate}{', backward' * (walks.gate in seen)}")
                seen.add(walks.gate)
                walks.advance()
                if plain.passage is not None:
                    self.side.leave()
                    yield self._step(plain.take(), pools)
        self.side.leave()
        for one in pooled:
            pools.add(one.shared_gradients().named)
        yield self._step(plain.shared_gradients(), pools)

    def isolated_again(self, batch: Batch, reordered: int, names: Collection[str],
                       advance: Callable[[str], None] = lambda told: None) -> Iterator[Step]:
        """A step for each of the modules ``names`` with the isolated gradients of its gate, of more runs: the plain
        pass goes there and back once, and the others only through these.
        """
        pools = Pools()
        plain = _Thorough(self, pools, [Float64(), *map(ReorderedGradients, range(1, reordered + 1))], names)
        with self._recomputed(), in_step([lambda: self._pass(plain, batch, nullcontext())], self.side.enter) as walks:
            while walks.gate is not None:
                advance(f"torch {walks.gate}, a second look")
                walks.advance()
                passage = plain.take() if plain.passage is not None else Passage()
                if passage.arriving.keys() & set(names):
                    self.side.leave()
                    yield self._step(passage, pools)
        self.side.leave()

    def is_shared(self, name: str, calls: Counter[str]) -> bool:
        """Whether the parameter ``name`` is used by more than one of the ``calls`` of gates."""
        gates = {self._gate_of[one] for one in self._names[name] if one in self._gate_of}
        return sum(calls[gate] for gate in gates) > 1

    def in_paddle(self, found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """By Paddle's names what is taken out of ``found``, and which have no gradient."""
        named: dict[str, Any] = {}
        while found:
            name, gradient = found.popitem()
            named |= dict.fromkeys(self._names[name], None if gradient is None else gradient.numpy())
        named = in_paddle(self.run, named)
        return ({name: array for name, array in named.items() if array is not None},
                [name for name, array in named.items() if array is None])

    def leaves(self, gate: str) -> dict[str, tuple[dict[str, Any], str]]:
        """By name of each parameter of ``gate`` the table and the key that it is at."""
        return {name: (self.model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2])
                for name, home in self._gate_of.items() if home == gate}

    def name_of(self, gate: str) -> str | None:
        return self._paddle.get(gate)

    def _step(self, passage: Passage, pools: Pools) -> Step:
        arrays = passage.named
        for name in arrays:
            arrays[name] = np.ascontiguousarray(arrays[name])
        floors = pools.take(arrays)
        return Step({**in_trace(arrays), "entering": passage.entering, "arriving": passage.arriving},
                    {kind: {name: floor for name, floor in floors.items() if name.endswith(ending)}
                     for kind, ending in (("isolated", ALONE), ("propagated", ONCE))},
                    {"absent": [f"{name}{ONCE}" for name in passage.absent]})

    def _pass(self, listener: Any, batch: Batch, mode: Any) -> None:
        with mode, heard_by(listener), torch.enable_grad():
            self.loss(batch).backward()

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for gate in self.gates:
                module = self.model.get_submodule(gate)
                right = module.forward
                module.forward = lambda *arguments, gate=gate, right=right, **named: self._apply(
                    gate, right, arguments, named)
                stack.callback(vars(module).pop, "forward")
                if gate not in self.side.gates:
                    stack.callback(module.register_forward_pre_hook(
                        lambda *_, gate=gate: self.side.come_to(gate)).remove)
            yield

    def _apply(self, gate: str, right: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if listener_here() is None:
            return right(*arguments, **named)
        listener_here().calls[gate] += 1
        tensors, form = taken_apart((arguments, named), _is_tensor)
        call = _Call(self, gate, right, form)
        anchor = torch.zeros((), requires_grad=True)
        given = _Recomputed.apply(call, anchor, *tensors)
        return put_together(call.output_form, given)


class _Call:
    """One call of a gate, to be repeated."""

    def __init__(self, gradients: PagedTorchGradients, gate: str, right: Any, form: Any) -> None:
        self.gradients, self.gate, self._right, self._form = gradients, gate, right, form
        self.output_form: Any = None

    def run(self, tensors: Sequence[Any]) -> list[Any]:
        arguments, named = put_together(self._form, tensors)
        found, self.output_form = taken_apart(self._right(*arguments, **named), _is_tensor)
        return found

    def back(self, tensors: Sequence[Any], seeds: Sequence[Any]) -> list[Any]:
        listener = listener_here()
        self.gradients.side.come_to(self.gate)
        entering = listener.own_way(self, tensors, seeds)
        if self.gradients.name_of(self.gate) is not None:
            self.gradients.side.come_to(self.gate)
            listener.alone(self, tensors, seeds)
        return entering

    def repeat(self, tensors: Sequence[Any], seeds: Sequence[Any], widened: bool) -> tuple[dict[str, Any], list[Any]]:
        """Gradients of the gate's parameters, by name, and of ``tensors``."""
        places = self.gradients.leaves(self.gate)
        held = {name: table[key] for name, (table, key) in places.items()}
        made = {id(value): torch.nn.Parameter(value.detach().double() if widened else value.detach())
                for value in held.values()}
        entering = [one.detach().requires_grad_(one.is_floating_point()) for one in tensors]
        try:
            for name, (table, key) in places.items():
                table[key] = made[id(held[name])]
            with torch.enable_grad():
                ends = [(one, seed) for one, seed in zip(self.run(entering), seeds, strict=True) if one.requires_grad]
                torch.autograd.backward([one for one, _ in ends], [seed.to(one.dtype) for one, seed in ends])
            return {name: made[id(held[name])].grad for name in places}, [one.grad for one in entering]
        finally:
            for name, (table, key) in places.items():
                table[key] = held[name]

    def main(self, tensors: Sequence[Any]) -> int | None:
        """Which of the tensors is what the module is fed: the first floating one among its arguments."""
        return next((place for place, one in enumerate(tensors) if one.is_floating_point()), None)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Any, *tensors: Any) -> Any:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            given = [one.clone() if any(one is other for other in tensors) else one for one in call.run(tensors)]
        ctx.mark_non_differentiable(*[one for one in given if not one.is_floating_point()])
        return tuple(given)

    @staticmethod
    def backward(ctx: Any, *seeds: Any) -> Any:
        return None, None, *ctx.call.back(ctx.saved_tensors, seeds)


class _Listening:
    def __init__(self, gradients: PagedTorchGradients) -> None:
        self.gradients = gradients
        self.calls: Counter[str] = Counter()
        self._shared: dict[str, Any] = {}

    def shared_gradients(self) -> Passage:
        own, absent = self.gradients.in_paddle(self._shared)
        return Passage(own=own, absent=absent)

    def told(self, found: dict[str, Any]) -> dict[str, Any]:
        """``found`` without what other gates share, which is added up."""
        for name in [name for name in found if self.gradients.is_shared(name, self.calls)]:
            first, gradient = self.gradients._names[name][0], found.pop(name)
            before = self._shared.get(first)
            self._shared[first] = gradient if before is None else before if gradient is None else before + gradient
        return found

    def by_itself(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any], widened: bool) -> Arrays:
        """By Paddle's names the gradients of what no other gate shares, and of what enters the gate."""
        found, entering = call.repeat(tensors, seeds, widened)
        inputs = self.inputs(call, entering, tensors)
        return self.gradients.in_paddle({name: found.pop(name) for name in list(found) if not self.gradients.is_shared(
            name, self.calls)})[0] | inputs

    def inputs(self, call: _Call, gradients: Sequence[Any], tensors: Sequence[Any]) -> dict[str, Any]:
        main, name = call.main(tensors), self.gradients.name_of(call.gate)
        if main is None or name is None or gradients[main] is None:
            return {}
        return {name: self.gradients.run.batch_first(name, gradients[main].numpy()).copy()}


class _Plain(_Listening):
    """The pass that is compared; its own way is that of a gate by itself."""

    passage: Passage | None = None
    arriving: Any = None
    entering: Any = None

    def take(self) -> Passage:
        """What has been told since the last time."""
        passage, self.passage = self.passage, None
        return passage

    def own_way(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any]) -> list[Any]:
        found, entering = call.repeat(tensors, seeds, widened=False)
        own, absent = self.gradients.in_paddle(self.told(found))
        self.passage = Passage(own, absent=absent)
        name, main = self.gradients.name_of(call.gate), call.main(tensors)
        if name is not None:
            first = self.gradients.run.batch_first
            self.arriving = first(name, seeds[0].numpy()).copy()
            self.entering = None if main is None else first(name, tensors[main].numpy()).copy()
        return entering

    def alone(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any]) -> None:
        name = self.gradients.name_of(call.gate)
        entering = {} if self.entering is None else {name: self.entering}
        self.passage = Passage(alone=self.by_itself(call, tensors, seeds, widened=False), entering=entering,
                               arriving={name: self.arriving})


class _Thorough(_Plain):
    """A plain pass in which those of the noise floor are made on the spot, fed what it was, at the gates ``names``."""

    def __init__(self, gradients: PagedTorchGradients, pools: Pools, modes: Sequence[Any], names: Collection[str],
                 ) -> None:
        super().__init__(gradients)
        self._others, self._names = [_Pooled(gradients, self, pools, mode) for mode in modes], names
        for one in self._others:
            one.calls = self.calls

    def alone(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any]) -> None:
        if self.gradients.name_of(call.gate) in self._names:
            for one in self._others:
                one.alone(call, tensors, seeds)
        super().alone(call, tensors, seeds)


class _Pooled(_Listening):
    """A pass of the noise floor, which goes through each gate twice: its own way, and fed what the plain one was."""

    def __init__(self, gradients: PagedTorchGradients, plain: _Plain, pools: Pools, mode: Any) -> None:
        super().__init__(gradients)
        self.plain, self.pools, self.mode = plain, pools, mode
        self._widened = isinstance(mode, Float64)

    def own_way(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any]) -> list[Any]:
        with self._in_mode():
            found, entering = call.repeat(tensors, seeds, self._widened)
            own = self.gradients.in_paddle(self.told(found))[0]
        self.pools.add(Passage(own).named)
        return entering

    def alone(self, call: _Call, tensors: Sequence[Any], seeds: Sequence[Any]) -> None:
        name, main = self.gradients.name_of(call.gate), call.main(tensors)
        tensors, seeds = list(tensors), list(seeds)
        if main is not None:
            tensors[main] = self._as(self.plain.entering, name, tensors[main])
        seeds[0] = self._as(self.plain.arriving, name, seeds[0])
        with self._in_mode():
            alone = self.by_itself(call, tensors, seeds, self._widened)
        self.pools.add(Passage(alone=alone).named)

    def _in_mode(self) -> Any:
        return nullcontext() if torch.overrides._get_current_function_mode() is self.mode else self.mode

    def _as(self, array: Any, name: str, like: Any) -> Any:
        return torch.tensor(in_shape(self.gradients.run.batch_first(name, array), like.shape),
                            dtype=torch.float64 if self._widened else torch.float32)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
