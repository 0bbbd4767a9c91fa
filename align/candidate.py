"""The Paddle side: a net of ``models/`` or PaddleNLP's class, loaded from the conversion's output.

Both answer the same calls as the reference, so the stages need not know which one is behind them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import numpy as np
import xxhash

from convert.checkpoint import Checkpoint, cut, open_checkpoint, opened, read_config
from convert.dtypes import to_float32
from convert.errors import BadInput, require

from .inputs import Inputs
from .inside import Places
from .lockstep import heard_by, in_step, in_turn, listener_here
from .paging import Pages, divide, gates_of, threads
from .runs import Run
from .side import Side
from .tasks import token_rows
from .trace import RECORDED, Step

Modules = Sequence[tuple[str, str]]
Look = Callable[[str, np.ndarray], None]
TARGETS = ("models", "paddlenlp")


class Candidate(Side):
    """The model that is to be proved the same. ``paged``: its weights come in module by module, and leave again."""

    framework = "paddle"
    reentrant = True
    """Whether several passes of the net may be under way at once; a net that keeps state while it runs is not."""

    def __init__(self, run: Run, device: str = "cpu", paged: bool = False) -> None:
        require("paddle")
        import paddle
        _use_device(device)
        self.run = run
        self.version = paddle.__version__
        self._hashes: dict[str, str] = {}
        self.model = self._build_empty() if paged else self._build()
        self.model.eval()
        layers = dict(self.model.named_sublayers())
        self._gates = gates_of([name for _, name in run.modules if name in layers], self.model.state_dict().keys(),
                               {path for path, layer in layers.items() if not any(layer.children())})
        if paged:
            self._pages = _pages_of(run, self.model, self._gates)
        for gate in self._gates:
            layers[gate].register_forward_pre_hook(lambda *_, gate=gate: self._come_to(gate))

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter and buffer that the net holds, by name, in Paddle's layout."""
        if self._pages is None:
            for name, tensor in self.model.state_dict().items():
                yield name, tensor.numpy()
            return
        for slot in self._pages.each():
            array = _looked_at(slot.tensor)
            yield from ((name, array) for name in slot.names)

    def show(self, look: Look = lambda name, array: None) -> None:
        """``look`` is shown what :meth:`state` gives, each tensor once, and all of it is hashed on the way.

        Weights in memory are shown now. Those of a paged net are shown when they come in for the first time, so that
        they need not come in for that alone; :meth:`show_rest` brings in what nothing has asked for until then.
        """
        self._hashes = {}

        def seen(name: str, array: np.ndarray) -> None:
            self._hashes[name] = f"{list(array.shape)} {xxhash.xxh3_128(np.ascontiguousarray(array)).hexdigest()}"
            look(name, array)
        if self._pages is None:
            for name, array in self.state():
                seen(name, array)
        else:
            self._pages.show(lambda slot: [seen(name, _looked_at(slot.tensor)) for name in slot.names])

    def show_rest(self) -> None:
        """Show what no pass has asked for since :meth:`show`."""
        if self._pages is not None:
            self._pages.show_rest()

    @cached_property
    def weights_digest(self) -> str:
        """xxh3-128 over names, shapes and bytes of what the net holds, sorted by name."""
        if not self._hashes:
            self.show()
        self.show_rest()
        lines = (f"{name} {line}\n" for name, line in sorted(self._hashes.items()))
        return xxhash.xxh3_128("".join(lines).encode()).hexdigest()

    def answers(self, inputs: Inputs, steps: Iterable[Step]) -> Iterator[Step]:
        """For each of the reference's ``steps``, what this net gives as far as that goes, and then the rest.

        Views by name: ``recorded``, what modules and then the model give in one pass of its own; ``isolated``, the same
        in a pass in which every module is fed what entered torch's; ``inside``, ``arriving`` and ``small`` from a pass
        in which every sublayer is fed so too. All are rows of real tokens.
        """
        places, known = Places.of(self.run), _Known()
        listeners = [kind(inputs, places, known) for kind in (_Own, _Isolated, _Inside)]

        def taken() -> Step:
            found = Step()
            for listener in listeners:
                found.views |= listener.take()
            return found
        passes = [lambda listener=listener: self._listen(listener, inputs.arrays) for listener in listeners]
        if not self.reentrant:
            for step in list(steps):
                known.learn(step)
                yield Step()
            with self._hooks(places.all):
                in_turn(passes)
            yield taken()
            return
        with self._hooks(places.all), in_step(passes, self._enter) as walks:
            for step in steps:
                known.learn(step)
                while walks.gate is not None and not known.lacks(walks.gate):
                    walks.advance()
                self._leave()
                yield taken()
            while walks.gate is not None:
                walks.advance()
            self._leave()
            yield taken()

    def record_inside(self, inputs: Inputs, modules: Modules, entering: Mapping[str, np.ndarray] = MappingProxyType({}),
                      ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Of these modules, each fed ``entering``: (its output, what would have entered it), rows of real tokens."""
        found = _Once(inputs, entering)
        with self._hooks(modules), heard_by(found):
            outputs = self.outputs(inputs.arrays)
        self._leave()
        return found.given | {name: token_rows(name, array, inputs.mask) for name, array in outputs.items()}, (
            found.arriving)

    @contextmanager
    def _hooks(self, modules: Modules) -> Iterator[None]:
        """The layers tell whoever listens what arrives at them and what they give."""
        import paddle
        layers = dict(self.model.named_sublayers())

        def before(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            value, listener = arguments[0] if arguments else named.get("hidden_states"), listener_here()
            given = None if listener is None or value is None else listener.arrived(name, value.numpy)
            if given is None:
                return None
            new = paddle.to_tensor(given)
            return ((new, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": new})

        def after(name: str, layer: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if listener_here():
                listener_here().probed(name, lambda array: layer.forward(paddle.to_tensor(array)).numpy())
                listener_here().answered(name, first.numpy())

        with ExitStack() as hooks:
            for _, name in modules:
                if name in layers:
                    hooks.callback(layers[name].register_forward_pre_hook(
                        lambda _, arguments, named, name=name: before(name, arguments, named), with_kwargs=True).remove)
                    hooks.callback(layers[name].register_forward_post_hook(
                        lambda layer, _, output, name=name: after(name, layer, output)).remove)
            yield

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

    def _build_empty(self) -> Any:
        """The net under ``paddle.LazyGuard``: no weight is allocated."""
        raise AssertionError("a target builds its own net")

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("a target has its own call")


class OwnNet(Candidate):
    """The family's net in ``models/``."""

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

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.model(**tensors)

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import paddle

        from models.loss import cross_entropy
        return cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels), reduction="none").numpy()


