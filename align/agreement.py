"""Whether two sides' scores, predictions and metric values agree: first by fixed bounds, then by torch's own noise.

The fixed bounds hold for models that compute what they were trained for. A model of which torch itself is less sure
(random weights, a token's loss of 136) is beyond them on either side; there the yardstick is the noise floor, as in all
other stages: the same rows once in float64 and several times with all sums reordered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .compare import TensorResult, compare
from .decoding.greedy import TEXT
from .floor import Pooled, Quantity
from .noise import NoiseFloor
from .scores import SCORES, Arrays
from .tolerance import EXACT, FORWARD, LIMITS, METRIC, TOKEN_LOSS, margin_noise

EMBEDDINGS, TOKEN_NLL, SCORE, SCORE_TARGETS = "embeddings", "token_nll", "scores", "score_targets"
PERPLEXITY, SQUARED_ERROR = "perplexity", "mean_squared_error"
RELATIVE = (PERPLEXITY, SQUARED_ERROR)
BOUNDS = {EMBEDDINGS: FORWARD, TOKEN_NLL: TOKEN_LOSS, SCORE: FORWARD}
PREDICTIONS, MARGINS, LARGEST = ".predictions", ".margins", ".largest"
ALLOWED = LIMITS["propagated"]


@dataclass(frozen=True)
class Noise:
    """What torch's own runs differ by; of nothing measured, both are empty.

    ``floors`` are by the name of a figure. ``moved`` is, by kind of prediction, as ``token``, how far a margin may lie
    from torch's: float64, one for each prediction, of its shape.
    """

    floors: Mapping[str, NoiseFloor] = field(default_factory=dict)
    moved: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[Arrays]) -> Noise:
        """Of what one task's rows are reduced to: ``runs[0]`` in float64, ``runs[1]`` plain, others reordered."""
        reference, pooled = {name: runs[1][name] for name in runs[0]}, Pooled()
        for run in runs:
            pooled.add(_quantities({name: run[name] for name in reference}))
        floors = pooled.floors()
        if TOKEN_NLL in reference:
            floors[f"value.{PERPLEXITY}"] = _as_share(floors[f"value.{PERPLEXITY}"], reference[TOKEN_NLL])
        return cls(floors, {stem: _may_move(*moved_margins(runs, reference, stem)) for stem in _stems(reference)})


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
                         f"closer together than {_teller(noise)} can tell; they are taken as equal.")
    expected, found = (SCORES[task].values(arrays) for arrays in (reference, settled))
    for name, value in expected.items():
        pair = _shares(reference, settled) if name == PERPLEXITY else (np.array(value), np.array(found[name]))
        results.append(_judged(f"value.{name}", *pair, METRIC if name in RELATIVE else EXACT, noise))
    return results, notes


def may_be_rounding(results: Sequence[TensorResult]) -> bool:
    """Whether something fails, and all that does can be compared at all."""
    failing = [result for result in results if not result.passed]
    return bool(failing) and all(result.measures is not None for result in failing)


def is_doubtful(results: Sequence[TensorResult]) -> bool:
    """Whether all that has a floor and fails does so by little; what is counted or predicted goes with it."""
    return all(result.doubtful for result in results if not result.passed and not _is_counted(result.name))


def settle(stem: str, reference: Arrays, candidate: Arrays, moved: np.ndarray | float) -> tuple[np.ndarray, int]:
    """The candidate's predictions, with the reference's wherever the two best scores lie too close to be told apart;
    and how many these are. ``moved``: how far a margin may lie from torch's besides what rounding does to any.
    """
    expected, found = (side[f"{stem}{PREDICTIONS}"] for side in (reference, candidate))
    close = (expected != found) & _within_noise(stem, reference, candidate, moved)
    return np.where(close, expected, found), int(close.sum())


