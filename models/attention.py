"""Scaled dot-product attention over heads, in the order of operations of transformers' eager attention."""

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
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: Callable[[Tensor], Tensor]
) -> Tensor:
    """softmax(query key^T / sqrt(width) + mask) value (Vaswani et al. 2017, eq. 1).

    query [batch, heads, queries, width], key and value [batch, heads, keys, width], mask additive and
    broadcast to [batch, heads, queries, keys]. Returns [batch, queries, heads * width].
    """
    scores = paddle.matmul(query, key, transpose_y=True) / math.sqrt(query.shape[-1])
    weights = F.softmax(scores if mask is None else scores + mask, axis=-1)
    return heads_first(paddle.matmul(dropout(weights), value)).flatten(-2)