class PaddleNLPNet(Candidate):
    """PaddleNLP's class for the family, with its own loss."""

    def _build(self) -> Any:
        return self._class().from_pretrained(str(self.run.output), dtype="float32")

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
        logging.getLogger("datasets").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require("paddlenlp")
            module = importlib.import_module(f"paddlenlp.transformers.{self.run.family.name}.modeling")
        from paddlenlp.utils.log import logger
        logger.set_level("ERROR")
        return getattr(module, self.run.head.paddlenlp)

    def _call(self, tensors: dict[str, Any]) -> Mapping[str, Any]:
        return self.model(**tensors, return_dict=True)

    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import paddle
        found = paddle.nn.functional.cross_entropy(
            paddle.to_tensor(logits), paddle.to_tensor(labels), reduction="none")
        return found.numpy().reshape(labels.shape)


def _initialise_all_but_weights(net: Any) -> None:
    """PaddleNLP's ``_init_weights`` without the values: BERT's epsilon is set there, not where the layer is made."""
    import paddle

    def nothing(*_: Any) -> None: ...
    with patch.object(paddle.Tensor, "set_value", nothing), patch.multiple(paddle, zeros_like=nothing,
                                                                           full_like=nothing):
        for layer in net.sublayers():
            if not isinstance(layer, (paddle.nn.Linear, paddle.nn.Embedding)):
                net._init_weights(layer)


class UserNet(Candidate):
    """A net of the user's: ``package.module:build`` is called with the config and the output directory.

    It returns a ``paddle.nn.Layer`` with its weights loaded, whose parameters and modules have the family's Paddle
    names, and which takes transformers' arguments and returns a mapping with transformers' output names.
    """

    reentrant = False

    def __init__(self, run: Run, device: str, paged: bool, target: str) -> None:
        self._module, _, self._function = target.partition(":")
        super().__init__(run, device, paged)

    def _build(self) -> Any:
        import paddle
        sys.path.insert(0, "")
        try:
            build = getattr(importlib.import_module(self._module), self._function)
        except (ImportError, AttributeError) as error:
            raise BadInput(f"--target {self._module}:{self._function} cannot be imported ({error}).") from error
        finally:
            sys.path.remove("")
        try:
            inspect.signature(build).bind({}, self.run.output)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{self._module}:{self._function} is called with the config (a dict) and the output "
                           f"directory (a Path), which it does not take ({error}).") from error
        with self._blamed_on_it():
            net = build(dict(self.run.target_config), self.run.output)
        if not isinstance(net, paddle.nn.Layer):
            raise BadInput(f"{self._module}:{self._function} returned a {type(net).__name__}; a paddle.nn.Layer is "
                           "needed.")
        return net

    def _build_empty(self) -> Any:
        raise BadInput(f"--paging on cannot be had for {self._module}:{self._function}: it loads its weights itself. "
                       "Use --paging off.")

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


