"""Faults of T5: two stacks, relative positions in their first blocks, scores that nothing divides, a gated MLP.

The checkpoint is v1.1 with square projections; ``ONE_TABLE`` is v1.0, with one table for words and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import paddle

import models.t5
from models.activation import gelu_tanh

from . import transformer
from .names import LAST, MID, Names
from .planting import Patterns, code, config, invisible, weights
from .transformer import Faults
from .wrong_nets import (
    Break,
    Function,
    attending,
    causal_only,
    during,
    giving,
    heads,
    inverted,
    left_out,
    mean_over_all,
    padding_only,
    running,
    see_one_ahead,
    setting,
    shallow,
    softmax_in_bf16,
    softmax_over_queries,
)
from .wrong_weights import Tensors, change, element, exchange, noise, permute_heads, several, transpose


class Stack(Names):
    """The encoder or the decoder."""

    def attention(self, layer: int) -> Patterns:
        """Of the stack to itself."""
        return (f"{self.at(layer)}: attention: relative positions*", self("attn", layer), f"{self('attn', layer)} *")

    def cross(self, layer: int) -> Patterns:
        """Of the decoder to the encoder."""
        return (f"{self.at(layer)}: attention: mask*", self("cross", layer), f"{self('cross', layer)} *")

    def acting(self, layer: int) -> Patterns:
        mlp = f"{self.at(layer)}.{self.activation}".rpartition(".")[0]
        return (f"{self.at(layer)}: activation*", f"{mlp} activation")

    def table(self) -> str:
        """Of relative positions; only the first block has one."""
        return f"{self('attn', 0)}.relative_attention_bias"

    def distances(self) -> Patterns:
        """Patterns of how far a key is from a query, and of what is learned for that."""
        return (f"{self.table()}*", f"{self('attn', 0)} relative positions", f"{self.at(0)}: distances*")


def stack(block: str, mlp: str, **more: str) -> Stack:
    attention = {part: f"layer.0.SelfAttention.{name}" for part, name in zip(("q", "k", "v", "out"), "qkvo",
                                                                           strict=True)}
    dense = {part: f"{mlp}.DenseReluDense.{name}" for part, name in (("up", "wi_0"), ("gate", "wi_1"), ("down", "wo"))}
    parts = {"attn": "layer.0.SelfAttention", **attention, **dense, "norm": "layer.0.layer_norm",
             "norm2": f"{mlp}.layer_norm", **more}
    return Stack("t5", block, parts, "t5.shared.weight", "t5.shared", f"{mlp}.DenseReluDense.act",
                 unbiased=frozenset(parts), heads=8, changes=(("d_kv", 8),))


ENCODER = stack("t5.encoder.block.{}", "layer.1")
DECODER = stack("t5.decoder.block.{}", "layer.2", cross="layer.1.EncDecAttention", **{
    f"cross {part}": f"layer.1.EncDecAttention.{name}" for part, name in zip(("q", "k", "v", "out"), "qkvo",
                                                                           strict=True)})
ONE_TABLE = replace(ENCODER, changes=(("feed_forward_proj", "relu"), ("tie_word_embeddings", True)))
HEAD = ("lm_head", "lm_head.weight", "logits")
FINAL = {"encoder": "t5.encoder.final_layer_norm", "decoder": "t5.decoder.final_layer_norm"}


def wrong_weights(n: Stack) -> Faults:
    yield from transformer.wrong_projections(n)
    yield from transformer.wrong_layers(n)
    yield from transformer.wrong_norms(n)
    yield from transformer.norms_exchanged(n)
    yield from transformer.wrong_matrices(n)
    yield from transformer.wrong_numbers_in_projections(n)
    yield from transformer.units_permuted(n, "up", "gate")
    yield from transformer.wrong_words(n)
    yield from transformer.unused_word(n)
    yield weights(n, "gate and MLP exchanged", exchange((n("up", MID), n("gate", MID))), n.at(MID),
                  n.named(MID, "up", "gate"), "swapped")
    yield weights(n, "heads permuted everywhere but in their positions", several(
        *(change(n.weight(part, MID), permute_heads(n, -1)) for part in "qkv"),
        change(n.weight("out", MID), permute_heads(n, 0))), n.at(MID),
        (*n.named(MID, "q", "k", "v", "out"), *n.attention(MID)), also="permuted")


def wrong_weights_of_positions(n: Stack) -> Faults:
    table, first = f"{n.table()}.weight", n.at(0)
    for kind, function, also in (
            ("distances shifted in the table", lambda x: np.roll(x, 1, axis=0), "permuted"),
            ("heads of the table permuted", permute_heads(n, 1), "permuted"),
            ("table of distances zeroed", np.zeros_like, "zeros|relative positions"),
            ("distance changed by 1 %", element(8, lambda x: x * 1.01), None)):
        yield weights(n, kind, change(table, function), first, n.distances(), also=also)
    yield invisible(n, "range of distances that none is in", change(table, element(16 * n.heads, lambda x: x + 1)),
                    n.distances(), "row 16 is for keys behind the query at distance 0")


def wrong_weights_of_the_decoder(n: Stack) -> Faults:
    middle, named = n.at(MID), n.named
    yield weights(n, "k and v of the attention to the encoder swapped", exchange(
        (n("cross k", MID), n("cross v", MID))), middle, named(MID, "cross k", "cross v"), "swapped")
    yield weights(n, "missed transpose of the attention to the encoder", transpose(n.weight("cross k", MID)), middle,
                  named(MID, "cross k"), "transposed")
    yield weights(n, "attentions exchanged", exchange(*((n(part, MID), n(f"cross {part}", MID)) for part in (
        "q", "k", "v", "out"))), middle, named(MID, "q", "k", "v", "out", "cross q", "cross k", "cross v", "cross out"),
        "swapped")
    yield weights(n, "decoder has the encoder's distances", copied(f"{ENCODER.table()}.weight", f"{n.table()}.weight"),
                  n.at(0), n.distances(), also="swapped|layers")
    yield weights(n, "MLP of the decoder rounded", change(n.weight("down", MID), lambda x: x.astype(np.float16)),
                  middle, named(MID, "down"), "rounded to fp16")
    yield invisible(n, "heads of the attention to the encoder permuted", several(
        *(change(n.weight(f"cross {part}", MID), permute_heads(n, -1)) for part in "qkv"),
        change(n.weight("cross out", MID), permute_heads(n, 0))),
        named(MID, "cross q", "cross k", "cross v", "cross out"), "they have no positions: summed, in any order",
        also="permuted")
    for side, norm in FINAL.items():
        yield weights(n, f"final norm of the {side} x 1.0005", change(f"{norm}.weight", lambda x: x * np.float32(
            1.0005)), norm, (f"{norm}*",), also="scaled")
    yield weights(n, "head is an older copy", change("lm_head.weight", noise(1e-3)), "logits", HEAD)
    yield weights(n, "head holds the words", copied(n.words, "lm_head.weight", np.transpose), "logits", HEAD, "untied",
                  also="swapped")


def wrong_code(n: Stack) -> Faults:
    middle, placed = n.at(MID), (*n.wiring(MID), *n.named(MID, "norm", "norm2"))
    mlp = f"{middle}.{n.activation}".rpartition(".")[0]
    yield transformer.activation(n, "gelu with erf", "gelu")
    yield transformer.activation(n, "gelu with erf in the last block", "gelu", LAST)
    yield transformer.activation(n, "quick gelu", "quick_gelu")
    yield transformer.activation(n, "relu", "relu")
    yield transformer.clipped(n, gelu_tanh)
    yield code(n, "gate left out", running(mlp, ungated), middle, n.acting(MID))
    yield code(n, "activation on the gate", running(mlp, acting_on_the_gate), middle,
               (*n.acting(MID), *n.named(MID, "up", "gate")), also="swapped",
               why="what wi_0 and wi_1 in each other's place compute, to the bit")
    for kind, layer, value in (("of a late block", LAST, 1e-5), ("1e-3 in one block", MID, 1e-3)):
        yield code(n, f"epsilon {kind}", setting(n("norm2", layer), epsilon=value), n.at(layer),
                   n.named(layer, "norm2"), "epsilon")
    yield code(n, "norm subtracts the mean", running(n("norm", MID), centred), middle, n.named(MID, "norm"),
               "norm variant")
    yield code(n, "norm missing", left_out(n("norm2", MID)), middle, n.named(MID, "norm2"), "norm missing")
    yield code(n, "norm behind", running(f"{middle}.layer.1", norm_behind), middle, placed)
    yield code(n, "residual of the norm", running(f"{middle}.layer.1", normed_residual), middle, n.wiring(MID))
    yield code(n, "residual missing", running(f"{middle}.layer.1", without_residual), middle, n.wiring(MID))
    for share in (0.1, 0.01):
        yield transformer.dropout(n, "layer.1.dropout", share, f"{n('norm2', MID)} dropout")
    yield from transformer.wrong_wiring(n)


def wrong_attention(n: Stack) -> Faults:
    for kind, variant, explanation, also in (
            ("scores divided", dict(scale=lambda width: width**-0.5), "scale", None),
            ("scale off by 1e-4", dict(scale=lambda width: 1.0001), "scale", None),
            ("softmax in bf16", dict(softmax=softmax_in_bf16), None, "softmax"),
            ("softmax over the queries", dict(softmax=softmax_over_queries), "softmax", None),
            ("a temperature for each head", dict(temperature=0.01), None, None)):
        yield code(n, kind, attending(MID, **variant), n.at(MID), n.attention(MID), explanation, also=also)
    for kind, make, explanation in (("padding ignored", paddle.zeros_like, "padding|no mask"),
                                    ("mask inverted", inverted, "mask polarity"),
                                    ("mask of -10 on one row", shallow, "mask value")):
        yield code(n, kind, in_stack("padding_mask", make), n.at(0), n.attention(0), explanation)


def wrong_attention_of_the_decoder(n: Stack) -> Faults:
    first, middle = n.at(0), n.at(MID)
    for kind, make, explanation in (("causal mask missing", padding_only, "causal"),
                                    ("causal mask one too far", see_one_ahead, "causal offset"),
                                    ("padding ignored by the decoder", causal_only, "padding"),
                                    ("mask of the decoder inverted", inverted, "mask polarity")):
        yield code(n, kind, in_stack("causal_mask", make), first, n.attention(0), explanation)
    for kind, make, explanation in (("padding of the encoder ignored", paddle.zeros_like, "padding|no mask"),
                                    ("mask of the encoder inverted", inverted, "mask polarity")):
        yield code(n, kind, in_stack("padding_mask", make), first, n.cross(0), explanation)
    yield code(n, "scores of the attention to the encoder divided", attending(
        MID, "cross", scale=lambda width: width**-0.5), middle, n.cross(MID), "scale")
    yield code(n, "heads of the attention to the encoder halved", heads(n.heads // 2, 0, "cross"), first,
               n.cross(0), "heads")
    states = (f"{middle}: the encoder's states*", *n.named(MID, "cross k", "cross v"))
    yield code(n, "decoder looks at itself", running(f"{middle}.layer.1", looking_at_itself), middle, states)
    yield code(n, "encoder's states not normed", states_not_normed, first,
               tuple(pattern.replace(middle, first) for pattern in states))


def wrong_positions(n: Stack) -> Faults:
    first, table = n.at(0), n.table()
    for kind, make in (
            ("distances one way", with_distances(lambda distance, *_: (distance, False, 32, 128))),
            ("farthest distance 64", with_distances(lambda distance, both, buckets, _: (distance, both, buckets, 64))),
            ("half the ranges of distances", with_distances(lambda distance, both, *_: (distance, both, 16, 128))),
            ("distances of query minus key", giving(table, lambda found: found.transpose([1, 0, 2]))),
            ("distances not added", giving(table, paddle.zeros_like))):
        yield code(n, kind, make, first, n.distances(), "relative positions")
    yield code(n, "distances one too far", with_distances(lambda distance, *rest: (distance + 1, *rest)), first,
               n.distances())
    yield code(n, "positions in the first block only", attending(MID, masked=without_positions), n.at(MID),
               n.attention(MID))


def wrong_positions_of_the_decoder(n: Stack) -> Faults:
    yield code(n, "distances both ways", with_distances(lambda distance, *_: (distance, True, 32, 128)), n.at(0),
               n.distances(), "relative positions")


def wrong_head(n: Stack) -> Faults:
    for side, norm in FINAL.items():
        yield code(n, f"final norm of the {side} missing", left_out(norm), norm, (f"{norm}*",), "norm missing")
    yield code(n, "head scaled though it is untied", projecting(
        lambda net, hidden: net.lm_head(hidden * net.config.d_model**-0.5)), "logits", HEAD, "logits scale")
    yield code(n, "head tied to the words", projecting(by_words), "logits", HEAD, "untied")


def wrong_config(n: Stack) -> Faults:
    first, norms = n.at(0), (*n.named(0, "norm", "norm2"), f"{n.at(0)} layer norms")
    yield config(n, "silu of the config", first, n.acting(0), "activation", feed_forward_proj="gated-silu")
    yield config(n, "relu of the config", first, n.acting(0), "activation", feed_forward_proj="gated-relu")
    yield config(n, "gelu with erf of the config", first, n.acting(0), "activation", dense_act_fn="gelu")
    for value in ("1e-5", "1e-3"):
        yield config(n, f"epsilon {value} of the config", first, norms, "epsilon", layer_norm_epsilon=float(value))
    for distance in (64, 256):
        yield config(n, f"farthest distance {distance} of the config", first, n.distances(), "relative positions",
                     relative_attention_max_distance=distance)


def wrong_loss(n: Stack) -> Faults:
    shifted = "loss.labels-only"
    yield config(n, "decoder start of the config", shifted, (f"{shifted}*",), stage="loss", decoder_start_token_id=1)
    yield config(n, "padding of the config", shifted, (f"{shifted}*",), stage="loss", pad_token_id=7)
    yield code(n, "labels shifted the other way", shifting(shifted_left), shifted, (f"{shifted}*",), stage="loss")
    yield code(n, "labels not shifted", shifting(lambda labels: labels.clip(min=0)), shifted, (f"{shifted}*",),
               stage="loss")
    yield code(n, "loss divided by all positions", divided_by_all, "loss.padded", ("loss.*",), "loss", stage="loss")


def wrong_with_one_table(n: Stack) -> Faults:
    """v1.0: relu, and logits by the words' own table, which is of spread 1."""
    words = (*HEAD, n.words, n.embedding)
    yield code(n, "head not scaled though it is tied", projecting(by_words), "logits", words, "logits scale")
    yield code(n, "head scaled twice", projecting(lambda net, hidden: by_words(net, hidden) / net.config.d_model),
               "logits", words, "logits scale")
    yield transformer.activation(n, "gelu for relu", "gelu_new")
    yield transformer.activation(n, "relu left out", "linear")
    yield weights(n, "row of the one table changed", change(n.words, element(64 * n.used_ids()[0], lambda x: x + 0.1)),
                  n.embedding, (n.words, n.embedding))
    yield config(n, "gelu of the config for relu", n.at(0), n.acting(0), "activation", feed_forward_proj="gelu")


