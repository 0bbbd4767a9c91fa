"""What texts are continued from: the beginnings of those that ship with the project, the user's own, or seeded ids.

Rows are padded on the left, as generation wants it; those of nets that know no mask are of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convert.errors import BadInput, FrameworkMissing
from convert.traits import Prompts

from .. import prompts
from ..inputs import SEED, decoder_start, pad_token
from ..runs import Run
from ..texts import Encoder, load_rows, tokenizer_of
from .feeding import Start

ROWS, LENGTH, LEAST = 4, 24, 2
SHARES = (1.0, 0.67, 0.5, 0.25)
"""How long rows are by turns, as a share of the longest: the first has no padding."""
Spell = Callable[[Sequence[int]], str]


def shipped(run: Run, rows: int, tokens: int) -> tuple[Start, list[str]]:
    """(``rows`` beginnings, what they are): of the texts that ship for the head's task, or without a tokenizer seeded.

    None is so long that it could not be continued by ``tokens``.
    """
    tokenizer, head = tokenizer_of(run), run.head
    longest = min(LENGTH, _room(run, tokens))
    lengths = [longest if head.inputs == "whole rows" else max(LEAST, int(longest * SHARES[row % len(SHARES)]))
               for row in range(rows)]
    name, found = load_rows(None, None, rows, head.task)
    texts = [str(row.get("source", row.get("text"))) for row in found]
    if tokenizer is None:
        told = "seeded ids below vocab_size, because the checkpoint has no tokenizer"
        return _start(run, _seeded(run, lengths)), [f"Continued: {rows} rows of {told}."]
    ids = [_encoded(run, tokenizer, head.prefix + texts[row % len(texts)], length)
           for row, length in enumerate(lengths)]
    if head.inputs == "whole rows":
        ids = [row[: min(map(len, ids))] for row in ids]
    padded = "of one length" if len(set(map(len, ids))) == 1 else "padded on the left"
    before = f", {head.prefix!r} before each" if head.prefix else ""
    return _start(run, ids), [f"Continued: the beginnings of {rows} rows of {name}{before}; {min(map(len, ids))} to "
                              f"{max(map(len, ids))} tokens, {padded}."]


def given(run: Run, texts: Sequence[str], tokens: int) -> Start:
    """The user's own; :class:`BadInput` where there is no tokenizer, or no room for so long a text."""
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        raise BadInput(f"a prompt is a text, and the checkpoint of run {run.name} has no tokenizer. Put the "
                       "tokenizer's files beside the checkpoint and convert again.")
    broken = next((text for text in texts if not _is_text(text)), None)
    if broken is not None:
        raise BadInput(f"the prompt {broken[:40]!r} is no text in UTF-8.")
    room = _room(run, tokens)
    ids = [_encoded(run, tokenizer, text, room + 1) for text in texts]
    for text, row in zip(texts, ids, strict=True):
        if len(row) > room:
            raise BadInput(f"the prompt {text[:40]!r} has more than {room} tokens, and the model's "
                           f"{run.sizes['positions']} positions are to hold {tokens} new ones too. Give a shorter one, "
                           "or fewer --tokens.")
        if not row:
            raise BadInput("a prompt is empty; there is nothing to continue.")
    if run.head.inputs == "whole rows" and len(set(map(len, ids))) > 1:
        raise BadInput("prompts of different lengths need padding, and this net knows no mask. Give one --prompt.")
    return _start(run, ids)


def spelling(run: Run) -> Spell:
    """Ids as a text: by the source's tokenizer where it is and can be loaded here, else as numbers."""
    try:
        tokenizer = tokenizer_of(run)
    except (FrameworkMissing, BadInput):
        tokenizer = None
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    if isinstance(tokenizer, prompts.Tokenizer):
        return lambda ids: _in_one_line(tokenizer.decode(ids))
    return lambda ids: _in_one_line(tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _in_one_line(text: str) -> str:
    """What is no letter is shown, not obeyed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def padding(run: Run) -> int:
    """The id that padding has, one of the vocabulary."""
    return min(pad_token(run.config), run.sizes["vocab"] - 1)


def _is_text(text: str) -> bool:
    """Whether it holds no bytes that the terminal could not read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _room(run: Run, tokens: int) -> int:
    room = run.sizes["positions"] - tokens
    if room < LEAST:
        raise BadInput(f"--tokens {tokens} leaves no room for a prompt: the model has {run.sizes['positions']} "
                       "positions. Give fewer.")
    return room


def _encoded(run: Run, tokenizer: Any, text: str, length: int) -> list[int]:
    """At most ``length`` ids of a text, with the marks that the head's inputs have."""
    kind = run.head.inputs
    if isinstance(kind, Prompts):
        marks = prompts.marks_of(kind, run.config, run.sizes)
        return prompts.opening(tokenizer.words(text)[: max(1, length - len(prompts.opening([], marks)))], marks)
    return list(Encoder(tokenizer, run.config, run.sizes, length).encode(text)["input_ids"])


def _seeded(run: Run, lengths: Sequence[int]) -> list[list[int]]:
    generator, kind, pad = np.random.default_rng(SEED), run.head.inputs, padding(run)
    if isinstance(kind, Prompts):
        marks = prompts.marks_of(kind, run.config, run.sizes)
        words = prompts.words_of(run.sizes, marks)
        return [prompts.opening(generator.choice(words, max(1, length - 2)).tolist(), marks) for length in lengths]
    words = np.setdiff1d(np.arange(run.sizes["vocab"]), [pad])
    return [generator.choice(words, length).tolist() for length in lengths]


def _start(run: Run, rows: Sequence[Sequence[int]]) -> Start:
    """Rows padded on the left; those of an encoder are what it reads, and its decoder begins with its start."""
    width, pad = max(map(len, rows)), padding(run)
    ids = np.array([[pad] * (width - len(row)) + list(row) for row in rows], np.int64)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
    if run.head.inputs != "tokens to tokens":
        return Start(ids, mask)
    begin = np.full((len(rows), 1), decoder_start(run.config), np.int64)
    return Start(begin, np.ones_like(begin), {"input_ids": ids, "attention_mask": mask})
