"""Why rates or parameters are not torch's: what known mistakes of a training make of the same gradients.

Rates are told by closed forms, updates by the optimizers' published formulas in float64: SGD with momentum (Sutskever
et al. 2013, as torch has it, the rate outside the velocity), Adam (Kingma and Ba 2015, algorithm 1), AdamW (Loshchilov
and Hutter 2019, algorithm 2). A mistake is told only where it brings every parameter that differs to within the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np

from ..diagnose import Explanation
from ..noise import NoiseFloor
from ..optimizing.recipe import Recipe
from ..optimizing.updates import GIVEN, Course
from ..tolerance import RATE, RATE_UNIT
from ..trace import Step

Arrays = Mapping[str, np.ndarray]
Schedule = Callable[[int], float]
ENOUGH = 1 << 22
"""Of so many elements that differ, the smallest tensors first, a mistake has to explain all."""
SHOWN = 3


# Rates ----------------------------------------------------------------------------------------------------------------

def rate_of(recipe: Recipe, done: int, *, kind: str = "", warmup: int | None = None, steps: int | None = None,
            end: float | None = None, power: float | None = None, waves: float = 0.5, late: bool = True) -> float:
    """The rate behind ``done`` updates, by the formulas of ``transformers``' schedules and of Noam's.

    What is given replaces the recipe's. ``late``: the decay begins behind the warm-up, rather than with it.
    """
    kind = kind or recipe.schedule
    warmup = recipe.warmup if warmup is None else warmup
    steps, power = steps or recipe.steps, recipe.power if power is None else power
    end = recipe.end if end is None else end
    if kind == "noam":
        number = done + 1
        return recipe.lr * math.sqrt(max(1, warmup)) * min(number**-0.5, number * max(1, warmup) ** -1.5)
    if done < warmup:
        return recipe.lr * done / warmup
    start = warmup if late else 0
    gone = (done - start) / max(1, steps - start)
    if kind == "linear":
        return recipe.lr * max(0.0, 1 - gone)
    if kind == "cosine":
        return recipe.lr * max(0.0, 0.5 * (1 + math.cos(2 * math.pi * waves * gone)))
    if kind == "polynomial":
        return end if gone > 1 else (recipe.lr - end) * (1 - gone) ** power + end
    return recipe.lr


def explained_rates(recipe: Recipe, expected: np.ndarray, given: np.ndarray) -> Explanation | None:
    """The mistake of a schedule that gives just the rates of the candidate."""
    if given.shape != expected.shape or not np.isfinite(given).all():
        return None
    largest = max(float(np.abs(expected).max(initial=0.0)), float(np.abs(given).max(initial=0.0)))
    for kind, told, schedule in chain(_mistaken_schedules(recipe, len(given)), _other_rate(recipe, given)):
        supposed = np.array([schedule(done) for done in range(len(given))])
        if np.all(np.abs(supposed - given) <= np.maximum(RATE * np.abs(supposed), RATE_UNIT * largest)):
            before, after = (float(np.abs(given - one).max() / largest) for one in (expected, supposed))
            return Explanation(kind, "learning-rate", f"{told}: the rates of all {len(given)} updates are those.",
                               before, after)
    return None


def _mistaken_schedules(recipe: Recipe, many: int) -> Iterator[tuple[str, str, Schedule]]:
    """(kind, what is told of it, rate behind so many updates)."""
    def right(done: int) -> float:
        return rate_of(recipe, done)
    yield "schedule-ahead", ("the schedule is one update ahead of torch's: it is stepped once before the first update"
                             ), lambda done: right(done + 1)
    yield "schedule-behind", ("the schedule is one update behind torch's: it counts the first update twice"
                              ), lambda done: right(max(0, done - 1))
    yield "schedule-behind", ("the schedule is one update behind torch's, and the first update has the rate 0, as "
                              "Paddle's NoamDecay has it, which counts from 0"
                              ), lambda done: right(done - 1) if done else 0.0
    several = recipe.accumulate
    if several > 1:
        yield "schedule-per-batch", (f"the schedule is stepped behind every micro-batch rather than every update, so "
                                     f"{several} times too fast"), lambda done: right(done * several + several - 1)
        yield "schedule-per-batch", (f"the schedule is stepped {several} times an update, once for each micro-batch"
                                     ), lambda done: right(done * several)
    for length in range(2, many):
        yield "schedule-per-epoch", (f"the schedule is stepped every {length} updates, as where it is stepped once an "
                                     "epoch, and torch's every update"), lambda done, length=length: right(
                                         done // length)
    if recipe.warmup:
        yield "schedule-per-epoch", (f"the schedule is not stepped once in {many} updates, as where it is stepped once "
                                     "an epoch, and torch's every update"), lambda done: right(0)
        yield "schedule-warm-up", "there is no warm-up", lambda done: rate_of(recipe, done, warmup=0)
        yield "schedule-length", (f"the decay is as long as the whole training, {recipe.steps} steps, and begins "
                                  f"behind {recipe.warmup} of warm-up, so it ends {recipe.warmup} too late"
                                  ), lambda done: rate_of(recipe, done, steps=recipe.steps + recipe.warmup)
        yield "schedule-warm-up", ("the decay begins with the warm-up rather than behind it"
                                   ), lambda done: rate_of(recipe, done, late=False)
    yield "schedule-missing", "the rate is constant: there is no schedule", lambda done: recipe.lr
    yield from _other_shapes(recipe)


def _other_shapes(recipe: Recipe) -> Iterator[tuple[str, str, Schedule]]:
    if recipe.schedule in ("linear", "polynomial"):
        power = 1.0 if recipe.schedule == "linear" else recipe.power
        yield "schedule-end", ("the decay ends at 1e-4, the default of Paddle's PolynomialDecay, rather than at "
                               f"{0 if recipe.schedule == 'linear' else recipe.end:g}"), lambda done: rate_of(
                                   recipe, done, kind="polynomial", end=1e-4, power=power)
        yield "schedule-end", ("the decay ends at 1e-7, the default of transformers' polynomial schedule"
                               ), lambda done: rate_of(recipe, done, kind="polynomial", end=1e-7, power=power)
        yield "schedule-end", "the decay ends at 0", lambda done: rate_of(recipe, done, kind="polynomial", end=0.0,
                                                                        power=power)
    for power in (1.0, 2.0, 0.5):
        yield "schedule-power", (f"the power of the polynomial is {power:g} rather than {recipe.power:g}"
                                 ), lambda done, power=power: rate_of(recipe, done, power=power)
    yield "schedule-waves", ("the cosine makes a whole wave and rises again, as PaddleNLP's CosineDecayWithWarmup does "
                             "by default; transformers' makes half of one"
                             ), lambda done: rate_of(recipe, done, waves=1.0)
    for kind in ("constant", "linear", "cosine", "polynomial", "noam"):
        if kind != recipe.schedule:
            yield "schedule-kind", f"the schedule is {kind} rather than {recipe.schedule}", (
                lambda done, kind=kind: rate_of(recipe, done, kind=kind))


def _other_rate(recipe: Recipe, given: np.ndarray) -> Iterator[tuple[str, str, Schedule]]:
    """The schedule of another base rate, by least squares.

    Rates are affine in it. As long as they rise, another warm-up would give them too, so it is told only of a decay.
    """
    once, twice = (np.array([rate_of(replace(recipe, lr=times * recipe.lr), done) for done in range(len(given))])
                   for times in (1, 2))
    slope, ends = (twice - once) / recipe.lr, 2 * once - twice
    rate = float(slope @ (given - ends) / (slope @ slope)) if slope.any() else 0.0
    if rate > 0 and len(given) > recipe.warmup + 1:
        yield "base-rate", f"the base rate is {_told_apart(rate, recipe.lr)}", lambda done: rate_of(
            replace(recipe, lr=rate), done)


def _told_apart(number: float, other: float) -> str:
    """``number`` rather than ``other``, in as many digits as it takes to tell them apart."""
    digits = next((digits for digits in range(4, 17) if f"{number:.{digits}g}" != f"{other:.{digits}g}"), 17)
    return f"{number:.{digits}g} rather than {other:.{digits}g}"


# Updates --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Variant:
    """One way to carry out an update. ``clip``: of the global norm of an ``update``, of each ``micro``-batch by itself,
    of each ``group`` of parameters, of each ``tensor``, of each ``value``, or ``none``. ``epsilon``: added ``outside``
    the root of the corrected second moment, ``inside`` it, or outside the ``uncorrected`` one. ``decay``:
    ``decoupled``, ``l2``, or ``whole``, which is decoupled without the rate.
    """

    recipe: Recipe
    clip: str = "update"
    epsilon: str = "outside"
    decay: str = "l2"
    corrected: bool = True
    largest: bool = False
    """AMSGrad."""
    dampened: bool = False
    kept: bool = False
    """Whether gradients, clipped as they are, are still there when the next update's are added."""
    everywhere: bool = False
    """Whether every parameter decays."""
    divided: float = 1.0
    """What gradients are times beside the division by the number of micro-batches."""
    factor: float = 1.0
    """What rates are times."""

    @classmethod
    def of(cls, recipe: Recipe) -> Variant:
        """As torch carries it out."""
        return cls(recipe, clip="none" if recipe.clip is None else "update",
                   decay="decoupled" if recipe.optimizer == "adamw" else "l2")


