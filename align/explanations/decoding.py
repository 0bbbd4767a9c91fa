"""Why two continuations part: known mistakes of decoding, tried on torch's own logits, and of feeding, tried on torch.

A mistake is believed where it parts from torch in the very rows in which the candidate does, at the same step, with the
same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.errors import BadInput

from ..decoding.continuations import CACHED, Case, partings, place_of_beams
from ..decoding.feeding import PLACES, Cached, Feed, Start, places
from ..decoding.margins import Replay
from ..decoding.search import (
    Beams,
    Strategy,
    Written,
    best_of,
    drawn,
    gumbel,
    most_probable,
    normalised,
    stacked,
    warmed,
    without_early_end,
    write,
)
from ..diagnose import Explanation

if TYPE_CHECKING:
    from ..stage import Session
    from ..trace import Step

Parting = tuple[int, int | None]
"""A step, and the token that is taken there, None for any but torch's; of beams a digest of the text instead."""
NOWHERE = (-1, None)
OR = "; or, which these texts do not tell apart: "
Supposed = list[tuple[str, dict[str, list[Any]]]]


def mistakes_of(found: Any, start: Start, strategy: Strategy) -> Supposed:
    """By what would be said of it, where each known mistake of decoding parts from torch, by row."""
    tried = _of_beams(found, start, strategy) if strategy.beams > 1 else _of_steps(found, strategy)
    return [(told, {str(row): list(parting) for row, parting in where.items()}) for told, where in tried if where]


def explained(session: Session, step: Step, cases: Sequence[Case]) -> Explanation | None:
    """The mistakes that fit the first case that fails, else what the pattern of all cases says."""
    failing = [case for case in cases if partings(case)]
    if not failing:
        return None
    case = failing[0]
    loop = any(place is not None for place in step.told["loop"].get(case.name, []))
    fitting = [told for told, where in step.told["mistakes"].get(case.name, [])
               if _fits(case, {int(row): tuple(parting) for row, parting in where.items()})]
    if fitting and not _fails_with_cache_alone(case, cases):
        return _said(case, f"{OR.join(fitting)}: done to torch's own logits, that gives the same first difference in "
                     f"all of {case.name}'s rows that part ({len(_seen(case))} of {len(case.rows)})")
    if loop:
        return _said(case, "the loop itself goes another way than transformers' on torch's own logits, so the net is "
                     "not to blame; no known mistake of decoding does the same")
    return _of_feeding(session, step, failing) or _by_pattern(cases, failing)


def _fails_with_cache_alone(case: Case, cases: Sequence[Case]) -> bool:
    """Whether the same loop without the cache goes right, so that it is not to blame."""
    return CACHED in case.name and any(
        other.name == case.name.replace(CACHED, "") and not partings(other) for other in cases)


def _said(case: Case, told: str) -> Explanation:
    before = len(partings(case)) / max(1, len(case.rows))
    return Explanation("decoding", case.name.partition(" ")[0], f"{told}.", before, 0.0)


def _fits(case: Case, where: Mapping[int, Parting]) -> bool:
    """Every row whose text parts is foretold, and every row that is foretold parts."""
    parted, seen = {row.number for row in case.rows if row.place is not None}, _seen(case)
    return bool(seen) and set(where) <= parted and all(
        row in where and _is_same(where[row], parting) for row, parting in seen.items())


def _is_same(supposed: Parting, seen: Parting) -> bool:
    return supposed[0] == seen[0] and supposed[1] in (None, seen[1])


def _seen(case: Case) -> Mapping[int, Parting]:
    """The partings of a case as mistakes foretell them."""
    found = dict(partings(case))
    if case.states is None:
        return found
    left, right = case.states
    return {row: _parting_of_beams(left[:, row], right[:, row], case.reference[row], case.candidate[row])
            for row in found}


