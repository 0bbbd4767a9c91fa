"""The Paddle side: a net of ``models/`` or PaddleNLP's class, loaded from the conversion's output."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from convert.checkpoint import Checkpoint, cut, open_checkpoint, opened, read_config
from convert.dtypes import to_float32
from convert.errors import BadInput, require

from .candidate import Candidate, Look, blamed, paddlenlp_imported
from .decoding.feeding import KeepsNothing, rows_axis
from .inside import SMALL_VARIANCE
from .lint import Description, describe, is_mask
from .lockstep import listener_here
from .paging import Pages, divide, threads
from .runs import Run
from .side import Modules, entering, fed, hooked, in_shape

PAST = "past_key_values"
KEPT = {PAST: PAST, "encoder_last_hidden_state": "encoder_outputs"}
"""By the name of an output of a net in ``models/`` as which argument it is given to the next call."""


class PaddleNet(Candidate):
    """A ``paddle.nn.Layer``."""

    framework = "paddle"

    def __init__(self, run: Run, device: str = "cpu", paged: bool = False) -> None:
        require("paddle")
        import paddle
        use_device(device)
        self.version = paddle.__version__
        super().__init__(run, paged)

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        if self._pages is None:
            held: dict[int, tuple[Any, list[str]]] = {}
            for name, tensor in self.model.state_dict().items():
                held.setdefault(id(tensor), (tensor, []))[1].append(name)
            for tensor, names in held.values():
                yield from ((name, tensor.numpy()) for name in self._shown(names))
            return
        for slot in self._pages.each():
            array = _looked_at(slot.tensor)
            yield from ((name, array) for name in self._shown(slot.names))

    def _show_when_in(self, look: Look) -> None:
        self._pages.show(lambda slot: [look(name, _looked_at(slot.tensor)) for name in self._shown(slot.names)])

    @contextmanager
    def _hooks(self, modules: Modules) -> Iterator[None]:
        import paddle
        layers = dict(self.model.named_sublayers())

        def is_floating(value: Any) -> bool:
            return isinstance(value, paddle.Tensor) and value.is_floating_point()

        def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            place, listener = entering(arguments, named, is_floating), listener_here()
            value = None if place is None else (arguments or named)[place]
            if listener is None or not is_floating(value):
                return None
            given = listener.arrived(name, lambda: self.run.batch_first(name, value.numpy()))
            if given is None:
                return None
            given = self.run.batch_first(name, given)
            return fed(arguments, named, place, paddle.to_tensor(in_shape(given, value.shape)))

        def after(name: str, layer: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if listener_here():
                listener_here().probed(name, lambda array: probed(layer, paddle.to_tensor(array)))
                listener_here().answered(name, self.run.batch_first(name, first.numpy()))

        with hooked(layers, "register_forward_post_hook", ((name, name) for _, name in modules), before, after):
            yield

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every floating tensor that the class returns, by transformers' names; ``loss`` when labels are given."""
        import paddle
        with paddle.no_grad():
            result = self.call({name: paddle.to_tensor(array) for name, array in arrays.items()})
        return {name: self.run.batch_first(name, value.numpy()) for name, value in result.items()
                if isinstance(value, paddle.Tensor) and value.is_floating_point()}

    @property
    def keeps(self) -> bool:
        """Whether the net can be asked to keep keys and values: as transformers' classes, or in a way of its own."""
        return False

    def continued(self, arrays: Mapping[str, np.ndarray], kept: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits [rows, tokens, vocabulary] behind what was ``kept``, nothing at first, and what is kept now."""
        import paddle
        with paddle.no_grad():
            result = self.call({**{name: paddle.to_tensor(array) for name, array in arrays.items()}, **kept,
                                "use_cache": True})
        if result.get(PAST) is None:
            raise KeepsNothing(f"this {type(self.model).__name__} gives nothing to keep")
        return self.run.batch_first("logits", result["logits"].numpy()), {
            argument: result[name] for name, argument in KEPT.items() if name in result}

    def selected(self, kept: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        """What is kept of these ``rows``, in their order; what an encoder gave is the same for all texts of a row."""
        import paddle
        places, axis = paddle.to_tensor(rows), rows_axis(self.run)

        def of_rows(part: Any) -> Any:
            if isinstance(part, paddle.Tensor):
                return paddle.index_select(part, places, axis)
            return tuple(of_rows(one) for one in part)
        return {**kept, PAST: of_rows(kept[PAST])}

    def probing(self, pair: tuple[str, str]) -> AbstractContextManager[None]:
        return small_statistics(self._layers().get(pair[1], self.model))

    def contrastive_loss(self, hidden: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """With ``models.loss``."""
        import paddle

        from models.loss import contrastive_loss, mean_pool
        pooled = mean_pool(paddle.to_tensor(hidden), paddle.to_tensor(mask.astype(np.int64)))
        first, second = paddle.split(pooled, 2)
        return contrastive_loss(first, second, scale).numpy()

    def described(self) -> Description:
        weights = dict(self.model.state_dict())
        if self._pages is not None:
            file = open_checkpoint(self.run.output)
            weights |= {name: file.read(name).reshape(()) for name in weights
                        if is_mask(name, self.run.family) and name in file.tensors}
        return describe(self.model, self._layers(), weights, self.run, str)

    def _paged(self) -> Pages:
        return _pages_of(self.run, self.model, self.gates)

    def _layers(self) -> dict[str, Any]:
        return dict(self.model.named_sublayers())

    def _path(self, pair: tuple[str, str]) -> str:
        return pair[1]

    def call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("a target has its own call")


class OwnNet(PaddleNet):
    """The family's net in ``models/``."""

    keeps = True

    def _build(self) -> Any:
        _refuse_foreign_models()
        import models
        return models.from_pretrained(self.run.output)

    def _build_empty(self) -> Any:
        _refuse_foreign_models()
        import models
        config = read_config(self.run.output)
        with opened(self.run.output) as checkpoint:
            return models.model_class(config).unfilled(config, checkpoint)

    def call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.model(**tensors)

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import paddle

        from models.loss import cross_entropy
        return cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels), reduction="none").numpy()


