"""``python -m align.metric``: a task over real text on both sides; predictions and metric values must agree."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from convert.errors import BadInput

from . import pictures
from .agreement import EMBEDDINGS, Noise, compare_scores, may_be_rounding
from .candidate import Candidate
from .compare import TensorResult, missing
from .decoding.greedy import TEXT, Limits, greedy, reread
from .floor import OWN_NOISE, look_again, modes_of_passes
from .inputs import Inputs, batches, decoder_start
from .options import positive
from .pictures import PIXELS, drawn, examples_of
from .reference import Reference
from .scores import DECODED, SCORES, Arrays, neighbours, packed, signature
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
LONGER, ROWS_TOGETHER = 8, 4
ROWS, TOKENS, BATCH = 64, 128, 8


def reference(session: Session) -> Iterator[Step]:
    """Torch over the whole set in batches, in order, none dropped; and the examples themselves for the candidate."""
    run, options = session.run, session.options
    _refuse_idle(session)
    if options.dataset:
        session.advance(f"fetching {options.dataset}")
    if run.head.inputs == "pixels":
        yield _pictures(session)
        return
    name, rows = load_rows(options.dataset, options.split, options.limit or ROWS, run.head.task)
    tokenizer = tokenizer_of(run)
    if tokenizer is None and options.prefix is not None:
        raise BadInput("--prefix stands before texts, and this checkpoint has no tokenizer: it is fed seeded ids. "
                       "Leave it out, or put the tokenizer's files beside the checkpoint and convert again.")
    prefix = (run.head.prefix if options.dataset is None else "") if options.prefix is None else options.prefix
    encoder = Encoder(tokenizer, run.config, run.sizes, options.max_length or TOKENS, prefix, run.head.inputs)
    encoded = _encoded(run.head.task, renamed(rows, options.columns), encoder, options.stride)
    examples = [example for example in encoded if example.inputs["input_ids"]]
    texts = _texts(run.head.task, examples, tokenizer)
    step = _evaluate(session, session.reference, examples, options.batch_size or BATCH, texts)
    if not all(array.size for array in step.recorded.values()):
        raise BadInput(f"{name}: nothing to score; the rows are too few, too short, or cut too short by --max-length.")
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
    yield step


def _pictures(session: Session) -> Step:
    """:func:`reference` of a head that looks at pictures; they go to the candidate as arrays."""
    run, options = session.run, session.options
    if options.dataset is None:
        name, rows = "pictures that are drawn by paddle-parity", drawn(options.limit or ROWS, run.sizes["labels"])
    else:
        name, rows = load_rows(options.dataset, options.split, options.limit or ROWS, run.head.task)
    examples, told = examples_of(renamed(rows, options.columns),
                                 run.source if run.source.is_dir() else run.source.parent, run.sizes)
    if not examples:
        raise BadInput("the data set has no row to evaluate on.")
    step = _evaluate(session, session.reference, examples, options.batch_size or BATCH, {})
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
        yield _evaluate(session, session.candidate, _examples_of(step), step.told["batch_size"], texts)


def _examples_of(step: Step) -> list[Example]:
    shown = step.view("examples")
    return [Example(inputs | {name: array[number] for name, array in shown.items()}, targets)
            for number, (inputs, targets) in enumerate(step.told["examples"])]


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


def _compared(session: Session, step: Step, expected: Arrays, found: Arrays) -> tuple[list[TensorResult], list[str]]:
    """By the fixed bounds; where something fails, by torch's own noise, which takes more runs of torch."""
    task = session.run.head.task
    results, told = compare_scores(task, expected, found)
    if not may_be_rounding(results) or session.weights_divergence:
        return results, told
    beyond = f"{_failing(results)} of {len(results)} figures lie beyond the fixed bounds"
    if session.options.compare:
        return results, [*told, f"{beyond}. Torch's own noise could tell rounding from error, and --compare has no "
                         "torch to run: python -m align.metric with both sides at once does."]

    def look(reordered: int = REORDERED_RUNS) -> int:
        nonlocal results, told
        results, told = compare_scores(task, expected, found, Noise.of(_runs(session, step, reordered)))
        return _failing(results)
    left = look()
    doubtful = left if all(result.doubtful for result in results if not result.passed) else 0
    again = look_again(session, "metric", doubtful, lambda: look(SECOND_LOOK))
    return results, [*told, f"{beyond}, so torch ran the same rows in float64 and {REORDERED_RUNS} times with its sums "
                     f"reordered: judged by its own noise, {left or 'none'} of them fail{'s' * (left < 2)}.", *again]


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


def _decoded(session: Session, side: Reference | Candidate, examples: Sequence[Example], batch_size: int) -> Arrays:
    """What the side makes of the sources alone, at most ``LONGER`` tokens longer than the longest reference.

    Of a batch's memory the scores of every token of whole texts are the most. Texts that are being decoded are mostly
    shorter, so that more of them go together.
    """
    limits = _limits(session, examples)
    return greedy(side, _sources(session, examples, ROWS_TOGETHER * batch_size), limits,
                  lambda step: session.advance(f"{side.framework}, token {step} of {limits.steps}"))


