"""The texts a metric runs on: the passages that ship with the project, a set of the ``datasets`` library, or ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require
from convert.rules import Config, Sizes
from convert.traits import Prompts

from . import prompts
from .inputs import SEED, decoder_start, pad_token
from .runs import Run

DATA = Path(__file__).with_name("data")
PASSAGES = ("passages.jsonl", "the passages that ship with paddle-parity")
SHIPPED = {"translation": ("translations.jsonl", "the sentence pairs that ship with paddle-parity")}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
BUILDERS = {".jsonl": ("json", {}), ".json": ("json", {}), ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}),
            ".parquet": ("parquet", {}), ".txt": ("text", {})}
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
MASKED_SHARE = 0.15
SPLIT = "test"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """Model inputs of one row as lists of ids, and the targets that the metric wants, under the same names in all."""

    inputs: dict[str, list[int]]
    targets: dict[str, Any]


@dataclass
class Encoder:
    """Rows to examples, with the source's tokenizer, or with seeded ids where it has none.

    ``prefix`` stands before every source that is to be translated: some models are told their task in words.
    """

    tokenizer: Any | None
    config: Config
    sizes: Sizes
    max_length: int
    prefix: str = ""
    kind: str | Prompts = "tokens"

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(SEED)
        self.max_length = min(self.max_length, self.sizes["positions"])

    def encode(self, text: str, pair: str | None = None) -> Any:
        """A fast tokenizer's encoding of one row, at most ``max_length`` tokens; the longer of a pair is cut."""
        least = self.tokenizer.num_special_tokens_to_add(pair is not None) + (1 if pair is None else 2)
        if self.max_length < least:
            raise BadInput(f"{self.max_length} tokens a row are too few: this tokenizer and task need {least}. "
                           "Give a larger --max-length.")
        return self.tokenizer(text, pair, truncation=True, max_length=self.max_length)

    def example(self, encoding: Any, **targets: Any) -> Example:
        """The model's inputs of ``encoding``: token types only where the family has them."""
        names = ["input_ids", "attention_mask"] + (["token_type_ids"] if self.sizes.get("types", 0) > 1 else [])
        ids = encoding["input_ids"]
        types = encoding.get("token_type_ids") or [0] * len(ids)
        given = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
        return Example({name: list(given[name]) for name in names}, targets)

    def seeded(self) -> dict[str, list[int]]:
        """An encoding of seeded ids, of a seeded length."""
        length = int(self.generator.integers(max(2, self.max_length // 2), self.max_length + 1))
        if isinstance(self.kind, Prompts):
            marks = prompts.marks_of(self.kind, self.config, self.sizes)
            words = self.generator.choice(prompts.words_of(self.sizes, marks), max(0, length - 3))
            return {"input_ids": prompts.prompt(words.tolist(), marks)}
        ids = self.generator.integers(0, self.sizes["vocab"] - 1, length)
        ids += ids >= pad_token(self.config)
        return {"input_ids": ids.tolist()}

    def masked(self, encoding: Any) -> tuple[list[int], list[int]]:
        """(ids with 15 % of the real tokens masked, at least one, and labels: the masked tokens, else -100)."""
        ids = np.array(encoding["input_ids"])
        special = np.array(self.tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True)) if (
            self.tokenizer) else np.zeros(len(ids), int)
        real = np.flatnonzero(special == 0)
        chosen = self.generator.permutation(real)[: max(1, round(MASKED_SHARE * len(real)))]
        labels = np.full(len(ids), -100)
        labels[chosen] = ids[chosen]
        ids[chosen] = self.tokenizer.mask_token_id if self.tokenizer else 0
        return ids.tolist(), labels.tolist()


def tokenizer_of(run: Run) -> Any | None:
    """What makes the inputs of the run's head from texts, None where the source has no tokenizer."""
    directory = run.source if run.source.is_dir() else run.source.parent
    kind = run.head.inputs
    if not isinstance(kind, Prompts):
        return load_tokenizer(directory)
    marks = prompts.marks_of(kind, run.config, run.sizes)
    return prompts.Tokenizer(directory, kind, marks) if (directory / kind.words).is_file() else None


def load_tokenizer(directory: Path) -> Any | None:
    """The source's own tokenizer through transformers, None where it has none.

    ``trust_remote_code=False``, because transformers asks on the terminal where nothing is said, and a y runs the code.
    """
    if not any(True for pattern in TOKENIZER_FILES for _ in directory.glob(pattern)):
        return None
    require("transformers")
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(directory, use_fast=True, trust_remote_code=False)
    except Exception as error:
        raise BadInput(f"the tokenizer in {directory} cannot be loaded ({type(error).__name__}: {error}).") from error


def load_rows(dataset: str | None, split: str | None, limit: int, task: str = "",
              flag: str = "--dataset") -> tuple[str, list[Row]]:
    """(name, rows): at most ``limit``, in order. Raises :class:`BadInput` when the set cannot be had.

    Without ``dataset``, what ships with the project for ``task``. ``flag`` is the one that names it.
    """
    if dataset is None:
        file, name = SHIPPED.get(task, PASSAGES)
        return name, [json.loads(line) for line in (DATA / file).read_text("utf-8").splitlines()][:limit]
    path, _, configuration = dataset.partition(":")
    builder, options = BUILDERS.get(Path(path).suffix, (None, {}))
    if builder and not Path(path).is_file():
        raise BadInput(f"the data set {path} does not exist.")
    if not builder and Path(path).is_file():
        raise BadInput(f"the data set {path} is a file of no kind that is read; that can be told by its ending, one of "
                       f"{', '.join(BUILDERS)}.")
    if builder and not Path(path).stat().st_size:
        raise BadInput(f"the data set {path} is empty. Give a file with at least one row.")
    if builder and split:
        raise BadInput(f"--split {split}: {path} is a file, which has no splits; all of it is read. Leave it out.")
    split = split or SPLIT
    of_split = "" if builder else f" (split {split})"
    with _silent():
        import datasets
        datasets.disable_progress_bars()
        try:
            loaded = (datasets.load_dataset(builder, data_files={split: path}, split=split, **options) if builder else
                      datasets.load_dataset(path, configuration or None, split=split))
        except Exception as error:
            raise BadInput(f"the data set {dataset}{of_split} {_unavailable(error, flag)}") from error
    return dataset if builder else f"{dataset} ({split})", list(loaded.select(range(min(limit, len(loaded)))))


def _unavailable(error: Exception, flag: str) -> str:
    """Why a set cannot be had; the library's own words where it is not for want of a connection."""
    cause = error.__cause__ or error
    first = next(iter(str(cause).splitlines()), "").rstrip(".")
    if isinstance(error, (ConnectionError, *_offline())):
        return ("is not here, and the hub cannot be reached. Connect, set HF_ENDPOINT to a mirror, or give a file: "
                f"{flag} rows.jsonl")
    return f"cannot be loaded: {type(cause).__name__}: {first}."


def _offline() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from requests.exceptions import ConnectionError as Unreached
    from requests.exceptions import Timeout
    return LocalEntryNotFoundError, OfflineModeIsEnabled, Unreached, Timeout


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what the libraries log reaches the terminal: what matters of it is in the error that they raise."""
    from huggingface_hub.utils import logging as of_the_hub
    loggers = [logging.getLogger("datasets"), of_the_hub.get_logger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def columns(rows: Sequence[Row], **kinds: type) -> None:
    """Require that every row has these columns, each of its kind."""
    for number, row in enumerate(rows):
        if absent := [name for name in kinds if name not in row]:
            told = f"column {absent[0]} is" if len(absent) == 1 else f"columns {', '.join(absent)} are"
            raise BadInput(f"the {told} needed; the set has {', '.join(row)}. If it has what is meant under another "
                           f"name: --columns {','.join(f'{name}=NAME' for name in absent)}")
        for name, kind in kinds.items():
            if not isinstance(row[name], (int, float) if kind is float else kind):
                raise BadInput(f"row {number} of the data set has {name} = {row[name]!r}; {KINDS[kind]} is needed.")


def renamed(rows: Iterable[Row], mapping: str | None) -> list[Row]:
    """``text=sentence,label=stars``: the set's own column names under the names that the metrics use.

    ``translation.de`` is the entry ``de`` of a column ``translation``, as the sets of translations have it.
    """
    pairs = [pair.partition("=") for pair in mapping.split(",")] if mapping else []
    if any(not ours or not theirs for ours, _, theirs in pairs):
        raise BadInput(f"--columns {mapping} is not of the form text=sentence,label=stars.")
    found = []
    for row in rows:
        found.append({**row, **{ours: _column(row, theirs) for ours, _, theirs in pairs}})
    return found


def _column(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    if isinstance(row.get(outer), Mapping) and inner in row[outer]:
        return row[outer][inner]
    raise BadInput(f"the set has no column {name}; it has {', '.join(row)}.")


def plain_texts(rows: Sequence[Row], encoder: Encoder, **targets: type) -> list[Example]:
    """One example a row; ``targets`` names the columns that are its targets, and their kind."""
    columns(rows, text=str, **targets)
    return [encoder.example(encoder.encode(row["text"]) if encoder.tokenizer else encoder.seeded(),
                            **{name: row[name] for name in targets}) for row in rows]


def sliding_windows(rows: Sequence[Row], encoder: Encoder, stride: int) -> list[Example]:
    """All rows as one text, in windows of ``max_length`` tokens that move on by ``stride``.

    ``first`` is where in its window the first token is scored: all before it were scored in an earlier one. So every
    token but the text's first is scored once, on at least ``max_length - stride`` tokens before it where there are so
    many. As transformers' "Perplexity of fixed-length models" does it, but for the last window, which may be shorter.
    """
    columns(rows, text=str)
    if stride >= encoder.max_length:
        raise BadInput(f"--stride {stride} leaves tokens without anything before them in windows of "
                       f"{encoder.max_length} tokens (--max-length, and the model's positions); give a smaller one.")
    ids = (encoder.tokenizer("\n\n".join(row["text"] for row in rows))["input_ids"] if encoder.tokenizer else
           [token for _ in rows for token in encoder.seeded()["input_ids"]])
    found, scored = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + encoder.max_length, len(ids))
        found.append(encoder.example({"input_ids": ids[begin:end]}, first=scored - begin))
        scored = end
        if end == len(ids):
            break
    return found


def labelled_texts(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    return plain_texts(rows, encoder, label=float if encoder.sizes.get("labels") == 1 else int)


def masked_texts(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    """Some tokens masked, to be found again."""
    return [Example({**example.inputs, "input_ids": ids}, {"labels": labels})
            for example in plain_texts(rows, encoder)
            for ids, labels in [encoder.masked(example.inputs)]]


def sentence_pairs(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    """A passage, what is said to follow it, masked tokens in both; 0 where it does follow."""
    columns(rows, text=str, next=str, follows=bool)
    found = []
    for row in rows:
        encoding = encoder.encode(row["text"], row["next"]) if encoder.tokenizer else encoder.seeded()
        ids, labels = encoder.masked(encoding)
        found.append(encoder.example({**encoding, "input_ids": ids}, labels=labels, sentence=int(not row["follows"])))
    return found


def named_words(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    """1 for the first token of a word that belongs to a name, 0 for that of another word, -100 for the rest."""
    columns(rows, text=str, names=list)
    found = []
    for row in rows:
        if not encoder.tokenizer:
            ids = encoder.seeded()
            found.append(encoder.example(ids, labels=encoder.generator.integers(0, 2, len(ids["input_ids"])).tolist()))
            continue
        encoding, text, names = encoder.encode(row["text"]), row["text"], set(row["names"])
        words = encoding.word_ids()
        first = [word is not None and word not in words[:position] for position, word in enumerate(words)]
        spans = [encoding.word_to_chars(word) if starts else None for word, starts in zip(words, first, strict=True)]
        found.append(encoder.example(encoding, labels=[
            -100 if span is None else int(text[span.start: span.end].strip() in names) for span in spans]))
    return found


def questions(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    """Question and passage; the targets are the answer's first and last token, and which tokens are passage."""
    columns(rows, text=str, question=str, answer=str)
    found = []
    for row in rows:
        if not encoder.tokenizer:
            ids = encoder.seeded()
            length = len(ids["input_ids"])
            found.append(encoder.example(ids, start=length // 3, end=length // 2, passage=[1] * length))
            continue
        encoding = encoder.encode(row["question"], row["text"])
        passage = [int(part == 1) for part in encoding.sequence_ids()]
        if not any(passage):
            raise BadInput(f"the text {row['text']!r} has no token for an answer to lie in.")
        start, end = _answer(encoding, row["text"], row["answer"])
        found.append(encoder.example(encoding, start=start, end=end, passage=passage))
    return found


def translations(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    """A source for the encoder; its translation for the decoder, which reads each token to predict the next one."""
    columns(rows, source=str, target=str)
    found = []
    for row in rows:
        source = encoder.encode(encoder.prefix + row["source"]) if encoder.tokenizer else encoder.seeded()
        labels = list((encoder.encode(row["target"]) if encoder.tokenizer else encoder.seeded())["input_ids"])
        text = row["target"] if encoder.tokenizer else " ".join(map(str, labels))
        example = encoder.example(source, labels=labels, text=text)
        given = {"decoder_input_ids": [decoder_start(encoder.config), *labels[:-1]],
                 "decoder_attention_mask": [1] * len(labels)}
        found.append(Example(example.inputs | given, example.targets))
    return found


def echoed_texts(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    """A text for the encoder, and the same for the decoder, which reads it one token later."""
    return [_echoed(example, encoder.config) for example in plain_texts(rows, encoder)]


def labelled_echoes(rows: Sequence[Row], encoder: Encoder) -> list[Example]:
    return [_echoed(example, encoder.config) for example in labelled_texts(rows, encoder)]


def _echoed(example: Example, config: Config) -> Example:
    ids, mask = example.inputs["input_ids"], example.inputs["attention_mask"]
    shifted = {"decoder_input_ids": [decoder_start(config), *ids[:-1]], "decoder_attention_mask": list(mask)}
    return Example(example.inputs | shifted, example.targets)


def pieces_of(tokenizer: Any | None) -> list[str]:
    """What each id stands for in SentencePiece's spelling, nothing for special ones; none without a tokenizer."""
    if tokenizer is None:
        return []
    special = set(tokenizer.all_special_ids)
    return ["" if number in special else piece or ""
            for number, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))]


def _answer(encoding: Any, text: str, answer: str) -> tuple[int, int]:
    """First and last token of ``answer``; -1, -1 where the text has none, or not all of it was kept."""
    begin = text.find(answer)
    if begin < 0 or not answer:
        return -1, -1
    ends = [encoding.char_to_token(0, at, sequence_index=1) for at in (begin, begin + len(answer) - 1)]
    return (-1, -1) if None in ends else (ends[0], ends[1])


ENCODE: dict[str, Callable[[Sequence[Row], Encoder], list[Example]]] = {
    "causal-lm": plain_texts,
    "prefix-lm": plain_texts,
    "masked-lm": masked_texts,
    "pre-training": sentence_pairs,
    "sequence-classification": labelled_texts,
    "token-classification": named_words,
    "question-answering": questions,
    "translation": translations,
    "encoder": labelled_texts,
    "encoder-decoder": labelled_echoes,
}
