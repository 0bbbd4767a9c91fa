"""Another token of a row read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import surgery
from ..place import Place
from .variant import Idea, Variant


def poolings(place: Place) -> Iterator[Variant]:
    """What a module that reads one token of a row reads instead."""
    pooler = type(place.root).__name__.endswith("Pooler")
    head = place.whole and place.start is None and place.run().ndim == 2 and len(place.run()) == len(place.mask)
    if not pooler and not head:
        return
    paths = [""] if pooler else [linear.path for linear in place.linears]
    right = "the first position" if pooler else "the last token"
    tokens = torch.from_numpy(place.mask)
    last = (torch.arange(tokens.shape[1]) * tokens).argmax(1)
    weights = tokens[..., None] / tokens.sum(1)[:, None, None]
    for told, function in (
            ("the last position", lambda x: x[:, -1:]), ("the first position", lambda x: x[:, :1]),
            ("the last token that is no padding", lambda x: x[torch.arange(len(x)), last][:, None]),
            ("the first token that is no padding", lambda x: x[torch.arange(len(x)), tokens.int().argmax(1)][:, None]),
            ("as many tokens on as there are", lambda x: x[torch.arange(len(x)), tokens.sum(1) - 1][:, None]),
            ("the mean of all positions", lambda x: x.mean(1, keepdim=True)),
            ("the mean of the tokens", lambda x: (x * weights.to(x.dtype)).sum(1, keepdim=True))):
        def read(x: Any, function: Callable[[Any], Any] = function) -> Any:
            return function(x).expand_as(x) if x.dim() == 3 else x
        for path in paths:
            yield Variant("pooling", place.name, f"reads {told} instead of {right}", surgery.first_input(path, read))


IDEAS = (
    Idea("another token pooled", poolings),
)
