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

SEED = 20260602
ROWS = 4
LENGTH = 96
MINIMUM = 64
PATTERNS = ("whole", "padded left", "right", "and on both sides")


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of a model as int64 arrays [batch, tokens]; ``notes`` says what is unusual about them."""

    arrays: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()

    @property
    def mask(self) -> np.ndarray:
        """[batch, tokens], True where there is a token."""
        return self.arrays["attention_mask"].astype(bool)

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


def seeded(config: Config, sizes: Sizes, *, padded: bool = True, rows: int = ROWS, tokens: int = LENGTH) -> Inputs:
    """Rows by turns whole, padded on the left, on the right, and on both sides (or all of them whole).

    Ids are uniform below ``vocab_size`` and never the pad token, so that no class mistakes a token for padding.
    """
    length = min(tokens, sizes["positions"])
    asked = f"The inputs are {length} tokens long, as asked for; {MINIMUM} or more show more."
    short = f"The model has {length} positions, so the inputs are {length} tokens long instead of {MINIMUM}."
    cut = f"The model has {length} positions, so the inputs are {length} tokens long instead of {tokens}."
    if length >= MINIMUM:
        notes = (cut,) if length < tokens != LENGTH else ()
    else:
        notes = (short if length < tokens else asked,)
    generator = np.random.default_rng(SEED + padded)
    pad = pad_token(config)
    ids = generator.integers(0, sizes["vocab"] - (pad < sizes["vocab"]), (rows, length))
    ids += ids >= pad
    mask = np.ones((rows, length), np.int64)
    if padded:
        third = length // 3
        mask[1::4, :third] = 0
        mask[2::4, length - third:] = 0
        mask[3::4, : third // 2] = mask[3::4, length - third // 2:] = 0
    arrays = {"input_ids": np.where(mask == 1, ids, min(pad, sizes["vocab"] - 1)), "attention_mask": mask}
    return Inputs(arrays | token_types(sizes, mask), notes)


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


def batches(rows: list[dict[str, list[int]]], config: Config, size: int) -> list[Inputs]:
    """Rows of token ids as right-padded batches, in order, none dropped."""
    if not rows:
        raise BadInput("the data set has no row to evaluate on.")
    found = []
    for start in range(0, len(rows), size):
        chunk = rows[start: start + size]
        width = max(len(row["input_ids"]) for row in chunk)
        fill = {"input_ids": pad_token(config), "labels": -100}
        found.append(Inputs({
            name: np.array([row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in chunk], np.int64)
            for name in chunk[0]
        }))
    return found


def positive(text: str) -> int:
    """A whole number above 0 on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number
