"""The torch side: the unmodified transformers class, eager attention, float32, eval mode.

Weights are loaded by transformers itself from the source, or block by block where the model does not fit into memory,
and rounded through the dtype of the conversion where that cast them. Nothing of ``models/`` is used here.
"""

from __future__ import annotations

import os
import re
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require

from .candidate import blamed
from .inputs import Inputs, Rows
from .inside import Places, small_input
from .lockstep import heard_by, in_step, listener_here
from .noise import ENOUGH, EPS, NoiseFloor, Pool, is_few
from .paging import Pages, divide, gates_of
from .parts import whole
from .remote import class_of, is_remote
from .runs import Run
from .side import Modules
from .tolerance import REORDERED_RUNS
from .torch_side import TorchSide, floating, is_rms_norm, tensors_of
from .trace import Step

OURS = str(Path(__file__).parent)
Arrays = dict[str, np.ndarray]


class Measured(TorchSide):
    """A torch module that is right by definition: what it gives, module by module, with its own rounding error."""

    gates: Sequence[str] = ()

    @cached_property
    def _heads(self) -> set[str]:
        """Linears outside the recorded modules that give few channels."""
        import torch
        modules = {path for path, _ in self.run.modules}
        found = {path: self.model.get_submodule(path) for path in self.gates if path not in modules}
        return {path for path, module in found.items()
                if isinstance(module, torch.nn.Linear) and module.out_features < ENOUGH}

    @property
    def present(self) -> list[str]:
        """Paddle's paths of the recorded modules, and of sublayers, that torch's class has."""
        found = dict(self.model.named_modules())
        return [name for path, name in Places.of(self.run).all if whole(path) in found]

    def steps(self, inputs: Inputs, reordered: int = REORDERED_RUNS) -> Iterator[Step]:
        """One forward pass and its noise floor, a step for what lies between two gates, in the order of execution.

        Views by name, Paddle's: ``recorded``, what modules and then the model give; ``inside``, what sublayers give;
        ``arriving``, what comes to a sublayer; ``small``, what norms give for a small input, and every other module
        for the first row made small; ``entering`` and ``small input``, whole arrays [batch, tokens, width] for the
        candidate to be fed. All but the last two are rows of real tokens. Floors are of the views ``propagated``,
        ``isolated``, ``inside``, ``arriving`` and ``small``: the oracle is this very model in float64, the pool this
        pass and ``reordered`` ones with their sums in other orders.
        """
        from .oracle import Float64, Reordered
        places = Places.of(self.run)
        plain = Plain(inputs, places)
        small, pools = SmallPlain(inputs, places, plain), Pools(inputs, places, plain)
        pooled = _Pooled(pools)
        passes = [lambda: self._listen(plain, inputs.arrays), lambda: self._listen(small, inputs.first.arrays)]
        for mode in (Float64(), *map(Reordered, range(1, reordered + 1))):
            def run(mode: Any = mode) -> None:
                with mode:
                    self._listen(pooled, _copies(inputs))
            passes.append(run)
        with self._hooks(places.all), self._heads_heard(), in_step(passes, self.enter) as walks:
            told = {"present": self.present, "described": self.described()}
            while walks.gate is not None:
                walks.advance()
                step = plain.take()
                step.told, told = told, {}
                step.floors = pools.take(step)
                self.leave()
                yield step

    def record_inside(self, inputs: Inputs, modules: Modules, replaced: Arrays | None = None) -> tuple[Arrays, Arrays]:
        """(rows of what these modules give, whole inputs of them); each is fed ``replaced`` where that has it."""
        found = _Once(inputs, replaced or {})
        with self._hooks(modules), heard_by(found):
            outputs = self.outputs(inputs.arrays)
        self.leave()
        found.given |= {name: inputs.rows(name, array) for name, array in outputs.items()}
        return found.given, found.entering

    @contextmanager
    def weights_of(self, path: str) -> Iterator[None]:
        """The weights of the module at ``path`` are in memory meanwhile; in a paged model those of no other gate."""
        gate = next((gate for gate in self.gates if f"{path}.".startswith(f"{gate}.")), None)
        if gate is not None:
            self.enter(gate)
        yield

    def looks_up(self, parameter: str) -> bool:
        """Whether a parameter, by its path, is the table of an embedding."""
        import torch
        module = dict(self.model.named_modules()).get(parameter.rpartition(".")[0])
        return isinstance(module, torch.nn.Embedding)

    def norms(self, modules: Modules) -> list[tuple[str, str]]:
        """Those of ``modules`` that are layer, batch or RMS norms in torch."""
        found = dict(self.model.named_modules())
        return [pair for pair in modules if self._is_probed(found.get(pair[0]))]

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: self.run.batch_first(name, array) for name, array in self.returned(arrays).items()}

    def returned(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The floating tensors that the model returns, as it does."""
        return outputs_of(self.model, arrays)

    def call(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the model returns, with its graph where gradients are enabled."""
        return called(self.model, tensors)

    def _is_probed(self, module: Any) -> bool:
        import torch
        return isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)) or is_rms_norm(module)

    @contextmanager
    def _heads_heard(self) -> Iterator[None]:
        """The heads tell whoever listens what arrives at them."""
        def after(name: str, head: Any, arguments: tuple[Any, ...]) -> None:
            if listener_here() is not None:
                listener_here().projected(name, arguments[0].numpy(), head)
        with ExitStack() as hooks:
            for name in self._heads:
                hooks.callback(self.model.get_submodule(name).register_forward_hook(
                    lambda head, arguments, _, name=name: after(name, head, arguments)).remove)
            yield


