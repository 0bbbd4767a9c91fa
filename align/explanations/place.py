"""The part of the reference that one recorded name stands for, ready to be run again with something changed in it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from convert.traits import Traits, Wiring

from ..inputs import Inputs
from ..inside import sublayers_of
from ..noise import NoiseFloor, Pool
from ..oracle import Float64, Reordered
from ..parts import Parts, by_module, index_of, part_of_output, whole
from ..reference import Reference
from ..tolerance import REORDERED_RUNS
from ..torch_side import is_rms_norm
from . import surgery
from .surgery import Change, first_of

ARRIVING = "arriving at "
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """The module that was waited for has answered."""


@dataclass(frozen=True)
class Layer:
    """A linear or a norm of torch's, or the part of a fused linear that Paddle has as a layer of its own.

    ``path`` lies below the root of the place, ``name`` is Paddle's; ``keys`` are the paths of its parameters.
    ``turned`` where torch keeps [in, out].
    """

    path: str
    name: str
    module: Any
    keys: dict[str, str]
    turned: bool = False

    def __getitem__(self, kind: str) -> Any:
        """``weight``, of a linear [out, in], or ``bias``."""
        held = self.module._parameters[whole(self.keys[kind]).rpartition(".")[2]][index_of(self.keys[kind])]
        return held.T if self.turned and kind == "weight" else held

    def holding(self, **tensors: Any) -> dict[str, Any]:
        """These as its parameters, as :func:`surgery.weights` takes them."""
        return {self.keys[kind]: tensor.T if self.turned and kind == "weight" else tensor
                for kind, tensor in tensors.items()}

    def taking(self, other: Layer) -> dict[str, Any]:
        """Every parameter from ``other``."""
        return self.holding(**{kind: other[kind] for kind in self.keys if kind in other.keys})


class Place:
    """One of three: a module that is called with its recorded arguments; what lies before the first module; what
    lies behind the last one (the head), with every module's output played back from the recorded pass.

    ``root`` is what a change is applied to: the module itself, else the whole model; ``path`` is its torch path.
    """

    def __init__(self, reference: Reference, inputs: Inputs, name: str, *, before_first: bool = False) -> None:
        self.reference, self.inputs, self.name = reference, inputs, name
        self.model = reference.model
        self.torch_paths = {paddle: path for path, paddle in reference.run.modules}
        known = dict(self.model.named_modules())
        self.listed = [path for path, _ in reference.run.modules if path in known]
        path = self.torch_paths.get(name)
        self.start = path if before_first else None
        self.path = "" if before_first or path not in known else path
        self.root = known[self.path]
        self.whole = self.path == ""
        self._calls, self._answers = self._listen()

    @property
    def mask(self) -> np.ndarray:
        return self.inputs.mask

    def mask_of(self, length: int) -> np.ndarray:
        """The mask [batch, tokens] of rows that are ``length`` tokens long: the encoder's or the decoder's."""
        return next((mask for mask in self.inputs.rows.masks if mask.shape[1] == length), self.mask)

    def run(self, dtype: Any = torch.float32) -> np.ndarray:
        """Valid rows of the output, as the reference records them, for the recorded arguments in ``dtype``."""
        root = self.root
        with torch.no_grad():
            if not self.whole:
                arguments, named = _as(self._calls[self.path], dtype)
                return self._rows(root(*arguments, **named))
            if self.start is not None:
                return self._until_start(root)
            with ExitStack() as stubs:
                for path in self.listed:
                    answers = iter(self._answers[path])
                    stubs.enter_context(surgery.forward(
                        path, lambda module, run, answers=answers: lambda *_, **__: _as(next(answers), dtype))(root))
                return self._real(self.name, self.reference.returned(self.inputs.arrays)[self.name])

    def with_change(self, change: Change) -> np.ndarray:
        """:meth:`run` with ``change`` in force."""
        with self.reference.weights_of(self.path), change(self.root):
            return self.run()

    def floor(self, change: Change) -> NoiseFloor:
        """The noise floor of the changed reference itself."""
        return self._floors(change, lambda dtype: {"": self.run(dtype)})[""]

    def floors_inside(self, change: Change, entering: Mapping[str, np.ndarray]) -> dict[str, NoiseFloor]:
        """As :meth:`floor`, of what :meth:`run_inside` gives."""
        return self._floors(change, lambda dtype: self.run_inside(entering, dtype))

    def _floors(self, change: Change, run: Callable[[Any], dict[str, np.ndarray]]) -> dict[str, NoiseFloor]:
        with self.reference.weights_of(self.path):
            with Float64(), change(self.root):
                pools = {name: Pool(array) for name, array in run(torch.float64).items()}
            for number in range(REORDERED_RUNS + 1):
                with Reordered(number) if number else nullcontext(), change(self.root):
                    for name, array in run(torch.float32).items():
                        pools[name].add(array)
        return {name: pool.floor() for name, pool in pools.items()}

    @cached_property
    def sublayers(self) -> list[tuple[str, str]]:
        """(path below the root, Paddle path) of the sublayers that the family names for this module."""
        found = None if self.whole else sublayers_of(self.reference.run, self.name)
        return [(path.removeprefix(self.path + "."), name) for path, name, _ in found[1]] if found else []

    @property
    def traits(self) -> Traits:
        """What the family says of its nets."""
        return self.reference.run.family.traits

    @property
    def wiring(self) -> Wiring | None:
        """How this module joins its parts, where the family says it."""
        return self.reference.run.wiring.get(self.name)

    @cached_property
    def operations(self) -> dict[str, str]:
        """By Paddle's path of a sublayer, the operation before it as the family tells it."""
        found = None if self.whole else sublayers_of(self.reference.run, self.name)
        return {name: told for _, name, told in found[1]} if found else {}

    def run_inside(self, entering: Mapping[str, np.ndarray], dtype: Any = torch.float32) -> dict[str, np.ndarray]:
        """Rows of what arrives at each sublayer and of what it gives for ``entering``, which it is fed instead."""
        found: dict[str, np.ndarray] = {}

        def before(parts: Parts, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            value = arguments[0] if arguments else named["hidden_states"]
            for _, name in parts:
                found[ARRIVING + name] = self._real(name, value.numpy())
            given = self._entering(parts[-1][1], entering[parts[-1][1]]).to(dtype)
            return ((given, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": given})

        def after(parts: Parts, output: Any) -> None:
            first = first_of(output)
            for path, name in parts:
                found[name] = self._real(name, first.numpy()[index_of(path)])
        with ExitStack() as hooks:
            for path, parts in by_module(pair for pair in self.sublayers if pair[1] in entering):
                module = self.root.get_submodule(path)
                hooks.callback(module.register_forward_pre_hook(
                    lambda _, arguments, named, parts=parts: before(parts, arguments, named), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(
                    lambda _, __, output, parts=parts: after(parts, output)).remove)
            found[self.name] = self.run(dtype)
        return found

    def paddle(self, path: str) -> str:
        """The Paddle name of a parameter or module below the root; for a module without parameters, its parent's."""
        known = self.reference.run.paddle_names
        full = ".".join(part for part in (self.path, path) if part)
        if full in known:
            return known[full]
        for kind in (".weight", ".bias"):
            if full + kind in known:
                return known[full + kind].removesuffix(kind)
        if full in {torch_path: name for name, torch_path in self.torch_paths.items()}:
            return next(name for name, torch_path in self.torch_paths.items() if torch_path == full)
        while full:
            below = sorted(name.rpartition(".")[0].rpartition(".")[0] for torch_path, name in known.items()
                           if torch_path.startswith(full + ".") and torch_path.count(".") == full.count(".") + 2)
            if below:
                return below[0]
            full = full.rpartition(".")[0]
        return self.name

    def argument(self, name: str) -> Any:
        """What this module was given as ``name`` in the recorded pass; None for the whole model."""
        if self.whole:
            return None
        arguments, named = self._calls[self.path]
        return inspect.signature(self.root.forward).bind(*arguments, **named).arguments.get(name)

    def modules(self, *kinds: type) -> list[tuple[str, Any]]:
        """Modules of these classes in this place, by path below the root, in the order they are defined."""
        return [(path, module) for path, module in self.root.named_modules() if isinstance(module, kinds)
                and self.holds(path)]

    @cached_property
    def linears(self) -> list[Layer]:
        """The linears of this place, what is fused in torch by its parts, in the order they are defined."""
        return [layer for path, module in self.root.named_modules() if self.holds(path) and _is_linear(module)
                for layer in self._layers(path, module)]

    @cached_property
    def norms(self) -> list[Layer]:
        return [layer for path, module in self.modules(torch.nn.Module) for layer in self._layers(path, module)
                if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)) or is_rms_norm(module)]

    def _layers(self, path: str, module: Any) -> list[Layer]:
        known, above = self.reference.run.paddle_names, f"{self.path}." if self.path else ""
        of = {name: key for key, name in known.items()}
        turned = _is_linear(module) and not isinstance(module, torch.nn.Linear)
        held = [kind for kind in ("weight", "bias") if module._parameters.get(kind) is not None]
        parts = [key for key in known if whole(key) == f"{above}{path}.weight" != key]
        if not parts:
            prefix = f"{path}." if path else ""
            return [Layer(path, self.paddle(path), module, {kind: prefix + kind for kind in held}, turned)]
        names = {key: known[key].removesuffix(".weight") for key in parts}
        return [Layer(part_of_output(key, path), name, module,
                      {kind: of[f"{name}.{kind}"].removeprefix(above) for kind in held}, turned)
                for key, name in names.items()]

    def dropped_terms(self, run: Callable[[], dict[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
        """For each tensor of ``run``: what goes through each dropout that is added to it as it is.

        Doubling such a term adds it once more.
        """
        terms: dict[str, list[np.ndarray]] = {}
        plain = run()
        for path, _ in self.modules(torch.nn.Dropout):
            seen: list[Any] = []
            with surgery.output(path, lambda x, seen=seen: seen.append(x) or 2 * x)(self.root):
                twice = run()
            term = self._real(self.name, seen[0].numpy()).astype(np.float64) if seen else np.zeros(0)
            for name, array in plain.items():
                if term.shape == array.shape and np.allclose(
                        twice[name] - array, term, atol=1e-4 * np.abs(array).max()):
                    terms.setdefault(name, []).append(term)
        return terms

    def looks_up(self, parameter: str) -> bool:
        """Whether a parameter, by its path in the model, is the table of an embedding."""
        return self.reference.looks_up(parameter)

    def holds(self, path: str) -> bool:
        """Whether the path below the root is run here and not played back."""
        return not self.whole or not any((path + ".").startswith(listed + ".") for listed in self.listed)

    def _rows(self, output: Any) -> np.ndarray:
        return self._real(self.name, first_of(output).numpy())

    def _real(self, name: str, array: np.ndarray) -> np.ndarray:
        """Rows of real tokens, by Paddle's name of the module or output that the array is of."""
        return self.inputs.rows(name, self.reference.run.batch_first(name, array))

    def _entering(self, name: str, array: np.ndarray) -> Any:
        """What a module is fed, of an array with its batch in front."""
        return torch.tensor(self.reference.run.batch_first(name, array))

    def _until_start(self, root: Any) -> np.ndarray:
        found = []

        def reached(_: Any, __: Any, output: Any) -> None:
            found.append(self._rows(output))
            raise _Reached
        hook = root.get_submodule(self.start).register_forward_hook(reached)
        try:
            with suppress(_Reached):
                self.reference.returned(self.inputs.arrays)
        finally:
            hook.remove()
        return found[0]

    def _listen(self) -> tuple[dict[str, Call], dict[str, list[Any]]]:
        """One pass of the whole model: the arguments of this module, or for a head every module's answer to each call.
        """
        calls: dict[str, Call] = {}
        answers: dict[str, list[Any]] = {}
        if self.start is not None:
            return calls, answers

        def heard(path: str, arguments: Any, named: Any, output: Any) -> None:
            if path == self.path and path not in calls:
                calls[path] = (tuple(_detached(value) for value in arguments),
                               {name: _detached(value) for name, value in named.items()})
            if self.whole:
                answers.setdefault(path, []).append(copy.deepcopy(output))
        with ExitStack() as hooks:
            for path in self.listed if self.whole else [self.path]:
                hooks.callback(self.model.get_submodule(path).register_forward_hook(
                    lambda _, arguments, named, output, path=path: heard(path, arguments, named, output),
                    with_kwargs=True).remove)
            self.reference.returned(self.inputs.arrays)
        return calls, answers


class Alone(Place):
    """One module fed an input of our own instead of the recorded one. ``entering`` is [batch, tokens, width]."""

    def __init__(self, reference: Reference, inputs: Inputs, path: str, name: str, entering: np.ndarray) -> None:
        self.reference, self.inputs, self.name = reference, inputs, name
        self.model, self.path, self.start, self.whole = reference.model, path, None, False
        self.root = self.model.get_submodule(path)
        self.torch_paths = {paddle: path for path, paddle in reference.run.modules}
        self.listed = []
        self._calls, self._answers = {path: ((self._entering(name, entering),), {})}, {}

    @property
    def sublayers(self) -> list[tuple[str, str]]:
        return []


class Fed(Place):
    """A module called as in the recorded pass, but for its hidden states. ``entering`` is [batch, tokens, width]."""

    def __init__(self, reference: Reference, inputs: Inputs, name: str, entering: np.ndarray) -> None:
        super().__init__(reference, inputs, name)
        arguments, named = self._calls[self.path]
        given = self._entering(name, entering)
        self._calls[self.path] = ((given, *arguments[1:]), named) if arguments else ((), {**named,
                                                                                          "hidden_states": given})


def _is_linear(module: Any) -> bool:
    """Also transformers' ``Conv1D``, and one's own of that name: a linear whose weight is [in, out]."""
    weight = getattr(module, "weight", None)
    conv1d = type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2
    return isinstance(module, torch.nn.Linear) or conv1d


def _detached(value: Any) -> Any:
    """A copy; what is no data (a cache that the pass has filled) is left out."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value if isinstance(value, (bool, int, float, str)) else None


def _as(value: Any, dtype: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype.is_floating_point else value
    if isinstance(value, (tuple, list)):
        return type(value)(_as(one, dtype) for one in value)
    if isinstance(value, dict):
        return {name: _as(one, dtype) for name, one in value.items()}
    return value
