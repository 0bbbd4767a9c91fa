"""BERT (Devlin et al. 2018): embeddings, post-norm encoder, pooler, and the heads of transformers.

Numerically what transformers' ``modeling_bert`` computes with eager attention. Ids and masks are int64
[batch, time]; hidden states are float32 [batch, time, hidden_size].
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from convert.errors import BadInput

from .activation import activation, tanh
from .attention import attend, heads_first, padding_mask, split_heads
from .config import Config, refuse_uneven_heads
from .heads import QuestionAnswering, TokenClassification, WithHead, classified, head_weight
from .layer import Embedding, LayerNorm, VocabularyLinear, linear
from .loss import cross_entropy
from .pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """``config.json`` of BERT with the defaults of transformers (PaddleNLP's has 16 token types)."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    classifier_dropout: float | None = None
    is_decoder: bool = False

    def __post_init__(self):
        refuse_uneven_heads("bert", self, "hidden_size", "num_attention_heads")
        if self.position_embedding_type != "absolute" or self.is_decoder:
            raise BadInput(
                "bert: only encoders with absolute positions are supported, not position_embedding_type "
                f"{self.position_embedding_type!r} with is_decoder {self.is_decoder}."
            )

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


class BertEmbeddings(nn.Layer):
    def __init__(self, config: BertConfig):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.word_embeddings = Embedding(config.vocab_size, width, std, config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, width, std)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width, std)
        self.layer_norm = LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        words_and_types = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.layer_norm(words_and_types + self.position_embeddings(position_ids)))


class BertSelfAttention(nn.Layer):
    def __init__(self, config: BertConfig):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.heads = config.num_attention_heads
        self.q_proj = linear(width, width, std)
        self.k_proj = linear(width, width, std)
        self.v_proj = linear(width, width, std)
        self.out_proj = linear(width, width, std)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            heads_first(split_heads(project(hidden), self.heads))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(query, key, value, mask, self.dropout))


class BertLayer(nn.Layer):
    def __init__(self, config: BertConfig):
        super().__init__()
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.self_attn = BertSelfAttention(config)
        self.dropout1 = nn.Dropout(config.hidden_dropout_prob)
        self.norm1 = LayerNorm(width, config.layer_norm_eps)
        self.linear1 = linear(width, inner, std)
        self.activation = activation(config.hidden_act)
        self.linear2 = linear(inner, width, std)
        self.dropout2 = nn.Dropout(config.hidden_dropout_prob)
        self.norm2 = LayerNorm(width, config.layer_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.norm1(self.dropout1(self.self_attn(hidden, mask)) + hidden)
        return self.norm2(self.dropout2(self.linear2(self.activation(self.linear1(hidden)))) + hidden)


class BertEncoder(nn.Layer):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layers = nn.LayerList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class BertPooler(nn.Layer):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = linear(config.hidden_size, config.hidden_size, config.initializer_range)

    def forward(self, hidden: Tensor) -> Tensor:
        return tanh(self.dense(hidden[:, 0]))


class BertPretrained(Pretrained):
    config_class = BertConfig


class BertModel(BertPretrained):
    """Under every head it owns a pooler, as PaddleNLP's does."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict:
        """``last_hidden_state`` [batch, time, hidden_size] and ``pooler_output`` [batch, hidden_size].

        No mask means that every position is looked at, pad tokens too.
        """
        if token_type_ids is None:
            token_type_ids = paddle.zeros_like(input_ids)
        if position_ids is None:
            position_ids = paddle.arange(input_ids.shape[1]).unsqueeze(0)

        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        hidden = self.encoder(embedded, padding_mask(attention_mask, embedded.dtype))
        return {"last_hidden_state": hidden, "pooler_output": self.pooler(hidden)}

    def get_input_embeddings(self) -> Embedding:
        return self.embeddings.word_embeddings


class BertLMPredictionHead(nn.Layer):
    """Transform, norm, and a decoder whose weight is the word embeddings unless the config unties them."""

    def __init__(self, config: BertConfig, word_embeddings: Embedding):
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.transform = linear(width, width, std)
        self.activation = activation(config.hidden_act)
        self.layer_norm = LayerNorm(width, config.layer_norm_eps)
        self.decoder = VocabularyLinear(head_weight(config, word_embeddings))
        self.decoder_bias = self.decoder.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.transform(hidden))))


class BertOnlyMLMHead(nn.Layer):
    def __init__(self, config: BertConfig, word_embeddings: Embedding):
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.predictions(hidden)


class BertPreTrainingHeads(nn.Layer):
    def __init__(self, config: BertConfig, word_embeddings: Embedding):
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)
        self.seq_relationship = linear(config.hidden_size, 2, config.initializer_range)

    def forward(self, hidden: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictions(hidden), self.seq_relationship(pooled)


class BertWithHead(WithHead, BertPretrained):
    base_model_prefix, base_model_class = "bert", BertModel


class BertForPreTraining(BertWithHead):
    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config, self.get_input_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **inputs,
    ) -> dict:
        """``prediction_logits`` [batch, time, vocab_size], ``seq_relationship_logits`` [batch, 2].

        With both labels [batch, time] (-100 ignored) and next_sentence_label [batch] the sum of both losses.
        ``inputs`` as :class:`BertModel` takes them.
        """
        bert = self.bert(input_ids, **inputs)
        words, sentences = self.cls(bert["last_hidden_state"], bert["pooler_output"])
        outputs = {"prediction_logits": words, "seq_relationship_logits": sentences}
        if labels is not None and next_sentence_label is not None:
            outputs["loss"] = cross_entropy(words, labels) + cross_entropy(
                sentences, next_sentence_label.flatten()
            )
        return outputs


class BertForMaskedLM(BertWithHead):
    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.cls = BertOnlyMLMHead(config, self.get_input_embeddings())

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, time, vocab_size]; with labels [batch, time] (-100 ignored) the ``loss``."""
        outputs = {"logits": self.cls(self.bert(input_ids, **inputs)["last_hidden_state"])}
        if labels is not None:
            outputs["loss"] = cross_entropy(outputs["logits"], labels)
        return outputs


class BertForSequenceClassification(BertWithHead):
    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = self.head_linear(config.num_labels)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, num_labels]; with labels the ``loss`` of the config's ``problem_type``."""
        pooled = self.bert(input_ids, **inputs)["pooler_output"]
        return classified(self.classifier(self.dropout(pooled)), labels, self.config)


class BertForTokenClassification(TokenClassification, BertWithHead):
    pass


class BertForQuestionAnswering(QuestionAnswering, BertWithHead):
    """The head is called ``classifier`` as in PaddleNLP; transformers calls it ``qa_outputs``."""

    head = "classifier"
