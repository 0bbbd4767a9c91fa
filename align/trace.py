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

    ``weights_divergence`` is the first weight by which what was run differs from the source, and ``notes`` says so.
    """

    stage: str
    framework: str
    version: str
    model: str
    weights_digest: str
    source_digest: str
    inputs_digest: str | None
    weights_divergence: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def side(self) -> dict[str, str]:
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
            np.lib.format.read_array_header_1_0(handle) if np.lib.format.read_magic(handle) == (1, 0) else None
            content = _ArraysOnly(handle).load()
        arrays = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
        return {str(name): np.asarray(array) for name, array in arrays.items()}
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged pickle makes its readers stumble over
        raise BadInput(f"{file} is not a trace ({type(error).__name__}: {error}). Record this side again.") from error


class _ArraysOnly(pickle.Unpickler):
    """Numpy arrays, scalars and dtypes; any other name wants to run code, and is refused by that name."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "dtype":
                return lambda code, *_: np.dtype(str(code), copy=True)
            if name in ("ndarray", "scalar"):
                return np.ndarray if name == "ndarray" else np.core.multiarray.scalar
            if name == "_reconstruct":
                return np.core.multiarray._reconstruct
        raise BadInput(f"the trace asks for {module}.{name}, which is no array. Nothing of it was run.")


class StepFiles:
    """What a trace alone does not hold, one ``.npz`` a step: inputs, views beside ``recorded``, noise floors."""

    def __init__(self, directory: Path, stage: str, side: str) -> None:
        self.directory = directory / f"{stage}_{side}.steps"

    def write(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass ``steps`` on, each after it has been written; what an earlier recording left is removed first."""
        self.remove()
        self.directory.mkdir(parents=True, exist_ok=True)
        for number, step in enumerate(steps):
            arrays = {f"view/{view}/{name}": array for view, found in step.views.items() if view != RECORDED
                      for name, array in found.items()}
            for view, floors in step.floors.items():
                for name, floor in floors.items():
                    arrays |= {f"floor/{view}/{name}/{part}": np.asarray(getattr(floor, part)) for part in FLOOR}
            told = np.frombuffer(json.dumps(step.told | {"recorded": list(step.recorded)}).encode(), np.uint8)
            np.savez(self.directory / f"{number:05d}.npz", told=told, **arrays)
            yield step

    def remove(self) -> None:
        """Leave nothing of an earlier recording, which would not go with the trace of a later one."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def read(self, trace: Trace) -> Iterator[Step]:
        """The steps, with what they recorded taken from ``trace``; one step without floors where there are no files."""
        left = dict(trace.arrays)
        for file in sorted(self.directory.glob("*.npz")):
            step = _read_step(file)
            step.views[RECORDED] = {name: left.pop(name) for name in step.told.pop("recorded") if name in left}
            yield step
        if left:
            yield Step({RECORDED: left})


FLOOR = ("oracle", "spread", "largest", "few")


def _read_step(file: Path) -> Step:
    step = Step()
    try:
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
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{file} cannot be read ({error}). Record this side again.") from error
    for (view, name), parts in floors.items():
        step.floors.setdefault(view, {})[name] = NoiseFloor(parts["oracle"], parts["spread"], float(parts["largest"]),
                                                               float(parts["few"]))
    return step


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
