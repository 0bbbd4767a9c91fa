"""What both models are fed: seeded, long, batched, padded on both sides; stored with the run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from convert.errors import BadInput
from convert.rules import Config, Sizes
from convert.traits import Prompts

from . import prompts
from .options import positive

SEED = 20260602
ROWS = 4
LENGTH = 96
MINIMUM = 64
SIDES = {True: (97, 64), False: (65, 80)}
"""(height, width) of pictures: halved five times, an odd side and an even one show every way of rounding."""
PATCH = 8
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, by channel."""
PATTERNS = ("whole", "padded left", "right", "and on both sides")
PER_TOKEN_VECTORS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Rows:
    """Which rows of a model's arrays are real, called with an array's name and the array.

    Padded queries are meaningless on both sides: of an array [batch, tokens, ...] the rows of real tokens are taken,
    [rows, ...], by that one of ``masks`` that has its batch and tokens; of an array [batch * tokens, width], as some
    MLPs have them, the same. Without masks there are pictures: a feature map [batch, channels, height, width] has a row
    for each place. Any other array comes back as it is.
    """

    masks: tuple[np.ndarray, ...]
    batch: int

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim == 3 or name in PER_TOKEN_VECTORS:
            fitting = next((mask for mask in self.masks if mask.shape == array.shape[:2]), None)
            return array.copy() if fitting is None else array[fitting]
        if array.ndim == 2:
            fitting = next((mask for mask in self.masks if mask.size == len(array)), None)
            return array.copy() if fitting is None else array[fitting.reshape(-1)]
        if array.ndim == 4 and not self.masks:
            return np.array(np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]), order="C")
        return array.copy()

    @property
    def first(self) -> Rows:
        """The same for the first row of the batch alone."""
        return Rows(tuple(mask[:1] for mask in self.masks), 1)

    def first_of(self, array: np.ndarray) -> np.ndarray:
        """The first row of the batch alone, of a whole array."""
        return array[:1]


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of a model: ids and masks int64 [batch, tokens], pictures float32 [batch, channels, height,
    width]; ``notes`` says what is unusual about them."""

    arrays: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()

    @property
    def mask(self) -> np.ndarray:
        """[batch, tokens], True where there is a token; a picture counts for one."""
        if "attention_mask" not in self.arrays:
            return np.ones((self.rows.batch, 1), bool)
        return _real(self.arrays["attention_mask"])

    @property
    def last_mask(self) -> np.ndarray:
        """:attr:`mask` of the tokens that the model's last hidden states belong to: the decoder's, where it has one."""
        decoder = self.arrays.get("decoder_attention_mask")
        return self.mask if decoder is None else _real(decoder)

    @property
    def rows(self) -> Rows:
        """The rows of real tokens, by the attention masks that there are."""
        masks = [_real(array) for name, array in self.arrays.items() if name.endswith("attention_mask")]
        return Rows(tuple(masks), len(next(iter(self.arrays.values()))))

    @property
    def told(self) -> list[str]:
        """What they are, in a sentence each."""
        shapes = {name: array.shape for name, array in self.arrays.items()}
        encoder, decoder, pictures = (shapes.get(name) for name in (
            "attention_mask", "decoder_attention_mask", "pixel_values"))
        patterns = prompts.PATTERNS if encoder and len(encoder) > 2 else PATTERNS
        whole = encoder and len(encoder) == 2 and encoder[0] > 1 and self.arrays["attention_mask"].all()
        how = "all of them whole." if whole else (
            f"{', '.join(patterns[:encoder[0]])}; padded positions are not compared." if encoder else "")
        return [*([f"Inputs: {encoder[0]} rows of {encoder[-1]} seeded tokens: {how}"] if encoder else []),
                *([f"The decoder reads {decoder[1]} tokens a row, padded in another order."] if decoder else []),
                *([f"Inputs: {pictures[0]} seeded pictures of {pictures[2]} x {pictures[3]} pixels (height x width), "
                   "normalised; each place of a feature map counts as a row."] if pictures else [])]

    @property
    def first(self) -> Inputs:
        """The first row alone, which has no padding."""
        return Inputs({name: array[:1] for name, array in self.arrays.items()})

    @property
    def digest(self) -> str:
        """xxh3-128 over names, shapes and bytes."""
        hasher = xxhash.xxh3_128()
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            hasher.update(f"{name} {array.dtype} {array.shape}\n".encode())
            hasher.update(array.reshape(-1).view(np.uint8))
        return hasher.hexdigest()

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **self.arrays)


def seeded(config: Config, sizes: Sizes, *, kind: str | Prompts = "tokens", padded: bool = True,
           rows: int = ROWS, tokens: int | tuple[int, int] = LENGTH, seed: int = SEED) -> Inputs:
    """Inputs of a kind that a head names. ``padded`` says whether some of them are, where the kind knows padding; of
    pictures it chooses between two sizes. ``tokens`` is how long a row is at most, or a picture's (height, width).
    """
    if isinstance(kind, Prompts):
        return _prompts(kind, config, sizes, padded, rows, tokens, seed)
    return KINDS[kind](config, sizes, padded, rows, tokens, seed)


def _tokens(config: Config, sizes: Sizes, padded: bool, rows: int, tokens: int, seed: int) -> Inputs:
    """Rows of ids with their mask, as long as is asked for and the model has positions."""
    length, notes = _length(sizes, tokens)
    mask = _padding(rows, length, padded)
    if rows == length and not mask.all():
        raise BadInput(f"{rows} rows of {length} tokens: a table of positions, tokens by tokens, could not be told "
                       "from what has a row for each text. Ask for another number of rows or tokens.")
    ids = _drawn(mask, config, sizes, np.random.default_rng(seed + padded))
    return Inputs({"input_ids": ids, "attention_mask": mask} | token_types(sizes, mask), notes)


def _tokens_to_tokens(config: Config, sizes: Sizes, padded: bool, rows: int, tokens: int, seed: int) -> Inputs:
    """For the encoder what a model of tokens gets; for the decoder a quarter less, its rows padded in another order.

    The two lengths are never the same, so that a shape says which of the two an array belongs to; nor is the decoder's
    the number of rows, so that a table of positions, tokens by tokens, is told from what has a row for each text.
    """
    encoder = _tokens(config, sizes, padded, rows, tokens, seed)
    length = encoder.mask.shape[1]
    shorter = length - max(length // 4, 1) or 2
    mask = _padding(rows, shorter - (shorter == rows > 1), padded)
    mask[1:] = mask[:0:-1].copy()
    ids = _drawn(mask, config, sizes, np.random.default_rng(seed + 2 + padded))
    given = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return Inputs({**encoder.arrays, **given}, encoder.notes)


def _padding(rows: int, length: int, padded: bool) -> np.ndarray:
    """1 for a token: rows by turns whole, padded on the left, on the right, on both sides; or all of them whole."""
    mask = np.ones((rows, length), np.int64)
    if padded:
        third = length // 3
        mask[1::4, :third] = 0
        mask[2::4, length - third:] = 0
        mask[3::4, : third // 2] = mask[3::4, length - third // 2:] = 0
    return mask


def _drawn(mask: np.ndarray, config: Config, sizes: Sizes, generator: np.random.Generator) -> np.ndarray:
    """Ids uniform below ``vocab_size`` and never the pad token, so that no class mistakes a token for padding."""
    pad = pad_token(config)
    ids = generator.integers(0, sizes["vocab"] - (pad < sizes["vocab"]), mask.shape)
    ids += ids >= pad
    return np.where(mask == 1, ids, min(pad, sizes["vocab"] - 1))


def _length(sizes: Sizes, tokens: int) -> tuple[int, tuple[str, ...]]:
    """(how many tokens a row has, what is unusual about that)"""
    length = min(tokens, sizes["positions"])
    asked = f"The inputs are {length} tokens long, as asked for; {MINIMUM} or more show more."
    short = f"The model has {length} positions, so the inputs are {length} tokens long instead of {MINIMUM}."
    cut = f"The model has {length} positions, so the inputs are {length} tokens long instead of {tokens}."
    if length >= MINIMUM:
        notes = (cut,) if length < tokens != LENGTH else ()
    else:
        notes = (short if length < tokens else asked,)
    return length, notes


def _pixels(config: Config, sizes: Sizes, padded: bool, rows: int, tokens: int | tuple[int, int],
            seed: int) -> Inputs:
    """Patches of one colour each under a fine grain, in the range that ImageNet's mean and deviation leave."""
    height, width = tokens if isinstance(tokens, tuple) else SIDES[padded]
    generator, channels = np.random.default_rng(seed + padded), sizes["channels"]
    patches = generator.uniform(0, 1, (rows, channels, -(-height // PATCH), -(-width // PATCH)))
    coarse = patches.repeat(PATCH, axis=2).repeat(PATCH, axis=3)[:, :, :height, :width]
    values = np.round(255 * (0.7 * coarse + 0.3 * generator.uniform(0, 1, coarse.shape))) / 255
    mean, deviation = (np.resize(numbers, channels)[:, None, None] for numbers in (MEAN, DEVIATION))
    return Inputs({"pixel_values": ((values - mean) / deviation).astype(np.float32)})


def token_types(sizes: Sizes, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Second half of type 1, where the family has token types."""
    if sizes.get("types", 0) < 2:
        return {}
    types = np.zeros_like(mask)
    types[:, mask.shape[1] // 2:] = 1
    return {"token_type_ids": types}


def pad_token(config: Config) -> int:
    """The id that padding has: the config's, else its end of sequence, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        if isinstance(config.get(name), int) and config[name] >= 0:
            return config[name]
    return 0


def decoder_start(config: Config) -> int:
    """The id that a decoder's texts begin with; padding where the config does not say."""
    start = config.get("decoder_start_token_id")
    return start if isinstance(start, int) and start >= 0 else pad_token(config)


def batches(rows: list[dict[str, list[int]]], config: Config, sizes: Sizes, size: int,
            kind: str | Prompts = "tokens") -> list[Inputs]:
    """Rows of token ids as right-padded batches, in order, none dropped; prompts are padded on the left."""
    if not rows:
        raise BadInput("the data set has no row to evaluate on.")
    found = []
    for start in range(0, len(rows), size):
        chunk = rows[start: start + size]
        if isinstance(kind, Prompts):
            found.append(Inputs(prompts.arranged([row["input_ids"] for row in chunk], kind, config, sizes)))
            continue
        fill = {"input_ids": pad_token(config), "decoder_input_ids": pad_token(config), "labels": -100}
        found.append(Inputs({name: _right_padded([row[name] for row in chunk], fill.get(name, 0))
                             for name in chunk[0]}))
    return found


def _right_padded(rows: list[list[int]], fill: int) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [fill] * (width - len(row)) for row in rows], np.int64)


def _prompts(kind: Prompts, config: Config, sizes: Sizes, padded: bool, rows: int, tokens: int, seed: int) -> Inputs:
    """Most of them shorter and padded on the left if ``padded``."""
    length, notes = _length(sizes, tokens)
    drawn = prompts.drawn(kind, config, sizes, padded, rows, length, np.random.default_rng(seed + padded))
    return Inputs(prompts.arranged(drawn, kind, config, sizes), notes)


def _real(mask: np.ndarray) -> np.ndarray:
    """[batch, tokens], True where there is a token, which at least sees itself; of the mask that a model is given."""
    return mask.astype(bool) if mask.ndim == 2 else ~np.diagonal(mask[:, 0], axis1=1, axis2=2)


def _whole_rows(config: Config, sizes: Sizes, padded: bool, rows: int, tokens: int, seed: int) -> Inputs:
    """For nets that know no mask: what a model of tokens gets, without padding."""
    return _tokens(config, sizes, False, rows, tokens, seed)


KINDS = {
    "pixels": _pixels,
    "tokens": _tokens,
    "tokens to tokens": _tokens_to_tokens,
    "whole rows": _whole_rows,
}


def sides(text: str) -> tuple[int, int]:
    """``97x64``, height and width, on the command line."""
    height, _, width = text.partition("x")
    try:
        return positive(height), positive(width)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no size; give for example 224x224, height and width") from error