class Reference(Measured):
    """The model that is right by definition. ``paged``: its weights come in module by module, and leave again."""

    def __init__(self, run: Run, paged: bool = False, *, trust_remote_code: bool = False) -> None:
        for framework in ("torch", "transformers"):
            require(framework)
        import torch
        self.run = run
        self.version = torch.__version__
        _ = run.hashing if paged else run.source_digest
        cls, config = (None, None) if run.head.reference else _class_and_config(run, trust_remote_code)
        with blamed("the checkpoint's own code") if run.family.remote_code else nullcontext():
            empty = _load_empty(run, cls, config) if paged or run.family.remote_code else None
        self.model = empty if empty is not None else _load(run, cls, config)
        _forget_tables(self.model)
        self.gates = gates_of([path for path, _ in run.modules if path in dict(self.model.named_modules())],
                               dict(self.model.named_parameters()),
                               {path for path, module in self.model.named_modules() if not any(module.children())})
        if paged:
            self._pages = _pages_of(run, self.model, self.gates)
        elif empty is not None:
            _pages_of(run, self.model, [])
        for gate in self.gates:
            self.model.get_submodule(gate).register_forward_pre_hook(lambda *_, gate=gate: self.come_to(gate))


class _Listener:
    """What the hooks of a pass tell, by Paddle's names. ``arrived`` returns what the module is to be fed instead."""

    def __init__(self, inputs: Inputs, places: Places) -> None:
        self.rows, self.places = inputs.rows, places

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        return None

    def answered(self, name: str, array: np.ndarray) -> None: ...

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...

    def projected(self, name: str, array: np.ndarray, linear: Any) -> None: ...


class Plain(_Listener):
    """The pass that everything is compared with."""

    def __init__(self, inputs: Inputs, places: Places) -> None:
        super().__init__(inputs, places)
        self.step = Step()
        self.heads: dict[str, _Head] = {}
        self.lengths: dict[str, int] = {}
        """The first axis of the whole array that each module gives, and each output."""

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> None:
        array = self.step.view("entering")[name] = read().copy()
        if name in self.places.operations:
            self.step.view("arriving")[name] = self.rows(name, array)

    def answered(self, name: str, array: np.ndarray) -> None:
        rows = self.rows(name, array)
        self.lengths[name] = array.shape[0] if array.ndim else 0
        if name not in self.places.sublayers:
            self.step.recorded[name] = rows
        if name in self.places.inside:
            self.step.view("inside")[name] = rows

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None:
        small = self.step.view("small input")[name] = small_input(self.step.view("entering")[name])
        self.step.view("small")[name] = self.rows(name, norm(small))

    def projected(self, name: str, array: np.ndarray, linear: Any) -> None:
        rows = self.rows(name, array)
        sums = np.abs(rows) @ np.abs(linear.weight.detach().numpy()).T
        if linear.bias is not None:
            sums += np.abs(linear.bias.detach().numpy())
        self.heads[name] = _Head(rows, float(np.sqrt(np.mean(np.square(sums, dtype=np.float64)))))

    def small_row(self, name: str) -> np.ndarray | None:
        """The first row of what entered a recorded module, made small; None for a norm, which is probed on all rows."""
        entered = None if name in self.places.sublayers else self.step.view("entering").get(name)
        if entered is None or name in self.step.view("small input"):
            return None
        return small_input(self.rows.first_of(entered))

    def first_row(self, name: str) -> np.ndarray | None:
        """What a recorded module is fed in the pass of the first row: :meth:`small_row`; a norm, what entered it, so
        that whoever reads its output reads the plain pass's.
        """
        small = self.small_row(name)
        if small is not None or name in self.places.sublayers or name not in self.step.view("small input"):
            return small
        return self.rows.first_of(self.step.view("entering")[name])

    def take(self) -> Step:
        """What has been told since the last time."""
        step, self.step = self.step, Step()
        return step


