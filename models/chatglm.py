"""ChatGLM-6B, first version (Du et al. 2022, Zeng et al. 2023): a prompt that sees itself, then an answer word by word.

Numerically what the checkpoint's own ``modeling_chatglm.py`` computes in float32. Ids are int64 [batch, time], hidden
states float32 [time, batch, hidden_size], time first as there. A row is ``context [gMASK] <bos> answer``; the answer
begins with the bos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from convert.errors import BadInput

from .activation import gelu_tanh
from .cache import KeyValue, behind, run_blocks, with_pasts
from .config import Config
from .heads import CausalLM, head_weight
from .layer import Embedding, LayerNorm, LMHead, linear
from .pretrained import Pretrained

SPREAD = 0.02
HIDDEN_SCORE = -10000.0


@dataclass(frozen=True, kw_only=True)
class ChatGLMConfig(Config):
    """``config.json`` of ChatGLM-6B, defaults of the checkpoint's ``configuration_chatglm.py``."""

    aliases: ClassVar[Mapping[str, str]] = {"num_hidden_layers": "num_layers"}

    vocab_size: int = 150528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int | None = 16384
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    bos_token_id: int = 150004
    mask_token_id: int = 150000
    gmask_token_id: int = 150001
    pre_seq_len: int | None = None
    quantization_bit: int = 0

    def __post_init__(self):
        parts = self.num_attention_heads * (4 if self.position_encoding_2d else 2)
        if not parts or self.hidden_size % parts:
            raise BadInput(f"chatglm: hidden_size {self.hidden_size} is not a multiple of {parts}: "
                           f"{self.num_attention_heads} heads, each of whole pairs that are turned.")
        if self.pre_seq_len:
            raise BadInput(f"chatglm: pre_seq_len is {self.pre_seq_len}; learned prefixes (P-tuning) are not known.")
        if self.quantization_bit:
            raise BadInput(f"chatglm: quantization_bit is {self.quantization_bit}; weights of whole floats are needed.")


class ChatGLMAttention(nn.Layer):
    """Self-attention of the block at ``depth``, counted from 1."""

    def __init__(self, config: ChatGLMConfig, depth: int):
        super().__init__()
        self.heads, self.depth = config.num_attention_heads, depth
        self.query_key_value = linear(config.hidden_size, 3 * config.hidden_size, SPREAD)
        self.dense = linear(config.hidden_size, config.hidden_size, SPREAD)

    def forward(
        self, hidden: Tensor, masked: Tensor | None, rotary: Sequence[KeyValue], past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Query, key and value of one head lie side by side in the fused projection, head after head."""
        time, batch, width = hidden.shape
        fused = self.query_key_value(hidden).reshape([time, batch, self.heads, 3 * width // self.heads])
        query, key, value = paddle.split(fused, 3, axis=-1)
        query, key = rotate(query, rotary), rotate(key, rotary)
        key, value = behind(past, key, value, axis=0)
        context = attend(query, key, value, masked, float(self.depth))
        return self.dense(context), (key, value)


class ChatGLMMLP(nn.Layer):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        inner = 4 * config.hidden_size if config.inner_hidden_size is None else config.inner_hidden_size
        self.dense_h_to_4h = linear(config.hidden_size, inner, SPREAD)
        self.dense_4h_to_h = linear(inner, config.hidden_size, SPREAD)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(gelu_tanh(self.dense_h_to_4h(hidden)))


class ChatGLMBlock(nn.Layer):
    def __init__(self, config: ChatGLMConfig, depth: int):
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, depth)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self, hidden: Tensor, masked: Tensor | None, rotary: Sequence[KeyValue], past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Residuals go around each sublayer from behind its norm, alpha = sqrt(2 N) times (DeepNorm, Wang et al. 2022).

        The original always has N = 28, the number of layers of ChatGLM-6B, whatever its config says.
        """
        normed = self.input_layernorm(hidden)
        attended, present = self.attention(normed, masked, rotary, past)
        middle = self.post_attention_layernorm(normed * self.alpha + attended)
        return middle * self.alpha + self.mlp(middle), present


class ChatGLMStack(nn.Layer):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, SPREAD)
        self.layers = nn.LayerList([ChatGLMBlock(config, depth) for depth in range(1, config.num_layers + 1)])
        self.final_layernorm = LayerNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(
        self, input_ids: Tensor, masked: Tensor | None, rotary: Sequence[KeyValue],
        past: Sequence[KeyValue] | None, use_cache: bool,
    ) -> dict:
        hidden = self.word_embeddings(input_ids).transpose([1, 0, 2])
        hidden, presents = run_blocks(with_pasts(self.layers, past), hidden, masked, rotary, use_cache=use_cache)
        outputs = {"last_hidden_state": self.final_layernorm(hidden)}
        return outputs | {"past_key_values": presents} if use_cache else outputs


