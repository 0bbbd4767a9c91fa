"""Wrong set-ups of a training, each as ``--candidate-optimizer`` takes it: a named mistake, how it is made, and which
explanation it must get. They are mistakes of a set-up and none of a net, so that no earlier stage can see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import paddle
from paddle.optimizer import lr

from ..optimizing.own import OwnOptimizer
from ..optimizing.paddle_side import schedule_of
from ..optimizing.paddle_updates import PaddleUpdates
from ..optimizing.recipe import Recipe
from .fault import Fault, NotPlanted, Plant

RECIPE = Recipe(accumulate=2)
"""What align.optimizer asks for where no flag says otherwise."""
Loop = Callable[[int], None]
Wrong = tuple[str, ...]


def wrong_words(net: Any) -> Any:
    """Meant to leave out biases and norms; but what is asked about is a tensor's name, as linear_0.b_0, where no word
    is found; in layer_norm_0.w_0 one is.
    """
    return _adamw(net, decays=lambda name: not any(word in name for word in ("bias", "norm", "ln_")))


def decay_left_out(net: Any) -> Any:
    """Weight decay reaches nothing but what has "embeddings" in its name, so nothing."""
    return _adamw(net, decays=lambda name: "embeddings" in name)


def l2_decay(net: Any) -> Any:
    """Adam with weight decay for AdamW."""
    for tensor in net.parameters():
        tensor.regularizer = paddle.regularizer.L2Decay(RECIPE.weight_decay) if len(tensor.shape) > 1 else None
    return paddle.optimizer.Adam(schedule_of(RECIPE), parameters=net.parameters(), grad_clip=_clip())


def default_decay(net: Any) -> Any:
    """AdamW as it comes, where torch's set-up has no weight decay."""
    return paddle.optimizer.AdamW(schedule_of(RECIPE), parameters=net.parameters(), grad_clip=_clip())


def other_decay(net: Any) -> Any:
    """AdamW's default weight decay, where torch's set-up has another."""
    return _adamw(net)


def inside_root(net: Any) -> Any:
    """An AdamW written by hand that adds epsilon inside the root."""
    return InsideRoot(schedule_of(RECIPE), parameters=net.parameters())


def epsilon_of_bert(net: Any) -> Any:
    """The epsilon of the original BERT's optimizer."""
    return _adamw(net, epsilon=1e-6)


def schedule_first(net: Any) -> Any:
    """The schedule is stepped before the first update."""
    optimizer = _adamw(net)
    optimizer._learning_rate.step()
    return optimizer


def schedule_per_epoch(net: Any) -> tuple[Any, Loop]:
    """The schedule is stepped once an epoch, here of five updates."""
    optimizer = _adamw(net)
    update = _every(RECIPE.accumulate, optimizer, optimizer.step)

    def after_backward(number: int) -> None:
        update(number)
        if number % (5 * RECIPE.accumulate) == 0:
            optimizer._learning_rate.step()
    return optimizer, after_backward


def schedule_per_batch(net: Any) -> tuple[Any, Loop]:
    """The schedule is stepped behind each micro-batch."""
    optimizer = _adamw(net)
    update = _every(RECIPE.accumulate, optimizer, optimizer.step)

    def after_backward(number: int) -> None:
        update(number)
        optimizer._learning_rate.step()
    return optimizer, after_backward


def too_long(net: Any) -> Any:
    """The decay behind the warm-up is given all the steps, rather than those that are left."""
    decay = lr.PolynomialDecay(RECIPE.lr, RECIPE.steps, end_lr=0.0)
    return _adamw(net, rate=lr.LinearWarmup(decay, RECIPE.warmup, 0.0, RECIPE.lr))


def default_end(net: Any) -> Any:
    """PolynomialDecay, which ends at 1e-4 where it is not told."""
    decay = lr.PolynomialDecay(RECIPE.lr, RECIPE.steps - RECIPE.warmup)
    return _adamw(net, rate=lr.LinearWarmup(decay, RECIPE.warmup, 0.0, RECIPE.lr))


def noam_from_zero(net: Any) -> Any:
    """NoamDecay as it comes."""
    recipe = Recipe(schedule="noam")
    return _adamw(net, rate=lr.NoamDecay(recipe.width, recipe.warmup, recipe.scale))


def no_schedule(net: Any) -> Any:
    """A rate that stays."""
    return _adamw(net, rate=RECIPE.lr)


def a_tenth(net: Any) -> Any:
    """The right schedule of another rate."""
    return _adamw(net, rate=schedule_of(replace(RECIPE, lr=RECIPE.lr / 10)))


def a_tenth_and_all_decay(net: Any) -> Any:
    """Two mistakes at once: of the rates one is told, of the decay the other."""
    return _adamw(net, rate=schedule_of(replace(RECIPE, lr=RECIPE.lr / 10)), decays=lambda name: True)