def _parting_of_beams(theirs: np.ndarray, ours: np.ndarray, chosen: np.ndarray, taken: np.ndarray) -> Parting:
    """Where a search parts from torch's, and a digest of what it has under way there, or chooses at the end; no step
    where it does not.
    """
    place = place_of_beams(theirs, ours, chosen, taken)
    if place is None:
        return NOWHERE
    return place, _digest(taken[None] if place == len(taken) else np.unique(ours[place + 1], axis=0))


def _digest(texts: np.ndarray) -> int:
    import xxhash
    return xxhash.xxh3_64(np.ascontiguousarray(texts, np.int64).tobytes()).intdigest() >> 12


# Of decoding ----------------------------------------------------------------------------------------------------------

Scores = Callable[[np.ndarray, int], np.ndarray]


def _of_steps(found: Any, strategy: Strategy) -> Iterator[tuple[str, dict[int, Parting]]]:
    for told, scores in _wrong_scores(strategy):
        where: dict[int, Parting] = {}
        for row, step in _open_steps(found, strategy):
            if row not in where:
                logits = found.logits[step].astype(np.float64)
                token = int(scores(logits, step)[row].argmax())
                if token != found.tokens[row, step]:
                    where[row] = (step, token)
        yield told, where
    yield "a text goes on behind its end", _going_on(found, strategy)


def _open_steps(found: Any, strategy: Strategy) -> Iterator[tuple[int, int]]:
    """(row, step) of everything that torch took, up to the end of each text."""
    for row, tokens in enumerate(found.tokens):
        ends = np.flatnonzero(np.isin(tokens, strategy.ends))
        yield from ((row, step) for step in range(min(len(found.logits), (ends[0] + 1) if len(ends) else len(tokens))))


def _going_on(found: Any, strategy: Strategy) -> dict[int, Parting]:
    where: dict[int, Parting] = {}
    for row, tokens in enumerate(found.tokens):
        ends = np.flatnonzero(np.isin(tokens, strategy.ends))
        step = int(ends[0]) + 1 if len(ends) else len(tokens)
        if step < len(tokens):
            known = step < len(found.logits)
            token = int(drawn(found.logits[step].astype(np.float64), strategy, step)[row].argmax()) if known else None
            if token != strategy.pad:
                where[row] = (step, token)
    return where


def _wrong_scores(strategy: Strategy) -> Iterator[tuple[str, Scores]]:
    """What the largest is taken of, where a known mistake is made."""
    def with_noise(warped: Callable[[np.ndarray], np.ndarray]) -> Scores:
        def scores(logits: np.ndarray, step: int) -> np.ndarray:
            found = warped(without_early_end(logits, strategy, step))
            return found + np.stack([gumbel(strategy.seed, row, step, logits.shape[-1]) for row in range(len(logits))])
        return scores
    if strategy.least and strategy.ends:
        late = replace(strategy, least=0)
        yield "a text may end before its least length", lambda logits, step: drawn(logits, late, step)
    if strategy.temperature is None:
        return
    yield "the noise is left out, and the best token taken", lambda logits, step: without_early_end(
        logits, strategy, step)
    cut, heat = partial(_cut, strategy=strategy), partial(warmed, temperature=strategy.temperature)
    if strategy.temperature != 1:
        yield "logits are multiplied by the temperature instead of divided by it", with_noise(
            lambda logits: cut(warmed(logits, 1 / strategy.temperature)))
        yield "the temperature is left out", with_noise(cut)
    if strategy.top_k is not None:
        for told, count in (("many", strategy.top_k + 1), ("few", strategy.top_k - 1)):
            if count:
                yield f"one token too {told} is drawn from (top-k)", with_noise(
                    lambda logits, count=count: best_of(heat(logits), count))
    if strategy.top_p is not None:
        for told, more in (("one token too many is drawn from (top-p)", 1),
                           ("the token that reaches top-p is left out", -1)):
            yield told, with_noise(lambda logits, more=more: _probable_and(
                heat(logits), strategy.top_p, more))
    if strategy.top_k is not None or strategy.top_p is not None:
        yield "all tokens are drawn from, not some of them", with_noise(heat)