class ChatGLMModel(Pretrained):
    config_class = ChatGLMConfig

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMStack(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        use_cache: bool = False,
    ) -> dict:
        """``last_hidden_state`` [time, batch, hidden_size], and ``past_key_values`` when ``use_cache``.

        ``attention_mask``, bool [batch, 1, time, past + time], is True where a query may not look; ``position_ids`` is
        [batch, 2, time], or [batch, time] for positions of one dimension. Both are made from the ids where they are not
        given; after a past the positions must be, and no mask means that all of it is seen. ``past_key_values`` holds
        a (key, value) per block, each [past, batch, heads, width].
        """
        if attention_mask is not None and (attention_mask.ndim != 4 or attention_mask.dtype != paddle.bool):
            raise ValueError("attention_mask is to be bool [batch, 1, queries, keys], True where a query may not look; "
                             f"it is {attention_mask.dtype} {attention_mask.shape}.")
        if past_key_values is None:
            attention_mask = prefix_mask(input_ids, self.config) if attention_mask is None else attention_mask
            position_ids = positions(input_ids, self.config) if position_ids is None else position_ids
        elif position_ids is None:
            raise ValueError("position_ids are needed after a past: the ids of the last tokens do not tell them.")
        return self.transformer(input_ids, attention_mask, self.rotary(position_ids), past_key_values, use_cache)

    def get_input_embeddings(self) -> Embedding:
        return self.transformer.word_embeddings

    def rotary(self, position_ids: Tensor) -> list[KeyValue]:
        """(cos, sin) for each part of a head, one a dimension of the positions: [time, batch, 1, width of the part]."""
        kinds = paddle.unbind(position_ids, axis=1) if self.config.position_encoding_2d else [position_ids]
        width = self.config.hidden_size // self.config.num_attention_heads // len(kinds)
        return [rotary_of(places.transpose([1, 0]), width) for places in kinds]


class ChatGLMForConditionalGeneration(CausalLM):
    config_class = ChatGLMConfig
    base_model_prefix, base_model_class = "chatglm", ChatGLMModel

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.lm_head = LMHead(head_weight(config, self.get_input_embeddings()))

    def project(self, hidden: Tensor) -> Tensor:
        return super().project(hidden).transpose([1, 0, 2])


def attend(query: Tensor, key: Tensor, value: Tensor, masked: Tensor | None, depth: float) -> Tensor:
    """softmax(query key^T / sqrt(width)) value over heads: [time, batch, heads, width] -> [time, batch, heads * width].

    The scores are divided by ``depth`` and multiplied by it again, as the original does to keep them small in float16;
    what is ``masked`` is ``HIDDEN_SCORE`` in between, so that a row that may look nowhere comes out uniform.
    """
    query = query / (math.sqrt(query.shape[-1]) * depth)
    scores = paddle.matmul(query.transpose([1, 2, 0, 3]), key.transpose([1, 2, 3, 0]))
    if masked is not None:
        scores = paddle.where(masked, paddle.full([1], HIDDEN_SCORE, scores.dtype), scores)
    weights = F.softmax(scores * depth, axis=-1)
    return paddle.matmul(weights, value.transpose([1, 2, 0, 3])).transpose([2, 0, 1, 3]).flatten(-2)


