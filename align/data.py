"""``python -m align.data``: both tokenizers on the same texts, and both loaders on the same rows; all must be equal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from convert.errors import BadInput
from convert.traits import Prompts

from . import prompts
from .compare import TensorResult, missing
from .diagnose import Explanation
from .inputs import Inputs
from .options import positive
from .pipelines import corpus, picture_data
from .pipelines.corpus import Text
from .pipelines.loading import (
    LABELS,
    batched,
    features,
    order_of,
    paddle_batches,
    paddle_collate,
    torch_batches,
    torch_collate,
)
from .pipelines.mistakes import Batch, Recipe, explained, recipe_of, suppositions
from .pipelines.sheets import Sheet, as_step, differing, digests, first_difference, of_step, result
from .pipelines.tokenizing import (
    IDS,
    MASK,
    SPECIAL,
    SPECIAL_TOKENS,
    TYPES,
    Row,
    encoded_by,
    fields_of,
    judged,
    name_of,
    open_candidate,
    open_reference,
    pad_with,
    paddle_shift,
    pieces,
    silent,
    special_ids,
    torch_shift,
)
from .runs import Run
from .stage import Findings, RecordedStage, Session, main
from .texts import SPLIT, TOKENIZER_FILES
from .trace import Step

ROWS, TOKENS, BATCH = 64, 128, 8
OF_A_SET = ("split", "columns", "limit")
"""The flags that say what is read of a set."""
CUT, DECODER, SPECIAL_IDS = "cut", "decoder", "special.ids"
SUPPOSED = "supposed"


def reference(session: Session) -> Iterator[Step]:
    """What transformers' tokenizer and torch's loader make of the texts, and what known mistakes would."""
    _refuse_idle(session)
    if session.run.head.inputs == "pixels":
        yield picture_data.reference(session)
        return
    with silent():
        yield _texts_step(session)


def _texts_step(session: Session) -> Step:
    run, options = session.run, session.options
    session.advance("transformers' tokenizer")
    tokenizer, fields = open_reference(run), fields_of(run)
    name, texts = (corpus.NAME, corpus.shipped(tokenizer.all_special_tokens)) if options.data is None else corpus.own(
        options.data, options.split, options.limit or ROWS, options.columns)
    limit, special = min(options.max_length or TOKENS, run.sizes["positions"]), special_ids(tokenizer)
    size = options.batch_size or BATCH
    least = tokenizer.num_special_tokens_to_add(True) + 2
    if limit < least:
        raise BadInput(f"{limit} tokens a row are too few: this tokenizer needs {least} for a pair. Give a larger "
                       "--max-length.")
    lent = _lent_padding(tokenizer)
    recipe = recipe_of(tokenizer, limit, fields, start=torch_shift(run), collate=_prompts_of(session))
    whole, cut = recipe.rows(texts)
    longer = [number for number, row in enumerate(whole) if len(row[IDS]) > limit]
    chosen = _batchable(session, cut)
    sheet = _texts_sheet(texts, whole, cut, longer, recipe.start) | batched(lambda drop_last: torch_batches(
        features(cut, range(len(texts)), [name for name in fields if name != SPECIAL]), _taken(chosen),
        size, drop_last, _collated(recipe)))
    step = as_step({SPECIAL_IDS: [special]} | sheet)
    step.told |= {
        "texts": corpus.packed(texts), "longer": longer, "chosen": chosen, "limit": limit, "fields": list(fields),
        "batch_size": size, "lent": lent, "decodes": recipe.start is not None,
        "pieces": pieces(tokenizer, [special[special >= 0], *_ids_of(sheet)]),
        "inputs_digest": _digest(texts, limit, fields, size),
        "notes": [f"Data: {len(texts)} texts ({sum(text.pair is not None for text in texts)} of them pairs) of {name}; "
                  f"{len(longer)} of them have more than {limit} tokens and are compared cut to that too.",
                  f"Reference: {OF_PROMPTS if isinstance(run.head.inputs, Prompts) else name_of(tokenizer)}, from the "
                  "source.",
                  *([f"The source's tokenizer has no padding token; both sides pad with {lent!r}."] if lent else [])]}
    counts = {name: len(rows) for name, rows in sheet.items() if _is_explained(name)}
    step.told["counts"] = counts
    session.advance("known mistakes")
    mistakes = list(suppositions(recipe, lambda: open_reference(run, fast=False)))
    step.told["mistakes"] = [told for told, _ in mistakes]
    step.view(SUPPOSED)["digests"] = np.stack([digests(sheet, counts)] + [
        digests(_supposed(other, texts, longer, chosen, size), counts) for _, other in mistakes])
    return step


def _refuse_idle(session: Session) -> None:
    """:class:`BadInput` for a flag that would not be looked at."""
    options = session.options
    if options.data is None:
        _refuse(session, OF_A_SET, "this is of a set that --data names, and there is none. Give it, or leave this out")
    if session.run.head.inputs == "pixels":
        _refuse(session, ("max_length", "batch_size", "tokenizer"), "this is for texts, and the inputs of "
                f"{session.run.head.architecture} are pictures. Leave it out")


def _refuse(session: Session, names: Sequence[str], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(session.options, name) is not None]
    if given:
        raise BadInput(f"{' and '.join(given)}: {why}.")


OF_PROMPTS = ("the rules of the code that the checkpoint brings along, on transformers' base class and its "
              "SentencePiece model (none of that code is run)")


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """What PaddleNLP's tokenizer, or the user's, and Paddle's loader make of the same texts."""
    for step in steps:
        if session.run.head.inputs == "pixels":
            yield picture_data.candidate(session, step)
            continue
        told = step.told
        if "texts" not in told:
            raise BadInput("the reference was recorded without its texts, so the candidate cannot be fed them. Record "
                           "it again: python -m align.data --only reference")
        session.advance("PaddleNLP's tokenizer")
        tokenizer, texts, fields = open_candidate(session.run, session.options.tokenizer), corpus.unpacked(
            told["texts"]), told["fields"]
        pad_with(tokenizer, told["lent"])
        every = [encoded_by(tokenizer, text, None) for text in texts]
        cut = [judged(encoded_by(tokenizer, text, told["limit"]), fields) for text in texts]
        shift = paddle_shift(session.run) if told["decodes"] else None
        sheet = _texts_sheet(texts, [judged(row, fields) for row in every], cut, told["longer"], shift)
        rows = features(cut, range(len(texts)), [name for name in fields if name != SPECIAL])
        sheet |= batched(lambda drop_last, rows=rows, tokenizer=tokenizer, told=told: paddle_batches(
            rows, _taken(told["chosen"]), told["batch_size"], drop_last, paddle_collate(tokenizer)))
        special = special_ids(tokenizer)
        answer = as_step({SPECIAL_IDS: [special]} | {name: sheet[name] for name in sheet if _is_asked(name, fields)})
        more = sorted({name for row in every for name in row} - {*fields, MASK, SPECIAL})
        answer.told |= {
            "pieces": pieces(tokenizer, [special[special >= 0], *_ids_of(sheet)]),
            "inputs_digest": _digest(texts, told["limit"], fields, told["batch_size"]),
            "notes": [f"Candidate: {name_of(tokenizer)}, from the conversion's output.",
                      *[f"It also gives {name}, which this model does not take." for name in more]]}
        yield answer


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Special tokens, rows text by text, then the batches; the first difference is named by text and place."""
    found: list[TensorResult] = []
    notes: list[str] = []
    named, diagnosis = None, None
    for step, answer in pairs:
        if not step.recorded:
            continue
        if session.run.head.inputs == "pixels":
            return picture_data.judge(step, answer)
        notes += [*step.told["notes"], *answer.told["notes"]]
        expected, given = of_step(step), of_step(answer)
        if SPECIAL_IDS in given:
            given[SPECIAL_IDS] = [np.where(expected[SPECIAL_IDS][0] >= 0, given[SPECIAL_IDS][0], -1)]
        for name, rows in sorted(expected.items(), key=lambda item: item[0].endswith(f".{SPECIAL}")):
            compared = _compared(name, rows, given.get(name), step, answer)
            if compared is None:
                continue
            tensor, place = compared
            found.append(tensor)
            named = named or (None if tensor.passed or place is None else f"{name}[{']['.join(map(str, place))}]")
        found += [missing(name, "reference") for name in given if name not in expected]
        diagnosis = _diagnosis(found, explained(step.told, given, step.view(SUPPOSED)["digests"]))
    return Findings(found, notes, named=named, diagnosis=diagnosis)


def _diagnosis(found: Sequence[TensorResult], cause: tuple[str, float, float] | None) -> Explanation | None:
    if cause is None:
        return None
    told, before, after = cause
    name = next(tensor.name for tensor in found if not tensor.passed and _is_explained(tensor.name))
    return Explanation("data", name, f"{told}: with that done on torch's side, the rows and batches that differ fall "
                       f"from {before:.1%} to none.", before, after)


# What is recorded -----------------------------------------------------------------------------------------------------

def _texts_sheet(texts: Sequence[Text], whole: Sequence[Row], cut: Sequence[Row], longer: Sequence[int],
                 shift: Any) -> Sheet:
    """By group and field the rows of its texts, those that were cut, and what a decoder would read of the latter."""
    found: Sheet = {}
    for group, numbers in (*corpus.grouped(texts).items(), (CUT, longer)):
        rows = [(cut if group == CUT else whole)[number] for number in numbers]
        shared = [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]
        prefix = group.replace(" ", "-")
        found |= {f"{prefix}.{name}": [row[name] for row in rows] for name in shared}
        found |= {f"{prefix}.lengths": [np.array([len(row[IDS]) for row in rows], np.int64)]} if rows else {}
    if shift is not None:
        found[f"{DECODER}.decoder_input_ids"] = [shift(row[IDS][None])[0].astype(np.int64) for row in cut]
    return found


def _supposed(recipe: Recipe, texts: Sequence[Text], longer: Sequence[int], chosen: Sequence[int], size: int) -> Sheet:
    """What a recipe makes of texts and batches; nothing where it fails."""
    try:
        with recipe.followed():
            whole, cut = recipe.rows(texts)
            sheet = _texts_sheet(texts, whole, cut, longer, recipe.start)
            order = _taken(chosen)
            for number, start in enumerate(range(0, len(order), size)):
                batch = recipe.batch([cut[text] for text in order[start: start + size]])
                sheet |= {f"batch.{number}.{name}": [array] for name, array in batch.items()}
    except Exception:  # a mistake that the reference cannot make is none that explains anything
        return {}
    return sheet


def _is_explained(name: str) -> bool:
    """Whether it is among what a mistake must reproduce: not what follows from the rest of it."""
    return not name.endswith((".lengths", f".{SPECIAL}", ".order", ".rows"))


def _is_asked(name: str, fields: Sequence[str]) -> bool:
    """Of what the candidate's loader gives, what the model takes."""
    return not name.startswith("batch.") or name.rpartition(".")[2] != TYPES or TYPES in fields


