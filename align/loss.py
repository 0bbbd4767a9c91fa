"""``python -m align.loss``: the loss with and without ignored labels, with padding, and without reduction."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from convert.errors import BadInput

from .candidate import Candidate
from .compare import TensorResult, compare, missing
from .diagnose import Explanation
from .explanations.losses import Supposed, explained, supposed
from .floor import YARDSTICK, Quantity, floors_of, look_again
from .inputs import SEED, Inputs, batches, seeded
from .noise import NoiseFloor
from .reference import Reference
from .stage import Findings, RecordedStage, Session, main
from .tasks import BARE, TASKS, Labels, Task, base_of, hidden_states, numbers, terms_of
from .texts import Encoder, echoed_texts, load_rows, plain_texts, tokenizer_of
from .tolerance import REORDERED_RUNS, SECOND_LOOK, loss_ceiling
from .trace import RECORDED, Step

PAIRS, TEMPERATURE = 16, 1.0
SHOWN = ("logits", "last_hidden_state")
SUMS, ISOLATED, PROPAGATED = "sums", "isolated", "propagated"
Case = tuple[str, Inputs, Labels]
Outputs = Mapping[str, np.ndarray]


def reference(session: Session) -> Iterator[Step]:
    """Torch's losses with their noise floors; inputs and labels of each case for the candidate, and torch's outputs."""
    yield _recorded(session, _encoder_cases(session) if session.run.head.task in BARE else cases(session))


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle's losses for the same inputs and labels, and what its unreduced ones are of torch's outputs."""
    for step in steps:
        named = _cases_of(step)
        if not named:
            raise BadInput("the reference was recorded without its inputs, so the candidate cannot be fed them. Record "
                           "it again: python -m align.loss --only reference")
        answer, _ = _losses(session, session.candidate, named)
        for case in named:
            answer.view(ISOLATED).update(_isolated(session, case, step.view(f"outputs.{case[0]}")))
        yield answer


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Each loss against its counterpart: the means, and the losses per token or row."""
    taken, notes, values, mistakes = list(pairs), [], {}, {}
    found: dict[str, TensorResult] = {}
    for step, answer in taken:
        notes += step.told.get("notes", [])
        mistakes |= step.told.get("mistakes", {})
        found |= {name: _judged(name, step, answer, step.floors) for name in step.recorded}
        found |= {name: missing(name, "reference") for name in answer.recorded if name not in step.recorded}
        values |= {name: (float(value), float(answer.recorded[name])) for name, value in step.recorded.items()
                   if value.ndim == 0 and name in answer.recorded}
    notes += _look_again(session, taken, found)
    wrong = {name: both for name, both in values.items() if not found[name].passed}
    return Findings(list(found.values()), notes, values, diagnosis=_diagnosis(wrong, mistakes))


def _judged(name: str, step: Step, answer: Step, floors: Mapping[str, Mapping[str, NoiseFloor]]) -> TensorResult:
    """The ratio to torch's noise decides, and that a loss of torch's own outputs is within the fixed tolerance."""
    expected, given, isolated = step.recorded[name], answer.recorded.get(name), answer.view(ISOLATED).get(name)
    if given is None:
        return missing(name, "candidate")
    sums = [side.view(SUMS).get(name) for side in (step, answer)]
    if isolated is None and None not in sums:
        isolated = _reduced(given, *sums)
    known = {kind: floors[kind][name] for kind in (PROPAGATED,) if name in floors.get(kind, {})}
    base = max((floor.base for floor in known.values()), default=0.0)
    return compare(name, expected, given, loss_ceiling(expected, base), isolated, known)


def _reduced(given: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """What the candidate's reduction makes of torch's unreduced losses.

    ``given`` is its mean loss, ``ours`` and ``theirs`` the mean of torch's unreduced losses and of its own, as the task
    defines it. A net that divides by another number, or pairs other labels, has another mean than its own losses.
    """
    return np.asarray(given * (ours / theirs), given.dtype) if theirs else given


def _look_again(session: Session, taken: Sequence[tuple[Step, Step]], found: dict[str, TensorResult]) -> list[str]:
    failing = [result for result in found.values() if not result.passed]

    def look() -> int:
        for step, answer in taken:
            floors = _recorded(session, _cases_of(step), SECOND_LOOK).floors
            found.update({result.name: _judged(result.name, step, answer, floors) for result in failing
                          if result.name in step.recorded})
        return sum(not result.passed for result in found.values())
    doubtful = len(failing) if all(result.doubtful for result in failing) else 0
    return look_again(session, "loss", doubtful, look)


def _diagnosis(values: Mapping[str, tuple[float, float]], mistakes: Mapping[str, Supposed]) -> Explanation | None:
    reference, candidate = ({name: both[side] for name, both in values.items()} for side in (0, 1))
    cause = explained(reference, candidate, mistakes)
    if cause is None:
        return None
    told, name, before, after = cause
    return Explanation("loss", name, f"{told}: with that done to torch's own logits, the error of {name} falls from "
                       f"{before:.1e} to {after:.1e}.", before, after)


def cases(session: Session) -> list[Case]:
    """(name, inputs, labels): all labels valid; with padding; with padding and three of ten labels ignored; and these
    labels without the inputs that can be made of them. Pictures are of another size instead of padded.
    """
    run = session.run
    task, generator = TASKS[run.head.task], np.random.default_rng(SEED)
    whole, padded = (seeded(run.config, run.sizes, kind=run.head.inputs, padded=padded) for padded in (False, True))
    second = "resized" if run.head.inputs == "pixels" else "padded"
    drawn = [("plain", whole, False), (second, padded, False), ("ignored", padded, True)]
    found = [(name, inputs, task.labels(inputs, run.config, run.sizes, generator, ignore))
             for name, inputs, ignore in drawn]
    if task.spared:
        found += [("labels-only", _without(task.spared, inputs), labels) for _, inputs, labels in found[-1:]]
    return [case for case in found if not numbers(case[2])] or found[:2]


def _without(names: Collection[str], inputs: Inputs) -> Inputs:
    return Inputs({name: array for name, array in inputs.arrays.items() if name not in names})


def losses(session: Session, side: Reference | Candidate, case: Case, outputs: Outputs) -> dict[str, Quantity]:
    """By name the mean loss as a scalar, with what it is the sum of, then each unreduced one as a vector.

    A bare encoder has no loss of its own: the contrastive loss that sentence encoders are trained with. Its temperature
    is 1. At the usual 0.05 a trained encoder's loss is some 1e-4, the difference of two numbers near 20, so that
    rounding alone moves it by 1e-4 of itself; at 1 it lies near log(pairs).
    """
    name, inputs, labels = case
    if session.run.head.task in BARE:
        return {f"loss.{name}": _contrastive(side, *hidden_states(outputs, inputs))}
    if "loss" not in outputs:
        raise BadInput(f"the {side.framework} net returned no loss for the labels {', '.join(labels)}; it returned "
                       f"{', '.join(outputs)}.")
    task, config = TASKS[session.run.head.task], session.run.config
    unreduced = _unreduced(side, task, outputs, labels)
    terms, base = terms_of(task, outputs, labels, config, unreduced), base_of(labels, config)
    return {f"loss.{name}": Quantity(outputs["loss"].reshape(()), terms, base),
            **{f"loss.{name}.{kind}": Quantity(array, base=base) for kind, array in unreduced.items()}}


def _unreduced(side: Reference | Candidate, task: Task, outputs: Outputs, labels: Labels) -> dict[str, np.ndarray]:
    return {kind: side.token_loss(logits, flat) for kind, (logits, flat) in task.token_losses(outputs, labels).items()}


def _contrastive(side: Reference | Candidate, hidden: np.ndarray, mask: np.ndarray) -> Quantity:
    value = side.contrastive_loss(hidden, mask, TEMPERATURE).reshape(())
    terms = side.contrastive_losses(hidden, mask, TEMPERATURE) if isinstance(side, Reference) else None
    return Quantity(value, None if terms is None else terms / len(terms), base=1.0)


def _isolated(session: Session, case: Case, outputs: Outputs) -> dict[str, np.ndarray]:
    """The candidate's unreduced losses of torch's ``outputs``; for a bare encoder the contrastive loss."""
    name, inputs, labels = case
    if session.run.head.task in BARE:
        return {f"loss.{name}": _contrastive(session.candidate, *hidden_states(outputs, inputs)).value}
    unreduced = _unreduced(session.candidate, TASKS[session.run.head.task], outputs, labels)
    return {f"loss.{name}.{kind}": array for kind, array in unreduced.items()}


def _recorded(session: Session, named: Sequence[Case], reordered: int = REORDERED_RUNS) -> Step:
    """All that the reference has to say of these cases."""
    side, task, mistakes = session.reference, TASKS.get(session.run.head.task), {}
    shown: dict[str, dict[str, np.ndarray]] = {}

    def heed(case: Case, outputs: Outputs) -> None:
        name, _, labels = case
        shown[name] = {key: array for key, array in outputs.items() if key.endswith(SHOWN)}
        if task and not numbers(labels):
            mistakes[f"loss.{name}"] = supposed(task, outputs, labels, side.token_loss)

    def measure(case: Case) -> dict[str, Quantity]:
        return losses(session, side, case, side.outputs({**case[1].arrays, **case[2]}))
    step, plain = _losses(session, side, named, heed)
    floors = floors_of(side, [partial(measure, case) for case in named], plain, reordered)
    step.floors[PROPAGATED] = {name: floor for each in floors for name, floor in each.items()}
    step.told["mistakes"] = mistakes
    step.told["notes"] += [YARDSTICK]
    for name, inputs, labels in named:
        step.view(f"inputs.{name}").update(inputs.arrays)
        step.view(f"labels.{name}").update(labels)
        step.view(f"outputs.{name}").update(shown[name])
    return step


def _cases_of(step: Step) -> list[Case]:
    names = [view.removeprefix("inputs.") for view in step.views if view.startswith("inputs.")]
    return [(name, Inputs(step.view(f"inputs.{name}")), step.view(f"labels.{name}")) for name in names]


def _losses(session: Session, side: Reference | Candidate, named: Sequence[Case],
            heed: Callable[[Case, Outputs], None] = lambda case, outputs: None,
            ) -> tuple[Step, list[dict[str, Quantity]]]:
    """One pass for each case; what it gave is in the step, and by case behind it."""
    session.advance(side.framework)
    found: dict[str, dict[str, Quantity]] = {}

    def measure(case: Case) -> None:
        outputs = side.outputs({**case[1].arrays, **case[2]})
        found[case[0]] = losses(session, side, case, outputs)
        heed(case, outputs)
    side.sweep([partial(measure, case) for case in named])
    digest = Inputs({f"{name}.{key}": array for name, inputs, labels in named
                     for key, array in {**inputs.arrays, **labels}.items()}).digest
    notes = []
    if session.run.head.task in BARE:
        notes = ["A model without a head has no loss of its own: this is the in-batch contrastive loss of its "
                 "mean-pooled rows."]
    elif any(numbers(labels) for _, _, labels in named):
        notes = ["These labels are numbers, not classes, so there is none to ignore."]
    plain = [found[name] for name, _, _ in named]
    recorded = {name: quantity for each in plain for name, quantity in each.items()}
    sums = {name: np.asarray(quantity.terms.sum()) for name, quantity in recorded.items() if quantity.terms is not None}
    return Step({RECORDED: {name: quantity.value for name, quantity in recorded.items()}, SUMS: sums},
                told={"inputs_digest": digest, "notes": notes}), plain


def _encoder_cases(session: Session) -> list[Case]:
    return [("contrastive", _pairs(session), {})]


def _pairs(session: Session) -> Inputs:
    """Passages, then what follows each; where the checkpoint has no tokenizer, seeded rows or pictures."""
    run = session.run
    tokenizer = None if run.head.inputs == "pixels" else tokenizer_of(run)
    if tokenizer is None:
        return seeded(run.config, run.sizes, kind=run.head.inputs)
    encoder = Encoder(tokenizer, run.config, run.sizes, max_length=128)
    _, rows = load_rows(None, "test", PAIRS)
    texts = [{"text": row[column]} for column in ("text", "next") for row in rows]
    examples = (plain_texts if run.head.task == "encoder" else echoed_texts)(texts, encoder)
    return batches([example.inputs for example in examples], run.config, run.sizes, len(texts), run.head.inputs)[0]


STAGE = RecordedStage("loss", "Compare the loss with and without ignored labels, padding and reduction.", reference,
                      candidate, judge)

if __name__ == "__main__":
    sys.exit(main(STAGE))
