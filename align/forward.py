"""``python -m align.forward``: embeddings, every block, final hidden states and logits, on the same inputs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from convert.errors import BadInput

from .compare import TensorResult, compare, missing
from .diagnose import Explanation, diagnose, wrong_inside
from .floor import YARDSTICK, look_again
from .inputs import LENGTH, ROWS, SIDES, Inputs, seeded, sides
from .inside import PROBE, Places
from .lint import Description, differences
from .noise import Kind, NoiseFloor
from .options import positive
from .runs import Run
from .scores import log_softmax
from .stage import Findings, RecordedStage, Session, main
from .tolerance import CEILING, SECOND_LOOK, margin_noise
from .trace import RECORDED, Step


def reference(session: Session) -> Iterator[Step]:
    """Torch's pass over the seeded inputs, module by module, with its noise floor."""
    inputs = seeded_inputs(session, "forward")
    told = {"inputs_digest": inputs.digest, "notes": list(inputs.notes)}
    for step in session.reference.steps(inputs):
        step.told |= told
        step.views |= {"inputs": dict(inputs.arrays)} if told else {}
        told = {}
        session.advance(f"torch {next(reversed(step.recorded), '')}")
        yield step


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle's passes over the same inputs: one of its own, and three in which torch's activations are fed to it."""
    steps = iter(steps)
    first = next(steps, Step())
    inputs = Inputs(first.view("inputs"))
    if not inputs.arrays:
        raise BadInput("the reference was recorded without its inputs, so the candidate cannot be fed them. Record it "
                       "again: python -m align.forward --only reference")
    told = {"inputs_digest": inputs.digest, "described": session.candidate.described()}
    for answer in session.candidate.answers(inputs, chain([first], steps)):
        answer.told, told = told, {}
        session.advance(f"paddle {next(reversed(answer.recorded), '')}")
        yield answer


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Every module propagated, isolated and on a small input, norms too, sublayers; then why, where something fails.

    A module that torch's class does not have, such as the pooler of PaddleNLP's masked LM, is not compared.
    """
    return judged(session, pairs, _diagnosis, look_into)


def judged(session: Session, pairs: Iterable[tuple[Step, Step]], explain: Explain, look_inside: LookInside) -> Findings:
    """:func:`judge` with ``explain`` to say why the first bad place, if there is one, is bad, and ``look_inside`` to
    name what is bad in a module that is so on a small input.
    """
    found = Comparison(session.run)
    for step, answer in pairs:
        session.advance(found.add(step, answer))
    found.close()
    notes = look_again(session, "forward", found.doubtful, lambda: found.look_again(
        session.reference.steps(found.inputs, SECOND_LOOK)))
    tensors, sublayers = found.results()
    bad = first_bad(tensors, session.run)
    diagnosis = explain(session, found.inputs, bad)
    named = _named(sublayers, bad, session.run)
    if named and named.endswith(SMALL) and not (diagnosis or session.options.compare):
        named = look_inside(session, found.inputs, named)
    probes = [tensor for tensor in tensors if tensor.name.endswith(PROBE)]
    notes = [*found.notes, *_told(found.inputs), *notes, *unjudged(session.run, found.present, [*probes, *sublayers]),
             *agreement(found.outputs["reference"], found.outputs["candidate"]), *config_lint(session.run),
             *(differences(**found.described) if len(found.described) == 2 else [])]
    if session.options.compare and (named or session.weights_divergence):
        notes.append("Why was not looked for: python -m align.diagnose does, where both frameworks are installed.")
    return Findings(tensors, notes, sublayers=sublayers, named=named, diagnosis=diagnosis)


Explain = Callable[[Session, Inputs, TensorResult | None], Explanation | None]
LookInside = Callable[[Session, Inputs, str], str]
SMALL = ": on a small input"
PARTS = ("inside", "arriving", "small")
COMPARED = {RECORDED, "isolated", *PARTS}
KINDS: tuple[Kind, ...] = ("propagated", "isolated")


