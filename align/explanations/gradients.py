"""Why gradients are not torch's: what known mistakes of training make of torch's own gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..diagnose import Explanation
from ..gradients.batches import Settings
from ..tolerance import FORWARD

Arrays = Mapping[str, np.ndarray]


def explained(failing: Sequence[str], expected: Arrays, given: Arrays, ties: Mapping[str, str], apart: Arrays,
              settings: Settings) -> Explanation | None:
    """The mistake that turns torch's gradients into the candidate's, if one does.

    ``ties`` are the candidate's names of parameters that should be another one; ``apart`` is what torch's gradients of
    iteration 1 are where each micro-batch is clipped by itself.
    """
    return _untied(expected, given, ties) or _clipped(failing, expected, given, apart) or _averaged(
        failing, expected, given, settings)


def _untied(expected: Arrays, given: Arrays, ties: Mapping[str, str]) -> Explanation | None:
    for name, equal in ties.items():
        if name in given and equal in given and given[name].shape == given[equal].shape and equal in expected:
            before, after = (_error(expected[equal], array) for array in (given[equal], given[equal] + given[name]))
            if after <= FORWARD < before:
                subject, own = equal.partition(" ")[0], name.partition(" ")[0]
                return Explanation("untied-weight", subject, f"{subject} and {own} are one parameter in torch, whose "
                                   "gradient is the sum over both uses, and two in this net: with the two summed, the "
                                   f"error of {subject} falls from {before:.1e} to {after:.1e}.", before, after)
    return None


def _clipped(failing: Sequence[str], expected: Arrays, given: Arrays, apart: Arrays) -> Explanation | None:
    return _whole("clipped-before-accumulation", failing, expected, given, apart,
                  "each micro-batch is clipped by itself before the gradients are added up")


def _averaged(failing: Sequence[str], expected: Arrays, given: Arrays, settings: Settings) -> Explanation | None:
    """Micro-batches that are added up without dividing their losses by their number, or divided once more."""
    many = settings.accumulate
    for factor, told in ((many, f"the losses of {many} micro-batches are added up without dividing them by {many}"),
                         (1 / many, f"the gradients of {many} micro-batches are divided by {many} twice")):
        supposed = {name: array * factor for name, array in expected.items() if name.endswith("(iteration 1)")}
        found = _whole("accumulation", failing, expected, given, supposed, told) if many > 1 else None
        if found:
            return found
    return None


def _whole(kind: str, failing: Sequence[str], expected: Arrays, given: Arrays, supposed: Arrays, told: str,
           ) -> Explanation | None:
    """``told``, where ``supposed`` is the candidate's in all that fails of iteration 1, and nothing fails by itself."""
    wrong = [name for name in failing if name in supposed and name in given and name in expected]
    if not wrong or any(name.endswith("(isolated)") for name in failing):
        return None
    norm = {each: np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)) for each, arrays in (
        ("before", [given[name] - expected[name] for name in wrong]),
        ("after", [given[name] - supposed[name] for name in wrong]), ("size", [expected[name] for name in wrong]))}
    before, after = norm["before"] / norm["size"], norm["after"] / norm["size"]
    if not after <= FORWARD < before:
        return None
    return Explanation(kind, wrong[0].partition(" ")[0], f"{told}: with that done to torch's own gradients, the error "
                       f"of all of them falls from {before:.1e} to {after:.1e}.", float(before), float(after))


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / norm) if norm else float("inf")