@dataclass(frozen=True)
class Case:
    """A course of given gradients in which the tensors ``failing`` differ; ``first`` is the reference's first step."""

    course: Course
    first: Step
    failing: Sequence[str]
    expected: Arrays
    given: Arrays
    floors: Mapping[str, NoiseFloor]

    @cached_property
    def names(self) -> list[str]:
        """Parameters that differ, as many as are looked at: small ones first."""
        found, total = [], 0
        plain = [name.partition(" ")[0] for name in self.failing]
        for name in sorted((name for name in plain if name in self.start), key=lambda name: self.start[name].size):
            total += self.start[name].size
            if found and total > ENOUGH:
                break
            if self._answer(name) is not None:
                found.append(name)
        return found

    @property
    def start(self) -> Arrays:
        return self.first.view("start")

    @property
    def decays(self) -> Mapping[str, bool]:
        return self.first.told["decays"]

    @property
    def rates(self) -> np.ndarray:
        """The candidate's own, so that a wrong schedule does not hide what else is wrong."""
        return self.given.get(f"learning-rate ({self.course.name})", self.expected[
            f"learning-rate ({self.course.name})"]).astype(np.float64)

    def gradient(self, which: int, name: str) -> np.ndarray:
        return self.first.view(f"gradients.{which}")[name].astype(np.float64)

    @cached_property
    def products(self) -> dict[str, np.ndarray]:
        """By name the products [GIVEN, GIVEN] of the gradients with each other: norms of all that is made of them."""
        found = {}
        for name in self.decays:
            rows = [self.gradient(which, name).reshape(-1) for which in range(GIVEN)]
            found[name] = np.array([[a @ b for b in rows] for a in rows])
        return found

    def fits(self, name: str, supposed: np.ndarray) -> bool:
        floor = replace(self.floors[name], oracle=supposed.reshape(self.floors[name].oracle.shape))
        return all(found.passed for found in floor.judge(self._answer(name), "isolated"))

    def error(self, supposed: Arrays) -> float:
        """Of all that is looked at, against the movement of torch's."""
        off = sum(np.sum(np.square(self._answer(name) - supposed[name])) for name in self.names)
        moved = sum(np.sum(np.square(self._torch(name) - self.start[name], dtype=np.float64)) for name in self.names)
        return float(np.sqrt(off / moved)) if moved else float("inf")

    def explanation(self, kind: str, told: str, supposed: Arrays) -> Explanation:
        before, after = self.error({name: self._torch(name) for name in self.names}), self.error(supposed)
        return Explanation(kind, self.names[0], f"{told}: with that, the error of {len(self.names)} parameters falls "
                           f"from {before:.1e} to {after:.1e} of what {self.course.recipe.optimizer} moves them.",
                           before, after)

    def _answer(self, name: str) -> np.ndarray | None:
        found = self.given.get(f"{name} ({self.course.name})")
        return None if found is None or found.shape != self.start[name].shape else found.astype(np.float64)

    def _torch(self, name: str) -> np.ndarray:
        return self.expected[f"{name} ({self.course.name})"].astype(np.float64)


