"""The torch side of a fine-tuning: the unmodified class in training mode, torch's optimizer, transformers' schedule.

The same training is carried out in float64 and with sums reordered, from the same start, for the band.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from convert.errors import BadInput

from ..gradients.batches import Batch, Gradients, in_paddle, norms_of
from ..gradients.torch_side import ReorderedGradients, TorchGradients
from ..optimizing.recipe import Recipe
from ..optimizing.torch_side import TorchTraining
from ..oracle import Float64
from ..runs import Run
from ..torch_side import TorchSide, floating, tensors_of
from .course import Settings
from .dropping import UPSCALED, Drops, packed

STATISTICS = ("running_mean", "running_var")
SEEDS = 1000
"""Between the seeds of two steps; even, because odd seeds reorder otherwise."""
Mode = Callable[[int], AbstractContextManager[Any]]


def plain(step: int) -> AbstractContextManager[Any]:
    return nullcontext()


def in_float64(step: int) -> AbstractContextManager[Any]:
    return Float64()


def reordered(number: int) -> Mode:
    """Every step in another order, which depends on nothing but the two numbers, so that a training can be resumed."""
    return lambda step: ReorderedGradients(number + SEEDS * step)


NO_CHOICES: Mapping[str, Any] = MappingProxyType({})


def rounding(recipe: Recipe, number: int) -> Mapping[str, Any]:
    """What the optimizer of the ``number``-th reordered training is told besides: every other one has betas in float32.

    torch keeps beta^t in double where its betas are numbers, and in float32 where they are tensors, as Paddle always
    does. It is the same optimizer; 1 - beta^t is off by some 1e-5 in its first steps, which moves all weights alike.
    """
    if number % 2 == 0 or recipe.optimizer not in ("adam", "adamw"):
        return NO_CHOICES
    return {"betas": (torch.tensor(recipe.beta1), torch.tensor(recipe.beta2)), "foreach": False}


class TorchTrainer(TorchGradients):
    """One training of ``side``; ``mode(step)`` is what its passes are computed in, ``choices`` what its optimizer is
    told besides.
    """

    def __init__(self, side: TorchSide, run: Run, settings: Settings, trained: bool, mode: Mode = plain,
                 choices: Mapping[str, Any] = NO_CHOICES) -> None:
        super().__init__(side, run, trained)
        self._settings, self._mode, self._choices = settings, mode, choices
        self._dropped = Drops(settings.seed, settings.dropout)

    @contextmanager
    def training(self, double: bool = False) -> Iterator[TorchTrainer]:
        """In training mode, in float64 if ``double``; behind it the model is as it was."""
        with ExitStack() as stack:
            stack.enter_context(self._learning())
            stack.enter_context(self._as_before(double))
            for path, name in self.run.modules:
                module = dict(self.model.named_modules()).get(path)
                if module is not None:
                    stack.callback(module.register_forward_pre_hook(
                        lambda *_, name=name: self._dropped.places.append(name)).remove)
                    stack.callback(module.register_forward_hook(lambda *_: self._left()).remove)
            self._begin()
            self.model.train()
            stack.callback(self.model.eval)
            yield self

    @contextmanager
    def tested(self) -> Iterator[None]:
        """In eval mode meanwhile, in the same arithmetic."""
        self.model.eval()
        with self._mode(self._settings.steps):
            yield

    def learn(self, batch: Batch, step: int, part: int, share: int) -> float:
        if part == 0:
            self._forget()
        self._dropped.begin(step, part)
        with Dropped(self._dropped), self._mode(step):
            loss = self.loss(batch)
            (loss / share).backward()
        return float(loss.detach())

    def outputs(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the model returns in the first pass."""
        self._dropped.begin(0, 0)
        with Dropped(self._dropped), torch.no_grad():
            return {name: self.run.batch_first(name, array) for name, array in floating(
                self.side.call(tensors_of(batch.arrays))).items()}

    def step(self) -> float:
        gradients = [parameter.grad.numpy() for parameter in self._parameters if parameter.grad is not None]
        norm = float(np.linalg.norm(norms_of(gradients)))
        self._updates.update()
        return norm

    @property
    def rate(self) -> float:
        return self._updates.rate

    @property
    def drops(self) -> list[list[Any]]:
        return packed(self._dropped.calls)

    def moved(self) -> Gradients:
        found = {name: _array(tensor) - start for (name, tensor), start in zip(self._held(), self._start, strict=True)}
        return {name: array for name, array in in_paddle(self.run, found).items() if array is not None}

    def sizes(self) -> dict[str, float]:
        """The root mean square of each weight and running statistic as it was in the beginning, by Paddle's names."""
        found = {name: start for (name, _), start in zip(self._held(), self._start, strict=True)}
        return {name: float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
                for name, array in in_paddle(self.run, found).items() if array is not None}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays = {f"weight/{name}": _array(tensor) for name, tensor in self._held()}
        arrays |= {f"buffer/{name}": _array(tensor) for name, tensor in self._counters()}
        updates = self._updates
        for number, slots in updates.optimizer.state_dict()["state"].items():
            arrays |= {f"slot/{number}/{slot}": _array(tensor) for slot, tensor in slots.items()
                       if isinstance(tensor, torch.Tensor)}
        schedule = {name: value for name, value in updates.schedule.state_dict().items() if name != "lr_lambdas"}
        return arrays, {"schedule": schedule, "rate": self.rate}

    def load(self, arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for kind, held in (("weight", self._held()), ("buffer", self._counters())):
                for name, tensor in held:
                    tensor.copy_(torch.from_numpy(arrays[f"{kind}/{name}"]))
        slots: dict[int, dict[str, Any]] = {}
        for name, array in arrays.items():
            if name.startswith("slot/"):
                _, number, slot = name.split("/")
                slots.setdefault(int(number), {})[slot] = torch.from_numpy(np.array(array))
        optimizer, schedule = self._updates.optimizer, self._updates.schedule
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        schedule.load_state_dict({**told["schedule"], "lr_lambdas": [None] * len(optimizer.param_groups)})
        for group in optimizer.param_groups:
            group["lr"] = told["rate"]

    def _begin(self) -> None:
        self._start = [_array(tensor).copy() for _, tensor in self._held()]
        learned = [parameter for parameter in self._parameters if parameter.requires_grad]
        if not learned:
            raise BadInput("the torch net has no parameter that asks for a gradient, so there is nothing to train.")
        self._updates = TorchTraining(self._settings.recipe, learned, **self._choices)

    def _held(self) -> list[tuple[str, Any]]:
        """Every parameter under each of its names, and the running statistics of batch norms."""
        return [*self._names.items(), *((name, tensor) for name, tensor in self.model.named_buffers()
                                        if name.endswith(STATISTICS))]

    def _counters(self) -> list[tuple[str, Any]]:
        return [(name, tensor) for name, tensor in self.model.named_buffers() if name.endswith("num_batches_tracked")]

    def _left(self) -> None:
        self._dropped.places.pop()

    @contextmanager
    def _as_before(self, double: bool) -> Iterator[None]:
        """Parameters and statistics, which meanwhile are copies."""
        statistics = [tensor for name, tensor in self.model.named_buffers()
                      if name.endswith((*STATISTICS, "num_batches_tracked"))]
        held = [(tensor, tensor.data) for tensor in (*self._parameters, *statistics)]
        try:
            for tensor, before in held:
                tensor.data = before.double() if double and tensor.is_floating_point() else before.clone()
            yield
        finally:
            for tensor, before in held:
                tensor.grad = None
                tensor.data = before


class Dropped(TorchFunctionMode):
    """torch's dropout is a product with the masks of ``drops``."""

    def __init__(self, drops: Drops) -> None:
        super().__init__()
        self._drops = drops

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in DROPOUTS:
            return func(*args, **kwargs)
        x, p, training = (args[place] if len(args) > place else kwargs.get(name, usual)
                          for place, (name, usual) in enumerate((("input", None), ("p", 0.5), ("training", True))))
        scale = self._drops.scale(p, training, UPSCALED, x.shape)
        return x if isinstance(scale, float) else x * torch.from_numpy(scale).to(x.dtype)


DROPOUTS = {torch.nn.functional.dropout, torch.dropout}


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()
