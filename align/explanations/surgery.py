"""Tools that make an unmodified torch module compute something else for a while. Each is a context manager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..oracle import ADDED_MATMUL, MATMUL, SOFTMAX
from ..parts import index_of, whole

Change = Callable[[Any], Any]
ABSENT = object()


def together(*changes: Change) -> Change:
    """All of ``changes`` at once."""
    @contextmanager
    def change(root: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for one in changes:
                stack.enter_context(one(root))
            yield
    return change


def weights(tensors: Mapping[str, Any]) -> Change:
    """Other parameters, or parts of them, and other buffers, by path below the root. A tied one is changed where it is
    named, and only there."""
    @contextmanager
    def change(root: Any) -> Iterator[None]:
        before = {}
        for path, tensor in tensors.items():
            module, _, attribute = whole(path).rpartition(".")
            owner = root.get_submodule(module)
            table = owner._parameters if attribute in owner._parameters else owner._buffers
            held = table[attribute]
            before.setdefault(whole(path), (table, attribute, held))
            changed = (_with_part(held, path, tensor) if whole(path) != path else tensor).to(held.dtype)
            table[attribute] = changed if table is owner._buffers else torch.nn.Parameter(changed, requires_grad=False)
        try:
            yield
        finally:
            for table, attribute, held in before.values():
                table[attribute] = held
    return change


def _with_part(held: Any, path: str, tensor: Any) -> Any:
    changed = held.detach().clone()
    changed[index_of(path)] = tensor
    return changed


def attributes(path: str, values: Mapping[str, Any]) -> Change:
    """Other plain attributes of the module at ``path``."""
    @contextmanager
    def change(root: Any) -> Iterator[None]:
        owner = root.get_submodule(path)
        before = {name: getattr(owner, name) for name in values}
        for name, value in values.items():
            setattr(owner, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(owner, name, value)
    return change


def submodule(path: str, make: Callable[[Any], Any]) -> Change:
    """``make(old)`` in the place of the module at ``path``."""
    @contextmanager
    def change(root: Any) -> Iterator[None]:
        parent, _, name = path.rpartition(".")
        owner = root.get_submodule(parent)
        held = owner._modules[name]
        owner._modules[name] = make(held)
        try:
            yield
        finally:
            owner._modules[name] = held
    return change


def forward(path: str, make: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> Change:
    """``make(module, its forward)`` in the place of the forward of the module at ``path``."""
    @contextmanager
    def change(root: Any) -> Iterator[None]:
        owner = root.get_submodule(path)
        before = owner.__dict__.get("forward", ABSENT)
        owner.forward = make(owner, owner.forward)
        try:
            yield
        finally:
            if before is ABSENT:
                del owner.forward
            else:
                owner.forward = before
    return change


def output(path: str, function: Callable[[Any], Any]) -> Change:
    """``function`` of the first output of the module at ``path``, or of some of its channels."""
    def on_part(found: Any) -> Any:
        if whole(path) == path:
            return function(found)
        changed = found.clone()
        changed[index_of(path)] = function(found[index_of(path)])
        return changed

    def make(module: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            found = run(*arguments, **named)
            return type(found)([on_part(found[0]), *found[1:]]) if isinstance(found, (tuple, list)) else on_part(found)
        return changed
    return forward(whole(path), make)


def first_input(path: str, function: Callable[[Any], Any]) -> Change:
    """``function`` of the first argument of the module at ``path``."""
    return forward(path, lambda module, run: lambda x, *rest, **named: run(function(x), *rest, **named))


def argument(name: str, function: Callable[[Any], Any]) -> Change:
    """``function`` of the root's argument ``name``."""
    def make(module: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(run)

        def changed(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(*arguments, **named)
            bound.arguments[name] = function(bound.arguments.get(name))
            return run(*bound.args, **bound.kwargs)
        return changed
    return forward("", make)


def first_of(output: Any) -> Any:
    """What a module gives first, where it gives several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def has_argument(module: Any, name: str) -> bool:
    return name in inspect.signature(type(module).forward).parameters


def function_of(path: str, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Change:
    """``make(old)`` for the function ``name`` of the Python module that the class of the module at ``path`` is from."""
    @contextmanager
    def change(root: Any) -> Iterator[None]:
        space = globals_of(root.get_submodule(path))
        held = space[name]
        space[name] = make(held)
        try:
            yield
        finally:
            space[name] = held
    return change


def globals_of(module: Any) -> dict[str, Any]:
    return inspect.unwrap(type(module).forward).__globals__


class _Scores(TorchFunctionMode):
    """Attention from outside: the matmul before a softmax is query and key, and the softmax is the attention's.

    BLOOM's query and key meet in a product of their own kind, which its bias is added to.
    """

    def __init__(self, query: Callable[[Any], Any] | None, softmax: Callable[[Any, Any], Any] | None) -> None:
        super().__init__()
        self.query, self.softmax, self.fresh = query, softmax, True

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MATMUL and args[0].dim() == 4:
            first, self.fresh = self.fresh, not self.fresh
            if first and self.query:
                return func(self.query(args[0]), *args[1:], **kwargs)
        if func in ADDED_MATMUL and self.query:
            added, *factors = *args, *(kwargs.pop(name) for name in ("batch1", "batch2") if name in kwargs)
            if len(factors) == 2 and factors[0].dim() == 3:
                return torch.baddbmm(added, self.query(factors[0]), factors[1], **kwargs)
            return func(*args, *factors[len(args) - 1:], **kwargs)
        if func in SOFTMAX and self.softmax:
            return self.softmax(lambda x, **other: func(x, *args[1:], **{**kwargs, **other}), args[0])
        return func(*args, **kwargs)


def scores(query: Callable[[Any], Any] | None = None, softmax: Callable[[Any, Any], Any] | None = None) -> Change:
    """``query`` is applied to the queries before they meet the keys; ``softmax(old, scores)`` replaces the softmax."""
    return lambda root: _Scores(query, softmax)
