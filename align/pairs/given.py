"""Two modules that somebody has in memory, a torch module and a Paddle layer, as the two sides of ``align.forward``.

No conversion and no checkpoint stands behind them. What a run says of its family, an :class:`Outline` says of them:
which modules are recorded, what is inside of them, what they are fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.errors import BadInput
from convert.rules import Family
from convert.traits import Traits

from ..candidate import Inside, Isolated, Known, Own, SmallRow, blamed
from ..inputs import Inputs, Rows
from ..inside import Places
from ..lockstep import heard_by
from ..noise import ENOUGH
from ..paddle_net import PaddleNet, PaddleNLPNet
from ..reference import Measured, Plain, Pools, SmallPlain
from ..side import Side, hooked
from ..tolerance import REORDERED_RUNS
from ..torch_side import is_rms_norm
from ..trace import RECORDED, Step
from .pairing import Pairing

Arrays = dict[str, np.ndarray]
OUTPUT = "output"


@dataclass(frozen=True)
class WholeRows(Rows):
    """Rows of arrays whose axes are not known: their last axis holds channels, of pictures the second.

    Where there is an attention mask, padding is left out as anywhere else.
    """

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        found = super().__call__(name, array)
        if found.ndim == 4:
            found = np.moveaxis(found, 1, -1)
        return np.array(found.reshape(-1, found.shape[-1]) if found.ndim > 2 else found, order="C")

    def of_whole(self, array: np.ndarray) -> np.ndarray:
        """The real ones of an array of whole numbers; its first axes are the mask's, if any are."""
        fitting = next((mask for mask in self.masks if mask.shape == array.shape[:2]), None)
        return array if fitting is None else array[fitting]

    @property
    def first(self) -> Rows:
        """No axis is known to be one that could be cut."""
        return self

    def first_of(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclass(frozen=True)
class GivenInputs(Inputs):
    """What somebody feeds to both of their models: arrays by name, or by their place as ``0``, ``1``, …"""

    @property
    def rows(self) -> Rows:
        masks = [array.astype(bool) for name, array in self.arrays.items() if name.endswith("attention_mask")
                 and array.ndim == 2 and np.isin(array, (0, 1)).all() and array.any()]
        return WholeRows(tuple(masks), 0)

    @property
    def first(self) -> Inputs:
        return self

    @property
    def told(self) -> list[str]:
        shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in self.arrays.items())
        padding = "; padded positions are not compared" if self.rows.masks else ""
        return [f"Inputs, given to both: {shapes}{padding}."]


