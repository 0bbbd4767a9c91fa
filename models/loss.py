"""Losses as torch computes them: means over valid labels only, nothing clipped, NaN when nothing is valid.

Paddle's own ``cross_entropy`` divides by all positions when ``ignore_index`` is negative, clips the shifted
logits at -64 and adds up a vocabulary one element after the other (5e-6 off at 50,400 words; torch: 5e-8). So
log-sum-exp is written out here, and long sums are taken in float64.
"""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """-log softmax(logits)[label] per position, and its mean or sum over the positions that are not ignored.

    logits [..., classes] float, labels [...] integer. "none" returns the shape of the labels with 0 where
    ignored. A mean over no valid label is NaN, with gradients of zero, as torch has it.
    """
    valid = labels != ignore_index
    classes = logits.shape[-1]
    inside = (labels >= 0) & (labels < classes)
    if not bool((inside | ~valid).all()):
        raise ValueError(f"a label is neither in [0, {classes}) nor the ignored index {ignore_index}.")
    target = paddle.where(valid, labels, paddle.zeros_like(labels)).unsqueeze(-1)
    shifted = logits - logits.detach().max(axis=-1, keepdim=True)
    chosen = paddle.take_along_axis(shifted, target, axis=-1).squeeze(-1)
    losses = _log_sum_exp(shifted) - chosen
    losses = paddle.where(valid, losses, paddle.zeros_like(losses))
    return _reduce(losses, valid, reduction)


def causal_lm_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Cross entropy of each token given those before: logits [batch, time, classes], labels [batch, time]."""
    return cross_entropy(logits[:, :-1], labels[:, 1:], ignore_index)


def mse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over all elements."""
    return _mean(paddle.square(predictions - targets.astype(predictions.dtype)))


def bce_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of (1 - y) log(1 + e^x) + y log(1 + e^-x), which loses no digits of a good prediction."""
    targets = targets.astype(logits.dtype)
    return _mean((1.0 - targets) * _softplus(logits) + targets * _softplus(-logits))


def classification_loss(
    logits: Tensor, labels: Tensor, num_labels: int, problem_type: str | None = None
) -> Tensor:
    """The loss of transformers' sequence classification heads: logits [batch, num_labels].

    ``problem_type`` None is taken from the labels: one label is a regression, integer labels choose one class
    each, other labels [batch, num_labels] are a probability per class.
    """
    kind = problem_type or _problem_type(labels, num_labels)
    if kind == "regression":
        return mse(logits.flatten(), labels.flatten()) if num_labels == 1 else mse(logits, labels)
    if kind == "single_label_classification":
        return cross_entropy(logits.reshape([-1, num_labels]), labels.flatten())
    if kind == "multi_label_classification":
        return bce_with_logits(logits, labels)
    raise ValueError(
        f"unknown problem_type {kind!r}: regression, single_label_classification or "
        "multi_label_classification."
    )


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor
) -> Tensor:
    """Mean of the cross entropies of a span's two ends: logits [batch, time], positions [batch].

    Positions are clamped to [0, time]; ``time`` itself, an answer that was cut off, is ignored.
    """
    length = start_logits.shape[-1]
    losses = [
        cross_entropy(logits, positions.flatten().clip(0, length), ignore_index=length)
        for logits, positions in [(start_logits, start_positions), (end_logits, end_positions)]
    ]
    return (losses[0] + losses[1]) / 2


def contrastive_loss(embeddings_a: Tensor, embeddings_b: Tensor, scale: float = 20.0) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017): cross entropy of scaled cosine similarities.

    Row i of a [batch, width] belongs to row i of b [batch or more, width]; all other rows of b are wrong.
    """
    scores = scale * paddle.matmul(_unit(embeddings_a), _unit(embeddings_b), transpose_y=True)
    return cross_entropy(scores, paddle.arange(embeddings_a.shape[0]))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of hidden [batch, time, width] where mask [batch, time] is 1 (Reimers and Gurevych 2019)."""
    weights = mask.unsqueeze(-1).astype(hidden.dtype)
    return (hidden * weights).sum(axis=1) / weights.sum(axis=1).clip(min=1e-9)


def _log_sum_exp(shifted: Tensor) -> Tensor:
    return paddle.log(paddle.exp(shifted).sum(axis=-1, dtype="float64")).astype(shifted.dtype)


def _reduce(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum(dtype="float64").astype(losses.dtype)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / valid.astype(losses.dtype).sum()
    raise ValueError(f"unknown reduction {reduction!r}: mean, sum or none.")


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return paddle.logaddexp(x, paddle.zeros_like(x))


def _mean(x: Tensor) -> Tensor:
    return (x.sum(dtype="float64") / x.size).astype(x.dtype)


def _problem_type(labels: Tensor, num_labels: int) -> str:
    if num_labels == 1:
        return "regression"
    integer = labels.dtype in (paddle.int64, paddle.int32)
    return "single_label_classification" if integer else "multi_label_classification"


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, axis=-1, epsilon=1e-12)
