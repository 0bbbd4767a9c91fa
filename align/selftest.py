"""``python -m align.selftest``: plants known faults and runs the real pipeline, to see whether it tells.

For each family the demo checkpoint is converted once, and once more for each other config that its faults ask for;
then each fault of ``align/faults/`` is planted in the checkpoint, the config, the net, or what trains it or continues
texts with it; the stage that has to tell (``python -m align.forward``, of a wrong loss ``align.loss``, …) is carried
out in this process, and the fault is undone. Only the torch side's passes are remembered between faults, since no fault
touches it. Where a family's torch side is code that a checkpoint brings along, it is ours, which the demo writes beside
its weights; no other is run. Exit code 0 when every fault is caught, at least 95 % are named at the right parameter or
operation, at least 80 % of those with an explanation in stock are explained, none is explained wrongly, and the runs
without a fault are aligned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from convert import errors

from . import environment
from .progress import progress

if TYPE_CHECKING:
    from .faults.fault import Changes, Fault
    from .report import StageResult

NAMED, EXPLAINED = 0.95, 0.80
NO_EXPLANATION = (None, "", "none", "unknown", "unexplained")
REMEMBERED = ("steps", "record_inside")
COLUMNS = ("kind", "family", "place", "how", "visible", "caught", "verdict", "first failing tensor", "block right",
           "named", "named right", "explanation wanted", "explanation given", "subject", "explained", "limit used",
           "exit code", "seconds", "note")


@dataclass(frozen=True)
class Outcome:
    """What a stage said of one fault; ``result`` None where it ended without one."""

    fault: Fault
    code: int
    result: StageResult | None
    seconds: float
    said: str = ""

    @property
    def failing(self) -> str | None:
        """The first output that failed, a module's or else a sublayer's, whatever the weights say."""
        judged = [*self.result.tensors, *getattr(self.result, "sublayers", ())] if self.result else []
        return next((tensor.name for tensor in judged if not tensor.passed), None)

    @property
    def verdict(self) -> str:
        return self.result.verdict if self.result else f"exit code {self.code}"

    @property
    def caught(self) -> bool:
        """Diverged with exit code 1: a visible fault by an output, an invisible one by the weights."""
        diverged = self.result is not None and self.verdict == "diverged" and self.code == errors.DIVERGED
        shown = self.failing if self.fault.visible else self.result and self.result.weights_divergence
        return diverged and shown is not None

    @property
    def in_right_block(self) -> bool:
        """The first failing tensor is, or lies in, the first that the fault makes wrong; asked of visible faults."""
        if not self.fault.visible:
            return self.named_right
        block = self.fault.block
        return self.failing is not None and (self.failing == block or self.failing.startswith(
            (f"{block}.", f"{block}: ", f"{block} (")))

    @property
    def named(self) -> str | None:
        """The place that the reader is sent to: the wrong weight, else the explanation's, else the sublayer's."""
        if self.result is None:
            return None
        subject = self.subject if self.explanation else None
        return self.result.weights_divergence or subject or getattr(self.result, "named", None) or (
            self.result.first_divergence)

    @property
    def named_right(self) -> bool:
        return self.caught and self.fault.is_named_by(self.named)

    @property
    def explanation(self) -> str | None:
        """The kind of the explanation that was given."""
        kind = getattr(getattr(self.result, "diagnosis", None), "kind", None)
        return None if kind in NO_EXPLANATION else str(kind)

    @property
    def subject(self) -> str | None:
        return getattr(getattr(self.result, "diagnosis", None), "subject", None)

    @property
    def explained(self) -> str:
        """``yes``, ``no``, ``wrong``, or ``true`` for a true sentence that was not asked for."""
        from .faults import EXPLANATIONS, GENERIC
        if self.explanation is None:
            return "no"
        def says(words: Iterable[str]) -> bool:
            return any(self.explanation in EXPLANATIONS[word] for word in words) and (
                self.fault.says in self.result.diagnosis.sentence)
        if not self.fault.is_named_by(self.subject):
            return "wrong"
        if says(self.fault.explanation or ()):
            return "yes"
        of_a_weight = self.fault.how != "code" and self.fault.place != "config"
        return "true" if says(self.fault.also) or (of_a_weight and self.explanation in GENERIC) else "wrong"

    @property
    def limit_used(self) -> float | None:
        """The largest share of a limit of the noise floor at the fault's block, or at any tensor."""
        tensors = self.result.tensors if self.result else []
        at_block = [tensor for tensor in tensors if tensor.name == self.fault.block] or tensors
        return max((tensor.share for tensor in at_block if tensor.share is not None), default=None)

    def row(self) -> list[str]:
        fault, yes = self.fault, {True: "yes", False: "no"}
        return [fault.kind, fault.family, fault.place, fault.how, yes[fault.visible], yes[self.caught], self.verdict,
                self.failing or "", yes[self.in_right_block], self.named or "", yes[self.named_right],
                ", ".join(sorted(fault.explanation or ())), self.explanation or "", self.subject or "", self.explained,
                "" if self.limit_used is None else f"{self.limit_used:.3g}", str(self.code), f"{self.seconds:.2f}",
                fault.why or self.said]