def _ids_of(sheet: Sheet) -> list[np.ndarray]:
    return [row for name, rows in sheet.items() if name.endswith(f".{IDS}") for row in rows]


def _lent_padding(tokenizer: Any) -> str | None:
    """What a tokenizer without padding is given to pad with, as is the custom: its EOS. None where it has its own."""
    if tokenizer.pad_token is not None:
        return None
    lent = next((token for token in (tokenizer.eos_token, tokenizer.unk_token) if token is not None), None)
    if lent is None:
        raise BadInput("the source's tokenizer has no token to pad with (pad, eos or unk), so that its rows make no "
                       "batch. Name one in tokenizer_config.json.")
    tokenizer.pad_token = lent
    return lent


def _taken(chosen: Sequence[int]) -> list[int]:
    """The texts that batches are made of, in the order in which they are taken."""
    return [chosen[place] for place in order_of(len(chosen))]


def _batchable(session: Session, rows: Sequence[Row]) -> list[int]:
    """The texts that batches are made of: all; of prompts those in which nobody wrote a mark."""
    kind = session.run.head.inputs
    if not isinstance(kind, Prompts):
        return list(range(len(rows)))
    marks = prompts.marks_of(kind, session.run.config, session.run.sizes)
    return [number for number, row in enumerate(rows) if not np.isin(row[IDS], marks["mask_token_id"]).any()
            and all((row[IDS] == marks[name]).sum() == 1 for name in ("gmask_token_id", "bos_token_id"))]


