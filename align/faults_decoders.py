"""Faults of OPT and BLOOM: those that every family has, and those of their own: positions and norms, alibi and fused
rows. See :mod:`align.faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from .faults import (
    HEADS,
    LAST,
    MID,
    Break,
    Edit,
    Fault,
    Names,
    _words,
    _wrong_weights,
    acting,
    at_positions,
    attending,
    attention_twice,
    backbone,
    bf16,
    block_skipped,
    blocks,
    causal_only,
    change,
    code,
    config,
    counted_without_padding,
    dropout_left_on,
    element,
    epsilon,
    every,
    exchange,
    fp16,
    half_precision_block,
    heads,
    in_checkpoint,
    in_config,
    int8,
    inverted,
    invisible,
    last_is_next,
    later_block_first,
    low_rank,
    noise,
    padding_of,
    padding_only,
    permute_units,
    scaled_embedding,
    see_one_ahead,
    several,
    shallow,
    shift_layers,
    softmax_in_bf16,
    softmax_over_queries,
    together,
    transpose,
    typical_element,
    unbiased_norm,
    unused_row,
    weights,
)

OPT = Names("opt", "opt.decoder.layers.{}", dict(
    attn="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    up="linear1", down="linear2", norm="norm1", norm2="norm2"), "opt.embeddings.word_embeddings.weight",
    "opt.embeddings.word_embeddings", "logits", {"lm_head.decoder_weight": "opt.embeddings.word_embeddings.weight"},
    "activation")
BLOOM = Names("bloom", "bloom.h.{}", dict(
    attn="self_attention", qkv="self_attention.query_key_value", out="self_attention.dense", up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h", norm="input_layernorm", norm2="post_attention_layernorm"), "bloom.word_embeddings.weight",
    "bloom.word_embeddings", "logits", {}, "mlp.gelu_impl")


def _wrong_code(n: Names) -> Iterator[list[Fault]]:
    """What a decoder of two norms and two residuals may compute otherwise."""
    first, middle, last, attention = n.at(0), n.at(MID), n.at(LAST), n.attention(MID)
    yield code(n, "quick gelu", acting(MID, "quick_gelu"), middle, n.acting(MID), "activation")
    yield code(n, "tanh", acting(LAST, "tanh"), last, n.acting(LAST), "activation")
    yield code(n, "activations clipped at 3", acting(MID, lambda x: paddle.clip(paddle.nn.functional.silu(x), max=3.0)),
               middle, n.acting(MID))
    norm = n.parts["norm2"]
    yield code(n, "epsilon of a late block", epsilon(LAST, norm, 1e-12), last, n.named(LAST, "norm2"), "epsilon",
               why="1e-5 of the variance: hidden by large activations, shown by small ones")
    yield code(n, "epsilon 1e-3 in one block", epsilon(MID, norm, 1e-3), middle, n.named(MID, "norm2"), "epsilon")
    yield code(n, "layer norm divides by n - 1", unbiased_norm, middle, n.named(MID, "norm"), "norm variant")
    for kind, variant, explanation in (
        ("scale off by 1e-4", dict(scale=lambda width: 1.0001 * width**-0.5), "scale"),
        ("scale missing", dict(scale=lambda width: 1.0), "scale"),
        ("scale 1 / width", dict(scale=lambda width: 1 / width), "scale"),
        ("softmax in bf16", dict(softmax=softmax_in_bf16), None),
        ("softmax over the queries", dict(softmax=softmax_over_queries), "softmax"),
        ("a temperature for each head", dict(temperature=0.01), None),
        ("mask of -10 on one row", dict(masked=shallow), "mask value"),
        ("mask inverted", dict(masked=inverted), "mask polarity"),
        ("mask missing", dict(masked=paddle.zeros_like), "no mask"),
        ("causal mask missing", dict(masked=padding_only), "causal"),
        ("causal mask one too far", dict(masked=see_one_ahead), "causal offset"),
    ):
        yield code(n, kind, attending(MID, **variant), middle, attention, explanation,
                   also=None if explanation else "softmax")
    yield code(n, "padding ignored", padding_of(causal_only), first, n.attention(0), "padding")
    dropped = (*n.wiring(MID), *n.named(MID, "attn", "norm2", "out"), f"{middle} dropout")
    yield code(n, "dropout 0.1 left on", dropout_left_on(0.1), middle, dropped)
    yield code(n, "attention added twice", attention_twice, middle, (*n.wiring(MID), *n.named(MID, "attn", "out")),
               "branch scale")
    yield code(n, "attention rounded to fp16", half_precision_block, middle, (*n.wiring(MID), *n.named(MID, "attn")))
    yield code(n, "blocks run in the wrong order", later_block_first, middle, (*n.wiring(MID), *n.wiring(LAST)),
               why="each block by itself is right")
    yield code(n, "block skipped", block_skipped, middle, n.wiring(MID), "skipped")
    yield code(n, "words times the root of the width", scaled_embedding, n.embedding,
               (n.embedding, f"{n.embedding} *", f"{n.embedding}: *"), "embedding scale")


def _opt() -> Iterator[list[Fault]]:
    n = OPT
    first, middle = n.at(0), n.at(MID)
    table = "opt.embeddings.position_embeddings"
    positions, final = (table, f"{table}*"), ("opt.decoder.final_layer_norm*",)
    placed = (*n.wiring(MID), *n.named(MID, "norm", "norm2"))
    yield code(n, "other gelu", acting(MID, "gelu_new"), middle, n.acting(MID), "activation")
    yield code(n, "norms behind", norms_behind, middle, placed, "norm placed")
    yield code(n, "heads halved", heads(HEADS // 2), middle, n.attention(MID), "heads")
    yield code(n, "heads doubled", heads(HEADS * 2), middle, n.attention(MID), "heads")
    yield code(n, "position offset 0", offset(0), table, positions, "position")
    yield code(n, "position offset 1", offset(1), table, positions, "position")
    yield code(n, "positions counted over padding too", at_positions(lambda plain, mask: plain), table, positions,
               "position")
    yield code(n, "last position off by one", at_positions(lambda plain, mask: last_is_next(
        counted_without_padding(plain, mask), mask)), table, positions, "position")
    yield code(n, "final norm missing", without("decoder.final_layer_norm"), "opt.decoder.final_layer_norm", final,
               "norm missing")
    yield weights(n, "positions shifted in the table", change(f"{table}.weight", lambda x: np.roll(x, 1, axis=0)),
                  table, positions, "position", also="permuted")
    yield weights(n, "final norm x 1.0005", change("opt.decoder.final_layer_norm.weight", lambda x: x * np.float32(
        1.0005)), "opt.decoder.final_layer_norm", final, also="scaled")
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), n("norm2", MID))), middle,
                  n.named(MID, "norm", "norm2"), "swapped")
    yield weights(n, "bias missing in q", change(n.bias("q", MID), np.zeros_like), middle, n.named(MID, "q"),
                  "bias missing", also="zeros")
    stale = together(in_config(tie_word_embeddings=False), in_checkpoint(
        change("lm_head.decoder_weight", noise(1e-3)), n))
    yield [Fault("head is an older copy", "opt", "checkpoint", "file, tie_word_embeddings=False", stale, "logits",
                 frozenset({"lm_head*", "logits*"}), _words("untied"), also=_words("permuted") or frozenset())]
    yield invisible(n, "key bias changed", change(n.bias("k", MID), lambda x: x + 1), n.named(MID, "k"),
                    "a constant on each row of the scores", also="added")
    yield invisible(n, "embedding row that no input uses", unused_row(n), (n.words,), "nobody looks it up")
    yield invisible(n, "position row that no input uses", change(f"{table}.weight", element(0, lambda x: x + 1)),
                    positions, "row 0 is nobody's: padding reads row 1, the first token row 2")
    yield config(n, "gelu of the config", first, n.acting(0), "activation", activation_function="gelu")
    yield config(n, "heads of the config halved", first, n.attention(0), "heads", num_attention_heads=HEADS // 2)


def _bloom() -> Iterator[list[Fault]]:
    n = BLOOM
    first, middle, last, named = n.at(0), n.at(MID), n.at(LAST), n.named
    embedded = "bloom.word_embeddings_layernorm"
    ways = {"holds q, k, v one behind the other": whole_parts, "k, v, q in each head": in_order(1, 2, 0),
            "v and k swapped": in_order(0, 2, 1)}
    for kind, turn in ways.items():
        yield weights(n, kind, of_both(n("qkv", MID), turn), middle, (*named(MID, "qkv"), *n.attention(MID)), "swapped",
                      also="permuted")
    yield weights(n, "heads permuted everywhere", several(of_both(n("qkv", MID), heads_in_order(2, 0, 3, 1)), change(
        n.weight("out", MID), lambda x: x.reshape(HEADS, -1, x.shape[1])[[2, 0, 3, 1]].reshape(x.shape))), middle,
        ("*",), why="each head has its own slope, so that here their order matters", also="permuted")
    yield weights(n, "missed transpose of dense", transpose(n.weight("out", MID)), middle, named(MID, "out"),
                  "transposed")
    anywhere = (f"{n.block.format('[0-9]')}.*",)
    yield weights(n, "layers swapped", exchange((middle, last)), middle, (*anywhere, middle, last), "layers")
    yield weights(n, "layers shifted by one", shift_layers(n), first, (*anywhere, first), "layers")
    yield weights(n, "layer norm x 1.0005", change(n.weight("norm2", LAST), lambda x: x * np.float32(1.0005)), last,
                  named(LAST, "norm2"), also="scaled")
    yield weights(n, "layer norm weight + 1", change(n.weight("norm", MID), lambda x: x + 1), middle,
                  named(MID, "norm"), also="added|norm variant")
    for part, layer in (("norm", MID), ("up", MID), ("qkv", LAST), ("out", MID)):
        yield weights(n, f"bias missing in {n.parts[part]}", change(n.bias(part, layer), np.zeros_like), n.at(layer),
                      named(layer, part), "bias missing", also="zeros")
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), n("norm2", MID))), middle,
                  named(MID, "norm", "norm2"), "swapped")
    yield weights(n, "bias element off by 1e-4", change(n.bias("down", LAST), element(7, lambda x: x + 1e-4)), last,
                  named(LAST, "down"))
    yield weights(n, "element changed by 1 %", change(n.weight("qkv", MID), typical_element(lambda x: x * 1.01)),
                  middle, named(MID, "qkv"))
    for kind, part, function, words in (
            ("rounded to fp16", "down", fp16, "rounded to fp16"), ("rounded to bf16", "qkv", bf16, "rounded to bf16"),
            ("quantised to int8", "up", int8, None), ("with noise of 1e-5", "qkv", noise(1e-5), None),
            ("with a low-rank perturbation", "out", low_rank(1e-3), None)):
        yield weights(n, f"matrix {kind}", change(n.weight(part, LAST), function), last, named(LAST, part), words)
    yield weights(n, "model rounded to bf16", every(bf16), n.embedding, ("*",), "rounded to bf16")
    yield weights(n, "norm of the words x 1.0005", change(f"{embedded}.weight", lambda x: x * np.float32(1.0005)),
                  embedded, (f"{embedded}*",), also="scaled")
    yield invisible(n, "key bias changed", change(n.bias("qkv", MID), keys_plus_one), named(MID, "qkv"),
                    "a constant on each row of the scores", also="added")
    yield invisible(n, "MLP units permuted on both sides", several(
        change(n.weight("up", MID), permute_units(1)), change(n.bias("up", MID), permute_units(0)),
        change(n.weight("down", MID), permute_units(0))), named(MID, "up", "down"), "units are summed, in any order",
        also="permuted")
    yield invisible(n, "embedding row that no input uses", unused_row(n), (n.words,), "nobody looks it up")

    for kind, make in (("missing", lambda bias, mask: bias * 0), ("twice as steep", lambda bias, mask: bias * 2),
                       ("growing with the distance", lambda bias, mask: -bias),
                       ("through the heads backwards", lambda bias, mask: bias.flip(1))):
        yield code(n, f"alibi {kind}", with_alibi(MID, make), middle, n.attention(MID), "alibi")
    yield code(n, "gelu with erf", acting(MID, "gelu"), middle, n.acting(MID), "activation")
    yield code(n, "residual after the norm", residual_after_the_norm, middle,
               (*n.wiring(MID), *named(MID, "norm", "norm2")), "norm placed")
    yield code(n, "final norm missing", without("ln_f"), "bloom.ln_f", ("bloom.ln_f*",), "norm missing")
    yield code(n, "norm of the words missing", without("word_embeddings_layernorm"), embedded, (f"{embedded}*",),
               "norm missing")
    yield config(n, "epsilon of the config", embedded, (f"{embedded}*", *named(0, "norm")), "epsilon",
                 layer_norm_epsilon=1e-3)
    yield config(n, "residual of the config", first, (*n.wiring(0), *named(0, "norm", "norm2")), "norm placed",
                 apply_residual_connection_post_layernorm=True)
    yield config(n, "heads of the config halved", first, n.attention(0), "heads", n_head=HEADS // 2)
    yield config(n, "heads of the config doubled", first, n.attention(0), "heads", n_head=HEADS * 2)
    yield config(n, "slices of the config", first, (*n.wiring(0), *named(0, "out", "down")), pretraining_tp=2,
                 slow_but_exact=True)


# Planting -----------------------------------------------------------------------------------------------------------

def norms_behind(net: Any) -> None:
    blocks(net)[MID].norms_before = False


def residual_after_the_norm(net: Any) -> None:
    blocks(net)[MID].residual_is_normed = True


def offset(rows: int) -> Break:
    """Another number of rows of the table of positions before the first token's."""
    def break_net(net: Any) -> None:
        net.opt.embeddings.position_embeddings.offset = rows
    return break_net


