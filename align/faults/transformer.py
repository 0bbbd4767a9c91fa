"""Faults that most nets of transformer blocks can have; a family's module takes those that it has, by their names."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import paddle

from .fault import Fault
from .names import LAST, MID, Names
from .planting import code, invisible, weights
from .wrong_nets import (
    Function,
    acting,
    attending,
    attention_twice,
    block_skipped,
    dropout_left_on,
    epsilon,
    half_precision_attention,
    heads,
    inverted,
    later_block_first,
    masking,
    padding_only,
    scaled_words,
    see_one_ahead,
    shallow,
    softmax_in_bf16,
    softmax_over_queries,
    unbiased_norm,
)
from .wrong_weights import (
    bf16,
    change,
    copy_row,
    element,
    every,
    exchange,
    fp16,
    int8,
    low_rank,
    noise,
    of_both,
    parts_in_order,
    permute_heads,
    permute_units,
    random_element,
    several,
    shift_layers,
    swap_rows,
    transpose,
    typical_element,
    unused_row,
    used_rows,
    whole_parts,
    without_head,
)

Faults = Iterator[list[Fault]]
HIDDEN = "lost in the rounding of the block's output, dozens of times the limit at the output of the linear"


# Weights ------------------------------------------------------------------------------------------------------------


def wrong_projections(n: Names) -> Faults:
    """Of q, k and v apart, all of them square."""
    middle, last, named = n.at(MID), n.at(LAST), n.named
    yield weights(n, "missed transpose of q", transpose(n.weight("q", MID)), middle, named(MID, "q"), "transposed")
    yield weights(n, "missed transpose of out", transpose(n.weight("out", LAST)), last, named(LAST, "out"),
                  "transposed")
    yield weights(n, "extra transpose of v", transpose(n.weight("v", 0)), n.at(0), named(0, "v"), "transposed")
    for kind, one, other, layer in (("q and k swapped", "q", "k", MID), ("k and v swapped", "k", "v", MID),
                                    ("q and v swapped", "q", "v", LAST)):
        yield weights(n, kind, exchange((n(one, layer), n(other, layer))), n.at(layer), named(layer, one, other),
                      "swapped")
    yield weights(n, "q, k, v in the order k, v, q", exchange((n("q", MID), n("k", MID)), (n("k", MID), n("v", MID))),
                  middle, named(MID, "q", "k", "v"), "swapped")
    yield weights(n, "heads permuted in q only", several(
        *(change(name, permute_heads(n, -1)) for name in n.parameters("q", MID))), middle, named(MID, "q"),
        also="permuted")
    yield weights(n, "one head zeroed", change(n.weight("out", MID), without_head(n)), middle, named(MID, "out"))
    yield invisible(n, "q x 2 with k / 2", several(
        *(change(name, lambda x: x * 2) for name in n.parameters("q", MID)),
        *(change(name, lambda x: x / 2) for name in n.parameters("k", MID))),
        named(MID, "q", "k"), "only their product enters the scores", also="scaled")


def heads_permuted_everywhere(n: Names) -> Faults:
    """Of a net whose heads have nothing of their own but their weights."""
    yield invisible(n, "heads permuted everywhere", several(
        *(change(name, permute_heads(n, -1)) for part in "qkv" for name in n.parameters(part, MID)),
        change(n.weight("out", MID), permute_heads(n, 0))), n.named(MID, "q", "k", "v", "out"),
        "heads are summed, in any order", also="permuted")


def fused_orders(n: Names) -> Faults:
    """Of one linear for q, k and v, whose rows go head by head."""
    for kind, turn in (("holds q, k, v one behind the other", whole_parts(n)),
                       ("k, v, q in each head", parts_in_order(n, 1, 2, 0)),
                       ("v and k swapped", parts_in_order(n, 0, 2, 1))):
        yield weights(n, kind, of_both(n("qkv", MID), turn), n.at(MID), (*n.named(MID, "qkv"), *n.attention(MID)),
                      "swapped", also="permuted")


def wrong_layers(n: Names) -> Faults:
    middle, last, anywhere = n.at(MID), n.at(LAST), f"{n.block.format('[0-9]')}.*"
    yield weights(n, "layers swapped", exchange((middle, last)), middle, (anywhere, middle, last), "layers")
    yield weights(n, "layers shifted by one", shift_layers(n), n.at(0), (anywhere, n.at(0)), "layers")


def wrong_norms(n: Names, late: str = "norm2") -> Faults:
    """``late`` is the last norm of a block."""
    middle, last = n.at(MID), n.at(LAST)
    yield weights(n, "layer norm x 1.0005", change(n.weight(late, LAST), lambda x: x * np.float32(1.0005)), last,
                  n.named(LAST, late), also="scaled")
    yield weights(n, "layer norm weight + 1", change(n.weight("norm", MID), lambda x: x + 1), middle,
                  n.named(MID, "norm"), also="added|norm variant")


def norms_exchanged(n: Names, explanation: str = "swapped") -> Faults:
    yield weights(n, "wrong layer norm placed", exchange((n("norm", MID), n("norm2", MID))), n.at(MID),
                  n.named(MID, "norm", "norm2"), explanation)


def wrong_biases(n: Names) -> Faults:
    middle, last = n.at(MID), n.at(LAST)
    yield weights(n, "layer norm bias dropped", change(n.bias("norm", MID), np.zeros_like), middle,
                  n.named(MID, "norm"), "bias missing", also="zeros")
    yield weights(n, "bias missing in the MLP", change(n.bias("up", MID), np.zeros_like), middle, n.named(MID, "up"),
                  "bias missing", also="zeros")
    yield weights(n, "MLP bias element off by 1e-4", change(n.bias("up", LAST), element(-1, lambda x: x + 1e-4)), last,
                  n.named(LAST, "up"), why=HIDDEN)


def bias_element(n: Names) -> Faults:
    yield weights(n, "bias element off by 1e-4", change(n.bias("down", LAST), element(7, lambda x: x + 1e-4)),
                  n.at(LAST), n.named(LAST, "down"))


def wrong_matrices(n: Names) -> Faults:
    middle, last, named = n.at(MID), n.at(LAST), n.named
    yield weights(n, "element changed by 1 %", change(n.weight("up", MID), typical_element(lambda x: x * 1.01)),
                  middle, named(MID, "up"))
    for seed in (2, 3):
        yield weights(n, f"late MLP element {seed} changed by 1 %", change(n.weight("up", LAST), random_element(
            seed, 1.01)), last, named(LAST, "up"), why=HIDDEN)
    yield weights(n, "matrix rounded to fp16", change(n.weight("down", LAST), fp16), last, named(LAST, "down"),
                  "rounded to fp16")
    yield weights(n, "NaN in one weight", change(n.weight("down", MID), element(11, lambda value: math.nan)), middle,
                  named(MID, "down"), also="not finite")
    yield weights(n, "weight zeroed", change(n.weight("out", MID), np.zeros_like), middle,
                  (*named(MID, "out"), n("attn", MID)), also="zeros|branch")
    yield weights(n, "hidden units permuted on one side", change(n.weight("up", MID), permute_units(1, 8)), middle,
                  named(MID, "up"), also="permuted")
    yield invisible(n, "one ulp in one element", change(n.weight("up", LAST), element(5, lambda value: np.nextafter(
        value, np.float32(np.inf)))), named(LAST, "up"), "below the rounding of any sum it enters")


def wrong_numbers_in_projections(n: Names) -> Faults:
    """Of q, k and v apart."""
    middle, last, named = n.at(MID), n.at(LAST), n.named
    yield weights(n, "matrix rounded to bf16", change(n.weight("k", MID), bf16), middle, named(MID, "k"),
                  "rounded to bf16")
    yield weights(n, "weight negated", change(n.weight("v", LAST), np.negative), last, named(LAST, "v"), also="sign")
    yield weights(n, "matrix quantised to int8", change(n.weight("v", MID), int8), middle, named(MID, "v"))
    yield weights(n, "noise 1e-5 added to v", change(n.weight("v", LAST), noise(1e-5)), last, named(LAST, "v"))
    yield weights(n, "low-rank perturbation", change(n.weight("q", LAST), low_rank(1e-3)), last, named(LAST, "q"))


def units_permuted(n: Names, *up: str) -> Faults:
    """``up`` are the linears into the MLP's hidden units."""
    yield invisible(n, "MLP units permuted on both sides", several(
        *(change(name, permute_units(-1)) for part in up for name in n.parameters(part, MID)),
        change(n.weight("down", MID), permute_units(0))), n.named(MID, *up, "down"), "units are summed, in any order",
        also="permuted")


