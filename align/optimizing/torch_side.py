"""The reference's optimizer and schedule, from a recipe: ``torch.optim`` and ``transformers``' own schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import optimization

from ..gradients.torch_side import clip
from .recipe import Recipe


class TorchTraining:
    """Updates of ``parameters``, to be called once all gradients of an update are added up.

    Those with one axis, which are biases and norms, do not decay.
    """

    def __init__(self, recipe: Recipe, parameters: Sequence[torch.nn.Parameter], **choices: Any) -> None:
        """``choices`` are arguments of the optimizer's class that change nothing but its rounding, as ``foreach``."""
        self.recipe, self.parameters = recipe, list(parameters)
        groups = [{"params": [one for one in self.parameters if (one.dim() > 1) == decays], "weight_decay": decay}
                  for decays, decay in ((True, recipe.weight_decay), (False, 0.0))]
        self.optimizer = _optimizer(recipe, [group for group in groups if group["params"]], choices)
        self.schedule = schedule_of(recipe, self.optimizer)

    @property
    def rate(self) -> float:
        """What the next update takes."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self) -> None:
        """Clip, step, go on in the schedule; gradients are gone behind it."""
        if self.recipe.clip is not None:
            clip(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def schedule_of(recipe: Recipe, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """``transformers``' own schedule, as its ``Trainer`` takes it; Noam's by the formula, as torch has none."""
    after, steps = recipe.warmup, recipe.steps
    if recipe.schedule == "noam":
        return LambdaLR(optimizer, lambda done: recipe.noam(done + 1) / recipe.lr)
    if recipe.schedule == "linear":
        return optimization.get_linear_schedule_with_warmup(optimizer, after, steps)
    if recipe.schedule == "cosine":
        return optimization.get_cosine_schedule_with_warmup(optimizer, after, steps)
    if recipe.schedule == "polynomial":
        return optimization.get_polynomial_decay_schedule_with_warmup(optimizer, after, steps, recipe.end, recipe.power)
    return optimization.get_constant_schedule_with_warmup(optimizer, after)


def rates_of(recipe: Recipe, many: int) -> list[float]:
    """The rates of the first ``many`` updates."""
    nothing = torch.nn.Parameter(torch.zeros(()))
    schedule = schedule_of(recipe, torch.optim.SGD([nothing], lr=recipe.lr))
    found = []
    for _ in range(many):
        found += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    return found


def _optimizer(recipe: Recipe, groups: Any, choices: dict[str, Any]) -> torch.optim.Optimizer:
    if recipe.optimizer in ("sgd", "momentum"):
        momentum = recipe.momentum if recipe.optimizer == "momentum" else 0.0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=momentum, dampening=0.0,
                               nesterov=recipe.nesterov and momentum > 0, **choices)
    cls = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    betas = choices.pop("betas", (recipe.beta1, recipe.beta2))
    return cls(groups, lr=recipe.lr, betas=betas, eps=recipe.epsilon, amsgrad=False, **choices)
