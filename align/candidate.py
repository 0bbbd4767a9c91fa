"""The Paddle side: a net of ``models/`` or PaddleNLP's class, loaded from the conversion's output.

Both answer the same calls as the reference, so the stages need not know which one is behind them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from convert.errors import BadInput, require

from .inputs import Inputs
from .runs import Run
from .tasks import token_rows

OnModule = Callable[[str], None]
Modules = Sequence[tuple[str, str]]
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
        return self._pass(inputs, self.run.modules, entering or {}, on_module)[0]

    def record_inside(self, inputs: Inputs, modules: Modules,
                      entering: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Of these modules, each fed ``entering``: (its output, what would have entered it), rows of real tokens."""
        return self._pass(inputs, modules, entering)

    def _pass(self, inputs: Inputs, modules: Modules, entering: Mapping[str, np.ndarray],
              on_module: OnModule = lambda name: None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        import paddle
        recorded: dict[str, np.ndarray] = {}
        arriving: dict[str, np.ndarray] = {}

        def before(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if name not in entering or not arguments:
                return None
            arriving[name] = token_rows(name, arguments[0].numpy(), inputs.mask)
            return paddle.to_tensor(entering[name]), *arguments[1:]

        def after(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            recorded[name] = token_rows(name, first.numpy(), inputs.mask)
            on_module(name)

        layers = dict(self.model.named_sublayers())
        with ExitStack() as hooks:
            for _, name in modules:
                if name in layers:
                    hooks.callback(layers[name].register_forward_pre_hook(
                        lambda _, arguments, name=name: before(name, arguments)).remove)
                    hooks.callback(layers[name].register_forward_post_hook(
                        lambda _, arguments, output, name=name: after(name, output)).remove)
            outputs = self.outputs(inputs.arrays)
        recorded |= {name: token_rows(name, array, inputs.mask) for name, array in outputs.items()}
        return recorded, arriving

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


class UserNet(Candidate):
    """A net of the user's: ``package.module:build`` is called with the config and the output directory.

    It returns a ``paddle.nn.Layer`` with its weights loaded, whose parameters and modules have the family's Paddle
    names, and which takes transformers' arguments and returns a mapping with transformers' output names.
    """

    def __init__(self, run: Run, device: str, target: str) -> None:
        self._module, _, self._function = target.partition(":")
        super().__init__(run, device)

    def _build(self) -> Any:
        import paddle
        sys.path.insert(0, "")
        try:
            build = getattr(importlib.import_module(self._module), self._function)
        except (ImportError, AttributeError) as error:
            raise BadInput(f"--target {self._module}:{self._function} cannot be imported ({error}).") from error
        finally:
            sys.path.remove("")
        with self._blamed_on_it():
            net = build(dict(self.run.target_config), self.run.output)
        if not isinstance(net, paddle.nn.Layer):
            raise BadInput(f"{self._module}:{self._function} returned a {type(net).__name__}; a paddle.nn.Layer is "
                           "needed.")
        return net

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        with self._blamed_on_it():
            result = self.model(**tensors)
        if not hasattr(result, "items"):
            raise BadInput(f"{self._module}:{self._function}: the net returned a {type(result).__name__}; a mapping "
                           "with transformers' output names is needed, as {'logits': …}.")
        return result

    @contextmanager
    def _blamed_on_it(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            first = next(iter(str(error).splitlines()), "")
            raise BadInput(f"your net {self._module}:{self._function} failed at {Path(last.filename).name}:"
                           f"{last.lineno}: {type(error).__name__}: {first}") from error

    token_loss = PaddleNLPNet.token_loss


def open_candidate(run: Run, target: str, device: str) -> Candidate:
    """The candidate that ``--target`` names."""
    if target == "models":
        return OwnNet(run, device)
    if target == "paddlenlp":
        return PaddleNLPNet(run, device)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        return UserNet(run, device, target)
    raise BadInput(f"--target {target} is not one of {', '.join(TARGETS)} or package.module:build.")


def _use_device(device: str) -> None:
    import paddle
    try:
        paddle.set_device(device)
    except Exception as error:
        raise BadInput(f"--device {device} cannot be used by this Paddle ({next(iter(str(error).splitlines()), '')}). "
                       "Try --device cpu.") from error


def _refuse_foreign_models() -> None:
    """Look where ``models`` would be imported from, without running what may lie there."""
    ours = Path(__file__).resolve().parents[1] / "models" / "__init__.py"
    found = importlib.util.find_spec("models")
    where = found and (found.origin or next(iter(found.submodule_search_locations)))
    if where is None or Path(where).resolve() != ours:
        raise BadInput(f"another package named models, at {where}, hides the nets of paddle-parity, at {ours.parent}. "
                       "Run from another directory, or rename or uninstall it.")
