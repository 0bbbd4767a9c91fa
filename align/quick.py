"""``python -m align.quick``: one pass of each side over the same inputs, module by module, held against one tolerance.

For gross faults, in hardly more time than the two passes take: a transposed square weight, other heads, a missing
scale. Torch's own rounding error is not measured and no module is fed torch's input, so that an error comes to each
with what it has grown to before. What a module may add to that, and make of it, is what right models do; a fault that
does no more is not seen. An agreement is no evidence of a right model; that of ``align.forward`` is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np

from convert.errors import BadInput

from .candidate import Known
from .compare import TensorResult, compare, missing
from .forward import agreement, config_lint, flags, seeded_inputs
from .inputs import Inputs, Rows
from .lint import Description, differences
from .lockstep import Walks
from .runs import Run
from .side import Side
from .stage import Findings, RecordedStage, Session, main
from .tolerance import quick_allowed
from .trace import RECORDED, Arrays, Step

CAVEAT = ("This was a quick look: torch's own noise was not measured and no module was fed torch's input, so small "
          "faults may hide; align.forward finds them.")


def reference(session: Session) -> Iterator[Step]:
    """Torch's pass over the seeded inputs, a step for what lies between two gates."""
    inputs, side = seeded_inputs(session, "quick"), session.reference
    told = {"inputs_digest": inputs.digest, "notes": [*inputs.notes, *inputs.told], "present": side.present,
            "described": side.described()}
    shown = {"inputs": dict(inputs.arrays)}
    with _walking(side, inputs) as (walks, heard):
        while walks.gate is not None:
            walks.advance()
            side.leave()
            step = Step({RECORDED: heard.take(), **shown}, told=told)
            told, shown = {}, {}
            session.advance(f"torch {next(reversed(step.recorded), '')}")
            yield step


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle's pass over the same inputs, each module when torch is done with its own."""
    steps, side, known = iter(steps), session.candidate, Known()
    first = next(steps, Step())
    inputs = Inputs(first.view("inputs"))
    if not inputs.arrays:
        raise BadInput("the reference was recorded without its inputs, so the candidate cannot be fed them. Record it "
                       "again: python -m align.quick --only reference")
    told = {"inputs_digest": inputs.digest, "described": side.described()}
    with _walking(side, inputs) as (walks, heard):
        for step in chain([first], steps):
            known.learn(step)
            while walks.gate is not None and not known.lacks(walks.gate):
                walks.advance()
            side.leave()
            answer = Step({RECORDED: heard.take()}, told=told)
            told = {}
            session.advance(f"paddle {next(reversed(answer.recorded), '')}")
            yield answer
        while walks.gate is not None:
            walks.advance()
        side.leave()
        yield Step({RECORDED: heard.take()})


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Every module and output of the one pass; the first that fails is the first bad place, for want of better."""
    found = Comparison(session.run)
    for step, answer in pairs:
        session.advance(found.add(step, answer))
    tensors = found.results()
    notes = [*found.notes, *_risen(tensors, session.run), *agreement(*found.outputs), *config_lint(session.run),
             *(differences(*found.described) if all(found.described) else [])]
    return Findings(tensors, notes, caveat=CAVEAT)


class Comparison:
    """Compares each place when both sides have given it. Sides are the reference, then the candidate."""

    def __init__(self, run: Run) -> None:
        self.notes: list[str] = []
        self.described: tuple[Description, Description] = ({}, {})
        self.outputs: tuple[Arrays, Arrays] = ({}, {})
        self._modules = {name for _, name in run.modules}
        self._present: set[str] = set()
        self._waiting: tuple[Arrays, Arrays] = ({}, {})
        self._found: dict[str, TensorResult | None] = {}
        self._largest = 0.0

    def add(self, step: Step, answer: Step) -> str:
        """Compare what can be compared now; returns a few words on how it goes."""
        self.notes += step.told.get("notes", [])
        self._present |= set(step.told.get("present", ()))
        self._found |= dict.fromkeys(step.recorded)
        for side, one in enumerate((step, answer)):
            self.described[side].update(one.told.get("described", {}))
            self._waiting[side].update(one.recorded)
            self.outputs[side].update({name: array for name, array in one.recorded.items()
                                       if name not in self._modules})
        told = [self._compare(name) for name in list(self._waiting[0]) if name in self._waiting[1]]
        return told[-1] if told else "…"

    def results(self) -> list[TensorResult]:
        """In the order of execution. A module that torch's class does not have is not compared."""
        absent = self._modules - self._present
        only = [missing(name, "reference") for name in self._waiting[1] if name not in absent]
        return [result or missing(name, "candidate") for name, result in self._found.items()] + only

    def _compare(self, name: str) -> str:
        """What has failed is not what the next may make more of."""
        result = compare(name, *(waiting.pop(name) for waiting in self._waiting), quick_allowed(self._largest))
        self._found[name] = result
        if result.passed:
            self._largest = max(self._largest, result.measures.rel_l2)
        return f"{name} {'ok' if result.passed else 'FAIL'}" + (
            f", rel-L2 {result.measures.rel_l2:.1e}" if result.measures else "")


class _Heard:
    """What modules and then the model give in one pass, rows of real tokens."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._given: Arrays = {}

    def take(self) -> Arrays:
        """What has been told since the last time."""
        given, self._given = self._given, {}
        return given

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> None: ...

    def answered(self, name: str, array: np.ndarray) -> None:
        self._given[name] = self._rows(name, array)

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...


@contextmanager
def _walking(side: Side, inputs: Inputs) -> Iterator[tuple[Walks, _Heard]]:
    """One pass of ``side`` at its first gate, and who hears its recorded modules."""
    heard = _Heard(inputs.rows)
    with side.walking(heard, inputs.arrays, side.run.modules) as walks:
        yield walks, heard


def _risen(tensors: Sequence[TensorResult], run: Run) -> list[str]:
    """How far the error was below the first failing place: a fault there, or one that has grown on the way to it."""
    bad = next((number for number, tensor in enumerate(tensors) if not tensor.passed), 0)
    if not bad or tensors[bad].measures is None or tensors[bad - 1].measures is None:
        return []
    before, after = (tensors[number].measures.rel_l2 for number in (bad - 1, bad))
    return [f"The error rises from {before:.1e} at {tensors[bad - 1].name} to {after:.1e} at {tensors[bad].name}. "
            f"Why: python -m align.forward --run {run.name}, which feeds each module torch's input."]


STAGE = RecordedStage("quick", "One pass of each side, module by module: gross faults, in little time.", reference,
                      candidate, judge, flags)

if __name__ == "__main__":
    sys.exit(main(STAGE))
