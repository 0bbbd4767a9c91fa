"""A torch module that is listened to and called: the reference, or a candidate of the user's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from .inside import SMALL_VARIANCE
from .lint import Description, describe
from .lockstep import listener_here
from .parts import Parts, by_module, index_of
from .side import Modules, Side, entering, fed, hooked, in_shape


class TorchSide(Side):
    """A side whose ``model`` is a ``torch.nn.Module`` on the CPU; its modules have the family's torch paths."""

    framework = "torch"
    model: Any

    def described(self) -> Description:
        weights = dict([*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()])
        return describe(self.model, dict(self.model.named_modules()), weights, self.run, self.run.paddle_path)

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Cross entropy without reduction, 0 where the label is -100. logits [n, classes], labels [n]."""
        import torch
        return torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), reduction="none").numpy()

    def contrastive_loss(self, hidden: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """In-batch contrastive loss of mean-pooled rows: the first half against the second half, as MiniLM trained."""
        import torch
        return contrastive(torch.from_numpy(hidden), torch.from_numpy(mask.astype(np.float32)), scale).numpy()

    def contrastive_losses(self, hidden: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """What :meth:`contrastive_loss` is the mean of, [pairs]."""
        import torch
        scores = _similarities(torch.from_numpy(hidden), torch.from_numpy(mask.astype(np.float32)), scale)
        return self.token_loss(scores.numpy(), np.arange(len(hidden) // 2))

    def probing(self, pair: tuple[str, str]) -> AbstractContextManager[None]:
        return small_statistics(dict(self.model.named_modules()).get(pair[0]))

    def _is_probed(self, module: Any) -> bool:
        """Whether a module is run on a small input too, where its listener knows one."""
        return True

    @contextmanager
    def _hooks(self, modules: Modules) -> Iterator[None]:
        """The modules, by (torch path, Paddle's name), tell whoever listens what arrives at them and what they give.

        A fused module tells it for each of its parts.
        """
        import torch
        found = dict(self.model.named_modules())

        def before(parts: Parts, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            place = entering(arguments, named, _is_floating)
            value = None if place is None else (arguments or named)[place]
            if listener_here() is None or not _is_floating(value):
                return None
            given = [listener_here().arrived(name, lambda name=name: self.run.batch_first(name, value.detach().numpy()))
                     for _, name in parts][-1]
            if given is None:
                return None
            given = self.run.batch_first(parts[-1][1], given)
            return fed(arguments, named, place, torch.tensor(in_shape(given, value.shape), dtype=value.dtype))

        def after(parts: Parts, module: Any, output: Any) -> None:
            if listener_here() is None:
                return
            first = output[0] if isinstance(output, (tuple, list)) else output
            for path, name in parts:
                if self._is_probed(module):
                    listener_here().probed(name, lambda array, path=path: probed(
                        module, torch.tensor(array, dtype=first.dtype))[index_of(path)])
                listener_here().answered(name, self.run.batch_first(name, first.detach().numpy()[index_of(path)]))

        with hooked(found, "register_forward_hook", by_module(modules), before, after):
            yield


def contrastive(hidden: Any, mask: Any, scale: float) -> Any:
    """:meth:`TorchSide.contrastive_loss` of tensors: hidden [rows, tokens, width], mask float32 [rows, tokens]."""
    import torch
    scores = _similarities(hidden, mask, scale)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def _similarities(hidden: Any, mask: Any, scale: float) -> Any:
    """[pairs, pairs]: cosines of the mean-pooled rows of each half, times ``scale``."""
    import torch
    weights = mask.unsqueeze(-1)
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    first, second = torch.nn.functional.normalize(pooled, dim=-1).chunk(2)
    return scale * first @ second.T


@contextmanager
def small_statistics(module: Any) -> Iterator[None]:
    """Those of a batch norm meanwhile; of another module nothing changes."""
    import torch
    if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or module.running_var is None:
        yield
        return
    held = module.running_mean, module.running_var
    module.running_mean, module.running_var = torch.zeros_like(held[0]), torch.full_like(held[1], SMALL_VARIANCE)
    try:
        yield
    finally:
        module.running_mean, module.running_var = held


def probed(module: Any, small: Any) -> np.ndarray:
    """What a module gives for a small input, without its hooks."""
    with small_statistics(module):
        return module.forward(small).detach().numpy()


def is_rms_norm(module: Any) -> bool:
    """Whether a module, by its name, is a norm that every class writes anew: T5LayerNorm, LlamaRMSNorm, …"""
    return re.search(r"(Layer|RMS)Norm$", type(module).__name__) is not None and not any(module.children())


def floating(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The floating tensors among what a model returned."""
    return {name: value.detach().numpy() for name, value in outputs.items() if _is_floating(value)}


def _is_floating(value: Any) -> bool:
    import torch
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def tensors_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
