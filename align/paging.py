"""Models larger than memory: a module's weights come in when its gate opens, and leave when the next one opens.

What is said here holds for both frameworks; how a tensor is given to a layer and taken away again is theirs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from .runs import Run

SLACK = 3 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


class Slot(Protocol):
    """One parameter of a model, under one or more names, with or without its values in memory.

    ``fill`` is given the memory for them, float32 [elements], and may use it until it is released.
    """

    names: Sequence[str]
    elements: int

    def fill(self, memory: np.ndarray) -> None: ...

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


class Frame:
    """Memory for ``elements`` of float32, lent as one array at a time, in huge pages where the system has them."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._memory = mmap.mmap(-1, max(1, 4 * elements), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._lent: Callable[[], np.ndarray | None] = lambda: None

    @property
    def free(self) -> bool:
        """Whether nothing refers to the array that was lent last, nor to any part or tensor of it."""
        return self._lent() is None

    def lend(self) -> np.ndarray:
        array = np.frombuffer(self._memory, np.float32, self.elements)
        self._lent = weakref.ref(array)
        return array


class Frames:
    """The memory of the last page, used again for the next: a fresh gigabyte costs more time than reading into it."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []

    def lend(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """An array for each of ``sizes``, in elements. What fits none of them is given back first."""
        kept: dict[int, list[Frame]] = {}
        for size in sizes:
            found = next((frame for frame in self._frames if frame.free and frame.elements == size), None)
            if found is not None:
                self._frames.remove(found)
                kept.setdefault(size, []).append(found)
        self._frames = []
        self._frames = [kept[size].pop() if kept.get(size) else Frame(size) for size in sizes]
        return [frame.lend() for frame in self._frames]


FRAMES = Frames()
"""Of the whole process: its two sides take turns, and have no page in at the same time."""


class Pages:
    """The slots of a model by gate; only one gate's are filled at a time."""

    def __init__(self, division: Division, slot: Callable[[Sequence[str]], Slot]) -> None:
        _give_memory_back()
        self._pages = {gate: [slot(names) for names in groups] for gate, groups in division.pages.items()}
        self._resident = [slot(names) for names in division.resident]
        self._open: Sequence[Slot] = ()
        self._unseen: list[Slot] = []
        self._look: Callable[[Slot], None] = lambda slot: None
        for one in self._resident:
            one.fill(np.empty(one.elements, np.float32))

    def enter(self, gate: str) -> None:
        """Make room, and bring in what ``gate`` needs."""
        entering = self._pages.get(gate, ())
        if self._open is entering:
            return
        for slot in self._open:
            slot.release()
        self._open = entering
        _trim()
        if entering:
            for slot, memory in zip(entering, FRAMES.lend([slot.elements for slot in entering]), strict=True):
                slot.fill(memory)
            self._see(entering)

    def show(self, look: Callable[[Slot], None]) -> None:
        """``look`` is shown every slot once: now where it is filled, else when it is filled for the first time."""
        self._look = look
        self._unseen = [*self._resident, *(slot for slots in self._pages.values() for slot in slots)]
        self._see([*self._resident, *self._open])

    def show_rest(self) -> None:
        """Bring in what has not been filled since :meth:`show`."""
        for gate, slots in self._pages.items():
            if any(slot in self._unseen for slot in slots):
                self.enter(gate)
        self.leave()

    def _see(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot in self._unseen:
                self._unseen.remove(slot)
                self._look(slot)

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
    elements = sum(prod(move.source_shape) for move in run.plan.moves if move.sources)
    return sides * 4 * elements + SLACK > available_memory()


def threads() -> int:
    """How many threads to compute with: OMP_NUM_THREADS where it is set, as torch takes it, else one a core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


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
    """Let glibc return large freed arrays to the system at once, and not gather one heap per thread.

    Large is 4 MB. Below, memory is used again until a page leaves: its faults would cost more than the arithmetic on
    it. Above, numpy and torch ask for huge pages, which are few; and a heap with holes of that size grows and grows.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 4 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        mallopt(M_ARENA_MAX, 1)


def _trim() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _home(name: str, gates: Sequence[str]) -> str | None:
    return next((gate for gate in gates if name.startswith(f"{gate}.")), None)
