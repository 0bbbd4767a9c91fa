"""The heads that several families have: their rules, and whether they share the word embeddings."""

from __future__ import annotations

from .rules import Config, Head, Rule, Size, buffer, copy_of, keep, linear, rules, tied


def is_tied(config: Config) -> bool:
    return config.get("tie_word_embeddings", True)


def is_untied(config: Config) -> bool:
    return not is_tied(config)


def shared_head(of: str, to: str = "lm_head.weight") -> tuple[Rule, ...]:
    """``lm_head`` with the weight of the embeddings ``of``, in Paddle's net too, or one of its own: the config says."""
    return rules(
        tied("lm_head.weight", "vocab", "hidden", of=of, again=to, when=is_tied),
        keep("lm_head.weight", "vocab", "hidden", to=to, when=is_untied),
    )


def copied_head(name: str, of: str, to: str | None = None, width: Size = "hidden") -> tuple[Rule, ...]:
    """The same where PaddleNLP's class has a weight of its own all the same: a copy of the embeddings ``of``."""
    return rules(
        buffer(name, "vocab", width, to=to, filling=copy_of(of), when=is_tied),
        keep(name, "vocab", width, to=to, when=is_untied),
    )


def sequence_classification(architecture: str, paddlenlp: str | None, width: Size = "hidden") -> Head:
    """The class scores of a row's last token."""
    return Head(architecture, paddlenlp, "sequence-classification", rules(linear("score", "labels", width, bias=False)))


def token_classification(architecture: str, paddlenlp: str | None) -> Head:
    return Head(architecture, paddlenlp, "token-classification", rules(linear("classifier", "labels", "hidden")))


def question_answering(architecture: str, paddlenlp: str | None, width: Size = "hidden", scores: Size = 2) -> Head:
    return Head(architecture, paddlenlp, "question-answering", rules(linear("qa_outputs", scores, width)))
