"""What every stage shares: the flags, opening a run, the weights first, a verdict, a report, an exit code."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import errors

if TYPE_CHECKING:
    import numpy as np

    from .candidate import Candidate
    from .compare import TensorResult
    from .diagnose import Explanation
    from .reference import Reference
    from .report import StageResult
    from .runs import Run

Arrays = Mapping[str, "np.ndarray"]


@dataclass(frozen=True)
class Findings:
    """What a stage recorded on both sides and what comparing it gave, in the order of execution."""

    tensors: Sequence[TensorResult]
    inputs_digest: str | None
    reference: Arrays = field(default_factory=dict)
    candidate: Arrays = field(default_factory=dict)
    notes: Sequence[str] = ()
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    named: str | None = None
    sublayers: Sequence[TensorResult] = ()
    diagnosis: Explanation | None = None


@dataclass
class Session:
    """One run, its two sides, and a way to say how far the work has come. Each side is loaded when first used."""

    run: Run
    options: argparse.Namespace
    advance: Callable[[str], None]
    weights_divergence: str | None = None

    @cached_property
    def reference(self) -> Reference:
        from .reference import Reference
        self.advance("loading torch")
        return Reference(self.run)

    @cached_property
    def candidate(self) -> Candidate:
        from .candidate import open_candidate
        self.advance("loading paddle")
        return open_candidate(self.run, self.options.target, self.options.device)

    @property
    def reports(self) -> Path:
        """``reports/<run>``, or a directory in it for a target that is not ours."""
        target = self.options.target
        return self.run.directory if target == "models" else self.run.directory / target.replace(":", ".")


@dataclass(frozen=True)
class Stage:
    """A stage by name: ``find`` records and compares. ``flags`` adds options of its own."""

    name: str
    purpose: str
    find: Callable[[Session], Findings]
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(stage: Stage, arguments: Sequence[str] | None = None) -> int:
    """The command line of a stage. 0 aligned, 1 diverged, 2 bad input, 3 a framework is missing, 4 our fault."""
    options = _parser(stage).parse_args(arguments)
    return errors.guarded(lambda: _run(stage, options))


def _run(stage: Stage, options: argparse.Namespace) -> int:
    from .report import ALIGNED
    os.environ.setdefault("GLOG_minloglevel", "3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    import warnings
    warnings.simplefilter("ignore")
    result = run_stage(stage, options)
    report = result.save(_session(options).reports)
    result.print()
    print(f"report: {report}")
    _write_page(report.parent)
    return errors.ALIGNED if result.verdict == ALIGNED else errors.DIVERGED


def _write_page(directory: Path) -> None:
    """A page that cannot be drawn is told, and does not change the verdict."""
    from .page import write_page
    try:
        print(f"page: {write_page(directory)}")
    except Exception as error:
        print(f"note: the page could not be written ({type(error).__name__}: {error}).", file=sys.stderr)


def run_stage(stage: Stage, options: argparse.Namespace) -> StageResult:
    """Carry out ``stage`` and return its result; traces are saved, the report is not."""
    from .evidence import evidence
    from .report import StageResult
    started = time.perf_counter()
    with _progress(stage.name) as advance:
        session = _session(options, advance)
        divergence, told = (None, []) if stage.name == "weights" else evidence(session)
        session.weights_divergence = divergence
        findings = stage.find(session)
        _save_traces(stage, session, findings)
        return StageResult(
            run=session.run.name, family=session.run.family.name, head=session.run.head.architecture, stage=stage.name,
            target=options.target, tensors=findings.tensors, weights_divergence=divergence,
            reference={"framework": "torch", "version": _torch_version(), "weights_digest": session.run.source_digest},
            candidate={"framework": session.candidate.framework, "version": session.candidate.version,
                       "weights_digest": session.candidate.weights_digest},
            inputs_digest=findings.inputs_digest, notes=[*told, *findings.notes], values=findings.values,
            named=findings.named, sublayers=findings.sublayers, diagnosis=findings.diagnosis,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _session(options: argparse.Namespace, advance: Callable[[str], None] = lambda told: None) -> Session:
    from .runs import load_run
    family = Path(options.family) if options.family else None
    return Session(load_run(options.run, Path(options.reports), family), options, advance)


def _save_traces(stage: Stage, session: Session, findings: Findings) -> None:
    from .trace import Provenance, Trace, require_comparable, write_reprod_diff
    if not findings.reference or not findings.candidate:
        return
    digest = session.run.source_digest
    reference = Trace(Provenance(stage.name, session.reference.framework, session.reference.version,
                                 type(session.reference.model).__name__, digest, digest, findings.inputs_digest),
                      findings.reference)
    candidate = Trace(Provenance(stage.name, session.candidate.framework, session.candidate.version,
                                 type(session.candidate.model).__name__, session.candidate.weights_digest, digest,
                                 findings.inputs_digest), findings.candidate)
    require_comparable(reference, candidate)
    traces = session.reports / "traces"
    reference.save(traces)
    candidate.save(traces)
    write_reprod_diff(reference, candidate, traces / f"{stage.name}_diff.txt")


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed; its checkpoint was read as a file"


@contextmanager
def _progress(stage: str) -> Iterator[Callable[[str], None]]:
    """What is being done right now, on stderr; quiet where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda told: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    with Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True,
                  console=Console(stderr=True)) as progress:
        task: Any = progress.add_task(stage, total=None)
        yield lambda told: progress.update(task, description=f"{stage}: {told}")


def _parser(stage: Stage) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m align.{stage.name}", description=stage.purpose)
    add_flags(parser)
    stage.flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every stage takes."""
    add = parser.add_argument
    add("--run", help="the run's name; default the latest conversion")
    add("--target", default="models", metavar="models|paddlenlp|MODULE:BUILD",
        help="which Paddle net: ours in models/ (default), PaddleNLP's class, or what a function of yours builds")
    add("--device", default="cpu", help="cpu (default) or gpu:0, for the Paddle side")
    add("--family", metavar="FILE", help="the family file that the run was converted with, if it is your own")
    add("--reports", metavar="DIR", default="reports", help="where the runs are; default reports")
