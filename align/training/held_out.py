"""The natural metric of a head on rows held out: what a trained side makes of them, and how two are compared.

After a training nothing is equal any more, not even between two runs of torch. So a prediction counts as another one
only where its margin exceeds what torch's own runs move margins by, and a metric may differ by :data:`METRIC_AFTER`, or
by as much as torch's own runs differ from each other where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.errors import BadInput

from ..agreement import PREDICTIONS, RELATIVE, moved_margins, settle
from ..compare import Measures, TensorResult
from ..evaluation import joined
from ..runs import Run
from ..scores import SCORES, Arrays, perplexity
from ..side import Side
from ..texts import Example
from ..tolerance import METRIC_AFTER, MOVED_MARGINS
from .lessons import held_out_batches

SUFFIX = " (held out)"


def scored(side: Side, examples: Sequence[Example], run: Run, rows: int) -> Arrays:
    """Scores, predictions and their margins, in eval mode."""
    score = SCORES[run.head.task]
    reduced = [score.reduce(side.outputs(inputs.arrays), inputs, some)
               for inputs, some in held_out_batches(examples, run, rows)]
    return joined(reduced)


def values_of(task: str, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metric's values; of a translation those that need no decoding."""
    if task == "translation":
        right = arrays["token.predictions"] == arrays["token.targets"]
        return {"perplexity": perplexity(arrays["token_nll"]), "next_token_accuracy": float(right.mean())}
    return SCORES[task].values(dict(arrays))


def require_finite(task: str, arrays: Mapping[str, np.ndarray]) -> None:
    """:class:`BadInput` where a value of a run of torch's own is no number."""
    bad = next((name for name, value in values_of(task, arrays).items() if not math.isfinite(value)), None)
    if bad is not None:
        raise BadInput(f"the {bad} of torch's own trained net is no finite number, so there is nothing to compare "
                       "with. Give a smaller --lr, or fewer --steps.")


def compared(task: str, runs: Sequence[Arrays], candidate: Arrays) -> tuple[list[TensorResult], list[str]]:
    """The candidate's values against those of ``runs[1]``, torch's plain run; ``runs[0]`` is torch in float64."""
    reference = runs[1]
    settled, notes = _settled(runs, candidate)
    expected, found = values_of(task, reference), values_of(task, settled)
    own = [values_of(task, run) for run in runs]
    results = []
    for name, value in expected.items():
        size = abs(value) if name in RELATIVE else 1.0
        band = max(abs(run[name] - value) for run in own)
        allowed = max(METRIC_AFTER * size, band)
        if band > METRIC_AFTER * size:
            notes.append(f"{name}: torch's own runs end {band / size:.1e} apart, more than the {METRIC_AFTER} that are "
                         "asked for: this training is too chaotic to be judged so closely, and only a difference "
                         "beyond that is a failure. Fewer --steps or a smaller --lr judge more closely.")
        results.append(_judged(name, value, found[name], allowed))
    return results, notes


def _settled(runs: Sequence[Arrays], candidate: Arrays) -> tuple[Arrays, list[str]]:
    """The candidate's predictions, with torch's where the two best scores lie closer than torch's runs move them."""
    reference, settled, notes = runs[1], dict(candidate), []
    for name in [name for name in reference if name.endswith(PREDICTIONS)]:
        stem = name.removesuffix(PREDICTIONS)
        settled[name], close = settle(stem, reference, candidate, _may_move(runs, stem))
        if close:
            notes.append(f"{close} of {reference[name].size} {stem} predictions differ where the two best scores lie "
                         "closer together than torch's own runs move them; they are taken as equal.")
    return settled, notes


def _may_move(runs: Sequence[Arrays], stem: str) -> float:
    """A training moves all margins: what its runs move them by (rms) is one figure for all places."""
    places, live = moved_margins(runs, runs[1], stem)
    return MOVED_MARGINS * float(np.sqrt(np.mean(np.square(places[live])))) if live.any() else 0.0


def _judged(name: str, expected: float, found: float, allowed: float) -> TensorResult:
    difference, size = abs(found - expected), abs(expected) or 1.0
    passed = difference <= allowed
    measures = Measures(difference, difference, difference / size, 1.0, (), (expected, found))
    told = None if passed else (f"{name}{SUFFIX}: {found:.6g} instead of {expected:.6g}, off by {difference:.2g}, "
                                f"allowed {allowed:.2g}")
    return TensorResult(f"{name}{SUFFIX}", (), "float64", allowed / size, passed, measures, failure=told)


def packed(runs: Sequence[Arrays]) -> dict[str, np.ndarray]:
    return {f"{number}/{name}": array for number, run in enumerate(runs) for name, array in run.items()}


def unpacked(view: Mapping[str, np.ndarray]) -> list[Arrays]:
    found: dict[int, dict[str, Any]] = {}
    for name, array in view.items():
        number, _, name = name.partition("/")
        found.setdefault(int(number), {})[name] = array
    return [found[number] for number in sorted(found)]
