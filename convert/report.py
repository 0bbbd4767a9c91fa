"""The record of a conversion: ``reports/<run>/convert.json`` for programs, ``convert.md`` for people."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .rules import Family, Rule

if TYPE_CHECKING:
    from .plan import Plan

SCHEMA = "paddle-parity/1"


SIDES = {"convert": ("torch", "Paddle"), "back": ("Paddle", "torch")}
"""From where to where a stage converts."""


@dataclass(frozen=True)
class Conversion:
    """Everything that is known about one conversion once it is over. Digests are xxh3-128, times seconds."""

    run: str
    family: str
    head: str
    source: str
    path: str
    revision: str | None
    output: str
    format: str
    dtype: str
    files: list[str]
    tensors: list[dict[str, Any]]
    dropped: list[dict[str, str]]
    verified: bool
    bytes: int
    source_digest: str
    target_digest: str
    seconds: float
    peak_rss_bytes: int
    versions: dict[str, str]
    notes: list[str]
    finished: str
    stage: str = "convert"
    schema: str = SCHEMA

    def save(self, reports: Path) -> Path:
        """Write both files into ``reports/<run>/``, and return the directory.

        A conversion takes the place of an earlier one and of everything that was checked about it.
        """
        directory = reports / self.run
        if self.stage == "convert" and (directory / "convert.json").is_file():
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (directory / f"{self.stage}.json").write_text(content, "utf-8")
        (directory / f"{self.stage}.md").write_text(self.markdown(), "utf-8")
        return directory

    def markdown(self) -> str:
        """The report to paste into a pull request."""
        source, target = SIDES[self.stage]
        cast = "" if self.dtype == "keep" else f" rounded to {self.dtype}"
        proof = (f"every tensor was read back, inverted and compared with its source{cast}, bit by bit"
                 if self.verified else "**not verified** (`--no-verify`)")
        facts = [("head", self.head), ("source", self.source), ("revision", self.revision or "–"),
                 ("output", self.output), ("format, dtype", f"{self.format}, {self.dtype}"),
                 ("tensors", f"{len(self.tensors)} ({self.bytes:,} bytes in {len(self.files)} file(s))"),
                 ("source digest", f"`{self.source_digest}`"), ("target digest", f"`{self.target_digest}`"),
                 ("time, peak memory", f"{self.seconds:.2f} s, {self.peak_rss_bytes / 1e6:,.0f} MB"),
                 ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items()))]
        made = [tensor for tensor in self.tensors if tensor["rule"] == "buffer"]
        lines = [f"# {self.run}: {self.family} converted from {source} to {target}", "", f"Proof: {proof}.", "",
                 "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in facts]
        lines += [f"\n> {note}" for note in self.notes]
        lines += ["", f"## Buffers: what {target} wants beyond the source", ""]
        lines += [f"- `{tensor['target']}`: {tensor['filling']}" for tensor in made] or ["None."]
        lines += ["", f"## Dropped: what {target} has no place for", ""]
        lines += [f"- `{item['source']}`: {item['why']}" for item in self.dropped] or ["None."]
        lines += ["", "## Every tensor", "", "| source | target | rule | shape | dtype |",
                  "| --- | --- | --- | --- | --- |"]
        lines += [f"| {_code(tensor['source'])} | `{tensor['target']}` | {tensor['rule']}"
                  f"{' (transposed)' if tensor['transposed'] else ''} | {tensor['shape']} | {tensor['dtype']} |"
                  for tensor in self.tensors]
        return "\n".join(lines) + "\n"


def refuse_unwritable(reports: Path) -> None:
    """:class:`BadInput` when no report can be written to ``reports``; asked before a long conversion."""
    existing = next(path for path in (reports.absolute(), *reports.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"--reports {reports}: {existing} is not a directory that can be written to.")


def tensor_rows(plan: Plan, source_digests: dict[str, str], target_digests: dict[str, str]) -> list[dict[str, Any]]:
    """One row per target tensor; shapes and dtypes are the target's."""
    return [{
        "source": move.source or None, "target": move.target, "rule": move.kind, "shape": list(move.shape),
        "dtype": move.dtype.name, "transposed": move.transposed, "filling": move.filling and move.filling.name,
        "source_digest": " + ".join(source_digests[name] for name in move.sources) or None,
        "target_digest": target_digests.get(move.target),
    } for move in plan.moves]


