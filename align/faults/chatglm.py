"""Faults of ChatGLM-6B: places of two dimensions, a context that sees itself, residuals times alpha, fused q, k and v.

Its torch side is code that the demo checkpoint brings along, written by us from the papers' equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import paddle
from paddle.nn import functional as F

import models.chatglm
import models.heads
from models import activation
from models.loss import cross_entropy

from . import transformer
from .names import LAST, MID, Names
from .planting import code, config, invisible, weights
from .transformer import Faults
from .wrong_nets import (
    Break,
    Function,
    during,
    giving,
    left_out,
    mean_over_all,
    running,
    setting,
    softmax_in_bf16,
    softmax_over_queries,
)
from .wrong_weights import (
    SEED,
    bf16,
    change,
    heads_in_order,
    int8,
    low_rank,
    noise,
    of_both,
    of_part,
    several,
    transpose,
    typical_element,
)


class Net(Names):
    def acting(self, layer: int) -> tuple[str, ...]:
        """The activation is a function, which no module stands for."""
        return (f"{self.at(layer)}: activation*", f"{self.at(layer)}.mlp activation")


NAMES = Net("chatglm", "chatglm.transformer.layers.{}", dict(
    attn="attention", qkv="attention.query_key_value", out="attention.dense", up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h", norm="input_layernorm", norm2="post_attention_layernorm"),
    "chatglm.transformer.word_embeddings.weight", "chatglm.transformer.word_embeddings", "", heads=2)
UNTIED = replace(NAMES, changes=(("tie_word_embeddings", False),))
FINAL, HEAD = "chatglm.transformer.final_layernorm", ("lm_head", "lm_head.decoder_weight", "logits")


def wrong_weights(n: Names) -> Faults:
    middle, last, named = n.at(MID), n.at(LAST), n.named
    yield weights(n, "missed transpose of dense", transpose(n.weight("out", MID)), middle, named(MID, "out"),
                  "transposed")
    yield from transformer.wrong_layers(n)
    yield from transformer.wrong_norms(n)
    yield from transformer.norms_exchanged(n)
    yield from transformer.wrong_biases(n)
    yield from transformer.bias_element(n)
    yield from transformer.wrong_matrices(n)
    for part in ("qkv", "out"):
        yield weights(n, f"bias missing in {n.parts[part]}", change(n.bias(part, LAST), np.zeros_like), last,
                      named(LAST, part), "bias missing", also="zeros")
    for kind, part, function, explanation in (
            ("rounded to bf16", "qkv", bf16, "rounded to bf16"), ("quantised to int8", "up", int8, None),
            ("with noise of 1e-5", "qkv", noise(1e-5), None), ("with a low-rank perturbation", "out", low_rank(1e-3),
                                                              None)):
        yield weights(n, f"matrix {kind}", change(n.weight(part, LAST), function), last, named(LAST, part), explanation)
    yield weights(n, "final norm x 1.0005", change(f"{FINAL}.weight", lambda x: x * np.float32(1.0005)), FINAL,
                  (f"{FINAL}*",), also="scaled")
    yield from transformer.units_permuted(n, "up")
    yield from transformer.wrong_words(n)
    yield from transformer.unused_word(n)


def wrong_parts(n: Names) -> Faults:
    """Of the linear that is for q, k and v."""
    middle, named, fused = n.at(MID), n.named(MID, "qkv"), n("qkv", MID)
    yield from transformer.fused_orders(n)
    yield weights(n, "heads permuted in q only", of_both(fused, of_part(n, 0, lambda x: x[..., ::-1, :])), middle,
                  named, also="permuted")
    yield weights(n, "bias of the keys + 1", change(f"{fused}.bias", of_part(n, 1, lambda x: x + 1)), middle, named,
                  why="turned by the places, it is no constant of a row")
    yield weights(n, "element of the keys changed by 1 %", change(f"{fused}.weight", of_part(n, 1, typical_element(
        lambda x: x * 1.01))), middle, named)
    yield invisible(n, "q x 2 with k / 2", of_both(fused, lambda x: of_part(n, 1, lambda k: k / 2)(of_part(
        n, 0, lambda q: q * 2)(x))), named, "only their product enters the scores", also="scaled")
    yield invisible(n, "heads permuted everywhere", several(
        of_both(fused, heads_in_order(n, 1, 0)), change(n.weight("out", MID), lambda x: x.reshape(
            n.heads, -1, x.shape[1])[::-1].reshape(x.shape))), n.named(MID, "qkv", "out"),
        "heads are summed, in any order", also="permuted")


def wrong_attention(n: Names) -> Faults:
    middle = n.at(MID)
    for kind, variant, explanation, also in (
            ("scale off by 1e-4", dict(scale=lambda width: 1.0001 * width**-0.5), "scale", None),
            ("scale missing", dict(scale=lambda width: 1.0), "scale", None),
            ("scale 1 / width", dict(scale=lambda width: 1 / width), "scale", None),
            ("scores of the layer not multiplied back", dict(multiplied=False), "scale", None),
            ("softmax in bf16", dict(softmax=softmax_in_bf16), None, "softmax"),
            ("softmax over the queries", dict(softmax=softmax_over_queries), "softmax", None),
            ("a temperature for each head", dict(temperature=0.01), None, None),
            ("mask missing", dict(hiding=paddle.zeros_like), "no mask", None),
            ("mask inverted", dict(hiding=lambda masked: ~masked), "mask polarity", None),
            ("context causal", dict(hiding=causal), "causal after all", None),
            ("answer sees itself", dict(hiding=as_the_last_query), "causal", None),
            ("padding seen", dict(hiding=lambda masked: masked & ~as_the_last_query(masked)), "padding", None),
            ("answer sees one ahead", dict(hiding=see_one_ahead), "causal offset", None),
            ("mask of -5", dict(hidden=-5.0), None, "mask value")):
        yield code(n, kind, attending(**variant), middle, n.attention(MID), explanation, also=also)
    yield code(n, "q, k and v cut as wholes", running(n("attn", MID), cut_as_wholes), middle,
               (*n.attention(MID), *n.named(MID, "qkv")), "swapped")


def wrong_places(n: Names) -> Faults:
    first, middle, everywhere, attention = n.at(0), n.at(MID), n.attention(0), n.attention(MID)
    yield code(n, "frequencies unrounded", with_frequencies(lambda exact: exact), first, everywhere,
               "rotary frequencies")
    yield code(n, "base 1000", with_frequencies(lambda exact: (exact**0.75).astype("float16").astype("float32")), first,
               everywhere, "rotary base")
    yield code(n, "second place ignored", with_rotary(lambda first, second: [first, first]), first, everywhere)
    yield code(n, "places exchanged", with_rotary(lambda first, second: [second, first]), first, everywhere)
    yield code(n, "neighbours turned", turning(lambda original: in_neighbours), middle, attention)
    yield code(n, "turned backwards", turning(lambda original: lambda x, rotary: original(x, [
        (cos, -sin) for cos, sin in rotary])), middle, attention, also="rotary direction")
    yield code(n, "keys not turned", turning(queries_only), middle, attention, also="rotary missing")
    yield code(n, "nothing turned", turning(lambda original: lambda x, rotary: x), middle, attention,
               also="rotary missing")
    yield code(n, "last place off by one", at_places(last_is_next), first, everywhere, also="position")
    yield code(n, "answer counted from 0", at_places(counted_from_0), first, everywhere, also="position")
    yield code(n, "answer goes on counting", at_places(going_on), first, everywhere, also="position")


def wrong_code(n: Names) -> Faults:
    middle, wiring = n.at(MID), n.wiring(MID)
    for kind, function in (("gelu with erf", activation.gelu), ("quick gelu", activation.quick_gelu), ("relu", F.relu),
                           ("activations clipped at 3", lambda x: paddle.clip(activation.gelu_tanh(x), max=3.0))):
        yield code(n, kind, acting(MID, function), middle, n.acting(MID), also="activation")
    yield code(n, "gelu with erf in the last block", acting(LAST, activation.gelu), n.at(LAST), n.acting(LAST),
               also="activation")
    yield from transformer.wrong_epsilons(n)
    yield from transformer.norm_of_n_minus_1(n)
    yield code(n, "norm missing", left_out(n("norm2", MID)), middle, n.named(MID, "norm2"), "norm missing")
    yield code(n, "final norm missing", left_out(FINAL), FINAL, (f"{FINAL}*",), "norm missing")
    for layers in (1, 28):
        yield code(n, f"alpha of {layers} layer{'s' * (layers > 1)}", setting(middle, alpha=math.sqrt(2 * layers)),
                   middle, wiring, "residual scale")
    yield code(n, "alpha missing", setting(middle, alpha=1.0), middle, wiring, "residual scale")
    yield code(n, "alpha around the attention only", running(middle, alpha_once), middle, wiring)
    yield code(n, "residuals of what enters the norms", running(middle, around_the_norms), middle, wiring)
    yield code(n, "residual missing", running(middle, without_residual), middle, wiring)
    yield from transformer.wrong_wiring(n)
    yield code(n, "head is random", random_head, "logits", HEAD, also="untied")
    yield code(n, "logits scaled", giving("lm_head", lambda logits: logits / 8), "logits", HEAD, "logits scale")


def wrong_config(n: Names) -> Faults:
    first, norms = n.at(0), (*n.named(0, "norm", "norm2"), f"{n.at(0)} layer norms")
    for value in ("1e-6", "1e-3"):
        yield config(n, f"epsilon {value} of the config", first, norms, "epsilon", layernorm_epsilon=float(value))
    yield config(n, "heads of the config halved", first, n.attention(0), num_attention_heads=1)
    yield config(n, "heads of the config doubled", first, n.attention(0), num_attention_heads=4)


def wrong_loss(n: Names) -> Faults:
    yield code(n, "labels not shifted", with_loss(cross_entropy), "loss.plain", ("loss.*",), "loss", stage="loss")
    yield code(n, "loss divided by all positions", with_loss(lambda logits, labels: mean_over_all(
        logits[:, :-1], labels[:, 1:])), "loss.plain", ("loss.*",), "loss", stage="loss")


def wrong_when_untied(n: Names) -> Faults:
    yield weights(n, "head with noise", change("lm_head.decoder_weight", noise(1e-3)), "logits", HEAD)
    yield code(n, "head tied to the words", tied_head, "logits", HEAD, "untied")


# Wrong nets ---------------------------------------------------------------------------------------------------------


def attending(**variant: Any) -> Break:
    """Another attention in one block: :func:`attend` with parts exchanged."""
    def break_net(names: Names, net: Any) -> None:
        during(names.inside(net, "attn", MID), models.chatglm, "attend", lambda original: partial(attend, **variant))
    return break_net


def attend(query: Any, key: Any, value: Any, masked: Any, depth: float, *,
           scale: Callable[[int], float] = lambda width: width**-0.5, multiplied: bool = True,
           softmax: Function = F.softmax, hiding: Function = lambda masked: masked, hidden: float = -10000.0,
           temperature: float = 0.0) -> Any:
    """Attention [time, batch, heads, width] with parts to exchange; ``masked`` is True where a query may not look."""
    query, key, value = (x.transpose([1, 2, 0, 3]) for x in (query * (scale(query.shape[-1]) / depth), key, value))
    scores = paddle.matmul(query, key, transpose_y=True)
    if temperature:
        scores = scores * (1 + temperature * paddle.arange(scores.shape[1], dtype="float32")).reshape([1, -1, 1, 1])
    scores = paddle.where(hiding(masked), paddle.full([1], hidden, scores.dtype), scores)
    weights = softmax(scores * depth if multiplied else scores)
    return paddle.matmul(weights, value).transpose([2, 0, 1, 3]).flatten(-2)


def causal(masked: Any) -> Any:
    length = masked.shape[-1]
    return masked | paddle.triu(paddle.ones([length, length], dtype="bool"), 1)


def as_the_last_query(masked: Any) -> Any:
    """What the last query may not see, which is padding alone."""
    return masked[:, :, -1:].expand(masked.shape)


def see_one_ahead(masked: Any) -> Any:
    return paddle.concat([masked[:, :, 1:], masked[:, :, -1:]], axis=2)


def cut_as_wholes(attention: Any) -> Callable[..., Any]:
    """All queries, then all keys, then all values."""
    def forward(hidden: Any, masked: Any, rotary: Any, past: Any) -> Any:
        time, batch, width = hidden.shape
        fused = attention.query_key_value(hidden).reshape([time, batch, 3, attention.heads, width // attention.heads])
        query, key, value = paddle.unbind(fused, 2)
        query, key = (models.chatglm.rotate(part, rotary) for part in (query, key))
        return attention.dense(models.chatglm.attend(query, key, value, masked, float(attention.depth))), (key, value)
    return forward


def with_frequencies(make: Function) -> Break:
    """``make`` of the exact frequencies, in all blocks."""
    def rotary_of(places: Any, width: int) -> Any:
        exact = 1.0 / 10000 ** (paddle.arange(0, width, 2, dtype="float32") / width)
        angles = places.astype("float32").unsqueeze([-1, -1]) * make(exact)
        return paddle.tile(paddle.cos(angles), [1, 1, 1, 2]), paddle.tile(paddle.sin(angles), [1, 1, 1, 2])

    def break_net(names: Names, net: Any) -> None:
        during(names.backbone(net), models.chatglm, "rotary_of", lambda original: rotary_of)
    return break_net


def with_rotary(make: Callable[[Any, Any], list[Any]]) -> Break:
    """``make`` of the tables for the two halves of every head, in all blocks."""
    def break_net(names: Names, net: Any) -> None:
        backbone = names.backbone(net)
        rotary = backbone.rotary
        backbone.rotary = lambda places: make(*rotary(places))
    return break_net


def turning(make: Callable[[Any], Any]) -> Break:
    """Another rotation in one block."""
    def break_net(names: Names, net: Any) -> None:
        during(names.inside(net, "attn", MID), models.chatglm, "rotate", make)
    return break_net


def in_neighbours(x: Any, rotary: Any) -> Any:
    """Channel i is turned with its neighbour (GPT-J), not with the one half of the part further on."""
    turned = []
    for part, (cos, sin) in zip(paddle.split(x, 2, axis=-1), rotary, strict=True):
        half = cos.shape[-1] // 2
        cos, sin = (paddle.repeat_interleave(table[..., :half], 2, axis=-1) for table in (cos, sin))
        pairs = part.reshape([*part.shape[:-1], half, 2])
        turned.append(part * cos + paddle.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(part.shape) * sin)
    return paddle.concat(turned, axis=-1)


def queries_only(original: Any) -> Any:
    """The keys, which come second, are not turned."""
    calls: list[None] = []

    def rotate(x: Any, rotary: Any) -> Any:
        calls.append(None)
        return original(x, rotary) if len(calls) == 1 else x
    return rotate


def at_places(function: Function) -> Break:
    """``function`` of the places [batch, 2, time]."""
    def break_net(names: Names, net: Any) -> None:
        backbone = names.backbone(net)
        rotary = backbone.rotary
        backbone.rotary = lambda places: rotary(function(places))
    return break_net


def last_is_next(places: Any) -> Any:
    step = (paddle.arange(places.shape[-1]) == places.shape[-1] - 1).astype(places.dtype)
    return places + step


def counted_from_0(places: Any) -> Any:
    """In the answer, where the first of it has place 1."""
    return paddle.stack([places[:, 0], (places[:, 1] - 1).clip(min=0)], axis=1)


def going_on(places: Any) -> Any:
    """Words of the answer stand behind each other in the text, not all at the mask."""
    return paddle.stack([places[:, 0] + places[:, 1], places[:, 1]], axis=1)


def acting(layer: int, function: Function) -> Break:
    def break_net(names: Names, net: Any) -> None:
        during(names.blocks(net)[layer].mlp, models.chatglm, "gelu_tanh", lambda original: function)
    return break_net


def alpha_once(block: Any) -> Callable[..., Any]:
    def forward(hidden: Any, masked: Any, rotary: Any, past: Any = None) -> Any:
        normed = block.input_layernorm(hidden)
        attended, present = block.attention(normed, masked, rotary, past)
        middle = block.post_attention_layernorm(normed * block.alpha + attended)
        return middle + block.mlp(middle), present
    return forward


def around_the_norms(block: Any) -> Callable[..., Any]:
    """As GPT-2 has them."""
    def forward(hidden: Any, masked: Any, rotary: Any, past: Any = None) -> Any:
        attended, present = block.attention(block.input_layernorm(hidden), masked, rotary, past)
        middle = hidden * block.alpha + attended
        return middle * block.alpha + block.mlp(block.post_attention_layernorm(middle)), present
    return forward


def without_residual(block: Any) -> Callable[..., Any]:
    """Around the MLP."""
    def forward(hidden: Any, masked: Any, rotary: Any, past: Any = None) -> Any:
        normed = block.input_layernorm(hidden)
        attended, present = block.attention(normed, masked, rotary, past)
        return block.mlp(block.post_attention_layernorm(normed * block.alpha + attended)), present
    return forward


def with_loss(function: Callable[[Any, Any], Any]) -> Break:
    def break_net(names: Names, net: Any) -> None:
        during(net, models.heads, "causal_lm_loss", lambda original: function)
    return break_net


def random_head(names: Names, net: Any) -> None:
    """A table of its own for the head, which nothing filled."""
    random = 0.02 * np.random.default_rng(SEED).standard_normal(net.lm_head.decoder_weight.shape)
    table = paddle.to_tensor(random.astype(np.float32))
    net.lm_head.forward = lambda hidden: paddle.matmul(hidden, table, transpose_y=True)


def tied_head(names: Names, net: Any) -> None:
    net.lm_head.forward = lambda hidden: paddle.matmul(hidden, net.chatglm.transformer.word_embeddings.weight,
                                                       transpose_y=True)


FAULTS = tuple(fault for group, names in (
    (wrong_weights, NAMES), (wrong_parts, NAMES), (wrong_attention, NAMES), (wrong_places, NAMES), (wrong_code, NAMES),
    (wrong_config, NAMES), (wrong_loss, NAMES), (wrong_when_untied, UNTIED)) for faults in group(names)
    for fault in faults)
