"""``python -m align.backward``: gradients of every parameter, after one and after several iterations.

Both sides are in eval mode, so without dropout; but batch norms are trained as in a fine-tuning, by the batch's own
statistics, and the running ones are compared where gradients are. Each iteration adds up the gradients of several
micro-batches, clips them by their global norm and takes a step of plain SGD, so that an error of one is in the next.
The first iteration and the last are compared (before clipping), and the global norms of all.

Each recorded module is also judged by itself: fed what enters torch's, and given torch's gradient of what it gives. Its
parameters' gradients, and that of what enters it, are then its own work alone, so that the block at fault is named
and those before it, which a wrong gradient has passed through, are cleared.

Where weights come in block by block, there is one iteration of one batch: see recompute.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.errors import BadInput

from .compare import TensorResult, compare, missing
from .diagnose import Explanation
from .explanations.gradients import explained
from .floor import YARDSTICK, Quantities, Quantity, floors_of, look_again
from .gradients.batches import (
    ROWS,
    Batch,
    Course,
    Gradients,
    Isolated,
    Settings,
    backwards,
    batches_of,
    digest_of,
    other_batches,
)
from .gradients.recompute import WHOLE
from .inputs import Inputs
from .noise import NoiseFloor
from .options import above_zero, positive, two_or_more
from .recording import paired
from .stage import Findings, RecordedStage, Session, chosen, main, spelled
from .tasks import BARE
from .tolerance import CANCELLED, CEILING, NEAR, REORDERED_RUNS, SECOND_LOOK
from .trace import RECORDED, Step

if TYPE_CHECKING:
    from .gradients.torch_recompute import PagedTorchGradients

ALONE = " (isolated)"
NORM, CLIPPED = "global norm", "clipped global norm"
ISOLATED, PROPAGATED = "isolated", "propagated"
CLIPPED_APART = "clipped apart"
PAGED_ROWS = 2
TRAINED = ("Batch norms were trained, by each micro-batch's own statistics; their running statistics are compared, "
           "too. torch divides what goes into the running variance by n - 1, Paddle's own batch norm by n.")
COPIES = 15
"""How many times a side's weights this stage holds unless it pages, worked out rather than measured: weights, those to
go back to and gradients; and each of three times, both sides' gradients and torch's noise in float64."""


def flags(parser: argparse.ArgumentParser) -> None:
    """How many iterations, and of what."""
    parser.set_defaults(copies=COPIES)
    add = parser.add_argument
    add("--iterations", type=two_or_more, default=10, metavar="N", help="how many, at least 2; default 10")
    add("--accumulate", type=positive, default=2, metavar="N",
        help="micro-batches whose gradients are added up for a step; default 2")
    add("--clip", type=above_zero, default=1.0, metavar="NORM",
        help="to which global norm gradients are clipped; default 1.0")
    add("--lr", type=above_zero, default=1e-3, metavar="RATE", help="of the step of SGD; default 1e-3")


def reference(session: Session) -> Iterator[Step]:
    """Torch's gradients with their noise floors, and what the candidate needs: batches, and what entered modules."""
    if session.paged:
        yield from _paged_reference(session)
        return
    settings = _settings(session)
    yield from _recorded(session, settings, _clear_of_kinks(session, batches_of(session.run, settings)))


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle's gradients for the same batches."""
    first = next(steps := iter(steps), Step())
    if first.told.get("paged"):
        yield from _paged_candidate(session, first, steps)
        return
    if session.paged:
        raise BadInput("the reference was recorded with all of its weights in memory: give --paging off here too.")
    side, course = _gradients_of(session.candidate), None
    for step in chain([first], steps):
        if "settings" in step.told:
            settings, batches = Settings(**step.told["settings"]), _batches_of(step)
            session.advance(session.candidate.framework)
            found, absent = side.isolated(batches[0][0], Isolated(step.view("entering"), step.view("arriving")))
            course = side.iterate(batches, settings)
            yield Step({RECORDED: _suffixed(found, ALONE)}, told={
                "inputs_digest": digest_of(batches), "absent": _suffixed_names(absent, ALONE), "shared": side.shared,
                "frozen": side.frozen})
        elif course is None:
            raise BadInput("the reference was recorded without its batches, so the candidate cannot be fed them. "
                           "Record it again: python -m align.backward --only reference")
        else:
            yield _of_course(course, step.told["iteration"])


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Each gradient against its counterpart: modules by themselves first, in the order of a backward pass."""
    first = next(pairs := iter(pairs), None)
    if first is not None and first[0].told.get("paged"):
        return _judged_by_gate(session, chain([first], pairs))
    taken = [pair for pair in chain([first] if first else [], pairs) if pair[0].recorded or pair[1].recorded]
    expected, given = _Side(session, [step for step, _ in taken]), _Side(session, [answer for _, answer in taken])
    floors = {name: (kind, floor) for step, _ in taken for kind, found in step.floors.items()
              for name, floor in found.items()}
    given.take_names_of(expected)
    found = {name: _judged(name, expected, given, floors) for name in _ordered(session, expected, given)}
    notes = [*expected.notes, *given.notes]
    notes += [*_look_again(session, taken, found, expected, given), *_cancelled(found)]
    results = list(found.values())
    values = {name: (float(array), float(given.arrays[name])) for name, array in expected.arrays.items()
              if array.ndim == 0 and name in given.arrays}
    return Findings(results, notes, values, diagnosis=_diagnosis(taken, found, expected, given))


class _Side:
    """What one side recorded, by name, and what it says of itself."""

    def __init__(self, session: Session, steps: Sequence[Step]) -> None:
        self.arrays = {name: array for step in steps
                       for name, array in (step.views.get(WHOLE) or step.recorded).items()}
        self.absent = {name for step in steps for name in step.told.get("absent", ())}
        self.frozen = {name for step in steps for name in step.told.get("frozen", ())}
        self.notes = [note for step in steps for note in step.told.get("notes", ())]
        self.shared = {name: other for step in steps for name, other in step.told.get("shared", {}).items()}
        self._run = session.run
        self.asked: dict[str, str] = {}
        """By a name that this side alone has that of the other side's tensor which it must equal."""
        self.left_out: set[str] = set()

    def take_names_of(self, other: _Side) -> None:
        """Two names of one parameter are compared once, and a parameter that should be tied with what it should be."""
        ties = dict(self._run.tied.values())
        moves = self._run.plan.moves
        made, moved = ({move.target for move in moves if bool(move.filling) == filled} for filled in (True, False))
        there = other.arrays.keys() | other.absent
        for full in [*self.arrays, *self.absent]:
            name, _, suffix = full.partition(" ")
            equal = f"{ties.get(name)} {suffix}"
            if full not in there and equal in there:
                self.asked[full] = equal
            elif full not in there and (name in made or (name in moved and full in self.absent)):
                self.left_out.add(full)
        for full in there:
            name, _, suffix = full.partition(" ")
            if f"{self.shared.get(name)} {suffix}" in self.arrays.keys() | self.absent:
                self.left_out.add(full)
        alone = sorted({full.partition(" ")[0] for full in self.left_out - there} & made)
        if alone:
            self.notes.append(f"{len(alone)} parameters have no counterpart in torch's class, and no gradient of them "
                              f"is compared: {alone[0]} and the like.")