def explained(case: Case) -> Explanation | None:
    """The mistake that turns torch's parameters into the candidate's, if one does."""
    if not case.names:
        return None
    right = Variant.of(case.course.recipe)
    if _all_fit(case, right):  # of the rates that the candidate had
        return None
    if all(np.array_equal(case.given[f"{name} ({case.course.name})"], case.start[name]) for name in case.names):
        names = [plain for name in case.failing if (plain := name.partition(" ")[0]) in case.start]
        told = (f"{len(names)} parameters are not updated at all, as if they were not among the optimizer's "
                f"({', '.join(names[:SHOWN])})")
        return case.explanation("not-updated", told, {name: case.start[name] for name in case.names})
    groups = _wrong_groups(case, right)
    if groups:
        return groups
    for kind, told, variant in [*_mistakes(right), *_fitted(case, right)]:
        supposed = _all_fit(case, variant)
        if supposed:
            return case.explanation(kind, told, supposed)
    return None


def _all_fit(case: Case, variant: Variant) -> dict[str, np.ndarray] | None:
    supposed = {}
    for name in case.names:
        supposed[name] = simulated(case, variant, name, case.decays[name])
        if not case.fits(name, supposed[name]):
            return None
    return supposed


def _wrong_groups(case: Case, right: Variant) -> Explanation | None:
    """Every parameter that differs is in the other group: it decays and should not, or the other way round."""
    if not right.recipe.weight_decay:
        return None
    supposed = {}
    for name in case.names:
        supposed[name] = simulated(case, right, name, not case.decays[name])
        if not case.fits(name, supposed[name]):
            return None
    told = []
    all_of = {decays: [name for name, held in case.decays.items() if held == decays] for decays in (True, False)}
    for decays, said in ((False, "biases and norms decay, which torch leaves out"), (True, "parameters do not decay")):
        names = [name for name in case.failing if case.decays.get(name.partition(" ")[0]) == decays]
        if names:
            shown = ", ".join(name.partition(" ")[0] for name in names[:SHOWN])
            told.append(f"{len(names)} of {len(all_of[decays])} {said} ({shown}"
                        f"{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''})")
    if all(case.decays[name] for name in case.names) and len(case.failing) >= len(all_of[True]):
        told = f"there is no weight decay, and torch's is {right.recipe.weight_decay:g}"
        return case.explanation("weight-decay", told, supposed)
    return case.explanation("decay-group", f"parameters are in the wrong group of weight decay: {'; '.join(told)}",
                            supposed)


