"""GLM's prompts (Du et al. 2022): a context that sees itself, a mask, and behind the bos an answer, word by word.

Rows of ids become what the checkpoint's own tokenizer makes of them: padded on the left, with a mask and positions that
say where the context ends. That tokenizer is code of the checkpoint's, which transformers 4.55 cannot load any more, so
its words are read from its SentencePiece model here, and none of its code is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require
from convert.rules import Config, Sizes
from convert.traits import Prompts

PATTERNS = ("whole", "a short context and a long answer", "[MASK] instead of [gMASK]", "a prompt without an answer")


def marks_of(kind: Prompts, config: Config, sizes: Sizes) -> dict[str, int]:
    """The ids of bos, eos, both masks and padding, each of them a word of the vocabulary, no two the same."""
    found = {name: config.get(name, usual) for name, usual in kind.marks.items()}
    for name, number in found.items():
        if type(number) is not int or not 0 <= number < sizes["vocab"]:
            raise BadInput(f"config.json: {name} is {str(number)[:40]}, no word of a vocabulary of "
                           f"{sizes['vocab']}.")
    if len(set(found.values())) < len(found):
        raise BadInput("config.json: " + ", ".join(f"{name} = {number}" for name, number in found.items())
                       + "; no two of them may be the same.")
    return found


def drawn(kind: Prompts, config: Config, sizes: Sizes, padded: bool, rows: int, length: int,
          generator: np.random.Generator) -> list[list[int]]:
    """Seeded prompts of ``length`` tokens, or most of them shorter if ``padded``: ``PATTERNS`` take turns."""
    marks = marks_of(kind, config, sizes)
    words, found = words_of(sizes, marks), []
    if len(words) == 0 or length < 4:
        raise BadInput(f"{length} tokens a row and a vocabulary of {sizes['vocab']} are too few for a prompt with its "
                       "marks.")
    for row in range(rows):
        pattern = row % len(PATTERNS) if padded else 0
        whole = length - pattern * (length // 6)
        context = max(2, (whole // 2, whole // 4, whole // 2, whole - 1)[pattern])
        ids = generator.choice(words, whole)
        ids[context - 1] = marks["mask_token_id" if pattern == 2 else "gmask_token_id"]
        ids[context] = marks["bos_token_id"]
        found.append(ids.tolist())
    return found


def words_of(sizes: Sizes, marks: dict[str, int]) -> np.ndarray:
    """Every id that is no mark."""
    return np.setdiff1d(np.arange(sizes["vocab"]), list(marks.values()))


def prompt(words: Sequence[int], marks: dict[str, int]) -> list[int]:
    """The first half of a text as context, the second as the answer to it."""
    half = len(words) // 2
    return [*words[:half], marks["gmask_token_id"], marks["bos_token_id"], *words[half:], marks["eos_token_id"]]


def opening(words: Sequence[int], marks: dict[str, int]) -> list[int]:
    """A text as context, and the beginning of an answer to it."""
    return [*words, marks["gmask_token_id"], marks["bos_token_id"]]


def arranged(rows: Sequence[Sequence[int]], kind: Prompts, config: Config, sizes: Sizes) -> dict[str, np.ndarray]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of rows that hold their marks, padded on the left.

    The mask is bool [batch, 1, tokens, tokens], True where a query may not look: nobody looks at padding, which looks
    at nothing. Positions are int64 [batch, 2, tokens], in the context and in the answer, or [batch, tokens].
    """
    marks, width = marks_of(kind, config, sizes), max(map(len, rows))
    ids = np.full((len(rows), width), marks["pad_token_id"], np.int64)
    masked = np.ones((len(rows), 1, width, width), bool)
    places = np.zeros((len(rows), 2, width), np.int64)
    for row, words in enumerate(rows):
        real, context, length = slice(width - len(words), width), words.index(marks["bos_token_id"]), len(words)
        masks = [words.index(marks[name]) for name in ("gmask_token_id", "mask_token_id") if marks[name] in words]
        mask = masks[0] if masks else 0
        goes_on = not masks or (marks["gmask_token_id"] in words and not kind.two_dimensions(config))
        ids[row, real] = words
        masked[row, 0, real, real] = np.triu(np.ones((length, length), bool), 1) & (np.arange(length) >= context)
        places[row, 0, real] = np.where((np.arange(length) >= context) & (not goes_on), mask, np.arange(length))
        places[row, 1, real] = np.maximum(np.arange(length) - context + 1, 0)
    return {"input_ids": ids, "attention_mask": masked,
            "position_ids": places if kind.two_dimensions(config) else places[:, 0]}


def answers(masked: np.ndarray) -> np.ndarray:
    """The words behind the bos, bool [batch, tokens], of the mask: those of the context are seen from before them.

    The bos itself is given. Words of the answer are what is to be predicted.
    """
    real = ~np.diagonal(masked[:, 0], axis1=1, axis2=2)
    unseen = real & (np.triu(masked[:, 0] & real[:, :, None], 1)).any(axis=1)
    return unseen & np.roll(unseen, 1, axis=1)


class Tokenizer:
    """Texts to prompts, with the words that the checkpoint's own tokenizer finds."""

    def __init__(self, directory: Path, kind: Prompts, marks: dict[str, int]) -> None:
        require("sentencepiece")
        import sentencepiece
        self.kind, self.marks = kind, marks
        file, settings = directory / kind.words, directory / "tokenizer_config.json"
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
            told: Any = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
            self.offset = int(told.get(*kind.images))
        except Exception as error:
            raise BadInput(f"the tokenizer in {directory} cannot be read ({type(error).__name__}: "
                           f"{next(iter(str(error).splitlines()), '')}).") from error

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return len(prompt([], self.marks))

    def __call__(self, text: str, pair: None = None, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
        """A text of at most ``max_length`` tokens with the marks of a prompt."""
        return {"input_ids": prompt(self.words(text)[: max_length - self.num_special_tokens_to_add(False)], self.marks)}

    def words(self, text: str) -> list[int]:
        """Lines, tabs and runs of blanks are words of their own; images have the first ids, where there are any."""
        return [self.offset + piece for piece in self.model.encode(self.folded(text))]

    def folded(self, text: str) -> str:
        """The text with a word's name for each line, tab and run of blanks."""
        for character, word in self.kind.spelled.items():
            text = text.replace(character, word)
        template, longest = self.kind.blanks
        return re.sub(f" {{2,{longest}}}", lambda found: template.format(len(found[0])), text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these words, marks left out."""
        pieces = [one - self.offset for one in ids if one not in self.marks.values()]
        return self.model.decode([one for one in pieces if 0 <= one < self.model.get_piece_size()])
