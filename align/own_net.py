"""``--target package.module:build``: a net of the user's own, in Paddle, or in torch to be compared with torch.

``build`` is called with the config (a dict) and the output directory (a Path), and returns the net with its weights
loaded. The net takes transformers' arguments and returns a mapping with transformers' output names. Parameters and
modules of a ``paddle.nn.Layer`` have the family's Paddle names, those of a ``torch.nn.Module`` its torch names.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from convert.errors import BadInput

from .candidate import Candidate, Look, blamed, function_named
from .lint import Description
from .paddle_net import PaddleNet, PaddleNLPNet, use_device
from .paging import Pages
from .runs import Run
from .torch_side import TorchSide, floating, tensors_of
from .unmodified import Unmodified


@dataclass(frozen=True)
class Target:
    """``package.module:build`` by name; what goes wrong in it is told as the user's.

    It may not change what the reference, which runs in the same process, is made of.
    """

    name: str
    reference: Unmodified

    def build(self, run: Run) -> Any:
        """The net; :class:`BadInput` where ``build`` cannot be imported, takes other arguments, or fails."""
        build = function_named("--target", self.name, "the config (a dict) and the output directory (a Path)", {},
                               run.output)
        with self.blamed():
            net = build(dict(run.target_config), run.output)
        self.reference.require(self.name)
        return net

    def blamed(self) -> AbstractContextManager[None]:
        return blamed(f"your net {self.name}")

    def call(self, net: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        with self.blamed():
            result = net(**tensors)
        self.reference.require(self.name)
        if not hasattr(result, "items"):
            raise BadInput(f"{self.name}: the net returned a {type(result).__name__}; a mapping with transformers' "
                           "output names is needed, as {'logits': …}.")
        return result


class _OwnNet(Candidate):
    """What is built already; its passes go one after the other, for it may keep state while it runs."""

    reentrant = False
    target: Target
    built: Any

    def blamed(self) -> AbstractContextManager[None]:
        return self.target.blamed()

    def _build(self) -> Any:
        return self.built

    def _build_empty(self) -> Any:
        raise self._not_paged()

    def _paged(self) -> Pages:
        raise self._not_paged()

    def _show_when_in(self, look: Look) -> None:
        raise self._not_paged()

    def _not_paged(self) -> BadInput:
        return BadInput(f"--paging on cannot be had for {self.target.name}: it loads its weights itself. Use --paging "
                        "off.")


class OwnPaddleNet(_OwnNet, PaddleNet):
    """A ``paddle.nn.Layer`` of the user's."""

    token_loss = PaddleNLPNet.token_loss

    def __init__(self, run: Run, device: str, paged: bool, target: Target, built: Any) -> None:
        self.target, self.built = target, built
        super().__init__(run, device, paged)
        self._require_names([move.target for move in run.plan.moves if move.rule.moves], list(built.state_dict()))

    def _require_names(self, wanted: Sequence[str], held: Sequence[str]) -> None:
        if not {*wanted} & {*held}:
            raise BadInput(f"{self.target.name}: the net has no parameter {wanted[0]}; it has "
                           f"{', '.join(held[:3]) or 'none at all'}. Its parameters are to have the result's names, "
                           "which --rules of the conversion prints.")

    @property
    def keeps(self) -> bool:
        """Where the net takes a past by name, or is one of ``models/``; of an encoder and a decoder only the latter."""
        from models.pretrained import Pretrained
        takes = {"past_key_values", "use_cache"} <= inspect.signature(self.model.forward).parameters.keys()
        return isinstance(self.model, Pretrained) or (takes and self.run.head.inputs != "tokens to tokens")

    def call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.target.call(self.model, tensors)


class OwnTorchNet(TorchSide, _OwnNet):
    """A ``torch.nn.Module`` of the user's."""

    def __init__(self, run: Run, paged: bool, target: Target, built: Any) -> None:
        import torch
        self.target, self.built, self.version = target, built, torch.__version__
        super().__init__(run, paged)

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """What a rule drops is left out, and told by :meth:`described`; a mask of bools is one of 0 and 1.

        What is tied is told under a name of its own, so that it shows where it no longer is.
        """
        held = {path: tensor for path, tensor in self.model.state_dict().items() if path not in self.run.dropped}
        made = {move.target for move in self.run.plan.moves if move.filling}
        moved = set()
        for move in self.run.plan.moves:
            paths = [names[0] for names in move.rule.sources]
            if move.rule.moves and held.keys() >= set(paths):
                moved |= set(paths)
                arrays = [self._array(path, held[path]) for path in paths]
                yield move.target, move.turn(move.gather(arrays) if move.gather else arrays[0])
        moves = {move.target: move for move in self.run.plan.moves}
        for path in held.keys() & self.run.tied.keys():
            name, equal = self.run.tied[path]
            yield name, moves[equal].turn(self._array(path, held[path]))
        for path in held.keys() - moved - self.run.tied.keys():
            name, array = self.run.paddle_names.get(path, path), self._array(path, held[path])
            yield name, array.astype(np.float32) if name in made and array.dtype == bool else array

    def described(self) -> Description:
        held = [path for path in self.model.state_dict() if path in self.run.dropped]
        return super().described() | {"not compared": held}

    def _array(self, path: str, tensor: Any) -> np.ndarray:
        try:
            return tensor.numpy()
        except TypeError as error:
            raise BadInput(f"the net of {self.target.name} holds {path} in {tensor.dtype}, which cannot be compared. "
                           "Call .float() on the net before returning it.") from error

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch
        with torch.no_grad():
            return floating(self.call(tensors_of(arrays)))

    def call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.target.call(self.model, tensors)

    def _layers(self) -> dict[str, Any]:
        return dict(self.model.named_modules())

    def _path(self, pair: tuple[str, str]) -> str:
        return pair[0]


def open_own(run: Run, name: str, device: str, paged: bool, allow_same_framework: bool,
             beside: Collection[type] | None) -> Candidate:
    """The net that ``name`` builds; :class:`BadInput` for a torch net unless two of one framework are allowed."""
    if find_spec("paddle"):
        use_device(device)
    target = Target(name, Unmodified(beside))
    built = target.build(run)
    if _is_of("torch", "Module", built):
        if not allow_same_framework:
            raise BadInput(f"{name} returned a torch.nn.Module, and the reference is torch too: that proves nothing "
                           "about Paddle. --allow-same-framework compares two torch models all the same.")
        return OwnTorchNet(run, paged, target, built)
    if not _is_of("paddle", "Layer", built):
        raise BadInput(f"{name} returned a {type(built).__name__}; a paddle.nn.Layer is needed.")
    return OwnPaddleNet(run, device, paged, target, built)


def _is_of(framework: str, kind: str, built: Any) -> bool:
    """Whether ``built`` is a module of a framework, which it could not be were that not imported."""
    return framework in sys.modules and isinstance(built, getattr(sys.modules[framework].nn, kind))
