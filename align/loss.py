"""``python -m align.loss``: the loss with and without ignored labels, with padding, and without reduction."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from convert.errors import BadInput

from .candidate import Candidate
from .compare import compare
from .inputs import SEED, Inputs, batches, seeded
from .reference import Reference
from .stage import Findings, Session, Stage, main
from .tasks import TASKS, Labels, numbers
from .texts import Encoder, load_rows, load_tokenizer, plain_texts
from .tolerance import LOSS, TOKEN_LOSS

PAIRS = 16
Case = tuple[str, Inputs, Labels]


def find(session: Session) -> Findings:
    """Each case on both sides: the class's own loss, and the losses per token or row."""
    if session.run.head.task == "encoder":
        return _encoder(session)
    found, recorded = [], {}
    for told, side in (("torch", session.reference), ("paddle", session.candidate)):
        session.advance(told)
        recorded[told] = {name: value for case in cases(session) for name, value in losses(session, side, case)}
    for name, expected in recorded["torch"].items():
        found.append(compare(name, expected, recorded["paddle"][name], LOSS if expected.ndim == 0 else TOKEN_LOSS))
    notes = ["These labels are numbers, not classes, so there is none to ignore."] if any(
        numbers(labels) for _, _, labels in cases(session)) else []
    digest = Inputs({f"{name}.{key}": array for name, inputs, labels in cases(session)
                     for key, array in {**inputs.arrays, **labels}.items()}).digest
    return Findings(found, digest, recorded["torch"], recorded["paddle"], notes, _scalars(recorded))


def cases(session: Session) -> list[Case]:
    """(name, inputs, labels): all labels valid; with padding; with padding and three of ten labels ignored."""
    run = session.run
    task, generator = TASKS[run.head.task], np.random.default_rng(SEED)
    whole, padded = (seeded(run.config, run.sizes, padded=padded) for padded in (False, True))
    drawn = [("plain", whole, False), ("padded", padded, False), ("ignored", padded, True)]
    found = [(name, inputs, task.labels(inputs, run.config, run.sizes, generator, ignore))
             for name, inputs, ignore in drawn]
    return [case for case in found if not numbers(case[2])] or found[:2]


def losses(session: Session, side: Reference | Candidate, case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value): the mean loss as a scalar, then each unreduced one as a vector."""
    name, inputs, labels = case
    outputs = side.outputs({**inputs.arrays, **labels})
    if "loss" not in outputs:
        raise BadInput(f"the {side.framework} net returned no loss for the labels {', '.join(labels)}; it returned "
                       f"{', '.join(outputs)}.")
    yield f"loss.{name}", outputs["loss"].reshape(())
    for kind, (logits, flat) in TASKS[session.run.head.task].token_losses(outputs, labels).items():
        yield f"loss.{name}.{kind}", side.token_loss(logits, flat)


def _encoder(session: Session) -> Findings:
    """A bare encoder has no loss of its own: the contrastive loss that sentence encoders are trained with.

    The temperature is 1. At the usual 0.05 a trained encoder's loss is some 1e-4, the difference of two numbers
    near 20, so that rounding alone moves it by 1e-4 of itself; at 1 it lies near log(pairs).
    """
    inputs = _pairs(session)
    recorded = {}
    for told, side in (("torch", session.reference), ("paddle", session.candidate)):
        session.advance(told)
        hidden = side.outputs(inputs.arrays)["last_hidden_state"]
        recorded[told] = {"loss.contrastive": side.contrastive_loss(hidden, inputs.mask, 1.0).reshape(())}
    result = compare("loss.contrastive", *(recorded[told]["loss.contrastive"] for told in ("torch", "paddle")), LOSS)
    notes = ["A bare encoder has no loss of its own: this is the in-batch contrastive loss of its mean-pooled rows."]
    return Findings([result], inputs.digest, recorded["torch"], recorded["paddle"], notes, _scalars(recorded))


def _pairs(session: Session) -> Inputs:
    """Passages, then what follows each; the padded seeded rows where the checkpoint has no tokenizer."""
    run = session.run
    tokenizer = load_tokenizer(run.source if run.source.is_dir() else run.source.parent)
    if tokenizer is None:
        return seeded(run.config, run.sizes)
    encoder = Encoder(tokenizer, run.config, run.sizes, max_length=128)
    _, rows = load_rows(None, "test", PAIRS)
    texts = [{"text": row[column]} for column in ("text", "next") for row in rows]
    return batches([example.inputs for example in plain_texts(texts, encoder)], run.config, len(texts))[0]


def _scalars(recorded: dict[str, dict[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    return {name: (float(value), float(recorded["paddle"][name]))
            for name, value in recorded["torch"].items() if value.ndim == 0}


STAGE = Stage("loss", "Compare the loss with and without ignored labels, padding and reduction.", find)

if __name__ == "__main__":
    sys.exit(main(STAGE))