def _mistakes(right: Variant) -> Iterator[tuple[str, str, Variant]]:
    recipe, many = right.recipe, right.recipe.accumulate
    if recipe.weight_decay:
        yield "decay-group", "all parameters decay, also biases and norms, which torch leaves out", replace(
            right, everywhere=True)
        for decay, told in (
                ("l2", "weight decay is added to the gradient (L2), as in Adam, rather than decoupled from it"),
                ("decoupled", "weight decay is decoupled, as in AdamW, rather than added to the gradient"),
                ("whole", "weight decay takes no account of the rate")):
            if decay != right.decay:
                yield f"{decay}-decay", told, replace(right, decay=decay)
    for clip, told in (
            ("micro", "each micro-batch is clipped by itself before the gradients are added up"),
            ("group", "each group of parameters is clipped by its own norm, as Paddle's ClipGradByGlobalNorm does "
             "where an optimizer has parameter groups, and torch's clip_grad_norm_ by the norm of all"),
            ("tensor", "each parameter is clipped by its own norm (ClipGradByNorm) rather than by the norm of all"),
            ("none", "gradients are not clipped"),
            ("value", "each element is clipped (ClipGradByValue) rather than the norm of all")):
        if recipe.clip is not None and (clip != "micro" or many > 1):
            kind = {"micro": "clipped-before-accumulation"}.get(clip, "clipping")
            yield kind, told, replace(right, clip=clip)
    yield "not-cleared", "gradients are not cleared behind an update, and the next one's are added to them", replace(
        right, kept=True)
    if many > 1:
        yield "accumulation", (f"the losses of {many} micro-batches are added up without dividing them by {many}"
                               ), replace(right, divided=float(many))
        yield "accumulation", f"the gradients of {many} micro-batches are divided by {many} twice", replace(
            right, divided=1 / many)
    if recipe.optimizer.startswith("adam"):
        yield from _mistakes_of_adam(right)
    else:
        yield from _mistakes_of_momentum(right)


