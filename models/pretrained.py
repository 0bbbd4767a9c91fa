"""A net that is built from a config and filled from a checkpoint: every parameter once, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle
from paddle import Tensor

from convert.checkpoint import Checkpoint, open_checkpoint, read_config
from convert.dtypes import to_float32
from convert.errors import BadInput

from .config import Config

if TYPE_CHECKING:
    from typing_extensions import Self


class Pretrained(paddle.nn.Layer):
    """Base of all nets. A family sets ``config_class``, and ``unused_buffers``: keys its files carry in vain.

    Under ``paddle.LazyGuard()`` no weight is allocated. Tied parameters are one object under several names.
    """

    config_class: ClassVar[type[Config]]
    unused_buffers: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The net of a ``config.json``, its weights random as transformers initialises them."""
        return cls(cls.config_class.from_dict(config))

    @classmethod
    def unfilled(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        """The net of a ``config.json`` without values, after making sure that ``checkpoint`` has every one it needs."""
        with paddle.LazyGuard():
            net = cls.from_config(config)
        net._check_fit(net._parameters_with_names(), _shapes(checkpoint))
        return net

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """The net of ``directory`` in eval mode and float32, read tensor by tensor."""
        with paddle.LazyGuard():
            net = cls.from_config(read_config(Path(directory)))
        with open_checkpoint(directory) as checkpoint:
            tensors = checkpoint.tensors
            net._fill(
                _shapes(checkpoint),
                lambda name: to_float32(checkpoint.read(name), tensors[name].dtype.name),
            )
        net.eval()
        return net

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Fill every parameter from arrays in this net's layout: linear weights [in, out].

        Of a tied parameter one name is enough; a second one must hold the same values, or their transpose as
        a linear's weight has it. Raises :class:`BadInput` that names the keys which are missing, wrong or
        left over.
        """
        self._fill({name: np.shape(array) for name, array in state.items()}, state.__getitem__)

    def _fill(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        parameters = self._parameters_with_names()
        self._check_fit(parameters, shapes)
        for parameter, names in parameters:
            first, *copies = [name for name in names if name in shapes]
            array = read(first)
            for copy in copies:
                self._check_copy(copy, read(copy), first, array)
            _set(parameter, array)

    def _parameters_with_names(self) -> list[tuple[Tensor, list[str]]]:
        names: dict[int, tuple[Tensor, list[str]]] = {}
        for name, parameter in self.state_dict().items():
            names.setdefault(id(parameter), (parameter, []))[1].append(name)
        return list(names.values())

    def _check_fit(
        self, parameters: list[tuple[Tensor, list[str]]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        known = {name for _, names in parameters for name in names}
        self._refuse("missing", (names[0] for _, names in parameters if shapes.keys().isdisjoint(names)))
        self._refuse(
            "left over",
            (name for name in shapes if name not in known and not self.unused_buffers.fullmatch(name)),
        )
        self._refuse(
            "of another shape",
            (
                f"{name} is {list(shapes[name])}, not {list(parameter.shape)}"
                for parameter, names in parameters
                for place, name in enumerate(name for name in names if name in shapes)
                if not _fits(shapes[name], tuple(parameter.shape), is_copy=place > 0)
            ),
        )

    def _check_copy(self, copy: str, copied: np.ndarray, first: str, array: np.ndarray) -> None:
        candidates = [candidate for candidate in (array, array.T) if candidate.shape == copied.shape]
        if not any(np.array_equal(copied, candidate, equal_nan=True) for candidate in candidates):
            raise BadInput(f"{type(self).__name__}: {copy} differs from {first}, but this net ties the two.")

    def _refuse(self, fault: str, names: Iterable[str]) -> None:
        found = list(names)
        if found:
            more = f" (+{len(found) - 8} more)" if len(found) > 8 else ""
            raise BadInput(
                f"{type(self).__name__}: {len(found)} tensors are {fault}: {', '.join(found[:8])}{more}."
            )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], is_copy: bool) -> bool:
    return found == wanted or (is_copy and found == wanted[::-1])


def _set(parameter: Tensor, array: np.ndarray) -> None:
    """Give ``parameter`` a fresh buffer with the values of ``array``, also where LazyGuard allocated none.

    ``set_value`` with a view of the parameter itself corrupts it; ``to_tensor`` copies and the buffer changes
    hands.
    """
    paddle.to_tensor(np.ascontiguousarray(array), dtype=parameter.dtype)._share_buffer_to(parameter)
