"""OPT (Zhang et al. 2022): learned positions counted over real tokens, pre-norm or (350m) post-norm decoder.

Numerically what transformers' ``modeling_opt`` computes with eager attention. Ids and masks are int64
[batch, time]; hidden states are float32 [batch, time, hidden_size].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import paddle
from paddle import Tensor, nn

from .activation import activation
from .attention import attend, causal_mask, heads_first, split_heads
from .cache import KeyValue, behind, run_blocks, seen, with_pasts
from .config import Config, refuse_uneven_heads
from .heads import CausalLM, QuestionAnswering, SequenceClassification, WithHead, head_weight
from .layer import Embedding, LayerNorm, LMHead, linear
from .pretrained import Pretrained

EPSILON = 1e-5
"""Of every norm: torch's own default, which no config of OPT can change."""


@dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    """``config.json`` of OPT with the defaults of transformers; without ``word_embed_proj_dim`` nothing is projected.

    ``remove_final_layer_norm`` is spelled ``_remove_final_layer_norm`` there.
    """

    aliases: ClassVar[Mapping[str, str]] = {"_remove_final_layer_norm": "remove_final_layer_norm"}

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    layerdrop: float = 0.0
    init_std: float = 0.02
    pad_token_id: int | None = 1

    def __post_init__(self):
        refuse_uneven_heads("opt", self, "hidden_size", "num_attention_heads")

    @property
    def embedding_width(self) -> int:
        return self.hidden_size if self.word_embed_proj_dim is None else self.word_embed_proj_dim

    @property
    def projects(self) -> bool:
        """Whether embeddings and logits live in another width than the blocks."""
        return self.embedding_width != self.hidden_size

    @property
    def ends_in_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm


class OPTPositions(Embedding):
    """Row position + 2 of a table of max_position_embeddings + 2 rows; a padded token has position -1."""

    offset = 2

    def __init__(self, config: OPTConfig):
        super().__init__(config.max_position_embeddings + self.offset, config.hidden_size, config.init_std)

    def forward(self, position_ids: Tensor) -> Tensor:
        return super().forward(position_ids + self.offset)


class OPTEmbeddings(nn.Layer):
    def __init__(self, config: OPTConfig):
        super().__init__()
        width, std = config.embedding_width, config.init_std
        self.word_embeddings = Embedding(config.vocab_size, width, std, config.pad_token_id)
        self.position_embeddings = OPTPositions(config)
        self.project_in = linear(width, config.hidden_size, std, bias=False) if config.projects else None

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        words, positions = self.word_embeddings(input_ids), self.position_embeddings(position_ids)
        return (words if self.project_in is None else self.project_in(words)) + positions


