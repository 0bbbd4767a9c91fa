"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, a head that shares the word embeddings.

Numerically what transformers' ``modeling_gpt2`` computes with eager attention; names are those of PaddleNLP's GPT.
Ids and masks are int64 [batch, time]; hidden states are float32 [batch, time, n_embd].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import paddle
from paddle import Tensor, nn

from convert.errors import BadInput

from .activation import activation
from .attention import attend, check_length, heads_first, split_heads
from .cache import KeyValue, behind, run_blocks, seen, with_pasts
from .config import Config, refuse_uneven_heads
from .heads import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification, WithHead, head_weight
from .layer import Embedding, LayerNorm, VocabularyLinear, linear
from .pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """``config.json`` of GPT-2 with the defaults of transformers.

    ``reorder_and_upcast_attn`` scales the queries before the product instead of the scores after it, and computes both
    in float32: the same numbers, so this net, which is float32 anyway, does not ask for it.
    """

    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    pruned_heads: dict = field(default_factory=dict)

    def __post_init__(self):
        refuse_uneven_heads("gpt2", self, "n_embd", "n_head")
        if self.add_cross_attention or self.pruned_heads:
            raise BadInput("gpt2: add_cross_attention and pruned_heads are not supported.")

    @property
    def inner(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def head_dropout(self) -> float:
        return next((rate for rate in (self.classifier_dropout, self.hidden_dropout) if rate is not None), 0.1)

    def scores_divisor(self, layer: int) -> float:
        """What the scores of ``layer``, counted from 0, are divided by: sqrt(width of a head), layer + 1, or both."""
        width = math.sqrt(self.n_embd // self.n_head) if self.scale_attn_weights else 1.0
        return width * (layer + 1) if self.scale_attn_by_inverse_layer_idx else width

    @property
    def residual_std(self) -> float:
        """Initial spread of what adds to the residual stream: there are 2 n_layer such sums (Radford et al., 2.3)."""
        return self.initializer_range / math.sqrt(2 * self.n_layer)


class GPT2Embeddings(nn.Layer):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.n_embd, config.initializer_range)
        self.position_embeddings = Embedding(config.n_positions, config.n_embd, config.initializer_range)
        self.dropout = nn.Dropout(config.embd_pdrop)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token types are rows of the word embeddings, as in transformers."""
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        if token_type_ids is not None:
            embedded = embedded + self.word_embeddings(token_type_ids)
        return self.dropout(embedded)


class GPT2Attention(nn.Layer):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        width, std = config.n_embd, config.initializer_range
        self.heads = config.n_head
        self.divisor = config.scores_divisor(layer)
        self.q_proj = linear(width, width, std)
        self.k_proj = linear(width, width, std)
        self.v_proj = linear(width, width, std)
        self.out_proj = linear(width, width, config.residual_std)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)

    def forward(self, hidden: Tensor, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        query, key, value = (
            heads_first(split_heads(project(hidden), self.heads))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = behind(past, key, value)
        return self.out_proj(attend(query, key, value, mask, self.attn_dropout, self.divisor)), (key, value)


class GPT2Block(nn.Layer):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.norm1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.self_attn = GPT2Attention(config, layer)
        self.dropout1 = nn.Dropout(config.resid_pdrop)
        self.norm2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.linear1 = linear(config.n_embd, config.inner, config.initializer_range)
        self.activation = activation(config.activation_function)
        self.linear2 = linear(config.inner, config.n_embd, config.residual_std)
        self.dropout2 = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden: Tensor, mask: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """h = hidden + attention(norm1(hidden)), then h + mlp(norm2(h)); and the keys and values seen so far."""
        attended, present = self.self_attn(self.norm1(hidden), mask, past)
        hidden = hidden + self.dropout1(attended)
        return hidden + self.dropout2(self.linear2(self.activation(self.linear1(self.norm2(hidden))))), present


class GPT2Decoder(nn.Layer):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.layers = nn.LayerList([GPT2Block(config, number) for number in range(config.n_layer)])
        self.norm = LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(
        self, hidden: Tensor, mask: Tensor, past: Sequence[KeyValue] | None, use_cache: bool
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        hidden, presents = run_blocks(with_pasts(self.layers, past), hidden, mask, use_cache=use_cache)
        return self.norm(hidden), presents


class GPT2Pretrained(Pretrained):
    config_class = GPT2Config


class GPT2Model(GPT2Pretrained):
    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.embeddings = GPT2Embeddings(config)
        self.decoder = GPT2Decoder(config)

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

        embedded = self.embeddings(input_ids, position_ids, token_type_ids)
        mask = causal_and_padding_mask(attention_mask, length, offset + length, embedded.dtype)
        hidden, presents = self.decoder(embedded, mask, past_key_values, use_cache)
        outputs = {"last_hidden_state": hidden}
        return outputs | {"past_key_values": presents} if use_cache else outputs

    def get_input_embeddings(self) -> Embedding:
        return self.embeddings.word_embeddings


class GPT2WithHead(WithHead, GPT2Pretrained):
    base_model_prefix, base_model_class = "gpt", GPT2Model


class GPT2LMHeadModel(CausalLM, GPT2WithHead):
    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.lm_head = VocabularyLinear(head_weight(config, self.get_input_embeddings()), bias=False)


class GPT2ForSequenceClassification(SequenceClassification, GPT2WithHead):
    pass


class GPT2ForTokenClassification(TokenClassification, GPT2WithHead):
    pass


class GPT2ForQuestionAnswering(QuestionAnswering, GPT2WithHead):
    """PaddleNLP has no such head."""


def causal_and_padding_mask(
    attention_mask: Tensor | None, queries: int, keys: int, dtype: paddle.dtype
) -> Tensor:
    """What transformers' GPT-2 adds to the scores: -inf after the query, the lowest float where a key is padding.

    [batch or 1, 1, queries, keys]. So a query that sees padding alone takes the mean of all keys up to its own.
    """
    future = paddle.triu(paddle.ones([1, 1, queries, keys], dtype="bool"), keys - queries + 1)
    added = paddle.where(future, paddle.full([1], -math.inf, dtype), paddle.zeros([1], dtype))
    if attention_mask is None:
        return added
    check_length(attention_mask, keys)
    lowest = paddle.full([1], paddle.finfo(dtype).min, dtype)
    return paddle.where((attention_mask == 0).unsqueeze([1, 2]) & ~future, lowest, added)
