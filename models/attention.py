"""Scaled dot-product attention over heads and its mask, in the order of operations of transformers' eager attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, time, heads * width] -> [batch, time, heads, width]."""
    return x.reshape([*x.shape[:-1], heads, x.shape[-1] // heads])


def heads_first(x: Tensor) -> Tensor:
    """[batch, time, heads, width] -> [batch, heads, time, width]; its own inverse."""
    return x.transpose([0, 2, 1, 3])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: Callable[[Tensor], Tensor],
    divisor: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T / divisor + bias + mask) value (Vaswani et al. 2017, eq. 1), divisor None is sqrt(width).

    query [batch, heads, queries, width], key and value [batch, heads, keys, width], bias (of positions) and
    mask additive and broadcast to [batch, heads, queries, keys]. Returns [batch, queries, heads * width].
    """
    scores = paddle.matmul(query, key, transpose_y=True) / (divisor or math.sqrt(query.shape[-1]))
    scores = scores if bias is None else scores + bias
    weights = F.softmax(scores if mask is None else scores + mask, axis=-1)
    return heads_first(paddle.matmul(dropout(weights), value)).flatten(-2)


def causal_mask(attention_mask: Tensor | None, queries: int, keys: int, dtype: paddle.dtype) -> Tensor:
    """What transformers adds to the scores: 0 where a query may look, the lowest float elsewhere.

    [batch or 1, 1, queries, keys]. Causal and padding in one mask, so that no sum of two of them overflows. A
    row that may look nowhere comes out uniform, in torch too.
    """
    visible = paddle.tril(paddle.ones([1, 1, queries, keys], dtype="bool"), keys - queries)
    if attention_mask is not None:
        check_length(attention_mask, keys)
        visible = visible & (attention_mask != 0).unsqueeze([1, 2])
    lowest = paddle.full([1], paddle.finfo(dtype).min, dtype=dtype)
    return paddle.where(visible, paddle.zeros_like(lowest), lowest)


def check_length(attention_mask: Tensor, keys: int) -> None:
    if attention_mask.shape[-1] != keys:
        raise ValueError(f"attention_mask covers {attention_mask.shape[-1]} positions, past and input are {keys}.")


def padding_mask(attention_mask: Tensor | None, dtype: paddle.dtype) -> Tensor | None:
    """What transformers adds to the scores: 0 where the mask [batch, time] is 1, the lowest float where it is 0.

    [batch, 1, 1, time]. A row without any 1 comes out uniform, in torch too.
    """
    if attention_mask is None:
        return None
    return (1.0 - attention_mask.astype(dtype).unsqueeze([1, 2])) * paddle.finfo(dtype).min
