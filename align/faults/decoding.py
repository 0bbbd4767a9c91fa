"""Faults of decoding to plant: what goes wrong between a right net and its text, whatever the family.

Each is planted in the candidate's side alone, while it continues texts; no other stage has such a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from .. import generate
from ..decoding import search
from ..decoding.feeding import PLACES, Cached, Whole
from ..paddle_net import PAST, PaddleNet
from .fault import Fault, NotPlanted, Plant

Arrays = dict[str, np.ndarray]
Patch = tuple[object, str, Any]


def _planted(*patches: Patch) -> Plant:
    """What is exchanged while the candidate's texts are continued; :class:`NotPlanted` where none was."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        right, done = generate.go_on, []

        def wrong(*given: Any) -> None:
            with ExitStack() as stack:
                for owner, name, value in patches:
                    stack.enter_context(patch.object(owner, name, value))
                right(*given)
            done.append(given)
        with patch.object(generate, "go_on", wrong):
            yield
        if not done:
            raise NotPlanted("no text of the candidate's was continued")
    return plant


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


def _fault(kind: str, shown: str, says: str, *patches: Patch) -> Fault:
    """``shown`` is the case that first shows it in the demo, ``says`` what the explanation has to say."""
    strategy = next(name for name in generate.STRATEGIES if shown.startswith(name))
    return Fault(kind, "gptj", "decoding", "code", _planted(*patches), shown, frozenset({f"{strategy}*"}),
                 frozenset({"decoding"}), stage="generate", flags=("--tokens", "16", "--strategy", strategy), says=says)


FAULTS = (
    _fault("positions off by one with the cache", "greedy (with cache)", "the positions of new tokens are one too far",
           _given(Cached, _one_further)),
    _fault("padding mask left out", "greedy", "the padding mask is left out", _given(Whole, _seeing_all),
           _given(Cached, _seeing_all)),
    _fault("the end does not stop a text", "greedy", "a text goes on behind its end",
           (search, "stops", lambda taken, strategy: np.zeros(taken.shape, bool))),
    _fault("top-p with a token too many", "top-p-few", "one token too many is drawn from (top-p)",
           (search, "most_probable", _with_one_more)),
    _fault("top-k with a token too few", "top-k", "one token too few is drawn from (top-k)",
           (search, "best_of", lambda scores, count, right=search.best_of: right(scores, count - 1))),
    _fault("temperature multiplied", "temperature", "logits are multiplied by the temperature instead of divided by it",
           (search, "warmed", lambda scores, temperature: scores * temperature)),
    _fault("the cache of another layer", "greedy (with cache)", "each layer is given what the layer before it keeps",
           (PaddleNet, "continued", _of_the_layer_before)),
    _fault("the cache does not follow the beams", "beam (with cache)",
           "what is kept does not follow the beams that survive",
           (PaddleNet, "selected", lambda net, kept, rows: kept)),
    _fault("length penalty left out", "beam-ended", "scores are divided by the length to the power 0",
           (search, "normalised", lambda scores, length, penalty: scores)),
)
