"""Whether two sides' scores, predictions and metric values agree: first by fixed bounds, then by torch's own noise.

The fixed bounds hold for models that compute what they were trained for. A model of which torch itself is less sure
(random weights, a token's loss of 136) is beyond them on either side; there the yardstick is the noise floor, as in all
other stages: the same rows once in float64 and several times with all sums reordered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .compare import TensorResult, compare
from .decoding.greedy import TEXT
from .noise import NoiseFloor, Pool
from .scores import SCORES, Arrays
from .tolerance import EXACT, FORWARD, METRIC, MOVED_MARGINS, TOKEN_LOSS, margin_noise

EMBEDDINGS, TOKEN_NLL, SCORE = "embeddings", "token_nll", "scores"
PERPLEXITY, SQUARED_ERROR = "perplexity", "mean_squared_error"
RELATIVE = (PERPLEXITY, SQUARED_ERROR)
BOUNDS = {EMBEDDINGS: FORWARD, TOKEN_NLL: TOKEN_LOSS, SCORE: FORWARD}
PREDICTIONS, MARGINS, LARGEST = ".predictions", ".margins", ".largest"
LOG = " (log)"


@dataclass(frozen=True)
class Noise:
    """What torch's own runs differ by: noise floors by the name of a figure, and by kind of prediction, as ``token``,
    how far they move each margin: there (rms over runs) and, in quadrature, anywhere, so that no place is judged by the
    luck of few runs. Of nothing measured, both are empty.
    """

    floors: Mapping[str, NoiseFloor] = field(default_factory=dict)
    moved: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[Arrays]) -> Noise:
        """``runs[0]`` is in float64, ``runs[1]`` plain, all others with their sums reordered."""
        reference = {name: runs[1][name] for name in runs[0]}
        floors = {name: _pooled([run[name] for run in runs], base=1.0 if name == TOKEN_NLL else 0.0)
                  for name in reference if name in BOUNDS or name.endswith(LARGEST)}
        if TOKEN_NLL in reference:
            floors[f"value.{PERPLEXITY}{LOG}"] = _of_mean([run[TOKEN_NLL] for run in runs], base=1.0)
        if SCORE in reference:
            floors[f"value.{SQUARED_ERROR}"] = _of_mean(
                [np.square(run[SCORE].astype(np.float64) - run["score_targets"]) for run in runs])
        apart = {stem: moved_margins(runs, runs[1], stem) for stem in _stems(reference)}
        return cls(floors, {stem: np.hypot(places, rms(places)) for stem, places in apart.items()})


def compare_scores(task: str, reference: Arrays, candidate: Arrays, noise: Noise | None = None,
                   ) -> tuple[list[TensorResult], list[str]]:
    """Continuous scores within their bounds, predictions equal wherever the margin exceeds the noise, values equal.

    What lies beyond a fixed bound is held against its floor in ``noise``. Where predictions differ inside the noise,
    values are compared with these predictions taken as equal, and the number of such places is told.
    """
    noise = noise or Noise()
    settled, notes = _parted(reference, candidate, noise)
    results = [_judged(name, reference[name], candidate[name], allowed, noise) for name, allowed in BOUNDS.items()
               if name in reference]
    for stem in _stems(reference):
        name, largest = f"{stem}{PREDICTIONS}", f"{stem}{LARGEST}"
        results.append(_judged(largest, reference[largest], settled[largest], FORWARD, noise))
        settled[name], close = settle(stem, reference, settled, noise.moved.get(stem, 0.0))
        results.append(compare(name, reference[name], settled[name], EXACT))
        if close:
            notes.append(f"{close} of {reference[name].size} {stem} predictions differ where the two best scores lie "
                         f"closer together than {'torch tells them' if noise.floors else 'rounding can tell'}; they "
                         "are taken as equal.")
    expected, found = (SCORES[task].values(arrays) for arrays in (reference, settled))
    results += [_judged_value(name, value, found[name], noise) for name, value in expected.items()]
    return results, notes


def may_be_rounding(results: Sequence[TensorResult]) -> bool:
    """Whether something fails, and all that does can be compared at all."""
    failing = [result for result in results if not result.passed]
    return bool(failing) and all(result.measures is not None for result in failing)


def settle(stem: str, reference: Arrays, candidate: Arrays, moved: np.ndarray | float) -> tuple[np.ndarray, int]:
    """The candidate's predictions, with the reference's wherever the two best scores lie too close to be told apart;
    and how many these are. ``moved``: how far torch's own runs move margins, everywhere or at each place; 0 where that
    was not measured.
    """
    expected, found = reference[f"{stem}{PREDICTIONS}"], candidate[f"{stem}{PREDICTIONS}"]
    close = (expected != found) & _within_noise(stem, reference, moved)
    return np.where(close, expected, found), int(close.sum())


def moved_margins(runs: Sequence[Arrays], reference: Arrays, stem: str) -> np.ndarray:
    """At each place the rms, over all ``runs`` but ``reference``, of how far the margin lies from the reference's."""
    margins = reference[f"{stem}{MARGINS}"]
    apart = [np.where(np.isfinite(margins), run[f"{stem}{MARGINS}"] - margins, 0.0) for run in runs
             if run is not reference]
    return np.sqrt(np.mean(np.square(apart), axis=0))


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def _within_noise(stem: str, reference: Arrays, moved: np.ndarray | float) -> np.ndarray:
    allowed = MOVED_MARGINS * moved + margin_noise(1.0) * reference[f"{stem}{LARGEST}"]
    return reference[f"{stem}{MARGINS}"] <= allowed


