"""Checkpoints of a training in ``reports/<run>/train/``: one ``.npz`` each, absent or whole, and never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from convert.errors import BadInput

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """Where one training is kept, every ``every`` steps. ``key`` says what training it is, ``resume`` whether one that
    was broken off goes on; else what is left of an earlier one is removed.
    """

    directory: Path
    name: str
    key: Mapping[str, Any] = field(repr=False)
    every: int
    resume: bool

    @property
    def file(self) -> Path:
        return self.directory / f"{self.name}.npz"

    def is_due(self, step: int) -> bool:
        return step % self.every == 0

    def save(self, arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> None:
        """Written beside, on disk, and then renamed, so that whoever looks finds the last one or this one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        growing = self.file.with_suffix(".growing")
        text = json.dumps({"key": dict(self.key), "told": dict(told)}).encode()
        with open(growing, "wb") as file:
            np.savez(file, told=np.frombuffer(text, np.uint8), **{f"array/{name}": array
                                                                  for name, array in arrays.items()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(growing, self.file)

    def load(self) -> tuple[Arrays, dict[str, Any]] | None:
        """What was saved last, None where there is nothing to go on from; :class:`BadInput` where it is of another
        training, or damaged."""
        if not self.resume:
            self.remove()
        if not self.file.is_file():
            return None
        try:
            with np.load(self.file, allow_pickle=False) as content:
                told = json.loads(content["told"].tobytes())
                there, state = dict(told["key"]), dict(told["told"])
                arrays = {name.removeprefix("array/"): content[name] for name in content.files if name != "told"}
        except (OSError, EOFError, ValueError, TypeError, KeyError, BadZipFile) as error:
            raise BadInput(f"{self.file} is damaged ({error}). Leave --resume out to begin anew.") from error
        here = json.loads(json.dumps(dict(self.key)))
        other = next((name for name in {**there, **here} if there.get(name) != here.get(name)), None)
        if other is not None:
            raise BadInput(f"{self.file} is of another training: its {other} is {there.get(other)}, now it is "
                           f"{here.get(other)}. Give the same flags, or leave --resume out to begin anew.")
        return arrays, state

    def remove(self) -> None:
        for file in (self.file, self.file.with_suffix(".growing")):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # others are kept there still, or nothing ever was
            self.directory.rmdir()
