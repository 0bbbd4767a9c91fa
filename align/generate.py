"""``python -m align.generate``: texts continued by both sides, greedily, by beams and drawn, with cache and without.

The reference is transformers' own ``generate``. The candidate's logits go through a loop of ours (search.py), which is
also run on torch's logits, so that a difference of the loop is told from one of the net. Draws have the same noise on
both sides. So that texts do end early, a token that they come to is taken for the end, besides the config's.

A token counts where its margin, by how much logits would have to move for another to be taken, exceeds the noise of
rounding. Where two texts part at a smaller margin, neither is wrong, and nothing behind that place can be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from convert.errors import BadInput

from .decoding import starts
from .decoding.continuations import CACHED, ENDED, FEW, Case, case_of, judged, place_of_beams, sheet, side_by_side
from .decoding.feeding import MASK, PLACES, Cached, Feed, KeepsNothing, Start, Whole
from .decoding.margins import Measured, Replay, margin
from .decoding.search import Strategy, stacked, without_early_end, write
from .explanations.decoding import explained, mistakes_of
from .inputs import Inputs
from .options import above_zero, asked, positive, whole
from .reference import Reference
from .runs import Run
from .scores import log_softmax
from .stage import Findings, RecordedStage, Session, main
from .tasks import GENERATING
from .tolerance import FORWARD, LIMITS, REORDERED_RUNS, step_noise
from .trace import Step

GREEDY, BEAM, TOP_K, TOP_P, TEMPERATURE = STRATEGIES = ("greedy", "beam", "top-k", "top-p", "temperature")
TOKENS, PAGED_TOKENS = 24, 4
ENDS, PENALTIES, FLATTENING, SEEDS = 3, (0.5, 2.0, -2.0, -4.0), (1.0, 2.0, 4.0, 8.0, 16.0), 4
"""For texts that end early how many ends are tried, and which powers of the length; for few tokens which temperatures,
and how many seeds.
"""
TO_BE_TOLD = {
    BEAM + ENDED: {"the power 0 ": "a length penalty of 0", "the power 1 ": "a length penalty of 1"},
    TOP_K + FEW: {"too many": "one token too many to draw from", "too few": "one token too few to draw from"},
    TOP_P + FEW: {"too many": "one token too many to draw from", "left out": "one token too few to draw from"}}
"""Of which mistakes a strategy is to lead to other texts: words of what is told of each, and its name."""
MARGINS, NOISE, STATES, START = "margins", "noise", "states", "start"


def flags(parser: argparse.ArgumentParser) -> None:
    """What is continued, and how."""
    add = parser.add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="what is to be continued, as 'Once upon a time'; both texts "
        "are shown side by side; default: beginnings of texts that ship with the project")
    add("--interactive", action="store_true", help="ask for prompts, one after the other, until an empty line")
    add("--strategy", nargs="+", choices=STRATEGIES, default=None, metavar="NAME",
        help=f"which of {', '.join(STRATEGIES)}; default all of them")
    add("--tokens", type=positive, help=f"how many new ones at most, as 32; default {TOKENS}, with paging "
        f"{PAGED_TOKENS}")
    add("--rows", type=positive, help=f"how many texts are continued together, as 8; default {starts.ROWS}")
    add("--beams", type=_several, help="how wide the search by beams is, at least 2; default 4")
    add("--length-penalty", type=_finite, metavar="POWER", help="of the length that a beam's score is divided by, "
        "as 2; default 1; where texts end early, one that shows")
    add("--early-stopping", action="store_true", default=None, help="end a search as soon as there are as many ended "
        "texts as beams")
    add("--top-k", type=positive, metavar="K", help="draw from so many of the best tokens, as 50; default 8")
    add("--top-p", type=_share, metavar="P", help="draw from the fewest tokens with so much of the probability, as "
        "0.95; default 0.9")
    add("--temperature", type=above_zero, metavar="T", help="what logits are divided by before drawing; default 0.7")
    add("--seed", type=whole, help="of the noise that both sides draw with; default 0")


def lacking(run: Run) -> str | None:
    """Why there is nothing to generate: heads without a next token."""
    if run.head.task in GENERATING:
        return None
    return (f"{run.head.architecture} does not continue texts: it has no scores of a next token. A causal LM or a "
            "translation head does.")


def reference(session: Session) -> Iterator[Step]:
    """What transformers' generate makes of each start, with the margin of every step."""
    run, options = session.run, session.options
    _refuse_idle(session)
    if options.prompt or not options.interactive:
        start, told = _start(session, options.prompt)
        yield _recorded(session, start, [*told, *_told(session)], options.prompt or [], 1)
    if options.interactive:
        number = 1 if options.prompt else 0
        for text in _asked():
            try:
                start = starts.given(run, [text], _tokens(session))
            except BadInput as error:
                print(f"{error}")
                continue
            number += 1
            yield _recorded(session, start, _told(session) if number == 1 else [], [text], number)
        if not number:
            raise BadInput("no prompt was given, so nothing was continued.")


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """What our loop makes of the same starts with the candidate's logits."""
    for step in steps:
        if START not in step.views:
            raise BadInput("the reference was recorded without its prompts, so the candidate cannot be fed them. "
                           "Record it again: python -m align.generate --only reference")
        yield _answered(session, step)


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Every row of every strategy: equal, parted within the noise, or parted beyond it."""
    spell, cases, notes, tables, diagnosis = starts.spelling(session.run), [], [], [], None
    for step, answer in pairs:
        found = [_case(step, answer, name) for name in step.recorded if name in answer.recorded]
        missing = [name for name in step.recorded if name not in answer.recorded]
        notes += [*step.told.get("notes", []), *answer.told.get("notes", [])]
        cases += [*found, *(Case(name, step.recorded[name], None, (), why=answer.told.get("failed", {}).get(name))
                            for name in missing if name not in answer.told.get("left_out", ()))]
        diagnosis = diagnosis or explained(session, step, found)
        if step.told.get("prompts"):
            table = side_by_side(step.told["prompts"], found, spell, shown=not session.options.interactive)
            tables.append(table)
            if session.options.interactive:
                _show(table)
    rows = [row for case in cases for row in case.rows]
    tables.append(sheet(rows, spell))
    return Findings([judged(case, spell) for case in cases], [*notes, *_shares(cases)], tables=tables,
                    diagnosis=diagnosis)


def _show(table: Any) -> None:
    from rich.console import Console
    table.print(Console(highlight=False, width=None if sys.stdout.isatty() else 110))


def _shares(cases: Sequence[Case]) -> list[str]:
    rows = [row for case in cases for row in case.rows]
    if not rows:
        return []
    cut = [row for row in rows if row.undecided]
    tokens, close = sum(row.compared for row in rows), sum(row.close for row in rows)
    more = f", and {close} more at a margin within the noise, which are equal all the same" if close else ""
    parted = [f"{len(cut)} rows part where scores lie closer together than rounding can tell, and are compared up to "
              "there."] if cut else []
    return [f"{len(rows) - len(cut)} of {len(rows)} rows are judged to their end: {tokens} tokens{more}.", *parted]


# The reference --------------------------------------------------------------------------------------------------------

def _recorded(session: Session, start: Start, told: list[str], texts: Sequence[str], number: int) -> Step:
    """All that the reference has to say of one start."""
    from .decoding.torch_side import caches, generate, takes
    side, suffix = session.reference, "" if number == 1 else f" [prompt {number}]"
    feed = Feed(session.run, takes(side), start)
    made: dict[str, Any] = {}

    def carry_out(strategy: Strategy, cached: bool) -> Any:
        session.advance(f"torch, {strategy.name}{CACHED * cached}")
        side.sweep([lambda: made.__setitem__("found", generate(side, feed, strategy, cached))])
        return made.pop("found")
    ends, modes = _ends(session), [False, True] if caches(side) else [False]
    greedy = carry_out(_strategies(session, ends)[GREEDY], False)
    session.advance("torch's own noise")
    measured = _measured(side, feed, greedy.tokens)
    strategies = _strategies(session, ends, greedy)
    strategies, known = _telling(strategies, session, carry_out, start, greedy, measured)
    known[GREEDY] = greedy
    step = Step(told={"notes": told, "prompts": list(texts), "takes": sorted(feed.takes), "suffix": suffix,
                      "measured": measured.tolist(), "mistakes": {}, "loop": {}, "strategies": {
                          name: asdict(strategy) for name, strategy in strategies.items()}})
    step.view(START).update(start.arrays)
    for name, strategy in strategies.items():
        for cached in modes:
            found = known.pop(name) if name in known and not cached else carry_out(strategy, cached)
            _note(step, name + CACHED * cached + suffix, found, start, strategy, measured)
    step.told["inputs_digest"] = Inputs({**start.arrays, "asked": np.frombuffer(
        repr(list(strategies.values())).encode(), np.uint8)}).digest
    if not caches(side):
        step.told["notes"].append(f"torch's {type(side.model).__name__} keeps nothing between tokens, so nothing is "
                                  "compared with a cache.")
    if "attention_mask" not in feed.takes and (start.mask == 0).any():
        step.told["notes"].append(f"transformers gives its {type(side.model).__name__} no mask while it generates, so "
                                  "that both sides read padding.")
    step.told["notes"] += [*_apart(step, suffix), *_not_shown(step, strategies)]
    return step


def _telling(strategies: dict[str, Strategy], session: Session, carry_out: Callable[[Strategy, bool], Any],
             start: Start, greedy: Any, measured: np.ndarray) -> tuple[dict[str, Strategy], dict[str, Any]]:
    """Strategies that are there to be judged, with the first end and power of the length, or the first seed, at which
    the mistakes that they are there for lead to other texts, and what was generated so; where none does, the one at
    which most of them do. With paging, where a token takes long, none is tried.
    """
    found, made = dict(strategies), {}
    if session.paged:
        return found, made
    tries: dict[str, list[dict[str, Any]]] = {name: [{"seed": strategy.seed + more} for more in range(SEEDS)]
                                              for name, strategy in strategies.items() if name.endswith(FEW)}
    if BEAM + ENDED in strategies and session.options.length_penalty is None:
        beams = strategies[BEAM + ENDED]
        tries[BEAM + ENDED] = [{"ends": (end,), "length_penalty": power}
                               for end in _often_second(greedy, beams)[:ENDS] for power in PENALTIES]
    for name, several in tries.items():
        most = -1
        for tried in (replace(strategies[name], **changes) for changes in several):
            generated = carry_out(tried, False)
            told = _shown(mistakes_of(generated, start, tried), *_closeness(generated, start, tried, measured))
            shown = sum(words in told for words in TO_BE_TOLD[name])
            if shown > most:
                most, found[name], made[name] = shown, tried, generated
            if shown == len(TO_BE_TOLD[name]):
                break
    return found, made


def _shown(mistakes: Sequence[tuple[str, Mapping[str, Any]]], margins: np.ndarray, noise: np.ndarray) -> str:
    """What is told of those mistakes that part from torch in some row at a margin that counts, as does each before."""
    def is_shown(row: int, place: int) -> bool:
        return bool((margins[row, : place + 1] > noise[row, : place + 1]).all())
    return " ".join(told for told, where in mistakes if any(
        is_shown(int(row), place) for row, (place, _) in where.items()))


def _closeness(found: Any, start: Start, strategy: Strategy, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(margin, noise) of what was generated, as :func:`_margins` and :func:`_margins_of_beams` have them."""
    if strategy.beams == 1:
        return _margins(found, strategy, measured)
    search = Measured(len(start.ids), strategy, measured)
    write(Replay(found, strategy), start.ids, start.mask, strategy, beams=search)
    return _margins_of_beams(search, len(start.ids))


