"""Which modules of a place are attentions: by the spellings below, and by what the family says is fused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...parts import whole
from .. import surgery
from ..place import Layer, Place
from ..surgery import Change

QUERY, KEY, VALUE = {"q_proj", "query", "q"}, {"k_proj", "key", "k"}, {"v_proj", "value", "v"}
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "head_width", "d_head", "d_k", "key_value_proj_dim")


@dataclass(frozen=True)
class Attention:
    """Query, key and value of one attention, or the one linear of all three, and the module of torch's they are in."""

    path: str
    name: str
    module: Any
    parts: tuple[Layer, ...]

    @property
    def fused(self) -> bool:
        return len(self.parts) == 1

    @property
    def channels(self) -> int:
        """Of the queries, in all heads."""
        return sum(len(part["weight"]) for part in self.parts) // 3

    @property
    def heads(self) -> int | None:
        found = (getattr(self.module, name, None) for name in HEADS)
        return next((number for number in found if type(number) is int and number > 0), None)

    @property
    def width(self) -> int | None:
        return self.channels // self.heads if self.heads else None

    def with_heads(self, other: int) -> Change:
        """``other`` heads on the same weights, and what the module keeps of their width."""
        width = self.channels // other
        values: dict[str, Any] = {name: other for name in HEADS if hasattr(self.module, name)}
        values |= {name: width for name in HEAD_WIDTHS if hasattr(self.module, name)}
        for power in (0.5, -0.5):
            values |= {name: torch.tensor(width**power) if isinstance(held, torch.Tensor) else width**power
                       for name, held in {**vars(self.module), **self.module._buffers}.items()
                       if _is_number(held) and math.isclose(float(held), self.width**power, rel_tol=1e-6)
                       and name not in values}
        return surgery.attributes(self.path, values)


def attentions(place: Place) -> list[Attention]:
    """Every attention of this place whose projections go by the usual names in Paddle."""
    found: dict[str, dict[int, Layer]] = {}
    for linear in place.linears:
        name, _, word = linear.name.rpartition(".")
        for number, spellings in enumerate((QUERY, KEY, VALUE)):
            if word in spellings:
                found.setdefault(name, {})[number] = linear
    parted, fused = [], place.traits.fused
    for name, parts in found.items():
        path = ".".join(_common([whole(part.path).split(".")[:-1] for part in parts.values()]))
        if len(parts) == 3:
            parted.append(Attention(path, name, place.root.get_submodule(path), (parts[0], parts[1], parts[2])))
    return parted + [
        Attention(path, linear.name.rpartition(".")[0], place.root.get_submodule(path), (linear,))
        for linear in place.linears for path, _, word in [linear.path.rpartition(".")] if fused and word == fused]


def is_attention_output(place: Place, linear: Layer) -> bool:
    """Whether the attention of this place ends in ``linear``, as the family says, or as it is usually called."""
    return (place.operations.get(linear.name, "").startswith("attention") or linear.path.endswith("out_proj")
            or linear.name.endswith(".out_proj"))


def _common(paths: Iterable[list[str]]) -> list[str]:
    """What all of them begin with."""
    return [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))]


def _is_number(held: Any) -> bool:
    return isinstance(held, float) or (isinstance(held, torch.Tensor) and held.dim() == 0 and held.is_floating_point())
