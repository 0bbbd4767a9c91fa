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

from convert.errors import BadInput

from .activation import activation
from .attention import attend, causal_mask, heads_first, split_heads
from .config import Config
from .layer import Embedding, LayerNorm, VocabularyLinear, linear
from .loss import causal_lm_loss, classification_loss, span_loss
from .pooling import last_token
from .pretrained import Pretrained

KeyValue = tuple[Tensor, Tensor]


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
        if self.n_embd % self.n_head:
            raise BadInput(f"gptj: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}.")


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
        if past is not None:
            key, value = (paddle.concat(pair, axis=2) for pair in zip(past, (key, value), strict=True))
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
        past = past_key_values or [None] * len(self.h)
        offset = past[0][0].shape[2] if past_key_values else 0
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = paddle.arange(offset, offset + length).unsqueeze(0)

        hidden = self.drop(self.embed(input_ids, token_type_ids))
        mask = causal_mask(attention_mask, length, offset + length, hidden.dtype)
        sin, cos = self.rotary(position_ids)
        presents = []
        for block, block_past in zip(self.h, past, strict=True):
            hidden, present = block(hidden, mask, sin, cos, block_past)
            if use_cache:  # those of every block would else be kept until the pass ends
                presents.append(present)
        outputs = {"last_hidden_state": self.ln_f(hidden)}
        return outputs | {"past_key_values": tuple(presents)} if use_cache else outputs

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token types are rows of the token embedding, as in transformers."""
        tokens = self.wte(input_ids)
        return tokens if token_type_ids is None else tokens + self.wte(token_type_ids)

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """sin and cos of every angle, each [batch or 1, time, 1, rotary_dim / 2]."""
        width = self.config.rotary_dim or self.config.n_embd // self.config.n_head
        table = F.embedding(position_ids, rotary_table(self.config.n_positions, width))
        return paddle.split(table.unsqueeze(2), 2, axis=-1)


class GPTJForCausalLM(GPTJPretrained):
    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        self.transformer = GPTJModel(config)
        if config.tie_word_embeddings:
            self.lm_head = VocabularyLinear(self.transformer.wte.weight)
        else:
            self.lm_head = linear(config.n_embd, config.vocab_size, config.initializer_range)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, time, vocab_size]; with labels [batch, time] (-100 ignored) the ``loss``.

        ``inputs`` as :class:`GPTJModel` takes them.
        """
        outputs = self.transformer(input_ids, **inputs)
        outputs["logits"] = self.lm_head(outputs.pop("last_hidden_state"))
        if labels is not None:
            outputs["loss"] = causal_lm_loss(outputs["logits"], labels)
        return outputs


class GPTJForSequenceClassification(GPTJPretrained):
    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.score = linear(config.n_embd, config.num_labels, config.initializer_range, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, num_labels] of each row's last token but pads; with labels the ``loss``."""
        outputs = self.transformer(input_ids, **inputs)
        scores = self.score(outputs.pop("last_hidden_state"))
        last = last_token(input_ids, self.config.pad_token_id)
        outputs["logits"] = scores[paddle.arange(scores.shape[0]), last]
        if labels is not None:
            outputs["loss"] = classification_loss(
                outputs["logits"], labels, self.config.num_labels, self.config.problem_type
            )
        return outputs


class GPTJForQuestionAnswering(GPTJPretrained):
    def __init__(self, config: GPTJConfig):
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.qa_outputs = linear(config.n_embd, config.num_labels, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs,
    ) -> dict:
        """``start_logits`` and ``end_logits`` [batch, time]; with both positions [batch] the ``loss``."""
        outputs = self.transformer(input_ids, **inputs)
        start, end = paddle.unbind(self.qa_outputs(outputs.pop("last_hidden_state")), axis=-1)
        outputs |= {"start_logits": start, "end_logits": end}
        if start_positions is not None and end_positions is not None:
            outputs["loss"] = span_loss(start, end, start_positions, end_positions)
        return outputs


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