@dataclass
class Outline:
    """What the stages ask of a run, of two given models. Paths are (torch, Paddle); names Paddle's."""

    pairing: Pairing
    modules: list[tuple[str, str]] = field(default_factory=list)
    inside: dict[str, tuple[tuple[str, str, str], ...]] = field(default_factory=dict)
    probed: set[str] = field(default_factory=set)
    shapes: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    plan: Any = field(default_factory=lambda: SimpleNamespace(moves=()))
    config: Mapping[str, Any] = field(default_factory=dict)
    target_config: Mapping[str, Any] = field(default_factory=dict)
    intended_config: Mapping[str, Any] = field(default_factory=dict)
    wiring: Mapping[str, Any] = field(default_factory=dict)
    tied: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def family(self) -> Family:
        """No family: what torch's own activations compute is all that is known."""
        gelus = {module.approximate for module in self.pairing.torch.modules.values()
                 if type(module).__name__ == "GELU" and hasattr(module, "approximate")}
        known = {"GELU": {"none": "gelu", "tanh": "gelu_new"}[next(iter(gelus))]} if len(gelus) == 1 else {}
        return Family("given", "", lambda config: {}, lambda config: {}, (), (), traits=Traits(activations=known))

    @property
    def before(self) -> dict[str, str]:
        """What arrives at a module that is fed by somebody's ``forward`` is judged like anything in a block."""
        return {name: f"{name}: the operation before it" for _, name in self.modules}

    @property
    def paddle_names(self) -> dict[str, str]:
        return {weight.torch: weight.paddle for weight in self.pairing.weights if weight.rows == slice(None)}

    def paddle_path(self, path: str) -> str:
        return self.pairing.modules.get(path) or self.paddle_names.get(path, path)

    def batch_first(self, name: str, array: np.ndarray) -> np.ndarray:
        return array

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> Inputs:
        return GivenInputs(arrays)

    def look_into(self, torch: Mapping[str, Call], paddle: Mapping[str, Call]) -> None:
        """Choose the modules to record, of those that both sides call and that give a floating tensor on both."""
        both = {path: self.pairing.modules[path] for path, call in torch.items()
                if call.gives is not None and (found := paddle.get(self.pairing.modules.get(path, "")))
                and found.gives is not None}
        chosen = [path for path in _outermost(self.pairing.torch.modules, both)]
        self.modules = sorted(((path, both[path]) for path in chosen), key=lambda pair: [*torch].index(pair[0]))
        leaves = [path for path in both if not any(other.startswith(f"{path}.") for other in both)]
        for path, name in self.modules:
            inside = [leaf for leaf in leaves if leaf.startswith(f"{path}.") and both[leaf].startswith(f"{name}.")]
            if inside:
                self.inside[name] = tuple(
                    (leaf.removeprefix(f"{path}."), both[leaf].removeprefix(f"{name}."), "operations")
                    for leaf in inside)
        self.shapes = [{both[path]: torch[path].gives for path in both},
                       {name: paddle[name].gives for name in both.values()}]
        self.probed = {path for path, name in both.items() if torch[path].alone and paddle[name].alone}


def _outermost(modules: Mapping[str, Any], both: Mapping[str, str]) -> Iterator[str]:
    """The blocks: the outermost modules that are no mere stacks of others; what is in a stack counts as outermost."""
    def visit(path: str) -> Iterator[str]:
        for word, child in modules[path].named_children():
            below = f"{path}.{word}".lstrip(".")
            if below in both and not _is_stack(child):
                yield below
            else:
                yield from visit(below)
    yield from visit("")


def _is_stack(module: Any) -> bool:
    """Whether a module is a list of others, or holds a list of modules that are none of torch's own."""
    import torch
    lists = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
    return isinstance(module, lists) or any(
        isinstance(child, lists) and any(any(some.children()) for some in child.children())
        for child in module.children())


@dataclass(frozen=True)
class Call:
    """How a module was called first: ``alone`` with one argument, and the shape of the floating tensor that it
    ``gives``, None where that is none.
    """

    alone: bool
    gives: tuple[int, ...] | None


