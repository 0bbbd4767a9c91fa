"""What every stage shares: the flags, opening a run, the weights first, a verdict, a report, an exit code.

inputs -> steps of the reference -> answers of the candidate -> judgement -> report.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from convert import errors
from convert.cli import described

from . import environment
from .progress import progress

if TYPE_CHECKING:

    from .candidate import Candidate
    from .compare import TensorResult
    from .diagnose import Explanation
    from .done import Done
    from .evidence import Inspection
    from .reference import Reference
    from .report import StageResult, Table
    from .runs import Run
    from .trace import Step
    from .training.curves import Curves


@dataclass(frozen=True)
class Findings:
    """What comparing gave, in the order of execution, and what there is to say about it."""

    tensors: Sequence[TensorResult]
    notes: Sequence[str] = ()
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    named: str | None = None
    sublayers: Sequence[TensorResult] = ()
    diagnosis: Explanation | None = None
    caveat: str | None = None
    """What this verdict does not say, where it is no evidence of more."""
    curves: Curves | None = None
    tables: Sequence[Table] = ()


@dataclass
class Session:
    """One run, its two sides, and a way to say how far the work has come. Each side is loaded when first used."""

    run: Run
    options: argparse.Namespace
    advance: Callable[[str], None]

    @cached_property
    def reference(self) -> Reference:
        from .reference import Reference
        from .unmodified import Unmodified, classes_of
        self.advance("loading torch")
        found = Reference(self.run, self.paged and (self.run.head.reference is None or self.options.paging == "on"),
                          trust_remote_code=self.options.trust_remote_code)
        Unmodified(classes_of(found.model))
        found.advance = self.advance
        return found

    @cached_property
    def candidate(self) -> Candidate:
        from .candidate import open_candidate
        from .unmodified import classes_beside
        self.advance("loading the candidate")
        found = open_candidate(self.run, self.options.target, self.options.device,
                               self.paged and (":" not in self.options.target or self.options.paging == "on"),
                               allow_same_framework=self.options.allow_same_framework,
                               beside=lambda: classes_beside(self))
        found.advance = self.advance
        return found

    @cached_property
    def paged(self) -> bool:
        """Whether weights come in module by module: as ``--paging`` says, or where the models do not fit."""
        from .paging import is_needed
        return self.options.paging == "on" or (
            self.options.paging == "auto" and is_needed(self.run, self._copies * (1 if self.options.only else 2)))

    @property
    def _copies(self) -> int:
        """How often a side's weights must fit into memory: a stage that holds gradients too says more than once."""
        return getattr(self.options, "copies", 1)

    def inspect(self) -> None:
        """From now on the candidate's weights are compared with the source, those of a paged net as they come in."""
        _ = self._inspection

    @cached_property
    def evidence(self) -> tuple[str | None, list[str]]:
        """The first weight that differs from the source, or None, and what is told of it."""
        return self._inspection.told()

    @cached_property
    def _inspection(self) -> Inspection:
        from .evidence import Inspection
        return Inspection(self)

    @property
    def weights_divergence(self) -> str | None:
        return self.evidence[0]

    @property
    def reports(self) -> Path:
        """``reports/<run>``, or a directory in it for a target that is not ours."""
        target = self.options.target
        return self.run.directory if target == "models" else self.run.directory / target.replace(":", ".")


@dataclass(frozen=True)
class Stage:
    """A stage by name: ``find`` looks and compares. ``flags`` adds options of its own.

    ``lacking`` says what a run does not have that this stage would look at, so that ``python -m align`` passes it by.
    """

    name: str
    purpose: str
    find: Callable[[Session], Findings]
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    lacking: Callable[[Run], str | None] = lambda run: None


@dataclass(frozen=True)
class RecordedStage:
    """A stage whose two sides are recorded, together or in two environments, and then judged.

    ``candidate`` learns from the steps of the reference what it is to be fed, and answers each of them; what it has
    left to say comes as one answer more. ``lacking`` is a :class:`Stage`'s.
    """

    name: str
    purpose: str
    reference: Callable[[Session], Iterator[Step]]
    candidate: Callable[[Session, Iterable[Step]], Iterator[Step]]
    judge: Callable[[Session, Iterable[tuple[Step, Step]]], Findings]
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    lacking: Callable[[Run], str | None] = lambda run: None
    of_candidate: Collection[str] = ()
    """Which of its own flags are for the candidate; what others choose is chosen with the reference."""
    of_both: Collection[str] = ()
    """Which of them each side is told."""
    weights: bool = True
    """Whether a net is part of it; what is only about data reads no weights."""
    copies: int = 0
    """How many times a side's weights must fit into memory; 0 where weights can come in block by block instead."""

    def too_large(self, run: Run, options: argparse.Namespace) -> str | None:
        """Why ``python -m align`` passes this stage by on a model that does not fit."""
        from .paging import is_needed
        if self.copies and (options.paging == "on" or (
                options.paging == "auto" and is_needed(run, self.copies * (1 if options.only else 2)))):
            return ("It holds weights, gradients and moments of both sides at once, and memory does not suffice, or "
                    "--paging on says so.")
        return None


def main(stage: Stage | RecordedStage, arguments: Sequence[str] | None = None) -> int:
    """The command line of a stage. 0 aligned, 1 diverged, 2 bad input, 3 a framework is missing, 4 our fault."""
    parser = _parser(stage)
    options = parser.parse_args(arguments)
    if options.only and options.compare:
        parser.error("--only records a side, --compare judges two: give one of them")
    return errors.guarded(lambda: _run(stage, options))


