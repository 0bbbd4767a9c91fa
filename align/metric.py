"""``python -m align.metric``: a task over real text on both sides; predictions and metric values must agree."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from convert.errors import BadInput

from .agreement import Noise, compare_scores, is_doubtful, may_be_rounding
from .compare import TensorResult, missing
from .evaluation import LONGER, Evaluation
from .floor import YARDSTICK, look_again
from .options import positive
from .pictures import PIXELS, drawn, examples_of
from .scores import DECODED, SCORES, Arrays, packed, signature
from .side import Side
from .stage import Findings, RecordedStage, Session, main
from .texts import (
    ENCODE,
    SPLIT,
    Encoder,
    Example,
    Row,
    load_rows,
    pieces_of,
    renamed,
    sliding_windows,
    tokenizer_of,
)
from .tolerance import REORDERED_RUNS, SECOND_LOOK
from .trace import RECORDED, Step

TEXTS = ("piece_targets", "sentence_targets")
PROPAGATED, MOVED = "propagated", "moved"
ROWS, TOKENS, BATCH = 64, 128, 8
NOTHING = "nothing to score: the rows of this set are too few, too short, or cut too short by --max-length."
Compared = tuple[list[TensorResult], list[str]]


def reference(session: Session) -> Iterator[Step]:
    """Torch over the whole set in batches, in order, none dropped; and the examples themselves for the candidate.

    Recorded by itself, its own noise too: whoever judges later has no torch to ask.
    """
    step = _plain(session)
    if not all(array.size for array in step.recorded.values()):
        raise BadInput(NOTHING)
    if session.options.only:
        noise = _noise(session, step)
        step.floors[PROPAGATED], step.views[MOVED] = noise.floors, noise.moved
    yield step


def _plain(session: Session) -> Step:
    run, options = session.run, session.options
    _refuse_idle(session)
    if options.dataset:
        session.advance(f"fetching {options.dataset}")
    if run.head.inputs == "pixels":
        return _pictures(session)
    name, rows = load_rows(options.dataset, options.split, options.limit or ROWS, run.head.task)
    tokenizer = tokenizer_of(run)
    if tokenizer is None and options.prefix is not None:
        raise BadInput("--prefix stands before texts, and this checkpoint has no tokenizer: it is fed seeded ids. "
                       "Leave it out, or put the tokenizer's files beside the checkpoint and convert again.")
    prefix = (run.head.prefix if options.dataset is None else "") if options.prefix is None else options.prefix
    encoder = Encoder(tokenizer, run.config, run.sizes, options.max_length or TOKENS, prefix, run.head.inputs)
    encoded = _encoded(run.head.task, renamed(rows, options.columns), encoder, options.stride)
    examples = [example for example in encoded if example.inputs["input_ids"]]
    if not examples:
        raise BadInput(NOTHING)
    texts = _texts(run.head.task, examples, tokenizer)
    step = _step(session, session.reference, Evaluation(session, examples, options.batch_size or BATCH), texts)
    given = ("tokenized as the source does" if tokenizer else
             "as seeded ids below vocab_size, because the checkpoint has no tokenizer")
    parts = (f"{len(examples)} windows over {len(rows)} rows of {name}, joined, that move on by {options.stride} tokens"
             if options.stride else f"{len(examples)} rows of {name}")
    notes = [f"Data: {parts}, {given}; at most {encoder.max_length} tokens each."]
    if len(encoded) > len(examples):
        notes.append(f"{len(encoded) - len(examples)} rows without a single token were left out.")
    if texts:
        notes.append(_told_of_texts(prefix if tokenizer else ""))
    step.told |= {"notes": notes, "batch_size": options.batch_size or BATCH,
                  "examples": [[example.inputs, example.targets] for example in examples]}
    return step


def _pictures(session: Session) -> Step:
    """:func:`_plain` of a head that looks at pictures; they go to the candidate as arrays."""
    run, options = session.run, session.options
    if options.dataset is None:
        name, rows = "pictures that are drawn by paddle-parity", drawn(options.limit or ROWS, run.sizes["labels"])
    else:
        name, rows = load_rows(options.dataset, options.split, options.limit or ROWS, run.head.task)
    examples, told = examples_of(renamed(rows, options.columns),
                                 run.source if run.source.is_dir() else run.source.parent, run.sizes)
    if not examples:
        raise BadInput(NOTHING)
    step = _step(session, session.reference, Evaluation(session, examples, options.batch_size or BATCH), {})
    step.told |= {"notes": [f"Data: {len(examples)} of the {name}, {told}."], "batch_size": options.batch_size or BATCH,
                  "examples": [[{}, example.targets] for example in examples]}
    step.view("examples")[PIXELS] = np.stack([example.inputs[PIXELS] for example in examples])
    return step


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle over the same batches."""
    for step in steps:
        if "examples" not in step.told:
            raise BadInput("the reference was recorded without its examples, so the candidate cannot be fed them. "
                           "Record it again: python -m align.metric --only reference")
        texts = {name: array for name, array in step.view("targets").items() if name in TEXTS}
        yield _step(session, session.candidate, _evaluation_of(session, step), texts)


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Predictions, scores and the metric's values."""
    tensors, notes, values = [], [], {}
    for step, answer in pairs:
        if not step.recorded:
            continue
        expected, found = ({name: array for name, array in side.recorded.items() if not name.startswith("value.")}
                           | side.view("targets") for side in (step, answer))
        absent = sorted(expected.keys() - found.keys())
        compared, told = ([missing(name, "candidate") for name in absent], []) if absent else _compared(
            session, step, expected, found)
        tensors += compared
        notes += [*step.told.get("notes", []), *told]
        values |= {name.removeprefix("value."): (float(value), float(answer.recorded[name]))
                   for name, value in step.recorded.items() if name.startswith("value.") and name in answer.recorded}
    return Findings(tensors, notes, values)


