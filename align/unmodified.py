"""That the reference is transformers' class as it was installed, and not as a target's code left it.

A target and the reference share a process. Kernel libraries patch transformers' classes and torch's functions when they
are imported; both sides would then be wrong together, and agree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from convert.errors import BadInput

TORCH = ("functional", "modules.activation", "modules.dropout", "modules.linear", "modules.module",
         "modules.normalization", "modules.sparse")


class Unmodified:
    """What the reference of ``architecture`` runs, as it is now; nothing where torch or transformers is missing."""

    def __init__(self, architecture: str) -> None:
        self._modules: list[ModuleType] = []
        if find_spec("torch") and find_spec("transformers"):
            import torch
            import transformers
            import transformers.activations
            cls = getattr(transformers, architecture)
            self._modules = [sys.modules[cls.__module__], transformers.activations, torch,
                             *(sys.modules[f"torch.nn.{name}"] for name in TORCH)]
        self._before = dict(self._functions())

    def require(self, target: str) -> None:
        """:class:`BadInput` when ``target`` has changed any of it."""
        now = dict(self._functions())
        changed = [name for name, function in self._before.items() if now.get(name) != function]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise BadInput(f"{target} replaces {changed[0]}{more}, which the reference runs too: both sides would be "
                           "wrong together. Record them apart: --only reference, then --only candidate, then "
                           "--compare.")

    def _functions(self) -> Iterator[tuple[str, Any]]:
        """(name, function and its code) of every function of the modules, of their classes and of their tables."""
        for module in self._modules:
            for name, value in vars(module).items():
                told = f"{module.__name__}.{name}"
                if isinstance(value, type) and value.__module__ == module.__name__:
                    yield from ((f"{told}.{key}", _identity(held)) for key, held in vars(value).items()
                                if callable(held))
                elif isinstance(value, dict) and name.startswith("ACT2"):
                    yield from ((f"{told}[{key!r}]", _identity(held)) for key, held in value.items())
                elif callable(value) and not name.startswith("__"):
                    yield told, _identity(value)


def _identity(function: Any) -> tuple[int, int]:
    return id(function), id(function.__code__) if isinstance(function, FunctionType) else 0