class OPTAttention(nn.Layer):
    def __init__(self, config: OPTConfig):
        super().__init__()
        width, std, bias = config.hidden_size, config.init_std, config.enable_bias
        self.heads = config.num_attention_heads
        self.q_proj = linear(width, width, std, bias)
        self.k_proj = linear(width, width, std, bias)
        self.v_proj = linear(width, width, std, bias)
        self.out_proj = linear(width, width, std, bias)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden: Tensor, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        query, key, value = (
            heads_first(split_heads(project(hidden), self.heads))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = behind(past, key, value)
        return self.out_proj(attend(query, key, value, mask, self.dropout)), (key, value)


class OPTDecoderLayer(nn.Layer):
    def __init__(self, config: OPTConfig):
        super().__init__()
        width, inner, std = config.hidden_size, config.ffn_dim, config.init_std
        self.norms_before = config.do_layer_norm_before
        self.self_attn = OPTAttention(config)
        self.norm1 = LayerNorm(width, EPSILON, config.layer_norm_elementwise_affine)
        self.linear1 = linear(width, inner, std, config.enable_bias)
        self.activation = activation(config.activation_function)
        self.linear2 = linear(inner, width, std, config.enable_bias)
        self.norm2 = LayerNorm(width, EPSILON, config.layer_norm_elementwise_affine)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Attention and MLP with a residual each, and the keys and values seen so far.

        The norm of each is taken of its input, or (350m) of the sum with the residual.
        """
        if self.norms_before:
            attended, present = self.self_attn(self.norm1(hidden), mask, past)
            hidden = hidden + self.dropout(attended)
            return hidden + self.dropout(self.mlp(self.norm2(hidden))), present
        attended, present = self.self_attn(hidden, mask, past)
        hidden = self.norm1(hidden + self.dropout(attended))
        return self.norm2(hidden + self.dropout(self.mlp(hidden))), present

    def mlp(self, hidden: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(hidden)))


class OPTDecoder(nn.Layer):
    def __init__(self, config: OPTConfig):
        super().__init__()
        width, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.layerdrop = config.layerdrop
        self.layers = nn.LayerList([OPTDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = LayerNorm(width, EPSILON, affine) if config.ends_in_norm else None
        self.project_out = (
            linear(width, config.embedding_width, config.init_std, bias=False) if config.projects else None
        )

    def forward(
        self, hidden: Tensor, mask: Tensor, past: Sequence[KeyValue] | None, use_cache: bool
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Every block (in training some are skipped: ``layerdrop``), and what follows the last one."""
        kept = (pair for pair in with_pasts(self.layers, past) if not self.skips())
        hidden, presents = run_blocks(kept, hidden, mask, use_cache=use_cache)
        for last in (self.final_layer_norm, self.project_out):
            hidden = hidden if last is None else last(hidden)
        return hidden, presents

    def skips(self) -> bool:
        return self.training and self.layerdrop > 0 and paddle.rand([]).item() < self.layerdrop


class OPTPretrained(Pretrained):
    """A net without biases, or whose norms learn nothing, needs no zeros and ones that PaddleNLP's class asks for."""

    config_class = OPTConfig
    unused_buffers = re.compile(
        r"(opt\.)?decoder\.(layers\.\d+\.(self_attn\.(q|k|v|out)_proj|linear[12])\.bias|"
        r"(layers\.\d+\.norm[12]|final_layer_norm)\.(weight|bias))"
    )


class OPTModel(OPTPretrained):
    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.embeddings = OPTEmbeddings(config)
        self.decoder = OPTDecoder(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        use_cache: bool = False,
    ) -> dict:
        """``last_hidden_state`` [batch, time, embedding width], and ``past_key_values`` when ``use_cache``.

        ``past_key_values`` holds a (key, value) per block, each [batch, heads, past, width]; the mask, if given, then
        covers past and present. Positions count the tokens that the mask does not hide.
        """
        offset, (batch, length) = seen(past_key_values), input_ids.shape
        if position_ids is None:
            position_ids = positions(attention_mask, batch, offset, length)

        hidden = self.embeddings(input_ids, position_ids)
        mask = causal_mask(attention_mask, length, offset + length, hidden.dtype)
        hidden, presents = self.decoder(hidden, mask, past_key_values, use_cache)
        outputs = {"last_hidden_state": hidden}
        return outputs | {"past_key_values": presents} if use_cache else outputs

    def get_input_embeddings(self) -> Embedding:
        return self.embeddings.word_embeddings


class OPTWithHead(WithHead, OPTPretrained):
    base_model_prefix, base_model_class = "opt", OPTModel


class OPTForCausalLM(CausalLM, OPTWithHead):
    """PaddleNLP's head is always a weight of its own."""

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.lm_head = LMHead(head_weight(config, self.get_input_embeddings()))


class OPTForSequenceClassification(SequenceClassification, OPTWithHead):
    """PaddleNLP has no such head."""


class OPTForQuestionAnswering(QuestionAnswering, OPTWithHead):
    """PaddleNLP has no such head."""


def positions(attention_mask: Tensor | None, batch: int, past: int, length: int) -> Tensor:
    """How many real tokens come before each of the last ``length``, -1 for padding: [batch, length]."""
    if attention_mask is None:
        return paddle.arange(past, past + length).unsqueeze(0).expand([batch, length])
    real = (attention_mask != 0).astype("int64")
    return (paddle.cumsum(real, axis=1) * real - 1)[:, past:]