def _ordered(session: Session, expected: _Side, given: _Side) -> list[str]:
    """What is judged: isolated, then by iteration, each in the order of a backward pass; norms are last."""
    names = [name for name in dict.fromkeys([*expected.arrays, *expected.absent, *given.arrays, *given.absent])
             if name not in given.left_out and not (name in expected.absent and name in given.absent)]
    scalars = [name for name in names if name.startswith((NORM, CLIPPED))]
    suffixes = dict.fromkeys(name.partition(" ")[2] for name in names if name not in scalars)
    found = []
    for suffix in sorted(suffixes, key=lambda suffix: suffix != ALONE.strip()):
        bare = [name.partition(" ")[0] for name in names if name not in scalars and name.partition(" ")[2] == suffix]
        found += [f"{name} {suffix}" for name in backwards(session.run, bare)]
    return found + scalars


def _judged(name: str, expected: _Side, given: _Side, floors: Mapping[str, tuple[str, NoiseFloor]]) -> TensorResult:
    """The ratio to torch's noise decides; a gradient on one side only is a failure."""
    asked = given.asked.get(name, name)
    theirs, ours = expected.arrays.get(asked), given.arrays.get(name)
    if theirs is None or ours is None:
        return _one_sided(name, asked, expected, given)
    kind, known = floors[asked]
    if kind == PROPAGATED:
        return compare(name, theirs, ours, np.inf, None, {PROPAGATED: known})
    return compare(name, theirs, ours, np.inf, ours, {ISOLATED: known})