def _collated(recipe: Recipe) -> Any:
    """The collator of the reference's loader."""
    if recipe.collate is None:
        return torch_collate(recipe.tokenizer)

    def collate(rows: list[dict[str, Any]]) -> Batch:
        labels = np.array([row["label"] for row in rows], np.int64)
        return recipe.batch([{IDS: np.array(row[IDS])} for row in rows]) | {LABELS: labels}
    return collate


def _prompts_of(session: Session) -> Any:
    """How rows that are prompts become a batch, None for others; the mask as PaddleNLP has it, 1. where one may look.
    """
    run, kind = session.run, session.run.head.inputs
    if not isinstance(kind, Prompts):
        return None

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        found = prompts.arranged([row[IDS].tolist() for row in rows], kind, run.config, run.sizes)
        return {name: array.astype(np.float32) if name == MASK else array
                for name, array in run.family.paddlenlp_inputs(found).items()}
    return collate


def _digest(texts: Sequence[Text], limit: int, fields: Sequence[str], size: int) -> str:
    told = "\n".join(map(repr, [*corpus.packed(texts), limit, list(fields), size]))
    return Inputs({"texts": np.frombuffer(told.encode("utf-8", "surrogatepass"), np.uint8)}).digest


# How it is compared ---------------------------------------------------------------------------------------------------

