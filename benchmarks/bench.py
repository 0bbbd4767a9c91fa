"""What every claim measures with: checkpoints made when first wanted, commands timed, a page cache in a known state."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .shapes import Scale, Shape
from .synthetic import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
STOPWATCH = Path(__file__).with_name("stopwatch.py")
TIMEOUT_SECONDS = 3 * 3600
READ_BYTES = 8 << 20

Value = TypeVar("Value")


class Unmeasured(Exception):
    """A claim could not be measured. The message is one sentence that says why."""


@dataclass(frozen=True)
class Ran:
    """One command: wall and processor time in seconds, ``peak_rss`` in bytes."""

    seconds: float
    processor_seconds: float
    peak_rss: int
    code: int
    output: str


@dataclass
class Bench:
    """A scale, a scratch directory, and what has been made in it. ``tell`` says what is going on right now.

    ``wanted`` are the checkpoints that a later claim needs; they are not deleted.
    """

    scale: Scale
    directory: Path
    tell: Callable[[str], None] = lambda told: None
    wanted: frozenset[Shape] = frozenset()
    _known: dict[Hashable, object] = field(default_factory=dict)

    def run(self, *command: str | Path, accept: Sequence[int] = (0,)) -> Ran:
        """Run and measure a command in the scratch directory; :class:`Unmeasured` when its exit code is another."""
        log = self.directory / "log"
        arguments = [str(part) for part in command]
        process = subprocess.Popen([sys.executable, "-I", "-S", STOPWATCH, log, *arguments], cwd=self.directory,
                                   env=_environment(), start_new_session=True, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
        try:
            answer, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unmeasured(f"{_shown(arguments)} did not end in {TIMEOUT_SECONDS} s.") from error
            raise
        output = log.read_text("utf-8", "replace") if log.exists() else ""
        if process.returncode:
            raise Unmeasured(f"{_shown(arguments)} could not be started.")
        ran = Ran(**json.loads(answer), output=output)
        if ran.code not in accept:
            raise Unmeasured(f"{_shown(arguments)} ended with code {ran.code}: {last_words(output)}")
        return ran

    def python(self, *arguments: str | Path, accept: Sequence[int] = (0,)) -> Ran:
        """:meth:`run` with this interpreter; the project's packages can be imported."""
        return self.run(sys.executable, *arguments, accept=accept)

    def source(self, shape: Shape) -> Path:
        """The synthetic checkpoint of ``shape``."""
        path = self.directory / "sources" / shape.name
        if not path.exists():
            try:
                make_checkpoint(shape, path, advance=self._making(shape))
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
        return path

    def _making(self, shape: Shape) -> Callable[[int], None]:
        done, total = 0, shape.nbytes

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.tell(f"making {shape.name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
        return advance

    def convert(self, shape: Shape, output: Path, *flags: str) -> Ran:
        """Convert ``shape`` as a user does; the report goes to :attr:`reports`."""
        return self.python("-m", f"convert.{shape.family}", "--source", self.source(shape), "--output", output,
                           "--reports", self.reports, *flags)

    def converted(self, shape: Shape) -> str:
        """The run that converted ``shape``: its name beneath :attr:`reports`, and beneath :attr:`outputs`."""
        self.source(shape)
        if not (self.outputs / shape.name).exists():
            self.tell(f"converting {shape.name}")
            self.convert(shape, self.outputs / shape.name, "--no-verify")
        return shape.name

    @property
    def outputs(self) -> Path:
        return self.directory / "outputs"

    @property
    def reports(self) -> Path:
        return self.directory / "reports"

    def once(self, key: Hashable, measure: Callable[[], Value]) -> Value:
        """What ``measure`` gave the first time under ``key``: claims about one run share it."""
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def release(self, shape: Shape) -> None:
        """Delete the checkpoint of ``shape`` and what was converted from it, unless a later claim wants it."""
        for directory in (self.directory / "sources", self.outputs, self.reports) if shape not in self.wanted else ():
            shutil.rmtree(directory / shape.name, ignore_errors=True)

    def alternately(self, what: str, ours: Callable[[], float], rival: Callable[[], float],
                    pairs: int) -> tuple[list[float], list[float]]:
        """``pairs`` measurements of both, side by side; who goes first changes from pair to pair."""
        left: list[float] = []
        right: list[float] = []
        for number in range(pairs):
            self.tell(f"{what}, pair {number + 1} of {pairs}")
            sides = [(left, ours), (right, rival)]
            for samples, measure in sides if number % 2 == 0 else reversed(sides):
                samples.append(measure())
        return left, right

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A path at which a command may write; what is there is deleted before and after."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def settle(source: Path, *, warm: bool) -> None:
    """Nothing left to be written, and ``source`` wholly in the page cache, or wholly out of it."""
    os.sync()
    for file in sorted(source.iterdir()):
        handle = os.open(file, os.O_RDONLY)
        try:
            if not warm:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and os.read(handle, READ_BYTES):
                pass
        finally:
            os.close(handle)


def without_paths(text: str) -> str:
    """``text`` with the directories of absolute paths left out: results are published."""
    return re.sub(r"(?<![\w.:/])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)


def last_words(output: str) -> str:
    """The last line of a command's output that is no blank, without directories."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return without_paths(lines[-1])[:300] if lines else "it said nothing."


def _end(process: subprocess.Popen) -> None:
    """End the stopwatch and what it measures, which are a session of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shown(arguments: Sequence[str]) -> str:
    return without_paths(" ".join(arguments[:3]))


def _environment() -> dict[str, str]:
    """That of a user: byte code is kept, as it is wherever nobody forbids it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {"PYTHONPATH": str(ROOT), "GLOG_minloglevel": "3", "TOKENIZERS_PARALLELISM": "false",
                        "HF_HUB_OFFLINE": "1"}
