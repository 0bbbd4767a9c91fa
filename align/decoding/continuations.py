"""Two continuations of one text, row by row: where they part, by what margin, and whether that says anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..compare import TensorResult, compare, missing
from ..report import Table
from ..tolerance import EXACT
from ..trace import Step
from .search import Strategy, as_set

Spell = Callable[[Sequence[int]], str]
SHOWN = 60
ENDED, FEW = "-ended", "-few"
"""How the names of strategies end that are there to be judged, not to be read."""
CACHED = " (with cache)"
"""What stands behind the name of a strategy by which a side continues texts that keeps keys and values."""


@dataclass(frozen=True)
class Row:
    """``compared`` tokens are equal at a margin above the noise, and ``close`` ones are equal all the same.

    ``place`` is the first step that differs, None where none does; there torch takes ``theirs`` and the candidate
    ``ours``, None for a token that only one of them has. ``margin`` and ``noise`` are those of that step, else of the
    closest one. Of beams, what differs may be only the texts under way (``only_under_way``).
    """

    name: str
    number: int
    padded: bool
    compared: int
    close: int
    place: int | None
    theirs: int | None
    ours: int | None
    margin: float
    noise: float
    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    only_under_way: bool = False

    @property
    def undecided(self) -> bool:
        """Parted where rounding alone can do it."""
        return self.place is not None and self.margin <= self.noise

    @property
    def failed(self) -> bool:
        return self.place is not None and not self.undecided


@dataclass(frozen=True)
class Case:
    """One strategy, with cache or without; ``candidate`` None where it was not recorded, for the reason ``why``."""

    name: str
    reference: np.ndarray
    candidate: np.ndarray | None
    rows: tuple[Row, ...]
    strategy: Strategy | None = None
    states: tuple[np.ndarray, np.ndarray] | None = None
    """Of a search, what both sides had under way, [steps, rows, beams, tokens]."""
    why: str | None = None


def case_of(name: str, strategy: Strategy, step: Step, answer: Step) -> Case:
    """What the two sides recorded under ``name``."""
    theirs, ours = step.recorded[name], answer.recorded[name]
    if theirs.shape != ours.shape:
        return Case(name, theirs, ours, (), strategy)
    margins, noise = step.view("margins")[name], step.view("noise")[name]
    left, right = (side.view("states").get(name) for side in (step, answer))
    padded, rows = _padded_rows(step), []
    for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        place = _place(one, other) if left is None or right is None else place_of_beams(
            left[:, number], right[:, number], one, other)
        rows.append(_row(name, number, padded[number], strategy, one, other, place, margins[number], noise[number]))
    return Case(name, theirs, ours, tuple(rows), strategy, None if left is None or right is None else (left, right))


def _row(name: str, number: int, padded: bool, strategy: Strategy, theirs: np.ndarray, ours: np.ndarray,
         place: int | None, margins: np.ndarray, noise: np.ndarray) -> Row:
    length = _length(theirs, strategy)
    until = length if place is None else min(place, length)
    decided = margins > noise
    ratios = np.divide(margins, noise, out=np.full(len(noise), np.inf), where=noise > 0)
    at = int(ratios.argmin()) if place is None else place
    first = _place(theirs, ours)
    token = first if first is not None and place is not None else None
    return Row(name, number, padded, int(decided[:until].sum()), int((~decided[:until]).sum()), place,
               None if token is None else int(theirs[token]), None if token is None else int(ours[token]),
               float(margins[at]), float(noise[at]), tuple(theirs[:length].tolist()),
               tuple(ours[: _length(ours, strategy)].tolist()), place is not None and first is None)


def _place(theirs: np.ndarray, ours: np.ndarray) -> int | None:
    differs = theirs != ours
    return int(differs.argmax()) if differs.any() else None


def place_of_beams(theirs: np.ndarray, ours: np.ndarray, chosen: np.ndarray, taken: np.ndarray) -> int | None:
    """The step behind which other texts are under way; the last place, behind all steps, where only the choice among
    texts that have ended differs. ``theirs`` and ``ours`` [steps, beams, tokens], what was chosen [tokens].
    """
    for step, (left, right) in enumerate(zip(theirs, ours, strict=False)):
        if as_set(left) != as_set(right):
            return step - 1
    return None if np.array_equal(chosen, taken) else len(chosen)


def _length(tokens: np.ndarray, strategy: Strategy) -> int:
    """Up to and with the end of a text."""
    ends = np.isin(tokens, strategy.ends)
    return int(ends.argmax()) + 1 if ends.any() else len(tokens)


def _padded_rows(step: Step) -> np.ndarray:
    start = step.view("start")
    return (start.get("source.attention_mask", start["mask"]) == 0).any(1)


# Judging --------------------------------------------------------------------------------------------------------------

def judged(case: Case, spell: Spell) -> TensorResult:
    """Passed where no row parts beyond the noise, and something was compared."""
    if case.candidate is None:
        absent = missing(case.name, "candidate")
        return absent if case.why is None else replace(absent, failure=f"{case.name}: {case.why}")
    settled = case.candidate.copy()
    for row in case.rows:
        if row.undecided:
            settled[row.number] = case.reference[row.number]
    result = compare(case.name, case.reference, settled, EXACT)
    failed = [row for row in case.rows if row.failed]
    if failed:
        return replace(result, passed=False, failure=f"{case.name}: {_sentence(failed, case, spell)}")
    if result.passed and not any(row.compared for row in case.rows):
        return replace(result, passed=False, failure=f"{case.name}: no token could be compared; at every step the "
                       "scores lie closer together than rounding can tell")
    return result


def _sentence(failed: Sequence[Row], case: Case, spell: Spell) -> str:
    row = min(failed, key=lambda one: one.place or 0)
    more = f"; {len(failed)} of {len(case.rows)} rows part so" if len(failed) > 1 else ""
    agree = f"{row.compared + row.close} tokens before it agree"
    return f"row {row.number}, {_told(row, case, spell)}, by {_margin(row)}; {agree}{more}"


def _told(row: Row, case: Case, spell: Spell) -> str:
    if row.only_under_way:
        return f"behind token {row.place} other texts are under way in the search"
    chosen = row.place == case.reference.shape[1]
    where = "of the texts that have ended another one is chosen, " if chosen else f"token {row.place}: "
    return f"{where}{_token(row.ours, spell)} instead of {_token(row.theirs, spell)}"


def _token(token: int | None, spell: Spell) -> str:
    return "nothing" if token is None else f"{token} {spell([token])!r}"


def _margin(row: Row) -> str:
    if np.isinf(row.margin):
        return "no choice of numbers: the text has ended, or torch's own logits lead there"
    return f"a margin of {row.margin:.1e}, where rounding can move {row.noise:.1e}"


# Showing --------------------------------------------------------------------------------------------------------------

def sheet(rows: Sequence[Row], spell: Spell) -> Table:
    """Every row of every strategy."""
    return Table("Continuations, row by row (margin and noise of the first step that differs, else of the closest)", (
        "strategy", "row", "compared", "within the noise", "first that differs", "margin", "noise", "torch", "paddle"),
        [_cells(row, spell) for row in rows])


def _cells(row: Row, spell: Spell) -> list[str]:
    same = row.reference == row.candidate
    how = " (undecided)" if row.undecided else ""
    place = "–" if row.place is None else f"{row.place}{how}: {row.theirs}, {row.ours}"
    return [row.name, f"{row.number}{' (padded)' if row.padded else ''}", str(row.compared), str(row.close), place,
            _number(row.margin), _number(row.noise), spell(row.reference)[:SHOWN],
            "the same" if same else spell(row.candidate)[:SHOWN]]


def side_by_side(texts: Sequence[str], cases: Sequence[Case], spell: Spell, shown: bool) -> Table:
    """Both continuations of every prompt, for people to read."""
    found = []
    for number, text in enumerate(texts):
        for case in cases:
            row = next((row for row in case.rows if row.number == number), None)
            if row is not None and ENDED not in case.name and FEW not in case.name:
                end = "equal" if row.place is None else "undecided" if row.undecided else "DIFFERS"
                found.append([text, case.name, spell(row.reference), spell(row.candidate), end])
    return Table("Continuations side by side", ("prompt", "strategy", "torch", "paddle", ""), found, shown)


def _number(value: float) -> str:
    return "–" if np.isinf(value) else f"{value:.1e}"


def partings(case: Case) -> Mapping[int, tuple[int, int | None]]:
    """By row that parts beyond the noise: the step, and the token that the candidate takes there."""
    return {row.number: (row.place, row.ours) for row in case.rows if row.failed and row.place is not None}