def _cut(logits: np.ndarray, strategy: Strategy) -> np.ndarray:
    logits = logits if strategy.top_k is None else best_of(logits, strategy.top_k)
    return logits if strategy.top_p is None else most_probable(logits, strategy.top_p)


def _probable_and(logits: np.ndarray, share: float, more: int) -> np.ndarray:
    """The most probable tokens and ``more`` of the next ones, at least one."""
    counts = np.isfinite(most_probable(logits, share)).sum(-1) + more
    return np.stack([best_of(row, max(1, int(count))) for row, count in zip(logits, counts, strict=True)])


class _WithPrompt(Beams):
    """Lengths are those of the texts with what they continue, ``begun`` tokens."""

    begun = 0

    def normal(self, scores: np.ndarray, length: int) -> np.ndarray:
        return normalised(scores, length + self.begun, self.strategy.length_penalty)


def _of_beams(found: Any, start: Start, strategy: Strategy) -> Iterator[tuple[str, dict[int, Parting]]]:
    other, beams = partial(replace, strategy), len(start.ids)
    tried = [(f"scores are divided by the length to the power {power:g} instead of {strategy.length_penalty:g}",
              Beams(beams, other(length_penalty=power)))
             for power in (0.0, 1.0, 2.0, -strategy.length_penalty) if power != strategy.length_penalty]
    with_prompt = _WithPrompt(beams, strategy)
    with_prompt.begun = start.ids.shape[1]
    tried += [("lengths are counted with the prompt", with_prompt),
              ("texts do not end", Beams(beams, other(ends=()))),
              ("the search ends another way (early stopping)", Beams(beams, other(
                  early_stopping=strategy.early_stopping is not True)))]
    for told, search in tried:
        written = write(Replay(found, strategy), start.ids, start.mask, search.strategy, beams=search)
        theirs, ours = stacked(Replay(found, strategy).states, strategy), stacked(written.states, strategy)
        yield told, _partings_of_beams(theirs, ours, found.tokens, written.tokens)


def _partings_of_beams(theirs: np.ndarray, ours: np.ndarray, chosen: np.ndarray, taken: np.ndarray,
                       ) -> dict[int, Parting]:
    """By row, of states [steps, rows, beams, tokens] and texts [rows, tokens]."""
    found = {row: _parting_of_beams(theirs[:, row], ours[:, row], chosen[row], taken[row])
             for row in range(len(chosen))}
    return {row: parting for row, parting in found.items() if parting != NOWHERE}


# Of feeding -----------------------------------------------------------------------------------------------------------