def _mistakes_of_adam(right: Variant) -> Iterator[tuple[str, str, Variant]]:
    recipe = right.recipe
    yield "epsilon-inside-root", ("epsilon is added to the second moment inside the root rather than to the root"
                                  ), replace(right, epsilon="inside")
    yield "epsilon-uncorrected", ("epsilon is added to the root of the second moment before that is corrected for its "
                                  "bias, as TensorFlow has it"), replace(right, epsilon="uncorrected")
    for epsilon in (1e-6, 1e-7, 1e-8, 1e-12, 1e-5):
        if epsilon != recipe.epsilon:
            yield "epsilon", f"epsilon is {epsilon:g} rather than {recipe.epsilon:g}", replace(
                right, recipe=replace(recipe, epsilon=epsilon))
    yield "bias-correction", "the moments are not corrected for their bias", replace(right, corrected=False)
    yield "amsgrad", "the largest second moment so far is used (AMSGrad)", replace(right, largest=True)
    for beta1, beta2 in ((recipe.beta2, recipe.beta1), *((recipe.beta1, beta) for beta in (0.999, 0.99, 0.98, 0.95))):
        if (beta1, beta2) != (recipe.beta1, recipe.beta2):
            yield "betas", (f"beta1 and beta2 are {beta1:g} and {beta2:g} rather than {recipe.beta1:g} and "
                            f"{recipe.beta2:g}"), replace(right, recipe=replace(recipe, beta1=beta1, beta2=beta2))


def _mistakes_of_momentum(right: Variant) -> Iterator[tuple[str, str, Variant]]:
    recipe = right.recipe
    held = recipe.momentum if recipe.optimizer == "momentum" else 0.0
    for momentum in (0.0, 0.9, 0.99, 0.95):
        for nesterov in (False, True):
            if (momentum, nesterov) != (held, recipe.nesterov) and not (nesterov and not momentum):
                ahead = [" with a look ahead (Nesterov)" if one else "" for one in (nesterov, recipe.nesterov and held)]
                yield "momentum", f"the momentum is {momentum:g}{ahead[0]} rather than {held:g}{ahead[1]}", replace(
                    right, recipe=replace(recipe, optimizer="momentum", momentum=momentum, nesterov=nesterov))
    yield "dampening", "gradients enter the velocity times 1 - momentum (dampening)", replace(right, dampened=True)


def _fitted(case: Case, right: Variant) -> Iterator[tuple[str, str, Variant]]:
    """A weight decay and a factor of the rates that the parameters say themselves, by least squares."""
    recipe = right.recipe
    names = [name for name in case.names if case.decays[name]]
    if names:
        decay = recipe.weight_decay
        for _ in range(3):
            decay += _best(case, names, lambda decay: replace(right, recipe=replace(recipe, weight_decay=decay)), decay,
                           max(1e-3, decay / 10))
        default = ", the default of AdamW on both sides," if abs(decay - 0.01) < 1e-4 else ""
        for everywhere in (False, True):
            yield "weight-decay", (f"the weight decay is {decay:.4g}{default} rather than {recipe.weight_decay:g}"
                                   f"{', and of all parameters, biases and norms too' * everywhere}"), replace(
                                       right, recipe=replace(recipe, weight_decay=decay), everywhere=everywhere)
    factor = 1.0
    for _ in range(3):
        factor += _best(case, case.names, lambda factor: replace(right, factor=factor), factor, 0.01 * factor or 0.01)
    yield "rate-factor", (f"the rates that parameters see are {factor:.4g} times the schedule's; a group's "
                          "learning_rate is a factor in Paddle, and the rate itself in torch"), replace(
                              right, factor=factor)


