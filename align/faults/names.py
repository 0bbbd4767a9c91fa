"""Where things are in a family's net: module paths on the Paddle side, and patterns of what may be named there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from convert.__main__ import family_named

from ..inputs import Inputs, seeded
from .fault import Changes

MID, LAST = 1, 2
"""The blocks that most faults are planted in, of the three that a demo has."""


@dataclass(frozen=True)
class Names:
    """``block`` has the place of the layer's number in it; ``parts`` are paths within a block, by what they are.

    ``words`` is the table's parameter, ``embedding`` the first recorded module. ``copies`` are tensors that a
    checkpoint holds twice, by the copy's name. ``unbiased`` are the parts without a bias, ``buffers`` ends of the names
    of tensors that are no weights. ``changes`` are entries of the demo's config that this net has otherwise.
    """

    family: str
    block: str
    parts: Mapping[str, str]
    words: str
    embedding: str
    activation: str
    copies: Mapping[str, str] = field(default_factory=dict)
    unbiased: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()
    heads: int = 4
    changes: Changes = ()

    def __call__(self, part: str, layer: int) -> str:
        return f"{self.at(layer)}.{self.parts[part]}"

    def at(self, layer: int) -> str:
        return self.block.format(layer)

    def weight(self, part: str, layer: int) -> str:
        return f"{self(part, layer)}.weight"

    def bias(self, part: str, layer: int) -> str:
        return f"{self(part, layer)}.bias"

    def parameters(self, part: str, layer: int) -> list[str]:
        """Its weight, and its bias where it has one."""
        return [self.weight(part, layer), *([] if part in self.unbiased else [self.bias(part, layer)])]

    def named(self, layer: int, *parts: str) -> tuple[str, ...]:
        """Patterns of these parts and of their parameters."""
        return tuple(f"{self(part, layer)}{end}" for part in parts for end in ("", ".*", ": *", " *"))

    def attention(self, layer: int) -> tuple[str, ...]:
        """Patterns of what happens between the projections."""
        block, attn = self.at(layer), self("attn", layer)
        return (f"{block}: attention*", attn, f"{attn} *", *(f"{attn}.{word}*" for word in (
            "scores", "scale", "softmax", "mask", "rotary", "weights", "context", "prob", "heads")))

    def acting(self, layer: int) -> tuple[str, ...]:
        """Patterns of the MLP's activation."""
        block = self.at(layer)
        return (f"{block}.{self.activation}", *(f"{block}{gap}activation*" for gap in (": ", ": mlp ", " ", ".mlp ")))

    def wiring(self, layer: int) -> tuple[str, ...]:
        """Patterns of the way from one part of a block to the next."""
        block = self.at(layer)
        return (block, *(f"{block}{gap}{word}*" for gap in (": ", " ") for word in (
            "input", "wiring", "residual", "output", "dropout", "order", "norm")))

    # The same in a net ------------------------------------------------------------------------------------------------

    def backbone(self, net: Any) -> Any:
        """The model below the head, or the head itself."""
        return getattr(net, self.block.partition(".")[0])

    def stack(self, net: Any) -> Any:
        """What runs the blocks one after another."""
        return below(net, self.block.rpartition(".")[0].rpartition(".")[0])

    def blocks(self, net: Any) -> Any:
        return below(net, self.block.rpartition(".")[0])

    def inside(self, net: Any, part: str, layer: int) -> Any:
        return below(net, self(part, layer))

    # Ids --------------------------------------------------------------------------------------------------------------

    def used_ids(self) -> list[int]:
        """Ids that some real token of the inputs has, most frequent first."""
        inputs = _inputs(self.family, self.changes)
        ids, counts = np.unique(inputs.arrays["input_ids"][inputs.mask], return_counts=True)
        return ids[np.argsort(-counts, kind="stable")].tolist()

    def unused_ids(self) -> list[int]:
        """Ids that occur nowhere in the inputs."""
        inputs = _inputs(self.family, self.changes)
        used = {word for name, array in inputs.arrays.items() if name.endswith("input_ids") for word in array.flat}
        return sorted(set(range(family_named(self.family).demo["vocab_size"])) - used)


def below(net: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        net = net[int(name)] if name.isdigit() else getattr(net, name)
    return net


@cache
def _inputs(family: str, changes: Changes) -> Inputs:
    described = family_named(family)
    config = {**described.demo, **dict(changes)}
    return seeded(config, described.sizes(config), kind=described.head(config["architectures"][0]).inputs)
