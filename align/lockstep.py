"""Several passes of one model that advance together: each halts at a gate until all the others have come there too.

A gate is a module that every pass enters: a block, an embedding, a head. Because the passes go through it one after
another, its weights come into memory once for all of them, and what one recorded there can be fed to the next.
Each pass is ordinary code that calls the model, in a thread of its own; only one of them runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .paging import Pages

Enter = Callable[[str], None]
Tell = Callable[[str], None]
TOGETHER = 16
_thread = threading.local()


def halt(gate: str) -> bool:
    """Called by the model where it reaches a gate: waits until the gate opens. False where no walk is under way."""
    walk: _Walk | None = getattr(_thread, "walk", None)
    if walk is not None:
        walk.halt(gate)
    return walk is not None


@contextmanager
def heard_by(listener: Any) -> Iterator[None]:
    """What the model's hooks tell in this pass goes to ``listener``; other passes have others, in their own threads."""
    before = listener_here(), getattr(_thread, "answered", None)
    _thread.listener, _thread.answered = listener, set()
    try:
        yield
    finally:
        _thread.listener, _thread.answered = before


def listener_here() -> Any:
    """Who listens to the pass that is under way in this thread, None for nobody."""
    return getattr(_thread, "listener", None)


def is_first_call(path: str) -> bool:
    """Whether the module at ``path`` has not answered yet in the pass that is under way in this thread.

    One that is called more often, as the embedding that an encoder and a decoder share, is heard the first time only:
    it has one name, and what enters it later is not what entered it at first.
    """
    return path not in (getattr(_thread, "answered", None) or ())


def has_answered(path: str) -> None:
    """Told by a module that is listened to."""
    if listener_here() is not None:
        _thread.answered.add(path)


class Walks:
    """Passes under way. ``gate`` is where all of them wait, None once they have ended."""

    def __init__(self, passes: Sequence[Callable[[], None]], enter: Enter) -> None:
        self._walks = [_Walk(run) for run in passes]
        self._enter = enter
        self.gate: str | None = None

    def advance(self) -> None:
        """Open the gate: every pass goes on to the next one, in the order given. What a pass raises is raised here."""
        if self.gate is not None:
            self._enter(self.gate)
        for walk in self._walks:
            walk.resume()
        gates = {walk.gate for walk in self._walks}
        if len(gates) > 1:
            raise RuntimeError(f"passes of one model came to different gates: {sorted(map(str, gates))}")
        self.gate = gates.pop()

    def close(self) -> None:
        for walk in self._walks:
            walk.abandon()


@contextmanager
def in_step(passes: Sequence[Callable[[], None]], enter: Enter) -> Iterator[Walks]:
    """All ``passes`` brought to their first gate; those that have not ended when the block is left are abandoned.

    ``enter(gate)`` is told each gate just before the first pass goes through it.
    """
    walks = Walks(passes, enter)
    try:
        walks.advance()
        yield walks
    finally:
        walks.close()


def in_turn(passes: Sequence[Callable[[], None]], tell: Tell = lambda told: None) -> None:
    """One pass after the other."""
    for number, run in enumerate(passes, 1):
        if len(passes) > 1:
            tell(f"pass {number} of {len(passes)}")
        run()


def together(passes: Sequence[Callable[[], None]], pages: Pages, tell: Tell = lambda told: None) -> None:
    """Passes through each gate before the next, so that each page comes in once for as many as go together."""
    for start in range(0, len(passes), TOGETHER):
        some = passes[start: start + TOGETHER]
        told = f", passes {start + 1} to {start + len(some)} of {len(passes)}" if len(passes) > 1 else ""
        with in_step(some, pages.enter) as walks:
            while walks.gate is not None:
                tell(f"{walks.gate}{told}")
                walks.advance()
    pages.leave()


class _Abandoned(BaseException):
    """Nobody waits for this pass any more."""


class _Walk:
    def __init__(self, run: Callable[[], None]) -> None:
        self.gate: str | None = None
        self._run, self._error, self._abandoned = run, None, False
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._walk, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Run to the next gate, or to the end."""
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def halt(self, gate: str) -> None:
        self.gate = gate
        self._done.release()
        self._turn.acquire()
        if self._abandoned:
            raise _Abandoned
        self.gate = None

    def abandon(self) -> None:
        self._abandoned = True
        self._turn.release()
        self._thread.join()

    def _walk(self) -> None:
        _thread.walk = self
        self._turn.acquire()
        try:
            if not self._abandoned:
                with suppress(_Abandoned):
                    self._run()
        except BaseException as error:  # it is raised again where the others are waited for
            self._error = error
        finally:
            self.gate = None
            self._done.release()
