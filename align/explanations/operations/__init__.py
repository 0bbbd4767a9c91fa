"""The catalogue: what a net may compute instead of what the reference computes.

An idea yields variants of the reference at one place. A variant is tried as it is; a dial has one number that is
solved for. Ideas look for modules by their class, by the usual spellings, and by what the family says of its nets
(``convert/traits.py``), so that they hold for families that nobody has thought of here.
"""

from __future__ import annotations

from . import (
    activations,
    alibi,
    branches,
    convolutions,
    embeddings,
    heads,
    masks,
    norms,
    parameters,
    pooling,
    positions,
    rotary,
    scores,
    wiring,
)

MODULES = (parameters, activations, norms, wiring, scores, masks, heads, alibi, rotary, positions, embeddings, pooling,
           branches, convolutions)
"""Of two ideas that fit equally well the earlier one is told."""

CATALOGUE = tuple(idea for module in MODULES for idea in module.IDEAS)
