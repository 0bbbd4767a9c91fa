"""GPT-J (Wang and Komatsuzaki 2021): rotary positions, attention and MLP side by side on one layer norm.

Numerically what transformers' ``modeling_gptj`` computes with eager attention. Ids and masks are int64
[batch, time]; hidden states are float32 [batch, time, n_embd].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from .activation import activation
from .attention import attend, causal_mask, heads_first, split_heads
from .cache import KeyValue, behind, run_blocks, seen, with_pasts
from .config import Config, refuse_uneven_heads
from .heads import CausalLM, QuestionAnswering, SequenceClassification, WithHead
from .layer import Embedding, LayerNorm, VocabularyLinear, linear
from .pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class GPTJConfig(Config):
    """``config.json`` of GPT-J, defaults of transformers; ``rotary_dim`` None turns the whole head."""

    aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int | None = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self):
        refuse_uneven_heads("gptj", self, "n_embd", "n_head")


class GPTJAttention(nn.Layer):
    def __init__(self, config: GPTJConfig):
        super().__init__()
        width, std = config.n_embd, config.initializer_range
        self.heads = config.n_head
        self.q_proj = linear(width, width, std, bias=False)
        self.k_proj = linear(width, width, std, bias=False)
        self.v_proj = linear(width, width, std, bias=False)
        self.out_proj = linear(width, width, std, bias=False)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden: Tensor, mask: Tensor, sin: Tensor, cos: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        query = heads_first(rotate(split_heads(self.q_proj(hidden), self.heads), sin, cos))
        key = heads_first(rotate(split_heads(self.k_proj(hidden), self.heads), sin, cos))
        value = heads_first(split_heads(self.v_proj(hidden), self.heads))
        key, value = behind(past, key, value)
        context = attend(query, key, value, mask, self.attn_dropout)
        return self.resid_dropout(self.out_proj(context)), (key, value)


class GPTJMLP(nn.Layer):
    def __init__(self, config: GPTJConfig):
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.fc_in = linear(config.n_embd, inner, config.initializer_range)
        self.act = activation(config.activation_function)
        self.fc_out = linear(inner, config.n_embd, config.initializer_range)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.fc_out(self.act(self.fc_in(hidden))))


class GPTJBlock(nn.Layer):
    def __init__(self, config: GPTJConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPTJAttention(config)
        self.mlp = GPTJMLP(config)

    def forward(
        self, hidden: Tensor, mask: Tensor, sin: Tensor, cos: Tensor, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """hidden + attention(norm(hidden)) + mlp(norm(hidden)), and the keys and values seen so far."""
        normed = self.ln_1(hidden)
        attended, present = self.attn(normed, mask, sin, cos, past)
        return attended + self.mlp(normed) + hidden, present


class GPTJPretrained(Pretrained):
    config_class = GPTJConfig
    unused_buffers = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


class GPTJModel(GPTJPretrained):
    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd, config.initializer_range)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.LayerList([GPTJBlock(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        use_cache: bool = False,
    ) -> dict:
        """``last_hidden_state`` [batch, time, n_embd], and ``past_key_values`` when ``use_cache``.

        ``past_key_values`` holds a (key, value) per block, each [batch, heads, past, width]; the mask, if
        given, then covers past and present. Positions continue after the past and do not depend on the mask.
        """
        offset, length = seen(past_key_values), input_ids.shape[1]
        if position_ids is None:
            position_ids = paddle.arange(offset, offset + length).unsqueeze(0)

        hidden = self.drop(self.embed(input_ids, token_type_ids))
        mask = causal_mask(attention_mask, length, offset + length, hidden.dtype)
        sin, cos = self.rotary(position_ids)
        blocks = with_pasts(self.h, past_key_values)
        hidden, presents = run_blocks(blocks, hidden, mask, sin, cos, use_cache=use_cache)
        outputs = {"last_hidden_state": self.ln_f(hidden)}
        return outputs | {"past_key_values": presents} if use_cache else outputs

    def get_input_embeddings(self) -> Embedding:
        return self.wte

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token types are rows of the token embedding, as in transformers."""
        tokens = self.wte(input_ids)
        return tokens if token_type_ids is None else tokens + self.wte(token_type_ids)

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """sin and cos of every angle, each [batch or 1, time, 1, rotary_dim / 2]."""
        width = self.config.rotary_dim or self.config.n_embd // self.config.n_head
        table = F.embedding(position_ids, rotary_table(self.config.n_positions, width))
        return paddle.split(table.unsqueeze(2), 2, axis=-1)


class GPTJWithHead(WithHead, GPTJPretrained):
    base_model_prefix, base_model_class = "transformer", GPTJModel


class GPTJForCausalLM(CausalLM, GPTJWithHead):
    """The head has a bias, tied or not."""

    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        tied = config.tie_word_embeddings
        self.lm_head = VocabularyLinear(self.transformer.wte.weight) if tied else self.head_linear(config.vocab_size)


class GPTJForSequenceClassification(SequenceClassification, GPTJWithHead):
    pass


class GPTJForQuestionAnswering(QuestionAnswering, GPTJWithHead):
    """As wide as there are labels, as in transformers and PaddleNLP, where it too runs with two of them only."""

    @property
    def scores(self) -> int:
        return self.config.num_labels


def rotary_table(positions: int, width: int) -> Tensor:
    """sin and cos of position / 10000^(2i / width) (Su et al. 2021), side by side: [positions, width].

    In float32 and with Paddle's own power, whose bits are torch's. numpy's power is one unit in the last
    place off, which a position of 2,000 turns into 1e-4 in the sine.
    """
    frequencies = 1.0 / 10000 ** (paddle.arange(0, width, 2, dtype="float32") / width)
    angles = paddle.outer(paddle.arange(positions, dtype="float32"), frequencies)
    return paddle.concat([paddle.sin(angles), paddle.cos(angles)], axis=-1)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn each pair of neighbours (2i, 2i + 1) by its angle; channels beyond the angles pass unchanged.

    x [batch, time, heads, width], sin and cos [batch or 1, time, 1, pairs].
    """
    turning = 2 * sin.shape[-1]
    even, odd = x[..., 0:turning:2], x[..., 1:turning:2]
    turned = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).flatten(-2)
    return turned if turning == x.shape[-1] else paddle.concat([turned, x[..., turning:]], axis=-1)
