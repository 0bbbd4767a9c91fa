"""Faults of GPT-2: q, k and v cut from one Conv1D, norms before, learned positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from models.activation import gelu_tanh

from . import transformer
from .names import LAST, MID, Names
from .planting import code, config, invisible, weights
from .transformer import Faults
from .wrong_nets import at_positions, causal_only, counted_without_padding, last_is_next, left_out, one_too_far, running
from .wrong_weights import change, cut_per_head, element, value_bias_made_good

NAMES = Names("gpt2", "gpt.decoder.layers.{}", dict(
    attn="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    up="linear1", down="linear2", norm="norm1", norm2="norm2"), "gpt.embeddings.word_embeddings.weight",
    "gpt.embeddings.dropout", "activation")
TABLE, NORM = "gpt.embeddings.position_embeddings", "gpt.decoder.norm"
POSITIONS = (f"{TABLE}*", NAMES.embedding, f"{NAMES.embedding} positions")


def wrong_weights(n: Names) -> Faults:
    yield from transformer.wrong_projections(n)
    yield from transformer.heads_permuted_everywhere(n)
    yield from transformer.wrong_layers(n)
    yield from transformer.wrong_norms(n)
    yield from transformer.norms_exchanged(n, "swapped|norm placed")
    yield from transformer.wrong_biases(n)
    yield from transformer.bias_element(n)
    yield from transformer.wrong_matrices(n)
    yield from transformer.wrong_numbers_in_projections(n)
    yield from transformer.units_permuted(n, "up")
    yield from transformer.wrong_words(n, n.embedding)
    yield weights(n, "q, k and v cut per head from the fused matrix", cut_per_head(n), n.at(MID),
                  (*n.named(MID, "q", "k", "v"), f"{n('attn', MID)} q, k and v"), "swapped")
    yield weights(n, "bias missing in v", change(n.bias("v", MID), np.zeros_like), n.at(MID), n.named(MID, "v"),
                  "bias missing", also="zeros")
    yield weights(n, "final norm x 1.0005", change(f"{NORM}.weight", lambda x: x * np.float32(1.0005)), NORM,
                  (f"{NORM}*",), also="scaled")
    yield invisible(n, "key bias changed", change(n.bias("k", MID), lambda x: x + 1), n.named(MID, "k"),
                    "a constant on each row of the scores", also="added")
    yield invisible(n, "value bias made good in the output bias", value_bias_made_good(n), n.named(MID, "v", "out"),
                    "rows of attention add up to 1", also="bias missing|zeros")


def wrong_code(n: Names) -> Faults:
    middle, placed = n.at(MID), (*n.wiring(MID), *n.named(MID, "norm", "norm2"))
    yield transformer.activation(n, "other gelu in one block", "gelu")
    yield transformer.activation(n, "other gelu in the last block", "gelu", LAST)
    yield transformer.activation(n, "quick gelu", "quick_gelu")
    yield transformer.activation(n, "relu", "relu")
    yield transformer.clipped(n, gelu_tanh)
    yield from transformer.wrong_epsilons(n)
    yield from transformer.norm_of_n_minus_1(n)
    yield from transformer.wrong_scores(n)
    yield from transformer.wrong_causal_masks(n)
    yield from transformer.padding_ignored(n, "causal_and_padding_mask", causal_only)
    yield from transformer.wrong_heads(n)
    for share in (0.1, 0.01):
        yield transformer.dropout(n, "dropout2", share, f"{n('norm2', MID)} dropout")
    yield from transformer.wrong_wiring(n)
    yield code(n, "norm before or behind", running(middle, norms_behind), middle, placed, "norm placed")
    yield code(n, "MLP beside the attention", running(middle, side_by_side), middle, n.wiring(MID), "norm placed")
    yield code(n, "residual missing", running(middle, without_residual), middle, n.wiring(MID), "residual")
    yield code(n, "final norm missing", left_out(NORM), NORM, (f"{NORM}*",), "norm missing")


def wrong_positions(n: Names) -> Faults:
    yield weights(n, "positions shifted in the table", change(f"{TABLE}.weight", lambda array: np.roll(
        array, 1, axis=0)), n.embedding, POSITIONS, "position", also="permuted")
    yield invisible(n, "position row that no input uses", change(f"{TABLE}.weight", element(-1, lambda x: x + 1)),
                    POSITIONS, "the inputs are shorter")
    yield code(n, "last position off by one", at_positions(last_is_next), n.embedding, POSITIONS, "position")
    yield code(n, "all positions off by one", at_positions(one_too_far), n.embedding, POSITIONS, "position")
    yield code(n, "positions counted without padding", at_positions(counted_without_padding), n.embedding, POSITIONS,
               "position")


def wrong_config(n: Names) -> Faults:
    first, attention = n.at(0), n.attention(0)
    yield config(n, "gelu of the config", first, n.acting(0), "activation", activation_function="gelu")
    yield config(n, "epsilon of the config", first, (*n.named(0, "norm", "norm2"), f"{first} layer norms"), "epsilon",
                 layer_norm_epsilon=1e-3)
    yield config(n, "heads of the config halved", first, attention, "heads", n_head=n.heads // 2)
    yield config(n, "heads of the config doubled", first, attention, "heads", n_head=n.heads * 2)
    yield config(n, "scale of the config missing", first, attention, "scale", scale_attn_weights=False)
    yield config(n, "scale of the config by layer", n.at(1), n.attention(1), "scale",
                 scale_attn_by_inverse_layer_idx=True)


# Wrong nets ---------------------------------------------------------------------------------------------------------


def norms_behind(block: Any) -> Callable[..., Any]:
    def forward(hidden: Any, mask: Any, past: Any = None) -> Any:
        attended, present = block.self_attn(hidden, mask, past)
        hidden = block.norm1(hidden + attended)
        return block.norm2(hidden + mlp(block, hidden)), present
    return forward


def without_residual(block: Any) -> Callable[..., Any]:
    """Around the MLP."""
    def forward(hidden: Any, mask: Any, past: Any = None) -> Any:
        attended, present = block.self_attn(block.norm1(hidden), mask, past)
        return mlp(block, block.norm2(hidden + attended)), present
    return forward


def side_by_side(block: Any) -> Callable[..., Any]:
    """The MLP beside the attention instead of behind it."""
    def forward(hidden: Any, mask: Any, past: Any = None) -> Any:
        attended, present = block.self_attn(block.norm1(hidden), mask, past)
        return hidden + attended + mlp(block, block.norm2(hidden)), present
    return forward


def mlp(block: Any, hidden: Any) -> Any:
    return block.linear2(block.activation(block.linear1(hidden)))


FAULTS = tuple(fault for group in (wrong_weights, wrong_code, wrong_positions, wrong_config)
               for faults in group(NAMES) for fault in faults)