def calls_of(side: Side, after_name: str, layers: Mapping[str, Any], inputs: Inputs,
             is_floating: Callable[[Any], bool]) -> dict[str, Call]:
    """The modules that one pass calls, by their paths, in the order in which they are called first."""
    arguments: dict[str, bool] = {}
    found: dict[str, Call] = {}

    def entered(name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        arguments.setdefault(name, len(given) == 1 and not named and is_floating(given[0]))

    def left(name: str, layer: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        found[name] = Call(arguments[name], tuple(map(int, first.shape)) if is_floating(first) else None)
    with hooked(layers, after_name, ((path, path) for path in layers if path), entered, left), heard_by(_Nobody()):
        try:
            side.outputs(inputs.arrays)
        except BadInput as error:
            raise Stumbled(str(error), {name: found[name] for name in arguments if name in found}) from error
    return {name: found[name] for name in arguments if name in found}


class Stumbled(BadInput):
    """A pass that failed, with the calls that went well until then."""

    def __init__(self, told: str, calls: dict[str, Call]) -> None:
        super().__init__(told)
        self.calls = calls


class _Nobody:
    def answered(self, name: str, array: np.ndarray) -> None: ...


@dataclass
class Outputs:
    """What a model returned, by name: ``arrays`` of floating numbers, of complex ones as (real, imaginary) on an axis
    more; ``whole`` numbers and truth values; ``others``, in which there is nothing to compare. ``named``: by itself.
    """

    arrays: Arrays
    whole: Arrays
    others: list[str]
    named: bool


def flattened(result: Any, is_tensor: Callable[[Any], bool], read: Callable[[Any], np.ndarray]) -> Outputs:
    """A tensor or number is ``output``, members of a sequence ``output[0]``, …; a mapping's or a dataclass's have its
    keys.
    """
    found: Arrays = {}
    others: list[str] = []

    def add(name: str, value: Any) -> None:
        value = _opened(value)
        if is_tensor(value):
            found[name or OUTPUT] = read(value)
        elif hasattr(value, "items"):
            for key, one in value.items():
                add(f"{name}.{key}" if name else str(key), one)
        elif isinstance(value, (tuple, list)):
            for number, one in enumerate(value):
                add(f"{name or OUTPUT}[{number}]", one)
        elif isinstance(value, (bool, int, float)):
            found[name or OUTPUT] = np.asarray(value, np.float32 if isinstance(value, float) else None)
        elif value is not None:
            others.append(f"{name or OUTPUT} ({type(value).__name__})")
    add("", result)
    parts = {name: np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array
             for name, array in found.items()}
    return Outputs({name: array for name, array in parts.items() if array.dtype.kind == "f"},
                   {name: array for name, array in parts.items() if array.dtype.kind != "f"}, others,
                   hasattr(_opened(result), "items"))


def _opened(value: Any) -> Any:
    """A dataclass as what it holds, by name."""
    return vars(value) if hasattr(value, "__dataclass_fields__") and not hasattr(value, "items") else value


class GivenModule(Measured):
    """Somebody's torch module, on the CPU and in eval mode."""

    def __init__(self, run: Outline, module: Any, positional: bool) -> None:
        import torch
        self.run, self.model, self.version, self.positional = run, module, torch.__version__, positional
        self.told: Outputs | None = None
        self.repeated: list[Arrays] = []
        """The whole numbers that each pass of the noise floor gave."""

    def returned(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        import torch
        given = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        with torch.no_grad(), blamed(f"the torch module {type(self.model).__name__}"):
            result = self.model(*given.values()) if self.positional else self.model(**given)
            self.told = flattened(result, lambda value: isinstance(value, torch.Tensor),
                                  lambda value: value.detach().resolve_conj().resolve_neg().numpy())
        return self.told.arrays

    def calls(self, inputs: Inputs) -> dict[str, Call]:
        return calls_of(self, "register_forward_hook", dict(self.model.named_modules()), inputs, _is_floating("torch"))

    def steps(self, inputs: Inputs, reordered: int = REORDERED_RUNS) -> Iterator[Step]:
        """All that :meth:`Measured.steps` gives, in one step and by a pass for each way of being fed: of a model that
        nobody knows it is not said that copies of its rows could lie one below the other, nor that a pass could halt.
        """
        from ..oracle import Float64, Reordered
        places = Places.of(self.run)
        plain = Plain(inputs, places)
        pools = Pools(inputs, places, plain)
        with self._hooks(places.all), self._heads_heard():
            self._listen(plain, inputs.arrays)
            self._listen(SmallPlain(inputs, places, plain), inputs.arrays)
            for mode in (Float64(), *map(Reordered, range(1, reordered + 1))):
                known = Known()
                known.learn(plain.step)
                for kind in (_OwnHeads, _IsolatedHeads, SmallRow, Inside):
                    listener = kind(inputs, places, known)
                    with mode:
                        self._listen(listener, inputs.arrays)
                    self.repeated += [self.told.whole] * (kind is _OwnHeads)
                    _add(pools, listener.take())
        step = plain.take()
        _forget_broken(step, pools)
        step.told = {"present": self.present, "described": self.described(), "inputs_digest": inputs.digest,
                     "notes": list(inputs.notes)}
        step.views["inputs"] = dict(inputs.arrays)
        step.floors = pools.take(step)
        yield step

    @cached_property
    def _heads(self) -> set[str]:
        """Linears that give few channels."""
        import torch
        return {path for path, module in self.model.named_modules()
                if path and isinstance(module, torch.nn.Linear) and module.out_features < ENOUGH}

    def _is_probed(self, module: Any) -> bool:
        import torch
        norms = (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm)
        known = {id(self.run.pairing.torch.modules[path]) for path in self.run.probed}
        return id(module) in known and (isinstance(module, norms) or is_rms_norm(module))


class _OwnHeads(Own):
    def projected(self, name: str, array: np.ndarray, linear: Any) -> None:
        self.put("propagated into", name, array)


class _IsolatedHeads(Isolated):
    def projected(self, name: str, array: np.ndarray, linear: Any) -> None:
        self.put("isolated into", name, array)


def _add(pools: Pools, views: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for view, arrays in views.items():
        for name, rows in arrays.items():
            if view.endswith(" into"):
                pools.add_entering(view.removesuffix(" into"), name, rows)
            else:
                pools.add("propagated" if view == RECORDED else view, name, rows)


def _forget_broken(step: Step, pools: Pools) -> None:
    """Where torch itself gives no numbers for a small input, as a logarithm does, there is nothing to compare."""
    for name in [name for name, rows in step.view("small").items() if not np.isfinite(rows).all()]:
        del step.view("small")[name]
        step.view("small input").pop(name, None)
        pools.drop("small", name)


class GivenLayer(PaddleNet):
    """Somebody's Paddle layer, in eval mode."""

    reentrant = False
    token_loss = PaddleNLPNet.token_loss

    def __init__(self, run: Outline, layer: Any, positional: bool, like: GivenModule) -> None:
        import paddle
        self.run, self.model, self.version = run, layer, paddle.__version__
        self.positional, self.like = positional, like
        self._hashes, self.gates = {}, []
        self.told: Outputs | None = None

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """By torch's names, in its order, where not both sides name what they return."""
        import paddle
        given = {name: paddle.to_tensor(array) for name, array in arrays.items()}
        with paddle.no_grad(), blamed(f"the Paddle layer {type(self.model).__name__}"):
            result = self.model(*given.values()) if self.positional else self.model(**given)
            self.told = flattened(result, lambda value: isinstance(value, paddle.Tensor), lambda value: value.numpy())
        told, torch = self.told, self.like.told
        if torch is not None and not (told.named and torch.named):
            told.arrays, told.whole = _called_as(told.arrays, torch.arrays), _called_as(told.whole, torch.whole)
        return told.arrays

    def calls(self, inputs: Inputs) -> dict[str, Call]:
        return calls_of(self, "register_forward_post_hook", self._layers(), inputs, _is_floating("paddle"))

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        net = self.run.pairing.paddle
        return ((name, net.array(name)) for name in net.tensors)

    def _shown(self, names: Sequence[str]) -> Sequence[str]:
        return names

    def _build(self) -> Any:
        return self.model

    def _build_empty(self) -> Any:
        raise AssertionError("a layer that is given is in memory")


def _called_as(arrays: Arrays, others: Arrays) -> Arrays:
    """By the names of ``others``, in their order, where there are as many."""
    return dict(zip(others, arrays.values(), strict=True)) if len(arrays) == len(others) else arrays


def _is_floating(framework: str) -> Callable[[Any], bool]:
    import paddle
    import torch
    kind = {"torch": torch.Tensor, "paddle": paddle.Tensor}[framework]
    return lambda value: isinstance(value, kind) and value.is_floating_point()
