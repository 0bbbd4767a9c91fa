"""Why a loss is not torch's: what known mistakes make of the reference's own logits.

A mistake explains a loss where it turns torch's into the candidate's, to the tolerance that losses have; it explains a
net where it does so for every loss that is wrong, with and without padding and ignored labels alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..tasks import Flat, Labels, Task
from ..tolerance import LOSS

Supposed = dict[str, float]
TokenLoss = Callable[[np.ndarray, np.ndarray], np.ndarray]
DIVISOR = "the sum is divided by all positions, those without a label too"


def supposed(task: Task, outputs: Mapping[str, np.ndarray], labels: Labels,
             token_loss: TokenLoss) -> Supposed:
    """The mean loss under each mistake, by the words for it.

    ``token_loss`` is the reference's cross entropy of logits [n, classes] and labels [n], 0 where there is no label.
    """
    return {told: float(sum(task.share * value for value in means))
            for told, means in _means(task, outputs, labels, token_loss)}


def explained(expected: Mapping[str, float], found: Mapping[str, float],
              mistakes: Mapping[str, Supposed]) -> tuple[str, str, float, float] | None:
    """(mistake, loss, error before, error after) of the one mistake that every wrong loss shows, the largest first.

    ``expected`` and ``found`` are torch's and the candidate's mean losses, by name.
    """
    wrong = [name for name in expected if not _near(found[name], expected[name])]
    common = [told for told in mistakes.get(wrong[0], {}) if all(
        _near(found[name], mistakes.get(name, {}).get(told)) for name in wrong)] if wrong else []
    if not common:
        return None
    name = max(wrong, key=lambda name: _error(found[name], expected[name]))
    return common[0], name, _error(found[name], expected[name]), _error(found[name], mistakes[name][common[0]])


def _means(task: Task, outputs: Mapping[str, np.ndarray], labels: Labels,
           token_loss: TokenLoss) -> Iterator[tuple[str, list[float]]]:
    right = _losses(task.token_losses(outputs, labels), token_loss)
    if right:
        yield DIVISOR, [losses.mean() for losses, _ in right]
    for told, misread in task.misread.items():
        wrong = _losses(misread(outputs, labels), token_loss)
        yield told, [losses.sum() / labelled.sum() for losses, labelled in wrong]
        yield f"{told}, and {DIVISOR}", [losses.mean() for losses, _ in wrong]


def _losses(flat: Flat, token_loss: TokenLoss) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each kind the losses in float64 and where there is a label."""
    return [(token_loss(logits, labels).astype(np.float64), labels >= 0) for logits, labels in flat.values()]


def _near(found: float, value: float | None) -> bool:
    return value is not None and _error(found, value) <= 2 * LOSS


def _error(found: float, value: float) -> float:
    return abs(found - value) / abs(value) if value else abs(found)
