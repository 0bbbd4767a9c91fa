"""One result object -> terminal, JSON, Markdown."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import BadInput
from convert.report import SCHEMA

from .compare import Measures, TensorResult
from .tolerance import CANCELLED

if TYPE_CHECKING:
    from .diagnose import Explanation
    from .training.curves import Curves

ALIGNED, DIVERGED = "aligned", "diverged"
SHOWN, SHOWN_FAILURES = 40, 10


@dataclass(frozen=True)
class Table:
    """What a stage shows beside the tensors, as texts; ``shown`` in the terminal too, not only in the reports."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    shown: bool = False

    def markdown(self) -> list[str]:
        """Lines, the first of them empty."""
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows]
        return ["", f"{self.title}:", "", f"| {' | '.join(self.columns)} |", "| --- " * len(self.columns) + "|",
                *(f"| {' | '.join(row)} |" for row in cells)]

    def print(self, console: Any) -> None:
        from rich import box
        from rich.table import Table as Drawn
        from rich.text import Text
        table = Drawn(box=box.SIMPLE_HEAD, title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)


@dataclass(frozen=True, repr=False)
class StageResult:
    """What a stage found. ``reference`` and ``candidate`` hold framework, version, weights_digest."""

    run: str
    family: str
    head: str
    stage: str
    target: str
    tensors: Sequence[TensorResult]
    reference: Mapping[str, str | None]
    candidate: Mapping[str, str | None]
    inputs_digest: str | None
    seconds: float
    peak_rss_bytes: int
    weights_divergence: str | None = None
    notes: Sequence[str] = ()
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    named: str | None = None
    sublayers: Sequence[TensorResult] = ()
    diagnosis: Explanation | None = None
    caveat: str | None = None
    curves: Curves | None = None
    tables: Sequence[Table] = ()

    def __repr__(self) -> str:
        return f"<{self.run}: {self.stage} {self.verdict}. {self.summary().replace('`', '')}>"

    @property
    def verdict(self) -> str:
        """Aligned needs evidence: something was compared, all of it passed, and the weights are the source's."""
        judged = [*self.tensors, *self.sublayers]
        sound = self.tensors and all(tensor.passed for tensor in judged) and self.weights_divergence is None
        return ALIGNED if sound else DIVERGED

    @property
    def first_divergence(self) -> str | None:
        """The parameter whose weight differs, else the path of the first failing module in the order of execution."""
        failing = (tensor.name.partition(" ")[0].rstrip(":") for tensor in [*self.tensors, *self.sublayers]
                   if not tensor.passed)
        return self.weights_divergence or next(failing, None)

    @property
    def failures(self) -> list[str]:
        """One sentence for each failing tensor."""
        return [tensor.failure for tensor in [*self.tensors, *self.sublayers] if tensor.failure]

    def save(self, directory: Path | str) -> Path:
        """Write ``<stage>.json`` and ``<stage>.md``; returns the Markdown's path. :class:`BadInput` where a file is in
        the way."""
        reports = Path(directory)
        try:
            reports.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadInput(f"{reports} cannot be made a directory: {error.strerror}. Give another place for the "
                           "report.") from error
        (reports / f"{self.stage}.json").write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False), "utf-8")
        (reports / f"{self.stage}.md").write_text(self.markdown(), "utf-8")
        if self.curves:
            self.curves.save(reports)
        return reports / f"{self.stage}.md"

    def as_json(self) -> dict[str, Any]:
        """The interface that other people's scripts stand on; every number in it is finite or null."""
        return {
            "schema": SCHEMA, "run": self.run, "family": self.family, "head": self.head, "stage": self.stage,
            "target": self.target, "verdict": self.verdict, "first_divergence": self.first_divergence,
            "tensors": [_tensor_json(tensor) for tensor in self.tensors],
            "values": {name: {"reference": _finite(left), "candidate": _finite(right)}
                       for name, (left, right) in self.values.items()},
            "reference": dict(self.reference), "candidate": dict(self.candidate), "inputs_digest": self.inputs_digest,
            "named": self.named, "diagnosis": self.diagnosis and {
                name: getattr(self.diagnosis, name) for name in ("kind", "subject", "sentence", "before", "after")},
            "sublayers": [_tensor_json(tensor) for tensor in self.sublayers],
            **({"curves": self.curves.as_json()} if self.curves else {}),
            "failures": self.failures, "notes": list(self.notes), "caveat": self.caveat,
            "tables": [{"title": table.title, "columns": list(table.columns), "rows": [list(row) for row in table.rows]}
                       for table in self.tables],
            "seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes,
        }

    def markdown(self) -> str:
        """The report to paste into a pull request: verdict first, worst tensor next, everything after."""
        lines = [f"# {self.run}: {self.stage} **{self.verdict}**", "", self.summary(), ""]
        lines += [f"**Why:** {self.diagnosis.sentence}", ""] if self.diagnosis else []
        lines += ["![Losses of both sides, and their distance from float64](train.png)", ""] * bool(self.curves)
        lines += [f"- {failure}" for failure in self.failures[:20]]
        lines += [f"- … and {len(self.failures) - 20} more"] if len(self.failures) > 20 else []
        lines += [f"\n> {note}" for note in self.notes]
        if self.values:
            lines += ["", "| value | torch | paddle |", "| --- | --- | --- |"]
            lines += [f"| {name} | {left:.9g} | {right:.9g} |" for name, (left, right) in self.values.items()]
        for table in self.tables:
            lines += table.markdown()
        if any(not part.passed for part in self.sublayers):
            lines += ["", "Inside the blocks, each part fed what torch's was fed:", "", "| part | rel-L2 | allowed |",
                      "| --- | --- | --- |"]
            lines += [f"| `{part.name}` | {_number(part.measures, 'rel_l2')} | {_allowed(part)} |"
                      for part in self.sublayers if not part.passed]
        lines += ["", "| tensor | shape | rel-L2 | isolated | torch's noise | limit used | max abs | mean abs | cosine "
                  "| allowed | |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [f"| `{tensor.name}` | {list(tensor.shape)} | {_number(tensor.measures, 'rel_l2')} "
                  f"| {_number(tensor.isolated, 'rel_l2')} | {_floor(tensor)} | {_used(tensor)} "
                  f"| {_number(tensor.measures, 'max_abs')} | {_number(tensor.measures, 'mean_abs')} "
                  f"| {_cosine(tensor.measures)} | {_allowed(tensor)} | {'ok' if tensor.passed else '**FAIL**'} |"
                  for tensor in self.tensors]
        lines += ["", "| | reference | candidate |", "| --- | --- | --- |"]
        lines += [f"| {name.replace('_', ' ')} | {value or '–'} | {self.candidate[name] or '–'} |"
                  for name, value in self.reference.items()]
        lines += ["", f"family {self.family}, head {self.head}, target {self.target}, inputs `{self.inputs_digest}`, "
                      f"{self.seconds:.1f} s, {self.peak_rss_bytes / 1e6:,.0f} MB at most"]
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """How many tensors agree, and how closely, or where the first one does not; and what that does not say."""
        return f"{self._found()} {self.caveat}" if self.caveat else self._found()

    def _found(self) -> str:
        if not self.tensors:
            return "Nothing was compared, and nothing is not evidence."
        if self.first_divergence:
            good = sum(tensor.passed for tensor in self.tensors)
            if self.weights_divergence and all(part.passed for part in [*self.tensors, *self.sublayers]):
                return (f"`{self.first_divergence}` is not the source's weight, though nothing here shows it: all "
                        f"{good} compared tensors agree.")
            within = self.named and self.named != self.first_divergence and self.named.startswith(self.first_divergence)
            inside = f", inside it `{self.named}`" if within else ""
            return (f"First divergence: `{self.first_divergence}`{inside}; {good} of {len(self.tensors)} compared "
                    "tensors agree.")
        known = [tensor for tensor in self.tensors if (tensor.floor or 0.0) <= CANCELLED]
        worst = max((tensor.measures.rel_l2 for tensor in known if tensor.measures), default=0.0)
        unknown = len(self.tensors) - len(known)
        beside = f" ({unknown} that torch itself does not know to {CANCELLED:g} left out)" if unknown else ""
        parts = f", and so do {len(self.sublayers)} parts of blocks" if self.sublayers else ""
        return (f"All {len(self.tensors)} tensors are equal, bit for bit." if self.stage == "weights" else
                f"All {len(self.tensors)} compared tensors agree, relative L2 at most {worst:.1e}{beside}{parts}.")

    def print(self) -> None:
        """The table in the terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
        shown = self.tensors if self.stage != "weights" else [tensor for tensor in self.tensors if not tensor.passed]
        if shown:
            table = Table(box=box.SIMPLE_HEAD, title=f"{self.run}: {self.stage}, {self.target}", title_justify="left")
            judged = any(tensor.judgements for tensor in shown)
            table.add_column("tensor", overflow="fold")
            for name in ("rel-L2", *(("isolated", "noise", "used") if judged else ("max abs", "allowed rel-L2")), ""):
                table.add_column(name, justify="right")
            for tensor in _most_telling(shown):
                more = (_number(tensor.isolated, "rel_l2"), _floor(tensor), _used(tensor)) if judged else (
                    _number(tensor.measures, "max_abs"), _allowed(tensor))
                table.add_row(Text(tensor.name), _number(tensor.measures, "rel_l2"), *more,
                              "[green]ok[/]" if tensor.passed else "[red]FAIL[/]")
            console.print(table)
        if len(shown) > SHOWN:
            failed = max(0, sum(not tensor.passed for tensor in shown) - SHOWN)
            console.print(f"… and {len(shown) - SHOWN} more{f', {failed} of them FAIL' * bool(failed)}, "
                          f"in {self.stage}.md")
        for table in self.tables:
            if table.shown:
                table.print(console)
        for name, (left, right) in self.values.items():
            console.print(f"{name}: torch {left:.9g}, paddle {right:.9g}")
        for failure in self.failures[:SHOWN_FAILURES]:
            console.print(f"FAIL {failure}", markup=False)
        if len(self.failures) > SHOWN_FAILURES:
            console.print(f"… and {len(self.failures) - SHOWN_FAILURES} more, in {self.stage}.json")
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        if self.diagnosis:
            console.print(f"why: {self.diagnosis.sentence}", markup=False)
        color = "green" if self.verdict == ALIGNED else "red"
        console.print(f"[bold {color}]{self.stage}: {self.verdict}[/]. ", end="")
        console.print(self.summary().replace("`", ""), markup=False)


def _most_telling(tensors: Sequence[TensorResult]) -> list[TensorResult]:
    """``SHOWN`` of them at most, in the order of execution: the first that failed, others that did, and what uses the
    largest share of a limit.
    """
    first = next((number for number, tensor in enumerate(tensors) if not tensor.passed), 0)

    def weight(number: int) -> tuple[bool, bool, float, float]:
        tensor = tensors[number]
        if tensor.measures is None:
            return number == first, not tensor.passed, math.inf, math.inf
        return number == first, not tensor.passed, tensor.share or 0.0, tensor.measures.rel_l2
    return [tensors[number] for number in sorted(sorted(range(len(tensors)), key=weight, reverse=True)[:SHOWN])]


def _tensor_json(tensor: TensorResult) -> dict[str, Any]:
    return {
        "name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, **_measures_json(tensor.measures),
        "isolated": tensor.isolated and _measures_json(tensor.isolated), "allowed": _finite(tensor.allowed),
        "floor": _finite(tensor.floor), "judgements": [
            {"kind": found.kind, "test": found.test, "ratio": _finite(found.ratio), "limit": found.limit,
             "passed": found.passed} for found in tensor.judgements],
        "passed": tensor.passed, "failure": tensor.failure,
    }


def _measures_json(measures: Measures | None) -> dict[str, float | None]:
    return {name: _finite(getattr(measures, name, None)) for name in ("max_abs", "mean_abs", "rel_l2", "cosine")}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _number(measures: Measures | None, name: str) -> str:
    return "–" if measures is None else f"{getattr(measures, name):.1e}"


def _floor(tensor: TensorResult) -> str:
    return "–" if tensor.floor is None else f"{tensor.floor:.1e}"


def _used(tensor: TensorResult) -> str:
    """The largest share of a limit of the noise floor."""
    if tensor.share is None:
        return "–"
    return f"{tensor.share:.0%}" if tensor.share < 100 else f"{tensor.share:.0e}x"


def _cosine(measures: Measures | None) -> str:
    return "–" if measures is None else f"{measures.cosine:.9f}"


def _allowed(tensor: TensorResult) -> str:
    return "equal" if tensor.allowed == 0 else f"{tensor.allowed:.1e}" if math.isfinite(tensor.allowed) else "–"
