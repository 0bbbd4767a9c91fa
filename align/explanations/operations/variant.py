"""What an idea of the catalogue yields: a change that makes the reference compute something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..place import Place
from ..surgery import Change


@dataclass(frozen=True)
class Variant:
    """``change`` makes the reference compute something else; ``told`` follows the subject in a sentence.

    ``extent`` is how many tensors or modules it changes: of two that fit, the narrower one is told.
    """

    kind: str
    subject: str
    told: str
    change: Change
    extent: int = 1


@dataclass(frozen=True)
class Dial:
    """A variant with one positive number in it. ``grid`` is where the search for it starts."""

    kind: str
    subject: str
    told: Callable[[float], str]
    change: Callable[[float], Change]
    grid: tuple[float, ...]
    extent: int = 1

    def at(self, number: float) -> Variant:
        return Variant(self.kind, self.subject, self.told(number), self.change(number), self.extent)


@dataclass(frozen=True)
class Idea:
    about: str
    variants: Callable[[Place], Iterable[Variant | Dial]]
