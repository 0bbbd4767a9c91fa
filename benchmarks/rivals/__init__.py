"""What the claims are measured beside. Each runs as a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SEED = 7


def ids_of(vocab: int, rows: int, tokens: int) -> np.ndarray:
    """The same int64 ids [rows, tokens] for either framework."""
    import numpy as np
    return np.random.default_rng(SEED).integers(0, vocab, (rows, tokens))