class SmallPlain(_Listener):
    """The first row alone; every module but a norm is fed what entered it in the plain pass, made small."""

    def __init__(self, inputs: Inputs, places: Places, plain: Plain) -> None:
        super().__init__(inputs.first, places)
        self.plain = plain

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        return self.plain.first_row(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        if self.plain.small_row(name) is not None:
            self.plain.step.view("small")[name] = self.rows(name, array)


@dataclass(frozen=True)
class _Head:
    """Rows of what enters a linear in the plain pass, and the rms of what its sums would be without cancelling."""

    entering: np.ndarray
    scale: float


class Pools:
    """The errors of the passes of the noise floor, by view and name. The first of these passes is the oracle."""

    def __init__(self, inputs: Inputs, places: Places, plain: Plain) -> None:
        self.rows, self.places, self.plain = inputs.rows, places, plain
        self._recorded = dict(places.all)
        self._pools: dict[tuple[str, str], Pool] = {}
        self._entering_heads: dict[tuple[str, str], Pool] = {}

    def add(self, view: str, name: str, rows: np.ndarray) -> None:
        _put(self._pools, (view, name), rows)

    def drop(self, view: str, name: str) -> None:
        """Forget what has been added."""
        self._pools.pop((view, name), None)

    def add_entering(self, view: str, head: str, rows: np.ndarray) -> None:
        """What entered a head, by torch's path."""
        _put(self._entering_heads, (view, head), rows)

    def take(self, step: Step) -> dict[str, dict[str, Any]]:
        """The floors by view and name, with the plain pass, which ``step`` holds, among the pooled ones."""
        floors: dict[str, dict[str, Any]] = {}
        for (view, name), pool in self._pools.items():
            recorded = step.views["recorded" if view in ("propagated", "isolated") else view][name]
            pool.add(recorded)
            few = self._few(view, name) if is_few(recorded) else 0.0
            floors.setdefault(view, {})[name] = replace(pool.floor(), few=few)
        self._pools = {}
        if "arriving" in floors:
            floors["arriving"] = self._of_gelus(floors["arriving"], step.views.get("inside", {}))
        return floors

    def _of_gelus(self, floors: Mapping[str, NoiseFloor], given: Arrays) -> dict[str, NoiseFloor]:
        """``floors`` of what arrives at sublayers, those behind a gelu with what it was given as their base."""
        based = {name: np.abs(given[before]) for name, before in self.places.activated.items()
                 if name in floors and before in given}
        return {name: replace(floor, base=based[name]) if name in based and based[name].shape == floor.oracle.shape
                else floor for name, floor in floors.items()}

    def _few(self, view: str, name: str) -> float:
        """max(eps, rho) S of an output's heads, the largest where there are several, or of the head that is recorded
        as ``name``; 0 where there is none.
        """
        found = [(head, self._entering_heads.get((view, path))) for path, head in self.plain.heads.items()
                 if name not in self.places.names or self._recorded.get(path) == name]
        return max((max(EPS, pool.with_run(head.entering).relative) * head.scale for head, pool in found if pool),
                   default=0.0)


class _Pooled(_Listener):
    """The passes of the noise floor: three copies of every row, one below the other, and the first row once more.

    The first copy goes its own way (``propagated``); the second is fed, at each recorded module, what entered the plain
    pass's (``isolated``); the third also at each sublayer (``inside``); the last row is fed the same, made small where
    it is no norm.
    """

    def __init__(self, pools: Pools) -> None:
        self.pools, self.plain, self.rows, self.places = pools, pools.plain, pools.rows, pools.places

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        array, given = read(), self.plain.step.view("entering")[name]
        if not self._is_copied(array, given.shape[0] if given.ndim else 0):
            return given
        own, alone, inside, row = self._parts(array)
        if name in self.places.operations:
            self._add("arriving", name, inside)
        if name in self.places.sublayers:
            return np.concatenate([own, alone, given, row])
        first = self.plain.first_row(name)
        return np.concatenate([own, given, given, row if first is None else first])

    def answered(self, name: str, array: np.ndarray) -> None:
        own, alone, inside, row = (
            self._parts(array) if self._is_copied(array, self.plain.lengths.get(name, 0)) else [array] * 4)
        if name not in self.places.sublayers:
            self._add("propagated", name, own)
            self._add("isolated", name, alone)
        if name in self.places.inside:
            self._add("inside", name, inside)
        if self.plain.small_row(name) is not None:
            self._add("small", name, row, self.rows.first)

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None:
        self._add("small", name, norm(self.plain.step.view("small input")[name]))

    def projected(self, name: str, array: np.ndarray, linear: Any) -> None:
        own, alone, *_ = self._parts(array)
        for view, part in (("propagated", own), ("isolated", alone)):
            self.pools.add_entering(view, name, self.rows(name, part))

    def _is_copied(self, array: np.ndarray, length: int) -> bool:
        """Whether the copies lie one below the other, where the plain pass's array has ``length`` rows; a table of
        positions, [1, tokens, width] or [tokens, tokens, heads], is one for all.
        """
        return array.ndim > 0 and length > 0 and array.shape[0] * self.rows.batch == length * (3 * self.rows.batch + 1)

    def _parts(self, array: np.ndarray) -> list[np.ndarray]:
        """The three copies, and the row that is made small. A row may be several of the array's: [batch * tokens, …]"""
        rows = array.shape[0] // (3 * self.rows.batch + 1) * self.rows.batch
        return np.split(array, [rows, 2 * rows, 3 * rows])

    def _add(self, view: str, name: str, array: np.ndarray, rows: Rows | None = None) -> None:
        self.pools.add(view, name, (rows or self.rows)(name, array))


def _put(pools: dict[tuple[str, str], Pool], key: tuple[str, str], rows: np.ndarray) -> None:
    """The first rows of a key are the oracle's."""
    if key in pools:
        pools[key].add(rows)
    else:
        pools[key] = Pool(rows)


class _Once:
    """One pass, recorded whole."""

    def __init__(self, inputs: Inputs, replaced: Arrays) -> None:
        self.rows, self.replaced = inputs.rows, replaced
        self.given: Arrays = {}
        self.entering: Arrays = {}

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        self.entering[name] = read().copy()
        return self.replaced.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        self.given[name] = self.rows(name, array)

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...


def _copies(inputs: Inputs) -> Arrays:
    return {name: np.concatenate([array, array, array, array[:1]]) for name, array in inputs.arrays.items()}


def outputs_of(model: Any, arrays: Mapping[str, np.ndarray]) -> Arrays:
    import torch
    with torch.no_grad():
        return floating(called(model, tensors_of(arrays)))


def called(model: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the model returns, by transformers' names; :class:`BadInput` where it fails by itself."""
    try:
        result = model(**tensors, **({"return_dict": True} if hasattr(model, "config_class") else {}))
    except Exception as error:
        if any(word in str(error) for word in ("can't allocate memory", "out of memory")):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise BadInput(f"torch's own {type(model).__name__} has too little memory for its inputs ({shapes}). Give "
                           "fewer rows or tokens.") from error
        ours = any(frame.filename.startswith(OURS) for frame in traceback.extract_tb(error.__traceback__)[1:])
        if ours or not (isinstance(error, (RuntimeError, IndexError, ValueError)) or is_remote(model)):
            raise  # by a hook of ours, or because of how it is called, not by the model
        raise BadInput(f"torch's own {type(model).__name__} fails on this checkpoint, so there is nothing to "
                       f"compare with: {next(iter(str(error).splitlines()), '')}.") from error
    if not hasattr(result, "items"):
        raise BadInput(f"torch's {type(model).__name__} returned a {type(result).__name__}; a mapping with "
                       "transformers' output names is needed, as {'logits': …}.")
    return result


def _load(run: Run, cls: Any, config: Any) -> Any:
    import torch
    if run.head.reference is not None:
        return _rounded(run, _built(run))
    with _as_directory(run) as directory:
        given = dict(pretrained_model_name_or_path=directory) if _is_spelled_as_transformers(run) else dict(
            pretrained_model_name_or_path=None, state_dict=_renamed(run))
        try:
            model, info = cls.from_pretrained(**given, config=config, torch_dtype=torch.float32,
                                              attn_implementation="eager", output_loading_info=True)
        except ValueError as error:
            raise BadInput(f"transformers itself cannot load {run.source}: {next(iter(str(error).splitlines()), '')}"
                           ) from error
    weights = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    absent = sorted(set(info["missing_keys"]) & weights - {name for move in run.plan.moves for name in move.sources})
    if absent or info["mismatched_keys"]:
        raise _random_weights(run, (absent or info["mismatched_keys"])[0])
    return _rounded(run, model)


def _is_spelled_as_transformers(run: Run) -> bool:
    """Whether the source calls its tensors so that transformers knows them, with or without the base model's prefix."""
    def known(name: str) -> str:
        return re.sub(r"(?<=\.)gamma$", "weight", re.sub(r"(?<=\.)beta$", "bias", name)).removeprefix(run.family.prefix)
    return all(known(key) == known(name) for name, key in run.plan.keys.items())


def _renamed(run: Run) -> dict[str, Any]:
    """The source's tensors, read by torch and safetensors, under the names of transformers' class."""
    import torch
    from safetensors.torch import load_file
    held: dict[str, Any] = {}
    for file in dict.fromkeys(info.file for info in run.checkpoint.tensors.values()):
        held |= load_file(file) if file.suffix == ".safetensors" else torch.load(
            file, map_location="cpu", weights_only=True)
    return {name: held[run.checkpoint.tensors[key].name] for name, key in run.plan.keys.items()}


def _built(run: Run) -> Any:
    """The net of a family of the user's own, which the family file builds."""
    import torch
    build = run.head.reference
    try:
        model = build(dict(run.config), run.source)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"the reference of family {run.family.name} could not be built: {type(error).__name__}: "
                       f"{next(iter(str(error).splitlines()), '')}") from error
    if not isinstance(model, torch.nn.Module):
        raise BadInput(f"the reference of family {run.family.name} is a {type(model).__name__}; a torch.nn.Module is "
                       "needed.")
    return model.float()


def _rounded(run: Run, model: Any) -> Any:
    """``model`` in eval mode, its weights rounded through the dtype that the conversion cast to, if it did."""
    import torch
    if run.conversion.dtype != "keep":
        _round_through(model, getattr(torch, run.conversion.dtype), run.plan.keys)
    return model.eval()


def _class_and_config(run: Run, trust_remote_code: bool) -> tuple[Any, Any]:
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cls = class_of(run, trust_remote_code) if run.family.remote_code else getattr(transformers, run.head.architecture)
    config = cls.config_class.from_dict(dict(run.config))
    config.pad_token_id = run.intended_config.get("pad_token_id")
    config.use_cache = False  # keys and values of every block would be kept until the pass ends
    return cls, config


def empty_of(run: Run) -> Any:
    """The reference without its weights, of a class of transformers'."""
    return _load_empty(run, *_class_and_config(run, trust_remote_code=False))


def _random_weights(run: Run, name: str) -> BadInput:
    return BadInput(f"transformers does not find {name} in {run.source}; a reference with random weights proves "
                    "nothing.")


# A model larger than memory -------------------------------------------------------------------------------------------

PART = 64 << 20


def _load_empty(run: Run, cls: Any, config: Any) -> Any:
    """The class with its parameters on the meta device; its buffers are real, and those that the file holds go there
    when pages are made of them.

    Only parameters are sent there, as accelerate's ``init_empty_weights`` does: ``with torch.device("meta")`` would
    take plain attributes along, such as GPT-J's rotary table, which nothing restores. Classes that a checkpoint brings
    along make their weights with ``skip_init``, which would give them memory, and as float16, which would round.
    """
    import torch
    from transformers.modeling_utils import no_init_weights
    if run.head.reference is not None:
        raise BadInput(f"the reference of family {run.family.name} loads its weights itself and cannot be paged. Use "
                       "--paging off.")
    config._attn_implementation = "eager"
    register, to_empty = torch.nn.Module.register_parameter, torch.nn.Module.to_empty

    def without_values(module: Any, name: str, parameter: Any) -> None:
        register(module, name, None if parameter is None else _on_meta(parameter))
    torch.nn.Module.register_parameter, torch.nn.Module.to_empty = without_values, lambda module, **_: module
    try:
        with no_init_weights():
            model = cls(config)
    finally:
        torch.nn.Module.register_parameter, torch.nn.Module.to_empty = register, to_empty
    model.float().tie_weights()
    return model.eval()


def _forget_tables(model: Any) -> None:
    """Let modules without weights forget what they keep from call to call: a table of angles that one pass made in
    float64, or reordered, is not for the next.
    """
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)) and not any(True for _ in module.parameters()):
            held: list[dict[str, Any]] = []
            module.register_forward_pre_hook(lambda module, _, held=held: held.append(dict(vars(module))))
            module.register_forward_hook(lambda module, _, __, held=held: vars(module).update(held.pop()))


