"""``python -m align.loss``: the loss with and without ignored labels, with padding, and without reduction."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from convert.errors import BadInput

from .candidate import Candidate
from .compare import compare, missing
from .diagnose import Explanation
from .explanations.losses import Supposed, explained, supposed
from .inputs import SEED, Inputs, batches, seeded
from .reference import Reference
from .stage import Findings, RecordedStage, Session, main
from .tasks import BARE, TASKS, Labels, hidden_states, numbers
from .texts import Encoder, echoed_texts, load_rows, plain_texts, tokenizer_of
from .tolerance import LOSS, TOKEN_LOSS
from .trace import RECORDED, Step

PAIRS = 16
Case = tuple[str, Inputs, Labels]


def reference(session: Session) -> Iterator[Step]:
    """Torch's losses, and the inputs and labels of each case for the candidate."""
    named = _encoder_cases(session) if session.run.head.task in BARE else cases(session)
    task, mistakes = TASKS.get(session.run.head.task), {}

    def heed(case: Case, outputs: Mapping[str, np.ndarray]) -> None:
        name, _, labels = case
        if task and not numbers(labels):
            mistakes[f"loss.{name}"] = supposed(task, outputs, labels, session.reference.token_loss)
    step = _losses(session, session.reference, named, heed)
    step.told["mistakes"] = mistakes
    for name, inputs, labels in named:
        step.view(f"inputs.{name}").update(inputs.arrays)
        step.view(f"labels.{name}").update(labels)
    yield step


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle's losses for the same inputs and labels."""
    for step in steps:
        names = [view.removeprefix("inputs.") for view in step.views if view.startswith("inputs.")]
        if not names:
            raise BadInput("the reference was recorded without its inputs, so the candidate cannot be fed them. Record "
                           "it again: python -m align.loss --only reference")
        named = [(name, Inputs(step.view(f"inputs.{name}")), step.view(f"labels.{name}")) for name in names]
        yield _losses(session, session.candidate, named)


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Each loss against its counterpart: the means, and the losses per token or row."""
    found, notes, values, mistakes = [], [], {}, {}
    for step, answer in pairs:
        notes += step.told.get("notes", [])
        mistakes |= step.told.get("mistakes", {})
        for name, expected in step.recorded.items():
            found.append(compare(name, expected, answer.recorded[name], LOSS if expected.ndim == 0 else TOKEN_LOSS)
                         if name in answer.recorded else missing(name, "candidate"))
        found += [missing(name, "reference") for name in answer.recorded if name not in step.recorded]
        values |= {name: (float(value), float(answer.recorded[name])) for name, value in step.recorded.items()
                   if value.ndim == 0 and name in answer.recorded}
    return Findings(found, notes, values, diagnosis=_diagnosis(values, mistakes))


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


def losses(session: Session, side: Reference | Candidate, case: Case,
           outputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value): the mean loss as a scalar, then each unreduced one as a vector.

    A bare encoder has no loss of its own: the contrastive loss that sentence encoders are trained with. Its temperature
    is 1. At the usual 0.05 a trained encoder's loss is some 1e-4, the difference of two numbers near 20, so that
    rounding alone moves it by 1e-4 of itself; at 1 it lies near log(pairs).
    """
    name, inputs, labels = case
    if session.run.head.task in BARE:
        yield f"loss.{name}", side.contrastive_loss(*hidden_states(outputs, inputs), 1.0).reshape(())
        return
    if "loss" not in outputs:
        raise BadInput(f"the {side.framework} net returned no loss for the labels {', '.join(labels)}; it returned "
                       f"{', '.join(outputs)}.")
    yield f"loss.{name}", outputs["loss"].reshape(())
    for kind, (logits, flat) in TASKS[session.run.head.task].token_losses(outputs, labels).items():
        yield f"loss.{name}.{kind}", side.token_loss(logits, flat)


def _losses(session: Session, side: Reference | Candidate, named: Sequence[Case],
            heed: Callable[[Case, Mapping[str, np.ndarray]], None] = lambda case, outputs: None) -> Step:
    session.advance(side.framework)
    found: dict[str, dict[str, np.ndarray]] = {}

    def measure(case: Case) -> None:
        outputs = side.outputs({**case[1].arrays, **case[2]})
        found[case[0]] = dict(losses(session, side, case, outputs))
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
    return Step({RECORDED: {name: value for case, _, _ in named for name, value in found[case].items()}},
                told={"inputs_digest": digest, "notes": notes})


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
