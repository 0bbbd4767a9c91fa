"""From a model's outputs to predictions and metric values; one numpy implementation in float64 for both sides.

Each task reduces a batch to small arrays, so that logits never pile up, and makes its values from them at the end.
``*.predictions`` go with ``*.margins``: how far the chosen score lies above the next, and ``*.largest``, the
magnitude that rounding is measured by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import prompts
from .inputs import Inputs
from .texts import Example

Arrays = dict[str, np.ndarray]
Reduce = Callable[[Mapping[str, np.ndarray], Inputs, Sequence[Example]], Arrays]
MAX_ANSWER = 30
NEIGHBOURS = 5
TOP = 5
ROWS = 64


@dataclass(frozen=True)
class Score:
    """``reduce(outputs, inputs, examples)`` for one batch, ``values(arrays)`` over all of them."""

    reduce: Reduce
    values: Callable[[Arrays], dict[str, float]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of targets [n] under logits [n, classes], in float64, a few rows at a time: a vocabulary is large."""
    found = np.empty(len(logits))
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        found[rows] = -np.take_along_axis(log_softmax(logits[rows]), targets[rows, None], axis=-1)[:, 0]
    return found


def accuracy(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Share of predictions that equal their target."""
    return float(np.mean(predictions == targets))


def macro_f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes that occur of 2 tp / (2 tp + fp + fn)."""
    from sklearn.metrics import f1_score
    return float(f1_score(targets, predictions, average="macro", zero_division=0.0))


def perplexity(token_losses: np.ndarray) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens."""
    return float(np.exp(token_losses.astype(np.float64).mean()))


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Of the corpus, 0 to 100 (Papineni et al. 2002), with sacrebleu's defaults: 13a tokens, exponential smoothing."""
    from sacrebleu.metrics import BLEU
    return float(BLEU().corpus_score(list(texts), [list(references)]).score)


def signature() -> str:
    """sacrebleu's own words for how :func:`bleu` counts, to be printed beside the figure."""
    from sacrebleu.metrics import BLEU
    scorer = BLEU()
    scorer.corpus_score(["a"], [["a"]])
    return f"BLEU {scorer.get_signature()}"


def choices(name: str, logits: np.ndarray, targets: np.ndarray) -> Arrays:
    """Greedy choice among the classes, for logits [n, classes] and targets [n]."""
    if logits.shape[-1] < 2:
        margins = np.full(len(logits), np.inf, np.float32)
    else:
        best = np.partition(logits, -2, axis=-1)[:, -2:]
        margins = best[:, 1] - best[:, 0]
    return {f"{name}.predictions": logits.argmax(-1), f"{name}.margins": margins,
            f"{name}.largest": np.abs(logits).max(-1, initial=0), f"{name}.targets": targets}


def _next_tokens(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    first = np.array([example.targets.get("first", 1) for example in examples])
    scored = np.arange(1, inputs.mask.shape[1]) >= first[:, None]
    return _predicted(outputs, inputs, inputs.mask[:, :-1] & inputs.mask[:, 1:] & scored)


def _answers(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    """The words of the answer alone: those of a prompt's context see themselves."""
    return _predicted(outputs, inputs, prompts.answers(inputs.arrays["attention_mask"])[:, 1:])


def _predicted(outputs: Mapping[str, np.ndarray], inputs: Inputs, pairs: np.ndarray) -> Arrays:
    """Where ``pairs`` [batch, tokens - 1] is True, a token given those before it."""
    return _tokens(outputs["logits"][:, :-1], inputs.arrays["input_ids"][:, 1:], pairs)


def _translated_tokens(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    """Each token of the reference translation, given those before it."""
    labels = _padded([example.targets["labels"] for example in examples], outputs["logits"].shape[1])
    return _tokens(outputs["logits"], labels, labels != -100)


def _tokens(logits: np.ndarray, targets: np.ndarray, scored: np.ndarray) -> Arrays:
    """Of logits [batch, tokens, vocabulary] those that are ``scored`` [batch, tokens], row by row: a batch of them is
    large, and its copies more so.
    """
    rows = [choices("token", one[chosen], target[chosen])
            | {"token_nll": negative_log_likelihood(one[chosen], target[chosen])}
            for one, target, chosen in zip(logits, targets, scored, strict=True)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _translation_values(arrays: Arrays) -> dict[str, float]:
    texts = texts_of(arrays["text.predictions"], unpacked(arrays["piece_targets"]))
    return {"perplexity": perplexity(arrays["token_nll"]), **_accuracy("token", "next_token_accuracy")(arrays),
            "bleu": bleu(texts, unpacked(arrays["sentence_targets"]))}


def texts_of(ids: np.ndarray, pieces: Sequence[str]) -> list[str]:
    """SentencePiece's pieces joined, ``▁`` for a space, of ids [rows, tokens]; special tokens have an empty piece.

    Without ``pieces`` the ids themselves are the words.
    """
    if not pieces:
        return [" ".join(map(str, row)) for row in ids]
    return ["".join(pieces[token] if token < len(pieces) else "" for token in row).replace("▁", " ").strip()
            for row in ids]


def packed(texts: Sequence[str]) -> np.ndarray:
    """Texts as one array of bytes, so that they travel with the other arrays."""
    return np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)


def unpacked(array: np.ndarray) -> list[str]:
    return json.loads(array.tobytes())


def _masked_tokens(logits: str) -> Reduce:
    def reduce(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
        labels = _padded([example.targets["labels"] for example in examples], inputs.mask.shape[1])
        chosen = labels != -100
        return choices("token", outputs[logits][chosen], labels[chosen])
    return reduce


def _masked_tokens_and_sentence(outputs: Mapping[str, np.ndarray], inputs: Inputs,
                                examples: Sequence[Example]) -> Arrays:
    sentence = np.array([example.targets["sentence"] for example in examples])
    return (_masked_tokens("prediction_logits")(outputs, inputs, examples)
            | choices("sentence", outputs["seq_relationship_logits"], sentence))


def _classes(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    targets = np.array([example.targets["label"] for example in examples])
    if outputs["logits"].shape[-1] == 1:
        return {"scores": outputs["logits"][:, 0], "score_targets": targets}
    return choices("class", outputs["logits"], targets)


def _best_classes(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    """The best class, and the five best where there are more than five; their margin is to the sixth."""
    found, logits = _classes(outputs, inputs, examples), outputs["logits"]
    if logits.shape[-1] <= TOP:
        return found
    best = np.sort(np.argpartition(logits, -TOP, axis=-1)[:, -TOP:], axis=-1)
    ordered = np.sort(logits, axis=-1)
    margins, largest = ordered[:, -TOP] - ordered[:, -TOP - 1], found["class.largest"]
    return found | {"classes.predictions": best, "classes.margins": np.repeat(margins[:, None], TOP, 1),
                    "classes.largest": np.repeat(largest[:, None], TOP, 1), "classes.targets": found["class.targets"]}


def _top_values(arrays: Arrays) -> dict[str, float]:
    """Share of rows whose label is the best class, and is among the five best."""
    if "scores" in arrays:
        return _class_values(arrays)
    among = {"top5_accuracy": float((arrays["classes.predictions"] == arrays["classes.targets"][:, None]).any(1).mean())
             } if "classes.predictions" in arrays else {}
    return {"top1_accuracy": accuracy(arrays["class.predictions"], arrays["class.targets"])} | among


def _class_values(arrays: Arrays) -> dict[str, float]:
    if "scores" in arrays:
        errors = arrays["scores"].astype(np.float64) - arrays["score_targets"]
        return {"mean_squared_error": float(np.mean(errors ** 2))}
    return _accuracy_and_f1("class")(arrays)


def _spans(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    """The best span of at most 30 tokens inside the passage, by the sum of its start and end logits."""
    length = inputs.mask.shape[1]
    allowed = np.triu(np.ones((length, length), bool)) & ~np.triu(np.ones((length, length), bool), MAX_ANSWER)
    found = []
    for row, example in enumerate(examples):
        passage = _padded([example.targets["passage"]], length)[0] == 1
        possible = allowed & passage[:, None] & passage
        scores = outputs["start_logits"][row][:, None].astype(np.float64) + outputs["end_logits"][row]
        largest = np.abs(scores[possible]).max()
        scores[~possible] = -np.inf
        best = np.partition(np.append(scores, -np.inf), -2)[-2:]
        found.append((int(scores.argmax()), best[1] - best[0], largest))
    spans, margins, largest = (np.array(column) for column in zip(*found, strict=True))
    starts, ends = spans // length, spans % length
    gold = [(example.targets["start"], example.targets["end"]) for example in examples]
    return {"span.predictions": np.stack([starts, ends], -1), "span.margins": np.stack([margins, margins], -1),
            "span.largest": np.stack([largest, largest], -1), "span.targets": np.array(gold)}


def _span_values(arrays: Arrays) -> dict[str, float]:
    """Exact match, and F1 of the overlap of tokens (Rajpurkar et al. 2016, over token positions)."""
    exact, overlap = [], []
    for (start, end), (first, last) in zip(arrays["span.predictions"], arrays["span.targets"], strict=True):
        shared = max(0, min(end, last) - max(start, first) + 1) if first >= 0 else 0
        exact.append((start, end) == (first, last))
        overlap.append(2 * shared / ((end - start + 1) + (last - first + 1)))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _embeddings(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    weights = inputs.last_mask[..., None].astype(np.float64)
    pooled = (outputs["last_hidden_state"] * weights).sum(1) / weights.sum(1)
    labels = np.array([example.targets["label"] for example in examples])
    return {"embeddings": pooled.astype(outputs["last_hidden_state"].dtype), "embedding_labels": labels}


def _pooled_pictures(outputs: Mapping[str, np.ndarray], inputs: Inputs, examples: Sequence[Example]) -> Arrays:
    """[batch, channels, 1, 1] as one vector a picture."""
    pooled = outputs["pooler_output"]
    labels = np.array([example.targets["label"] for example in examples])
    return {"embeddings": pooled.reshape(len(pooled), -1), "embedding_labels": labels}


def neighbours(embeddings: np.ndarray) -> Arrays:
    """The nearest rows of every row by cosine, best first; a rank's margin is to the ranks on both sides."""
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    count = min(NEIGHBOURS, len(unit) - 1)
    order = np.argsort(-similarity, axis=-1, kind="stable")
    ranked = np.take_along_axis(similarity, order, axis=-1)
    gaps = np.concatenate([np.full((len(unit), 1), np.inf), ranked[:, :-1] - ranked[:, 1:]], axis=-1)
    margins = np.minimum(gaps[:, :count], gaps[:, 1: count + 1])
    return {"neighbour.predictions": order[:, :count], "neighbour.margins": margins,
            "neighbour.largest": np.ones_like(margins)}


def _neighbour_values(arrays: Arrays) -> dict[str, float]:
    labels = arrays["embedding_labels"]
    nearest = labels[arrays["neighbour.predictions"][:, 0]]
    return {"nearest_neighbour_accuracy": accuracy(nearest, labels), "nearest_neighbour_f1": macro_f1(nearest, labels)}


def _accuracy(name: str, told: str) -> Callable[[Arrays], dict[str, float]]:
    return lambda arrays: {told: accuracy(arrays[f"{name}.predictions"], arrays[f"{name}.targets"])}


def _next_token_values(arrays: Arrays) -> dict[str, float]:
    return {"perplexity": perplexity(arrays["token_nll"]), **_accuracy("token", "next_token_accuracy")(arrays)}


def _accuracy_and_f1(name: str) -> Callable[[Arrays], dict[str, float]]:
    return lambda arrays: {"accuracy": accuracy(arrays[f"{name}.predictions"], arrays[f"{name}.targets"]),
                           "f1": macro_f1(arrays[f"{name}.predictions"], arrays[f"{name}.targets"])}


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    return np.array([[*row, *[-100] * (width - len(row))] for row in rows])


SCORES = {
    "causal-lm": Score(_next_tokens, _next_token_values),
    "prefix-lm": Score(_answers, _next_token_values),
    "masked-lm": Score(_masked_tokens("logits"), _accuracy("token", "masked_token_accuracy")),
    "pre-training": Score(_masked_tokens_and_sentence, lambda arrays: {
        **_accuracy("token", "masked_token_accuracy")(arrays),
        **_accuracy("sentence", "next_sentence_accuracy")(arrays)}),
    "sequence-classification": Score(_classes, _class_values),
    "token-classification": Score(_masked_tokens("logits"), _accuracy_and_f1("token")),
    "question-answering": Score(_spans, _span_values),
    "translation": Score(_translated_tokens, _translation_values),
    "encoder": Score(_embeddings, _neighbour_values),
    "encoder-decoder": Score(_embeddings, _neighbour_values),
    "image-classification": Score(_best_classes, _top_values),
    "image-encoder": Score(_pooled_pictures, _neighbour_values),
}
DECODED = {"translation"}
"""Tasks whose texts are decoded besides, from what the encoder reads alone."""
