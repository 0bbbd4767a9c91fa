"""Both sides recorded at once, or each by itself and then compared; the same steps are judged alike."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import numpy as np

from convert.errors import BadInput

from .stage import Findings, RecordedStage, Session, Stage, chosen, spelled
from .trace import Provenance, Step, StepFiles, Trace, load_trace, require_comparable, write_reprod_diff

Found = tuple[Findings, Provenance, Provenance]
Watch = Callable[[Step, Step], None]
SIDES = ("torch", "paddle")
LARGE = 1 << 20


def findings_of(stage: Stage | RecordedStage, session: Session) -> Found:
    """What ``stage`` finds, and where each side of it comes from."""
    if isinstance(stage, Stage):
        return _look(stage, session)
    return _compare(stage, session) if session.options.compare else _record_and_compare(stage, session)


def _look(stage: Stage, session: Session) -> Found:
    if session.options.compare:
        raise BadInput(f"align.{stage.name} records nothing that --compare could compare: run it where the "
                       "Paddle side is, without --compare.")
    findings = stage.find(session)
    return findings, *(_provenance(stage, session, side, None) for side in SIDES)


def _record_and_compare(stage: RecordedStage, session: Session) -> Found:
    """Both sides at once, step by step, so that of a step nothing need be kept but what goes into the trace."""
    _weights_first(stage, session)
    traces = session.reports / "traces"
    reference, candidate = _Recording(traces), _Recording(traces)

    def keep(step: Step, answer: Step) -> None:
        reference.add(step)
        candidate.add(answer)
    findings = stage.judge(session, paired(stage, session, keep))
    _, told = session.evidence
    left = reference.trace(_provenance(stage, session, SIDES[0], reference.inputs_digest))
    right = candidate.trace(_provenance(stage, session, SIDES[1], candidate.inputs_digest, told))
    provenance = require_comparable(left.provenance, right.provenance,
                                    same_framework=session.options.allow_same_framework)
    for trace, side in ((left, SIDES[0]), (right, SIDES[1])):
        trace.save(traces, side)
        StepFiles(traces, stage.name, side).remove()
    _write_reprod_diff(stage, traces, left, right)
    return findings, left.provenance, provenance


def _compare(stage: RecordedStage, session: Session) -> Found:
    """``--compare``: two recordings, and neither framework."""
    for flag, value, usual in (("device", session.options.device, "cpu"), ("paging", session.options.paging, "auto")):
        if value != usual:
            raise BadInput(f"--{flag} {value} is for running a model, and --compare runs none. Leave it out.")
    (left, theirs), (right, ours) = (_recorded(stage, session, side) for side in SIDES)
    _refuse_chosen(stage, session, ())
    provenance = require_comparable(left.provenance, right.provenance,
                                    same_framework=session.options.allow_same_framework)
    session.evidence = provenance.weights_divergence, list(provenance.notes)
    findings = stage.judge(session, zip_longest(theirs.read(left), ours.read(right), fillvalue=Step()))
    _write_reprod_diff(stage, session.reports / "traces", left, right)
    return findings, left.provenance, provenance


def record(stage: Stage | RecordedStage, session: Session) -> str:
    """``--only``: one side, for ``--compare`` to judge, perhaps in another environment; returns what to tell of it."""
    if isinstance(stage, Stage):
        raise BadInput(f"align.{stage.name} has no side to record alone: run it where the Paddle side is, without "
                       "--only.")
    if session.options.only == "reference":
        _refuse_candidates(stage, session)
        side, traces, then = SIDES[0], session.run.directory / "traces", "--only candidate"
        steps = stage.reference(session)
    else:
        side, traces, then = SIDES[1], session.reports / "traces", "--compare"
        recorded, files = _recorded(stage, session, SIDES[0])
        _refuse_chosen(stage, session, (*stage.of_candidate, *stage.of_both))
        _weights_first(stage, session)
        steps = stage.candidate(session, files.read(recorded))
    recording, written = _Recording(traces), StepFiles(traces, stage.name, side)
    for step in written.write(steps):
        recording.add(step)
    told = [] if side == SIDES[0] else session.evidence[1]
    provenance = _provenance(stage, session, side, recording.inputs_digest, told)
    saved = recording.trace(replace(provenance, steps_digest=written.digest)).save(traces, side)
    return (f"{stage.name}: {session.options.only} recorded, {len(recording.arrays)} tensors: {saved}\n"
            f"next: {_command(stage, session)} {then}")


def _refuse_chosen(stage: RecordedStage, session: Session, still: Collection[str]) -> None:
    """:class:`BadInput` for a flag of the stage's own, but for those that can ``still`` be given."""
    if given := spelled(name for name in chosen(stage, session.options) if name not in still):
        raise BadInput(f"{given}: what both sides do is chosen where the reference is recorded, and that is done. "
                       "Give it with --only reference.")


def _refuse_candidates(stage: RecordedStage, session: Session) -> None:
    if given := spelled(name for name in chosen(stage, session.options) if name in stage.of_candidate):
        raise BadInput(f"{given}: this is asked for where the Paddle side is recorded. Give it with --only candidate.")


