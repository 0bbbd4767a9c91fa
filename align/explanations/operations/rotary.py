"""Rotary positions (Su et al. 2021): another style, direction, dimension, base; one side only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from convert.traits import Rotary

from .. import surgery
from ..place import Place
from ..surgery import Change, together
from .attention import Attention, attentions
from .variant import Dial, Idea, Variant

FREQUENCIES = "inv_freq"


def rotations(place: Place) -> Iterator[Variant | Dial]:
    rotary = place.traits.rotary
    for attention in attentions(place) if rotary else ():
        if rotary.turn not in surgery.globals_of(attention.module):
            continue
        subject = f"{attention.name} rotary"

        def patched(make: Callable[[Any], Any], attention: str = attention.path) -> Change:
            return surgery.function_of(attention, rotary.turn, make)
        if hasattr(attention.module, rotary.table):
            yield Variant("rotary-style", subject, "turns the halves of a head against each other, not neighbours",
                          patched(lambda old: _halves))
            yield Variant("rotary-style", subject, "pairs neighbours, with the angles of halves",
                          patched(lambda old: lambda x, sin, cos: old(x, *_regrouped(sin, cos))))
        yield Variant("rotary-direction", subject, "turns the other way round",
                      patched(lambda old: lambda x, sin, cos: old(x, -sin, cos)))
        yield Variant("rotary-missing", subject, "is missing", patched(lambda old: lambda x, sin, cos: x))
        for which, number in (("keys", 0), ("queries", 1)):
            yield Variant("rotary-missing", subject, f"leaves the {which} as they are",
                          patched(lambda old, number=number: _on_call(old, number, lambda x, sin, cos: x)))
            for offset in (1, -1):
                for told, move in (("", _turned), (" (the last one goes to the other end)", _rolled)):
                    yield Variant("position-offset", subject,
                                  f"places the {which} {offset:+d} position away from the others{told}",
                                  patched(lambda old, number=number, offset=offset, move=move: _on_call(
                                      old, number, lambda x, sin, cos: old(x, *move(sin, cos, offset)))))
        yield from _rotary_tables(rotary, attention, subject)


def frequencies(place: Place) -> Iterator[Variant | Dial]:
    """Other frequencies in modules that keep them as a buffer, all of those in this place alike."""
    held = {path: module.inv_freq for path, module in place.modules(nn.Module)
            if isinstance(module._buffers.get(FREQUENCIES), torch.Tensor)}
    if not held:
        return
    path, right = next(iter(held.items()))
    subject = f"{place.paddle(path)} rotary"

    def exact(base: float) -> Any:
        return 1.0 / base ** (torch.arange(0, 2 * len(right), 2).float() / (2 * len(right)))

    def changed(values: Any) -> Change:
        return together(*(surgery.attributes(path, {FREQUENCIES: values}) for path in held))
    kinds = {"unrounded": exact(10000.0), "rounded to float16": exact(10000.0).half().float(),
             "rounded to bfloat16": exact(10000.0).bfloat16().float()}
    known = next((kind for kind, values in kinds.items() if torch.equal(values, right)), "others")
    for kind, values in kinds.items():
        if kind != known:
            told = f"has its frequencies {kind}; in the reference they are {known}"
            yield Variant("rotary-frequencies", subject, told, changed(values), len(held))
    yield Dial("rotary-base", subject, lambda base: f"has base {base:.6g} instead of 10000",
               lambda base: changed(exact(base).to(torch.float16).float()), (500.0, 1e3, 5e3, 2e4, 1e5, 1e6), len(held))


def _rotary_tables(rotary: Rotary, attention: Attention, subject: str) -> Iterator[Variant | Dial]:
    table, head = getattr(attention.module, rotary.table, None), attention.width
    turned = getattr(attention.module, rotary.width, None) or head
    if table is None or head is None or table.shape[1] != turned:
        return

    def tables(dims: int, base: float = 10000.0, over: int | None = None) -> Change:
        return surgery.attributes(attention.path, {
            rotary.width: dims, rotary.table: _table(len(table), dims, base, over)})
    for dims in range(2, head + 1, 2):
        if dims != turned:
            yield Variant("rotary-dimension", subject, f"turns {dims} channels of each head instead of {turned}",
                          tables(dims))
            yield Variant("rotary-dimension", subject, f"turns {dims} channels of each head instead of {turned}, "
                          f"with frequencies for {turned}", tables(dims, over=turned))
    for over in sorted({head, head * attention.heads, turned // 2} - {turned, 0}):
        yield Variant("rotary-frequencies", subject,
                      f"spreads its frequencies over {over} channels instead of {turned}", tables(turned, over=over))
    yield Dial("rotary-base", subject, lambda base: f"has base {base:.6g} instead of 10000",
               lambda base: tables(turned, base), (500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 1e5, 5e5, 1e6))


def turned_channels(place: Place, attention: Attention) -> int:
    """How many channels of each head turn, as far as the attention says so; 0 where it does not."""
    rotary = place.traits.rotary
    return getattr(attention.module, rotary.width, None) or 0 if rotary else 0


def _halves(x: Any, sin: Any, cos: Any) -> Any:
    """x [batch, time, heads, width], sin and cos [batch, time, width / 2]: channel i is turned with i + width / 2."""
    sin, cos = (torch.cat([table, table], -1)[:, :, None, :] for table in (sin, cos))
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


def _regrouped(sin: Any, cos: Any) -> tuple[Any, Any]:
    half = sin.shape[-1] // 2
    order = [number for pair in range(half) for number in (pair, pair + half)] + list(range(2 * half, sin.shape[-1]))
    return sin[..., order], cos[..., order]


def _turned(sin: Any, cos: Any, offset: int) -> tuple[Any, Any]:
    """The tables of positions ``offset`` further on."""
    s, c = offset * sin[:, 1:2], cos[:, 1:2]
    return sin * c + cos * s, cos * c - sin * s


def _rolled(sin: Any, cos: Any, offset: int) -> tuple[Any, Any]:
    return sin.roll(-offset, 1), cos.roll(-offset, 1)


def _on_call(old: Callable[..., Any], number: int, other: Callable[..., Any]) -> Callable[..., Any]:
    """``other`` on every second call: keys are turned first, then queries."""
    calls = itertools.count()
    return lambda *arguments: (other if next(calls) % 2 == number else old)(*arguments)


def _table(rows: int, dims: int, base: float, over: int | None) -> Any:
    frequencies = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.int64) / (over or dims)))
    angles = torch.outer(torch.arange(rows, dtype=torch.int64).float(), frequencies).float()
    return torch.cat((angles.sin(), angles.cos()), dim=1)


IDEAS = (
    Idea("rotary style, direction, dimension, base, one side only", rotations),
    Idea("other rotary frequencies", frequencies),
)
