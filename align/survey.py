"""``python -m align.survey``: which of PaddleNLP's own classes compute what torch computes, and which do not, and why.

For every family and head that PaddleNLP has a class for, and every variant of its config, a tiny random checkpoint is
converted and taken through all stages with ``--target paddlenlp``; for comparison our own nets go the same way. The
table goes to the terminal and, with ``--readme FILE``, between the ``paddlenlp`` markers of that file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convert import errors
from convert.__main__ import families, family_named
from convert.cli import main as convert
from convert.demo import build_demo
from convert.rules import Config, Family, Head

from . import forward, loss, metric, weights
from .stage import main as align

STAGES = (weights.STAGE, forward.STAGE, metric.STAGE, loss.STAGE)
BEGIN, END = "<!-- paddlenlp -->", "<!-- /paddlenlp -->"
SIGNS = {errors.ALIGNED: "ok", errors.DIVERGED: "**diverged**", errors.BAD_INPUT: "**fails**"}


@dataclass(frozen=True)
class Case:
    """One class with one config: ``changes`` to the demo's, told as ``variant``."""

    family: Family
    head: Head
    variant: str
    changes: Config


@dataclass(frozen=True)
class Found:
    """How a stage ended: its exit code, its report if it came to one, and what it said."""

    stage: str
    code: int
    report: Mapping[str, Any]
    said: str

    @property
    def why(self) -> str | None:
        """The explanation of a divergence, else the first failure, else the sentence it ended with."""
        if self.code == errors.ALIGNED:
            return None
        if not self.report:
            return f"{self.stage}: {self.said.removeprefix('error: ')}"
        diagnosis, failures = self.report.get("diagnosis"), self.report["failures"]
        return f"{self.stage}: {diagnosis['sentence'] if diagnosis else next(iter(failures), 'diverged')}"


@dataclass(frozen=True)
class Row:
    """A case through all stages, with PaddleNLP's class and with ours."""

    case: Case
    theirs: Sequence[Found]
    ours: Sequence[Found]

    @property
    def right(self) -> bool:
        return all(found.code == errors.ALIGNED for found in self.theirs)

    def cells(self) -> list[str]:
        whys = dict.fromkeys(found.why for found in self.theirs if found.why)
        aligned = all(found.code == errors.ALIGNED for found in self.ours)
        return [self.case.family.name, f"`{self.case.head.paddlenlp}`", self.case.variant,
                *(SIGNS.get(found.code, f"exit {found.code}") for found in self.theirs),
                "ok" if aligned else "**not aligned**", "<br>".join(map(_cell, whys))]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all was run, whatever was found; our own nets diverging is 1."""
    parser = argparse.ArgumentParser(prog="python -m align.survey", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--family", action="append", choices=families(), help="only this one; may be given repeatedly")
    parser.add_argument("--readme", metavar="FILE", help="gets the table between its paddlenlp markers")
    options = parser.parse_args(arguments)
    return errors.guarded(lambda: _run(options.family or families(), options.readme and Path(options.readme)))


def cases(names: Iterable[str]) -> Iterator[Case]:
    """Every head as in the demo, then the demo's head in every variant."""
    for name in names:
        family = family_named(name)
        heads = [head for head in family.heads if head.paddlenlp]
        for head in heads:
            yield Case(family, head, "", {"architectures": [head.architecture]})
        first = family.head(family.demo["architectures"][0])
        if first in heads:
            for variant, changes in family.variants.items():
                yield Case(family, first, variant, changes)


def survey(case: Case) -> Row:
    """The stages of a case, in a directory of their own."""
    with TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        source = build_demo(case.family, Path("source"), case.changes)
        code, said = _quietly(convert, case.family, ["--source", str(source), "--output", "out/net"])
        if code != errors.ALIGNED:
            refused = [Found("convert", code, {}, said)]
            return Row(case, refused * len(STAGES), refused)
        return Row(case, _stages("paddlenlp"), _stages("models"))


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    titles = ("family", "PaddleNLP's class", "variant", *(stage.name for stage in STAGES), "ours", "why")
    lines = [titles, ["---"] * len(titles), *(row.cells() for row in rows)]
    right = sum(row.right for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\n{right} of {len(rows)} are right in every stage. Tiny random checkpoints, float32, CPU; made by `python "
        "-m align.survey --readme README.md`.\n")


def _run(names: Sequence[str], readme: Path | None) -> int:
    if readme is not None:
        _around_the_table(readme)
    chosen = list(cases(names))
    rows = []
    for number, case in enumerate(chosen, 1):
        rows.append(survey(case))
        told = f"{case.head.paddlenlp} {case.variant}".rstrip()
        print(f"[{number} of {len(chosen)}] {told}: {'right' if rows[-1].right else 'not right'}", file=sys.stderr)
    if readme is not None:
        _insert(readme, table(rows))
    print(table(rows))
    return errors.ALIGNED if all(found.code == errors.ALIGNED for row in rows for found in row.ours) else (
        errors.DIVERGED)


def _stages(target: str) -> list[Found]:
    return [_found(stage, target) for stage in STAGES]


def _found(stage: Any, target: str) -> Found:
    """``--trust-remote-code``, because what a demo brings along is ours."""
    code, said = _quietly(align, stage, ["--run", "net", "--target", target, "--trust-remote-code"])
    file = Path("reports/net") / ("" if target == "models" else target) / f"{stage.name}.json"
    return Found(stage.name, code, json.loads(file.read_text("utf-8")) if file.is_file() else {}, said)


def _quietly(command: Any, subject: Any, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and the last line on stderr."""
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        code = command(subject, arguments)
    return code, next(iter(told.getvalue().strip().splitlines()[-1:]), "")


def _insert(readme: Path, text: str) -> None:
    before, after = _around_the_table(readme)
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}", "utf-8")


def _around_the_table(readme: Path) -> tuple[str, str]:
    """What stands before and behind the markers."""
    if not readme.is_file():
        raise errors.BadInput(f"--readme {readme} does not exist. Give a file that has {BEGIN} and {END} in it.")
    before, begin, rest = readme.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise errors.BadInput(f"{readme} has no {BEGIN} … {END} to put the table between. Add the two lines.")
    return before, after


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
