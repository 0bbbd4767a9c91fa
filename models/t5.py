"""T5 (Raffel et al. 2020; v1.1: Shazeer 2020): encoder and decoder, pre-norm without biases, relative positions.

Numerically what transformers' ``modeling_t5`` computes with eager attention. Ids and masks are int64: of the
encoder [batch, time], of the decoder [batch, steps]; hidden states are float32 [batch, time or steps, d_model].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import paddle
from paddle import Tensor, nn

from convert.errors import BadInput

from .activation import activation
from .attention import attend, causal_mask, heads_first, padding_mask, split_heads
from .cache import KeyValue, behind
from .config import Config
from .layer import Embedding, RMSNorm, linear
from .loss import cross_entropy
from .pretrained import Pretrained

if TYPE_CHECKING:
    from typing_extensions import Self

BlockCache = tuple[KeyValue, KeyValue]


@dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """``config.json`` of T5, defaults of transformers."""

    aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    pad_token_id: int | None = 0
    decoder_start_token_id: int | None = None
    tie_encoder_decoder: bool = False

    def __post_init__(self):
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or farthest <= buckets // 2:
            raise BadInput(
                f"t5: relative_attention_num_buckets {buckets} must be 4 or more and less than twice "
                f"relative_attention_max_distance {farthest}; there is no logarithm for the far distances else."
            )
        if self.tie_encoder_decoder:
            raise BadInput("t5: tie_encoder_decoder is set; only nets with an encoder and a decoder are supported.")

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """``feed_forward_proj`` is an activation, or ``gated-`` and one.

        What it implies stands in files too, and transformers believes that more. gated-gelu is the tanh
        approximation, as in Google's code; gelu alone is the exact one.
        """
        projection = config.get("feed_forward_proj", "relu")
        gate, _, name = projection.rpartition("-")
        if gate not in ("", "gated") or not name:
            raise BadInput(f"t5: feed_forward_proj {projection!r} is neither an activation nor gated-ACTIVATION.")
        implied = {"dense_act_fn": "gelu_new" if projection == "gated-gelu" else name, "is_gated_act": bool(gate)}
        return super().from_dict({**implied, **config})


class T5DenseActDense(nn.Layer):
    """act(x wi) wo."""

    def __init__(self, config: T5Config):
        super().__init__()
        into, back = (config.initializer_factor * width**-0.5 for width in (config.d_model, config.d_ff))
        self.wi = linear(config.d_model, config.d_ff, into, bias=False)
        self.act = activation(config.dense_act_fn)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.wo = linear(config.d_ff, config.d_model, back, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.wo(self.dropout(self.act(self.wi(hidden))))


class T5DenseGatedActDense(nn.Layer):
    """(act(x wi_0) * x wi_1) wo (Shazeer 2020, GLU variants)."""

    def __init__(self, config: T5Config):
        super().__init__()
        into, back = (config.initializer_factor * width**-0.5 for width in (config.d_model, config.d_ff))
        self.wi_0 = linear(config.d_model, config.d_ff, into, bias=False)
        self.wi_1 = linear(config.d_model, config.d_ff, into, bias=False)
        self.act = activation(config.dense_act_fn)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.wo = linear(config.d_ff, config.d_model, back, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.wo(self.dropout(self.act(self.wi_0(hidden)) * self.wi_1(hidden)))


class T5LayerFF(nn.Layer):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(config) if config.is_gated_act else T5DenseActDense(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(self.DenseReluDense(self.layer_norm(hidden)))


class T5Attention(nn.Layer):
    """Attention whose scores are not scaled. ``bidirectional`` None: without relative positions of its own."""

    def __init__(self, config: T5Config, bidirectional: bool | None = None):
        super().__init__()
        width, inner, factor = config.d_model, config.num_heads * config.d_kv, config.initializer_factor
        self.heads = config.num_heads
        self.q = linear(width, inner, factor * (width * config.d_kv) ** -0.5, bias=False)
        self.k = linear(width, inner, factor * width**-0.5, bias=False)
        self.v = linear(width, inner, factor * width**-0.5, bias=False)
        self.o = linear(inner, width, factor * inner**-0.5, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.bidirectional = bidirectional
        if bidirectional is not None:
            buckets = config.relative_attention_num_buckets
            self.max_distance = config.relative_attention_max_distance
            self.relative_attention_bias = Embedding(buckets, config.num_heads, factor * width**-0.5)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """key and value [batch, heads, keys, d_kv], bias additive, broadcast to [batch, heads, queries, keys]."""
        query = heads_first(split_heads(self.q(hidden), self.heads))
        return self.o(attend(query, key, value, bias, self.dropout, divisor=1.0))

    def key_value(self, states: Tensor) -> KeyValue:
        """Of states [batch, time, d_model], each [batch, heads, time, d_kv]."""
        key, value = (heads_first(split_heads(project(states), self.heads)) for project in (self.k, self.v))
        return key, value

    def with_positions(self, mask: Tensor, queries: int, keys: int) -> Tensor:
        """``mask`` plus a learned number for each head and bucket of distances: [batch or 1, heads, queries, keys].

        The queries are the last ones of the keys. A block without positions gets what the first one made.
        """
        if self.bidirectional is None:
            return mask
        distance = paddle.arange(keys).unsqueeze(0) - paddle.arange(keys - queries, keys).unsqueeze(1)
        buckets = self.relative_attention_bias.weight.shape[0]
        bucket = relative_position_bucket(distance, self.bidirectional, buckets, self.max_distance)
        return self.relative_attention_bias(bucket).transpose([2, 0, 1]).unsqueeze(0) + mask


class T5LayerSelfAttention(nn.Layer):
    def __init__(self, config: T5Config, bidirectional: bool | None):
        super().__init__()
        self.SelfAttention = T5Attention(config, bidirectional)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden: Tensor, bias: Tensor, past: KeyValue | None) -> tuple[Tensor, Tensor, KeyValue]:
        """(hidden states, the bias with relative positions in it, keys and values seen so far)."""
        normed = self.layer_norm(hidden)
        key, value = self.SelfAttention.key_value(normed)
        key, value = behind(past, key, value)
        bias = self.SelfAttention.with_positions(bias, queries=hidden.shape[1], keys=key.shape[2])
        return hidden + self.dropout(self.SelfAttention(normed, key, value, bias)), bias, (key, value)


class T5LayerCrossAttention(nn.Layer):
    def __init__(self, config: T5Config):
        super().__init__()
        self.EncDecAttention = T5Attention(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, hidden: Tensor, encoded: Tensor, bias: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """(hidden states, keys and values of ``encoded``, which ``past`` spares computing again)."""
        normed = self.layer_norm(hidden)
        key, value = past or self.EncDecAttention.key_value(encoded)
        return hidden + self.dropout(self.EncDecAttention(normed, key, value, bias)), (key, value)


class T5EncoderBlock(nn.Layer):
    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.layer = nn.LayerList([T5LayerSelfAttention(config, True if first else None), T5LayerFF(config)])

    def forward(self, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states, the bias that the next block takes)."""
        attention, feed_forward = self.layer
        hidden, bias, _ = attention(hidden, bias, None)
        return feed_forward(hidden), bias


