"""What one side recorded at one stage, with its provenance; on disk as ``reprod_log`` keeps it.

A recording is a sequence of :class:`Step`, so that a model larger than memory is recorded, compared and forgotten part
by part. The view ``recorded`` of all steps together is the trace that other tools know: ``<stage>_<framework>.npy``.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from convert.errors import BadInput

from .noise import NoiseFloor
from .tolerance import REPROD_LOG_MEAN

RECORDED = "recorded"
Arrays = dict[str, np.ndarray]


@dataclass
class Step:
    """Arrays by view and name, noise floors likewise, and what there is to say in words and numbers (as JSON has it).

    Views are what a stage makes of them; ``recorded`` is what goes into the trace.
    """

    views: dict[str, Arrays] = field(default_factory=dict)
    floors: dict[str, dict[str, NoiseFloor]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    def view(self, name: str) -> Arrays:
        return self.views.setdefault(name, {})

    @property
    def recorded(self) -> Arrays:
        return self.view(RECORDED)


@dataclass(frozen=True)
class Provenance:
    """Where a trace comes from. ``source_digest`` is the torch checkpoint's, on both sides.

    ``weights_divergence`` is the first weight by which what was run differs from the source, None where none does;
    ``notes`` says so. ``weights_digest`` is None where no weights were read.
    ``steps_digest`` is that of the step files beside a trace that was recorded by itself.
    """

    stage: str
    framework: str
    version: str
    model: str
    weights_digest: str | None
    source_digest: str
    inputs_digest: str | None
    weights_divergence: str | None
    notes: tuple[str, ...] = ()
    steps_digest: str | None = None

    @property
    def side(self) -> dict[str, str | None]:
        """What a report says of this side."""
        return {name: getattr(self, name) for name in ("framework", "version", "weights_digest")}


@dataclass(frozen=True)
class Trace:
    """Arrays by name, in the order of execution."""

    provenance: Provenance
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def save(self, directory: Path, side: str | None = None) -> Path:
        """``<stage>_<side>.npy``, which ``ReprodDiffHelper.load_info`` opens, and a ``.provenance`` beside it.

        ``side`` is the framework unless both are of one.
        """
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"{self.provenance.stage}_{side or self.provenance.framework}"
        np.save(directory / f"{stem}.npy", dict(self.arrays), allow_pickle=True)
        (directory / f"{stem}.provenance").write_text(json.dumps(asdict(self.provenance), indent=1), "utf-8")
        return directory / f"{stem}.npy"


def load_trace(directory: Path, stage: str, side: str, advice: str) -> Trace:
    """What :meth:`Trace.save` wrote; :class:`BadInput` with ``advice`` when there is none, or it is damaged.

    The file is a pickle, as ``reprod_log`` writes it: only numpy arrays are taken from it, no code is run.
    """
    file = directory / f"{stage}_{side}.npy"
    if not file.is_file():
        raise BadInput(f"there is no {file.name} in {directory}. {advice}")
    try:
        told = json.loads(file.with_suffix(".provenance").read_text("utf-8"))
        provenance = Provenance(**(told | {"notes": tuple(told.get("notes", ()))}))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{file.with_suffix('.provenance').name} in {directory} does not say where {file.name} comes "
                       f"from ({error}). {advice}") from error
    return Trace(provenance, _read_npy(file))


def _read_npy(file: Path) -> Arrays:
    """The dictionary of arrays in an ``.npy`` file that ``ReprodLogger.save`` or :meth:`Trace.save` wrote."""
    try:
        with open(file, "rb") as handle:
            np.lib.format.read_magic(handle)
            np.lib.format.read_array_header_1_0(handle)
            content = _Described(handle).load()
        content = content.state[-1] if isinstance(content, _Array) else content
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
        return {str(name): described.array() for name, described in content.items()}
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged pickle makes its readers stumble over
        raise BadInput(f"{file} is not a trace ({type(error).__name__}: {error}). Record this side again.") from error


class _Described(pickle.Unpickler):
    """Arrays and scalars as descriptions, never as numpy's own objects, whose ``__setstate__`` a stranger could misuse.

    Any name beyond those of a plain array wants to run code, and is refused by that name.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = {"ndarray": _Array, "_reconstruct": lambda *_: _Array(), "dtype": _ArrayDtype, "scalar": _Array.scalar}
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in known:
            raise BadInput(f"the trace asks for {module}.{name}, which is no array. Nothing of it was run.")
        return known[name]


class _ArrayDtype:
    """A dtype by its code, as ``f4``."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|") or any(part is not None for part in state[2:5]):
            raise ValueError(f"dtype {self.code} is not a plain one")


class _Array:
    """(version, shape, dtype, column order, bytes), as an array's pickle has it."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    @classmethod
    def scalar(cls, dtype: _ArrayDtype, content: bytes) -> _Array:
        found = cls()
        found.state = (1, (), dtype, False, content)
        return found

    def array(self) -> np.ndarray:
        _, shape, dtype, across, content = self.state
        if dtype.code not in PLAIN or not isinstance(content, bytes):
            raise ValueError(f"an array of {dtype.code} is not one of numbers")
        return np.frombuffer(content, dtype.code).reshape(shape, order="F" if across else "C")