def _decoded_again(session: Session, examples: Sequence[Example], batch_size: int, chosen: np.ndarray, reordered: int,
                   ) -> list[Arrays]:
    """Of the texts ``chosen`` [rows, steps], what torch thinks of them in float64 and with its sums reordered."""
    limits = _limits(session, examples)
    parts = [reread(session.reference, source, chosen[number * batch_size: (number + 1) * batch_size], limits,
                    modes_of_passes(reordered), OWN_NOISE)
             for number, source in enumerate(_sources(session, examples, batch_size))]
    return [_joined(of_mode) for of_mode in zip(*parts, strict=True)]


def _limits(session: Session, examples: Sequence[Example]) -> Limits:
    config = session.run.config
    end = config.get("eos_token_id")
    return Limits(decoder_start(config), end if isinstance(end, int) else None,
                  LONGER + max(len(example.targets["labels"]) for example in examples))


def _sources(session: Session, examples: Sequence[Example], rows: int) -> list[Arrays]:
    return [{name: array for name, array in inputs.arrays.items() if not name.startswith("decoder_")}
            for inputs in _fed(session, examples, rows)]


def _evaluate(session: Session, side: Reference | Candidate, examples: Sequence[Example], batch_size: int,
              texts: Arrays) -> Step:
    """What is recorded of a side: everything but the targets, which are the same on both; and the metric's values."""
    fed = _fed(session, examples, batch_size)
    arrays, = _reduced(session, side, examples, batch_size, lambda: [nullcontext()])
    if session.run.head.task in DECODED:
        arrays |= _decoded(session, side, examples, batch_size) | texts
    targets = {name: array for name, array in arrays.items() if "target" in name or "label" in name}
    values = SCORES[session.run.head.task].values(arrays) if all(array.size for array in arrays.values()) else {}
    digest = Inputs({f"{number}.{key}": array for number, inputs in enumerate(fed)
                     for key, array in inputs.arrays.items()}).digest
    recorded = {name: array for name, array in arrays.items() if name not in targets}
    return Step({RECORDED: recorded | {f"value.{name}": np.array(value) for name, value in values.items()},
                 "targets": targets}, told={"inputs_digest": digest})


def _runs(session: Session, step: Step, reordered: int) -> list[Arrays]:
    """What torch makes of the rows of ``step`` in float64, as recorded, and with its sums in ``reordered`` orders."""
    examples, batch_size = _examples_of(step), step.told["batch_size"]
    found = _reduced(session, session.reference, examples, batch_size, lambda: modes_of_passes(reordered), OWN_NOISE)
    if session.run.head.task in DECODED:
        texts = _decoded_again(session, examples, batch_size, step.recorded[f"{TEXT}.predictions"], reordered)
        found = [one | text for one, text in zip(found, texts, strict=True)]
    exact, *others = found
    return [exact, step.recorded | step.view("targets"), *others]


def _fed(session: Session, examples: Sequence[Example], batch_size: int) -> list[Inputs]:
    run = session.run
    if run.head.inputs == "pixels":
        return list(pictures.batches(examples, batch_size))
    return list(batches([example.inputs for example in examples], run.config, run.sizes, batch_size, run.head.inputs))


def _reduced(session: Session, side: Reference | Candidate, examples: Sequence[Example], batch_size: int,
             modes: Callable[[], Sequence[AbstractContextManager]], purpose: str | None = None) -> list[Arrays]:
    """Scores and predictions over all batches, once in each of ``modes()``, which is entered around the model alone."""
    score, several = SCORES[session.run.head.task], [modes() for _ in range(0, len(examples), batch_size)]
    reduced: list[list[Arrays]] = [[] for _ in several[0]]

    def evaluate(number: int, inputs: Inputs, mode: AbstractContextManager, into: list[Arrays]) -> None:
        with mode:
            outputs = side.outputs(inputs.arrays)
        rows = slice(number * batch_size, (number + 1) * batch_size)
        into.append(score.reduce(outputs, inputs, examples[rows]))
        session.advance(f"{purpose or side.framework}, {min(rows.stop, len(examples))} of {len(examples)} rows")
    fed = zip(_fed(session, examples, batch_size), several, strict=True)
    side.sweep([partial(evaluate, number, inputs, mode, into) for number, (inputs, entered) in enumerate(fed)
                for mode, into in zip(entered, reduced, strict=True)], purpose)
    return [_joined(batches_of_mode) for batches_of_mode in reduced]


def _joined(reduced: Sequence[Arrays]) -> Arrays:
    arrays = {name: np.concatenate([batch[name] for batch in reduced]) for name in reduced[0]}
    return arrays | neighbours(arrays[EMBEDDINGS]) if EMBEDDINGS in arrays else arrays


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
