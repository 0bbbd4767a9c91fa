"""``--candidate-optimizer package.module:function``: a training set-up of the user's own, judged as it is.

``function`` is called with the Paddle net, whose ``named_parameters()`` are the family's Paddle names, and returns a
``paddle.optimizer.Optimizer``: then each update is its ``step()``, that of its schedule if its rate is one, and
``clear_grad()``. Or it returns the optimizer and a function ``after_backward(number)`` with what their loop does behind
the backward pass of each micro-batch, which are counted from 1: clipping, stepping, going on in a schedule, clearing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert.errors import BadInput

from ..candidate import blamed, function_named


@dataclass
class OwnTraining:
    """One training of a net by a set-up of the user's."""

    name: str
    optimizer: Any
    loop: Callable[[int], Any] | None
    accumulate: int

    @property
    def rate(self) -> float:
        """What the next update takes."""
        return float(self.optimizer.get_lr())

    def after_backward(self, number: int) -> None:
        with blamed(f"your optimizer {self.name}"):
            if self.loop:
                self.loop(number)
            elif number % self.accumulate == 0:
                self.optimizer.step()
                getattr(self.optimizer._learning_rate, "step", lambda: None)()
                self.optimizer.clear_grad(set_to_zero=False)

    def close(self) -> None: ...


@dataclass(frozen=True)
class OwnOptimizer:
    """``package.module:function`` by name; what goes wrong in it is told as the user's."""

    name: str

    def training(self, net: Any, accumulate: int) -> OwnTraining:
        """A new one; :class:`BadInput` where ``function`` cannot be imported, takes no net, or returns no optimizer."""
        function = self._function()
        with blamed(f"your optimizer {self.name}"):
            made = function(net)
        optimizer, loop = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        import paddle
        if not isinstance(optimizer, paddle.optimizer.Optimizer) or not (loop is None or callable(loop)):
            raise BadInput(f"{self.name} returned {_told(made)}; a paddle.optimizer.Optimizer is needed, or one and a "
                           "function after_backward(number).")
        return OwnTraining(self.name, optimizer, loop, accumulate)

    def _function(self) -> Callable[[Any], Any]:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.name):
            raise BadInput(f"--candidate-optimizer {self.name} is not package.module:function.")
        return function_named("--candidate-optimizer", self.name, "the Paddle net", None)


def told_of(name: str) -> str:
    """What a report says where a set-up of the user's is judged."""
    return f"The candidate's optimizer and loop are those of {name} (--candidate-optimizer)."


def _told(made: Any) -> str:
    return f"({', '.join(type(one).__name__ for one in made)})" if isinstance(made, tuple) else type(made).__name__