@dataclass(frozen=True)
class _Pair:
    """What both sides gave at one place. ``isolated``: the candidate's answer to torch's input."""

    view: str
    name: str
    told: str
    expected: np.ndarray
    given: np.ndarray
    isolated: np.ndarray

    def judged(self, floors: Mapping[str, Mapping[str, NoiseFloor]]) -> TensorResult:
        """By the floors of a step: a module's of both kinds, a part's under its view."""
        known = ({kind: floors[kind][self.name] for kind in KINDS if self.name in floors.get(kind, {})}
                 if self.view == RECORDED else {"isolated": floors[self.view][self.name]})
        return compare(self.told, self.expected, self.given, CEILING, self.isolated, known)


class Comparison:
    """Takes in steps and answers, and compares whatever both sides have given; the rest waits for its counterpart."""

    def __init__(self, run: Run) -> None:
        self.notes: list[str] = []
        self.present: list[str] = []
        self.described: dict[str, Description] = {}
        self.inputs = run.inputs({})
        self.outputs: dict[str, dict[str, np.ndarray]] = {"reference": {}, "candidate": {}}
        self._run, self._places = run, Places.of(run)
        self._modules = {name for _, name in run.modules}
        self._expected, self._given = Step(), Step()
        self._answered: set[str] = set()
        self._order: list[str] = []
        self._tensors: dict[str, TensorResult] = {}
        self._parts: dict[str, TensorResult] = {}
        self._doubtful: list[_Pair] = []

    def add(self, step: Step, answer: Step) -> str:
        """Compare what can be compared now; returns a few words on how it goes."""
        self.notes += step.told.get("notes", [])
        self.present += step.told.get("present", [])
        self.inputs = self._run.inputs(step.view("inputs")) if step.view("inputs") else self.inputs
        self._order += step.recorded
        for side, one in (("reference", step), ("candidate", answer)):
            self.described |= {side: one.told["described"]} if "described" in one.told else {}
            self.outputs[side] |= {name: array for name, array in one.recorded.items() if name not in self._modules}
        for waiting, come in ((self._expected, step), (self._given, answer)):
            for view in COMPARED & come.views.keys():
                waiting.view(view).update(come.views[view])
        for view, floors in step.floors.items():
            self._expected.floors.setdefault(view, {}).update(floors)
        self._answered |= answer.recorded.keys() | answer.view("inside").keys()
        told = [self._compare_module(name) for name in list(self._expected.recorded)
                if name in self._given.recorded and name in self._given.view("isolated")]
        for view in PARTS:
            for name in [name for name in self._expected.view(view) if name in self._given.view(view)]:
                self._compare_part(view, name)
        return next((f"{result.name} {'ok' if result.passed else 'FAIL'}, rel-L2 {result.measures.rel_l2:.1e}"
                     for result in reversed(told) if result.measures), "…")

    def close(self) -> None:
        """Nothing comes any more: whatever was asked of a module that the candidate did run is a failure."""
        for view in PARTS:
            for name in self._expected.view(view).keys() & self._answered:
                self._part(view, name, missing(self._told(view, name), "candidate"))
        absent = self._modules - set(self.present)
        for name in self._expected.recorded:
            self._tensors[name] = missing(name, "candidate")
        for name in self._given.recorded:
            if name not in absent:
                self._order.append(name)
                self._tensors[name] = missing(name, "reference")

    def results(self) -> tuple[list[TensorResult], list[TensorResult]]:
        """(modules, probes and outputs; parts of modules), in the order of execution."""
        order = {name: number for number, name in enumerate(self._order)}
        ordered = sorted(self._tensors.values(), key=lambda tensor: (
            position(tensor.name, self._run), order.get(tensor.name, len(order))))
        return ordered, [self._parts[name] for name in self._places.judged if name in self._parts]

    @property
    def doubtful(self) -> int:
        """How many places fail by so little that another look may clear them; 0 where any other place fails."""
        failing = [result for result in (*self._tensors.values(), *self._parts.values()) if not result.passed]
        return len(failing) if all(result.doubtful for result in failing) else 0

    def look_again(self, steps: Iterable[Step]) -> int:
        """Judge the doubtful places by other floors, those of ``steps``; returns how many still fail."""
        for step in steps:
            for pair in self._doubtful:
                if pair.name in step.view(pair.view):
                    self._reconsider(pair, pair.judged(step.floors))
        return sum(not result.passed for result in (*self._tensors.values(), *self._parts.values()))

    def _compare_module(self, name: str) -> TensorResult:
        pair = _Pair(RECORDED, name, name, self._expected.recorded.pop(name), self._given.recorded.pop(name),
                     self._given.view("isolated").pop(name))
        return self._compare(pair)

    def _compare_part(self, view: str, name: str) -> None:
        given = self._given.view(view).pop(name)
        self._compare(_Pair(view, name, self._told(view, name), self._expected.view(view).pop(name), given, given))

    def _compare(self, pair: _Pair) -> TensorResult:
        result = pair.judged(self._expected.floors)
        for kind in KINDS if pair.view == RECORDED else (pair.view,):
            self._expected.floors.get(kind, {}).pop(pair.name, None)
        if result.doubtful:
            self._doubtful.append(pair)
        self._part(pair.view, pair.name, result)
        return result

    def _reconsider(self, pair: _Pair, result: TensorResult) -> None:
        """Take the new result, unless it leaves out a test that was asked before."""
        held = self._tensors if pair.view in (RECORDED, "small") else self._parts
        asked, now = ({(found.kind, found.test) for found in one.judgements} for one in (held[pair.told], result))
        if asked <= now:
            held[pair.told] = result

    def _part(self, view: str, name: str, result: TensorResult) -> None:
        (self._tensors if view in (RECORDED, "small") else self._parts)[self._told(view, name)] = result

    def _told(self, view: str, name: str) -> str:
        """What a part is called in the report."""
        return {RECORDED: name, "small": f"{name}{PROBE}", "arriving": self._places.operations.get(name, name),
                "inside": f"{name}: output" if name in self._modules else name}[view]


