"""Somebody else's modules while we look at them: whatever a pass changes in them is undone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def untouched(modules: Iterable[Any]) -> Iterator[None]:
    """Attributes, what they list, parameters, buffers, hooks, and the values of buffers are afterwards what they were.

    ``modules`` are all modules of one net, torch's or Paddle's, which keep everything in their ``__dict__``. A table
    of angles that a module made in float64 and kept is undone so too.
    """
    held = [(vars(module), dict(vars(module)), [(table, kind(table)) for table in vars(module).values()
                                                for kind in (dict, list, set) if isinstance(table, kind)])
            for module in modules]
    buffers = [(buffer, buffer.detach().clone()) for attributes, _, _ in held
               for buffer in attributes.get("_buffers", {}).values() if buffer is not None and is_filled(buffer)]
    try:
        yield
    finally:
        for attributes, before, tables in held:
            attributes.clear()
            attributes.update(before)
            for table, content in tables:
                table.clear()
                (table.extend if isinstance(table, list) else table.update)(content)
        for buffer, values in buffers:
            _fill(buffer, values)


@contextmanager
def same_luck() -> Iterator[None]:
    """The random generators of Python, numpy, torch and Paddle go on afterwards from where they are."""
    import paddle
    import torch
    held = random.getstate(), np.random.get_state(), torch.get_rng_state(), paddle.get_rng_state()
    try:
        yield
    finally:
        random.setstate(held[0])
        np.random.set_state(held[1])
        torch.set_rng_state(held[2])
        paddle.set_rng_state(held[3])


def is_filled(tensor: Any) -> bool:
    """Whether a tensor has values; Paddle's recurrent nets keep one that is made when they train."""
    return not hasattr(tensor, "_is_initialized") or tensor._is_initialized()


def _fill(buffer: Any, values: Any) -> None:
    if hasattr(buffer, "set_value"):
        buffer.set_value(values)
    else:
        buffer.detach().copy_(values)