class T5DecoderBlock(nn.Layer):
    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        own = T5LayerSelfAttention(config, False if first else None)
        self.layer = nn.LayerList([own, T5LayerCrossAttention(config), T5LayerFF(config)])

    def forward(
        self, hidden: Tensor, bias: Tensor, encoded: Tensor, cross_bias: Tensor | None, past: BlockCache | None
    ) -> tuple[Tensor, Tensor, BlockCache]:
        """(hidden states, the bias that the next block takes, keys and values of both attentions)."""
        attention, cross_attention, feed_forward = self.layer
        own_past, cross_past = past or (None, None)
        hidden, bias, own = attention(hidden, bias, own_past)
        hidden, cross = cross_attention(hidden, encoded, cross_bias, cross_past)
        return feed_forward(hidden), bias, (own, cross)


class T5Stack(nn.Layer):
    """Embedding, blocks, norm. The dropout is applied twice, to the embedded ids and to the normed result."""

    def __init__(self, config: T5Config, embed_tokens: nn.Embedding, blocks: Sequence[nn.Layer]):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.LayerList(blocks)
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)


class T5Encoder(T5Stack):
    def __init__(self, config: T5Config, embed_tokens: nn.Embedding):
        blocks = [T5EncoderBlock(config, first=i == 0) for i in range(config.num_layers)]
        super().__init__(config, embed_tokens, blocks)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = self.dropout(self.embed_tokens(input_ids))
        bias = padding_mask(attention_mask, hidden.dtype)
        bias = paddle.zeros([1], dtype=hidden.dtype) if bias is None else bias
        for block in self.block:
            hidden, bias = block(hidden, bias)
        return self.dropout(self.final_layer_norm(hidden))