def first_bad(tensors: Sequence[TensorResult], run: Run) -> TensorResult | None:
    """The first module that fails on the reference's own input; else the first that fails at all.

    An output of the whole model has no input of its own: its error may be its modules' wiring.
    """
    modules = {name for _, name in run.modules}
    failing = [tensor for tensor in tensors if not tensor.passed]
    own = [tensor for tensor in failing if tensor.name.removesuffix(PROBE) in modules and (
        not tensor.judgements or any(found.kind == "isolated" and not found.passed for found in tensor.judgements))]
    return next(iter(own or failing), None)


def position(name: str, run: Run) -> int:
    """Where in the order of execution the module lies that ``name`` is, or is a part of; outputs come last."""
    paths = [path for _, path in run.modules]
    holding = [number for number, path in enumerate(paths) if name == path or name.startswith((f"{path}.", f"{path}:",
                                                                                              f"{path} "))]
    return max(holding, key=lambda number: len(paths[number]), default=len(paths))


def unjudged(run: Run, present: Sequence[str], parts: Sequence[TensorResult]) -> list[str]:
    """What was not judged on its own: sublayers ``present`` in torch that this net has no module for."""
    judged = {part.name.removesuffix(PROBE) for part in parts}
    absent = [name for name in Places.of(run).sublayers if name in present and name not in judged]
    more = f" (+{len(absent) - 6} more)" if len(absent) > 6 else ""
    return [f"Not judged on their own, because this net has no such module or does not call it: {', '.join(absent[:6])}"
            f"{more}. A wrong epsilon there may not show."] if absent else []


def _named(sublayers: Sequence[TensorResult], bad: TensorResult | None, run: Run) -> str | None:
    """The first failing sublayer or operation, unless a module or a norm's epsilon fails in an earlier module."""
    inside = next((part.name for part in sublayers if not part.passed), None)
    whole = bad and bad.name.removesuffix(PROBE) in Places.of(run).inside - Places.of(run).sublayers.keys()
    place = bad and bad.name.replace(PROBE, SMALL if whole else ": epsilon")
    if inside is None or place is None:
        return inside or place
    return place if position(place, run) < position(inside, run) else inside


