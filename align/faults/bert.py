"""Faults of BERT: norms behind attention and MLP, embeddings of three kinds, a pooler, a decoder tied to the words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

from models.activation import gelu

from . import transformer
from .fault import Fault, words
from .names import LAST, MID, Names
from .planting import code, config, in_checkpoint, in_config, invisible, together, weights
from .transformer import Faults
from .wrong_nets import Break, at_positions, counted_without_padding, last_is_next, left_out, one_too_far, running
from .wrong_weights import SEED, change, element, noise, swap_rows, transpose, value_bias_made_good

NAMES = Names("bert", "bert.encoder.layers.{}", dict(
    attn="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    up="linear1", down="linear2", norm="norm1", norm2="norm2"), "bert.embeddings.word_embeddings.weight",
    "bert.embeddings", "activation", {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.decoder_bias"})
EMBEDDINGS, HEAD = "bert.embeddings", "cls.predictions"
POSITIONS = (f"{EMBEDDINGS}.position_embeddings*", f"{EMBEDDINGS}: positions*", f"{EMBEDDINGS} positions*")
TYPES = (f"{EMBEDDINGS}.token_type_embeddings*", f"{EMBEDDINGS}: token types*")
NORM, DECODER = (f"{EMBEDDINGS}.layer_norm*",), (f"{HEAD}.decoder*",)


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
    yield from transformer.wrong_words(n)
    yield weights(n, "bias missing in q", change(n.bias("q", MID), np.zeros_like), n.at(MID), n.named(MID, "q"),
                  "bias missing")
    yield weights(n, "q bias element off by 1e-4", change(n.bias("q", LAST), element(-1, lambda x: x + 1e-4)),
                  n.at(LAST), n.named(LAST, "q"), why="lost behind the softmax, 66 x the limit at the linear's output")
    yield invisible(n, "key bias changed", change(n.bias("k", MID), lambda x: x + 1), n.named(MID, "k"),
                    "a constant on each row of the scores", also="added")
    yield invisible(n, "value bias made good in the output bias", value_bias_made_good(n), n.named(MID, "v", "out"),
                    "rows of attention add up to 1", also="bias missing|zeros")


def wrong_ends(n: Names) -> Faults:
    """Weights of the embeddings and of the heads."""
    table = f"{EMBEDDINGS}.position_embeddings.weight"
    yield weights(n, "missed transpose of the pooler", transpose("bert.pooler.dense.weight"), "bert.pooler",
                  ("bert.pooler.dense*",), "transposed")
    yield weights(n, "missed transpose of the head", transpose(f"{HEAD}.transform.weight"), HEAD,
                  (f"{HEAD}.transform*",), "transposed")
    yield weights(n, "decoder bias missing", change(f"{HEAD}.decoder_bias", np.zeros_like), HEAD, DECODER,
                  "bias missing")
    yield weights(n, "positions shifted in the table", change(table, lambda array: np.roll(array, 1, axis=0)),
                  EMBEDDINGS, POSITIONS, "position", also="permuted")
    yield weights(n, "token types exchanged", change(f"{EMBEDDINGS}.token_type_embeddings.weight", swap_rows(0, 1)),
                  EMBEDDINGS, TYPES, also="permuted|token types")
    stale = together(in_config(tie_word_embeddings=False), in_checkpoint(change(f"{HEAD}.decoder.weight", noise(1e-3)),
                                                                         n))
    yield [Fault("decoder is an older copy", n.family, "checkpoint", "file, tie_word_embeddings=False", stale, HEAD,
                 frozenset(DECODER), words("untied"))]
    yield invisible(n, "position row that no input uses", change(table, element(-1, lambda x: x + 1)), POSITIONS,
                    "the inputs are shorter")


def wrong_code(n: Names) -> Faults:
    middle = n.at(MID)
    yield transformer.activation(n, "other gelu in one block", "gelu_new")
    yield transformer.activation(n, "other gelu in the last block", "gelu_new", LAST)
    yield transformer.activation(n, "quick gelu", "quick_gelu")
    yield transformer.activation(n, "relu", "relu")
    yield transformer.clipped(n, gelu)
    yield from transformer.wrong_epsilons(n, near=1e-5)
    yield from transformer.norm_of_n_minus_1(n)
    yield from transformer.wrong_scores(n)
    yield from transformer.padding_ignored(n, "padding_mask", paddle.zeros_like, "padding|no mask")
    yield from transformer.wrong_heads(n)
    for share in (0.1, 0.01):
        yield transformer.dropout(n, "dropout2", share, f"{n('norm2', MID)} dropout")
    yield from transformer.wrong_wiring(n)
    yield code(n, "norm before or behind", running(middle, norms_before), middle,
               (*n.wiring(MID), *n.named(MID, "norm", "norm2")), "norm placed")
    yield code(n, "residual missing", running(middle, without_residual), middle, n.wiring(MID), "residual")
    yield code(n, "MLP beside the attention", running(middle, side_by_side), middle, n.wiring(MID))


def wrong_code_of_ends(n: Names) -> Faults:
    pooler = ("bert.pooler", "bert.pooler.*", "bert.pooler: *", "bert.pooler *")
    yield code(n, "last position off by one", at_positions(last_is_next), EMBEDDINGS, POSITIONS, "position")
    yield code(n, "all positions off by one", at_positions(one_too_far), EMBEDDINGS, POSITIONS, "position")
    yield code(n, "positions counted without padding", at_positions(counted_without_padding), EMBEDDINGS, POSITIONS,
               "position")
    yield code(n, "token types ignored", running(EMBEDDINGS, without_types), EMBEDDINGS, TYPES, "token types")
    yield code(n, "decoder is random", random_decoder, HEAD, DECODER, also="untied")
    yield code(n, "norm of the head missing", left_out(f"{HEAD}.layer_norm"), HEAD, (f"{HEAD}.layer_norm*",),
               "norm missing")
    yield code(n, "pooler takes the last token", pooled(lambda dense, hidden: paddle.tanh(dense(hidden[:, -1]))),
               "bert.pooler", pooler, "pooling")
    yield code(n, "pooler without tanh", pooled(lambda dense, hidden: dense(hidden[:, 0])), "bert.pooler", pooler,
               "activation")


def wrong_config(n: Names) -> Faults:
    first, attention = n.at(0), n.attention(0)
    yield config(n, "gelu of the config", first, n.acting(0), "activation", hidden_act="gelu_new")
    yield config(n, "relu of the config", first, n.acting(0), "activation", hidden_act="relu")
    yield config(n, "epsilon of the config", EMBEDDINGS, (*NORM, *n.named(0, "norm", "norm2")), "epsilon",
                 layer_norm_eps=1e-5)
    yield config(n, "epsilon 1e-3 of the config", EMBEDDINGS, NORM, "epsilon", layer_norm_eps=1e-3)
    yield config(n, "heads of the config halved", first, attention, "heads", num_attention_heads=n.heads // 2)
    yield config(n, "heads of the config doubled", first, attention, "heads", num_attention_heads=n.heads * 2)


# Wrong nets ---------------------------------------------------------------------------------------------------------


def norms_before(block: Any) -> Callable[..., Any]:
    def forward(hidden: Any, mask: Any = None) -> Any:
        hidden = hidden + block.self_attn(block.norm1(hidden), mask)
        return hidden + block.linear2(block.activation(block.linear1(block.norm2(hidden))))
    return forward


def without_residual(block: Any) -> Callable[..., Any]:
    """Around the MLP."""
    def forward(hidden: Any, mask: Any = None) -> Any:
        hidden = block.norm1(block.self_attn(hidden, mask) + hidden)
        return block.norm2(block.linear2(block.activation(block.linear1(hidden))))
    return forward


def side_by_side(block: Any) -> Callable[..., Any]:
    """The MLP beside the attention instead of behind it."""
    def forward(hidden: Any, mask: Any = None) -> Any:
        attended = block.norm1(block.self_attn(hidden, mask) + hidden)
        return block.norm2(block.linear2(block.activation(block.linear1(hidden))) + attended)
    return forward


def without_types(embeddings: Any) -> Callable[..., Any]:
    forward = embeddings.forward
    return lambda ids, types, positions: forward(ids, paddle.zeros_like(types), positions)


def random_decoder(names: Names, net: Any) -> None:
    """A table of its own for the decoder, which nothing filled."""
    decoder = net.cls.predictions.decoder
    random = np.random.default_rng(SEED).standard_normal(decoder.weight.shape).astype(np.float32) * 0.02
    decoder.forward = lambda hidden: paddle.matmul(hidden, paddle.to_tensor(random), transpose_y=True) + decoder.bias


def pooled(function: Callable[[Any, Any], Any]) -> Break:
    """``function(dense, hidden)`` instead of the pooler."""
    return running("bert.pooler", lambda pooler: lambda hidden: function(pooler.dense, hidden))


FAULTS = tuple(fault for group in (wrong_weights, wrong_ends, wrong_code, wrong_code_of_ends, wrong_config)
               for faults in group(NAMES) for fault in faults)
