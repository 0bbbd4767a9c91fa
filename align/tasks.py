"""What a head is for: the labels its loss takes, and which of its outputs have one row per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from convert.rules import Config, Sizes

from . import prompts
from .inputs import Inputs, pad_token

IGNORED = -100
Labels = dict[str, np.ndarray]
Flat = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """``labels(inputs, config, sizes, generator, ignore)`` draws labels, some of them ignored if asked.

    ``token_losses(outputs, labels)`` pairs logits [n, classes] with labels [n] for the losses without reduction.
    ``spared`` are inputs that a model makes of the labels where it is not given them. The loss is ``share`` times the
    sum of the means. ``misread`` names ways in which a net may pair logits and labels wrongly.
    """

    labels: Callable[[Inputs, Config, Sizes, np.random.Generator, bool], Labels]
    token_losses: Callable[[Mapping[str, np.ndarray], Labels], Flat]
    spared: tuple[str, ...] = ()
    share: float = 1.0
    misread: Mapping[str, Callable[[Mapping[str, np.ndarray], Labels], Flat]] = field(default_factory=dict)


def _token_labels(inputs: Inputs, classes: int, generator: np.random.Generator, ignore: bool) -> np.ndarray:
    mask = inputs.last_mask
    labels = generator.integers(0, classes, mask.shape)
    ignored = ~mask
    if ignore:
        ignored |= generator.random(mask.shape) < 0.3
    return np.where(ignored, IGNORED, labels)


def _with_special_words(labels: np.ndarray, config: Config, sizes: Sizes) -> np.ndarray:
    """The first labels [batch, tokens] are padding, the end of a text, the first word and the last: a loss that leaves
    one of these out, as those do that ignore the padding's id, is another one.
    """
    told = [pad_token(config), config.get("eos_token_id"), 0, sizes["vocab"] - 1]
    words = list(dict.fromkeys(word for word in told if isinstance(word, int) and 0 <= word < sizes["vocab"]))
    places = np.argwhere((labels != IGNORED) & (np.arange(labels.shape[1]) > 0))[: len(words)]
    labels[tuple(places.T)] = words[: len(places)]
    return labels


def _row_labels(inputs: Inputs, classes: int, generator: np.random.Generator, ignore: bool) -> np.ndarray:
    labels = generator.integers(0, classes, len(inputs.mask))
    return np.where(np.arange(len(labels)) == 1, IGNORED, labels) if ignore else labels


def _flat(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(logits.reshape(-1, logits.shape[-1])), labels.reshape(-1)


def numbers(labels: Labels) -> bool:
    """Whether the labels are numbers rather than classes: no -100 among them, and no loss per row."""
    return any(array.dtype.kind == "f" for array in labels.values())


def _vocabulary_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                       ignore: bool) -> Labels:
    return {"labels": _with_special_words(_token_labels(inputs, sizes["vocab"], generator, ignore), config, sizes)}


def _class_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                  ignore: bool) -> Labels:
    return {"labels": _token_labels(inputs, sizes["labels"], generator, ignore)}


def _causal_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                   ignore: bool) -> Labels:
    """A token is a label where the token before it, which predicts it, is no padding."""
    predicted = inputs.mask & np.roll(inputs.mask, 1, axis=1)
    ids = np.where(predicted, inputs.arrays["input_ids"], IGNORED)
    drop = generator.random(ids.shape) < 0.3
    return {"labels": _with_special_words(np.where(drop, IGNORED, ids) if ignore else ids, config, sizes)}


def _answer_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                   ignore: bool) -> Labels:
    """A word is a label where it is part of the answer: the context is seen from everywhere."""
    ids = np.where(prompts.answers(inputs.arrays["attention_mask"]), inputs.arrays["input_ids"], IGNORED)
    drop = generator.random(ids.shape) < 0.3
    return {"labels": _with_special_words(np.where(drop, IGNORED, ids) if ignore else ids, config, sizes)}


def _classification_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                           ignore: bool) -> Labels:
    """Classes, one or several a row, or numbers to regress: what ``problem_type`` says, as transformers reads it.

    Numbers lie some 8 away from 0. Nearer to the predictions, (prediction - number)^2 loses digits, and torch's
    own loss is 9e-7 of itself from float64.
    """
    rows, classes = len(inputs.mask), sizes["labels"]
    kind = problem_of(config, classes)
    if kind == "single_label_classification":
        return {"labels": _row_labels(inputs, classes, generator, ignore)}
    shape = (rows, classes) if classes > 1 or kind == "multi_label_classification" else (rows,)
    drawn = (generator.integers(0, 2, shape) if kind == "multi_label_classification" else
             generator.choice([-8, 8], shape) + generator.standard_normal(shape))
    return {"labels": drawn.astype(np.float32)}


def problem_of(config: Config, classes: int) -> str:
    return config.get("problem_type") or ("regression" if classes == 1 else "single_label_classification")


def terms_of(task: Task, outputs: Mapping[str, np.ndarray], labels: Labels, config: Config,
             losses: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the mean loss is the sum of, [n], float64: an error of its own each.

    ``losses`` are those of :attr:`Task.token_losses` without reduction, by kind, 0 where there is no label. Of labels
    that are numbers: (x - y)^2 or, of a probability, log(1 + e^x) - x y, over the number of elements.
    """
    if numbers(labels):
        x, y = (array.astype(np.float64).reshape(-1) for array in (outputs["logits"], labels["labels"]))
        several = problem_of(config, outputs["logits"].shape[-1]) == "multi_label_classification"
        return (np.logaddexp(x, 0.0) - x * y if several else np.square(x - y)) / x.size
    flat = task.token_losses(outputs, labels)
    return np.concatenate([task.share * losses[kind].astype(np.float64) / max(1, (targets >= 0).sum())
                           for kind, (_, targets) in flat.items()])


