"""What sits on a base model, once for all families: the layers of a head, what they read, and the loss.

A family names its base model in a subclass of :class:`WithHead`, and mixes it into the heads that transformers has for
it. Ids and labels are int64, scores float32.
"""

from __future__ import annotations

from typing import Any, ClassVar

import paddle
from paddle import Tensor, nn

from .config import Config
from .layer import Embedding, linear
from .loss import causal_lm_loss, classification_loss, cross_entropy, span_loss
from .pretrained import Pretrained


class WithHead(Pretrained):
    """A base model, in the attribute that PaddleNLP has it in; a subclass adds what reads it.

    The base model takes ``input_ids``, and more by name. It returns ``last_hidden_state`` and perhaps
    ``past_key_values``, and has ``get_input_embeddings``: as wide as those a head is, and initialised alike.
    """

    base_model_prefix: ClassVar[str]
    base_model_class: ClassVar[type[Pretrained]]

    def __init__(self, config: Config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.base_model_class(config))

    def get_input_embeddings(self) -> Embedding:
        return getattr(self, self.base_model_prefix).get_input_embeddings()

    def hidden_states(self, input_ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The last ones, which the head reads, and the outputs that it hands on: ``past_key_values``, if there are."""
        outputs = getattr(self, self.base_model_prefix)(input_ids, **inputs)
        return outputs["last_hidden_state"], {key: outputs[key] for key in outputs if key == "past_key_values"}

    def head_linear(self, outputs: int, bias: bool = True) -> nn.Linear:
        words = self.get_input_embeddings()
        return linear(words.weight.shape[1], outputs, words.std, bias)


class CausalLM(WithHead):
    """The next word. A family makes ``lm_head``: its name for the weight, its bias and its layout are the family's."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, time, vocab_size]; with labels [batch, time] (-100 ignored) the ``loss``.

        ``inputs`` as the base model takes them.
        """
        hidden, outputs = self.hidden_states(input_ids, inputs)
        outputs["logits"] = self.project(hidden)
        if labels is not None:
            outputs["loss"] = causal_lm_loss(outputs["logits"], labels)
        return outputs

    def project(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class SequenceClassification(WithHead):
    """``score`` of the rightmost token of each row that is no pad, wherever the padding is."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.score = self.head_linear(config.num_labels, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, num_labels]; with labels the ``loss`` of the config's ``problem_type``."""
        hidden, outputs = self.hidden_states(input_ids, inputs)
        scores = self.score(hidden)
        last = last_token(input_ids, self.config.pad_token_id)
        return outputs | classified(scores[paddle.arange(scores.shape[0]), last], labels, self.config)


class TokenClassification(WithHead):
    """``classifier`` of every token, behind a dropout at the config's ``head_dropout``."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = self.head_linear(config.num_labels)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs) -> dict:
        """``logits`` [batch, time, num_labels]; with labels [batch, time] (-100 ignored) the ``loss``."""
        hidden, outputs = self.hidden_states(input_ids, inputs)
        outputs["logits"] = self.classifier(self.dropout(hidden))
        if labels is not None:
            outputs["loss"] = cross_entropy(outputs["logits"], labels)
        return outputs


class QuestionAnswering(WithHead):
    """Two scores of every token, as the first and as the last of an answer, by the linear called ``head``."""

    head: ClassVar[str] = "qa_outputs"

    def __init__(self, config: Config):
        super().__init__(config)
        setattr(self, self.head, self.head_linear(self.scores))

    @property
    def scores(self) -> int:
        return 2

    def forward(
        self,
        input_ids: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs,
    ) -> dict:
        """``start_logits`` and ``end_logits`` [batch, time]; with both positions [batch] the ``loss``."""
        hidden, outputs = self.hidden_states(input_ids, inputs)
        start, end = paddle.unbind(getattr(self, self.head)(hidden), axis=-1)
        outputs |= {"start_logits": start, "end_logits": end}
        if start_positions is not None and end_positions is not None:
            outputs["loss"] = span_loss(start, end, start_positions, end_positions)
        return outputs


def head_weight(config: Config, words: Embedding) -> Tensor:
    """[vocabulary, width]: that of the word embeddings, or a table of its own where the config unties the two."""
    return words.weight if config.tie_word_embeddings else Embedding(*words.weight.shape, words.std).weight


def classified(logits: Tensor, labels: Tensor | None, config: Config) -> dict:
    """``logits`` [batch, num_labels]; with labels the ``loss`` of the config's ``problem_type``."""
    if labels is None:
        return {"logits": logits}
    return {"logits": logits, "loss": classification_loss(logits, labels, config.num_labels, config.problem_type)}


def last_token(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Per row the index [batch] of the rightmost token that is no pad."""
    batch, length = input_ids.shape
    if pad_token_id is None and batch > 1:
        raise ValueError(f"a batch of {batch} needs pad_token_id in the config, to tell where each row ends.")
    if pad_token_id is None:
        return paddle.full([1], length - 1, dtype="int64")
    return (paddle.arange(length) * (input_ids != pad_token_id).astype("int64")).max(axis=-1)
