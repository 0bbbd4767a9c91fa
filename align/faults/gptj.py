"""Faults of GPT-J: rotary positions, one layer norm for attention and MLP side by side, a head with a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

import models.gptj
from models.activation import gelu_tanh

from . import transformer
from .fault import Fault, words
from .names import LAST, MID, Names
from .planting import code, config, in_checkpoint, weights
from .transformer import Faults
from .wrong_nets import Break, at_positions, causal_only, during, last_is_next, left_out, running
from .wrong_weights import Tensors, change, exchange, noise

NAMES = Names("gptj", "transformer.h.{}", dict(
    attn="attn", q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", out="attn.out_proj", up="mlp.fc_in",
    down="mlp.fc_out", norm="ln_1"), "transformer.wte.weight", "transformer.drop", "mlp.act",
    unbiased=frozenset({"q", "k", "v", "out"}), buffers=(".attn.bias", ".masked_bias"))


def wrong_weights(n: Names) -> Faults:
    yield from transformer.wrong_projections(n)
    yield from transformer.heads_permuted_everywhere(n)
    yield from transformer.wrong_layers(n)
    yield from transformer.wrong_norms(n, late="norm")
    yield from transformer.wrong_biases(n)
    yield from transformer.bias_element(n)
    yield from transformer.wrong_matrices(n)
    yield from transformer.wrong_numbers_in_projections(n)
    yield from transformer.units_permuted(n, "up")
    yield from transformer.wrong_words(n, n.embedding)
    yield from transformer.unused_word(n)
    head, norm = ("lm_head*", "logits*"), ("transformer.ln_f*",)
    yield weights(n, "head bias missing", change("lm_head.bias", np.zeros_like), "logits", head, "bias missing")
    yield weights(n, "head is an older copy", change("lm_head.weight", noise(1e-3)), "logits", head)
    yield weights(n, "final norm x 1.0005", change("transformer.ln_f.weight", lambda x: x * np.float32(1.0005)),
                  "transformer.ln_f", norm, also="scaled")
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), "transformer.ln_f")), n.at(MID),
                  (*n.named(MID, "norm"), *norm), "swapped|layers")


def wrong_code(n: Names) -> Faults:
    middle = n.at(MID)
    yield transformer.activation(n, "other gelu in one block", "gelu")
    yield transformer.activation(n, "other gelu in the last block", "gelu", LAST)
    yield transformer.activation(n, "quick gelu", "quick_gelu")
    yield transformer.activation(n, "relu", "relu")
    yield transformer.clipped(n, gelu_tanh)
    yield from transformer.wrong_epsilons(n, late="norm")
    yield from transformer.norm_of_n_minus_1(n)
    yield from transformer.wrong_scores(n)
    yield from transformer.wrong_causal_masks(n)
    yield from transformer.padding_ignored(n, "causal_mask", causal_only)
    yield from transformer.wrong_heads(n)
    for share in (0.1, 0.01):
        yield transformer.dropout(n, "mlp.dropout", share, f"{n('norm', MID)} dropout")
    yield from transformer.wrong_wiring(n)
    placed = (*n.wiring(MID), *n.named(MID, "norm"))
    yield code(n, "norm before or behind", running(middle, norm_behind), middle, placed, "norm placed")
    yield code(n, "attention before the MLP", running(middle, one_after_the_other), middle, placed, "norm placed")
    yield code(n, "residual missing", running(middle, without_residual), middle, n.wiring(MID), "residual")
    yield code(n, "final norm missing", left_out("transformer.ln_f"), "transformer.ln_f", ("transformer.ln_f*",),
               "norm missing")


def wrong_positions(n: Names) -> Faults:
    first, middle, attention, all_attention = n.at(0), n.at(MID), n.attention(MID), n.attention(0)
    yield code(n, "last position off by one", at_positions(last_is_next), first, (*all_attention, f"{first} positions"),
               "position")
    yield code(n, "rotary in halves", turning(None, in_halves), first, all_attention, "rotary style")
    yield code(n, "rotary dimension halved", turning(MID, fewer_pairs), middle, attention, "rotary dimension")
    yield code(n, "rotary base 1000", with_table(table(base=1000.0)), first, all_attention, "rotary base")
    yield code(n, "rotary missing on k", turning(MID, queries_only), middle, attention, "rotary missing")
    yield code(n, "rotary turned backwards", turning(MID, backwards), middle, attention, "rotary direction")
    yield code(n, "wrong constant in the rotary table", with_table(table(factors=(1.0, 1.0, 1.001, 1.0))), first,
               all_attention)


def wrong_config(n: Names) -> Faults:
    first, attention = n.at(0), n.attention(0)
    yield config(n, "gelu of the config", first, n.acting(0), "activation", activation_function="gelu")
    yield config(n, "relu of the config", first, n.acting(0), "activation", activation_function="relu")
    yield config(n, "epsilon of the config", first, n.named(0, "norm"), "epsilon", layer_norm_epsilon=1e-3)
    yield config(n, "heads of the config halved", first, attention, "heads", n_head=n.heads // 2)
    yield config(n, "heads of the config doubled", first, attention, "heads", n_head=n.heads * 2)
    yield config(n, "rotary dimension of the config halved", first, attention, "rotary dimension", rotary_dim=4)
    yield config(n, "rotary dimension of the config missing", first, attention, "rotary dimension", rotary_dim=None)


def of_paddlenlps_class(n: Names) -> Faults:
    """PaddleNLP's GPT-J takes its causal mask from the file."""
    def all_visible(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".attn.bias"):
                tensors[name] = np.ones_like(tensors[name])
    yield [Fault("causal buffer stale", n.family, "checkpoint", "file", in_checkpoint(all_visible, n), n.at(0),
                 frozenset({*n.attention(0), f"{n.at(0)}.attn.bias"}), words("buffer|causal|no mask"),
                 target="paddlenlp")]


