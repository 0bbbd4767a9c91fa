"""Why a training is not torch's: what known mistakes of a set-up make of torch's own losses, rates and weights.

Each is put to torch: a loss of another batch or of moved labels is torch's loss of that, a rate that came a step late
is torch's rate of the step before. An explanation is given where that is what the candidate has, to the tolerance of
such numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from convert.checkpoint import open_checkpoint
from convert.dtypes import to_float32

from ..diagnose import Explanation
from ..gradients.batches import Batch
from ..optimizing.recipe import Recipe
from ..runs import Run
from ..tasks import IGNORED, TASKS, numbers
from ..tolerance import LOSS, RATE
from ..trace import Step
from ..training.course import Settings
from ..training.dropping import Call, differing, unpacked
from . import losses

OTHERS = 16
"""Of so many steps' batches the loss is known that they would have had in the first step."""
LEFT = 0.1
"""An explanation of how far weights have moved leaves at most so much of the error."""
MOMENTUM = 0.1
"""Of torch's batch norm: the share of a batch in its running statistics."""
TokenLoss = Callable[[np.ndarray, np.ndarray], np.ndarray]


# What torch makes of mistakes -----------------------------------------------------------------------------------------

def supposed(trainer: Any, run: Run, batches: Sequence[Sequence[Batch]], token_loss: TokenLoss) -> dict[str, float]:
    """The first step's loss under each mistake, by the words for it; ``trainer`` is torch's, before the first step."""
    def loss(several: Sequence[Batch]) -> float:
        return float(np.mean([trainer.learn(batch, 0, part, len(several)) for part, batch in enumerate(several)]))
    first = batches[0]
    found = {"": loss(first)}
    moved = {f"the labels are moved by one place to the {side} before the net is given them":
             [_moved(batch, way) for batch in first] for side, way in (("left", -1), ("right", 1))}
    found |= {told: loss(several) for told, several in moved.items() if all(several)}
    task = TASKS.get(run.head.task)
    if task and not numbers(first[0].labels):
        read = [losses.supposed(task, trainer.outputs(batch), batch.labels, token_loss) for batch in first]
        found |= {told: float(np.mean([one[told] for one in read])) for told in read[0]}
    for number, several in enumerate(batches[1:OTHERS], 2):
        found[f"the first step is fed the batch of step {number}: batches come in another order"] = loss(several)
    return found


def schedules(recipe: Recipe, rates_of: Callable[[Recipe, int], list[float]]) -> dict[str, list[float]]:
    """The learning rates under each mistake of laying a schedule out; ``rates_of`` is torch's."""
    changes = {"the schedule is laid out for twice as many steps": {"steps": 2 * recipe.steps},
               "the schedule is laid out for one step more": {"steps": recipe.steps + 1},
               **({"there is no warm-up": {"warmup": 0}} if recipe.warmup and recipe.schedule != "noam" else {})}
    return {told: rates_of(replace(recipe, **change), recipe.steps) for told, change in changes.items()}


def _moved(batch: Batch, way: int) -> Batch | None:
    labels = batch.labels.get("labels")
    if labels is None or labels.ndim != 2 or labels.dtype.kind == "f":
        return None
    turned = np.roll(labels, way, axis=1)
    turned[:, -1 if way < 0 else 0] = IGNORED
    return replace(batch, labels={**batch.labels, "labels": turned})


# Why ------------------------------------------------------------------------------------------------------------------

def explained(run: Run, step: Step, answer: Step, failing: Sequence[str]) -> Explanation | None:
    """The mistake that accounts for what fails first, if one does."""
    settings = Settings.told(step.told["settings"])
    if not failing:
        return None
    return next(filter(None, (
        _dropped(*(unpacked(side.told["drops"]) for side in (step, answer))),
        _scheduled(step, answer),
        _misread(step, answer, failing), _accumulated(settings, step, answer, failing),
        _statistics(run, settings, step, answer, failing), _decayed(run, settings, step, answer, failing))), None)


def _dropped(theirs: Sequence[Call], ours: Sequence[Call]) -> Explanation | None:
    wrong = differing(theirs, ours)
    if not wrong:
        return None
    name, told = next(iter(wrong.items()))
    more = f" So it is at {len(wrong)} of {len(theirs)} places." if len(wrong) > 1 else ""
    if not any(call.training for call in ours) and theirs:
        return Explanation("eval-mode", name.partition(" ")[0], "This net trains in eval mode: none of its "
                           f"{len(ours) or len(theirs)} dropouts drops anything, and torch's do.", None, None)
    kind = next(kind for kind, word in (("dropout-scale", "mode"), ("dropout-rate", "the rate is"), (
        "dropout-missing", "drops nothing"), ("dropout-added", "torch drops nothing"), ("dropout", "")) if word in told)
    return Explanation(kind, name.partition(" ")[0], f"{name}: {told}.{more}", None, None)