def base_of(labels: Labels, config: Config) -> float:
    """How large the numbers are whose difference a loss is, beside itself: a cross entropy is the logarithm of a sum
    that begins with 1, a square begins with nothing.
    """
    squares = numbers(labels) and config.get("problem_type") != "multi_label_classification"
    return 0.0 if squares else 1.0


def _span_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                 ignore: bool) -> Labels:
    rows, length = inputs.mask.shape
    start = generator.integers(0, length // 2, rows)
    end = start + generator.integers(0, length // 2, rows)
    if ignore:
        start[1] = end[1] = length + 5
    return {"start_positions": start, "end_positions": end}


def _pretraining_labels(inputs: Inputs, config: Config, sizes: Sizes, generator: np.random.Generator,
                        ignore: bool) -> Labels:
    return {**_vocabulary_labels(inputs, config, sizes, generator, ignore),
            "next_sentence_label": _row_labels(inputs, 2, generator, ignore)}


def _classification_losses(outputs: Mapping[str, np.ndarray], labels: Labels) -> Flat:
    if numbers(labels):
        return {}
    return {"per_row": _flat(outputs["logits"], labels["labels"])}


def _span_losses(outputs: Mapping[str, np.ndarray], labels: Labels) -> Flat:
    def clamped(name: str) -> np.ndarray:
        length = outputs["start_logits"].shape[1]
        return np.where(labels[name] >= length, IGNORED, labels[name])
    return {"per_row_start": (outputs["start_logits"], clamped("start_positions")),
            "per_row_end": (outputs["end_logits"], clamped("end_positions"))}


def _next_token_losses(outputs: Mapping[str, np.ndarray], labels: Labels) -> Flat:
    return {"per_token": _flat(outputs["logits"][:, :-1], labels["labels"][:, 1:])}


def hidden_states(outputs: Mapping[str, np.ndarray], inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """A model's last hidden states [batch, tokens, width], and the mask of the real ones [batch, tokens].

    Every place of a feature map [batch, channels, height, width] is one.
    """
    hidden = outputs["last_hidden_state"]
    if hidden.ndim != 4:
        return hidden, inputs.last_mask
    rows = np.ascontiguousarray(hidden.reshape(*hidden.shape[:2], -1).swapaxes(1, 2))
    return rows, np.ones(rows.shape[:2], bool)


UNSHIFTED = {"the labels are not shifted, so that each position is to predict its own token":
             lambda outputs, labels: {"per_token": _flat(outputs["logits"], labels["labels"])}}
TASKS = {
    "causal-lm": Task(_causal_labels, _next_token_losses, misread=UNSHIFTED),
    "prefix-lm": Task(_answer_labels, _next_token_losses, misread=UNSHIFTED),
    "masked-lm": Task(
        _vocabulary_labels,
        lambda outputs, labels: {"per_token": _flat(outputs["logits"], labels["labels"])}),
    "pre-training": Task(
        _pretraining_labels,
        lambda outputs, labels: {
            "per_token": _flat(outputs["prediction_logits"], labels["labels"]),
            "per_row": _flat(outputs["seq_relationship_logits"], labels["next_sentence_label"])}),
    "sequence-classification": Task(_classification_labels, _classification_losses),
    "image-classification": Task(_classification_labels, _classification_losses),
    "token-classification": Task(
        _class_labels,
        lambda outputs, labels: {"per_token": _flat(outputs["logits"], labels["labels"])}),
    "translation": Task(
        _vocabulary_labels,
        lambda outputs, labels: {"per_token": _flat(outputs["logits"], labels["labels"])},
        spared=("decoder_input_ids", "decoder_attention_mask")),
    "question-answering": Task(_span_labels, _span_losses, share=0.5),
}
BARE = {"encoder", "encoder-decoder", "image-encoder"}
"""Tasks of models without a head: they have no loss of their own, and are measured by their mean-pooled states."""
GENERATING = {"causal-lm", "prefix-lm", "translation"}
"""Tasks of models that continue a text."""