class PaddleNLPNet(PaddleNet):
    """PaddleNLP's class for the family, with its own loss and its own cache."""

    withheld: frozenset[str] = frozenset()
    """Arguments that PaddleNLP's ``generate`` is given and has not handed on to the class so far."""

    def _build(self) -> Any:
        cls = self._class()
        with blamed(f"PaddleNLP's {cls.__name__}"):
            return cls.from_pretrained(str(self.run.output), dtype="float32")

    def _build_empty(self) -> Any:
        import paddle
        cls = self._class()
        from paddlenlp.transformers.model_utils import no_init_weights
        config = cls.config_class.from_pretrained(str(self.run.output), dtype="float32")
        with no_init_weights(_enable=True), paddle.LazyGuard():
            net = cls(config)
        _initialise_all_but_weights(net)
        return net

    def _class(self) -> Any:
        if self.run.head.paddlenlp is None:
            raise BadInput(f"PaddleNLP has no counterpart of {self.run.head.architecture}. Leave --target out to "
                           "compare the net in models/.")
        with paddlenlp_imported():
            package = self.run.family.paddlenlp or self.run.family.name
            module = importlib.import_module(f"paddlenlp.transformers.{package}.modeling")
        from paddlenlp.utils.log import logger
        logger.set_level("ERROR")
        return getattr(module, self.run.head.paddlenlp)

    def call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        with self.blamed():
            return self.model(**self.run.family.paddlenlp_inputs(tensors), return_dict=True)

    def blamed(self) -> AbstractContextManager[None]:
        return blamed(f"PaddleNLP's {type(self.model).__name__}")

    @property
    def keeps(self) -> bool:
        return "use_cache" in inspect.signature(self.model.forward).parameters

    def continued(self, arrays: Mapping[str, np.ndarray], kept: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """As PaddleNLP's own ``generate`` continues: see decoding/paddlenlp_side.py."""
        import paddle

        from .decoding import paddlenlp_side
        tensors = {name: paddle.to_tensor(array) for name, array in arrays.items()}
        with paddle.no_grad():
            text = paddlenlp_side.longer(kept, tensors) if kept else paddlenlp_side.begun(
                self.model, self.run.family.paddlenlp_inputs(tensors))
            logits, found, withheld = paddlenlp_side.answered(self.model, text)
        self.withheld |= withheld
        return self.run.batch_first("logits", logits.numpy()), found

    def selected(self, kept: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        import paddle

        from .decoding import paddlenlp_side
        return paddlenlp_side.selected(self.model, kept, paddle.to_tensor(rows))

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import paddle
        found = paddle.nn.functional.cross_entropy(
            paddle.to_tensor(logits), paddle.to_tensor(labels), reduction="none")
        return found.numpy().reshape(labels.shape)


def _initialise_all_but_weights(net: Any) -> None:
    """PaddleNLP's ``_init_weights`` without the values: BERT's epsilon is set there, not where the layer is made."""
    import paddle

    def nothing(*_: Any) -> None: ...
    with patch.multiple(paddle.Tensor, set_value=nothing, scale_=nothing), patch.multiple(
            paddle, zeros_like=nothing, full_like=nothing, ones_like=lambda *_: 1):
        for layer in net.sublayers():
            if not isinstance(layer, (paddle.nn.Linear, paddle.nn.Embedding)):
                net._init_weights(layer)


@contextmanager
def small_statistics(layer: Any) -> Iterator[None]:
    """Those of a batch norm meanwhile; of another layer nothing changes."""
    import paddle
    tables = [table for table in (layer._parameters, layer._buffers) if {"_mean", "_variance"} <= table.keys()]
    if not tables:
        yield
        return
    held = {name: tables[0][name] for name in ("_mean", "_variance")}
    tables[0]["_mean"] = paddle.zeros_like(held["_mean"])
    tables[0]["_variance"] = paddle.full_like(held["_variance"], SMALL_VARIANCE)
    try:
        yield
    finally:
        tables[0].update(held)


def probed(layer: Any, small: Any) -> np.ndarray:
    """What a layer gives for a small input, without its hooks."""
    with small_statistics(layer):
        return layer.forward(small).numpy()


# A net larger than memory ---------------------------------------------------------------------------------------------

PIECE = 1 << 17


def _pages_of(run: Run, model: Any, gates: Sequence[str]) -> Pages:
    held = model.state_dict()
    checkpoint = open_checkpoint(run.output)

    def slot(names: Sequence[str]) -> _Slot:
        known = next((name for name in names if name in checkpoint.tensors), None)
        if known is None:
            raise BadInput(f"{type(model).__name__} has a weight {names[0]} that {run.output} does not hold.")
        found, wanted = tuple(checkpoint.tensors[known].shape), tuple(held[names[0]].shape)
        if found != wanted and {math.prod(found), math.prod(wanted)} != {1}:
            raise BadInput(f"{known} in {run.output} is {list(found)}; {type(model).__name__} needs {list(wanted)}.")
        return _Slot(model, names, held[names[0]], checkpoint, known)
    return Pages(divide({name: id(tensor) for name, tensor in held.items()}, gates), slot)


class _Slot:
    """One parameter or buffer of a net, under all its names."""

    def __init__(self, model: Any, names: Sequence[str], empty: Any, checkpoint: Checkpoint, key: str) -> None:
        import paddle
        self.names, self._checkpoint, self._key, self._shape = names, checkpoint, key, tuple(empty.shape)
        places = [(_layer_at(model, name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        self._tables = [(layer._parameters if word in layer._parameters else layer._buffers, word)
                        for layer, word in places]
        self._empty = empty if _is_lazy(empty) else paddle.zeros([1])
        self.tensor: Any = None
        self.release()

    @property
    def elements(self) -> int:
        return math.prod(self._shape)

    def fill(self, memory: np.ndarray) -> None:
        _read_float32(self._checkpoint, self._key, memory)
        self.tensor = _shared(memory.reshape(self._shape))
        self._put(self.tensor)

    def release(self) -> None:
        self.tensor = None
        self._put(self._empty)

    def _put(self, tensor: Any) -> None:
        for table, word in self._tables:
            table[word] = tensor


def _layer_at(model: Any, path: str) -> Any:
    """The layer at ``path``, also where it is one that has another path too."""
    for word in path.split(".") if path else []:
        model = model._sub_layers[word]
    return model


def _is_lazy(tensor: Any) -> bool:
    return not tensor._is_initialized()


def _read_float32(checkpoint: Checkpoint, key: str, memory: np.ndarray) -> None:
    """Fill ``memory``, float32 [elements], on all cores, in pieces so small that they are widened in the cache."""
    info = checkpoint.tensors[key]
    checkpoint.handle(info)

    def read(part: range) -> None:
        for piece in cut(part, PIECE):
            stored = checkpoint.read_elements(key, piece.start, piece.stop)
            memory[piece.start: piece.stop] = to_float32(stored, info.dtype.name)
    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(read, cut(range(len(memory)), -(-len(memory) // threads()))))


def _looked_at(tensor: Any) -> np.ndarray:
    """The very memory of a tensor on the CPU, which is not copied; of one elsewhere a copy."""
    return np.from_dlpack(tensor) if tensor.place.is_cpu_place() and tensor.ndim else tensor.numpy()


def _shared(array: np.ndarray) -> Any:
    """A tensor over the very memory of ``array``."""
    import paddle
    return paddle.utils.dlpack.from_dlpack(array.__dlpack__()) if array.size and array.ndim else paddle.to_tensor(array)


def use_device(device: str) -> None:
    """Compute on ``device``; on the CPU with as many threads as torch has, where Paddle takes one of itself."""
    import paddle
    try:
        paddle.set_device(device)
    except Exception as error:
        told = f"--device {device} cannot be used by this Paddle ({paddle.__version__}): {_devices()}"
        raise BadInput(told) from error
    paddle.base.core.set_num_threads(threads())


def _devices() -> str:
    """What there is to compute on, and what to do."""
    import paddle
    there = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if there:
        return f"it finds gpu:0 to gpu:{there - 1} and the CPU. Give one of these, or leave --device out for the CPU."
    why = ("it finds no GPU here" if paddle.is_compiled_with_cuda() else
           "it is built for the CPU alone, and a GPU needs paddlepaddle-gpu")
    return f"{why}. Leave --device out: the CPU is the default."


def _refuse_foreign_models() -> None:
    """Look where ``models`` would be imported from, without running what may lie there."""
    ours = Path(__file__).resolve().parents[1] / "models" / "__init__.py"
    found = importlib.util.find_spec("models")
    where = found and (found.origin or next(iter(found.submodule_search_locations)))
    if where is None or Path(where).resolve() != ours:
        raise BadInput(f"another package named models, at {where}, hides the nets of paddle-parity, at {ours.parent}. "
                       "Run from another directory, or rename or uninstall it.")
