"""Mistakes of a training that no earlier stage can see: in what a net does only while it trains, and in its loop.

Each is the same for every family; ``plant(output)`` breaks the net that is loaded from ``output``, or the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import paddle

from models.layer import BatchNorm2D

from .. import train
from ..optimizing.paddle_side import PaddleTraining
from ..training.paddle_side import PaddleTrainer
from .fault import Fault, NotPlanted, Plant
from .planting import in_net

DROPPING = ("--dropout", "0.1")
LAST = "transformer.h.2"
SHORT = ("--steps", "4", "--batch-size", "2", "--tokens", "24", "--limit", "12")


# In the net -----------------------------------------------------------------------------------------------------------

def _dropouts(net: Any) -> list[Any]:
    found = [layer for layer in net.sublayers() if isinstance(layer, paddle.nn.Dropout)]
    if len(found) < 2:
        raise NotPlanted(f"{type(net).__name__} has no two dropouts")
    return found


def _stays_in_eval_mode(net: Any) -> None:
    net.train = lambda: None


def _does_not_scale(net: Any) -> None:
    for layer in _dropouts(net):
        layer.mode = "downscale_in_infer"


def _drops_nothing_in_one_place(net: Any) -> None:
    _dropouts(net)[-1].forward = lambda x: x


def _drops_at_another_rate(net: Any) -> None:
    _dropouts(net)[-1].p = 0.3


def _moves_labels(net: Any) -> None:
    right = net.forward

    def forward(*arguments: Any, labels: Any = None, **named: Any) -> Any:
        if net.training and labels is not None:
            labels = paddle.concat([labels[:, 1:], paddle.full_like(labels[:, :1], -100)], axis=1)
        return right(*arguments, labels=labels, **named)
    net.forward = forward


def _keeps_its_statistics(net: Any) -> None:
    norms = [layer for layer in net.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)]
    if not norms:
        raise NotPlanted(f"{type(net).__name__} has no batch norm")
    for layer in norms:
        layer._use_global_stats = True


@contextmanager
def _divides_by_n(output: Path) -> Iterator[None]:
    with patch.object(BatchNorm2D, "forward", paddle.nn.BatchNorm2D.forward):
        yield


# In the loop ----------------------------------------------------------------------------------------------------------

def _built(change: Callable[[PaddleTraining], None], **given: Any) -> Plant:
    """The set-up of the Paddle side, with ``change`` done to it, or other arguments given."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        right = PaddleTraining.__init__

        def build(self: PaddleTraining, recipe: Any, parameters: Any, decays: Any) -> None:
            right(self, recipe, parameters, given.get("decays", decays))
            change(self)
        with patch.object(PaddleTraining, "__init__", build):
            yield
    return plant


def _steps_first(training: PaddleTraining) -> None:
    training.optimizer._learning_rate.step()


def _never_steps(training: PaddleTraining) -> None:
    training.optimizer._learning_rate.step = lambda: None


@contextmanager
def _adds_up_without_dividing(output: Path) -> Iterator[None]:
    right = PaddleTrainer.learn
    with patch.object(PaddleTrainer, "learn", lambda self, batch, step, part, share: right(self, batch, step, part, 1)):
        yield


@contextmanager
def _takes_batches_in_another_order(output: Path) -> Iterator[None]:
    right = train.carry_out

    def carry_out(side: Any, batches: Any, *rest: Any) -> Any:
        return right(side, [*batches[1:], batches[0]] if isinstance(side, PaddleTrainer) else batches, *rest)
    with patch.object(train, "carry_out", carry_out):
        yield


def _fault(kind: str, plant: Plant, explanation: str, block: str, *flags: str, family: str = "gptj",
           named: str | None = None) -> Fault:
    """``block`` is what goes wrong first, and what is named unless that is another."""
    return Fault(kind, family, "training", "code", plant, block, frozenset({named or f"{block}*"}),
                 frozenset({explanation}), stage="train", flags=(*SHORT, *flags))


FAULTS = (
    _fault("eval mode left on", in_net(_stays_in_eval_mode), "eval mode", "transformer.drop", *DROPPING),
    _fault("dropout without dividing by what is kept", in_net(_does_not_scale), "dropout scale", "transformer.drop",
           *DROPPING),
    _fault("a dropout is missing", in_net(_drops_nothing_in_one_place), "dropout missing", LAST, *DROPPING),
    _fault("a dropout at another rate", in_net(_drops_at_another_rate), "dropout rate", LAST, *DROPPING),
    _fault("labels shifted once more in training", in_net(_moves_labels), "loss", "loss"),
    _fault("batch norms in eval mode", in_net(_keeps_its_statistics), "eval mode", "loss", family="resnet",
           named="*bn1._mean"),
    _fault("running variance divided by n", _divides_by_n, "biased variance", "bn1._variance", family="resnet"),
    _fault("scheduler stepped first", _built(_steps_first), "schedule", "learning_rate"),
    _fault("scheduler never stepped", _built(_never_steps), "schedule", "learning_rate"),
    _fault("norms and biases decay in training", _built(lambda training: None, decays=lambda name: True),
           "weight decay", "transformer.h.0.ln_1", "--weight-decay", "0.1"),
    _fault("micro-batches added up without dividing", _adds_up_without_dividing, "accumulation", "gradient_norm",
           "--accumulate", "2"),
    _fault("batches in another order", _takes_batches_in_another_order, "batch order", "loss"),
)