@dataclass(frozen=True)
class Proof:
    """All outcomes; what went wrong without any fault, and faults that never came into effect, a sentence each."""

    outcomes: Sequence[Outcome]
    false_alarms: Sequence[str] = ()
    skipped: Sequence[str] = ()
    seconds: float = 0.0
    unplanted: Sequence[str] = ()

    @property
    def missed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.caught]

    @property
    def wanted(self) -> list[Outcome]:
        """Those with an explanation in stock."""
        return [outcome for outcome in self.outcomes if outcome.fault.explanation]

    @property
    def explained_wrongly(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.explained == "wrong"]

    @property
    def named(self) -> float:
        return _share(self.outcomes, lambda outcome: outcome.named_right)

    @property
    def explained(self) -> float:
        return _share(self.wanted, lambda outcome: outcome.explained == "yes")

    @property
    def holds(self) -> bool:
        return bool(self.outcomes) and not (
            self.missed or self.false_alarms or self.explained_wrongly or self.unplanted) and (
            self.named >= NAMED and self.explained >= EXPLAINED)

    def totals(self) -> list[str]:
        """One line for each promise."""
        visible = [outcome for outcome in self.outcomes if outcome.fault.visible]
        hidden = [outcome for outcome in self.outcomes if not outcome.fault.visible]
        count, kinds = len(self.outcomes), len({outcome.fault.kind for outcome in self.outcomes})
        return [
            f"{count} faults of {kinds} kinds, in {self.seconds:.0f} s",
            f"caught: {_of(visible, lambda found: found.caught)} that change an output, "
            f"{_of(hidden, lambda found: found.caught)} that no output shows (wanted: all)",
            f"the right block: {_of(visible, lambda found: found.in_right_block)}",
            f"named, parameter or operation: {_of(self.outcomes, lambda found: found.named_right)} = {self.named:.1%} "
            f"(wanted: {NAMED:.0%})",
            f"explained: {_of(self.wanted, lambda found: found.explained == 'yes')} with an explanation in stock = "
            f"{self.explained:.1%} (wanted: {EXPLAINED:.0%}); wrongly: {len(self.explained_wrongly)} (wanted: 0)",
            *(f"FALSE ALARM without any fault: {told}" for told in self.false_alarms),
            *(f"NOT PLANTED: {told}" for told in self.unplanted),
            *(f"left out: {told}" for told in self.skipped),
        ]

    def save(self, directory: Path) -> Path:
        """``selftest.md`` to read and ``selftest.tsv`` to compute with; returns the former."""
        directory.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(COLUMNS), *("\t".join(cell.replace("\t", " ") for cell in outcome.row())
                                       for outcome in self.outcomes)]
        (directory / "selftest.tsv").write_text("\n".join(lines) + "\n", "utf-8")
        (directory / "selftest.md").write_text(self.markdown(), "utf-8")
        return directory / "selftest.md"

    def markdown(self) -> str:
        mark = {True: "yes", False: "**no**"}
        lines = [f"# Selftest: **{'holds' if self.holds else 'does not hold'}**", "",
                 "Each fault was planted, the stage that has to tell was carried out, and the fault was undone.", ""]
        lines += [f"- {total}" for total in self.totals()]
        lines += ["", "| fault | family | planted in | caught | right block | named | | explained | limit used |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {found.fault.kind} | {found.fault.family} | {found.fault.place} ({found.fault.how}) "
                  f"| {mark[found.caught]}{'' if found.fault.visible else ', by the weights'} "
                  f"| {mark[found.in_right_block]} | `{found.named}` | {'' if found.named_right else '**no**'} "
                  f"| {_told(found)} | {_times(found.limit_used)} |" for found in self.outcomes]
        return "\n".join(lines) + "\n\n`limit used`: the largest error at the fault's block as a multiple of the " \
                                  "largest that is allowed there; above 1 is a failure.\n"

    def print(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
        table = Table(box=box.SIMPLE_HEAD, title="align.selftest", title_justify="left")
        for name in ("fault", "family", "planted in", "caught", "named", "explained"):
            table.add_column(name, overflow="fold")
        table.add_column("limit used", justify="right")
        for found in self.outcomes:
            fault = found.fault
            place = fault.place if fault.how in ("file", "code") else f"{fault.place} ({fault.how})"
            caught = "yes" if fault.visible else "by the weights"
            table.add_row(fault.kind, fault.family, place, _mark(found.caught, caught),
                          _mark(found.named_right, found.named or "–"), _told(found, rich=True),
                          _times(found.limit_used))
        console.print(table)
        for total in self.totals():
            console.print(total, markup=False)
        console.print("[bold green]selftest: holds[/]" if self.holds else "[bold red]selftest: does not hold[/]")


@dataclass(frozen=True)
class Model:
    """A family's demo with some entries of its config changed."""

    family: str
    changes: Changes

    @property
    def run(self) -> str:
        """The name of its run."""
        return "-".join([self.family, *(re.sub(r"\W+", "-", f"{key}-{value}") for key, value in self.changes)])


@dataclass
class Bench:
    """A directory with converted demo models, in which faults are planted and undone."""

    root: Path
    false_alarms: list[str] = field(default_factory=list)

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def output(self, model: Model) -> Path:
        return self.root / "out" / model.run

    def convert(self, model: Model) -> None:
        from convert.__main__ import family_named
        from convert.cli import main as convert_main
        from convert.demo import build_demo
        family = family_named(model.family)
        source = build_demo(family, self.root / f"source-{model.run}", dict(model.changes))
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = convert_main(family, ["--source", str(source), "--output", str(self.output(model)),
                                         "--reports", str(self.reports)])
        if code != errors.ALIGNED:
            raise RuntimeError(f"the demo model {model.run} could not be converted: {said.getvalue().strip()}")

    def plant(self, fault: Fault) -> Outcome:
        """Plant, align, undo; :class:`NotPlanted` for a fault that never came into effect."""
        from .faults import NotPlanted
        started = time.perf_counter()
        model, said = Model(fault.family, fault.changes), "nothing"
        before = self._files(model)
        try:
            with fault.plant(self.output(model)):
                code, result, said = self.align(fault.stage, model, fault.target, fault.flags)
        except NotPlanted as failure:
            raise NotPlanted(f"{fault.name}: {failure}; align.{fault.stage} said: {said}") from None
        if self._files(model) != before:
            raise RuntimeError(f"{fault.name} was not undone")
        return Outcome(fault, code, result, time.perf_counter() - started, said)

    def clean(self, stage: str, model: Model, target: str, flags: Sequence[str], when: str) -> None:
        """Without a fault the run has to be aligned; what it says otherwise is a false alarm."""
        code, result, said = self.align(stage, model, target, flags)
        if code != errors.ALIGNED or result is None or result.verdict != "aligned":
            failure = next(iter(result.failures), said) if result else said
            asked = " ".join([f"align.{stage}", *flags])
            self.false_alarms.append(f"{model.run}, {target}, {asked}, {when}: exit code {code}; {failure}")

    def align(self, name: str, model: Model, target: str, flags: Sequence[str] = ()
              ) -> tuple[int, StageResult | None, str]:
        """``python -m align.<name>`` in this process: (exit code, what it reported, the last it said on stderr).

        The code that a demo brings along is ours. Nothing is paged, however short memory may be, since a net that is
        paged is not loaded as a whole, where faults are planted.
        """
        from . import report, stage
        saved: list[StageResult] = []
        save = report.StageResult.save

        def keep(result: StageResult, *arguments: Any) -> Any:
            saved.append(result)
            return save(result, *arguments)
        out, err = io.StringIO(), io.StringIO()
        with patch.object(report.StageResult, "save", keep), contextlib.redirect_stdout(out), (
                contextlib.redirect_stderr(err)):
            try:
                code = stage.main(import_module(f".{name}", __package__).STAGE, [
                    "--run", model.run, "--reports", str(self.reports), "--target", target, "--trust-remote-code",
                    "--paging", "off", *flags])
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        found = next((result for result in reversed(saved) if result.stage == name), None)
        return code, found, " ".join(err.getvalue().split())[-300:]

    def _files(self, model: Model) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.output(model).iterdir()}