def _cancelled(found: Mapping[str, TensorResult]) -> list[str]:
    """Why some relative errors are large where all is well."""
    names = [name for name, result in found.items() if result.passed and (result.floor or 0.0) > CANCELLED]
    in_part = [name for name, result in found.items() if result.passed and name.endswith(ALONE)
               and CEILING < (result.floor or 0.0) <= CANCELLED]
    return [f"Gradients that {what}: {len(several)}, such as {several[0]}." for several, what in (
        (names, f"torch itself does not know to {CANCELLED:g}, because they cancel or because an update has made them "
                "chaotic, so that their relative error says nothing and only the ratio to torch's noise does"),
        (in_part, f"torch itself does not know to {CEILING:g}, so that a smaller mistake would not show")) if several]


def _one_sided(name: str, asked: str, expected: _Side, given: _Side) -> TensorResult:
    parameter = name.partition(" ")[0]
    if asked in expected.arrays and name in given.absent:
        why = (" it is frozen there (stop_gradient)" if parameter in given.frozen else
               " what it takes part in does not reach the loss")
        return _failed(name, f"torch has a gradient and this net has none:{why}")
    if asked in expected.absent and name in given.arrays:
        return _failed(name, "this net has a gradient and torch has none")
    return missing(name, "candidate" if asked in expected.arrays or asked in expected.absent else "reference")


def _failed(name: str, why: str) -> TensorResult:
    return TensorResult(name, (), "–", 0.0, False, failure=f"{name}: {why}")


def _look_again(session: Session, taken: Sequence[tuple[Step, Step]], found: dict[str, TensorResult], expected: _Side,
                given: _Side) -> list[str]:
    failing = [result for result in found.values() if not result.passed]

    def look() -> int:
        told = next(step for step, _ in taken if "settings" in step.told)
        steps = list(_recorded(session, Settings(**told.told["settings"]), _batches_of(told), SECOND_LOOK))
        floors = {name: (kind, floor) for step in steps for kind, several in step.floors.items()
                  for name, floor in several.items()}
        found.update({result.name: _judged(result.name, expected, given, floors)
                      for result in failing})
        return sum(not result.passed for result in found.values())
    doubtful = len(failing) if all(result.doubtful for result in failing) else 0
    return look_again(session, "backward", doubtful, look)


def _diagnosis(taken: Sequence[tuple[Step, Step]], found: Mapping[str, TensorResult], expected: _Side, given: _Side,
               ) -> Explanation | None:
    failing = [name for name, result in found.items() if not result.passed]
    apart = {name: array for step, _ in taken for name, array in step.view(CLIPPED_APART).items()}
    settings = next((step.told["settings"] for step, _ in taken if "settings" in step.told), None)
    if not failing or settings is None:
        return None
    return explained(failing, expected.arrays, given.arrays, given.asked, apart, Settings(**settings))


# The reference --------------------------------------------------------------------------------------------------------

