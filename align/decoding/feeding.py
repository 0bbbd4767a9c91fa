"""What a net is given while it continues texts: all of them at each step, or the last tokens behind what it keeps.

It is what transformers' own ``prepare_inputs_for_generation`` makes: positions count the tokens that are no padding,
the mask covers what is kept too. Both are given where torch's class takes them and transformers gives them to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from convert.traits import Prompts

from .. import prompts
from ..runs import Run

if TYPE_CHECKING:
    from ..side import Side

Arrays = dict[str, np.ndarray]
MASK, PLACES = "attention_mask", "position_ids"


@dataclass(frozen=True)
class Start:
    """What is to be continued: ``ids`` and ``mask`` [rows, tokens], padded on the left; of an encoder and a decoder
    these are the decoder's, and ``source`` is what the encoder reads, likewise.
    """

    ids: np.ndarray
    mask: np.ndarray
    source: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def arrays(self) -> Arrays:
        """As a step keeps them."""
        return {"ids": self.ids, "mask": self.mask} | {f"source.{name}": array for name, array in self.source.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Start:
        """Of what :attr:`arrays` gave."""
        source = {name.removeprefix("source."): array for name, array in arrays.items() if name.startswith("source.")}
        return cls(arrays["ids"], arrays["mask"], source)

    def row(self, number: int) -> Start:
        """One row by itself."""
        return Start(*(array[number: number + 1] for array in (self.ids, self.mask)),
                     {name: array[number: number + 1] for name, array in self.source.items()})


@dataclass(frozen=True)
class Feed:
    """``takes`` are the arguments that torch's class has; texts begin with ``start``."""

    run: Run
    takes: frozenset[str]
    start: Start

    def whole(self, ids: np.ndarray, mask: np.ndarray) -> Arrays:
        """The arguments for texts [rows, tokens] from their beginning."""
        if self.start.source:
            return {**self._source(len(ids)), "decoder_input_ids": ids}
        kind = self.run.head.inputs
        if isinstance(kind, Prompts):
            rows = [row[place:].tolist() for row, place in zip(ids, mask.argmax(1), strict=True)]
            return prompts.arranged(rows, kind, self.run.config, self.run.sizes)
        given = {MASK: mask, PLACES: places(mask)}
        return {"input_ids": ids} | {name: array for name, array in given.items() if name in self.takes}

    def last(self, ids: np.ndarray, mask: np.ndarray) -> Arrays:
        """The arguments for the last tokens of texts [rows, tokens] all but which the net keeps."""
        if self.start.source:
            return {MASK: self._source(len(ids))[MASK], "decoder_input_ids": ids[:, -1:]}
        found = self.whole(ids, mask)
        masks = {MASK: found[MASK] if found[MASK].ndim == 2 else found[MASK][:, :, -1:]} if MASK in found else {}
        return {name: array[..., -1:] for name, array in found.items()} | masks

    def _source(self, rows: int) -> Arrays:
        """What the encoder reads, once for each of as many texts as a row has."""
        return {name: array.repeat(rows // len(array), axis=0) for name, array in self.start.source.items()}


def places(mask: np.ndarray) -> np.ndarray:
    """Where each token stands among those that are no padding, padding at 1: [rows, tokens], as transformers has it."""
    return np.where(mask == 0, 1, mask.cumsum(-1) - 1)


def rows_axis(run: Run) -> int:
    """Which axis of keys and values is that of the rows: the second where a block's states have time first."""
    return int(any(run.family.time_first(name) for _, name in run.modules))


class KeepsNothing(Exception):
    """A net that can be asked to keep what it has computed gives nothing to keep; the message is told of that net."""


class Keeping(Protocol):
    """A side that can keep what it has computed of a text, as keys and values."""

    def continued(self, arrays: Mapping[str, np.ndarray], kept: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits [rows, tokens, vocabulary] behind what was ``kept``, nothing at first, and what is kept now."""

    def selected(self, kept: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        """What is kept of these ``rows``, in their order."""


@dataclass
class Whole:
    """A side that is given all of a text at each step."""

    side: Side
    feed: Feed

    def next(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.side.outputs(self.given(ids, mask))["logits"][:, -1]

    def given(self, ids: np.ndarray, mask: np.ndarray) -> Arrays:
        return self.feed.whole(ids, mask)

    def select(self, rows: np.ndarray) -> None: ...


@dataclass
class Cached:
    """A side that is given the last token of a text at each step, and keeps what came before."""

    side: Keeping
    feed: Feed
    kept: dict[str, Any] = field(default_factory=dict)

    def next(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        logits, self.kept = self.side.continued(self.given(ids, mask), self.kept)
        return logits[:, -1]

    def given(self, ids: np.ndarray, mask: np.ndarray) -> Arrays:
        return self.feed.last(ids, mask) if self.kept else self.feed.whole(ids, mask)

    def select(self, rows: np.ndarray) -> None:
        self.kept = self.side.selected(self.kept, rows)
