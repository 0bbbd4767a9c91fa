"""What is being done right now, on stderr: in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SILENCE = 15.0
"""Seconds after which a log is told what is going on."""


@contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Gives a function that takes what ``name`` has come to."""
    if not sys.stderr.isatty():
        yield _line_by_line(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    with Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True,
                  console=Console(stderr=True)) as shown:
        task: Any = shown.add_task(name, total=None)
        yield lambda told: shown.update(task, description=f"{name}: {told}")


def _line_by_line(name: str) -> Callable[[str], None]:
    """Tells on stderr what is being done, once ``SILENCE`` has passed since it last did."""
    started = told_at = time.monotonic()

    def tell(told: str) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= SILENCE:
            print(f"{name}: {told} ({now - started:.0f} s)", file=sys.stderr, flush=True)
            told_at = now
    return tell