def prove(faults: Sequence[Fault], root: Path, tell: Callable[[str], None] = lambda told: None) -> Proof:
    """Plant all ``faults`` in a bench under ``root``, with a run without a fault before and after those of a model."""
    started = time.perf_counter()
    from .faults import NotPlanted
    bench = Bench(root)
    outcomes: list[Outcome] = []
    skipped: list[str] = []
    unplanted: list[str] = []
    groups: dict[tuple[str, str, Model, tuple[str, ...]], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.stage, fault.target, Model(fault.family, fault.changes), fault.flags), []).append(
            fault)
    with one_reference():
        for model in dict.fromkeys(model for _, _, model, _ in groups):
            tell(f"converting {model.run}")
            bench.convert(model)
        for (stage, target, model, flags), chosen in groups.items():
            if target == "paddlenlp" and not _has_paddlenlp():
                skipped.append("faults of --target paddlenlp, which is not installed")
                continue
            bench.clean(stage, model, target, flags, "before the faults")
            for number, fault in enumerate(chosen, 1):
                tell(f"{model.run} {number}/{len(chosen)}: {fault.kind}, {fault.place}")
                try:
                    outcomes.append(bench.plant(fault))
                except NotPlanted as failure:
                    unplanted.append(str(failure))
            bench.clean(stage, model, target, flags, "after the faults")
    return Proof(outcomes, bench.false_alarms, skipped, time.perf_counter() - started, unplanted)


