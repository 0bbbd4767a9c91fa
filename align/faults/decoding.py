"""Faults of decoding to plant: what goes wrong between a right net and its text, whatever the family.

Each is planted in the candidate's side alone, while it continues texts; no other stage has such a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

from .. import generate
from ..decoding import search
from ..decoding.feeding import PLACES, Cached, Whole
from ..paddle_net import PAST, PaddleNet
from .fault import NotPlanted

Arrays = dict[str, np.ndarray]
Patch = tuple[object, str, Any]


@dataclass(frozen=True)
class Misdecoding:
    """``patches`` are what is exchanged; ``shown`` is the strategy that first shows it, ``says`` what the explanation
    has to say. ``positions``: only a class that is given positions can be given wrong ones.
    """

    name: str
    patches: tuple[Patch, ...] = field(repr=False)
    shown: str
    says: str
    positions: bool = False

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Meanwhile the candidate's texts are continued so; :class:`NotPlanted` where none was."""
        right, done = generate.go_on, []

        def wrong(*given: Any) -> None:
            with ExitStack() as stack:
                for owner, name, value in self.patches:
                    stack.enter_context(patch.object(owner, name, value))
                right(*given)
            done.append(self.name)
        with patch.object(generate, "go_on", wrong):
            yield
        if not done:
            raise NotPlanted("no text of the candidate's was continued")


def _given(cls: type, change: Callable[[Arrays, bool], Mapping[str, np.ndarray]]) -> Patch:
    """Arguments of a net changed; ``change`` is told whether something is kept already."""
    right = cls.given

    def given(self: Any, ids: np.ndarray, mask: np.ndarray) -> Arrays:
        found = right(self, ids, mask)
        return {**found, **change(found, bool(getattr(self, "kept", ())))}
    return cls, "given", given


def _seeing_all(given: Arrays, later: bool) -> Mapping[str, np.ndarray]:
    mask = given["attention_mask"]
    if mask.dtype == bool:
        return {"attention_mask": mask & ~mask.all(-2, keepdims=True)}
    return {"attention_mask": np.ones_like(mask)}


def _one_further(given: Arrays, later: bool) -> Mapping[str, np.ndarray]:
    return {PLACES: given[PLACES] + 1} if later else {}


def _with_one_more(scores: np.ndarray, share: float) -> np.ndarray:
    count = np.isfinite(_most_probable(scores, share)).sum(-1) + 1
    return np.stack([search.best_of(row, int(number)) for row, number in zip(scores, count, strict=True)])


def _of_the_layer_before(net: PaddleNet, arrays: Arrays, kept: Mapping[str, Any]) -> Any:
    held = {**kept, PAST: (*kept[PAST][-1:], *kept[PAST][:-1])} if kept else kept
    return _continued(net, arrays, held)


_most_probable, _continued = search.most_probable, PaddleNet.continued
MISDECODINGS = (
    Misdecoding("positions off by one with the cache", (_given(Cached, _one_further),), "greedy (with cache)",
                "the positions of new tokens are one too far", positions=True),
    Misdecoding("padding mask left out", (_given(Whole, _seeing_all), _given(Cached, _seeing_all)), "greedy",
                "the padding mask is left out"),
    Misdecoding("the end does not stop a text", ((search, "stops", lambda taken, strategy: np.zeros(
        taken.shape, bool)),), "greedy-ended", "a text goes on behind its end"),
    Misdecoding("top-p with a token too many", ((search, "most_probable", _with_one_more),), "top-p-few",
                "one token too many is drawn from (top-p)"),
    Misdecoding("top-k with a token too few", ((search, "best_of", lambda scores, count, right=search.best_of: right(
        scores, count - 1)),), "top-k-few", "one token too few is drawn from (top-k)"),
    Misdecoding("temperature multiplied", ((search, "warmed", lambda scores, temperature: scores * temperature),),
                "temperature", "logits are multiplied by the temperature instead of divided by it"),
    Misdecoding("the cache of another layer", ((PaddleNet, "continued", _of_the_layer_before),), "greedy (with cache)",
                "each layer is given what the layer before it keeps"),
    Misdecoding("the cache does not follow the beams", ((PaddleNet, "selected", lambda net, kept, rows: kept),),
                "beam (with cache)", "what is kept does not follow the beams that survive"),
    Misdecoding("length penalty left out", ((search, "normalised", lambda scores, length, penalty: scores),),
                "beam-ended", "scores are divided by the length to the power 0"),
)