def wrong_words(n: Names, *places: str) -> Faults:
    """``places`` may be named besides the table itself."""
    expected = (n.words, n.words.removesuffix(".weight"), *places)
    yield weights(n, "model rounded to bf16", every(n, bf16), n.embedding, ("*",), "rounded to bf16")
    yield weights(n, "embedding rows swapped", used_rows(n, swap_rows), n.embedding, expected, also="permuted")
    yield weights(n, "wrong vocabulary row", used_rows(n, copy_row), n.embedding, expected)
    yield weights(n, "embedding scaled", change(n.words, lambda x: x * np.float32(1.01)), n.embedding, expected,
                  also="scaled|embedding scale")


def unused_word(n: Names) -> Faults:
    yield invisible(n, "embedding row that no input uses", unused_row(n), (n.words,), "nobody looks it up")


# Code ---------------------------------------------------------------------------------------------------------------


def activation(n: Names, kind: str, function: Function | str, layer: int = MID, explanation: str | None = "activation"
               ) -> list[Fault]:
    return code(n, kind, acting(layer, function), n.at(layer), n.acting(layer), explanation)


def clipped(n: Names, own: Function) -> list[Fault]:
    """``own`` is the right activation."""
    return activation(n, "activations clipped at 3", lambda x: paddle.clip(own(x), max=3.0), explanation=None)