@contextmanager
def one_reference() -> Iterator[None]:
    """Sessions of one run share their torch model, whose passes are remembered by what they were given."""
    from .stage import Session
    load = vars(Session)["reference"].func
    kept: dict[Path, Any] = {}

    def reference(session: Session) -> Any:
        if session.run.source not in kept:
            kept[session.run.source] = _remembering(load(session))
        return kept[session.run.source]
    with patch.object(Session, "reference", property(reference)):
        yield


def _remembering(reference: Any) -> Any:
    for name in REMEMBERED:
        if hasattr(reference, name):
            setattr(reference, name, _remembered(getattr(reference, name)))
    return reference


def _remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def call(*arguments: Any, **named: Any) -> Any:
        key = _digest([*arguments, *sorted(named.items())])
        if key not in known:
            found = method(*arguments, **named)
            known[key] = list(found) if isinstance(found, Iterator) else found
        return known[key]
    return call


def _digest(value: Any) -> str:
    """xxh3-128 of inputs, arrays, names and numbers, however nested; functions count for nothing."""
    import numpy as np
    import xxhash

    from .inputs import Inputs
    if callable(value):
        return ""
    if isinstance(value, Inputs):
        return value.digest
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{xxhash.xxh3_128(np.ascontiguousarray(value)).hexdigest()}"
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        return xxhash.xxh3_128("|".join(_digest(item) for item in value).encode()).hexdigest()
    return repr(value)


def _has_paddlenlp() -> bool:
    import importlib.util
    return importlib.util.find_spec("paddlenlp") is not None


def _share(outcomes: Sequence[Outcome], test: Callable[[Outcome], bool]) -> float:
    return sum(map(test, outcomes)) / len(outcomes) if outcomes else 1.0


def _of(outcomes: Sequence[Outcome], test: Callable[[Outcome], bool]) -> str:
    return f"{sum(map(test, outcomes))} of {len(outcomes)}"


def _times(share: float | None) -> str:
    return "–" if share is None else f"{share:.3g}x"


def _mark(good: bool, told: str) -> str:
    if good:
        return f"[green]{told}[/]"
    return "[red]no[/]" if told in ("yes", "by the weights") else f"[red]no ({told})[/]"


def _told(found: Outcome, rich: bool = False) -> str:
    """The explanation's kind and whether it is right; what was wanted, where none was given."""
    bad = ("[red]", "[/]") if rich else ("**", "**")
    if found.explained == "no":
        wanted = ", ".join(sorted(found.fault.explanation or ()))
        return f"no ({wanted} in stock)" if wanted else "none in stock"
    return f"{bad[0]}wrong: {found.explanation}{bad[1]}" if found.explained == "wrong" else str(found.explanation)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 the promises hold, 1 they do not, 2 bad usage, 3 a framework is missing, 4 our fault."""
    parser = argparse.ArgumentParser(prog="python -m align.selftest",
                                     description="Plant known faults, run the real pipeline, and see whether it tells.",
                                     epilog="Where the torch side is code that a checkpoint brings along, it is "
                                            "that of the demo checkpoint; no other code is run.")
    parser.add_argument("--only", metavar="PATTERN", action="append", default=[],
                        help="only faults whose kind/family/place matches, as '*gelu*' or '*/bert/net*'; repeatable")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--reports", metavar="DIR", default="reports",
                        help="selftest/selftest.md and .tsv are written there; default reports")
    options = parser.parse_args(arguments)
    return errors.guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    environment.prepare()
    for framework in ("torch", "transformers", "paddle"):
        errors.require(framework)
    from .faults import FAULTS
    faults = [fault for fault in FAULTS
              if not options.only or any(fnmatchcase(fault.name, pattern) for pattern in options.only)]
    if not faults:
        raise errors.BadInput(f"no fault is called {', '.join(options.only)}; --list shows their names.")
    if options.list:
        for fault in faults:
            print(f"{fault.name}\t{fault.how}\t{', '.join(sorted(fault.explanation or ()))}")
        return errors.ALIGNED
    with tempfile.TemporaryDirectory(prefix="paddle-parity-selftest-") as root, progress("align.selftest") as tell:
        proof = prove(faults, Path(root), tell)
    proof.print()
    print(f"report: {proof.save(Path(options.reports) / 'selftest')}")
    return errors.ALIGNED if proof.holds else errors.DIVERGED


if __name__ == "__main__":
    sys.exit(main())
