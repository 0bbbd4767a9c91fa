"""Wrong nets: what a loaded net of transformer blocks may be made to compute instead, called with (names, net)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import paddle
from paddle.nn import functional as F

from models.activation import activation
from models.attention import heads_first
from models.loss import cross_entropy

from .fault import NotPlanted
from .names import MID, Names, below

Break = Callable[[Names, Any], None]
Function = Callable[[Any], Any]
SEED = 20260707


# Tools --------------------------------------------------------------------------------------------------------------


def during(layer: Any, module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """While ``layer`` runs, ``module.name`` is what ``make`` of the original gives."""
    forward = layer.forward

    def changed(*arguments: Any, **named: Any) -> Any:
        with patch.object(module, name, make(getattr(module, name))):
            return forward(*arguments, **named)
    layer.forward = changed


def code_of(net: Any) -> Any:
    """The module of ``models/`` that the net's functions are looked up in."""
    return sys.modules[type(net).__module__]


def running(path: str, make: Callable[[Any], Callable[..., Any]]) -> Break:
    """Another forward, made of the layer at ``path``."""
    def break_net(names: Names, net: Any) -> None:
        layer = below(net, path)
        layer.forward = make(layer)
    return break_net


def setting(path: str, **values: Any) -> Break:
    """Plain attributes of the layer at ``path``."""
    def break_net(names: Names, net: Any) -> None:
        layer = below(net, path)
        for name, value in values.items():
            if not hasattr(layer, name):
                raise NotPlanted(f"{path} has no {name}")
            setattr(layer, name, value)
    return break_net


def giving(path: str, function: Function) -> Break:
    """``function`` of what the layer at ``path`` gives, of the first where it gives several."""
    def make(layer: Any) -> Callable[..., Any]:
        forward = layer.forward

        def changed(*arguments: Any, **named: Any) -> Any:
            output = forward(*arguments, **named)
            return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)
        return changed
    return running(path, make)


def left_out(path: str) -> Break:
    """A layer that gives back its input."""
    return running(path, lambda layer: lambda x: x)


# Attention ----------------------------------------------------------------------------------------------------------


def attending(layer: int, part: str = "attn", **variant: Any) -> Break:
    """Another attention in one block: :func:`attend` with parts exchanged."""
    def break_net(names: Names, net: Any) -> None:
        during(names.inside(net, part, layer), code_of(net), "attend", lambda original: partial(attend, **variant))
    return break_net


def attend(query: Any, key: Any, value: Any, mask: Any, dropout: Any, divisor: Any = None, *, bias: Any = 0.0,
           scale: Callable[[int], float] | None = None, softmax: Function = F.softmax,
           masked: Function = lambda mask: mask, temperature: float = 0.0) -> Any:
    """Attention with parts to exchange; ``temperature`` makes each head a little sharper than the one before it."""
    right = 1 / divisor if divisor else query.shape[-1]**-0.5
    scores = paddle.matmul(query, key, transpose_y=True) * (scale(query.shape[-1]) if scale else right)
    if temperature:
        scores = scores * (1 + temperature * paddle.arange(scores.shape[1], dtype="float32")).reshape([1, -1, 1, 1])
    weights = softmax(scores + bias + masked(mask))
    return heads_first(paddle.matmul(weights, value)).flatten(-2)


def softmax_in_bf16(scores: Any) -> Any:
    return F.softmax(scores, axis=-1).astype("bfloat16").astype("float32")


def softmax_over_queries(scores: Any) -> Any:
    return F.softmax(scores, axis=-2)


def heads(count: int, layer: int = MID, part: str = "attn") -> Break:
    """Another number of heads in one block."""
    def break_net(names: Names, net: Any) -> None:
        names.inside(net, part, layer).heads = count
    return break_net


def attention_twice(names: Names, net: Any) -> None:
    giving(names("attn", MID), lambda output: 2 * output)(names, net)


def half_precision_attention(names: Names, net: Any) -> None:
    """What leaves the attention of one block has been in float16."""
    giving(names("attn", MID), lambda output: output.astype("float16").astype("float32"))(names, net)


# Additive masks [batch or 1, 1, queries or 1, keys] -----------------------------------------------------------------


def masking(function: str, make: Function) -> Break:
    """``make`` of the additive mask that ``function`` of the net's module makes, for the whole net."""
    def break_net(names: Names, net: Any) -> None:
        during(names.backbone(net), code_of(net), function, lambda original: lambda *given: make(original(*given)))
    return break_net


def shallow(mask: Any) -> Any:
    """-10 instead of the lowest float, in the second row of the batch only, where the padding is."""
    row = paddle.maximum(mask[1:2], paddle.to_tensor(-10.0))
    return paddle.concat([mask[:1], row, mask[2:]])


