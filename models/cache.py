"""Keys and values of the tokens seen so far, which a decoder hands from one call to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import paddle
from paddle import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
"""Of one block, each [batch, heads, time, width]."""


def seen(past_key_values: Sequence[KeyValue] | None) -> int:
    """How many tokens came before."""
    return past_key_values[0][0].shape[2] if past_key_values else 0


def behind(past: KeyValue | None, key: Tensor, value: Tensor, axis: int = 2) -> KeyValue:
    """Keys and values of the past and then of these tokens; ``axis`` is that of time."""
    if past is None:
        return key, value
    return paddle.concat([past[0], key], axis), paddle.concat([past[1], value], axis)


def with_pasts(
    blocks: nn.LayerList, past_key_values: Sequence[KeyValue] | None
) -> Iterable[tuple[nn.Layer, KeyValue | None]]:
    """Each block and what it has seen."""
    return zip(blocks, past_key_values or [None] * len(blocks), strict=True)


def run_blocks(
    blocks: Iterable[tuple[nn.Layer, KeyValue | None]], hidden: Tensor, *inputs: Tensor, use_cache: bool
) -> tuple[Tensor, tuple[KeyValue, ...]]:
    """``hidden`` through one block after the other, and keys and values of each; of none unless ``use_cache``."""
    presents = []
    for block, past in blocks:
        hidden, present = block(hidden, *inputs, past)
        if use_cache:  # those of every block would else be kept until the pass ends
            presents.append(present)
    return hidden, tuple(presents)
