"""Which weight and which module of somebody's torch module is which of their Paddle layer's, and how each lies there.

A name is looked up in the map that was given; without an entry both sides are taken to use the same name (running
statistics apart, which Paddle calls otherwise); what is left is proposed by :mod:`convert.matching` and said to be.
The layout follows from the kinds of both layers: ``paddle.nn.Linear`` holds [in, out], torch's [out, in]; embeddings,
convolutions, norms and recurrent nets lie alike. It is never read off a square matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import xxhash

from convert.errors import BadInput
from convert.matching import Match, Matching, Side, match

from .untouched import is_filled

Told = str | Sequence[str] | None
Names = Mapping[str, str | Sequence[str]] | Callable[[str], Told]
Layout = Literal["same", "transposed"]
LAYOUTS = get_args(Layout)
CALLED_OTHERWISE = {"running_mean": "_mean", "running_var": "_variance"}
TORCH_ONLY = "num_batches_tracked"
SHOWN = 6


@dataclass(frozen=True)
class Weight:
    """A tensor of Paddle's, and the one of torch's that it is, or the rows of it. ``layout`` None is not known."""

    torch: str
    paddle: str
    layout: Layout | None
    rows: slice = field(default_factory=lambda: slice(None))

    def turned(self, array: np.ndarray, layout: Layout) -> np.ndarray:
        """From torch's layout to Paddle's or back."""
        return array.T if layout == "transposed" else array


class Net:
    """What one side holds, by its paths: parameters and buffers under all their names, and modules."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.modules = dict(modules)
        self.tensors: dict[str, Any] = {}
        self.parameters: set[str] = set()
        for path, module in self.modules.items():
            for table in ("_parameters", "_buffers"):
                for word, tensor in getattr(module, table).items():
                    if tensor is not None and is_filled(tensor):
                        name = f"{path}.{word}".lstrip(".")
                        self.tensors[name] = tensor
                        self.parameters |= {name} if table == "_parameters" else set()

    @classmethod
    def of_torch(cls, module: Any) -> Net:
        return cls(dict(module.named_modules(remove_duplicate=False)))

    @classmethod
    def of_paddle(cls, layer: Any) -> Net:
        return cls(dict(_paths(layer)))

    def array(self, name: str) -> np.ndarray:
        return self.tensors[name].detach().cpu().numpy()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensors[name].shape)

    def owner(self, name: str) -> Any:
        return self.modules[name.rpartition(".")[0]]

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """By name, all names of the same tensor."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            groups.setdefault(id(tensor), []).append(name)
        return {name: names for names in groups.values() for name in names}

    @property
    def digest(self) -> str:
        """xxh3-128 over names, shapes and bytes, sorted by name; a tensor under its first name."""
        hasher = xxhash.xxh3_128()
        for name in sorted({names[0] for names in self.aliases.values()}):
            array = np.ascontiguousarray(self.array(name))
            hasher.update(f"{name} {array.dtype} {array.shape}\n".encode())
            hasher.update(array.reshape(-1).view(np.uint8))
        return hasher.hexdigest()

    @cached_property
    def below(self) -> dict[str, set[str]]:
        """By path of a module, the first names of the tensors in it."""
        found: dict[str, set[str]] = {path: set() for path in self.modules}
        for name in self.tensors:
            words = name.split(".")
            for count in range(len(words)):
                found[".".join(words[:count])].add(self.aliases[name][0])
        return found


def _paths(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer by every path that it has."""
    yield path, layer
    for word, child in layer._sub_layers.items():
        if child is not None:
            yield from _paths(child, f"{path}.{word}".lstrip("."))