def _not_shown(step: Step, strategies: Mapping[str, Strategy]) -> list[str]:
    """A note where a mistake that a strategy is there to show would lead to no other text."""
    told = []
    for name in [name for name in TO_BE_TOLD if name in strategies]:
        case = name + step.told["suffix"]
        seen = _shown(step.told["mistakes"][case], step.view(MARGINS)[case], step.view(NOISE)[case])
        hidden = [called for words, called in TO_BE_TOLD[name].items()
                  if words not in seen and words != f"the power {strategies[name].length_penalty:g} "]
        if hidden:
            told.append(f"{name} would come to the same texts with {' or '.join(hidden)}, so that mistake would not "
                        "show here. More --tokens or --rows may show it.")
    return told


def _note(step: Step, name: str, found: Any, start: Start, strategy: Strategy, measured: np.ndarray) -> None:
    """What was generated, how close each step was, and where our loop on torch's logits goes another way."""
    replayed = Replay(found, strategy)
    search = Measured(len(start.ids), strategy, measured) if strategy.beams > 1 else None
    written = write(replayed, start.ids, start.mask, strategy, beams=search)
    step.recorded[name] = found.tokens
    if search is None:
        margins, noise = _margins(found, strategy, measured)
        loop = [_first(ours != theirs) for ours, theirs in zip(written.tokens, found.tokens, strict=True)]
    else:
        margins, noise = _margins_of_beams(search, len(start.ids))
        states = step.view(STATES)[name] = stacked(replayed.states, strategy)
        ours = stacked(written.states, strategy)
        loop = [place_of_beams(states[:, row], ours[:, row], found.tokens[row], written.tokens[row])
                for row in range(len(start.ids))]
    for row, place in enumerate(loop):
        if place is not None:  # the loop is at fault, or two scores are equal but for the last digit
            close = margins[row, min(place, margins.shape[1] - 1)] <= noise[row, min(place, margins.shape[1] - 1)]
            margins[row, place:], noise[row, place:] = (0.0, np.inf) if close else (np.inf, 0.0)
            loop[row] = None if close else place
    step.view(MARGINS)[name], step.view(NOISE)[name] = margins, noise
    step.told["loop"][name] = loop
    step.told["mistakes"][name] = mistakes_of(found, start, strategy)