def _recorded(session: Session, settings: Settings, batches: list[list[Batch]], reordered: int = REORDERED_RUNS,
              ) -> Iterator[Step]:
    """All that the reference has to say of these batches: modules by themselves, then the iterations."""
    from .gradients.torch_side import TorchGradients
    side = TorchGradients(session.reference, session.run, trained=True)
    session.advance("torch")
    isolated = side.observe(batches[0][0])
    alone, absent = side.isolated(batches[0][0], isolated)
    course = side.iterate(batches, settings)
    _require_evidence(course)
    session.advance("torch's own noise")
    measures = [lambda: _quantities(side.isolated(batches[0][0], isolated)[0], ALONE),
                lambda: _of_all(side.iterate(batches, settings))]
    plain = [_quantities(alone, ALONE), _of_all(course)]
    by_itself, by_iteration = floors_of(session.reference, measures, plain, reordered, side.modes)
    step = Step({RECORDED: _suffixed(alone, ALONE), "entering": dict(isolated.entering),
                 "arriving": dict(isolated.arriving)}, {ISOLATED: by_itself},
                {"settings": vars(settings), "inputs_digest": digest_of(batches),
                 "absent": _suffixed_names(absent, ALONE), "notes": [
                    *_told(settings, batches, course), *[TRAINED] * side.trains_statistics, YARDSTICK]})
    for number, several in enumerate(batches):
        for part, batch in enumerate(several):
            step.view(f"inputs.{number}.{part}").update(batch.inputs.arrays)
            step.view(f"labels.{number}.{part}").update(batch.labels)
    yield step
    for number in range(1, settings.iterations + 1):
        step = _of_course(course, number)
        step.floors[PROPAGATED] = {name: by_iteration[name] for name in step.recorded}
        if number == 1 and settings.accumulate > 1:
            step.view(CLIPPED_APART).update(_suffixed(side.clipped_apart(batches[0], settings), _at(1)))
        yield step


def _require_evidence(course: Course) -> None:
    """:class:`BadInput` where torch's own gradients are no numbers, or all 0, as those of a net that does nothing."""
    norms = {number: float(np.linalg.norm(found)) for number, found in course.norms.items()}
    bad = next((number for number, norm in norms.items() if not np.isfinite(norm)), None)
    if bad is not None:
        why = "Give a smaller --lr." if bad > 1 else "See what align.loss says of this model."
        raise BadInput(f"torch's own gradients are no finite numbers in iteration {bad}, so there is nothing to "
                       f"compare with. {why}")
    if not any(norms.values()):
        raise BadInput("torch's own gradients are 0 in every iteration, as those of a loss over one class are, so "
                       "there is nothing to compare.")


def _clear_of_kinks(session: Session, batches: list[list[Batch]]) -> list[list[Batch]]:
    """``batches``, of which the first, that of the isolated gradients, is drawn anew while an element is so near to the
    kink of a relu that rounding chooses its gradient; of all draws the one that stays farthest, where none is clear.
    """
    from .gradients.torch_side import TorchGradients
    side = TorchGradients(session.reference, session.run, trained=True)
    farthest, found = -1.0, batches[0][0]
    for batch in chain(batches[0][:1], other_batches(session.run)):
        distance = side.nearest_kink(batch)
        if distance > farthest:
            farthest, found = distance, batch
        if distance > NEAR:
            break
    return [[found, *batches[0][1:]], *batches[1:]]


def _told(settings: Settings, batches: Sequence[Sequence[Batch]], course: Course) -> list[str]:
    rows = batches[0][0].inputs.rows.batch
    told = [f"{settings.iterations} iterations of SGD (rate {settings.lr:g}) in eval mode, so without dropout: each "
            f"adds up the gradients of {settings.accumulate} seeded micro-batches of {rows} rows and clips them to a "
            f"global norm of {settings.clip:g}. Compared before clipping. torch's clip_grad_norm_ divides by the norm "
            "+ 1e-6, Paddle's by the norm; that difference is allowed for."]
    if course.absent:
        told.append(f"{len(course.absent)} parameters take no part in torch's loss and have no gradient: "
                    f"{course.absent[0]} and the like.")
    return told


