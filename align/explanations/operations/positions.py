"""Positions counted otherwise, or their distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import surgery
from ..place import Place
from .variant import Idea, Variant


def positions(place: Place) -> Iterator[Variant]:
    """Of a module that is given positions, or of the whole model up to its first module."""
    if (place.whole and place.start is None) or not surgery.has_argument(place.root, "position_ids"):
        return
    rows, length = place.mask.shape
    if _most_positions(place) is None:
        return
    limit, given = _most_positions(place), place.argument("position_ids")
    numbered = torch.arange(length).expand(rows, length)
    count = numbered if given is None else given.expand(rows, length)
    tokens = torch.from_numpy(place.mask).long()
    subject = f"{place.name} positions"
    last = torch.zeros_like(count)
    last[:, -1] = 1
    last_token = torch.zeros_like(count)
    last_token[torch.arange(rows), (count * tokens).argmax(1)] = 1
    counted = (tokens.cumsum(1) - 1).clamp(min=0)

    least = -getattr(place.root, "offset", 0)  # rows of the table before the first position's

    def wrapped(ids: Any) -> Any:
        return torch.where((ids < least) | (ids >= limit), ids % limit, ids)

    def held(ids: Any) -> Any:
        return ids.clamp(least, limit - 1)
    choices = [(f"are all off by {offset:+d}{told}", fit(count + offset))
               for offset in (1, -1, 2, -2) for told, fit in ((", and held at the last one", held), ("", wrapped))]
    choices += [(f"are off by {offset:+d} at the last token{told}", fit(count + offset * where))
                for offset in (1, -1) for told, where in ((" of each row", last), (" that is no padding", last_token))
                for fit in (wrapped, held)]
    if not torch.equal(count, numbered):
        choices.append(("are counted over padding too", numbered))
    choices += [("are counted from the first token that is no padding", counted),
                ("are counted over the tokens that are no padding, and 1 on padding",
                 torch.where(tokens == 1, counted, 1))]
    if place.modules(nn.Embedding):  # rotated heads see differences only: these two are no rotation, and the other way
        choices += [("are counted from the end", length - 1 - count), ("are all 0", torch.zeros_like(count))]
    choices += [(f"are counted RoBERTa's way, from {start} on", wrapped(tokens.cumsum(1) * tokens + start - 1))
                for start in (1, 2)]
    for told, ids in choices:
        moved = int((ids != count).any(0).sum())
        yield Variant("position-offset", subject, told,
                      surgery.argument("position_ids", lambda given, ids=ids: ids), moved)


def relative_positions(place: Place) -> Iterator[Variant]:
    """A learned number for each head and range of distances between query and key (Raffel et al. 2020)."""
    names = place.traits.relative
    for path, attention in place.modules(nn.Module) if names else ():
        if not getattr(attention, names.held, False):
            continue
        subject = f"{place.paddle(path)} relative positions"
        farthest, buckets, one_way = (getattr(attention, name) for name in (
            names.farthest, names.buckets, names.one_way))
        told = ("tell keys before and behind the query apart, as an encoder's" if one_way else
                "are one for all keys behind the query, as a decoder's")
        yield Variant("relative-positions", subject, told, surgery.attributes(path, {names.one_way: not one_way}))
        for other in sorted({32, 64, 128, 256, farthest // 2, 2 * farthest} - {farthest}):
            yield Variant("relative-positions", subject, f"end at a distance of {other} instead of {farthest}",
                          surgery.attributes(path, {names.farthest: other}))
        for other in sorted({number for number in (8, 16, 32, buckets // 2) if 4 <= number < buckets}):
            yield Variant("relative-positions", subject, f"are put into {other} buckets instead of {buckets}",
                          surgery.attributes(path, {names.buckets: other}))
        table = f"{path}.{names.table}"
        yield Variant("relative-positions", subject, "are not added",
                      surgery.weights({f"{table}.weight": torch.zeros_like(getattr(attention, names.table).weight)}))
        yield Variant("relative-positions", subject, "are of query minus key instead of key minus query",
                      surgery.output(table, lambda x: x.transpose(0, 1)))


def _most_positions(place: Place) -> int | None:
    """None where positions are not numbered from 0 to a limit."""
    tables = [len(module.weight) for path, module in place.modules(nn.Embedding) if "position" in place.paddle(path)]
    config = getattr(place.model, "config", None)
    return min(tables, default=getattr(config, "max_position_embeddings", None))


IDEAS = (
    Idea("positions off by one, counted otherwise", positions),
    Idea("relative positions of other distances, other ranges, one direction", relative_positions),
)