# Wrong weights ------------------------------------------------------------------------------------------------------


def copied(source: str, to: str, turn: Callable[[np.ndarray], np.ndarray] = np.copy) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[to] = np.array(turn(tensors[source]), order="C")
    return edit


# Wrong nets ---------------------------------------------------------------------------------------------------------


def in_stack(function: str, make: Function) -> Break:
    """``make`` of the additive mask that ``function`` of models.t5 makes, while the stack runs."""
    def break_net(names: Names, net: Any) -> None:
        during(names.stack(net), models.t5, function, lambda original: lambda *given: make(original(*given)))
    return break_net


def with_distances(change: Callable[..., tuple[Any, ...]]) -> Break:
    """``change(distance, bidirectional, ranges, farthest)`` is what the ranges are looked up by, in the stack."""
    def break_net(names: Names, net: Any) -> None:
        during(names.blocks(net)[0], models.t5, "relative_position_bucket",
               lambda original: lambda *given: original(*change(*given)))
    return break_net


def without_positions(bias: Any) -> Any:
    """Of relative positions and mask in one, the mask."""
    return paddle.where(bias < -1e30, bias, paddle.zeros_like(bias))


def ungated(mlp: Any) -> Callable[..., Any]:
    return lambda hidden: mlp.wo(mlp.act(mlp.wi_0(hidden)))