def _compared(session: Session, step: Step, expected: Arrays, found: Arrays) -> Compared:
    """By the fixed bounds; where something fails, by torch's own noise, which takes more runs of torch."""
    task = session.run.head.task
    results, told = compare_scores(task, expected, found)
    if not may_be_rounding(results) or session.weights_divergence:
        return results, told
    if session.options.compare and not step.floors:
        return results, [*told, "The reference was recorded without torch's own noise, by which these would be judged. "
                         "Record it again: python -m align.metric --only reference"]
    beyond = _failing(results)
    noise = Noise(step.floors[PROPAGATED], step.view(MOVED)) if step.floors else _noise(session, step)
    results, told = compare_scores(task, expected, found, noise)
    left = _failing(results)
    told = [*told, f"{beyond} of {len(results)} figures {'lies' if beyond == 1 else 'lie'} beyond the fixed bounds; "
            f"judged by torch's own noise, {left or 'none'} of them fail{'s' * (left < 2)}. {YARDSTICK}"]

    def look() -> int:
        nonlocal results
        results, _ = compare_scores(task, expected, found, _noise(session, step, SECOND_LOOK))
        return _failing(results)
    again = look_again(session, "metric", left * is_doubtful(results), look)
    return results, [*told, *again]


def _failing(results: Sequence[TensorResult]) -> int:
    return sum(not result.passed for result in results)


def _refuse_idle(session: Session) -> None:
    """:class:`BadInput` for a flag that this head's metric would not look at."""
    head, options = session.run.head, session.options
    if options.stride and head.task != "causal-lm":
        raise BadInput("--stride is for language models that read from left to right, whose metric is the perplexity; "
                       f"{head.architecture} is none. Leave it out.")
    if options.prefix is not None and head.task != "translation":
        raise BadInput(f"--prefix is for translation, and {head.architecture} does not translate. Leave it out.")
    if options.max_length and head.inputs == "pixels":
        raise BadInput(f"--max-length counts tokens, and the inputs of {head.architecture} are pictures. Leave it out.")
    if options.split and options.dataset is None:
        raise BadInput(f"--split {options.split} is of a set that --dataset names, and there is none. Give it, or "
                       "leave --split out.")


def _encoded(task: str, rows: Sequence[Row], encoder: Encoder, stride: int | None) -> list[Example]:
    return ENCODE[task](rows, encoder) if stride is None else sliding_windows(rows, encoder, stride)


def _texts(task: str, examples: Sequence[Example], tokenizer: Any) -> Arrays:
    """What decoded ids are made into texts with, and the texts that they are scored against."""
    if task not in DECODED:
        return {}
    return dict(zip(TEXTS, map(packed, (pieces_of(tokenizer), [example.targets["text"] for example in examples])),
                    strict=True))


def _told_of_texts(prefix: str) -> str:
    before = f"before each source: {prefix!r}; " if prefix else ""
    return f"Texts: {before}decoded greedily, at most {LONGER} tokens longer than the longest reference; {signature()}."


def _step(session: Session, side: Side, evaluation: Evaluation, texts: Arrays) -> Step:
    """What is recorded of a side: everything but the targets, which are the same on both; and the metric's values."""
    arrays = evaluation.arrays(side) | texts
    targets = {name: array for name, array in arrays.items() if "target" in name or "label" in name}
    values = SCORES[session.run.head.task].values(arrays) if all(array.size for array in arrays.values()) else {}
    recorded = {name: array for name, array in arrays.items() if name not in targets}
    return Step({RECORDED: recorded | {f"value.{name}": np.array(value) for name, value in values.items()},
                 "targets": targets}, told={"inputs_digest": evaluation.digest})


def _evaluation_of(session: Session, step: Step) -> Evaluation:
    """That of the examples which the reference recorded."""
    shown = step.view("examples")
    examples = [Example(inputs | {name: array[number] for name, array in shown.items()}, targets)
                for number, (inputs, targets) in enumerate(step.told["examples"])]
    return Evaluation(session, examples, step.told["batch_size"])


def _noise(session: Session, step: Step, reordered: int = REORDERED_RUNS) -> Noise:
    return Noise.of(_evaluation_of(session, step).runs(step.recorded | step.view("targets"), reordered))


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", metavar="ID-OR-FILE", help="what to run on: a set of the datasets library, ID or "
        "ID:CONFIGURATION, as stanfordnlp/imdb, or a json, csv, tsv, parquet or txt file, as rows.jsonl; default: what "
        "ships with the project")
    add("--split", help=f"which split of a set of the datasets library, as validation; default {SPLIT}")
    add("--columns", metavar="OURS=THEIRS,…", help="what the set calls text, label, question, answer, …, as "
        "text=sentence,label=stars")
    add("--limit", type=positive, help=f"rows at most, as 500; default {ROWS}")
    add("--max-length", type=positive, metavar="TOKENS", help=f"where a row of text is cut, as 512; default {TOKENS}")
    add("--stride", type=positive, metavar="TOKENS", help="for language models: take all rows as one text, in windows "
        "of --max-length tokens that move on by so many, as 64; default: every row alone")
    add("--prefix", metavar="TEXT", help="for translation: what stands before every source, as 'translate English to "
        "French: '; default what the family was taught, before those that ship, else nothing")
    add("--batch-size", type=positive, help=f"rows that go through the models together, as 32; default {BATCH}")


STAGE = RecordedStage("metric", "Run a task over real text on both sides and compare predictions and values.",
                      reference, candidate, judge, _flags)

if __name__ == "__main__":
    sys.exit(main(STAGE))