class T5Decoder(T5Stack):
    def __init__(self, config: T5Config, embed_tokens: nn.Embedding):
        blocks = [T5DecoderBlock(config, first=i == 0) for i in range(config.decoder_layers)]
        super().__init__(config, embed_tokens, blocks)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        encoded: Tensor,
        encoder_attention_mask: Tensor | None,
        past_key_values: Sequence[BlockCache] | None,
        use_cache: bool,
    ) -> tuple[Tensor, tuple[BlockCache, ...]]:
        past = past_key_values or [None] * len(self.block)
        offset = past_key_values[0][0][0].shape[2] if past_key_values else 0
        hidden = self.dropout(self.embed_tokens(input_ids))
        bias = causal_mask(attention_mask, input_ids.shape[1], offset + input_ids.shape[1], hidden.dtype)
        cross_bias = padding_mask(encoder_attention_mask, hidden.dtype)
        presents = []
        for block, block_past in zip(self.block, past, strict=True):
            hidden, bias, present = block(hidden, bias, encoded, cross_bias, block_past)
            if use_cache:  # those of every block would else be kept until the pass ends
                presents.append(present)
        return self.dropout(self.final_layer_norm(hidden)), tuple(presents)


class T5Pretrained(Pretrained):
    config_class = T5Config


class T5Model(T5Pretrained):
    def __init__(self, config: T5Config):
        super().__init__(config)
        self.shared = Embedding(config.vocab_size, config.d_model, config.initializer_factor)
        self.encoder = T5Encoder(config, self.shared)
        self.decoder = T5Decoder(config, self.shared)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Tensor | None = None,
        past_key_values: Sequence[BlockCache] | None = None,
        use_cache: bool = False,
    ) -> dict:
        """``last_hidden_state`` [batch, steps, d_model], ``encoder_last_hidden_state`` [batch, time, d_model].

        ``encoder_outputs``, the latter of an earlier call, takes the place of ``input_ids``. With ``use_cache``
        also ``past_key_values``: of each block (key, value) of the decoder's and of the encoder's states, each
        [batch, heads, past or time, d_kv]. A decoder mask then covers past and present.
        """
        if decoder_input_ids is None:
            raise ValueError("T5's decoder needs decoder_input_ids, or labels to make them from.")
        encoded = self.encoder(input_ids, attention_mask) if encoder_outputs is None else encoder_outputs
        hidden, presents = self.decoder(
            decoder_input_ids, decoder_attention_mask, encoded, attention_mask, past_key_values, use_cache
        )
        outputs = {"last_hidden_state": hidden, "encoder_last_hidden_state": encoded}
        return outputs | {"past_key_values": presents} if use_cache else outputs


class T5ForConditionalGeneration(T5Pretrained):
    """v1.0 shares one table between embeddings and head, v1.1 has a head of its own."""

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.t5 = T5Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.d_model, config.vocab_size, config.initializer_factor, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **inputs
    ) -> dict:
        """``logits`` [batch, steps, vocab_size]; with labels [batch, steps] (-100 ignored) the ``loss``.

        ``inputs`` as :class:`T5Model` takes them; without ``decoder_input_ids`` they are the labels shifted.
        """
        if labels is not None and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = self.shift_right(labels)
        outputs = self.t5(input_ids, **inputs)
        logits = self.project(outputs.pop("last_hidden_state"))
        found = {"logits": logits} | outputs
        return found if labels is None else {"loss": cross_entropy(logits, labels)} | found

    def project(self, hidden: Tensor) -> Tensor:
        """Scores of every word. A shared table is of spread 1, so that v1.0 scales by d_model^-0.5 first."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        return paddle.matmul(hidden * self.config.d_model**-0.5, self.t5.shared.weight, transpose_y=True)

    def shift_right(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict ``labels``: its start token, then all labels but the last, -100 as pad."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "config.json has no decoder_start_token_id or no pad_token_id, so the labels cannot be shifted; "
                "pass decoder_input_ids."
            )
        shifted = paddle.concat([paddle.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)
        return paddle.where(shifted == -100, paddle.full_like(shifted, pad), shifted)


class T5EncoderModel(T5Pretrained):
    def __init__(self, config: T5Config):
        super().__init__(config)
        self.shared = Embedding(config.vocab_size, config.d_model, config.initializer_factor)
        self.encoder = T5Encoder(config, self.shared)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict:
        """``last_hidden_state`` [batch, time, d_model]."""
        return {"last_hidden_state": self.encoder(input_ids, attention_mask)}


def relative_position_bucket(distance: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """The bucket, in [0, buckets), of each distance key - query (Raffel et al. 2020, section 2.1).

    Half of a direction's buckets are one distance each, the rest grow by a constant factor up to ``max_distance``,
    beyond which all share the last. Bidirectional: half of all are for keys behind the query. The logarithm is in
    float32, as torch's: where it should be whole (buckets 32, max_distance 100, distance 40) float64 may fall short.
    """
    ahead = paddle.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        ahead = (distance > 0).astype("int64") * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clip(min=0)
    exact = buckets // 2
    ratio = distance.clip(min=exact).astype("float32") / exact
    step = paddle.log(ratio) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + step.astype("int64")).clip(max=buckets - 1)
    return ahead + paddle.where(distance < exact, distance, far)
