"""Learning rates against torch's: each by itself and relatively, so that the smallest is judged as the largest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..compare import TensorResult, measure, missing
from ..tolerance import RATE, RATE_UNIT


def judged_rates(name: str, expected: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> TensorResult:
    """The rates [updates] by ``name`` on either side."""
    if name not in given:
        return missing(name, "candidate")
    ours, theirs = given[name], expected[name]
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return TensorResult(name, theirs.shape, str(theirs.dtype), RATE, False, failure=f"{name}: not a rate for each "
                            "update")
    allowed = np.maximum(RATE * np.abs(theirs), RATE_UNIT * np.abs(theirs).max(initial=0.0))
    wrong = np.flatnonzero(np.abs(ours - theirs) > allowed)
    failure = None if not wrong.size else (
        f"{name}: {wrong.size} of {ours.size} rates differ by more than {RATE:g}; first at update {wrong[0] + 1}: "
        f"{ours[wrong[0]]:.9g} instead of {theirs[wrong[0]]:.9g}")
    return TensorResult(name, theirs.shape, str(theirs.dtype), RATE, not wrong.size, measure(theirs, ours), None,
                        failure)
