"""That the reference is made of classes as they were installed, and not as a target's code left them.

A target and the reference share a process. Kernel libraries patch transformers' classes and torch's functions when they
are imported; both sides would then be wrong together, and agree. What a target has changed stays changed for the rest
of the process, so everything is held against what it was when it was first looked at, not only when this target came.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from operator import is_
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from convert.errors import BadInput

if TYPE_CHECKING:
    from .stage import Session

Parts = tuple[Any, ...]
"""A function, and what of it can be exchanged within it."""
TORCH = ("torch", "torch.nn.functional", "torch.nn.modules.module")
LAYERS = "torch.nn.modules."
HOOKS = "_global_"
"""What torch calls its tables of hooks on every module there is."""
INSTALLED = ("torch.", "transformers.")
_first_seen: dict[str, Parts] = {}
"""Of what is installed, by name. Code of a checkpoint or of a family file is not: each reference executes it anew."""


def classes_beside(session: Session) -> set[type] | None:
    """The classes of the reference's modules; None where no reference can run in this process.

    Code that a checkpoint brings along is not run for this: where nobody trusts it, its classes are not among them.
    """
    run, options = session.run, session.options
    if options.only == "candidate" or not (find_spec("torch") and find_spec("transformers")):
        return None
    if run.family.remote_code and not options.trust_remote_code:
        return set()
    from .reference import empty_of
    built = "reference" in vars(session) or run.family.remote_code or run.head.reference
    model = session.reference.model if built else empty_of(run)
    return classes_of(model)


def classes_of(model: Any) -> set[type]:
    """Of every module of a torch model."""
    return {type(module) for module in model.modules()}


class Unmodified:
    """What a reference of these ``classes`` runs, as it is now; nothing where they are None.

    :class:`BadInput` where something in this process has changed it already.
    """

    def __init__(self, classes: Collection[type] | None) -> None:
        self._classes = sorted(classes or (), key=_named)
        self._modules: list[ModuleType] = []
        if classes is not None:
            import_module("transformers.activations")
            import torch
            found = _used_by([*(cls.__module__ for cls in self._classes), "transformers.activations"])
            layers = sorted(name for name in sys.modules if name.startswith(LAYERS))
            self._modules = [sys.modules[name] for name in dict.fromkeys([*found, *TORCH, *layers])]
            self._classes.append(torch.Tensor)
        self._before = dict(self._functions())
        changed = _changed({name: _first_seen.setdefault(name, parts) for name, parts in self._before.items()
                            if name.startswith(INSTALLED)}, self._before)
        if changed:
            raise BadInput(f"{_some(changed)} has been replaced in this process, and the reference runs it: it would "
                           "no longer be the class as it was installed. Start a new process.")

    def require(self, target: str) -> None:
        """:class:`BadInput` when ``target`` has changed any of it."""
        changed = _changed(self._before, dict(self._functions()))
        if changed:
            raise BadInput(f"{target} replaces {_some(changed)}, which the reference runs too: both sides would be "
                           "wrong together. Record them apart: --only reference, then --only candidate, then "
                           "--compare.")

    def _functions(self) -> Iterator[tuple[str, Parts]]:
        """(name, function and its parts) of every function of the modules, of their classes and of their tables.

        With what they inherit: the reference's classes, and those that are no layers.
        """
        for module in self._modules:
            for name, value in vars(module).items():
                told = f"{module.__name__}.{name}"
                if isinstance(value, type) and value.__module__ == module.__name__:
                    yield from _methods(told, vars(value) if _is_layer(value) else _with_inherited(value))
                elif isinstance(value, dict) and name.startswith(HOOKS):
                    yield told, tuple(value.values())
                elif isinstance(value, dict) and not name.startswith("__"):
                    yield from ((f"{told}[{key!r}]", _parts(held)) for key, held in dict.items(value)
                                if callable(held))
                elif callable(value) and not name.startswith("__"):
                    yield told, _parts(value)
        for cls in self._classes:
            yield from _methods(_named(cls), _with_inherited(cls))


def _is_layer(cls: type) -> bool:
    """Whether it or what it inherits from has a ``forward``; no class is asked, for those of absent libraries raise."""
    return any("forward" in vars(base) for base in cls.__mro__)


def _with_inherited(cls: type) -> dict[str, Any]:
    return {name: held for base in reversed(cls.__mro__) if base is not object for name, held in vars(base).items()}


def _used_by(names: Iterable[str]) -> list[str]:
    """The modules of these names, and the loaded ones of transformers' that they have anything from, and so on."""
    found, waiting = {}, [name for name in names if name in sys.modules]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            used = {getattr(value, "__module__", None) for value in list(vars(sys.modules[name]).values())}
            waiting += sorted(one for one in used if isinstance(one, str) and one.startswith("transformers.")
                              and one in sys.modules)
    return list(found)


def _methods(told: str, held: Any) -> Iterator[tuple[str, Parts]]:
    return ((f"{told}.{name}", _parts(value)) for name, value in held.items()
            if callable(value) or isinstance(value, (classmethod, property)))


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _parts(function: Any) -> Parts:
    return (function, function.__code__, function.__defaults__) if isinstance(function, FunctionType) else (function,)


def _changed(before: Mapping[str, Parts], now: Mapping[str, Parts]) -> list[str]:
    """The names that no longer hold the same objects."""
    return [name for name, parts in before.items() if not _are_same(parts, now.get(name, ()))]


def _are_same(before: Parts, now: Parts) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _some(names: Sequence[str]) -> str:
    """The shortest name, which is that of the class that the others have it from."""
    return min(names, key=len) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