def prefix_mask(input_ids: Tensor, config: ChatGLMConfig) -> Tensor:
    """True where a query may not look, bool [batch, 1, time, time]: the context is seen by all, the answer from behind.

    Padding is seen like any token; only a mask of the caller's hides it.
    """
    length = input_ids.shape[1]
    context = first_place(input_ids, config.bos_token_id, "bos_token_id").unsqueeze([1, 2, 3])
    behind = paddle.triu(paddle.ones([1, 1, length, length], dtype="bool"), 1)
    return behind & (paddle.arange(length) >= context)


def positions(input_ids: Tensor, config: ChatGLMConfig) -> Tensor:
    """Where each token stands (Du et al. 2022, section 2.1), [batch, 2, time]: in the text, and in the answer.

    The first number of all answer tokens is that of the mask which they fill, the second counts from 1. With positions
    of one dimension, [batch, time], an answer to [gMASK] goes on counting, one to [MASK] stands where that does.
    """
    batch, length = input_ids.shape
    whole = (input_ids == config.gmask_token_id).any(axis=1)
    token = paddle.where(whole, paddle.full([batch], config.gmask_token_id, "int64"),
                         paddle.full([batch], config.mask_token_id, "int64")).unsqueeze(1)
    mask = first_place(input_ids, token, "gmask_token_id or mask_token_id").unsqueeze(1)
    context = first_place(input_ids, config.bos_token_id, "bos_token_id").unsqueeze(1)
    counted = paddle.arange(length).expand([batch, length])
    answer = counted >= context
    if not config.position_encoding_2d:
        return paddle.where(answer & ~whole.unsqueeze(1), mask.expand_as(counted), counted)
    in_answer = (counted - context + 1).clip(min=0)
    return paddle.stack([paddle.where(answer, mask.expand_as(counted), counted), in_answer], axis=1)


def first_place(input_ids: Tensor, token: int | Tensor, name: str) -> Tensor:
    """Index of the first ``token`` of each row, [batch]."""
    found = input_ids == token
    if not bool(found.any(axis=1).all()):
        raise ValueError(f"each row of input_ids is to hold the {name} of the config, {token}; one does not.")
    return found.astype("int64").argmax(axis=1)


def rotary_of(places: Tensor, width: int) -> KeyValue:
    """cos and sin of place / 10000^(2i / width) (Su et al. 2021), each [time, batch, 1, width], the angles twice over.

    The original rounds the frequencies to float16, and so its angles are those of other frequencies: up to 5e-4 of
    themselves off, at place 100 a whole 0.02. A place below 2^13 times a number of 11 bits is exact in float32.
    """
    frequencies = (1.0 / 10000 ** (paddle.arange(0, width, 2, dtype="float32") / width)).astype("float16")
    angles = places.astype("float32").unsqueeze([-1, -1]) * frequencies.astype("float32")
    return paddle.tile(paddle.cos(angles), [1, 1, 1, 2]), paddle.tile(paddle.sin(angles), [1, 1, 1, 2])


def rotate(x: Tensor, rotary: Sequence[KeyValue]) -> Tensor:
    """Turn each part of every head, x [time, batch, heads, width], by its own angles: channel i with i + half of it."""
    parts = paddle.split(x, len(rotary), axis=-1) if len(rotary) > 1 else [x]
    turned = []
    for part, (cos, sin) in zip(parts, rotary, strict=True):
        left, right = paddle.split(part, 2, axis=-1)
        turned.append(part * cos + paddle.concat([-right, left], axis=-1) * sin)
    return paddle.concat(turned, axis=-1) if len(turned) > 1 else turned[0]
