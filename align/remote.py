"""Torch's classes where a checkpoint brings them along as code of its own, which runs only if the user says so."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from convert.errors import BadInput

from .candidate import blamed
from .runs import Run

ENTRIES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
LOADED = "transformers_modules"
"""The package in which transformers keeps such code."""
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*")


def code_of(run: Run) -> list[Path]:
    """The files of code beside the source, the one that the config names first; :class:`BadInput` where it is not."""
    directory = run.source if run.source.is_dir() else run.source.parent
    named = directory / f"{_module_of(run)}.py"
    if not named.is_file():
        raise BadInput(f"the torch side of {run.family.name} is code that the checkpoint brings along, and "
                       f"{named.name}, which its config.json names, is not in {directory}. Get it from where the "
                       "weights are from.")
    return [named, *sorted(file for file in directory.glob("*.py") if file != named)]


def class_of(run: Run, trusted: bool) -> Any:
    """The class of the head, out of the checkpoint's own code. Nothing of it runs unless ``trusted``."""
    files = code_of(run)
    if not trusted:
        raise BadInput(f"the torch side of {run.family.name} is code that the checkpoint brings along: "
                       f"{', '.join(file.name for file in files)} in {files[0].parent}. It can do whatever you can, "
                       "and is not run unless you say so. Read it, then give --trust-remote-code.")
    print("--trust-remote-code: running code that the checkpoint brings along, in "
          f"{files[0].parent}: {described(files)}.", file=sys.stderr)
    return _load(f"{_module_of(run)}.{run.head.architecture}", files)


def described(files: list[Path]) -> str:
    """The files with their digests, so that a report says which code it is about."""
    return ", ".join(f"{file.name} (xxh3-128 {_digest(file)})" for file in files)


def is_remote(model: Any) -> bool:
    """Whether a model's class is code that a checkpoint brought along."""
    return type(model).__module__.startswith(f"{LOADED}.")


def _load(reference: str, files: list[Path]) -> Any:
    """The class ``module.Class`` through transformers, from copies in a directory that is named after their digests.

    transformers takes a dot in the directory's name (chatglm-6b-v1.1) for that of a package, and the code of two
    directories of one name for the same. What it has loaded before it keeps, with whatever has been done to it since;
    here the files are executed anew for every reference.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    name = xxhash.xxh3_128("".join(f"{file.name} {_digest(file)}\n" for file in files).encode()).hexdigest()
    with TemporaryDirectory() as scratch, blamed("the checkpoint's own code"):
        directory = Path(scratch) / f"code_{name}"
        directory.mkdir()
        for file in files:
            shutil.copyfile(file, directory / file.name)
        for module in [module for module in sys.modules if module.startswith(f"{LOADED}.{directory.name}.")]:
            del sys.modules[module]
        return get_class_from_dynamic_module(reference, str(directory))


def _digest(file: Path) -> str:
    return xxhash.xxh3_128(file.read_bytes()).hexdigest()


def _module_of(run: Run) -> str:
    """The module of the checkpoint that its config's ``auto_map`` names; code that lies elsewhere is refused."""
    entries = run.config.get("auto_map")
    entries = entries if isinstance(entries, Mapping) else {}
    named = next((entries[entry] for entry in ENTRIES if entry in entries), None)
    if named is None:
        raise BadInput(f"the torch side of {run.family.name} is code that the checkpoint brings along, and config.json "
                       f"does not say where: it has no auto_map with {' or '.join(ENTRIES)}.")
    found = REFERENCE.fullmatch(named) if isinstance(named, str) else None
    if found is None:
        raise BadInput(f"config.json: auto_map names {str(named)[:80]!r}; only code beside the weights is run, named "
                       f"as modeling_{run.family.name}.{run.head.architecture} is.")
    return found.group(1)
