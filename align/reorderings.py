"""More of torch's functions with their sums in another order: what people's own nets use and the families do not.

Each takes ``order(size)``, which draws a permutation, and torch's function with its arguments. In exact arithmetic
nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

Order = Callable[[int], torch.Tensor]


def _convolution(order: Order, func: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any = None, stride: Any = 1,
                 padding: Any = 0, dilation: Any = 1, groups: int = 1) -> torch.Tensor:
    """Input channels of x [batch, in, ...], which may lack its batch, and weight [out, in, ...]."""
    if groups == 1:
        channels = order(weight.shape[1])
        x, weight = x.index_select(x.dim() - weight.dim() + 1, channels), weight[:, channels]
    return func(x, weight, bias, stride, padding, dilation, groups)


def _transposed(order: Order, func: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any = None, stride: Any = 1,
                padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> torch.Tensor:
    """Input channels of x [batch, in, ...], which may lack its batch, and weight [in, out, ...]."""
    if groups == 1:
        channels = order(weight.shape[0])
        x, weight = x.index_select(x.dim() - weight.dim() + 1, channels), weight[channels]
    return func(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _attention(order: Order, func: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any,
               **named: Any) -> torch.Tensor:
    """The width of the heads, [..., tokens, width], over which scores are summed."""
    width = order(query.shape[-1])
    return func(query[..., width], key[..., width], value, *rest, **named)


def _heads(order: Order, func: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, embed_dim: int,
           heads: int, in_proj_weight: torch.Tensor | None, *rest: Any, **named: Any) -> Any:
    """The features of query, key and value, [..., embed_dim], where one matrix projects all three."""
    if in_proj_weight is not None and not named.get("use_separate_proj_weight"):
        features = order(embed_dim)
        query, key, value = (one[..., features] for one in (query, key, value))
        in_proj_weight = in_proj_weight[:, features]
    return func(query, key, value, embed_dim, heads, in_proj_weight, *rest, **named)


def _recurrent(gates: int) -> Callable[..., Any]:
    """Input features and hidden units of a net whose matrices [gates * hidden, in] and [gates * hidden, hidden] are
    given layer by layer, direction by direction; states are [layers * directions, batch, hidden].
    """
    def run(order: Order, func: Any, x: torch.Tensor, states: Any, weights: Sequence[torch.Tensor], *rest: Any) -> Any:
        if not isinstance(weights, (list, tuple)) or not rest or not isinstance(rest[0], bool):
            return func(x, states, weights, *rest)  # packed sequences come in another order of arguments
        biases, layers, _, _, both = rest[0], rest[1], rest[2], rest[3], rest[4]
        per, directions = 4 if biases else 2, 2 if both else 1
        hidden = weights[1].shape[1]
        held = states if isinstance(states, (list, tuple)) else [states]
        if len(weights) != per * layers * directions or any(state.shape[-1] != hidden for state in held):
            return func(x, states, weights, *rest)  # with a projection of the hidden state
        entering = order(x.shape[-1])
        x, units, moved = x[..., entering], [], []
        for layer in range(layers):
            mine = [order(hidden) for _ in range(directions)]
            for direction, unit in enumerate(mine):
                first = per * (layer * directions + direction)
                rows = torch.cat([unit + gate * hidden for gate in range(gates)])
                moved += [weights[first][rows][:, entering], weights[first + 1][rows][:, unit],
                          *(bias[rows] for bias in weights[first + 2: first + per])]
            entering = torch.cat([unit + hidden * direction for direction, unit in enumerate(mine)])
            units += mine
        turned = [torch.stack([part[..., unit] for part, unit in zip(state, units, strict=True)]) for state in held]
        answer, *last = func(x, turned if isinstance(states, (list, tuple)) else turned[0], moved, *rest)
        back = [torch.argsort(unit) for unit in units]
        return (answer[..., torch.argsort(entering)],
                *(torch.stack([part[..., unit] for part, unit in zip(state, back, strict=True)]) for state in last))
    return run


REORDERED: dict[Any, Callable[..., Any]] = {
    F.conv1d: _convolution, F.conv3d: _convolution,
    F.conv_transpose1d: _transposed, F.conv_transpose2d: _transposed, F.conv_transpose3d: _transposed,
    F.scaled_dot_product_attention: _attention, F.multi_head_attention_forward: _heads,
    torch.lstm: _recurrent(4), torch.gru: _recurrent(3), torch.rnn_tanh: _recurrent(1), torch.rnn_relu: _recurrent(1),
}