def _on_meta(parameter: Any) -> Any:
    import torch
    return torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _pages_of(run: Run, model: Any, gates: Sequence[str]) -> Pages:
    import torch
    keys = run.plan.keys
    cast = None if run.conversion.dtype == "keep" else getattr(torch, run.conversion.dtype)
    owners = {name: id(weight) for name, weight in (
        *model.named_parameters(remove_duplicate=False),
        *((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False)
          if name in keys and name not in run.dropped))}

    def slot(names: Sequence[str]) -> _Slot:
        known = [name for name in names if name in keys]
        if not known:
            raise _random_weights(run, names[0])
        info = run.checkpoint.tensors[keys[known[0]]]
        return _Slot(model, names, info.file, info.name, cast)
    return Pages(divide(owners, gates), slot)


class _Slot:
    """One parameter of a torch module, or one buffer that the file holds, under all its names."""

    def __init__(self, model: Any, names: Sequence[str], file: Path, key: str, cast: Any) -> None:
        import torch
        self.names, self._file, self._key, self._cast = names, file, key, cast
        places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        self._is_buffer = places[0][1] in places[0][0]._buffers
        self._tables = [(module._buffers if self._is_buffer else module._parameters, word) for module, word in places]
        table, word = self._tables[0]
        self._empty = torch.empty_like(table[word], device="meta")
        self.release()

    @property
    def elements(self) -> int:
        return self._empty.numel()

    def fill(self, memory: np.ndarray) -> None:
        import torch
        values = torch.from_numpy(memory).view(self._empty.shape)
        read = _read_safetensors if self._file.suffix == ".safetensors" else _read_bin
        read(self._file, self._key, values, self._cast)
        self._put(values)

    def release(self) -> None:
        self._put(self._empty)

    def _put(self, values: Any) -> None:
        import torch
        held = values if self._is_buffer else torch.nn.Parameter(values, requires_grad=False)
        for table, word in self._tables:
            table[word] = held


