"""The Paddle side: a net of ``models/`` or PaddleNLP's class, loaded from the conversion's output.

Both answer the same calls as the reference, so the stages need not know which one is behind them.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import xxhash

from convert.errors import BadInput, require

from .inputs import Inputs
from .runs import Run
from .tasks import token_rows

OnModule = Callable[[str], None]
TARGETS = ("models", "paddlenlp")


class Candidate:
    """The model that is to be proved the same."""

    framework = "paddle"

    def __init__(self, run: Run, device: str = "cpu") -> None:
        require("paddle")
        import paddle
        _use_device(device)
        self.run = run
        self.version = paddle.__version__
        self.model = self._build()
        self.model.eval()

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter and buffer that the net holds, by name, in Paddle's layout."""
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.numpy()

    @property
    def weights_digest(self) -> str:
        """xxh3-128 over names, shapes and bytes of what the net holds, sorted by name."""
        lines = sorted(f"{name} {list(array.shape)} {xxhash.xxh3_128(np.ascontiguousarray(array)).hexdigest()}\n"
                       for name, array in self.state())
        return xxhash.xxh3_128("".join(lines).encode()).hexdigest()

    def record(self, inputs: Inputs, entering: Mapping[str, np.ndarray] | None = None,
               on_module: OnModule = lambda name: None) -> dict[str, np.ndarray]:
        """One forward pass: valid rows of every module's output, and of the outputs.

        ``entering`` replaces what enters a module, so that each is judged on the reference's own input.
        """
        import paddle
        recorded: dict[str, np.ndarray] = {}

        def before(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if entering is None or name not in entering:
                return None
            return paddle.to_tensor(entering[name]), *arguments[1:]

        def after(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            recorded[name] = token_rows(name, first.numpy(), inputs.mask)
            on_module(name)

        with ExitStack() as hooks:
            for name, layer in self._layers():
                hooks.callback(layer.register_forward_pre_hook(
                    lambda _, arguments, name=name: before(name, arguments)).remove)
                hooks.callback(layer.register_forward_post_hook(
                    lambda _, arguments, output, name=name: after(name, output)).remove)
            outputs = self.outputs(inputs.arrays)
        return recorded | {name: token_rows(name, array, inputs.mask) for name, array in outputs.items()}

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every floating tensor that the class returns, by transformers' names; ``loss`` when labels are given."""
        import paddle
        with paddle.no_grad():
            result = self._call({name: paddle.to_tensor(array) for name, array in arrays.items()})
        return {name: value.numpy() for name, value in result.items()
                if isinstance(value, paddle.Tensor) and value.is_floating_point()}

    def contrastive_loss(self, hidden: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """As :meth:`Reference.contrastive_loss`, with ``models.loss``."""
        import paddle

        from models.loss import contrastive_loss, mean_pool
        pooled = mean_pool(paddle.to_tensor(hidden), paddle.to_tensor(mask.astype(np.int64)))
        first, second = paddle.split(pooled, 2)
        return contrastive_loss(first, second, scale).numpy()

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """As :meth:`Reference.token_loss`, with the loss of the target."""
        raise AssertionError("a target has its own loss")

    def _build(self) -> Any:
        raise AssertionError("a target builds its own net")

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("a target has its own call")

    def _layers(self) -> Iterator[tuple[str, Any]]:
        layers = dict(self.model.named_sublayers())
        for _, name in self.run.modules:
            if name in layers:
                yield name, layers[name]


class OwnNet(Candidate):
    """The family's net in ``models/``."""

    def _build(self) -> Any:
        _refuse_foreign_models()
        import models
        return models.from_pretrained(self.run.output)

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.model(**tensors)

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import paddle

        from models.loss import cross_entropy
        return cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels), reduction="none").numpy()


class PaddleNLPNet(Candidate):
    """PaddleNLP's class for the family, with its own loss."""

    def _build(self) -> Any:
        logging.getLogger("datasets").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require("paddlenlp")
            module = importlib.import_module(f"paddlenlp.transformers.{self.run.family.name}.modeling")
        from paddlenlp.utils.log import logger
        logger.set_level("ERROR")
        return getattr(module, self.run.head.paddlenlp).from_pretrained(str(self.run.output), dtype="float32")

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.model(**tensors, return_dict=True)

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import paddle
        found = paddle.nn.functional.cross_entropy(
            paddle.to_tensor(logits), paddle.to_tensor(labels), reduction="none")
        return found.numpy().reshape(labels.shape)


def open_candidate(run: Run, target: str, device: str) -> Candidate:
    """The candidate that ``--target`` names."""
    if target == "models":
        return OwnNet(run, device)
    if target == "paddlenlp":
        return PaddleNLPNet(run, device)
    raise BadInput(f"--target {target} is not one of {', '.join(TARGETS)}.")


def _use_device(device: str) -> None:
    import paddle
    try:
        paddle.set_device(device)
    except Exception as error:
        raise BadInput(f"--device {device} cannot be used by this Paddle ({next(iter(str(error).splitlines()), '')}). "
                       "Try --device cpu.") from error


def _refuse_foreign_models() -> None:
    import models
    if getattr(models, "PROJECT", None) != "paddle-parity":
        raise BadInput(f"another package named models, at {getattr(models, '__file__', None) or list(models.__path__)[0]}, "
                       "hides the nets of paddle-parity. Run from another directory, or rename or uninstall it.")