def acting_on_the_gate(mlp: Any) -> Callable[..., Any]:
    return lambda hidden: mlp.wo(mlp.wi_0(hidden) * mlp.act(mlp.wi_1(hidden)))


def centred(norm: Any) -> Callable[..., Any]:
    """As a layer norm does."""
    forward = norm.forward
    return lambda x: forward(x - x.mean(-1, keepdim=True))


def norm_behind(layer: Any) -> Callable[..., Any]:
    return lambda hidden: hidden + layer.layer_norm(layer.DenseReluDense(hidden))


def normed_residual(layer: Any) -> Callable[..., Any]:
    def forward(hidden: Any) -> Any:
        normed = layer.layer_norm(hidden)
        return normed + layer.DenseReluDense(normed)
    return forward


def without_residual(layer: Any) -> Callable[..., Any]:
    return lambda hidden: layer.DenseReluDense(layer.layer_norm(hidden))


def looking_at_itself(layer: Any) -> Callable[..., Any]:
    """Keys and values of the decoder's own states, which has no mask for them."""
    forward = layer.forward
    return lambda hidden, encoded, bias, past: forward(hidden, layer.layer_norm(hidden), None, past)


def states_not_normed(names: Names, net: Any) -> None:
    """The decoder sees what enters the encoder's last norm."""
    norm, decoder, entering = net.t5.encoder.final_layer_norm, net.t5.decoder, []
    normed, forward = norm.forward, decoder.forward

    def keep(hidden: Any) -> Any:
        entering[:] = [hidden]
        return normed(hidden)
    norm.forward = keep
    decoder.forward = lambda ids, mask, encoded, *rest: forward(ids, mask, entering[0], *rest)


