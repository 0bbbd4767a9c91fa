"""Another number of heads, or heads laid out otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .. import surgery
from ..place import Place
from ..surgery import together
from .alibi import alibi_of
from .attention import Attention, attentions, is_attention_output
from .rotary import turned_channels
from .variant import Idea, Variant


def head_counts(place: Place) -> Iterator[Variant]:
    for attention in attentions(place):
        heads, width = attention.heads, attention.width
        if heads is None:
            continue
        total = heads * width
        for other in (number for number in range(1, total + 1) if total % number == 0 and number != heads):
            if total // other < turned_channels(place, attention):
                continue
            subject = f"{attention.name} heads"
            change = together(attention.with_heads(other), alibi_of(place, other))
            yield Variant("head-count", subject, f"are {other} instead of {heads}", change)
            factor = math.sqrt(total / other / width)
            kept = surgery.scores(query=lambda query, factor=factor: query * factor)
            yield Variant("head-count", subject, f"are {other} instead of {heads}, with the right scale",
                          together(change, kept))
        yield from _head_layouts(place, attention)


def _head_layouts(place: Place, attention: Attention) -> Iterator[Variant]:
    subject, heads, width = f"{attention.name} heads", attention.heads, attention.width

    def unmerged(x: Any) -> Any:
        return x.unflatten(-1, (heads, width)).transpose(1, 2).reshape(x.shape)
    for linear in place.linears:
        if is_attention_output(place, linear):
            yield Variant("head-layout", subject, "are put together without being moved back behind the tokens",
                          surgery.first_input(linear.path, unmerged))
            if attention.fused:
                continue
            strided = surgery.first_input(
                linear.path, lambda x: x.unflatten(-1, (heads, width)).transpose(-1, -2).flatten(-2))
            split = [surgery.output(part.path, lambda x: x.unflatten(-1, (width, heads)).transpose(-1, -2).flatten(-2))
                     for part in attention.parts]
            yield Variant("head-layout", subject, "take every n-th channel instead of neighbouring ones",
                          together(*split, strided))
            yield Variant("head-layout", subject, "are split by every n-th channel and put together by neighbours",
                          together(*split))


IDEAS = (
    Idea("another number of heads, heads laid out otherwise", head_counts),
)
