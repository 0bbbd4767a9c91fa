"""Faults of OPT: norms before or behind by its config, two rows of positions before the first token's, a tied head."""

from __future__ import annotations

from typing import Any

import numpy as np
from paddle.nn import functional as F

from . import transformer
from .fault import Fault, words
from .names import LAST, MID, Names
from .planting import code, config, in_checkpoint, in_config, invisible, together, weights
from .transformer import Faults
from .wrong_nets import (
    at_positions,
    causal_only,
    counted_without_padding,
    last_is_next,
    left_out,
    setting,
)
from .wrong_weights import change, element, noise

NAMES = Names("opt", "opt.decoder.layers.{}", dict(
    attn="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    up="linear1", down="linear2", norm="norm1", norm2="norm2"), "opt.embeddings.word_embeddings.weight",
    "opt.embeddings.word_embeddings", "activation", {
        "lm_head.decoder_weight": "opt.embeddings.word_embeddings.weight"})
TABLE, FINAL = "opt.embeddings.position_embeddings", "opt.decoder.final_layer_norm"


def wrong_weights(n: Names) -> Faults:
    yield from transformer.wrong_projections(n)
    yield from transformer.heads_permuted_everywhere(n)
    yield from transformer.wrong_layers(n)
    yield from transformer.wrong_norms(n)
    yield from transformer.norms_exchanged(n)
    yield from transformer.wrong_biases(n)
    yield from transformer.bias_element(n)
    yield from transformer.wrong_matrices(n)
    yield from transformer.wrong_numbers_in_projections(n)
    yield from transformer.units_permuted(n, "up")
    yield from transformer.wrong_words(n)
    yield from transformer.unused_word(n)
    yield weights(n, "bias missing in q", change(n.bias("q", MID), np.zeros_like), n.at(MID), n.named(MID, "q"),
                  "bias missing", also="zeros")
    yield weights(n, "final norm x 1.0005", change(f"{FINAL}.weight", lambda x: x * np.float32(1.0005)), FINAL,
                  (f"{FINAL}*",), also="scaled")
    stale = together(in_config(tie_word_embeddings=False), in_checkpoint(change("lm_head.decoder_weight", noise(1e-3)),
                                                                         n))
    yield [Fault("head is an older copy", n.family, "checkpoint", "file, tie_word_embeddings=False", stale, "logits",
                 frozenset({"lm_head*", "logits*"}), words("untied"), also=words("permuted") or frozenset())]
    yield invisible(n, "key bias changed", change(n.bias("k", MID), lambda x: x + 1), n.named(MID, "k"),
                    "a constant on each row of the scores", also="added")


def wrong_code(n: Names) -> Faults:
    yield transformer.activation(n, "other gelu", "gelu_new")
    yield transformer.activation(n, "quick gelu", "quick_gelu")
    yield transformer.activation(n, "tanh", "tanh", LAST)
    yield transformer.clipped(n, F.silu)
    yield from transformer.wrong_epsilons(n)
    yield from transformer.norm_of_n_minus_1(n)
    yield from transformer.wrong_scores(n)
    yield from transformer.wrong_causal_masks(n)
    yield from transformer.padding_ignored(n, "causal_mask", causal_only)
    yield from transformer.wrong_heads(n)
    yield transformer.dropout(n, "dropout", 0.1, f"{n.at(MID)} dropout", explanation=None)
    yield from transformer.wrong_wiring(n)
    yield code(n, "norms behind", setting(n.at(MID), norms_before=False), n.at(MID),
               (*n.wiring(MID), *n.named(MID, "norm", "norm2")), "norm placed")
    yield code(n, "final norm missing", left_out(FINAL), FINAL, (f"{FINAL}*",), "norm missing")


def wrong_positions(n: Names) -> Faults:
    positions = (TABLE, f"{TABLE}*")
    yield weights(n, "positions shifted in the table", change(f"{TABLE}.weight", lambda x: np.roll(x, 1, axis=0)),
                  TABLE, positions, "position", also="permuted")
    yield invisible(n, "position row that no input uses", change(f"{TABLE}.weight", element(0, lambda x: x + 1)),
                    positions, "row 0 is nobody's: padding reads row 1, the first token row 2")
    for rows in (0, 1):
        yield code(n, f"position offset {rows}", setting(TABLE, offset=rows), TABLE, positions, "position")
    yield code(n, "positions counted over padding too", at_positions(lambda plain, mask: plain), TABLE, positions,
               "position")
    yield code(n, "last position off by one", at_positions(last_real_is_next), TABLE, positions, "position")


def wrong_config(n: Names) -> Faults:
    first = n.at(0)
    yield config(n, "gelu of the config", first, n.acting(0), "activation", activation_function="gelu")
    yield config(n, "heads of the config halved", first, n.attention(0), "heads", num_attention_heads=n.heads // 2)


def last_real_is_next(plain: Any, mask: Any) -> Any:
    return last_is_next(counted_without_padding(plain, mask), mask)


FAULTS = tuple(fault for group in (wrong_weights, wrong_code, wrong_positions, wrong_config)
               for faults in group(NAMES) for fault in faults)