def wrong_epsilons(n: Names, late: str = "norm2", near: float = 1e-12) -> Faults:
    """``late`` is the last norm of a block, ``near`` an epsilon that is 1e-5 or less away from the right one."""
    yield code(n, "epsilon of a late block", epsilon(LAST, late, near), n.at(LAST), n.named(LAST, late), "epsilon",
               why="1e-5 of the variance or less: hidden by large activations, shown by small ones")
    yield code(n, "epsilon 1e-3 in one block", epsilon(MID, late, 1e-3), n.at(MID), n.named(MID, late), "epsilon")


def norm_of_n_minus_1(n: Names) -> Faults:
    yield code(n, "layer norm divides by n - 1", unbiased_norm, n.at(MID), n.named(MID, "norm"), "norm variant")


def wrong_scores(n: Names) -> Faults:
    for kind, variant, explanation, also in (
        ("scale off by 1e-4", dict(scale=lambda width: 1.0001 * width**-0.5), "scale", None),
        ("scale missing", dict(scale=lambda width: 1.0), "scale", None),
        ("scale 1 / width", dict(scale=lambda width: 1 / width), "scale", None),
        ("softmax in bf16", dict(softmax=softmax_in_bf16), None, "softmax"),
        ("softmax over the queries", dict(softmax=softmax_over_queries), "softmax", None),
        ("a temperature for each head", dict(temperature=0.01), None, None),
        ("mask of -10 on one row", dict(masked=shallow), "mask value", None),
        ("mask inverted", dict(masked=inverted), "mask polarity", None),
    ):
        yield code(n, kind, attending(MID, **variant), n.at(MID), n.attention(MID), explanation, also=also)


def wrong_causal_masks(n: Names) -> Faults:
    for kind, function, explanation in (("mask missing", paddle.zeros_like, "no mask"),
                                        ("causal mask missing", padding_only, "causal"),
                                        ("causal mask one too far", see_one_ahead, "causal offset")):
        yield code(n, kind, attending(MID, masked=function), n.at(MID), n.attention(MID), explanation)


def padding_ignored(n: Names, function: str, mask: Function, explanation: str = "padding") -> Faults:
    """``mask`` of what ``function`` makes for the whole net."""
    yield code(n, "padding ignored", masking(function, mask), n.at(0), n.attention(0), explanation)


def wrong_heads(n: Names) -> Faults:
    yield code(n, "heads halved", heads(n.heads // 2), n.at(MID), n.attention(MID), "heads")
    yield code(n, "heads doubled", heads(n.heads * 2), n.at(MID), n.attention(MID), "heads")


def dropout(n: Names, path: str, share: float, *places: str, explanation: str | None = "dropout") -> list[Fault]:
    """Left on at ``path`` below the block; ``places`` may be named besides the block's wiring."""
    return code(n, f"dropout {share:g} left on", dropout_left_on(path, share), n.at(MID), (*n.wiring(MID), *places),
                explanation)


def wrong_wiring(n: Names, *places: str) -> Faults:
    """``places`` may be named besides the table of words."""
    middle, wiring = n.at(MID), n.wiring(MID)
    yield code(n, "attention added twice", attention_twice, middle, (*wiring, n("attn", MID), n("out", MID)),
               "branch scale")
    yield code(n, "attention rounded to fp16", half_precision_attention, middle, (*wiring, n("attn", MID)))
    yield code(n, "blocks run in the wrong order", later_block_first, middle, (*wiring, *n.wiring(LAST)),
               why="each block by itself is right")
    yield code(n, "block skipped", block_skipped, middle, wiring, "skipped")
    yield code(n, "words times the root of the width", scaled_words, n.embedding,
               (n.embedding, n.words.removesuffix(".weight"), f"{n.embedding}: *"), "embedding scale")
