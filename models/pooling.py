"""Which token of each row a classifier reads."""

from __future__ import annotations

import paddle
from paddle import Tensor


def last_token(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Per row the index [batch] of the rightmost token that is no pad, wherever the padding is."""
    batch, length = input_ids.shape
    if pad_token_id is None and batch > 1:
        raise ValueError(f"a batch of {batch} needs pad_token_id in the config, to tell where each row ends.")
    if pad_token_id is None:
        return paddle.full([1], length - 1, dtype="int64")
    return (paddle.arange(length) * (input_ids != pad_token_id).astype("int64")).max(axis=-1)
