"""A set of examples run through a side in batches, in order, none dropped; what comes out is scores, not logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from . import pictures
from .agreement import EMBEDDINGS
from .decoding.greedy import TEXT, Limits, greedy, reread
from .floor import OWN_NOISE, modes_of_passes
from .inputs import Inputs, batches, decoder_start
from .scores import DECODED, SCORES, Arrays, neighbours
from .side import Side
from .stage import Session
from .texts import Example

LONGER, ROWS_TOGETHER = 8, 4
Entered = Callable[[], Sequence[AbstractContextManager]]


@dataclass(frozen=True)
class Evaluation:
    """``examples`` as the head of the session's run takes them, ``batch_size`` together."""

    session: Session
    examples: Sequence[Example]
    batch_size: int

    def arrays(self, side: Side) -> Arrays:
        """Scores, predictions, their margins and their targets; of a task that decodes, the texts too."""
        found, = self._reduced(side, lambda: [nullcontext()])
        return found | self._decoded(side) if self._decodes else found

    def runs(self, recorded: Arrays, reordered: int) -> list[Arrays]:
        """Torch's in float64, as ``recorded`` in the ordinary pass, and with its sums in ``reordered`` other orders."""
        exact, *others = self._reduced(self.session.reference, lambda: modes_of_passes(reordered), OWN_NOISE)
        if self._decodes:
            texts = self._read_again(recorded[f"{TEXT}.predictions"], reordered)
            exact, *others = [one | text for one, text in zip([exact, *others], texts, strict=True)]
        return [exact, recorded, *others]

    @property
    def digest(self) -> str:
        """xxh3-128 of all batches."""
        return Inputs({f"{number}.{key}": array for number, inputs in enumerate(self._fed)
                       for key, array in inputs.arrays.items()}).digest

    @property
    def _decodes(self) -> bool:
        return self.session.run.head.task in DECODED

    @cached_property
    def _fed(self) -> list[Inputs]:
        return self._batches(self.batch_size)

    def _batches(self, rows: int) -> list[Inputs]:
        run = self.session.run
        if run.head.inputs == "pixels":
            return list(pictures.batches(self.examples, rows))
        return list(batches([example.inputs for example in self.examples], run.config, run.sizes, rows,
                            run.head.inputs))

    def _reduced(self, side: Side, modes: Entered, purpose: str | None = None) -> list[Arrays]:
        """Over all batches, once in each of ``modes()``, which is entered around the model alone."""
        score, several = SCORES[self.session.run.head.task], [modes() for _ in self._fed]
        reduced: list[list[Arrays]] = [[] for _ in several[0]]

        def evaluate(number: int, inputs: Inputs, mode: AbstractContextManager, into: list[Arrays]) -> None:
            with mode:
                outputs = side.outputs(inputs.arrays)
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            into.append(score.reduce(outputs, inputs, self.examples[rows]))
        fed = zip(self._fed, several, strict=True)
        side.sweep([partial(evaluate, number, inputs, mode, into) for number, (inputs, entered) in enumerate(fed)
                    for mode, into in zip(entered, reduced, strict=True)], purpose)
        return [joined(of_mode) for of_mode in reduced]

    def _decoded(self, side: Side) -> Arrays:
        """What the side makes of the sources alone, at most ``LONGER`` tokens longer than the longest reference.

        Of a batch's memory the scores of every token of whole texts are the most. Texts that are being decoded are
        mostly shorter, so that more of them go together.
        """
        return greedy(side, self._sources(ROWS_TOGETHER * self.batch_size), self._limits, lambda step: (
            self.session.advance(f"{side.framework}, token {step} of {self._limits.steps}")))

    def _read_again(self, chosen: np.ndarray, reordered: int) -> list[Arrays]:
        """What torch thinks of the decoded texts ``chosen`` [rows, steps], in float64 and with its sums reordered."""
        parts = [reread(self.session.reference, source, chosen[number * self.batch_size:][: self.batch_size],
                        self._limits, modes_of_passes(reordered), OWN_NOISE)
                 for number, source in enumerate(self._sources(self.batch_size))]
        return [joined(of_mode) for of_mode in zip(*parts, strict=True)]

    @cached_property
    def _limits(self) -> Limits:
        config = self.session.run.config
        end = config.get("eos_token_id")
        return Limits(decoder_start(config), end if isinstance(end, int) else None,
                      LONGER + max(len(example.targets["labels"]) for example in self.examples))

    def _sources(self, rows: int) -> list[Arrays]:
        return [{name: array for name, array in inputs.arrays.items() if not name.startswith("decoder_")}
                for inputs in self._batches(rows)]


def joined(reduced: Sequence[Arrays]) -> Arrays:
    """What batches were reduced to as one, and the neighbours of all rows where these are embeddings."""
    arrays = {name: np.concatenate([batch[name] for batch in reduced]) for name in reduced[0]}
    return arrays | neighbours(arrays[EMBEDDINGS]) if EMBEDDINGS in arrays else arrays