def _run(stage: Stage | RecordedStage, options: argparse.Namespace) -> int:
    from .report import ALIGNED
    environment.prepare()
    if options.run is None:
        print(latest_told(options))
    if options.only:
        from .recording import record
        with _progress(stage.name, options) as advance:
            told = record(stage, _session(options, advance))
        print(told)
        return errors.ALIGNED
    done = _done(stage, options)
    result = run_stage(stage, options)
    done.forget(stage.name)
    code = errors.ALIGNED if result.verdict == ALIGNED else errors.DIVERGED
    report = result.save(done.directory)
    result.print()
    print(f"report: {report}")
    _write_page(report.parent)
    done.put(stage.name, code)
    return code


def _done(stage: Stage | RecordedStage, options: argparse.Namespace) -> Done:
    """What ``python -m align`` need not repeat; a verdict under flags of the stage's own is not the one it asks for."""
    from .done import Done
    session = _session(options)
    if options.compare or chosen(stage, options):
        return Done(session.reports, None)
    return Done.of(session.run, session.reports, options)


def chosen(stage: Stage | RecordedStage, options: argparse.Namespace) -> list[str]:
    """Those of the stage's own flags, as names in ``options``, that are not as when nothing is said."""
    parser = argparse.ArgumentParser()
    stage.flags(parser)
    return [name for name, usual in vars(parser.parse_args([])).items() if getattr(options, name, usual) != usual]


def spelled(names: Iterable[str]) -> str:
    """``--max-length and --rows``, as on the command line."""
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def _write_page(directory: Path) -> None:
    """A page that cannot be drawn is told, and does not change the verdict."""
    from .page import write_page
    try:
        told = f"page: {write_page(directory)}"
    except Exception as error:
        print(f"note: the page could not be written ({type(error).__name__}: {error}).", file=sys.stderr)
    else:
        print(told)


def run_stage(stage: Stage | RecordedStage, options: argparse.Namespace) -> StageResult:
    """Carry out ``stage`` and return its result; traces are saved, the report is not."""
    from .recording import findings_of
    from .report import StageResult
    started = time.perf_counter()
    with _progress(stage.name, options) as advance:
        session = _session(options, advance)
        findings, reference, candidate = findings_of(stage, session)
        return StageResult(
            run=session.run.name, family=session.run.family.name, head=session.run.head.architecture, stage=stage.name,
            target=options.target, tensors=findings.tensors, weights_divergence=candidate.weights_divergence,
            reference=reference.side, candidate=candidate.side, inputs_digest=reference.inputs_digest,
            notes=[*reference.notes, *candidate.notes, *findings.notes], values=findings.values,
            named=findings.named, sublayers=findings.sublayers, diagnosis=findings.diagnosis,
            caveat=findings.caveat, curves=findings.curves, tables=findings.tables,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _session(options: argparse.Namespace, advance: Callable[[str], None] = lambda told: None) -> Session:
    from .runs import load_run
    family = Path(options.family) if options.family else None
    return Session(load_run(options.run, Path(options.reports), family), options, advance)


def latest_told(options: argparse.Namespace) -> str:
    """Which run is taken where none is named."""
    from convert.report import latest_run, load_conversion
    reports = Path(options.reports)
    conversion = load_conversion(reports / latest_run(reports))
    return (f"run {conversion.run}: the latest conversion, of {conversion.finished[:16].replace('T', ' ')} UTC. "
            "--run NAME takes another.")


def _progress(stage: str, options: argparse.Namespace) -> AbstractContextManager[Callable[[str], None]]:
    """What a stage has come to; quiet where the user is asked something."""
    return nullcontext(lambda told: None) if getattr(options, "interactive", False) else progress(stage)


def _parser(stage: Stage | RecordedStage) -> argparse.ArgumentParser:
    program = f"python -m align.{stage.name}"
    parser = described(program, f"{stage.purpose} The exit code is the verdict: 0 aligned, 1 diverged.", (
        program, f"{program} --run gpt-j-6b --target paddlenlp", f"{program} --run my --family examples/my_gpt.py"))
    add_flags(parser)
    stage.flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every stage takes."""
    add = parser.add_argument
    add("--run", metavar="NAME", help="which conversion, by the last component of its output, as gpt-j-6b; default the "
        "latest")
    add("--target", default="models", metavar="models|paddlenlp|MODULE:BUILD",
        help="which Paddle net: ours in models/ (default), PaddleNLP's class, or what a function of yours builds, as "
        "my_net:build")
    add("--device", default="cpu", help="what the Paddle side computes on, as gpu:0; default cpu")
    add("--paging", choices=("auto", "on", "off"), default="auto",
        help="whether weights come in block by block, as on; default auto: where the models do not fit into memory")
    add("--only", choices=("reference", "candidate"),
        help="record one side, where its framework is; the reference comes first")
    add("--compare", action="store_true", help="judge what --only has recorded; needs neither framework")
    add("--allow-same-framework", action="store_true", help="let both sides be of one framework; the report says so")
    add("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings along, where "
        "that is the torch side; it can do whatever you can, so read it first")
    add("--family", metavar="FILE", help="the family file that the run was converted with, if it is your own, as "
        "examples/my_gpt.py")
    add("--reports", metavar="DIR", default="reports", help="where the runs are, as ../reports; default reports")