# Wrong nets ---------------------------------------------------------------------------------------------------------


def norm_behind(block: Any) -> Callable[..., Any]:
    def forward(hidden: Any, mask: Any, sin: Any, cos: Any, past: Any = None) -> Any:
        attended, present = block.attn(hidden, mask, sin, cos, past)
        return block.ln_1(attended + block.mlp(hidden) + hidden), present
    return forward


def one_after_the_other(block: Any) -> Callable[..., Any]:
    """The MLP behind the attention instead of beside it."""
    def forward(hidden: Any, mask: Any, sin: Any, cos: Any, past: Any = None) -> Any:
        attended, present = block.attn(block.ln_1(hidden), mask, sin, cos, past)
        hidden = hidden + attended
        return hidden + block.mlp(block.ln_1(hidden)), present
    return forward


def without_residual(block: Any) -> Callable[..., Any]:
    forward = block.forward

    def changed(hidden: Any, *rest: Any) -> Any:
        output, present = forward(hidden, *rest)
        return output - hidden, present
    return changed


def turning(layer: int | None, make: Callable[[Any], Any]) -> Break:
    """Another rotation in one block, or in all."""
    def break_net(names: Names, net: Any) -> None:
        for block in names.blocks(net) if layer is None else [names.blocks(net)[layer]]:
            during(block, models.gptj, "rotate", make)
    return break_net


def in_halves(original: Any) -> Any:
    """Channel i is turned with channel i + pairs (NeoX, Llama), not with its neighbour."""
    def rotate(x: Any, sin: Any, cos: Any) -> Any:
        pairs = sin.shape[-1]
        first, second, rest = x[..., :pairs], x[..., pairs: 2 * pairs], x[..., 2 * pairs:]
        return paddle.concat([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotate


def fewer_pairs(original: Any) -> Any:
    """Half of the rotary dimension, its angles those of the smaller dimension."""
    def rotate(x: Any, sin: Any, cos: Any) -> Any:
        return original(x, sin[..., ::2], cos[..., ::2])
    return rotate


def queries_only(original: Any) -> Any:
    """The keys, which come second, are not turned."""
    calls: list[None] = []

    def rotate(x: Any, sin: Any, cos: Any) -> Any:
        calls.append(None)
        return original(x, sin, cos) if len(calls) == 1 else x
    return rotate


def backwards(original: Any) -> Any:
    return lambda x, sin, cos: original(x, -sin, cos)


def with_table(make: Callable[[Any], Any]) -> Break:
    """Another table of sines and cosines for the whole net."""
    def break_net(names: Names, net: Any) -> None:
        during(names.backbone(net), models.gptj, "rotary_table", make)
    return break_net


def table(base: float = 10000.0, factors: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Callable[[Any], Any]:
    """As in models/, with another base, and each frequency times its factor."""
    def make(original: Any) -> Any:
        def rotary_table(positions: int, width: int) -> Any:
            frequencies = 1.0 / base ** (paddle.arange(0, width, 2, dtype="float32") / width)
            frequencies = frequencies * paddle.to_tensor(factors, dtype="float32")
            angles = paddle.outer(paddle.arange(positions, dtype="float32"), frequencies)
            return paddle.concat([paddle.sin(angles), paddle.cos(angles)], axis=-1)
        return rotary_table
    return make


FAULTS = tuple(fault for group in (wrong_weights, wrong_code, wrong_positions, wrong_config, of_paddlenlps_class)
               for faults in group(NAMES) for fault in faults)
