"""Named arrays that one side recorded at one stage, with their provenance; on disk as ``reprod_log`` keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from convert.errors import BadInput

from .tolerance import REPROD_LOG_MEAN


@dataclass(frozen=True)
class Provenance:
    """Where a trace comes from. ``source_digest`` is the torch checkpoint's, on both sides."""

    stage: str
    framework: str
    version: str
    model: str
    weights_digest: str
    source_digest: str
    inputs_digest: str


@dataclass(frozen=True)
class Trace:
    """Arrays by name, in the order of execution."""

    provenance: Provenance
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def save(self, directory: Path) -> None:
        """``<stage>_<framework>.npy``, which ``ReprodDiffHelper.load_info`` opens, and a ``.provenance`` beside it."""
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"{self.provenance.stage}_{self.provenance.framework}"
        np.save(directory / f"{stem}.npy", dict(self.arrays), allow_pickle=True)
        (directory / f"{stem}.provenance").write_text(json.dumps(asdict(self.provenance), indent=1), "utf-8")


def require_comparable(reference: Trace, candidate: Trace) -> None:
    """Refuse a pair that would prove nothing: one framework twice, other inputs, another source or stage."""
    one, other = reference.provenance, candidate.provenance
    if one.framework == other.framework:
        raise BadInput(f"both traces come from {one.framework}: comparing a model with itself proves nothing.")
    for told, left, right in (("stages", one.stage, other.stage), ("inputs", one.inputs_digest, other.inputs_digest),
                              ("source checkpoints", one.source_digest, other.source_digest)):
        if left != right:
            raise BadInput(f"the two traces come from different {told} ({left} and {right}).")


def write_reprod_diff(reference: Trace, candidate: Trace, file: Path) -> None:
    """The text of ``ReprodDiffHelper``, for those who know it. The verdict is not taken from it.

    Its printing function is called directly: ``report`` would add a handler to the root logger at each call.
    """
    from reprod_log import ReprodDiffHelper
    from reprod_log.utils import check_print_diff
    shared = [name for name in reference.arrays if name in candidate.arrays
              and reference.arrays[name].shape == candidate.arrays[name].shape and reference.arrays[name].size]
    helper = ReprodDiffHelper()
    helper.compare_info({name: reference.arrays[name] for name in shared},
                        {name: candidate.arrays[name] for name in shared})
    lines: list[str] = []
    passed = check_print_diff(helper.diff_dict, diff_method="mean", diff_threshold=REPROD_LOG_MEAN,
                              print_func=lines.append)
    lines.append(f"diff check {'passed' if passed else 'failed'}")
    file.write_text("\n".join(lines) + "\n", "utf-8")
