"""A Paddle optimizer and schedule from a recipe, as someone who knows their differences from torch's sets them up.

- ``ClipGradByGlobalNorm`` given to an optimizer with parameter groups clips each group by the norm of that group
  alone. So there is one group, and what does not decay is told by ``apply_decay_param_fun``, or by each parameter's
  regularizer.
- ``PolynomialDecay`` ends at 1e-4 unless it is told another end, which is above many a fine-tuning's rate.
- ``NoamDecay`` counts from 0, so that its first update has the rate 0; eq. 3 of Vaswani et al. counts from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle.optimizer import lr

from .recipe import Recipe


class PaddleTraining:
    """Updates of ``parameters``, a name of the net's and the tensor each; ``decays`` says of a name whether it decays.

    Parameters' regularizers are the optimizer's while it is used; :meth:`close` puts back what they were.
    """

    def __init__(self, recipe: Recipe, parameters: Sequence[tuple[str, Any]], decays: Callable[[str], bool]) -> None:
        self.recipe = recipe
        self.tensors = [tensor for _, tensor in parameters]
        self._before = [tensor.regularizer for tensor in self.tensors]
        decaying = [tensor for name, tensor in parameters if decays(name)]
        self.optimizer = _optimizer(recipe, self.tensors, decaying)

    @property
    def rate(self) -> float:
        """What the next update takes."""
        return float(self.optimizer.get_lr())

    def update(self) -> None:
        """Clip, step, go on in the schedule; gradients are gone behind it."""
        self.optimizer.step()
        schedule = self.optimizer._learning_rate
        if isinstance(schedule, lr.LRScheduler):
            schedule.step()
        self.optimizer.clear_grad(set_to_zero=False)

    def after_backward(self, number: int) -> None:
        """:meth:`update` behind the last of the micro-batches of an update, which are counted from 1."""
        if number % self.recipe.accumulate == 0:
            self.update()

    def close(self) -> None:
        for tensor, before in zip(self.tensors, self._before, strict=True):
            tensor.regularizer = before


def schedule_of(recipe: Recipe) -> lr.LRScheduler | float:
    """Of ``paddle.optimizer.lr``; a schedule without warm-up has no ``LinearWarmup``, which asks for a step or more."""
    left = recipe.steps - recipe.warmup
    if recipe.schedule == "noam":
        return lr.NoamDecay(recipe.width, recipe.warmup, recipe.scale, last_epoch=0)
    if recipe.schedule == "linear":
        behind: lr.LRScheduler | float = lr.PolynomialDecay(recipe.lr, left, end_lr=0.0, power=1.0)
    elif recipe.schedule == "cosine":
        behind = lr.CosineAnnealingDecay(recipe.lr, left)
    elif recipe.schedule == "polynomial":
        behind = lr.PolynomialDecay(recipe.lr, left, end_lr=recipe.end, power=recipe.power)
    else:
        behind = recipe.lr
    return lr.LinearWarmup(behind, recipe.warmup, 0.0, recipe.lr) if recipe.warmup else behind


def rates_of(recipe: Recipe, many: int) -> list[float]:
    """The rates of the first ``many`` updates."""
    schedule = schedule_of(recipe)
    if not isinstance(schedule, lr.LRScheduler):
        return [schedule] * many
    found = []
    for _ in range(many):
        found.append(float(schedule()))
        schedule.step()
    return found


def _optimizer(recipe: Recipe, tensors: Sequence[Any], decaying: Sequence[Any]) -> paddle.optimizer.Optimizer:
    clipping = None if recipe.clip is None else paddle.nn.ClipGradByGlobalNorm(recipe.clip)
    named = {"learning_rate": schedule_of(recipe), "parameters": list(tensors), "grad_clip": clipping}
    if recipe.optimizer == "adamw":
        names = {tensor.name for tensor in decaying}
        return paddle.optimizer.AdamW(beta1=recipe.beta1, beta2=recipe.beta2, epsilon=recipe.epsilon,
                                      weight_decay=recipe.weight_decay, apply_decay_param_fun=names.__contains__,
                                      **named)
    for tensor in tensors:
        tensor.regularizer = None
    for tensor in decaying:
        tensor.regularizer = paddle.regularizer.L2Decay(recipe.weight_decay)
    if recipe.optimizer == "adam":
        return paddle.optimizer.Adam(beta1=recipe.beta1, beta2=recipe.beta2, epsilon=recipe.epsilon, **named)
    if recipe.optimizer == "momentum":
        return paddle.optimizer.Momentum(momentum=recipe.momentum, use_nesterov=recipe.nesterov, **named)
    return paddle.optimizer.SGD(**named)