@dataclass
class _Misfed(Cached):
    """Torch, given something else. ``wrong`` changes the arguments of a step, and is told whether it is a later one."""

    wrong: Callable[[dict[str, np.ndarray], bool], dict[str, np.ndarray]] = lambda given, later: given
    shift: int = 0
    ordered: bool = True
    cached: bool = True

    def given(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        later = bool(self.kept)
        if later and self.shift:
            self.kept = self.side.shifted(self.kept, self.shift)
        return self.wrong(super().given(ids, mask), later)

    def next(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if self.cached:
            return super().next(ids, mask)
        later = ids.shape[1] > self.feed.start.ids.shape[1]
        return self.side.side.outputs(self.wrong(self.feed.whole(ids, mask), later))["logits"][:, -1]

    def select(self, rows: np.ndarray) -> None:
        if self.cached and self.ordered:
            super().select(rows)


def _of_feeding(session: Session, step: Step, failing: Sequence[Case]) -> Explanation | None:
    """The mistakes of feeding that torch itself, made to make them, answers with the candidate's tokens."""
    if session.options.compare or (session.run.family.remote_code and not session.options.trust_remote_code):
        return None
    from ..decoding.torch_side import TorchKeeping
    case = failing[0]
    start, side = Start.of(step.view("start")), session.reference
    feed = Feed(session.run, frozenset(step.told["takes"]), start)
    cached, fitting = CACHED in case.name, []
    for told, changes in _misfeedings(feed, cached, case.strategy):
        net = _Misfed(TorchKeeping(side), feed, cached=cached, **changes)
        kept: dict[str, Any] = {}
        try:
            side.sweep([lambda net=net, kept=kept: kept.update(found=write(net, start.ids, start.mask, case.strategy))])
        except BadInput:  # what torch itself cannot be given was not given to the candidate either
            continue
        rows = _supposed(case, kept["found"])
        if rows and _fits(case, rows):
            fitting.append(told)
    return _said(case, f"{OR.join(fitting)}: torch, fed so, gives the same first difference in all of {case.name}'s "
                 f"rows that part ({len(_seen(case))} of {len(case.rows)})") if fitting else None


def _supposed(case: Case, written: Written) -> dict[int, Parting]:
    """Where what was ``written`` parts from torch's."""
    if case.states is not None:
        ours = stacked(written.states, case.strategy)
        return _partings_of_beams(case.states[0], ours, case.reference, written.tokens)
    differs = written.tokens != case.reference
    return {int(row): (int(differs[row].argmax()), int(written.tokens[row, differs[row].argmax()]))
            for row in np.flatnonzero(differs.any(1))}


def _misfeedings(feed: Feed, cached: bool, strategy: Strategy) -> Iterator[tuple[str, dict[str, Any]]]:
    def by(change: Callable[[dict[str, np.ndarray], bool], dict[str, np.ndarray]]) -> dict[str, Any]:
        return {"wrong": lambda given, later: {**given, **change(given, later)}}

    def ones(given: dict[str, np.ndarray], later: bool) -> dict[str, np.ndarray]:
        mask = given["attention_mask"]
        return {"attention_mask": np.zeros_like(mask) if mask.dtype == bool and later else np.ones_like(mask)} if (
            mask.ndim == 2 or later) else {}

    def counted(given: dict[str, np.ndarray], later: bool) -> dict[str, np.ndarray]:
        if given[PLACES].ndim > 2:
            return {}
        width = given["attention_mask"].shape[1]
        return {PLACES: places(np.ones((len(given[PLACES]), width), np.int64))[:, -given[PLACES].shape[1]:]}

    def further(found: np.ndarray, off: int) -> np.ndarray:
        """Of all tokens of a text those behind its start; one alone is such a one."""
        length = found.shape[-1]
        return found + off * ((np.arange(length) >= feed.start.ids.shape[1]) | (length == 1))
    padded = any((mask == 0).any() for mask in (feed.start.mask, *feed.start.source.values()))
    if padded:
        yield "the padding mask is left out", by(ones)
    if PLACES in feed.takes and not feed.start.source:
        if padded:
            yield "positions count the padding", by(counted)
            yield "the padding mask is left out, and positions count the padding", by(
                lambda given, later: ones(given, later) | counted(given, later))
        for told, off in (("one too far", 1), ("one too low", -1)):
            yield f"the positions of new tokens are {told}", by(
                lambda given, later, off=off: {PLACES: further(given[PLACES], off)} if later else {})
    if cached:
        yield "each layer is given what the layer before it keeps", {"shift": 1}
        yield "each layer is given what the layer behind it keeps", {"shift": -1}
    if cached and strategy.beams > 1:
        yield "what is kept does not follow the beams that survive", {"ordered": False}


def _by_pattern(cases: Sequence[Case], failing: Sequence[Case]) -> Explanation | None:
    """What can be said where nothing known fits."""
    names = {case.name for case in failing}
    pairs = [(case, other) for case in cases for other in cases if other.name.replace(CACHED, "") == case.name
             and CACHED in other.name]
    if pairs and all(CACHED in name for name in names):
        alike = len(failing) == len(pairs)
        return _said(failing[0], "without the cache every row agrees, so neither weights nor loop are to blame: it is "
                     "what is kept, or the positions and the mask that are given behind it"
                     + ("" if alike else f" ({len(failing)} of {len(pairs)} strategies)"))
    rows = [row for case in failing for row in case.rows]
    whole = [row for row in rows if not row.padded]
    if whole and not any(row.failed for row in whole):
        return _said(failing[0], "only rows with padding part: it is the mask or the positions of padded rows")
    return None
