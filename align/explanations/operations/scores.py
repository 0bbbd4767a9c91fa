"""The attention's scores scaled otherwise, or another softmax of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from .. import surgery
from ..place import Place
from ..surgery import Change
from .attention import Attention, attentions
from .masks import MASKED
from .variant import Dial, Idea, Variant


def scales(place: Place) -> Iterator[Variant | Dial]:
    """Of all attentions of this place alike, and of each by itself where there are several."""
    found = [attention for attention in attentions(place) if attention.width]
    for attention in found[:1]:
        yield from _scales(place, attention, lambda value: surgery.scores(query=lambda query: query * value))
    for attention in found if len(found) > 1 else ():
        yield from _scales(place, attention, lambda value, path=attention.parts[0].path: surgery.output(
            path, lambda queries: queries * value))


def _scales(place: Place, attention: Attention, factor: Callable[[float], Change]) -> Iterator[Variant | Dial]:
    subject, width = f"{attention.name} scale", attention.width
    wrong = {"divides the scores by the root of the head width, which the reference does not": width**-0.5} if (
        not place.traits.scaled) else {
        "is missing: scores are not divided by the root of the head width": math.sqrt(width),
        "is 1 / head width instead of its root": 1 / math.sqrt(width),
        "is applied twice over, squared": width**-0.5,
        "multiplies where it should divide": float(width),
        "comes from the hidden width instead of the head's": math.sqrt(1 / attention.heads),
    }
    for told, value in wrong.items():
        yield Variant("attention-scale", subject, told, factor(value))
    yield Dial("attention-scale", subject, lambda value: f"is off by a factor of {value:.7g}", factor,
               (0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 10.0))


def softmaxes(place: Place) -> Iterator[Variant]:
    for attention in attentions(place)[:1]:
        subject = f"{attention.name} softmax"
        for told, function in (
                ("is missing", lambda old, x: torch.where(x < MASKED, 0, x)),
                ("runs over the queries instead of the keys", lambda old, x: x.softmax(-2)),
                ("runs over the heads instead of the keys", lambda old, x: x.softmax(1)),
                ("is rounded to bfloat16", lambda old, x: old(x).bfloat16().to(x.dtype)),
                ("is rounded to float16", lambda old, x: old(x).half().to(x.dtype)),
                ("is computed on scores rounded to bfloat16 and rounded to it",
                 lambda old, x: old(x.bfloat16().to(x.dtype)).bfloat16().to(x.dtype))):
            yield Variant("attention-softmax", subject, told, surgery.scores(softmax=function))


IDEAS = (
    Idea("another attention scale", scales),
    Idea("a softmax over the wrong axis, or in half precision", softmaxes),
)