def clipped_first(net: Any) -> tuple[Any, Loop]:
    """Gradients are clipped behind each micro-batch, before the next one's are added."""
    optimizer = _adamw(net, clip=None)
    update = _every(RECIPE.accumulate, optimizer, optimizer.step, optimizer._learning_rate.step)
    held: dict[str, Any] = {}

    def after_backward(number: int) -> None:
        tensors = [tensor for tensor in net.parameters() if tensor.grad is not None]
        news = [(tensor, tensor.grad - held.get(tensor.name, 0.0)) for tensor in tensors]
        for tensor, gradient in _clip()(news):
            whole = held.get(tensor.name, 0.0) + gradient
            held[tensor.name] = whole.clone()
            tensor.grad.set_value(whole)
        if number % RECIPE.accumulate == 0:
            held.clear()
        update(number)
    return optimizer, after_backward


def clipped_in_groups(net: Any) -> Any:
    """Decay by parameter groups; each of them is clipped by its own norm."""
    groups = [{"params": [tensor for tensor in net.parameters() if (len(tensor.shape) > 1) == decays],
               "weight_decay": RECIPE.weight_decay if decays else 0.0} for decays in (True, False)]
    return paddle.optimizer.AdamW(schedule_of(RECIPE), parameters=groups, grad_clip=_clip())


def not_clipped(net: Any) -> Any:
    return _adamw(net, clip=None)


def not_cleared(net: Any) -> tuple[Any, Loop]:
    """Nothing clears the gradients."""
    optimizer = _adamw(net)

    def after_backward(number: int) -> None:
        if number % RECIPE.accumulate == 0:
            optimizer.step()
            optimizer._learning_rate.step()
    return optimizer, after_backward


def norms_left_out(net: Any) -> Any:
    """The optimizer is given nothing but matrices, so biases and norms stay as they are."""
    matrices = [tensor for tensor in net.parameters() if len(tensor.shape) > 1]
    return paddle.optimizer.AdamW(schedule_of(RECIPE), parameters=matrices, weight_decay=RECIPE.weight_decay)


def group_rate(net: Any) -> Any:
    """A group's rate, as torch has it; in Paddle it is a factor."""
    names = {tensor.name for tensor in net.parameters() if len(tensor.shape) > 1}
    return paddle.optimizer.AdamW(
        schedule_of(RECIPE), parameters=[{"params": net.parameters(), "learning_rate": 0.5}], grad_clip=_clip(),
        weight_decay=RECIPE.weight_decay, apply_decay_param_fun=names.__contains__)


def other_beta(net: Any) -> Any:
    return _adamw(net, beta2=0.98)


def no_momentum(net: Any) -> Any:
    """SGD for Momentum."""
    for tensor in net.parameters():
        tensor.regularizer = paddle.regularizer.L2Decay(RECIPE.weight_decay) if len(tensor.shape) > 1 else None
    return paddle.optimizer.SGD(schedule_of(Recipe(lr=0.1)), parameters=net.parameters(), grad_clip=_clip())


def looking_ahead(net: Any) -> Any:
    """Nesterov's momentum for the plain one."""
    for tensor in net.parameters():
        tensor.regularizer = paddle.regularizer.L2Decay(RECIPE.weight_decay) if len(tensor.shape) > 1 else None
    return paddle.optimizer.Momentum(schedule_of(Recipe(lr=0.1)), parameters=net.parameters(), use_nesterov=True,
                                     grad_clip=_clip())


class InsideRoot(paddle.optimizer.AdamW):
    """AdamW by its formula, in float32, but with epsilon inside the root; clips as :data:`RECIPE` says."""

    def step(self) -> None:
        pairs = _clip()([(tensor, tensor.grad) for tensor in self._parameter_list if tensor.grad is not None])
        self.__dict__.setdefault("moments", {})
        self.__dict__["done"] = done = self.__dict__.get("done", 0) + 1
        with paddle.no_grad():
            for tensor, gradient in pairs:
                first, second = self.moments.get(tensor.name, (0.0, 0.0))
                first = RECIPE.beta1 * first + (1 - RECIPE.beta1) * gradient
                second = RECIPE.beta2 * second + (1 - RECIPE.beta2) * gradient * gradient
                self.moments[tensor.name] = first, second
                decay = RECIPE.weight_decay if len(tensor.shape) > 1 else 0.0
                root = paddle.sqrt(second / (1 - RECIPE.beta2**done) + RECIPE.epsilon)
                tensor.set_value(tensor * (1 - self.get_lr() * decay) - self.get_lr() / (1 - RECIPE.beta1**done)
                                 * first / root)