def _of_course(course: Course, number: int) -> Step:
    """What there is of one iteration."""
    arrays = _suffixed(course.gradients.get(number, {}), _at(number))
    arrays[f"{NORM}{_at(number)}"] = np.asarray(np.linalg.norm(course.norms[number]))
    arrays[f"{CLIPPED}{_at(number)}"] = np.asarray(course.clipped[number])
    absent = _suffixed_names(course.absent, _at(number)) if number in course.gradients else []
    return Step({RECORDED: arrays}, told={"iteration": number, "absent": absent})


def _of_all(course: Course) -> Quantities:
    """Every quantity that is compared. The norm n of norms n_p moves by the sum of n_p / n times what these move by."""
    found: dict[str, Quantity] = {}
    for number, norms in course.norms.items():
        found |= _quantities(_of_course(course, number).recorded, "")
        total = np.linalg.norm(norms)
        terms = np.square(norms) / (2 * total if total else 1.0)
        name = f"{NORM}{_at(number)}"
        found[name] = Quantity(found[name].value, terms)
    return found


def _quantities(arrays: Mapping[str, np.ndarray], suffix: str) -> dict[str, Quantity]:
    return {f"{name}{suffix}": Quantity(array) for name, array in arrays.items()}


def _at(number: int) -> str:
    return f" (iteration {number})"


def _suffixed(arrays: Mapping[str, np.ndarray], suffix: str) -> Gradients:
    return {f"{name}{suffix}": array for name, array in arrays.items()}


def _suffixed_names(names: Iterable[str], suffix: str) -> list[str]:
    return [f"{name}{suffix}" for name in names]


def _batches_of(step: Step) -> list[list[Batch]]:
    settings = Settings(**step.told["settings"])
    return [[Batch(Inputs(step.view(f"inputs.{number}.{part}")), step.view(f"labels.{number}.{part}"))
             for part in range(settings.accumulate)] for number in range(settings.iterations)]


def _gradients_of(side: Any) -> Any:
    """Of a Paddle net, or of a torch net that is compared with torch."""
    if side.framework == "torch":
        from .gradients.torch_side import TorchGradients
        return TorchGradients(side, side.run, trained=False)
    from .gradients.paddle_side import PaddleGradients
    return PaddleGradients(side)


def _settings(session: Session) -> Settings:
    options = session.options
    return Settings(options.iterations, options.accumulate, options.clip, options.lr)


# A model larger than memory -------------------------------------------------------------------------------------------

def _paged_reference(session: Session, reordered: int = REORDERED_RUNS) -> Iterator[Step]:
    """The batch first, then two steps for each gate, from the last to the first."""
    yield from _paged(session, lambda side, batch: side.steps(batch, reordered, session.advance))


def _paged_isolated(session: Session, names: Collection[str]) -> Iterator[Step]:
    """The batch first, then what the modules ``names`` give by themselves, by the runs of a second look."""
    yield from _paged(session, lambda side, batch: side.isolated_again(batch, SECOND_LOOK, names, session.advance),
                      {"isolated": True})


def _paged(session: Session, steps: Callable[[PagedTorchGradients, Batch], Iterator[Step]],
           told: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Step]:
    from .gradients.torch_recompute import PagedTorchGradients
    if given := spelled(chosen(STAGE, session.options)):
        raise BadInput(f"{given}: weights come in block by block here, so that there is one iteration of one batch, "
                       "without clipping and without a step. Leave it out, or give --paging off.")
    rows = ROWS if session.run.head.task in BARE else PAGED_ROWS  # of one pair the contrastive loss is 0
    batch = batches_of(session.run, Settings(1, 1, 1.0, 1.0), rows)[0][0]
    side = PagedTorchGradients(session.reference, session.run)
    yield Step({"inputs": dict(batch.inputs.arrays), "labels": dict(batch.labels)}, told={
        "paged": True, **told, "inputs_digest": digest_of([[batch]]), "notes": [
            f"One iteration, of {batch.inputs.rows.batch} seeded rows, in eval mode: weights came in block by block, "
            "and each block was computed again on the way back.", YARDSTICK]})
    yield from steps(side, batch)


