"""Embeddings not added, scaled, or of another token type."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from .. import surgery
from ..place import Place
from .variant import Idea, Variant


def token_types(place: Place) -> Iterator[Variant]:
    embeddings = {path.rpartition(".")[2]: (path, module) for path, module in place.modules(nn.Embedding)}
    if place.traits.relative:
        embeddings.pop(place.traits.relative.table, None)
    for name, (path, module) in embeddings.items():
        told = "is not added" if len(embeddings) > 1 else "is zero"
        kind = ("token-types" if "type" in name else
                "positions-missing" if "position" in place.paddle(path) else "embedding")
        yield Variant(kind, place.paddle(path), told,
                      surgery.weights({f"{path}.weight": torch.zeros_like(module.weight)}))
        factor = math.sqrt(module.weight.shape[1])
        yield Variant("embedding-scale", place.paddle(path), "is multiplied by the root of the hidden size",
                      surgery.weights({f"{path}.weight": module.weight * factor}))
        if "type" in name:
            for told, order in (("is read at type 0 throughout", [0, 0]),
                                ("is read at type 1 throughout", [1, 1]), ("has its two types exchanged", [1, 0])):
                if len(module.weight) > 1:
                    weight = module.weight.clone()
                    weight[:2] = module.weight[order]
                    yield Variant("token-types", place.paddle(path), told, surgery.weights({f"{path}.weight": weight}))


IDEAS = (
    Idea("token types or positions not added", token_types),
)
