"""What the torch side and the Paddle side have in common: gates, pages, and passes that somebody listens to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np

from .lint import Description
from .lockstep import Walks, halt, has_answered, heard_by, in_step, in_turn, is_first_call, together
from .paging import Pages
from .runs import Run

Modules = Sequence[tuple[str, str]]
"""(torch path, Paddle path) of each."""


def entering(arguments: tuple[Any, ...], named: Mapping[str, Any], is_array: Callable[[Any], bool]) -> str | int | None:
    """Where what a module is fed stands among its arguments: in front, as ``hidden_states``, or the first by name."""
    if arguments:
        return 0
    keys = [key for key, value in named.items() if is_array(value)]
    return "hidden_states" if "hidden_states" in keys else next(iter(keys), None)


def fed(arguments: tuple[Any, ...], named: Mapping[str, Any], place: str | int, value: Any) -> tuple[tuple, dict]:
    """The arguments with ``value`` at ``place``."""
    return ((value, *arguments[1:]), dict(named)) if place == 0 else (arguments, {**named, place: value})


def in_shape(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """``array`` as a module is called with it: one side may have [batch, tokens, width], the other [batch * tokens,
    width]."""
    same = array.size == math.prod(shape) and array.shape[-1:] == tuple(shape[-1:])
    return array.reshape(shape) if same else array


@contextmanager
def hooked(layers: Mapping[str, Any], after_name: str, pairs: Iterable[tuple[str, Any]],
           before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """``before(name, arguments, named)`` and ``after(name, layer, output)`` of the layers there are, by (path, name).

    Both at the layer's first call in a pass. What ``after`` returns is given instead of the output, unless it is None.
    ``after_name`` is what the framework calls registering it.
    """
    def entered(path: str, name: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return before(name, arguments, named) if is_first_call(path) else None

    def left(path: str, name: Any, layer: Any, output: Any) -> Any:
        if not is_first_call(path):
            return None
        given = after(name, layer, output)
        has_answered(path)
        return given
    with ExitStack() as hooks:
        for path, name in pairs:
            if path in layers:
                hooks.callback(layers[path].register_forward_pre_hook(
                    lambda _, arguments, named, path=path, name=name: entered(path, name, arguments, named),
                    with_kwargs=True).remove)
                hooks.callback(getattr(layers[path], after_name)(
                    lambda layer, _, output, path=path, name=name: left(path, name, layer, output)).remove)
        yield


class Side(ABC):
    """A model whose weights come and go with its gates, or with ``_pages`` None stay in memory.

    ``advance`` is told how far a sweep has come.
    """

    run: Run
    framework: str
    advance: Callable[[str], None] = staticmethod(lambda told: None)
    _pages: Pages | None = None

    @abstractmethod
    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every floating tensor that the model returns, by transformers' names; ``loss`` when labels are given."""

    @abstractmethod
    def described(self) -> Description:
        """What this net says of itself as built."""

    @abstractmethod
    def probing(self, pair: tuple[str, str]) -> AbstractContextManager[None]:
        """While the module of these (torch, Paddle) paths, if there is one, is run on a small input: the running
        statistics of a batch norm are small too.
        """

    @abstractmethod
    def _hooks(self, modules: Modules) -> AbstractContextManager[None]:
        """The modules tell whoever listens what arrives at them and what they give."""

    @contextmanager
    def walking(self, listener: Any, arrays: Mapping[str, np.ndarray], modules: Modules) -> Iterator[Walks]:
        """One pass at its first gate, in which ``modules`` tell ``listener`` what they give."""
        with self._hooks(modules), in_step([lambda: self._listen(listener, arrays)], self.enter) as walks:
            yield walks

    def sweep(self, passes: Sequence[Callable[[], None]], purpose: str | None = None) -> None:
        """Carry out ``passes``, which call this model; a paged one brings each weight in once for all of them.

        ``purpose`` is what the user is told that it is doing, by default running this framework.
        """
        def tell(told: str) -> None:
            self.advance(f"{purpose or self.framework}, {told}")
        if self._pages is None:
            in_turn(passes, tell)
        else:
            together(passes, self._pages, tell)

    def come_to(self, gate: str) -> None:
        if not halt(gate):
            self.enter(gate)

    def enter(self, gate: str) -> None:
        if self._pages is not None:
            self._pages.enter(gate)

    def leave(self) -> None:
        if self._pages is not None:
            self._pages.leave()

    def _listen(self, listener: Any, arrays: Mapping[str, np.ndarray]) -> None:
        with heard_by(listener):
            outputs = self.outputs(arrays)
        for name, array in outputs.items():
            listener.answered(name, array)
