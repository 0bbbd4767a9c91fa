"""What a fine-tuning is fed: rows with the labels that their texts have, in batches; and rows held out for the metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.errors import BadInput

from .. import pictures, prompts
from ..gradients.batches import Batch
from ..inputs import Inputs, batches
from ..pictures import PIXELS, drawn, examples_of
from ..runs import Run
from ..stage import Session
from ..tasks import BARE, IGNORED, Labels, problem_of
from ..texts import ENCODE, Encoder, Example, Row, columns, echoed_texts, load_rows, plain_texts, renamed, tokenizer_of
from .course import Settings

ROWS, SHARE = 64, 4
"""How many rows are read, of which the last in ``SHARE`` is held out."""
CLASSIFYING = ("sequence-classification", "image-classification", "token-classification")


@dataclass(frozen=True)
class Lessons:
    """By step the micro-batches, then what the metric is measured on, and what is told of both."""

    batches: list[list[Batch]]
    held_out: list[Example]
    notes: list[str]


def lessons_of(session: Session, settings: Settings, rows: int, tokens: int) -> Lessons:
    """Of the data set that the flags name, else of what ships with the project; ``rows`` a batch."""
    run, options = session.run, session.options
    if run.head.inputs == "pixels":
        examples, told = _pictures(session)
        first, second = examples, [_mirrored(example) for example in examples]
    else:
        name, found = load_rows(options.dataset, options.split, options.limit or ROWS, run.head.task)
        encoder = Encoder(tokenizer_of(run), run.config, run.sizes, tokens, run.head.prefix or "", run.head.inputs)
        found = renamed(found, options.columns)
        first = second = examples = _readable(ENCODE[run.head.task](found, encoder))
        if run.head.task in BARE:
            first, second = _halves(found, encoder, run.head.task)
        given = "as its tokenizer reads them" if encoder.tokenizer else (
            "as seeded ids, because the checkpoint has no tokenizer")
        told = f"{name}, {given}, at most {encoder.max_length} tokens each"
    if options.dataset is not None:
        _require_classes(examples, run)
    least = -(-len(examples) // SHARE)
    taught = len(examples) - least
    if taught < 1 or (run.head.task in BARE and taught < 2):  # of one pair the contrastive loss is 0
        raise BadInput(f"{len(examples)} rows that have something to learn are too few to train on some and measure on "
                       "others: give 2 or more, of a bare encoder 3, and 2 --tokens or more.")
    pairs = list(zip(first[:taught], second[:taught], strict=True))
    steps = [[_batch([pairs[row] for row in chosen], run) for chosen in several]
             for several in _orders(len(pairs), settings, rows)]
    notes = [f"Data: {len(examples)} rows of {told}. Trained on the first {taught}, in batches of {rows}; the metric "
             f"is measured on the last {least}."]
    return Lessons(steps, examples[taught:], notes)


def _require_classes(examples: Sequence[Example], run: Run) -> None:
    """:class:`BadInput` where a label of the user's own is none of the head's classes."""
    classes = run.sizes.get("labels", 0)
    if run.head.task not in CLASSIFYING or problem_of(run.config, classes) == "regression":
        return
    for label in (label for example in examples for name in ("label", "labels")
                  for label in np.atleast_1d(example.targets.get(name, IGNORED)).tolist()):
        if label != IGNORED and label not in range(classes):
            raise BadInput(f"the data set has the label {label}, and the head of this checkpoint the {classes} classes "
                           f"0 to {classes - 1}. Give rows with labels that it has.")


def held_out_batches(examples: Sequence[Example], run: Run, rows: int) -> list[tuple[Inputs, Sequence[Example]]]:
    """Inputs of so many rows each, with their examples."""
    fed = pictures.batches(examples, rows) if run.head.inputs == "pixels" else batches(
        [example.inputs for example in examples], run.config, run.sizes, rows, run.head.inputs)
    return [(inputs, examples[number * rows: (number + 1) * rows]) for number, inputs in enumerate(fed)]


def _pictures(session: Session) -> tuple[list[Example], str]:
    run, options = session.run, session.options
    name, rows = ("pictures that are drawn by paddle-parity", drawn(options.limit or ROWS, run.sizes["labels"])) if (
        options.dataset is None) else load_rows(options.dataset, options.split, options.limit or ROWS, run.head.task)
    examples, told = examples_of(renamed(rows, options.columns),
                                 run.source if run.source.is_dir() else run.source.parent, run.sizes)
    return [_smaller(example) for example in examples], f"{name}, {told}, of which every third place is taken"


def _mirrored(example: Example) -> Example:
    """What a bare encoder is to find again."""
    return Example({PIXELS: np.ascontiguousarray(example.inputs[PIXELS][:, :, ::-1])}, example.targets)


THINNED = 3


def _smaller(example: Example) -> Example:
    """Every third row and column: a training takes some hundred passes."""
    return Example({PIXELS: np.ascontiguousarray(example.inputs[PIXELS][:, ::THINNED, ::THINNED])}, example.targets)


def _readable(examples: Sequence[Example]) -> list[Example]:
    """Those that have a token to predict, and an answer where one is asked for."""
    return [example for example in examples if len(example.inputs["input_ids"]) > 1
            and example.targets.get("start", 0) >= 0]


def _halves(rows: Sequence[Row], encoder: Encoder, task: str) -> tuple[list[Example], list[Example]]:
    """The first words of each text, and the others, which a bare encoder is to find again."""
    columns(rows, text=str)
    words = [row["text"].split() for row in rows]
    parts = [[{"text": " ".join(half)} for half in halves] for halves in (
        [one[: len(one) // 2] for one in words], [one[len(one) // 2:] for one in words])]
    first, second = ((plain_texts if task == "encoder" else echoed_texts)(several, encoder) for several in parts)
    return first, second


def _orders(many: int, settings: Settings, rows: int) -> Iterator[list[np.ndarray]]:
    """By step and micro-batch which rows: all of them in a seeded order, then in another, and so on."""
    generator = np.random.default_rng(settings.seed)
    needed = settings.steps * settings.recipe.accumulate * rows
    order = np.concatenate([generator.permutation(many) for _ in range(-(-needed // many))])[:needed]
    yield from ([*step] for step in order.reshape(settings.steps, settings.recipe.accumulate, rows))


def _batch(pairs: Sequence[tuple[Example, Example]], run: Run) -> Batch:
    examples = [first for first, _ in pairs]
    if run.head.task in BARE:
        examples = [*examples, *(second for _, second in pairs)]
    if run.head.inputs == "pixels":
        inputs = pictures.batches(examples, len(examples))[0]
    else:
        inputs = batches([example.inputs for example in examples], run.config, run.sizes, len(examples),
                         run.head.inputs)[0]
    return Batch(inputs, {} if run.head.task in BARE else labels_of(examples, inputs, run))


def labels_of(examples: Sequence[Example], inputs: Inputs, run: Run) -> Labels:
    """What the head's loss takes: classes and words int64, numbers float32, -100 where there is nothing to learn."""
    task, classes = run.head.task, run.sizes.get("labels", 0)
    targets = [example.targets for example in examples]
    if task == "causal-lm":
        return {"labels": np.where(inputs.mask, inputs.arrays["input_ids"], IGNORED)}
    if task == "prefix-lm":
        answers = prompts.answers(inputs.arrays["attention_mask"])
        return {"labels": np.where(answers, inputs.arrays["input_ids"], IGNORED)}
    if task == "question-answering":
        return {f"{name}_positions": np.array([one[name] for one in targets]) for name in ("start", "end")}
    if task in ("sequence-classification", "image-classification"):
        return {"labels": _classes(np.array([one["label"] for one in targets]), run, classes)}
    width = max(len(one["labels"]) for one in targets)
    words = np.array([[*one["labels"], *[IGNORED] * (width - len(one["labels"]))] for one in targets], np.int64)
    if task == "token-classification":
        return {"labels": np.where(words == IGNORED, IGNORED, words % classes)}
    sentence = {"next_sentence_label": np.array([one["sentence"] for one in targets])} if task == "pre-training" else {}
    return {"labels": words, **sentence}


def _classes(labels: np.ndarray, run: Run, classes: int) -> np.ndarray:
    kind = problem_of(run.config, classes)
    if kind == "single_label_classification":
        return labels.astype(np.int64) % classes
    if kind == "regression" and classes == 1:
        return labels.astype(np.float32)
    return np.eye(classes, dtype=np.float32)[labels.astype(np.int64) % classes]


def packed(examples: Sequence[Example]) -> tuple[list[list[dict[str, Any]]], dict[str, np.ndarray]]:
    """As JSON holds them, and as arrays what that cannot hold."""
    shown = {PIXELS: np.stack([example.inputs[PIXELS] for example in examples])} if (
        PIXELS in examples[0].inputs) else {}
    return [[{} if shown else example.inputs, example.targets] for example in examples], shown


def unpacked(rows: Sequence[Sequence[dict[str, Any]]], shown: dict[str, np.ndarray]) -> list[Example]:
    return [Example(inputs | {name: array[number] for name, array in shown.items()}, targets)
            for number, (inputs, targets) in enumerate(rows)]