def load_conversion(directory: Path) -> Conversion:
    """What ``reports/<run>/convert.json`` says; :class:`BadInput` when it is damaged or of another version."""
    try:
        content = json.loads((directory / "convert.json").read_text("utf-8"))
        if content.get("schema") != SCHEMA:
            raise BadInput(f"{directory.name}: convert.json has schema {content.get('schema')!r}, this version writes "
                           f"{SCHEMA}. Convert again.")
        return Conversion(**content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"the report of run {directory.name} cannot be read ({error}). Convert again.") from error


def latest_run(reports: Path) -> str:
    """The run whose conversion finished last; :class:`BadInput` when there is none."""
    runs = []
    for file in reports.glob("*/convert.json"):
        with suppress(BadInput):  # a damaged report is told when its run is asked for by name
            runs.append(load_conversion(file.parent))
    if not runs:
        raise BadInput(f"there is no run in {reports}. Convert a model first: python -m convert.gptj")
    return max(runs, key=lambda conversion: conversion.finished).run


def versions(*packages: str) -> dict[str, str]:
    """Python and those of ``packages`` that are installed."""
    from importlib.metadata import PackageNotFoundError, version
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def print_rules(family: Family, stage: str = "convert") -> None:
    """The name map, the do-not-transpose list, the buffers and what is dropped, as tables."""
    console, (source, target) = _console(), SIDES[stage]
    shared = {id(rule) for rule in family.rules}
    everywhere = [(rule, "") for rule in family.rules]
    of_heads = [(rule, head.architecture) for head in family.heads for rule in head.rules if id(rule) not in shared]
    rules = everywhere + of_heads
    moved = [(rule, head) for rule, head in rules if rule.moves]
    console.print(_table(f"{family.name}: name map, {source} to {target} (shapes as {source} has them; T = transposed)",
                         ("name", "shape", "T"),
                         [(_mapped(rule, head), _shape(rule), "T" if rule.transposed else "") for rule, head in moved]))
    console.print(_table("do not transpose: two dimensions, and the same layout on both sides", (target, "shape"),
                         [("\n".join(rule.targets) + _only(head), _shape(rule)) for rule, head in rules
                          if len(rule.shape) == 2 and not rule.transposed and rule.targets]))
    made = [(rule.targets[0] + _only(head), rule.otherwise.name) for rule, head in rules
            if rule.otherwise and rule.targets]
    if made:
        console.print(_table(f"buffers: made here, because {target} wants them and {source} may not save them",
                             (target, "filled with"), made))
    dropped = [(rule.sources[0][0], rule.why or f"{rule.otherwise.name}: {target} has one parameter for both")
               for rule, _ in rules if not rule.targets]
    if dropped:
        console.print(_table("dropped", (source, "why"), dropped))


def print_plan(plan: Plan, files: Sequence[tuple[str, int]], output: Path, stage: str = "convert") -> None:
    """What a conversion would do: every tensor, bytes, shards, expected memory."""
    from .stream import expected_memory
    console, (source, target) = _console(), SIDES[stage]
    console.print(_table(f"{plan.family.name} ({plan.head.architecture}): {len(plan.moves)} tensors",
                         ("name", f"shape in {target}", "dtype", "bytes", "T"), [
        (_arrow(move.origin, move.target), str(list(move.shape)), move.dtype.name,
         f"{move.nbytes:,}", "T" if move.transposed else "") for move in plan.moves]))
    if plan.dropped:
        console.print(_table("dropped", (source, "why"), plan.dropped))
    for name, size in files:
        console.print(f"{output / name}: {size:,} bytes")
    console.print(f"in all {plan.nbytes:,} bytes of tensors in {len(files)} file(s); expected memory at most "
                  f"{expected_memory() / 1e6:,.0f} MB. Nothing was written (--dry-run).")


def _console() -> Any:
    """As wide as the terminal; wide enough for the longest names where the output goes to a file."""
    from rich.console import Console
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    table = Table(title=title.replace("[", r"\["), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    return table


def _mapped(rule: Rule, head: str) -> str:
    sources = "\n+\u00a0".join("\nor\u00a0".join(names) for names in rule.sources)
    return _arrow(sources, "\n+\u00a0".join(rule.targets)) + _only(head)


def _arrow(source: str, target: str) -> str:
    return source if source == target else f"{source}\n→\u00a0{target}"


def _only(head: str) -> str:
    return f"\n({head} only)" if head else ""


def _shape(rule: Rule) -> str:
    words = (" + ".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in rule.shape)
    return f"[{', '.join(words)}]" + (f", {rule.groups} by {rule.groups}" if rule.groups != 1 else "")


def _code(name: str | None) -> str:
    return f"`{name}`" if name else "–"