def _paged_candidate(session: Session, first: Step, steps: Iterable[Step]) -> Iterator[Step]:
    from .gradients.paddle_recompute import PagedPaddleGradients
    if session.candidate.framework == "torch":
        raise BadInput("two torch models cannot be compared block by block. Use --paging off.")
    batch = Batch(Inputs(first.view("inputs")), first.view("labels"))
    yield Step(told={"inputs_digest": digest_of([[batch]])})
    side = PagedPaddleGradients(session.candidate)
    yield from (side.isolated if first.told.get("isolated") else side.answers)(batch, steps)


def _worst_told(judged: Mapping[str, TensorResult]) -> str:
    worst = max(judged.values(), key=lambda result: (not result.passed, result.share or 0.0), default=None)
    if worst is None or worst.share is None:
        return "…"
    return f"{worst.name} {'ok' if worst.passed else 'FAIL'}, {100 * worst.share:.0f} % of what torch's noise allows"


def _judged_by_gate(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    found, notes = _of_gates(session, pairs)
    failing = {name: result for name, result in found.items() if not result.passed}

    def look() -> int:
        modules = _modules_of(session, failing)
        reference = partial(_paged_isolated, names=modules) if modules else partial(
            _paged_reference, reordered=SECOND_LOOK)
        stage = replace(STAGE, reference=reference)
        again, _ = _of_gates(session, paired(stage, session), failing)
        found.update(again)
        return sum(not result.passed for result in found.values())
    doubtful = len(failing) if all(result.doubtful for result in failing.values()) else 0
    notes += look_again(session, "backward", doubtful, look)
    names = sorted(found, key=lambda name: not name.endswith(ALONE))
    return Findings([found[name] for name in names], [*notes, *_cancelled(found)])


def _modules_of(session: Session, failing: Iterable[str]) -> set[str]:
    """The modules that all these isolated gradients are of; none where one is not isolated, or of no module."""
    modules = sorted((name for _, name in session.run.modules), key=len)
    homes = {next((module for module in modules if f"{name.partition(' ')[0]}.".startswith(f"{module}.")), None)
             if name.endswith(ALONE) else None for name in failing}
    return set() if None in homes else homes


def _of_gates(session: Session, pairs: Iterable[tuple[Step, Step]], asked: Container[str] | None = None,
              ) -> tuple[dict[str, TensorResult], list[str]]:
    """Results and notes of each gate when both sides have told it, of all names or of those ``asked``; of its gradients
    nothing is kept but what comparing them gave.
    """
    found: dict[str, TensorResult] = {}
    notes: list[str] = []
    for step, answer in pairs:
        expected, given = _Side(session, [step]), _Side(session, [answer])
        given.take_names_of(expected)
        floors = {name: (kind, floor) for kind, several in step.floors.items() for name, floor in several.items()}
        notes += expected.notes
        judged = {name: _judged(name, expected, given, floors) for name in _ordered(session, expected, given)
                  if (name in expected.arrays or name in given.arrays or name in expected.absent)
                  and (asked is None or name in asked)}
        session.advance(_worst_told(judged))
        found |= judged
        del expected, given, floors
        for one in (step, answer):
            one.views.clear()
            one.floors.clear()
    return found, notes


STAGE = RecordedStage("backward", "Compare the gradients of every parameter after one and after several iterations.",
                      reference, candidate, judge, flags)

if __name__ == "__main__":
    sys.exit(main(STAGE))