def _read_safetensors(file: Path, key: str, values: Any, cast: Any) -> None:
    """Fill ``values`` by way of safetensors' own reader, in parts: what it maps counts as memory until it closes."""
    from safetensors import safe_open
    rows = max(1, PART // max(1, values[0].numel() * 4)) if values.dim() > 1 else max(1, values.numel())
    for start in range(0, max(1, values.shape[0] if values.dim() else 1), rows):
        with safe_open(file, "pt") as content:
            if values.dim() > 1:
                _put_rounded(content.get_slice(key)[start: start + rows], values[start: start + rows], cast)
            else:
                _put_rounded(content.get_tensor(key).reshape(values.shape), values, cast)


def _read_bin(file: Path, key: str, values: Any, cast: Any) -> None:
    import torch
    if not zipfile.is_zipfile(file):
        raise BadInput(f"{file.name} is older than torch's zip format and can only be loaded whole, so this model "
                       "cannot be paged. Save it again with torch.save, or as safetensors, or use --paging off.")
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    _put_rounded(content[key].reshape(values.shape), values, cast)


def _put_rounded(stored: Any, values: Any, cast: Any) -> None:
    """``stored`` into ``values``, float32, by way of the dtype that the conversion cast to, if it did."""
    values.copy_(stored)
    if cast is not None:
        values.copy_(values.to(cast))


def _round_through(model: Any, dtype: Any, moved: Collection[str]) -> None:
    """Parameters, and those buffers that are ``moved`` from the file: running statistics."""
    import torch
    buffers = [buffer for name, buffer in model.named_buffers() if name in moved]
    with torch.no_grad():
        for weight in [*model.parameters(), *buffers]:
            weight.copy_(weight.to(dtype).float())


@contextmanager
def _as_directory(run: Run) -> Any:
    """transformers loads directories with standard names; a lone file gets one made of links."""
    if run.source.is_dir():
        yield run.source
        return
    suffix = ".safetensors" if run.source.suffix == ".safetensors" else ".bin"
    with tempfile.TemporaryDirectory() as directory:
        name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        os.symlink(run.source.resolve(), Path(directory) / name)
        os.symlink((run.source.parent / "config.json").resolve(), Path(directory) / "config.json")
        yield directory