def _judged(name: str, expected: np.ndarray, found: np.ndarray, allowed: float, noise: Noise) -> TensorResult:
    fixed = compare(name, expected, found, allowed)
    if fixed.passed or fixed.measures is None or name not in noise.floors:
        return fixed
    return compare(name, expected, found, math.inf, floors={"propagated": noise.floors[name]})


def _judged_value(name: str, expected: float, found: float, noise: Noise) -> TensorResult:
    """Of a perplexity the logarithm has a floor: that of random weights may be 1e200, whose square is no number."""
    fixed = _judged(f"value.{name}", np.array(expected), np.array(found), METRIC if name in RELATIVE else EXACT, noise)
    if fixed.passed or fixed.measures is None or f"{fixed.name}{LOG}" not in noise.floors:
        return fixed
    return _judged(f"{fixed.name}{LOG}", np.log(expected), np.log(found), EXACT, noise)


def _parted(reference: Arrays, candidate: Arrays, noise: Noise) -> tuple[Arrays, list[str]]:
    """The candidate's arrays with each text that parts within the noise taken as the reference's from there on.

    What a decoder chooses depends on all that it chose before, so that behind such a place nothing can be compared.
    """
    names = [f"{TEXT}{kind}" for kind in (PREDICTIONS, MARGINS, LARGEST)]
    if not reference.keys() >= set(names):
        return dict(candidate), []
    expected = reference[names[0]]
    differs = expected != candidate[names[0]]
    place = differs.argmax(axis=1)
    rows = np.arange(len(place))
    near = _within_noise(TEXT, reference, noise.moved.get(TEXT, 0.0))
    close = differs.any(axis=1) & near[rows, place]
    behind = close[:, None] & (np.arange(expected.shape[1]) >= place[:, None])
    settled = {name: np.where(behind, reference[name], candidate[name]) for name in names}
    return candidate | settled, [
        f"{int(close.sum())} of {len(close)} decoded texts part where the two best tokens lie closer together than "
        "rounding can tell; they are taken as equal from there on."] if close.any() else []


def _pooled(runs: Sequence[np.ndarray], base: float = 0.0) -> NoiseFloor:
    pool = Pool(runs[0], base)
    for run in runs[1:]:
        pool.add(run)
    return pool.floor()


def _of_mean(runs: Sequence[np.ndarray], base: float = 0.0) -> NoiseFloor:
    """Of the mean over a vector [n], whose elements are its terms (see :meth:`NoiseFloor.of_sum`)."""
    runs = [run.astype(np.float64) for run in runs]
    return _pooled([run.mean() for run in runs], base).of_sum(_pooled([run / len(run) for run in runs]))


def _stems(arrays: Arrays) -> list[str]:
    return [name.removesuffix(PREDICTIONS) for name in arrays if name.endswith(PREDICTIONS)]
