"""BLOOM (Le Scao et al. 2022): no positions but a bias on the scores (alibi), query, key and value in one matrix.

Numerically what transformers' ``modeling_bloom`` computes with eager attention. Ids and masks are int64
[batch, time]; hidden states are float32 [batch, time, hidden_size].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F
from paddle.nn.initializer import Normal

from .activation import activation
from .attention import attend, causal_mask, heads_first
from .cache import KeyValue, behind, run_blocks, seen, with_pasts
from .config import Config, refuse_uneven_heads
from .heads import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification, WithHead, head_weight
from .layer import Embedding, LayerNorm, LMHead, linear
from .pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class BloomConfig(Config):
    """``config.json`` of BLOOM with the defaults of transformers."""

    aliases: ClassVar[Mapping[str, str]] = {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    pretraining_tp: int = 1
    slow_but_exact: bool = False

    def __post_init__(self):
        refuse_uneven_heads("bloom", self, "hidden_size", "n_head")

    @property
    def sums_slices(self) -> bool:
        """Whether transformers adds up slices of two products, and in doing so leaves out their biases."""
        return self.pretraining_tp > 1 and self.slow_but_exact

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout


class BloomProjection(nn.Linear):
    """The linear in front of a residual, [inputs, outputs]."""

    def __init__(self, config: BloomConfig, inputs: int, outputs: int):
        super().__init__(inputs, outputs, paddle.ParamAttr(initializer=Normal(0.0, config.initializer_range)))
        self.adds_bias = not config.sums_slices

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias if self.adds_bias else None)


class BloomAttention(nn.Layer):
    def __init__(self, config: BloomConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.n_head
        self.query_key_value = linear(width, 3 * width, config.initializer_range)
        self.dense = BloomProjection(config, width, width)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(
        self, hidden: Tensor, mask: Tensor, alibi: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        query, key, value = (heads_first(part) for part in split_fused(self.query_key_value(hidden), self.heads))
        key, value = behind(past, key, value)
        context = attend(query, key, value, mask, self.attention_dropout, bias=alibi)
        return self.dense(context), (key, value)


class BloomMLP(nn.Layer):
    def __init__(self, config: BloomConfig):
        super().__init__()
        width = config.hidden_size
        self.dense_h_to_4h = linear(width, 4 * width, config.initializer_range)
        self.gelu_impl = activation("gelu_new")
        self.dense_4h_to_h = BloomProjection(config, 4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(hidden)))


class BloomBlock(nn.Layer):
    def __init__(self, config: BloomConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = BloomAttention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = BloomMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.residual_is_normed = config.apply_residual_connection_post_layernorm

    def forward(
        self, hidden: Tensor, mask: Tensor, alibi: Tensor, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attention and MLP with a residual each, and the keys and values seen so far.

        The residual is what enters the norm, or what comes out of it.
        """
        normed = self.input_layernorm(hidden)
        attended, present = self.self_attention(normed, mask, alibi, past)
        hidden = self.dropout(attended) + (normed if self.residual_is_normed else hidden)
        normed = self.post_attention_layernorm(hidden)
        return self.dropout(self.mlp(normed)) + (normed if self.residual_is_normed else hidden), present


class BloomPretrained(Pretrained):
    config_class = BloomConfig


class BloomModel(BloomPretrained):
    def __init__(self, config: BloomConfig):
        super().__init__(config)
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, config.initializer_range)
        self.word_embeddings_layernorm = LayerNorm(width, config.layer_norm_epsilon)
        self.h = nn.LayerList([BloomBlock(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(width, config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        use_cache: bool = False,
    ) -> dict:
        """``last_hidden_state`` [batch, time, hidden_size], and ``past_key_values`` when ``use_cache``.

        ``past_key_values`` holds a (key, value) per block, each [batch, heads, past, width]; the mask, if given, then
        covers past and present.
        """
        offset, length = seen(past_key_values), input_ids.shape[1]

        hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        mask = causal_mask(attention_mask, length, offset + length, hidden.dtype)
        alibi = alibi_bias(attention_mask, self.config.n_head, offset + length, hidden.dtype)
        blocks = with_pasts(self.h, past_key_values)
        hidden, presents = run_blocks(blocks, hidden, mask, alibi, use_cache=use_cache)
        outputs = {"last_hidden_state": self.ln_f(hidden)}
        return outputs | {"past_key_values": presents} if use_cache else outputs

    def get_input_embeddings(self) -> Embedding:
        return self.word_embeddings


class BloomWithHead(WithHead, BloomPretrained):
    base_model_prefix, base_model_class = "bloom", BloomModel


class BloomForCausalLM(CausalLM, BloomWithHead):
    """PaddleNLP's head is always the word embeddings."""

    def __init__(self, config: BloomConfig):
        super().__init__(config)
        self.lm_head = LMHead(head_weight(config, self.get_input_embeddings()))


class BloomForSequenceClassification(SequenceClassification, BloomWithHead):
    pass


class BloomForTokenClassification(TokenClassification, BloomWithHead):
    pass


class BloomForQuestionAnswering(QuestionAnswering, BloomWithHead):
    """PaddleNLP has no such head."""


def split_fused(x: Tensor, heads: int) -> list[Tensor]:
    """Query, key and value, which lie side by side in every head: [batch, time, heads * 3 * width] -> three of
    [batch, time, heads, width].
    """
    width = x.shape[-1] // (3 * heads)
    return paddle.unbind(x.reshape([*x.shape[:-1], heads, 3, width]), axis=-2)


def alibi_bias(attention_mask: Tensor | None, heads: int, keys: int, dtype: paddle.dtype) -> Tensor:
    """slope of the head * number of real tokens before the key (Press et al. 2022): [batch or 1, heads, 1, keys].

    A query's own position would add one number to all of its scores, which softmax does not see.
    """
    real = paddle.ones([1, keys], dtype="int64") if attention_mask is None else (attention_mask != 0).astype("int64")
    before = (paddle.cumsum(real, axis=1) - 1) * real
    slopes = paddle.to_tensor(alibi_slopes(heads))
    return (slopes.reshape([1, heads, 1, 1]) * before.unsqueeze([1, 2]).astype("float32")).astype(dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """b, b^2, b^3, … with b = 2^(-8 / n) for the largest power of two n up to ``heads``; [heads] float32.

    The heads beyond n take every other slope of 2n heads: c, c^3, c^5, … with c = 2^(-8 / 2n). The bases are rounded
    to float32 first, as in transformers: 32 heads on, that has become 1e-6.
    """
    power_of_two = 2 ** math.floor(math.log2(heads))
    base, base_between = (np.float64(np.float32(2.0 ** (-8.0 / count))) for count in (power_of_two, 2 * power_of_two))
    slopes = [base**power for power in range(1, power_of_two + 1)]
    between = [base_between**power for power in range(1, 2 * (heads - power_of_two), 2)]
    return np.array(slopes + between, np.float32)