def projecting(function: Callable[[Any, Any], Any]) -> Break:
    """Logits as ``function(net, hidden)``."""
    def break_net(names: Names, net: Any) -> None:
        net.project = lambda hidden: function(net, hidden)
    return break_net


def by_words(net: Any, hidden: Any) -> Any:
    return paddle.matmul(hidden, net.t5.shared.weight, transpose_y=True)


def shifting(function: Function) -> Break:
    """What the decoder reads, made of the labels alone."""
    def break_net(names: Names, net: Any) -> None:
        net.shift_right = function
    return break_net


def shifted_left(labels: Any) -> Any:
    return paddle.concat([labels[:, 1:], paddle.zeros_like(labels[:, :1])], axis=1).clip(min=0)


def divided_by_all(names: Names, net: Any) -> None:
    during(net, models.t5, "cross_entropy", lambda original: mean_over_all)


FAULTS = tuple(fault for group, names in (
    (wrong_weights, ENCODER), (wrong_weights_of_positions, ENCODER), (wrong_weights_of_the_decoder, DECODER),
    (wrong_code, ENCODER), (wrong_attention, ENCODER), (wrong_attention_of_the_decoder, DECODER),
    (wrong_positions, ENCODER), (wrong_positions_of_the_decoder, DECODER), (wrong_head, DECODER),
    (wrong_config, ENCODER), (wrong_loss, DECODER), (wrong_with_one_table, ONE_TABLE))
    for faults in group(names) for fault in faults)
