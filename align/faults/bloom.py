"""Faults of BLOOM: alibi, one linear for q, k and v whose rows go head by head, residuals by its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from paddle.nn import functional as F

from . import transformer
from .names import LAST, MID, Names
from .planting import code, config, invisible, weights
from .transformer import Faults
from .wrong_nets import causal_only, left_out, running, setting
from .wrong_weights import (
    bf16,
    change,
    fp16,
    heads_in_order,
    int8,
    low_rank,
    noise,
    of_both,
    of_part,
    permute_heads,
    several,
    transpose,
    typical_element,
)

NAMES = Names("bloom", "bloom.h.{}", dict(
    attn="self_attention", qkv="self_attention.query_key_value", out="self_attention.dense", up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h", norm="input_layernorm", norm2="post_attention_layernorm"), "bloom.word_embeddings.weight",
    "bloom.word_embeddings", "mlp.gelu_impl")
EMBEDDED = "bloom.word_embeddings_layernorm"


def wrong_weights(n: Names) -> Faults:
    middle, last, named = n.at(MID), n.at(LAST), n.named
    yield weights(n, "missed transpose of dense", transpose(n.weight("out", MID)), middle, named(MID, "out"),
                  "transposed")
    yield from transformer.wrong_layers(n)
    yield from transformer.wrong_norms(n)
    yield from transformer.norms_exchanged(n)
    yield from transformer.bias_element(n)
    for part, layer in (("norm", MID), ("up", MID), ("qkv", LAST), ("out", MID)):
        yield weights(n, f"bias missing in {n.parts[part]}", change(n.bias(part, layer), np.zeros_like), n.at(layer),
                      named(layer, part), "bias missing", also="zeros")
    yield weights(n, "element changed by 1 %", change(n.weight("qkv", MID), typical_element(lambda x: x * 1.01)),
                  middle, named(MID, "qkv"))
    for kind, part, function, explanation in (
            ("rounded to fp16", "down", fp16, "rounded to fp16"), ("rounded to bf16", "qkv", bf16, "rounded to bf16"),
            ("quantised to int8", "up", int8, None), ("with noise of 1e-5", "qkv", noise(1e-5), None),
            ("with a low-rank perturbation", "out", low_rank(1e-3), None)):
        yield weights(n, f"matrix {kind}", change(n.weight(part, LAST), function), last, named(LAST, part), explanation)
    yield weights(n, "norm of the words x 1.0005", change(f"{EMBEDDED}.weight", lambda x: x * np.float32(1.0005)),
                  EMBEDDED, (f"{EMBEDDED}*",), also="scaled")
    yield from transformer.units_permuted(n, "up")
    yield from transformer.wrong_words(n)
    yield from transformer.unused_word(n)


def wrong_parts(n: Names) -> Faults:
    """Of the linear that is for q, k and v."""
    middle, named, fused = n.at(MID), n.named(MID, "qkv"), n("qkv", MID)
    yield from transformer.fused_orders(n)
    yield weights(n, "heads permuted everywhere", several(
        of_both(fused, heads_in_order(n, 2, 0, 3, 1)), change(n.weight("out", MID), permute_heads(n, 0))), middle,
        (*named, *n.named(MID, "out"), *n.attention(MID)),
        why="each head has its own slope, so that here their order matters", also="permuted")
    yield invisible(n, "key bias changed", change(n.bias("qkv", MID), of_part(n, 1, lambda x: x + 1)), named,
                    "a constant on each row of the scores", also="added")


def wrong_code(n: Names) -> Faults:
    middle, placed = n.at(MID), (*n.wiring(MID), *n.named(MID, "norm", "norm2"))
    yield transformer.activation(n, "gelu with erf", "gelu")
    yield transformer.activation(n, "quick gelu", "quick_gelu")
    yield transformer.activation(n, "tanh", "tanh", LAST)
    yield transformer.clipped(n, F.silu)
    yield from transformer.wrong_epsilons(n)
    yield from transformer.norm_of_n_minus_1(n)
    yield from transformer.wrong_scores(n)
    yield from transformer.wrong_causal_masks(n)
    yield from transformer.padding_ignored(n, "causal_mask", causal_only)
    yield transformer.dropout(n, "dropout", 0.1, f"{n.at(MID)} dropout", explanation=None)
    yield from transformer.wrong_wiring(n)
    for kind, make in (("missing", lambda bias: bias * 0), ("twice as steep", lambda bias: bias * 2),
                       ("growing with the distance", lambda bias: -bias),
                       ("through the heads backwards", lambda bias: bias.flip(1))):
        yield code(n, f"alibi {kind}", running(n("attn", MID), with_alibi(make)), middle, n.attention(MID), "alibi")
    yield code(n, "residual after the norm", setting(middle, residual_is_normed=True), middle, placed, "norm placed")
    for kind, path in (("final norm", "bloom.ln_f"), ("norm of the words", EMBEDDED)):
        yield code(n, f"{kind} missing", left_out(path), path, (f"{path}*",), "norm missing")


def wrong_config(n: Names) -> Faults:
    first, attention, named = n.at(0), n.attention(0), n.named
    yield config(n, "epsilon of the config", EMBEDDED, (f"{EMBEDDED}*", *named(0, "norm")), "epsilon",
                 layer_norm_epsilon=1e-3)
    yield config(n, "residual of the config", first, (*n.wiring(0), *named(0, "norm", "norm2")), "norm placed",
                 apply_residual_connection_post_layernorm=True)
    yield config(n, "heads of the config halved", first, attention, "heads", n_head=n.heads // 2)
    yield config(n, "heads of the config doubled", first, attention, "heads", n_head=n.heads * 2)
    yield config(n, "slices of the config", first, (*n.wiring(0), *named(0, "out", "down")), pretraining_tp=2,
                 slow_but_exact=True)


def with_alibi(make: Callable[[Any], Any]) -> Callable[[Any], Callable[..., Any]]:
    """Another bias [batch, heads, 1, keys] for an attention."""
    def of_attention(attention: Any) -> Callable[..., Any]:
        forward = attention.forward
        return lambda hidden, mask, alibi, past: forward(hidden, mask, make(alibi), past)
    return of_attention


FAULTS = tuple(fault for group in (wrong_weights, wrong_parts, wrong_code, wrong_config)
               for faults in group(NAMES) for fault in faults)
