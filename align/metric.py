"""``python -m align.metric``: a task over real text on both sides; predictions and metric values must agree."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from convert.errors import BadInput

from .candidate import Candidate
from .compare import TensorResult, compare
from .inputs import Inputs, batches
from .reference import Reference
from .scores import SCORES, Arrays, neighbours
from .stage import Findings, Session, Stage, main
from .texts import ENCODE, Encoder, Example, load_rows, load_tokenizer, renamed
from .tolerance import EXACT, FORWARD, METRIC, TOKEN_LOSS, margin_noise

EMBEDDINGS, TOKEN_NLL, RELATIVE = "embeddings", "token_nll", ("perplexity", "mean_squared_error")


def find(session: Session) -> Findings:
    """Both sides over the same batches, in order, none dropped."""
    run, options = session.run, session.options
    name, rows = load_rows(options.dataset, options.split, options.limit)
    directory = run.source if run.source.is_dir() else run.source.parent
    tokenizer = load_tokenizer(directory)
    encoder = Encoder(tokenizer, run.config, run.sizes, options.max_length)
    encoded = ENCODE[run.head.task](renamed(rows, options.columns), encoder)
    examples = [example for example in encoded if example.inputs["input_ids"]]
    fed = batches([example.inputs for example in examples], run.config, options.batch_size)
    reference = _evaluate(session, session.reference, fed, examples)
    if not all(array.size for array in reference.values()):
        raise BadInput(f"{name}: nothing to score; the rows are too few, too short, or cut too short by --max-length.")
    candidate = _evaluate(session, session.candidate, fed, examples)
    tensors, notes = compare_scores(run.head.task, reference, candidate)
    expected, found = (SCORES[run.head.task].values(arrays) for arrays in (reference, candidate))
    given = ("tokenized as the source does" if tokenizer else
             "as seeded ids below vocab_size, because the checkpoint has no tokenizer")
    notes = [f"Data: {len(examples)} rows of {name}, {given}; at most {encoder.max_length} tokens each.", *notes]
    if len(encoded) > len(examples):
        notes.append(f"{len(encoded) - len(examples)} rows without a single token were left out.")
    digest = Inputs({f"{number}.{key}": array for number, inputs in enumerate(fed)
                     for key, array in inputs.arrays.items()}).digest
    return Findings(tensors, digest, _recorded(reference, expected), _recorded(candidate, found), notes,
                    {name: (value, found[name]) for name, value in expected.items()})


def compare_scores(task: str, reference: Arrays, candidate: Arrays) -> tuple[list[TensorResult], list[str]]:
    """Continuous scores within tolerance, predictions equal wherever the margin exceeds the noise, values equal.

    Where predictions differ inside the noise, values are compared with these predictions taken as equal, and the
    number of such places is told.
    """
    results, notes, settled = [], [], dict(candidate)
    for name, allowed in ((EMBEDDINGS, FORWARD), (TOKEN_NLL, TOKEN_LOSS), ("scores", FORWARD)):
        if name in reference:
            results.append(compare(name, reference[name], candidate[name], allowed))
    for name in [name for name in reference if name.endswith(".predictions")]:
        stem = name.removesuffix(".predictions")
        results.append(compare(f"{stem}.largest", reference[f"{stem}.largest"], candidate[f"{stem}.largest"], FORWARD))
        noise = margin_noise(1.0) * reference[f"{stem}.largest"]
        close = (reference[f"{stem}.margins"] <= noise) & (reference[name] != candidate[name])
        settled[name] = np.where(close, reference[name], candidate[name])
        results.append(compare(name, reference[name], settled[name], EXACT))
        if close.any():
            notes.append(f"{int(close.sum())} of {close.size} {stem} predictions differ where the two best scores lie "
                         "closer together than rounding can tell; they are taken as equal.")
    expected, found = (SCORES[task].values(arrays) for arrays in (reference, settled))
    results += [compare(f"value.{name}", np.array(value), np.array(found[name]), METRIC if name in RELATIVE else EXACT)
                for name, value in expected.items()]
    return results, notes


def _evaluate(session: Session, side: Reference | Candidate, fed: Sequence[Inputs],
              examples: Sequence[Example]) -> Arrays:
    score = SCORES[session.run.head.task]
    reduced, done = [], 0
    for inputs in fed:
        chunk = examples[done: done + len(inputs.mask)]
        reduced.append(score.reduce(side.outputs(inputs.arrays), inputs, chunk))
        done += len(chunk)
        session.advance(f"{side.framework}, {done} of {len(examples)} rows")
    arrays = {name: np.concatenate([batch[name] for batch in reduced]) for name in reduced[0]}
    return arrays | neighbours(arrays[EMBEDDINGS]) if EMBEDDINGS in arrays else arrays


def _recorded(arrays: Arrays, values: dict[str, float]) -> Arrays:
    """What goes into the trace: everything but the targets, which are the same on both sides."""
    kept = {name: array for name, array in arrays.items() if "target" not in name and "label" not in name}
    return kept | {f"value.{name}": np.array(value) for name, value in values.items()}


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", metavar="ID-OR-FILE", help="a set of the datasets library, ID or ID:CONFIGURATION, or a json, "
        "csv, tsv, parquet or txt file; default: the passages that ship with the project")
    add("--split", default="test", help="split of the set; default test")
    add("--columns", metavar="OURS=THEIRS,…", help="the set's names for text, label, question, answer, …")
    add("--limit", type=_positive, default=64, help="rows at most; default 64")
    add("--max-length", type=_positive, default=128, help="tokens a row at most; default 128")
    add("--batch-size", type=_positive, default=8, help="rows a batch; default 8")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number


STAGE = Stage("metric", "Run a task over real text on both sides and compare predictions and values.", find, _flags)

if __name__ == "__main__":
    sys.exit(main(STAGE))
