"""Gradients of a model larger than memory: what goes through a gate is computed again on the way back.

The forward pass keeps what enters each gate, and nothing from inside of it. In the backward pass, when the gate's
weights are in again, its output is computed once more, with a graph, and the gradients of its weights are told and
dropped. What is said here holds for both frameworks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..noise import NoiseFloor, Pool
from ..trace import RECORDED

Arrays = dict[str, np.ndarray]
ALONE, ONCE = " (isolated)", " (iteration 1)"
WHOLE = "whole"
SAMPLE = 1 << 18


@dataclass
class Passage:
    """What one gate's way back gave: gradients of parameters of its own way (``own``), or those and the gradient of
    what entered it, fed what the plain pass of torch was (``alone``), with that pass's input and the gradient of its
    output."""

    own: Arrays = field(default_factory=dict)
    alone: Arrays = field(default_factory=dict)
    entering: Arrays = field(default_factory=dict)
    arriving: Arrays = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    @property
    def named(self) -> Arrays:
        return {**{f"{name}{ONCE}": array for name, array in self.own.items()},
                **{f"{name}{ALONE}": array for name, array in self.alone.items()}}


def in_trace(arrays: Arrays) -> dict[str, Arrays]:
    """Views of a step: all ``arrays`` are ``whole``, and in the trace, which holds those of every gate, of a large one
    every n-th element is, some ``SAMPLE`` of them: a model's gradients on both sides are 8 times its file in float16.
    """
    sampled = {}
    for name, array in arrays.items():
        step = -(-array.size // SAMPLE)
        sampled |= {name: array} if step <= 1 else {f"{name}, 1 of {step} elements": array.reshape(-1)[::step].copy()}
    return {WHOLE: arrays, RECORDED: sampled}


@dataclass(frozen=True)
class _Place:
    index: int


def taken_apart(value: Any, is_tensor: Callable[[Any], bool]) -> tuple[list[Any], Any]:
    """The tensors in nested tuples, lists and dictionaries, and what :func:`put_together` makes of others."""
    tensors: list[Any] = []
    return tensors, _without_tensors(value, tensors, is_tensor)


def _without_tensors(value: Any, taken: list[Any], is_tensor: Callable[[Any], bool]) -> Any:
    if is_tensor(value):
        taken.append(value)
        return _Place(len(taken) - 1)
    if type(value) in (tuple, list):
        return type(value)(_without_tensors(one, taken, is_tensor) for one in value)
    if type(value) is dict:
        return {key: _without_tensors(one, taken, is_tensor) for key, one in value.items()}
    return value


def put_together(form: Any, tensors: Sequence[Any]) -> Any:
    """The value that :func:`taken_apart` took apart, with these tensors in it."""
    if isinstance(form, _Place):
        return tensors[form.index]
    if type(form) in (tuple, list):
        return type(form)(put_together(one, tensors) for one in form)
    if type(form) is dict:
        return {key: put_together(one, tensors) for key, one in form.items()}
    return form


class Pools:
    """Errors of torch's passes by name; the first of them is the oracle."""

    def __init__(self) -> None:
        self._pools: dict[str, Pool] = {}

    def add(self, arrays: Arrays) -> None:
        """Takes them out of ``arrays``."""
        for name in list(arrays):
            if name in self._pools:
                self._pools[name].add(arrays.pop(name))
            else:
                self._pools[name] = Pool(arrays.pop(name))

    def take(self, plain: Mapping[str, np.ndarray]) -> dict[str, NoiseFloor]:
        """The floors of what ``plain`` has, with it among the runs; the rest waits."""
        found = {}
        for name, array in plain.items():
            pool = self._pools.pop(name)
            pool.add(array)
            found[name] = pool.floor()
        return found