def _margins(found: Any, strategy: Strategy, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(margin, noise) of each step of each row, [rows, tokens]; inf and 0 behind the end of a text."""
    margins = np.full(found.tokens.shape, np.inf)
    noise = np.zeros(found.tokens.shape)
    ended = np.zeros(len(found.tokens), bool)
    for step, logits in enumerate(found.logits):
        scores = without_early_end(logits.astype(np.float64), strategy, step)
        for row in np.flatnonzero(~ended):
            margins[row, step], largest = margin(scores[row], int(found.tokens[row, step]), strategy, int(row), step)
            noise[row, step] = step_noise(largest, measured[row])
        ended |= np.isin(found.tokens[:, step], strategy.ends)
    return margins, noise


def _margins_of_beams(search: Measured, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(margin, noise) [rows, tokens + 1]: of what is under way behind each step, and last of the choice at the end."""
    margins = np.full((rows, search.strategy.tokens + 1), np.inf)
    noise = np.zeros(margins.shape)
    for step, of_rows in enumerate(search.closest):
        for row, closest in enumerate(of_rows):
            margins[row, step], noise[row, step] = closest.margin, closest.noise
    for row in range(rows):
        last = search.decided(row)
        margins[row, -1], noise[row, -1] = last.margin, last.noise
    return margins, noise


def _first(differs: np.ndarray) -> int | None:
    return int(differs.argmax()) if differs.any() else None


def _measured(side: Reference, feed: Feed, tokens: np.ndarray) -> np.ndarray:
    """Torch's largest error in a logit, as a share of the largest logit, of each row: over these continuations, from
    float32 with its sums reordered against float64.
    """
    from .floor import OWN_NOISE, modes_of_passes
    ids = np.concatenate([feed.start.ids, tokens], axis=1)[:, :-1]
    mask = np.concatenate([feed.start.mask, np.ones_like(tokens)], axis=1)[:, :-1]
    kept: list[np.ndarray] = []

    def run(mode: Any) -> None:
        with mode:
            kept.append(side.outputs(feed.whole(ids, mask))["logits"][:, -tokens.shape[1]:])
    from contextlib import nullcontext
    side.sweep([partial(run, mode) for mode in [*modes_of_passes(REORDERED_RUNS), nullcontext()]], OWN_NOISE)
    oracle, *others = kept
    largest = np.abs(oracle).max(-1)
    errors = [np.abs(one.astype(np.float64) - oracle).max(-1) / largest for one in others]
    return np.max(errors, axis=(0, 2))


def _apart(step: Step, suffix: str) -> list[str]:
    """A note where torch itself writes another text with its cache, at a margin that counts."""
    told = []
    for name, tokens in step.recorded.items():
        cached = step.recorded.get(name.removesuffix(suffix) + CACHED + suffix)
        if name.removesuffix(suffix).endswith(CACHED) or cached is None or np.array_equal(tokens, cached):
            continue
        margins, noise = step.view(MARGINS)[name], step.view(NOISE)[name]
        places = [(row, _first(tokens[row] != cached[row])) for row in range(len(tokens))]
        rows = [row for row, place in places if place is not None
                and not (margins[row, : place + 1] <= noise[row, : place + 1]).any()]
        if rows:
            told.append(f"torch itself writes other texts with its cache than without ({name}, {len(rows)} rows): each "
                        "is compared with its counterpart.")
    return told


# The candidate --------------------------------------------------------------------------------------------------------

def _answered(session: Session, step: Step) -> Step:
    side, start, suffix = session.candidate, Start.of(step.view(START)), step.told["suffix"]
    takes = frozenset(step.told["takes"])
    taken = frozenset(name for name in takes if _is_taken(side.model, name))
    feed = Feed(session.run, taken, start)
    answer = Step(told={"inputs_digest": step.told.get("inputs_digest"), "notes": [], "left_out": [], "failed": {}})
    idle = "" if getattr(side, "keeps", False) else (
        f"this {type(side.model).__name__} does not take past_key_values and use_cache as transformers' classes do")
    for name in step.recorded:
        cached = name.removesuffix(suffix).endswith(CACHED)
        strategy = _restored(step.told["strategies"][name.removesuffix(suffix).removesuffix(CACHED)])
        if cached and idle:
            answer.told["left_out"].append(name)
            continue
        session.advance(f"{side.framework}, {name}")
        try:
            side.sweep([partial(go_on, answer, name, (Cached if cached else Whole)(side, feed), start, strategy)])
        except KeepsNothing as error:
            idle = str(error)
            answer.told["left_out"].append(name)
        except BadInput as error:  # without cache the same net did not fail
            if not cached:
                raise
            answer.told["failed"][name] = str(error)
    if not suffix:
        answer.told["notes"] += _remarks(side, idle if answer.told["left_out"] else "", takes - taken)
    return answer


def _remarks(side: Any, idle: str, unknown: Set[str]) -> list[str]:
    """Why nothing was run with a cache, if nothing was, and what the net is not given that torch's is."""
    name, told = type(side.model).__name__, []
    if idle:
        told.append(f"With cache nothing is compared: {idle}.")
    withheld = sorted({MASK, PLACES} & getattr(side, "withheld", frozenset()))
    if withheld:
        told.append(f"With its cache, PaddleNLP's own generate gives its {name} no {' and no '.join(withheld)}.")
    if PLACES in unknown:
        told.append(f"This {name} takes no position_ids, which transformers gives its own class; it is left to count "
                    "for itself.")
    return told


def go_on(answer: Step, name: str, net: Any, start: Start, strategy: Strategy) -> None:
    """Continue one start by one strategy, and put it into ``answer``."""
    written = write(net, start.ids, start.mask, strategy)
    answer.recorded[name] = written.tokens
    if written.states:
        answer.view(STATES)[name] = stacked(written.states, strategy)


def _is_taken(model: Any, name: str) -> bool:
    """Whether a net's ``forward`` takes an argument of this name."""
    import inspect
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _restored(told: Mapping[str, Any]) -> Strategy:
    return Strategy(**{**told, "ends": tuple(told["ends"])})


# The judgement --------------------------------------------------------------------------------------------------------

def _case(step: Step, answer: Step, name: str) -> Case:
    strategy = _restored(step.told["strategies"][name.removesuffix(step.told["suffix"]).removesuffix(CACHED)])
    return case_of(name, strategy, step, answer)


# Strategies -----------------------------------------------------------------------------------------------------------

def _strategies(session: Session, ends: tuple[int, ...], greedy: Any = None) -> dict[str, Strategy]:
    """By name, those that were asked for; what ends early is worked out of what was ``greedy``, without it that one."""
    options, pad = session.options, starts.padding(session.run)
    plain = Strategy(GREEDY, _tokens(session), pad, ends)
    if greedy is None:
        return {GREEDY: plain}
    drawing = replace(plain, temperature=1.0, seed=options.seed or 0)
    few = replace(drawing, temperature=_flattening(greedy))
    beams = replace(plain, beams=options.beams or 4, early_stopping=bool(options.early_stopping),
                    length_penalty=1.0 if options.length_penalty is None else options.length_penalty)
    early = replace(beams, length_penalty=PENALTIES[0] if options.length_penalty is None else options.length_penalty)
    known = {
        GREEDY: plain, GREEDY + ENDED: _early(greedy, plain), BEAM: beams,
        BEAM + ENDED: replace(early, ends=tuple(_often_second(greedy, beams)[:1]), least=1),
        TOP_K: replace(drawing, top_k=options.top_k or 8), TOP_K + FEW: replace(few, top_k=3),
        TOP_P: replace(drawing, top_p=options.top_p or 0.9),
        TOP_P + FEW: replace(few, top_p=_share_of_few(greedy, few.temperature)),
        TEMPERATURE: replace(drawing, temperature=options.temperature or 0.7)}
    asked = options.strategy or STRATEGIES
    return {name: replace(strategy, name=name) for name, strategy in known.items()
            if name.removesuffix(ENDED).removesuffix(FEW) in asked and (plain.tokens > 2 or not name.endswith(ENDED))}


def _early(greedy: Any, plain: Strategy) -> Strategy:
    """Greedy texts that end early: by a token that one comes to for the first time at about a quarter of its length,
    and which most others have too; none ends before that place.
    """
    found = []
    for row in greedy.tokens:
        for place in range(plain.tokens // 2):
            if row[place] != plain.pad and row[place] not in row[:place]:
                rows = int((greedy.tokens == row[place]).any(1).sum())
                found.append((-rows, abs(place - plain.tokens // 4), place, int(row[place])))
    if not found:
        return plain
    _, _, place, token = min(found)
    return replace(plain, ends=(token,), least=place)


def _often_second(greedy: Any, strategy: Strategy) -> list[int]:
    """Tokens that end some beams and not others: most often among the best few of greedy steps, but not the best."""
    logits = np.stack(greedy.logits[1:] or greedy.logits)
    order = (-logits).argsort(-1, kind="stable")[..., 1: strategy.beams + 1]
    counts = np.bincount(order.reshape(-1), minlength=logits.shape[-1])
    counts[strategy.pad] = 0
    return (-counts).argsort(kind="stable").tolist()


def _flattening(greedy: Any) -> float:
    """The smallest of some temperatures at which the best token mostly has half of the probability at most, so that
    which tokens are drawn from does show.
    """
    logits = np.stack(greedy.logits).astype(np.float64)
    return next((temperature for temperature in FLATTENING
                 if np.median(np.exp(log_softmax(logits / temperature)).max(-1)) <= 0.5), FLATTENING[-1])


def _share_of_few(greedy: Any, temperature: float) -> float:
    """What some four tokens have of the probability, the median over greedy steps: the last of so few is often drawn.
    """
    logits = np.stack(greedy.logits).astype(np.float64)
    found = np.sort(np.exp(log_softmax(logits / temperature)), axis=-1)[..., ::-1]
    return float(np.clip(np.median(found[..., :3].sum(-1) + found[..., 3] / 2), 0.01, 0.99))


def _ends(session: Session) -> tuple[int, ...]:
    """The tokens that end a text, as the checkpoint's configs say."""
    from .decoding.torch_side import ends_of
    told = session.run.config.get("eos_token_id")
    found = [told] if isinstance(told, int) else told if isinstance(told, list) else ends_of(session.reference)
    return tuple(token for token in found if isinstance(token, int) and 0 <= token < session.run.sizes["vocab"])


def _tokens(session: Session) -> int:
    return session.options.tokens or (PAGED_TOKENS if session.paged else TOKENS)


def _start(session: Session, texts: Sequence[str] | None) -> tuple[Start, list[str]]:
    if texts:
        return starts.given(session.run, texts, _tokens(session)), []
    return starts.shipped(session.run, session.options.rows or starts.ROWS, _tokens(session))


def _told(session: Session) -> list[str]:
    run = session.run
    given = "" if run.family.remote_code or run.head.reference else " of its own class"
    return [f"Reference: transformers' generate{given}, at most {_tokens(session)} new tokens; what is drawn is drawn "
            "by the same seeded noise (Gumbel) on both sides. Names with -ended take a token that the texts come to "
            "for their end, top-k-few draws from three tokens, top-p-few from some four.",
            f"Noise of a step: 2 x {FORWARD:.0e} of its largest score, or {2 * LIMITS['propagated']['peak']:g} x "
            "torch's own largest error against float64 on that row, whichever is more; over the steps of a beam it "
            "adds up."]


def _asked() -> Iterator[str]:
    """What the user types, until an empty line or the end."""
    while True:
        try:
            text = input("prompt (empty: end)> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _refuse_idle(session: Session) -> None:
    """:class:`BadInput` where there is nothing to generate, or for a flag that would not be looked at."""
    options, why = session.options, lacking(session.run)
    if why:
        raise BadInput(why)
    if options.rows and (options.prompt or options.interactive):
        raise BadInput("--rows counts the texts that ship with the project; of prompts there are as many as are given. "
                       "Leave it out.")
    asked = options.strategy or STRATEGIES
    owners = {"beams": BEAM, "length_penalty": BEAM, "early_stopping": BEAM, "top_k": TOP_K, "top_p": TOP_P,
              "temperature": TEMPERATURE}
    idle = [flag for flag, owner in owners.items() if getattr(options, flag) is not None and owner not in asked]
    if idle:
        raise BadInput(f"--{idle[0].replace('_', '-')} is for a strategy that was not asked for: --strategy "
                       f"{' '.join(asked)}.")


def _several(text: str) -> int:
    return asked(text, int, lambda number: number > 1, "at least 2 beams; one is the greedy strategy")


def _finite(text: str) -> float:
    return asked(text, float, math.isfinite, "a finite number")


def _share(text: str) -> float:
    return asked(text, float, lambda number: 0 < number <= 1, "a share above 0 and at most 1")


STAGE = RecordedStage("generate", "Continue texts on both sides, greedily, by beams and by drawing, with cache and "
                      "without.", reference, candidate, judge, flags, lacking)

if __name__ == "__main__":
    sys.exit(main(STAGE))