def moved_margins(runs: Sequence[Arrays], reference: Arrays, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """How far a margin lies from the reference's, the rms over all ``runs`` but the plain ``runs[1]`` at each place;
    and which places have a margin at all. Where a run gave no number, nothing is excused.
    """
    margins = reference[f"{stem}{MARGINS}"]
    live = np.isfinite(margins)
    apart = [np.where(live, run[f"{stem}{MARGINS}"], 0.0) - np.where(live, margins, 0.0)
             for run in (runs[0], *runs[2:])]
    places = np.sqrt(np.mean(np.square(apart, dtype=np.float64), axis=0))
    return np.where(np.isfinite(places), places, 0.0), live


def _may_move(places: np.ndarray, live: np.ndarray) -> np.ndarray:
    """As the test ``row`` of a noise floor: what torch's runs move here and, in quadrature, what they typically do."""
    typical = float(np.median(places[live])) if live.any() else 0.0
    return ALLOWED["row"] * np.hypot(places, typical)


def _within_noise(stem: str, reference: Arrays, candidate: Arrays, moved: np.ndarray | float) -> np.ndarray:
    """Whether the margins of two predictions that differ lie no further apart than they may: one is the other's gain.
    """
    apart = reference[f"{stem}{MARGINS}"] + candidate[f"{stem}{MARGINS}"]
    return apart <= moved + margin_noise(1.0) * reference[f"{stem}{LARGEST}"]


def _judged(name: str, expected: np.ndarray, found: np.ndarray, allowed: float, noise: Noise) -> TensorResult:
    """By the fixed bound, else by the floor; rows that torch is sure of are held to the fixed bound all the same."""
    fixed = compare(name, expected, found, allowed)
    if fixed.passed or fixed.measures is None or name not in noise.floors:
        return fixed
    floor = noise.floors[name]
    sure = compare(name, expected, _where_sure(floor, allowed, expected, found), allowed)
    return compare(name, expected, found, math.inf, floors={"propagated": floor}) if sure.passed else sure


def _where_sure(floor: NoiseFloor, allowed: float, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """``found`` in the rows where as much error as torch's noise may explain lies within the fixed bound; ``expected``
    in all others. A single number is never sure.
    """
    if not found.ndim:
        return expected
    rows = np.sqrt(np.mean(np.square(floor.spread, dtype=np.float64), axis=1))
    size = np.sqrt(np.mean(np.square(floor.oracle)))
    sure = ALLOWED["row"] * np.hypot(rows, np.median(rows)) <= allowed * size
    return np.where(sure.reshape(-1, *[1] * (found.ndim - 1)), found, expected)


def _shares(reference: Arrays, candidate: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Two perplexities as shares of the first. Those of random weights may be 1e200, or beyond any number."""
    expected, found = (side[TOKEN_NLL].astype(np.float64).mean() for side in (reference, candidate))
    return np.array(1.0), np.exp(found - expected)


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
    near = _within_noise(TEXT, reference, candidate, noise.moved.get(TEXT, 0.0))
    close = differs.any(axis=1) & near[rows, place]
    behind = close[:, None] & (np.arange(expected.shape[1]) >= place[:, None])
    settled = {name: np.where(behind, reference[name], candidate[name]) for name in names}
    return candidate | settled, [
        f"{int(close.sum())} of {len(close)} decoded texts part where the two best tokens lie closer together than "
        f"{_teller(noise)} can tell; they are taken as equal from there on."] if close.any() else []


def _quantities(run: Arrays) -> dict[str, Quantity]:
    """What has a floor, by the name of its figure; of a perplexity the mean loss."""
    found = {name: Quantity(array, base=1.0 if name == TOKEN_NLL else 0.0) for name, array in run.items()
             if name in BOUNDS or name.endswith(LARGEST)}
    if TOKEN_NLL in run:
        found[f"value.{PERPLEXITY}"] = _mean(run[TOKEN_NLL], base=1.0)
    if SCORE in run:
        found[f"value.{SQUARED_ERROR}"] = _mean(np.square(run[SCORE].astype(np.float64) - run[SCORE_TARGETS]))
    return found


def _mean(terms: np.ndarray, base: float = 0.0) -> Quantity:
    terms = terms.astype(np.float64)
    return Quantity(np.array(terms.mean()), terms / len(terms), base)


def _as_share(mean: NoiseFloor, losses: np.ndarray) -> NoiseFloor:
    """Of a perplexity as a share of that of ``losses``: what is an error of the mean loss is a relative one there."""
    share = np.exp(mean.oracle - losses.astype(np.float64).mean())
    return replace(mean, oracle=share, base=float(mean.oracle[0, 0]))


def _stems(arrays: Arrays) -> list[str]:
    return [name.removesuffix(PREDICTIONS) for name in arrays if name.endswith(PREDICTIONS)]


def _is_counted(name: str) -> bool:
    return name.endswith(PREDICTIONS) or (name.startswith("value.") and name.removeprefix("value.") not in RELATIVE)


def _teller(noise: Noise) -> str:
    return "torch's own runs" if noise.floors else "rounding"