PLAIN = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class StepFiles:
    """What a trace alone does not hold, one ``.npz`` a step: inputs, views beside ``recorded``, noise floors."""

    def __init__(self, directory: Path, stage: str, side: str) -> None:
        self.directory = directory / f"{stage}_{side}.steps"
        self._growing = directory / f".{stage}_{side}.steps"

    def write(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass ``steps`` on, each after it has been written. Once all are, they replace those of an earlier recording;
        one that was broken off is not read.
        """
        shutil.rmtree(self._growing, ignore_errors=True)
        self._growing.mkdir(parents=True)
        for number, step in enumerate(steps):
            _write_step(step, self._growing / f"{number:05d}.npz")
            yield step
        self.remove()
        self._growing.rename(self.directory)

    def remove(self) -> None:
        """Leave nothing of an earlier recording, which would not go with the trace of a later one."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def digest(self) -> str:
        """xxh3-128 over names and bytes of all files, in order."""
        hasher = xxhash.xxh3_128()
        for file in sorted(self.directory.glob("*.npz")):
            hasher.update(file.name.encode())
            with file.open("rb") as handle:
                while part := handle.read(PART):
                    hasher.update(part)
        return hasher.hexdigest()

    def read(self, trace: Trace) -> Iterator[Step]:
        """The steps, with what they recorded taken from ``trace``; :class:`BadInput` when these are not all its own."""
        if trace.provenance.steps_digest != self.digest:
            raise BadInput(f"what is in {self.directory} was not recorded with {self.directory.stem}.npy, or not all "
                           "of it is there. Record this side again with --only.")
        left = dict(trace.arrays)
        for file in sorted(self.directory.glob("*.npz")):
            step = _read_step(file)
            step.views[RECORDED] = {name: left.pop(name) for name in step.told.pop("recorded") if name in left}
            yield step
        if left:
            yield Step({RECORDED: left})


FLOOR = ("oracle", "spread", "largest", "few", "base")
PART = 1 << 24


def _write_step(step: Step, file: Path) -> None:
    arrays = {f"view/{view}/{name}": array for view, found in step.views.items() if view != RECORDED
              for name, array in found.items()}
    for view, floors in step.floors.items():
        for name, floor in floors.items():
            arrays |= {f"floor/{view}/{name}/{part}": np.asarray(getattr(floor, part)) for part in FLOOR}
    told = np.frombuffer(json.dumps(step.told | {"recorded": list(step.recorded)}).encode(), np.uint8)
    np.savez(file, told=told, **arrays)


def _read_step(file: Path) -> Step:
    step = Step()
    with np.load(file, allow_pickle=False) as content:
        step.told = json.loads(content["told"].tobytes())
        floors: dict[tuple[str, str], dict[str, Any]] = {}
        for key in content.files:
            kind, _, rest = key.partition("/")
            view, _, name = rest.partition("/")
            if kind == "view":
                step.view(view)[name] = content[key]
            elif kind == "floor":
                name, _, part = name.rpartition("/")
                floors.setdefault((view, name), {})[part] = content[key]
    for (view, name), parts in floors.items():
        step.floors.setdefault(view, {})[name] = NoiseFloor(parts["oracle"], parts["spread"], *(
            _plain(parts.get(part, 0.0)) for part in FLOOR[2:]))
    return step


def _plain(value: np.ndarray | float) -> np.ndarray | float:
    """A number as a number."""
    return value if np.ndim(value) else float(value)


def require_comparable(reference: Provenance, candidate: Provenance, *, same_framework: bool = False) -> Provenance:
    """``candidate``, unless the pair would prove nothing: one framework twice, other inputs, another source or stage.

    ``same_framework`` lets the first of these pass, for those who compare two torch models; it is noted.
    """
    if reference.framework == candidate.framework:
        if not same_framework:
            raise BadInput(f"both traces come from {reference.framework}: comparing a model with itself proves "
                           "nothing. --allow-same-framework compares two models of one framework all the same.")
        candidate = replace(candidate, notes=(*candidate.notes, f"Both sides are {reference.framework}: this compares "
                            "two models of one framework (--allow-same-framework), and says nothing about another."))
    for told, left, right in (("stages", reference.stage, candidate.stage),
                              ("inputs", reference.inputs_digest, candidate.inputs_digest),
                              ("source checkpoints", reference.source_digest, candidate.source_digest)):
        if left != right:
            raise BadInput(f"the two traces come from different {told} ({left} and {right}).")
    return candidate


def write_reprod_diff(reference: Arrays, candidate: Arrays, file: Path) -> None:
    """The text of ``ReprodDiffHelper``, for those who know it. The verdict is not taken from it.

    Its printing function is called directly: ``report`` would add a handler to the root logger at each call.
    """
    from reprod_log import ReprodDiffHelper
    from reprod_log.utils import check_print_diff
    shared = [name for name in reference if name in candidate
              and reference[name].shape == candidate[name].shape and reference[name].size]
    helper = ReprodDiffHelper()
    helper.compare_info({name: reference[name] for name in shared},
                        {name: candidate[name] for name in shared})
    lines: list[str] = []
    passed = check_print_diff(helper.diff_dict, diff_method="mean", diff_threshold=REPROD_LOG_MEAN,
                              print_func=lines.append)
    lines.append(f"diff check {'passed' if passed else 'failed'}")
    file.write_text("\n".join(lines) + "\n", "utf-8")
