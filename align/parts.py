"""Parts of a fused tensor by name: ``h.0.attn.fused.weight[64:128]`` is what Paddle has as ``k_proj.weight``.

The brackets hold columns, ``[64:128, :]`` rows; of the module ``h.0.attn.fused[64:128]`` they are channels of what it
gives. A name without them is a whole tensor or module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from convert.rules import Gather

Index = tuple[Any, ...]
Parts = tuple[tuple[str, str], ...]
"""(torch path, Paddle name) of each."""
PART = re.compile(r"(?P<whole>.+)\[(?P<start>\d+):(?P<stop>\d+)(?P<rows>, :)?\]")


def part_name(name: str, gather: Gather) -> str | None:
    """What the part that ``gather`` takes of the tensor ``name`` is called; None where it is not in one piece."""
    if gather.part is None or gather.groups > 1:
        return None
    start = sum(gather.widths[: gather.part])
    return f"{name}[{start}:{start + gather.widths[gather.part]}{', :' * gather.leading}]"


def part_of_output(parameter: str, module: str) -> str:
    """``module`` with the channels that the part ``parameter`` of its weight makes."""
    found = PART.fullmatch(parameter)
    return f"{module}[{found['start']}:{found['stop']}]" if found else module


def whole(name: str) -> str:
    """The name of the tensor or module that ``name`` is a part of."""
    found = PART.fullmatch(name)
    return found["whole"] if found else name


def index_of(name: str) -> Index:
    """``array[index_of(name)]`` is the part of the whole ``array``."""
    found = PART.fullmatch(name)
    if not found:
        return (...,)
    part = slice(int(found["start"]), int(found["stop"]))
    return (part,) if found["rows"] else (..., part)


def by_module(modules: Iterable[tuple[str, str]]) -> list[tuple[str, Parts]]:
    """Each torch module once, with the parts of it that are among ``modules``."""
    found: dict[str, Parts] = {}
    for path, name in modules:
        found[whole(path)] = (*found.get(whole(path), ()), (path, name))
    return list(found.items())
