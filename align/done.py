"""What of a run was carried out already, and whether it would come out the same today."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from convert.cli import COMPANIONS
from convert.report import versions

from .runs import Run

FILE = "carried_out.txt"
READ_WHOLE = 64 << 20
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "pillow", "datasets", "sacrebleu", "paddlepaddle",
            "paddlepaddle-gpu", "paddlenlp", "numpy")
CODE = Path(__file__).parents[1]
BESIDE = ("config.json", *COMPANIONS, "*.py")


@dataclass(frozen=True)
class Done:
    """``key`` stands for everything that a stage of this run depends on, None where that is not known.

    In ``directory`` a line each says which stage came to which exit code under which key, and what its report was.
    """

    directory: Path
    key: str | None

    @classmethod
    def of(cls, run: Run, directory: Path, options: argparse.Namespace) -> Done:
        """A net or a family file of the user's own is code, and imports code, that is not known here: what it makes is
        never known to be the same.
        """
        if ":" in options.target or options.family:
            return cls(directory, None)
        hasher = xxhash.xxh3_128()
        hasher.update(f"run {run.name}\n".encode())
        for name in ("target", "device", "paging", "allow_same_framework", "trust_remote_code"):
            hasher.update(f"{name} {getattr(options, name)}\n".encode())
        for package, version in versions(*PACKAGES).items():
            hasher.update(f"{package} {version}\n".encode())
        files = [file for package in ("align", "convert", "models") for file in (CODE / package).rglob("*")
                 if file.is_file() and "__pycache__" not in file.parts]
        for file in sorted({*files, run.directory / "convert.json", *_files_of(run.source), *_files_of(run.output)}):
            hasher.update(f"{file} {_state(file)}\n".encode())
        return cls(directory, hasher.hexdigest())

    def code(self, stage: str) -> int | None:
        """How ``stage`` ended under this key; None where it has to be carried out."""
        key, report, code = self._lines().get(stage, ("", "", ""))
        return int(code) if key == self.key and report == self._report(stage) and code.isdecimal() else None

    def forget(self, stage: str) -> None:
        """``stage`` begins anew: until it comes to a verdict it is not done."""
        lines = self._lines()
        if lines.pop(stage, None):
            self._write(lines)

    def put(self, stage: str, code: int) -> None:
        """``stage`` came to a verdict, and its report is written."""
        report = self._report(stage)
        if self.key and report:
            self._write(self._lines() | {stage: (self.key, report, str(code))})

    def _write(self, lines: Mapping[str, tuple[str, str, str]]) -> None:
        text = "".join(f"{name} {' '.join(words)}\n" for name, words in lines.items())
        staged = self.directory / f".{FILE}.staged"
        staged.write_text(text, "utf-8")
        os.replace(staged, self.directory / FILE)

    def _lines(self) -> dict[str, tuple[str, str, str]]:
        try:
            words = [line.split() for line in (self.directory / FILE).read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError):
            return {}
        return {line[0]: (line[1], line[2], line[3]) for line in words if len(line) == 4}

    def _report(self, stage: str) -> str | None:
        try:
            return xxhash.xxh3_128((self.directory / f"{stage}.json").read_bytes()).hexdigest()
        except OSError:
            return None


def _files_of(place: Path) -> list[Path]:
    """All of a directory; of a checkpoint that is one file, also the config, the tokenizer and the code beside it."""
    if place.is_dir():
        return [file for file in place.rglob("*") if file.is_file()]
    return [place, *(file for pattern in BESIDE for file in place.parent.glob(pattern) if file.is_file())]


def _state(file: Path) -> str:
    """A file's digest; of one that is too large to be read for this, its size and when it was written and changed."""
    seen = file.stat()
    if seen.st_size > READ_WHOLE:
        return f"{seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}"
    return xxhash.xxh3_128(file.read_bytes()).hexdigest()