def _compared(name: str, expected: Sequence[np.ndarray], found: Sequence[np.ndarray] | None, step: Step,
              answer: Step) -> tuple[TensorResult, tuple[int, ...] | None] | None:
    """(how the rows of a name compare, where they differ first); None where both have nothing there but lengths."""
    if found is None:
        absent = replace(missing(name, "candidate"), failure=f"{name}: the candidate does not give it")
        return absent, None
    if len(found) != len(expected):
        return result(name, expected, found, f"{name}: {len(found)} rows, the reference has {len(expected)}"), None
    if not any(row.size for row in (*expected, *found)):
        return None
    wrong = differing(expected, found)
    if not wrong:
        return result(name, expected, found, None), None
    row = wrong[0]
    place = first_difference(expected[row], found[row])
    if place is None:
        told = f"{name}: the dtype is {found[row].dtype}, the reference's {expected[row].dtype}"
        return result(name, expected, found, told), None
    told, number = _told(name, row, place, expected[row], found[row], step, answer)
    many = f"; {len(wrong)} of {len(expected)} texts of this kind differ" if len(expected) > 1 else ""
    return result(name, expected, found, f"{name}: {told}{many}"), (number, *place) if number is not None else place


def _told(name: str, row: int, place: tuple[int, ...], expected: np.ndarray, found: np.ndarray, step: Step,
          answer: Step) -> tuple[str, int | None]:
    """(what is different at ``place``, the number of its text where that says more than the place)."""
    stem, _, field = name.rpartition(".")
    ours, theirs = (_at(array, place, field, pieces) for array, pieces in (
        (found, answer.told["pieces"]), (expected, step.told["pieces"])))
    if name == SPECIAL_IDS:
        return f"the {SPECIAL_TOKENS[place[0]]} token is {ours}, the reference's {theirs}", None
    texts = corpus.unpacked(step.told["texts"])
    if stem.startswith("batch."):
        order, size = _taken(step.told["chosen"]), step.told["batch_size"]
        text = order[int(stem.removeprefix("batch.")) * size + place[0]]
        if expected.shape != found.shape:
            return f"the batch is {list(found.shape)}, the reference's {list(expected.shape)}", None
        return (f"row {place[0]} (text {text}, {texts[text].excerpt}), position {list(place[1:])}: {ours}, the "
                f"reference has {theirs}"), None
    if field in ("order", "rows"):
        what = "text" if field == "order" else "size of batch"
        return f"{what} {place[0]} is {ours}, the reference's {theirs}", None
    numbers = step.told["longer"] if stem == CUT else list(range(len(texts))) if stem == DECODER else next(
        numbers for group, numbers in corpus.grouped(texts).items() if group.replace(" ", "-") == stem)
    if field == "lengths":
        text = numbers[place[0]]
        return f"text {text}, {texts[text].excerpt}: {ours} tokens, the reference has {theirs}", None
    return (f"text {numbers[row]}, {texts[numbers[row]].excerpt}: token {place[0]} is {ours}, the reference's "
            f"{theirs}"), numbers[row]