def open_candidate(run: Run, target: str, device: str, paged: bool = False) -> Candidate:
    """The candidate that ``--target`` names."""
    if target == "models":
        return OwnNet(run, device, paged)
    if target == "paddlenlp":
        return PaddleNLPNet(run, device, paged)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        return UserNet(run, device, paged, target)
    raise BadInput(f"--target {target} is not one of {', '.join(TARGETS)} or package.module:build.")


# What the hooks of a pass tell ----------------------------------------------------------------------------------------

class _Known:
    """What the reference has told so far: what entered its modules and sublayers, and which modules it is done with."""

    def __init__(self) -> None:
        self.entering: dict[str, np.ndarray] = {}
        self.small: dict[str, np.ndarray] = {}
        self._awaited: set[str] = set()

    def learn(self, step: Step) -> None:
        self._awaited |= set(step.told.get("present", ()))
        self._awaited -= step.recorded.keys()
        self.entering |= step.view("entering")
        self.small |= step.view("small input")

    def lacks(self, gate: str) -> bool:
        """Whether torch has this module, and has not told yet what enters it."""
        return gate in self._awaited

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.entering.pop(name, None)
            self.small.pop(name, None)


class _Listener:
    """``arrived(name, read)`` returns what a module is to be fed instead, whole arrays."""

    def __init__(self, inputs: Inputs, places: Places, known: _Known) -> None:
        self.mask, self.places, self.known = inputs.mask, places, known
        self.views: dict[str, dict[str, np.ndarray]] = {}

    def take(self) -> dict[str, dict[str, np.ndarray]]:
        """What has been told since the last time."""
        views, self.views = self.views, {}
        return views

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        return None

    def answered(self, name: str, array: np.ndarray) -> None: ...

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...

    def put(self, view: str, name: str, array: np.ndarray) -> None:
        self.views.setdefault(view, {})[name] = token_rows(name, array, self.mask)


class _Own(_Listener):
    """The net's own pass."""

    def answered(self, name: str, array: np.ndarray) -> None:
        if name not in self.places.sublayers:
            self.put(RECORDED, name, array)


class _Isolated(_Listener):
    """Every module is fed what entered torch's."""

    def __init__(self, inputs: Inputs, places: Places, known: _Known) -> None:
        super().__init__(inputs, places, known)
        self.fed: set[str] = set()

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        self.fed.add(name)
        return None if name in self.places.sublayers else self.known.entering.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        if name in self.places.sublayers:
            return
        if name in self.known.entering and name not in self.fed:
            raise BadInput(f"{name} is called in a way in which it cannot be fed what enters torch's. Call it as "
                           "block(hidden_states, …) or block(hidden_states=…).")
        self.put("isolated", name, array)


class _Inside(_Listener):
    """Every module and every sublayer is fed what entered torch's; what came to a sublayer is told too."""

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        if name in self.places.sublayers and name in self.known.entering:
            self.put("arriving", name, read())
        return self.known.entering.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        if name in self.places.inside:
            self.put("inside", name, array)
        if name not in self.places.sublayers:
            self.known.forget([name, *(part for part in self.places.sublayers if part.startswith(f"{name}."))])

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None:
        if name in self.known.small:
            self.put("small", name, norm(self.known.small[name]))


class _Once:
    """One pass, recorded whole."""

    def __init__(self, inputs: Inputs, entering: Mapping[str, np.ndarray]) -> None:
        self.mask, self.entering = inputs.mask, entering
        self.given: dict[str, np.ndarray] = {}
        self.arriving: dict[str, np.ndarray] = {}

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        if name in self.entering:
            self.arriving[name] = token_rows(name, read(), self.mask)
        return self.entering.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        self.given[name] = token_rows(name, array, self.mask)

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...


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
        layers = {"": model, **dict(model.named_sublayers())}
        self.names, self._checkpoint, self._key, self._shape = names, checkpoint, key, tuple(empty.shape)
        places = [(layers[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in names]
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


def _use_device(device: str) -> None:
    """Compute on ``device``; on the CPU with as many threads as torch has, where Paddle takes one of itself."""
    import paddle
    try:
        paddle.set_device(device)
    except Exception as error:
        raise BadInput(f"--device {device} cannot be used by this Paddle ({next(iter(str(error).splitlines()), '')}). "
                       "Try --device cpu.") from error
    paddle.base.core.set_num_threads(threads())


def _refuse_foreign_models() -> None:
    """Look where ``models`` would be imported from, without running what may lie there."""
    ours = Path(__file__).resolve().parents[1] / "models" / "__init__.py"
    found = importlib.util.find_spec("models")
    where = found and (found.origin or next(iter(found.submodule_search_locations)))
    if where is None or Path(where).resolve() != ours:
        raise BadInput(f"another package named models, at {where}, hides the nets of paddle-parity, at {ours.parent}. "
                       "Run from another directory, or rename or uninstall it.")