def _scheduled(step: Step, answer: Step) -> Explanation | None:
    theirs, ours = (side.recorded["learning_rate"] for side in (step, answer))
    before = _apart(ours, theirs)
    if before <= RATE:
        return None
    moved = {"the schedule is one step ahead, as if it were stepped before the optimizer": theirs[1:],
             "the schedule is one step late": np.concatenate([theirs[:1], theirs[:-1]]),
             "the schedule is never stepped": np.full_like(theirs, theirs[0])}
    numbers = np.arange(len(theirs))
    by_epoch = {f"the schedule is stepped once in {several} steps, as by epoch": theirs[numbers // several]
                for several in range(2, len(theirs))}
    for told, rates in {**moved, **step.told["schedules"], **by_epoch}.items():
        after = _apart(ours[: len(rates)], np.array(rates))
        if len(rates) > 1 and after <= RATE:
            return Explanation("schedule", "learning_rate", f"{told}: with that done to torch's own learning rates, "
                               f"the error falls from {before:.1e} to {after:.1e}.", before, after)
    return None


def _misread(step: Step, answer: Step, failing: Sequence[str]) -> Explanation | None:
    """What turns torch's loss of the first step into the candidate's."""
    if "loss (step 1)" not in failing:
        return None
    right, found = (float(side.recorded["loss"][0]) for side in (step, answer))
    before = abs(found - right) / abs(right)
    for told, loss in step.told["mistakes"].items():
        after = abs(found - loss) / abs(loss) if loss else np.inf
        if told and after <= 2 * LOSS < before:
            kind = "batch-order" if "order" in told else "loss"
            return Explanation(kind, "loss", f"{told}: with that done in torch, the error of the first loss falls from "
                               f"{before:.1e} to {after:.1e}.", before, after)
    return None


def _accumulated(settings: Settings, step: Step, answer: Step, failing: Sequence[str]) -> Explanation | None:
    many = settings.recipe.accumulate
    if many == 1 or "gradient_norm (step 1)" not in failing or "loss (step 1)" in failing:
        return None
    theirs, ours = (float(side.recorded["gradient_norm"][0]) for side in (step, answer))
    for times, told in ((many, f"the losses of {many} micro-batches are added up without dividing them by {many}"),
                        (1 / many, f"the losses of {many} micro-batches are divided by {many} twice")):
        before, after = (abs(ours - right) / right for right in (theirs, times * theirs))
        if after <= 100 * LOSS < before:
            return Explanation("accumulation", "gradient_norm", f"{told}: with that done to torch's own gradients, the "
                               f"error of their global norm falls from {before:.1e} to {after:.1e}.", before, after)
    return None


def _decayed(run: Run, settings: Settings, step: Step, answer: Step, failing: Sequence[str]) -> Explanation | None:
    """Decay of what does not decay in torch, or none of what does: that share of the weight times the sum of rates."""
    names = _names(settings, failing)
    share = settings.recipe.weight_decay * float(np.sum(step.recorded["learning_rate"][: settings.early]))
    if not names or settings.recipe.optimizer != "adamw":
        return None
    theirs, ours = step.view("moved"), answer.view("moved")
    names = [name for name in names if name in theirs and name in ours]
    with open_checkpoint(run.output) as file:
        start = {name: to_float32(file.read(name), file.tensors[name].dtype.name).reshape(theirs[name].shape)
                 for name in names if name in file.tensors}
    for matrices, sign, told in ((False, -1, "decay too, as they do not in torch"),
                                 (True, 1, "do not decay, as they do in torch")):
        some = [name for name in start if (theirs[name].ndim > 1) == matrices]
        if len(some) < len(names):
            continue
        error = {name: ours[name].astype(np.float64) - theirs[name] for name in some}
        size, before, after = (_norm(found) for found in (
            [theirs[name] for name in some], list(error.values()),
            [error[name] - sign * share * start[name] for name in some]))
        if after <= LEFT * before:
            which = f"{some[0]} and {len(some) - 1} more" if len(some) > 1 else some[0]
            return Explanation("weight-decay", some[0], f"{which} {told}: with {settings.recipe.weight_decay:g} times "
                               "the weight and the rate taken from each, the error of how far they have moved falls "
                               f"from {before / size:.1e} to {after / size:.1e}.", before / size, after / size)
    return None


def _statistics(run: Run, settings: Settings, step: Step, answer: Step, failing: Sequence[str]) -> Explanation | None:
    """Running statistics that stand still, or variances that are divided by n where torch divides by n - 1."""
    names = [name for name in _names(settings, failing) if name.endswith(("._mean", "._variance"))]
    theirs, ours = step.view("moved"), answer.view("moved")
    if not names or not all(name in theirs and name in ours for name in names):
        return None
    if not any(ours[name].any() for name in names):
        return Explanation("eval-mode", names[0], f"The running statistics of this net stand still, {names[0]} the "
                           "first: its batch norms are in eval mode while it trains, and torch's are not.", None, None)
    kept = 1 - (1 - MOMENTUM) ** settings.early
    befores, afters = [], []
    with open_checkpoint(run.output) as file:
        for name in [name for name in names if name.endswith("._variance")]:
            start = kept * to_float32(file.read(name), file.tensors[name].dtype.name)
            right, found = (side[name] + start for side in (theirs, ours))
            times = float(np.median(right / found))
            befores.append(right - found)
            afters.append(right - times * found if times > 1 else right - found)
    before, after = _norm(befores), _norm(afters)
    if not befores or after > LEFT * before:
        return None
    first = next(name for name in names if name.endswith("._variance"))
    return Explanation("biased-variance", first, f"{first}: the variance of a batch of n goes into the running one "
                       "divided by n, as Paddle's batch norm has it; torch divides by n - 1. With that put right the "
                       f"error of all of them falls from {before:.1e} to {after:.1e}.", before, after)


def _names(settings: Settings, failing: Sequence[str]) -> list[str]:
    suffix = f" (after step {settings.early})"
    return [name.removesuffix(suffix) for name in failing if name.endswith(suffix)]


def _norm(arrays: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else float(np.abs(found).max(initial=0.0))
