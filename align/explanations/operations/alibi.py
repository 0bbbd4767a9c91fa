"""Another bias of the scores by the distance of the keys (Press et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .. import surgery
from ..place import Place
from ..surgery import Change, together
from .attention import attentions
from .variant import Dial, Idea, Variant


def alibis(place: Place) -> Iterator[Variant | Dial]:
    """The bias [batch * heads, 1, keys] that a block adds to its scores: slope of the head times place of the key."""
    given = place.argument("alibi")
    if given is None or not place.traits.alibi or not attentions(place):
        return
    subject, tokens = f"{attentions(place)[0].name} alibi", torch.from_numpy(place.mask)
    heads, keys = given.shape[0] // len(tokens), tokens.shape[1]
    slopes = surgery.globals_of(place.root)[place.traits.alibi](torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    places = (tokens.long().cumsum(-1) - 1) * tokens

    def alibi(slope: Any) -> Change:
        made = slope.reshape(1, heads, 1, 1) * places.reshape(-1, 1, 1, keys)
        return surgery.argument("alibi", lambda given: made.reshape(given.shape).to(given.dtype))
    numbers = torch.arange(1, heads + 1)
    yield Variant("alibi-missing", subject, "is missing", surgery.argument("alibi", torch.zeros_like))
    yield Variant("alibi-positions", subject, "grows with the distance instead of falling", alibi(-slopes))
    for told, slope in (
            ("goes through the heads from the last to the first", slopes.flip(0)),
            ("has 2^(-8 i / heads) for every head i, no power of two", 2.0 ** (-8 * numbers / heads)),
            ("has one slope for all heads, the first", slopes[:1].expand(heads)),
            ("starts its slopes one head too early", slopes / slopes[0]),
            ("starts its slopes one head too late", slopes * slopes[0])):
        if not torch.allclose(slope, slopes):
            yield Variant("alibi-slopes", subject, told, alibi(slope))
    yield Dial("alibi-slopes", subject, lambda value: f"is multiplied by {value:.6g}",
               lambda value: surgery.argument("alibi", lambda given: given * value), (0.1, 0.5, 1.0, 2.0, 10.0))


def alibi_of(place: Place, heads: int) -> Change:
    """The bias for another number of heads, where a block is given one."""
    if place.whole or not place.traits.alibi or not surgery.has_argument(place.root, "alibi"):
        return together()
    build, tokens = surgery.globals_of(place.root)[place.traits.alibi], torch.from_numpy(place.mask).long()
    return surgery.argument("alibi", lambda given: build(tokens, heads, given.dtype))


IDEAS = (
    Idea("alibi missing, with other slopes", alibis),
)