def _adamw(net: Any, rate: Any = None, clip: float | None = 1.0, decays: Callable[[str], bool] | None = None,
           **others: Any) -> Any:
    """As :class:`PaddleTraining` has it, but for what is given."""
    names = {tensor.name for tensor in net.parameters() if len(tensor.shape) > 1}
    return paddle.optimizer.AdamW(
        schedule_of(RECIPE) if rate is None else rate, parameters=net.parameters(),
        weight_decay=RECIPE.weight_decay, apply_decay_param_fun=decays or names.__contains__,
        grad_clip=clip and _clip(), **others)


def _clip() -> Any:
    return paddle.nn.ClipGradByGlobalNorm(RECIPE.clip)


def _every(many: int, optimizer: Any, *steps: Callable[[], None]) -> Loop:
    def after_backward(number: int) -> None:
        if number % many == 0:
            for step in steps:
                step()
            optimizer.clear_grad()
    return after_backward


def _fault(kind: str, build: Callable[[Any], Any], explanation: str, wrong: Wrong, *flags: str) -> Fault:
    """``build`` is the set-up, ``wrong`` what goes wrong, the first of it first; ``flags`` what else torch trains with.
    """
    return Fault(kind, "gptj", "set-up", build.__name__, _planted(build), wrong[0], frozenset(wrong),
                 frozenset({explanation}), stage="optimizer", flags=(*FLAGS, *flags))


def _planted(build: Callable[[Any], Any]) -> Plant:
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        right, built = PaddleUpdates.__init__, []

        def wrong(self: PaddleUpdates, side: Any, decays: Any, own: Any = None) -> None:
            right(self, side, decays, OwnOptimizer(f"{__name__}:{build.__name__}"))
            built.append(side)
        with patch.object(PaddleUpdates, "__init__", wrong):
            yield
        if not built:
            raise NotPlanted("no optimizer was set up on the Paddle side")
    return plant


RATES: Wrong = ("learning-rate",)
MATRICES: Wrong = ("transformer.wte", "transformer.wte.weight", "*_proj.weight", "*.fc_in.weight", "*.fc_out.weight",
                   "lm_head.weight")
BIASES: Wrong = ("transformer.h.0.mlp.fc_in", "*.fc_in.bias", "*.fc_out.bias", "lm_head.bias")
REST: Wrong = ("transformer.h.0.ln_1", "*.ln_*", "*.bias")
EVERYTHING: Wrong = (*MATRICES, *REST)
FLAGS = ("--optimizer", "adamw", "--updates", "6", "--steps", "10", "--warmup", "3")
FAULTS = (
    _fault("biases decay", wrong_words, "decay group", BIASES),
    _fault("weight decay reaches nothing", decay_left_out, "weight decay", MATRICES),
    _fault("Adam with L2 for AdamW", l2_decay, "decay as L2", MATRICES),
    _fault("AdamW decays by default", default_decay, "weight decay", EVERYTHING, "--weight-decay", "0"),
    _fault("weight decay of 0.01 for 0.1", other_decay, "weight decay", MATRICES, "--weight-decay", "0.1"),
    _fault("epsilon inside the root", inside_root, "epsilon in the root", EVERYTHING),
    _fault("epsilon of 1e-6", epsilon_of_bert, "epsilon of the optimizer", EVERYTHING),
    _fault("schedule stepped before the first update", schedule_first, "schedule ahead", RATES),
    _fault("schedule stepped once an epoch", schedule_per_epoch, "schedule per epoch", RATES),
    _fault("schedule stepped behind each micro-batch", schedule_per_batch, "schedule per batch", RATES),
    _fault("decay as long as all steps", too_long, "schedule length", RATES),
    _fault("decay ends where Paddle ends it", default_end, "schedule end", RATES),
    _fault("Noam counted from 0", noam_from_zero, "schedule behind", RATES, "--schedule", "noam"),
    _fault("a rate that stays", no_schedule, "schedule missing", RATES),
    _fault("a tenth of the rate", a_tenth, "base rate", RATES),
    _fault("a tenth of the rate, and all decays", a_tenth_and_all_decay, "base rate", (*RATES, *BIASES)),
    _fault("clipped before accumulation", clipped_first, "clipped too early", EVERYTHING),
    _fault("clipped group by group", clipped_in_groups, "clipping", EVERYTHING),
    _fault("not clipped", not_clipped, "clipping", EVERYTHING),
    _fault("gradients not cleared", not_cleared, "not cleared", EVERYTHING),
    _fault("norms and biases not updated", norms_left_out, "not updated", REST, "--clip", "0"),
    _fault("a group's rate is a factor", group_rate, "rate of a group", EVERYTHING),
    _fault("beta2 of 0.98", other_beta, "betas", EVERYTHING),
    _fault("SGD for Momentum", no_momentum, "momentum", EVERYTHING, "--optimizer", "momentum"),
    _fault("Nesterov's momentum for the plain one", looking_ahead, "momentum", EVERYTHING, "--optimizer",
           "momentum"),
)
