"""Models larger than memory: a module's weights come in when its gate opens, and leave when the next one opens.

What is said here holds for both frameworks; how a tensor is given to a layer and taken away again is theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .runs import Run

SLACK = 3 << 30
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8


class Slot(Protocol):
    """One parameter of a model, under one or more names, with or without its values in memory."""

    names: Sequence[str]

    def fill(self) -> None: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Division:
    """Which parameters come and go with which gate, by name, and which stay: groups of names of one parameter."""

    pages: Mapping[str, Sequence[Sequence[str]]]
    resident: Sequence[Sequence[str]]


def gates_of(modules: Sequence[str], parameters: Collection[str], leaves: Collection[str]) -> list[str]:
    """The outermost of the recorded ``modules``, and every leaf module outside them that owns a parameter.

    Paths are of one side; ``leaves`` are the modules without modules of their own.
    """
    outermost = [path for path in modules if not any(path.startswith(f"{other}.") for other in modules)]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return outermost + [path for path in owners if path in leaves and _home(path + ".", outermost) is None]


def divide(owners: Mapping[str, int], gates: Sequence[str]) -> Division:
    """``owners`` says which object (its id) is meant by each parameter name. What two gates share stays in memory."""
    groups: dict[int, list[str]] = {}
    for name, identity in owners.items():
        groups.setdefault(identity, []).append(name)
    pages: dict[str, list[list[str]]] = {}
    resident = []
    for names in groups.values():
        homes = {_home(name, gates) for name in names}
        home = homes.pop()
        if homes or home is None:
            resident.append(names)
        else:
            pages.setdefault(home, []).append(names)
    return Division(pages, resident)


class Pages:
    """The slots of a model by gate; only one gate's are filled at a time."""

    def __init__(self, division: Division, slot: Callable[[Sequence[str]], Slot]) -> None:
        _give_memory_back()
        self._pages = {gate: [slot(names) for names in groups] for gate, groups in division.pages.items()}
        self._resident = [slot(names) for names in division.resident]
        self._open: Sequence[Slot] = ()
        for one in self._resident:
            one.fill()

    def enter(self, gate: str) -> None:
        """Make room, and bring in what ``gate`` needs."""
        entering = self._pages.get(gate, ())
        if self._open is entering:
            return
        for slot in self._open:
            slot.release()
        _trim()
        self._open = entering
        for slot in entering:
            slot.fill()

    def leave(self) -> None:
        """Release whatever is in."""
        self.enter("")

    def each(self) -> Iterator[Slot]:
        """Every slot of the model, filled while it is looked at."""
        yield from self._resident
        for gate in self._pages:
            self.enter(gate)
            yield from self._pages[gate]
        self.leave()


def is_needed(run: Run, sides: int) -> bool:
    """Whether ``sides`` models of ``run``, in float32, do not fit into the free memory together."""
    from math import prod
    elements = sum(prod(move.source_shape) for move in run.plan.moves if move.source)
    return sides * 4 * elements + SLACK > available_memory()


def available_memory() -> int:
    """Bytes that a new process could use without swapping, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return min([free, *_left_to_container()])


def _left_to_container() -> Iterator[int]:
    """What a control group (version 2) leaves of its limit."""
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{word}" for word in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        yield max(0, int(limit.read_text()) - int(used.read_text()))


def _give_memory_back() -> None:
    """Let glibc return freed arrays to the system at once, and not gather one heap per thread."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_ARENA_MAX, 1)


def _trim() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _home(name: str, gates: Sequence[str]) -> str | None:
    return next((gate for gate in gates if name.startswith(f"{gate}.")), None)