def look_into(session: Session, inputs: Inputs, named: str) -> str:
    """``named``, or the part of that module that is at fault."""
    session.advance(f"looking into {named}")
    inside = wrong_inside(session, inputs, named.removesuffix(SMALL))
    return f"{inside}{SMALL}" if inside else named


def _diagnosis(session: Session, inputs: Inputs, bad: TensorResult | None) -> Explanation | None:
    """Why: of the weight that differs, else of the first bad place; only where both models are at hand."""
    name = session.weights_divergence or (bad and bad.name)
    if name is None or session.options.compare:
        return None
    session.advance(f"looking for an explanation of {name}")
    return diagnose(session, inputs, name)


def agreement(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> list[str]:
    """For each output of class scores: KL divergence, and agreement of the best and the five best classes.

    Only rows count in which the margin between the scores in question exceeds what rounding can move.
    """
    told = []
    for name, expected in reference.items():
        found = candidate.get(name)
        if not name.endswith("logits") or expected.ndim != 2 or expected.shape[1] < 2 or found is None:
            continue
        if found.shape != expected.shape or not np.isfinite(found).all():
            continue
        left, right = log_softmax(expected), log_softmax(found)
        divergence = float((np.exp(left) * (left - right)).sum(-1).mean())
        shares = [top_agreement(expected, found, count) for count in (1, 5) if count < expected.shape[1]]
        equal = ", ".join(f"top-{count} equal in {same} of {sure}" for count, same, sure in shares)
        told.append(f"{name}: KL divergence {max(divergence, 0.0):.1e}; {equal} rows whose margin exceeds rounding.")
    return told


def top_agreement(expected: np.ndarray, found: np.ndarray, count: int) -> tuple[int, int, int]:
    """(count, rows with the same ``count`` best classes, rows in which rounding cannot decide which they are)."""
    ordered = np.sort(expected, axis=-1)
    sure = ordered[:, -count] - ordered[:, -count - 1] > margin_noise(1.0) * np.abs(expected).max(-1)
    best = [np.sort(np.argpartition(scores, -count, axis=-1)[:, -count:], axis=-1) for scores in (expected, found)]
    return count, int(((best[0] == best[1]).all(-1) & sure).sum()), int(sure.sum())


def config_lint(run: Run) -> list[str]:
    """What the output's config says differently from what the conversion of this source writes."""
    held, intended = run.target_config, run.intended_config
    return [f"config.json: {key} is {held.get(key)!r} in the output; the conversion wrote {intended.get(key)!r}."
            for key in sorted(held.keys() | intended.keys()) if held.get(key) != intended.get(key)]


def _told(inputs: Inputs) -> list[str]:
    return [*inputs.told, YARDSTICK]


def seeded_inputs(session: Session, stage: str) -> Inputs:
    """What the flags ask for, kept with the run as the inputs of ``stage``."""
    run, options = session.run, session.options
    unfit = "--tokens" if options.tokens and run.head.inputs == "pixels" else (
        "--pixels" if options.pixels and run.head.inputs != "pixels" else None)
    if unfit:
        raise BadInput(f"{unfit} is not for {run.head.architecture}, whose inputs are {run.head.inputs}.")
    inputs = seeded(run.config, run.sizes, kind=run.head.inputs, rows=options.rows or ROWS,
                    tokens=options.pixels or options.tokens or LENGTH)
    inputs.save(run.directory / "traces" / f"{stage}_inputs.npz")
    return inputs


def flags(parser: argparse.ArgumentParser) -> None:
    """How many inputs, and how large."""
    add = parser.add_argument
    add("--rows", type=positive, help=f"how many rows go in, as 8; default {ROWS}")
    add("--tokens", type=positive, help=f"of how many tokens a row is at most, as 512; default {LENGTH}")
    add("--pixels", type=sides, metavar="HxW",
        help="height and width of pictures, as 224x224; default {}x{}".format(*SIDES[True]))


STAGE = RecordedStage("forward", "Compare embeddings, blocks, final hidden states and logits.", reference, candidate,
                      judge, flags)

if __name__ == "__main__":
    sys.exit(main(STAGE))