def _best(case: Case, names: Sequence[str], variant: Callable[[float], Variant], at: float, step: float) -> float:
    """By how much a number is to change so that the parameters come nearest to the candidate's."""
    above = below = 0.0
    for name in names:
        here, there = (simulated(case, variant(value), name, case.decays[name]) for value in (at, at + step))
        slope = (there - here) / step
        above += float(np.sum(slope * (case._answer(name) - here)))
        below += float(np.sum(np.square(slope)))
    return above / below if below else 0.0


def simulated(case: Case, variant: Variant, name: str, decays: bool) -> np.ndarray:
    """The parameter ``name`` behind the course, in float64."""
    recipe, rates = variant.recipe, case.rates * variant.factor
    held = case.start[name].astype(np.float64)
    given = [case.gradient(which, name) for which in range(GIVEN)]
    decay = recipe.weight_decay if decays or variant.everywhere else 0.0
    first, second = np.zeros_like(held), np.zeros_like(held)
    largest = np.zeros_like(held)
    for number, parts in enumerate(_parts(case, variant, name)):
        gradient = parts[0] * given[0] + parts[1] * given[1]
        if variant.clip == "value":
            gradient = gradient.clip(-recipe.clip, recipe.clip)
        rate = rates[number]
        if variant.decay == "l2":
            gradient = gradient + decay * held
        else:
            held = held * (1 - (decay if variant.decay == "whole" else rate * decay))
        if not recipe.optimizer.startswith("adam"):
            momentum = recipe.momentum if recipe.optimizer == "momentum" else 0.0
            first = momentum * first + (1 - momentum if variant.dampened else 1) * gradient
            held = held - rate * (gradient + momentum * first if recipe.nesterov and momentum else first)
            continue
        first = recipe.beta1 * first + (1 - recipe.beta1) * gradient
        second = recipe.beta2 * second + (1 - recipe.beta2) * np.square(gradient)
        one, two = ((1 - beta ** (number + 1) for beta in (recipe.beta1, recipe.beta2)) if variant.corrected
                    else (1.0, 1.0))
        largest = np.maximum(largest, second)
        held = held - rate / one * first / _root(variant, largest if variant.largest else second, two)
    return held


def _root(variant: Variant, second: np.ndarray, corrected: float) -> np.ndarray:
    epsilon = variant.recipe.epsilon
    if variant.epsilon == "inside":
        found = np.sqrt(second / corrected + epsilon)
    elif variant.epsilon == "uncorrected":
        found = (np.sqrt(second) + epsilon) / math.sqrt(corrected)
    else:
        found = np.sqrt(second / corrected) + epsilon
    return np.maximum(found, np.finfo(np.float64).tiny)


def _parts(case: Case, variant: Variant, name: str) -> list[np.ndarray]:
    """By update what each of the given gradients is times, behind clipping."""
    recipe, found = variant.recipe, []
    alike = {"group": lambda one: case.decays[one] == case.decays[name], "tensor": lambda one: one == name}
    chosen = [one for one in case.products if alike.get(variant.clip, lambda one: True)(one)]
    products = sum(case.products[one] for one in chosen)
    left = np.zeros(GIVEN)
    for update in range(case.course.updates):
        parts = [np.eye(GIVEN)[which] * factor * variant.divided / recipe.accumulate
                 for which, factor in case.course.parts(update)]
        if variant.clip == "micro":
            parts = [part * _shrunk(recipe, part, products) for part in parts]
        whole = np.sum(parts, axis=0) + left
        found.append(whole * (_shrunk(recipe, whole, products) if variant.clip in ("update", "group", "tensor") else 1))
        left = found[-1] if variant.kept else left
    return found


def _shrunk(recipe: Recipe, parts: np.ndarray, products: np.ndarray) -> float:
    norm = math.sqrt(max(0.0, float(parts @ products @ parts)))
    return min(1.0, recipe.clip / norm) if norm else 1.0