def inverted(mask: Any) -> Any:
    """What may be seen is hidden, and the other way round."""
    return paddle.where(mask == 0, paddle.full_like(mask, paddle.finfo(mask.dtype).min), paddle.zeros_like(mask))


def causal_only(mask: Any) -> Any:
    """The causal mask, as if there were no padding."""
    return mask[:1].expand(mask.shape)


def padding_only(mask: Any) -> Any:
    """For every query what the last one may see, which only padding bounds."""
    return mask[:, :, -1:].expand(mask.shape)


def see_one_ahead(mask: Any) -> Any:
    """Each query also sees the next token, padding excepted."""
    return paddle.concat([mask[:, :, 1:], mask[:, :, -1:]], axis=2)


# Activation and norms -----------------------------------------------------------------------------------------------


def acting(layer: int, function: Function | str) -> Break:
    """Another activation in one block."""
    def break_net(names: Names, net: Any) -> None:
        path, _, name = f"{names.at(layer)}.{names.activation}".rpartition(".")
        if not hasattr(below(net, path), name):
            raise NotPlanted(f"{path} has no {name}")
        setattr(below(net, path), name, activation(function) if isinstance(function, str) else Layer(function))
    return break_net


class Layer(paddle.nn.Layer):
    """A function as a layer, in training and evaluation alike."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def epsilon(layer: int, part: str, value: float) -> Break:
    def break_net(names: Names, net: Any) -> None:
        norm = names.inside(net, part, layer)
        norm._epsilon, norm._shrink = value, 1.0
    return break_net


def unbiased_norm(names: Names, net: Any) -> None:
    """A layer norm that divides by n - 1."""
    norm = names.inside(net, "norm", MID)

    def forward(x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return centred / paddle.sqrt(variance + norm._epsilon) * norm.weight + norm.bias
    norm.forward = forward


# Blocks -------------------------------------------------------------------------------------------------------------


def dropout_left_on(path: str, share: float) -> Break:
    """In the block at MID, at ``path`` below it; nothing turns it off."""
    def break_net(names: Names, net: Any) -> None:
        paddle.seed(SEED)
        home, _, name = f"{names.at(MID)}.{path}".rpartition(".")
        if not isinstance(getattr(below(net, home), name, None), paddle.nn.Dropout):
            raise NotPlanted(f"{home}.{name} is no dropout")
        setattr(below(net, home), name, Layer(lambda x: F.dropout(x, share, training=True)))
    return break_net


def block_skipped(names: Names, net: Any) -> None:
    block = names.blocks(net)[MID]
    forward = block.forward

    def changed(hidden: Any, *rest: Any) -> Any:
        output = forward(hidden, *rest)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    block.forward = changed


def later_block_first(names: Names, net: Any) -> None:
    """Blocks 1 and 2 run in the other order, each with its own weights."""
    first, second, third = names.blocks(net)
    stack, name = names.stack(net), names.block.rpartition(".")[0].rpartition(".")[2]
    forward = stack.forward

    def changed(*arguments: Any, **named: Any) -> Any:
        with patch.dict(stack._sub_layers, {name: [first, third, second]}):
            return forward(*arguments, **named)
    stack.forward = changed


# Words and positions ------------------------------------------------------------------------------------------------


def scaled_words(names: Names, net: Any) -> None:
    """Words times the root of the width, as some architectures have it."""
    table = names.words.removesuffix(".weight")
    width = below(net, table).weight.shape[-1]
    giving(table, lambda words: words * math.sqrt(width))(names, net)


def at_positions(function: Callable[[Any, Any], Any]) -> Break:
    """``function(position ids, attention mask)`` instead of 0, 1, 2, …"""
    def break_net(names: Names, net: Any) -> None:
        model = names.backbone(net)
        forward = model.forward

        def changed(input_ids: Any, attention_mask: Any = None, **named: Any) -> Any:
            plain = paddle.arange(input_ids.shape[1]).unsqueeze(0).expand(input_ids.shape)
            return forward(input_ids, attention_mask=attention_mask, position_ids=function(plain, attention_mask),
                           **named)
        model.forward = changed
    return break_net


def last_is_next(positions: Any, mask: Any) -> Any:
    """The last position counted one too far."""
    step = (paddle.arange(positions.shape[1]) == positions.shape[1] - 1).astype(positions.dtype)
    return positions + step


def one_too_far(positions: Any, mask: Any) -> Any:
    return positions + 1


def counted_without_padding(positions: Any, mask: Any) -> Any:
    return paddle.clip(paddle.cumsum(mask, axis=1) - 1, min=0)


# Losses -------------------------------------------------------------------------------------------------------------


def mean_over_all(logits: Any, labels: Any) -> Any:
    """The loss as PaddlePaddle's own cross entropy divides it: by the positions without a label, too."""
    return cross_entropy(logits, labels) * (labels != -100).astype(logits.dtype).mean()