class Pairing:
    """The weights of both sides in pairs.

    ``names``: torch paths of parameters, buffers or modules to Paddle's, a mapping or a function (None for no opinion);
    a sequence of Paddle's names takes a tensor that torch has fused in that order. ``layouts``: of Paddle's names,
    ``same`` or ``transposed``, where the kinds of layers do not tell. ``by_values`` says whether equal values may
    propose a pair; where Paddle's values are still to come, only names and shapes can.
    """

    def __init__(self, module: Any, layer: Any, names: Names | None, layouts: Mapping[str, Layout] | None = None, *,
                 by_values: bool = True) -> None:
        self.torch, self.paddle = Net.of_torch(module), Net.of_paddle(layer)
        self._names, self._layouts = names or {}, dict(layouts or {})
        self.weights: list[Weight] = []
        self.proposed: list[Match] = []
        self._check()
        self._by_name()
        self._propose(by_values)

    @cached_property
    def only_torch(self) -> list[str]:
        """Torch's parameters without a counterpart, under the first name of each."""
        paired = {alias for weight in self.weights for alias in self.torch.aliases[weight.torch]}
        return [name for name in self.torch.tensors
                if name not in paired and self.torch.aliases[name][0] == name and not name.endswith(TORCH_ONLY)]

    @cached_property
    def only_paddle(self) -> list[str]:
        paired = {alias for weight in self.weights for alias in self.paddle.aliases[weight.paddle]}
        return [name for name in self.paddle.tensors
                if name not in paired and self.paddle.aliases[name][0] == name]

    @property
    def told(self) -> list[str]:
        """How the names were found, where that was neither by the map nor by equality."""
        said = []
        for sure, how in ((True, "by their values"), (False, "by likeness of names and shapes, which is a guess: give "
                                                             "names= to be certain")):
            found = [f"{left.names[number]} is {right.names[number]}" for one in self.proposed
                     if (one.reason == "the same values") is sure for left, right in one.pairs
                     for number in range(len(left.names))]
            if found:
                more = f" (+{len(found) - SHOWN} more)" if len(found) > SHOWN else ""
                said.append(f"Names: {', '.join(found[:SHOWN])}{more}; taken together {how}.")
        return said

    def path_of(self, path: str) -> str | None:
        """Paddle's path of a torch module by the map or by equality of names; None where it has no such layer."""
        found = self._told(path)
        return found if isinstance(found, str) and found in self.paddle.modules else None

    @cached_property
    def modules(self) -> dict[str, str]:
        """Paddle's path of each torch module that has a counterpart: by name, else by the weights that are in it, else
        by its name in the counterpart of the module around it. No layer of Paddle's stands for two.
        """
        images: dict[str, set[str]] = {}
        for weight in self.weights:
            images.setdefault(self.torch.aliases[weight.torch][0], set()).add(self.paddle.aliases[weight.paddle][0])
        found: dict[str, str] = {}
        for path in self.torch.modules:
            told = self.path_of(path) if path else ""
            if told is None and self.torch.below[path]:
                told = self._holding(set().union(*(images.get(name, set()) for name in self.torch.below[path])))
            if told is None:
                above, _, word = path.rpartition(".")
                told = f"{found[above]}.{word}".lstrip(".") if above in found else None
            if told in self.paddle.modules and told not in found.values():
                found[path] = told
        return found

    def _holding(self, weights: set[str]) -> str | None:
        """The innermost layer that has exactly these weights."""
        fitting = [path for path in self.paddle.modules if path and weights and self.paddle.below[path] == weights]
        return max(fitting, key=lambda path: path.count("."), default=None)

    def _check(self) -> None:
        for name, tensor in self.torch.tensors.items():
            if tensor.is_floating_point() and "float32" not in str(tensor.dtype):
                raise BadInput(f"{name} of the torch module is {tensor.dtype}; both sides are compared in float32. "
                               "Call .float() on it before.")
            if tensor.device.type != "cpu":
                raise BadInput(f"{name} of the torch module is on {tensor.device}; float64 and reordered sums are run "
                               "on the CPU. Call .cpu() on it before.")
        if not callable(self._names) and not isinstance(self._names, Mapping):
            raise BadInput(f"names is a {type(self._names).__name__}; a mapping from torch's paths to Paddle's, or a "
                           "function, is needed.")
        for path, told in () if callable(self._names) else self._names.items():
            _require_names(path, told)
            if path not in self.torch.tensors.keys() | self.torch.modules.keys():
                raise BadInput(f"names: the torch module has no parameter, buffer or module {path}."
                               f"{_near(path, self.torch)}")
            for name in [told] if isinstance(told, str) else told:
                if name not in self.paddle.tensors.keys() | self.paddle.modules.keys():
                    raise BadInput(f"names: {path} is said to be {name}, which the Paddle layer does not have."
                                   f"{_near(name, self.paddle)}")
        for name, layout in self._layouts.items():
            if name not in self.paddle.tensors:
                raise BadInput(f"layouts: {name} is no parameter of the Paddle layer.{_near(name, self.paddle)}")
            if layout not in LAYOUTS:
                raise BadInput(f"layouts: {name} is said to be {layout!r}; {' or '.join(LAYOUTS)} is needed.")

    def _told(self, path: str) -> Told:
        """What the map says of ``path``: itself, or the longest module that it lies in; else the same path."""
        if callable(self._names):
            told = self._names(path)
            return path if told is None else _require_names(path, told)
        words = path.split(".")
        for count in range(len(words), -1, -1):
            above, rest = ".".join(words[:count]), words[count:]
            if above in self._names:
                told = self._names[above]
                found = [".".join([one, *rest]).lstrip(".") for one in ([told] if isinstance(told, str) else told)]
                return found[0] if isinstance(told, str) else found
        return path

    def _by_name(self) -> None:
        for name in self.torch.tensors:
            told = self._told(name)
            if isinstance(told, str):
                owner, _, leaf = told.rpartition(".")
                spelled = [told, f"{owner}.{CALLED_OTHERWISE.get(leaf, leaf)}".lstrip(".")]
                found = [one for one in spelled if one in self.paddle.tensors][:1]
                found = found or _projections(self.torch, name, self.paddle, told)
            else:
                found = [one for one in told if one in self.paddle.tensors]
            self._pair(name, found)

    def _pair(self, name: str, found: Sequence[str]) -> None:
        start = 0
        for paddle in found:
            layout = self._layout(name, paddle)
            if len(found) == 1:
                self.weights.append(Weight(name, paddle, layout))
                continue
            shape = self.paddle.shape(paddle)
            width = (shape[::-1] if layout == "transposed" else shape)[0]
            self.weights.append(Weight(name, paddle, layout, slice(start, start + width)))
            start += width
        if len(found) > 1 and self.torch.shape(name)[:1] != (start,):
            raise BadInput(f"{name} is {list(self.torch.shape(name))} in torch, and {', '.join(found)} together have "
                           f"{start} of its rows. Say in names= where each of them is.")

    def _propose(self, by_values: bool) -> None:
        left = {name: self.torch.shape(name) for name in self.only_torch if name in self.torch.parameters
                or name.endswith(tuple(CALLED_OTHERWISE))}
        right = {name: self.paddle.shape(name) for name in self.only_paddle if name in self.paddle.parameters
                 or name.endswith(tuple(CALLED_OTHERWISE.values()))}
        vars(self).pop("only_torch"), vars(self).pop("only_paddle")
        if not left or not right:
            return
        read = (self.torch.array, self.paddle.array) if by_values else (None, None)
        found: Matching = match(Side(left, read[0]), Side(right, read[1]))
        self.proposed = found.matches
        for one in found.matches:
            for ours, theirs in one.pairs:
                for name, paddle in zip(ours.names, theirs.names, strict=True):
                    self._pair(name, [paddle])

    def _layout(self, name: str, paddle: str) -> Layout | None:
        """How Paddle's tensor lies as against torch's, by the kinds of the layers that hold them."""
        if paddle in self._layouts:
            return self._layouts[paddle]
        if len(self.paddle.shape(paddle)) != 2:
            return "same"
        kinds = _kind(self.torch.owner(name), name), _kind(self.paddle.owner(paddle), paddle)
        if None not in kinds:
            return "same" if kinds[0] == kinds[1] else "transposed"
        shapes = self.torch.shape(name), self.paddle.shape(paddle)
        if shapes[0] == shapes[1] == shapes[0][::-1]:
            return None
        return "transposed" if shapes[0] == shapes[1][::-1] else "same"