def _weights_first(stage: RecordedStage, session: Session) -> None:
    if stage.weights:
        session.inspect()
    else:
        session.evidence = None, []


def _command(stage: RecordedStage, session: Session) -> str:
    """The command line of this stage on this run, with the flags that say which net is meant."""
    options = session.options
    chosen = [f" --{name} {value}" for name, value, usual in (
        ("target", options.target, "models"), ("family", options.family, None), ("reports", options.reports, "reports"),
        ("device", options.device, "cpu")) if value != usual]
    chosen += [" --allow-same-framework"] * options.allow_same_framework
    return f"python -m align.{stage.name} --run {session.run.name}{''.join(chosen)}"


def _recorded(stage: RecordedStage, session: Session, side: str) -> tuple[Trace, StepFiles]:
    """What ``--only`` recorded of ``side``; :class:`BadInput` when it is not there, or of another conversion."""
    word, where = (("reference", "torch") if side == SIDES[0] else ("candidate", "Paddle"))
    advice = f"Record it first, where {where} is: {_command(stage, session)} --only {word}"
    places = [session.reports / "traces", session.run.directory / "traces"]
    if side == SIDES[0]:
        places.reverse()
    else:
        places = places[:1]
    directory = next((place for place in places if (place / f"{stage.name}_{side}.npy").is_file()), places[0])
    trace = load_trace(directory, stage.name, side, advice)
    if trace.provenance.source_digest != session.run.conversion.source_digest:
        raise BadInput(f"the {word} in {directory} was recorded from another source than run {session.run.name} "
                              f"converted ({trace.provenance.source_digest}). {advice}")
    if trace.provenance.steps_digest is None:
        raise BadInput(f"the {word} in {directory} comes from a run of both sides, which keeps too little of it. "
                       f"{advice}")
    return trace, StepFiles(directory, stage.name, side)


def paired(stage: RecordedStage, session: Session, watch: Watch = lambda step, answer: None,
           ) -> Iterator[tuple[Step, Step]]:
    """Each step of the reference with the candidate's answer to it, one at a time; the last answer stands alone."""
    asked: deque[Step] = deque()

    def told() -> Iterator[Step]:
        for step in stage.reference(session):
            asked.append(step)
            yield step
    for answer in stage.candidate(session, told()):
        step = asked.popleft() if asked else Step()
        watch(step, answer)
        yield step, answer


@dataclass
class _Recording:
    """What of a side's steps goes into its trace.

    Large arrays wait for that in files without names in ``directory``: of a model that is paged they would be what
    grows with its depth.
    """

    directory: Path
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    inputs_digest: str | None = None

    def add(self, step: Step) -> None:
        self.arrays |= {name: self._kept(array) for name, array in step.recorded.items()}
        self.inputs_digest = step.told.get("inputs_digest", self.inputs_digest)

    def _kept(self, array: np.ndarray) -> np.ndarray:
        if array.nbytes < LARGE:
            return array
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            array.tofile(file)
            file.flush()
            return np.asarray(np.memmap(file, array.dtype, "r", shape=array.shape))

    def trace(self, provenance: Provenance) -> Trace:
        return Trace(provenance, self.arrays)


def _provenance(stage: Stage | RecordedStage, session: Session, side: str, inputs_digest: str | None,
                told: Sequence[str] = ()) -> Provenance:
    digest = session.run.source_digest
    if side == SIDES[0]:
        return Provenance(stage.name, "torch", _torch_version(), session.run.head.architecture, digest, digest,
                          inputs_digest, None, tuple(_code_told(session)))
    if isinstance(stage, RecordedStage) and not stage.weights:
        return Provenance(stage.name, "paddle", _paddle_version(), session.run.head.architecture, None, digest,
                          inputs_digest, None, tuple(told))
    candidate = session.candidate
    divergence, _ = vars(session).get("evidence", (None, []))  # the weights stage is the evidence and never asks
    return Provenance(stage.name, candidate.framework, candidate.version, type(candidate.model).__name__,
                      candidate.weights_digest, digest, inputs_digest, divergence, tuple(told))


def _code_told(session: Session) -> list[str]:
    """Which code the reference is, where the checkpoint brought it along."""
    if "reference" not in vars(session) or not session.run.family.remote_code:
        return []
    from .remote import code_of, described
    return [f"The reference is code that the checkpoint brings along: {described(code_of(session.run))}."]


def _write_reprod_diff(stage: RecordedStage, traces: Path, left: Trace, right: Trace) -> None:
    """What ReprodDiffHelper says. Its package wants paddle: where that is not installed, the text is left out."""
    if left.arrays and right.arrays and find_spec("reprod_log") and find_spec("paddle"):
        write_reprod_diff(left.arrays, right.arrays, traces / f"{stage.name}_diff.txt")


def _paddle_version() -> str:
    import paddle
    return paddle.__version__


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed; its checkpoint was read as a file"