def without(path: str) -> Break:
    """A norm of the backbone that gives back its input."""
    def break_net(net: Any) -> None:
        layer = backbone(net)
        for name in path.split("."):
            layer = getattr(layer, name)
        layer.forward = lambda x: x
    return break_net


def with_alibi(layer: int, make: Callable[[Any, Any], Any]) -> Break:
    """Another bias in one block: ``make(bias, mask)``."""
    def break_net(net: Any) -> None:
        attention = blocks(net)[layer].self_attention
        forward = attention.forward
        attention.forward = lambda hidden, mask, alibi, past: forward(hidden, mask, make(alibi, mask), past)
    return break_net


def of_both(module: str, turn: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """``turn`` of the columns of a fused linear's weight, [in, out], and of its bias."""
    return several(*(change(f"{module}.{kind}", turn) for kind in ("weight", "bias")))


def whole_parts(array: np.ndarray) -> np.ndarray:
    """Head by head becomes all of q, all of k, all of v."""
    return np.moveaxis(_by_head(array), -2, -3).reshape(array.shape)


def in_order(*order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: _by_head(array)[..., list(order), :].reshape(array.shape)


def heads_in_order(*order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: _by_head(array)[..., list(order), :, :].reshape(array.shape)


def keys_plus_one(bias: np.ndarray) -> np.ndarray:
    changed = _by_head(bias).copy()
    changed[..., 1, :] += 1
    return changed.reshape(bias.shape)


def _by_head(array: np.ndarray) -> np.ndarray:
    """[…, out] -> […, heads, 3, width]."""
    return array.reshape(*array.shape[:-1], HEADS, 3, -1)


FAULTS: tuple[Fault, ...] = tuple(fault for group in (_wrong_weights(OPT), _wrong_code(OPT), _opt(), _bloom(),
                                                      _wrong_code(BLOOM)) for faults in group for fault in faults)