def _kind(owner: Any, name: str) -> str | None:
    """How a matrix of this layer lies; a table of rows and stacked gates as ``out, in``, which no side turns."""
    words, leaf = {cls.__name__ for cls in type(owner).__mro__}, name.rpartition(".")[2]
    is_paddle = any(cls.__module__.startswith("paddle") for cls in type(owner).__mro__)
    if words & {"Conv1D"} and not is_paddle and leaf == "weight":
        return "in, out"  # of transformers; a convolution's weight has three axes
    if words & {"Linear", "ColumnParallelLinear", "RowParallelLinear"} and leaf == "weight":
        return "in, out" if is_paddle else "out, in"
    if words & {"MultiheadAttention"} and leaf.endswith("proj_weight"):
        return "out, in"
    if words & {"Embedding", "VocabParallelEmbedding", "RNNBase", "RNNCellBase"}:
        return "out, in"
    return None


def _projections(torch: Net, name: str, paddle: Net, told: str) -> list[str]:
    """Of ``torch.nn.MultiheadAttention``'s fused projection: the three that Paddle's layer has."""
    owner, _, leaf = told.rpartition(".")
    if leaf not in ("in_proj_weight", "in_proj_bias") or type(torch.owner(name)).__name__ != "MultiheadAttention":
        return []
    found = [f"{owner}.{part}_proj.{leaf.rpartition('_')[2]}".lstrip(".") for part in "qkv"]
    return found if all(one in paddle.tensors for one in found) else []


def _require_names(path: str, told: Any) -> Told:
    """``told``, unless it is neither a name nor a sequence of names."""
    if isinstance(told, str) or (isinstance(told, Sequence) and told and all(isinstance(one, str) for one in told)):
        return told
    raise BadInput(f"names: {path} is said to be {told!r}; a name of Paddle's, or a sequence of names, is needed.")


def _near(name: str, net: Net) -> str:
    from difflib import get_close_matches
    found = get_close_matches(name, [*net.tensors, *filter(None, net.modules)], 1)
    return f" The nearest: {found[0]}." if found else ""