def _at(array: np.ndarray, place: tuple[int, ...], field: str, pieces: Mapping[str, str]) -> str:
    """A number of a row, with the token that it stands for."""
    if array.ndim == 1 and place[0] >= len(array):
        return "missing (the row has ended)"
    number = array[place] if array.ndim == len(place) and array.size else array.reshape(-1)[:1]
    if field not in (IDS, "ids", "decoder_input_ids"):
        return f"{np.asarray(number).tolist()}"
    return f"{pieces.get(str(int(number)), '?')!r} ({int(number)})" if int(number) >= 0 else "none"


def _lacking(run: Run) -> str | None:
    """That the checkpoint came without what prepares its data, or that PaddleNLP has nothing like it."""
    directory = run.source if run.source.is_dir() else run.source.parent
    if run.head.inputs == "pixels":
        return None if (directory / picture_data.PROCESSOR).is_file() else (
            f"The checkpoint came without a {picture_data.PROCESSOR}.")
    wanted = [run.head.inputs.words] if isinstance(run.head.inputs, Prompts) else TOKENIZER_FILES
    if not any(True for pattern in wanted for _ in directory.glob(pattern)):
        return "The checkpoint came without a tokenizer."
    return None if run.family.paddlenlp_tokenizer else f"PaddleNLP has no tokenizer for family {run.family.name}."


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="ID-OR-FILE", help="your own texts or pictures: a set of the datasets library, ID or "
        "ID:CONFIGURATION, as stanfordnlp/imdb, or a json, csv, tsv, parquet or txt file, as rows.jsonl; its columns "
        "are text, and next for pairs, or image; default: what ships with the project")
    add("--split", help=f"which split of a set of the datasets library, as validation; default {SPLIT}")
    add("--columns", metavar="OURS=THEIRS,…", help="what the set calls text and next, or image, as text=sentence")
    add("--limit", type=positive, help=f"rows of the set at most, as 500; default {ROWS}")
    add("--max-length", type=positive, metavar="TOKENS", help=f"where a row of text is cut, as 512; default {TOKENS}")
    add("--batch-size", type=positive, help=f"rows a batch, as 32; default {BATCH}")
    add("--tokenizer", metavar="MODULE:BUILD", help="the Paddle side's tokenizer, if it is your own, as "
        "my_words:build, a function of the output directory; what it returns is called as transformers' are, and may "
        "have a collate(rows)")


STAGE = RecordedStage("data", "Compare both tokenizers on the same texts, and both loaders on the same rows.",
                      reference, candidate, judge, _flags, _lacking, of_candidate=("tokenizer",), weights=False)

if __name__ == "__main__":
    sys.exit(main(STAGE))
