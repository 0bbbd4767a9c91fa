"""The Paddle side of a fine-tuning: the net in training mode, Paddle's optimizer, clipping and schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import paddle

from convert.errors import BadInput

from ..gradients.batches import Batch, Gradients, norms_of
from ..gradients.paddle_side import PaddleGradients
from ..optimizing.own import OwnOptimizer
from ..optimizing.paddle_side import PaddleTraining
from ..optimizing.recipe import decayed
from ..paddle_net import PaddleNet
from .course import Settings
from .dropping import UPSCALED, Drops, packed


class PaddleTrainer(PaddleGradients):
    """One training of ``side``, by Paddle's optimizer as ``settings`` have it, or by a set-up of the user's ``own``."""

    def __init__(self, side: PaddleNet, settings: Settings, own: OwnOptimizer | None = None) -> None:
        super().__init__(side)
        self._settings, self._own = settings, own
        self._passes, self._norm = 0, 0.0
        self._dropped = Drops(settings.seed, settings.dropout)

    @contextmanager
    def training(self) -> Iterator[PaddleTrainer]:
        """In training mode; behind it the net is as it was."""
        layers = dict(self.model.named_sublayers())
        with ExitStack() as stack:
            stack.enter_context(self._as_before())
            for _, name in self.run.modules:
                if name in layers:
                    stack.callback(layers[name].register_forward_pre_hook(
                        lambda *_, name=name: self._entered(name)).remove)
                    stack.callback(layers[name].register_forward_post_hook(lambda *_: self._left()).remove)
            stack.enter_context(patch.object(paddle.nn.functional, "dropout", self._dropout))
            self._forget()
            self._begin()
            stack.callback(self._updates.close)
            self.model.train()
            stack.callback(self.model.eval)
            yield self

    @contextmanager
    def tested(self) -> Iterator[None]:
        """In eval mode meanwhile."""
        self.model.eval()
        yield

    def learn(self, batch: Batch, step: int, part: int, share: int) -> float:
        self._dropped.begin(step, part)
        loss = self.loss(batch)
        self.back(loss / share)
        self._norm = float(np.linalg.norm(norms_of([tensor.grad.numpy() for tensor, _ in self._held
                                                    if tensor.grad is not None])))
        self._passes += 1
        self._updates.after_backward(self._passes)
        return float(loss)

    def step(self) -> float:
        return self._norm

    @property
    def rate(self) -> float:
        return self._updates.rate

    @property
    def drops(self) -> list[list[Any]]:
        return packed(self._dropped.calls)

    def moved(self) -> Gradients:
        return {name: tensor.numpy() - self._start[number]
                for number, (tensor, names) in enumerate(self._all) for name in names}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays = {f"weight/{number}": tensor.numpy() for number, (tensor, _) in enumerate(self._all)}
        numbers = {tensor.name: number for number, (tensor, _) in enumerate(self._held)}
        found = self._updates.optimizer.state_dict()
        for key, value in found.items():
            owner = max((name for name in numbers if key.startswith(f"{name}_")), key=len, default=None)
            if owner is not None:
                arrays[f"slot/{numbers[owner]}/{key.removeprefix(f'{owner}_')}"] = value.numpy()
        return arrays, {"schedule": found.get("LR_Scheduler"), "passes": self._passes}

    def load(self, arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> None:
        for number, (tensor, _) in enumerate(self._all):
            tensor.set_value(arrays[f"weight/{number}"])
        slots = {}
        for name, array in arrays.items():
            if name.startswith("slot/"):
                _, number, slot = name.split("/")
                slots[f"{self._held[int(number)][0].name}_{slot}"] = paddle.to_tensor(array)
        self._passes = told["passes"]
        schedule = {} if told["schedule"] is None else {"LR_Scheduler": told["schedule"]}
        self._updates.optimizer.set_state_dict({**slots, **schedule})

    def _begin(self) -> None:
        self._start = [tensor.numpy() for tensor, _ in self._all]
        named = [(names[0], tensor) for tensor, names in self._all[: len(self._held)] if not tensor.stop_gradient]
        if not named:
            raise BadInput("the Paddle net has no parameter that asks for a gradient, so there is nothing to train.")
        if self._own is not None:
            self._updates = self._own.training(self.model, self._settings.recipe.accumulate)
            return
        decays, matrices = decayed(self.run), {name for name, tensor in named if tensor.ndim > 1}
        self._updates = PaddleTraining(self._settings.recipe, named, lambda name: decays.get(name, name in matrices))

    @property
    def _all(self) -> list[tuple[Any, list[str]]]:
        """Every parameter, then the running statistics of batch norms, with the names that they go by."""
        found = [(tensor, self._named(tensor, names)) for tensor, names in self._held]
        return found + [(tensor, [name]) for name, tensor in self.model.state_dict().items()
                        if name.endswith(("._mean", "._variance"))]

    def _dropout(self, x: Any, p: Any = 0.5, axis: Any = None, training: bool = True, mode: str = UPSCALED,
                 name: str | None = None, inplace: bool = False) -> Any:
        """``paddle.nn.functional.dropout`` with the masks that both sides have; ``axis`` is where it drops alone."""
        axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
        shape: Sequence[int] = [size if place in axes else 1 for place, size in enumerate(x.shape)]
        scale = self._dropped.scale(float(p), training, mode, shape)
        if isinstance(scale, float):
            return x if scale == 1 else x * scale
        return x * paddle.to_tensor(scale).astype(x.dtype)

    def _entered(self, name: str) -> None:
        self._dropped.places.append(name)

    def _left(self) -> None:
        self._dropped.places.pop()

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        held = [(tensor, tensor.numpy()) for tensor, _ in self._all]
        try:
            yield
        finally:
            self._forget()
            for tensor, before in held:
                tensor.set_value(before)
