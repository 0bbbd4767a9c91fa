"""``python -m align.diagnose``: why the first bad place is bad.

An explanation is a weight that the candidate holds changed, or a variant of the reference's own operation. It is
given only if it reproduces what the candidate computed: put into the reference, the error falls to the noise floor
of the changed reference, judged by the same tests as any verdict, and no other explanation does so too. A wrong
explanation is worse than none. Of the candidate it knows what was recorded, and the weights that it says it holds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .compare import measure
from .inside import PROBE, Places, small_input
from .noise import EPS, NoiseFloor
from .parts import index_of, whole
from .recording import paired
from .stage import Findings, Session, Stage, main
from .tolerance import FORWARD

if TYPE_CHECKING:
    from convert.plan import Move

    from .explanations.operations.variant import Dial, Variant
    from .explanations.place import Place
    from .inputs import Inputs
    from .noise import Judgement

# FALL: by how much an operation must bring the error down, WEIGHT_FALL: a weight, which the arrays prove as well.
# COARSE: beyond so many times the noise nothing is judged, and of the rest only the MOST likely.
FALL = 20.0
WEIGHT_FALL = 2.0
STEPS = 12
SCREEN = 1.02
MOST = 24
COARSE = 40.0


@dataclass(frozen=True)
class Explanation:
    """Why a place diverged. ``before`` and ``after`` are the candidate's relative L2 error against the reference as
    it is, and against the reference with the explanation put into it; None where no error was measured.

    ``subject`` is a parameter, or a module and one of its operations, by Paddle's names.
    """

    kind: str
    subject: str
    sentence: str
    before: float | None
    after: float | None


def diagnose(session: Session, inputs: Inputs, name: str) -> Explanation | None:
    """The explanation of ``name``, the first failing module or output or a parameter that differs; None if there is
    none in stock that fits, or more than one.
    """
    from .explanations.place import Place
    if PROBE in name:
        pair = next(pair for pair in Places.of(session.run).all if pair[1] == name.removesuffix(PROBE))
        is_norm = bool(session.reference.norms([pair]))
        found = (_by_probe if is_norm else _by_first_row)(session, inputs, pair)
        return found[0] if found else None
    wrong = list(_wrong_weights(session))
    parameter = next((weight for weight in wrong if weight.name == name), None)
    modules = session.run.modules
    if parameter is not None:
        name = _place_of(session, inputs, name)
    elif any(move.target == name for move in session.run.plan.moves):
        return None
    listened = next((_with_single(session, pair) for pair in modules if pair[1] == name), modules)
    recorded, entering = session.reference.record_inside(inputs, listened)
    isolated, _ = session.candidate.record_inside(inputs, listened, entering)
    if name not in recorded or name not in isolated or recorded[name].shape != isolated[name].shape:
        return None
    case = _Case(session, inputs, Place(session.reference, inputs, name), recorded[name], isolated[name])
    if modules[0][1] == name and name in entering and case.plainly_fits(isolated[name]):
        before_first = Place(session.reference, inputs, name, before_first=True)
        case = replace(case, place=before_first, candidate=session.candidate.record_inside(inputs, listened)[0][name])
    mine = [weight for weight in wrong if case.holds(weight)]
    buffers = [weight for weight in wrong if weight.path is None and weight.name.startswith(f"{name}.")]
    if not np.isfinite(case.candidate).all():
        return next((_broken(case, weight) for weight in mine if weight.kind == "nonfinite-weight"), None)
    if mine:
        found = _by_weights(case, mine, wrong, parameter)
        if found:
            return found
    if buffers:
        found = _by_buffers(case, buffers, parameter)
        if found:
            return found
    if parameter is not None and case.plainly_fits(case.candidate):
        return None
    if case.fits(case.candidate, case.unchanged):
        return None
    operation = _by_operation(case, mine)
    return operation[0] if operation else None if mine else _by_small_inputs(case) or _by_chance(case)


def _with_single(session: Session, pair: tuple[str, str]) -> list[tuple[str, str]]:
    """``pair`` and the modules that are none of many blocks.

    A block reads what the others give, as a decoder reads the encoder's last norm: fed what entered torch's, they give
    it torch's, and not what the candidate's own error has become by then.
    """
    return [pair, *(other for other in session.run.modules if other != pair and not any(
        word.isdigit() for word in other[1].split(".")))]


# Weights --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Wrong:
    """A weight that is not the source's: ``path`` is the parameter's in torch, None where torch has none."""

    name: str
    path: str | None
    held: np.ndarray
    kind: str
    told: str
    peer: str | None


def _wrong_weights(session: Session) -> Iterator[_Wrong]:
    from .evidence import bits_of, expected_of
    from .explanations.weights import difference
    if session.weights_divergence is None:
        return
    run = session.run
    moves = {move.target: move for move in run.plan.moves}
    paths = {target: path for path, target in session.run.paddle_names.items()}
    model = session.reference.model
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}

    def inverted(move: Move, array: np.ndarray) -> np.ndarray:
        scalar = array.size == math.prod(move.source_shape or move.shape) == 1
        return np.array(array if scalar else move.turn_back(array), order="C")

    held: dict[str, np.ndarray] = {}
    for name, array in session.candidate.state():
        if name in moves:
            expected, found = expected_of(moves[name], run.checkpoint), inverted(moves[name], array)
            if expected.shape == found.shape and not np.array_equal(bits_of(expected), bits_of(found)):
                held[name] = found
    for name, move in moves.items():
        if name not in held:
            continue
        expected, array = expected_of(move, run.checkpoint), held[name]

        def peers(name: str = name, shape: tuple[int, ...] = expected.shape) -> Iterator[tuple[str, np.ndarray]]:
            for other in sorted(moves, key=lambda other: other.rpartition(".")[0] != name.rpartition(".")[0]):
                peer = moves[other]
                if other != name and peer.sources and sorted(peer.source_shape) == sorted(shape):
                    yield other, expected_of(peer, run.checkpoint)
        found = difference(expected, array, peers, _heads(session))
        path = paths.get(name)
        kind = found.kind
        if move.filling:
            kind = "untied-weight" if move.filling.copies else "wrong-buffer"
        yield _Wrong(name, path if path and whole(path) in known else None, array, kind, found.told, found.peer)


def _heads(session: Session) -> int | None:
    config = getattr(session.reference.model, "config", None)
    return getattr(config, "num_attention_heads", None)


def _place_of(session: Session, inputs: Inputs, parameter: str) -> str:
    """The recorded name that shows a parameter: the module that holds it, else the first, else the first output."""
    modules = [name for _, name in session.run.modules]
    for name in modules:
        if parameter.startswith(name + "."):
            return name
    torch_path = {target: path for path, target in session.run.paddle_names.items()}.get(parameter, "")
    if session.reference.looks_up(torch_path):
        return modules[0]
    outputs = session.reference.record_inside(inputs, [])[0]
    return next(iter(outputs), modules[0])


def _by_buffers(case: _Case, wrong: Sequence[_Wrong], parameter: _Wrong | None) -> Explanation | None:
    """A buffer that torch does not have: what it does to the mask, or that it does nothing here."""
    from .explanations.operations.masks import buffers
    for weight in wrong:
        for variant in buffers(case.place, weight.name, weight.held):
            after = case.error_of(variant)
            if case.explains(variant.change, after):
                return Explanation(
                    weight.kind, weight.name, f"{weight.name} is stale or wrong, it {weight.told}: with it as the mask "
                    f"of the reference, the error of {case.name} falls from {case.before:.1e} to {after:.1e}.",
                    case.before, after)
    if parameter is not None and case.plainly_fits(case.candidate):
        return Explanation(parameter.kind, parameter.name, f"{parameter.name} {parameter.told}: no output of these "
                           f"inputs shows it ({case.before:.1e}).", case.before, case.before)
    return None


def _by_probe(session: Session, inputs: Inputs, pair: tuple[str, str]) -> _Found | None:
    """What is wrong with one layer norm, by its (torch, Paddle) path, on a small input."""
    from .explanations.place import Alone
    path, name = pair
    _, entering = session.reference.record_inside(inputs, _with_single(session, pair))
    if name not in entering:
        return None
    small = small_input(entering[name])
    with session.reference.probing(pair), session.candidate.probing(pair):
        case = _small_case(session, inputs, pair, Alone(session.reference, inputs, path, name, small),
                           {**entering, name: small})
        return case and _operation_on_small_input(case)


def _by_first_row(session: Session, inputs: Inputs, pair: tuple[str, str]) -> _Found | None:
    """What is wrong with a module that fails on the first row made small."""
    case = _of_first_row(session, inputs, pair)
    return case and _operation_on_small_input(case)


def wrong_inside(session: Session, inputs: Inputs, name: str) -> str | None:
    """The first operation or sublayer that is wrong in the module ``name`` where the first row, made small, enters it.

    None where none is, or where none can be judged.
    """
    from .explanations.place import ARRIVING
    case = _of_first_row(session, inputs, next(pair for pair in session.run.modules if pair[1] == name))
    if case is None or case.inside is None:
        return None
    entering, found = case.inside
    floors, told = case.place.floors_inside(case.unchanged, entering), Places.of(session.run).sublayers
    parts = [part for _, name in case.place.sublayers for part in ((ARRIVING + name, told[name]), (name, name))]
    return next((said for key, said in parts if key in found and key in floors and not (
        np.isfinite(found[key]).all() and all(one.passed for one in case.judge(floors[key], found[key])))), None)


def _of_first_row(session: Session, inputs: Inputs, pair: tuple[str, str]) -> _Case | None:
    from .explanations.place import Fed
    _, name = pair
    _, entering = session.reference.record_inside(inputs.first, _with_single(session, pair))
    if name not in entering:
        return None
    small = small_input(entering[name])
    return _small_case(session, inputs.first, pair, Fed(session.reference, inputs.first, name, small),
                       {**entering, name: small})


def _small_case(session: Session, inputs: Inputs, pair: tuple[str, str], place: Place,
                entering: Mapping[str, np.ndarray]) -> _Case | None:
    """What both sides give at ``place``, if it can be compared; ``entering``, whole, is what they are fed."""
    _, name = pair
    modules = _with_single(session, pair)
    plain = session.reference.record_inside(inputs, modules, entering)[0][name]
    given = session.candidate.record_inside(inputs, modules, entering)[0].get(name)
    if given is None or given.shape != plain.shape or not np.isfinite(given).all():
        return None
    return _Case(session, inputs, place, plain, given, entering=entering)


def _operation_on_small_input(case: _Case) -> _Found | None:
    """The operation that accounts for what both sides give."""
    found = None if case.plainly_fits(case.candidate) else _by_operation(case, [])
    if found is None:
        return None
    told, change = found
    return replace(told, sentence=told.sentence.replace("the error of", "on a small input the error of")), change


def _by_weights(case: _Case, wrong: Sequence[_Wrong], everywhere: Sequence[_Wrong],
                parameter: _Wrong | None) -> Explanation | None:
    """The wrong weights put into the reference: all of them, and then the one that does most on its own."""
    from .explanations import surgery
    from .explanations.operations.variant import Variant
    known = [weight for weight in wrong if weight.path]
    if not known:
        return None
    tensors = {case.below(weight): case.tensor(weight.held) for weight in known}
    told = _together(case, known, everywhere)
    everything = Variant(told[0], told[1], told[2], surgery.weights(tensors))
    if parameter is not None and told[0] == "several-weights":
        everything = Variant(parameter.kind, parameter.name, _relation(parameter, everywhere), everything.change)
    silent = case.plainly_fits(case.candidate)
    after = case.error_of(everything)
    if not case.fits(case.candidate, everything.change) or not (silent or after * WEIGHT_FALL <= case.before):
        return None
    if parameter is None and len(known) > 1 and told[0] == "several-weights":
        for weight in known:
            alone = Variant(weight.kind, weight.name, _relation(weight, everywhere),
                            surgery.weights({case.below(weight): case.tensor(weight.held)}))
            if case.error_of(alone) <= case.before / FALL and case.fits(case.candidate, alone.change):
                everything, after = alone, case.error_of(alone)
                break
    figures = (f"no output of these inputs shows it ({case.before:.1e} before, {after:.1e} with it undone)" if silent
               else f"undone, the error of {case.name} falls from {case.before:.1e} to {after:.1e}")
    return Explanation(everything.kind, everything.subject, f"{everything.subject} {everything.told}: {figures}.",
                       case.before, after)


def _relation(weight: _Wrong, wrong: Sequence[_Wrong]) -> str:
    """Two that hold each other are swapped, rather than that one holds the other."""
    mutual = next((other for other in wrong if other.name == weight.peer and other.peer == weight.name), None)
    return f"and {mutual.name} are swapped" if mutual else weight.told


def _together(case: _Case, wrong: Sequence[_Wrong], everywhere: Sequence[_Wrong]) -> tuple[str, str, str]:
    """(kind, subject, told) of all wrong weights of a place."""
    from .explanations.weights import numbered, parts_of
    if len(wrong) == 1:
        alone = wrong[0]
        mutual = any(other.name == alone.peer and other.peer == alone.name for other in everywhere)
        tied = alone.peer and not mutual and case.place.whole and case.place.start is None
        return "tied-weights" if tied else alone.kind, alone.name, _relation(alone, everywhere)
    if len(wrong) == 2 and wrong[0].peer == wrong[1].name and wrong[1].peer == wrong[0].name:
        return "swapped-weights", wrong[0].name, _relation(wrong[0], wrong)
    layers = set(numbered(weight.peer or "" for weight in wrong))
    mine = set(numbered(weight.name for weight in wrong))
    if all(weight.peer for weight in wrong) and len(layers) == len(mine) == 1 and layers != mine:
        tails = all(weight.peer.split(f".{next(iter(layers))}.")[-1] == weight.name.split(f".{next(iter(mine))}.")[-1]
                    for weight in wrong)
        if tails:
            other = f"{wrong[0].peer.split(f'.{next(iter(layers))}.')[0]}.{next(iter(layers))}"
            back = {weight.peer for weight in everywhere if weight.name.startswith(f"{other}.")}
            if {weight.name for weight in wrong} <= back:
                return "swapped-layers", case.name, f"and {other} hold each other's weights"
            return "shifted-layers", case.name, f"holds the weights of {other}"
    fused = _fused(case, wrong, parts_of)
    if fused:
        return fused
    if all(weight.peer for weight in wrong) and {weight.peer for weight in wrong} == {weight.name for weight in wrong}:
        held = ", ".join(f"{weight.name.rpartition('.')[0]} holds {weight.peer.rpartition('.')[0]}"
                         for weight in wrong if weight.name.endswith("weight"))
        return "qkv-order" if _is_projection(wrong) else "swapped-weights", wrong[0].name, (
            f"and others are in each other's place ({held})")
    more = len(wrong) - 1
    if len({weight.told for weight in wrong}) == 1:
        verb = "so is" if more == 1 else "so are" if wrong[0].told.startswith("is ") else "likewise"
        return wrong[0].kind, wrong[0].name, (f"{wrong[0].told}, and {verb} {more} more weight{'s' * (more > 1)} "
                                              f"of {case.name}")
    kind = wrong[0].kind if len({weight.kind for weight in wrong}) == 1 else "several-weights"
    rest = "; ".join(f"{weight.name} {weight.told}" for weight in wrong[1:4])
    return kind, wrong[0].name, f"{wrong[0].told}; {rest}{' …' if len(wrong) > 4 else ''}"


def _is_projection(wrong: Sequence[_Wrong]) -> bool:
    from .explanations.operations.attention import KEY, QUERY, VALUE
    return all(weight.name.split(".")[-2] in QUERY | KEY | VALUE for weight in wrong)


def _fused(case: _Case, wrong: Sequence[_Wrong], parts_of: Any) -> tuple[str, str, str] | None:
    """q, k and v of one attention that were cut from a fused matrix in another order."""
    heads = _heads(case.session)
    matrices = [weight for weight in wrong if weight.held.ndim == 2]
    if len(matrices) != 3 or not _is_projection(wrong) or not heads:
        return None
    parameters = dict(case.session.reference.model.named_parameters())

    def by_rows(weight: _Wrong, array: np.ndarray) -> np.ndarray:
        """[out, in], which a part that is made of columns is not."""
        is_columns = whole(weight.path) != weight.path and index_of(weight.path)[0] is ...
        return array.T if is_columns else array
    right = {weight.name: by_rows(weight, parameters[whole(weight.path)][index_of(weight.path)].detach().numpy())
             for weight in matrices}
    for order in itertools.permutations(matrices):
        told = parts_of([right[weight.name] for weight in order], [by_rows(weight, weight.held) for weight in order],
                        heads)
        if told:
            attention = order[0].name.rpartition(".")[0].rpartition(".")[0]
            return "qkv-order", order[0].name, f"and the key and value of {attention} are cut {told}"
    return None


def _broken(case: _Case, weight: _Wrong) -> Explanation | None:
    """A weight that is not finite makes these very elements not finite; in the error they count as wholly wrong."""
    from .explanations import surgery
    found = case.run(surgery.weights({case.below(weight): case.tensor(weight.held)}))
    finite = np.isfinite(case.candidate)
    if not np.array_equal(np.isfinite(found), finite):
        return None
    before = measure(case.plain, np.where(finite, case.candidate, 0).astype(np.float32)).rel_l2
    after = measure(np.where(finite, found, 1), np.where(finite, case.candidate, 1)).rel_l2
    if after > FORWARD:
        return None
    return Explanation(
        weight.kind, weight.name, f"{weight.name} {weight.told}, and so do {finite.size - finite.sum():,} of the "
        f"{finite.size:,} elements of {case.name}; the rest agree within {after:.1e}.", before, after)


# Operations -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Fit:
    """A variant that brings the error down, and how many numbers were solved for to get there."""

    variant: Variant
    after: float
    freedom: int


_Found = tuple[Explanation, Any]


def _by_operation(case: _Case, wrong: Sequence[_Wrong]) -> _Found | None:
    """The one variant in the catalogue that reproduces the candidate."""
    from .explanations import surgery
    from .explanations.operations import CATALOGUE
    from .explanations.operations.variant import Variant
    base = surgery.weights({case.below(weight): case.tensor(weight.held) for weight in wrong if weight.path})
    if wrong:
        case = replace(case, plain=case.run(base), unchanged=base)
        if case.fits(case.candidate, base):
            return None
    beside = f" (and with {wrong[0].name} as the candidate holds it)" if wrong else ""
    fits: list[_Fit] = []
    for idea in CATALOGUE:
        case.session.advance(f"explaining {case.name}: {idea.about}")
        for found in idea.variants(case.place):
            if isinstance(found, Variant):
                tried = replace(found, change=surgery.together(base, found.change)) if wrong else found
                fits.append(_Fit(tried, case.error_of(tried), 0))
            else:
                solved = _solve(case, replace(found, change=lambda value, dial=found: surgery.together(
                    base, dial.change(value))) if wrong else found)
                fits += [_Fit(solved, case.error_of(solved), 1)] if solved else []
    fits = sorted((fit for fit in fits if fit.after < case.before), key=lambda fit: fit.after)
    near = [fit for fit in fits if fit.after <= COARSE * max(case.noise, EPS)][:MOST]
    least = _simplest([fit for fit in near if case.explains(fit.variant.change, fit.after)])
    if len(_stories(least)) != 1 and case.inside is not None:
        least = _simplest([fit for fit in least or near if case.explains_inside(fit.variant.change)])
    if len(_stories(least)) != 1:
        return None
    return _explained(case, least[0], beside)


def _explained(case: _Case, fit: _Fit, beside: str) -> _Found:
    told = fit.variant
    return Explanation(
        told.kind, told.subject, f"{told.subject} {told.told}: with that in the reference{beside}, the error of "
        f"{case.name} falls from {case.before:.1e} to {fit.after:.1e}.", case.before, fit.after), told.change


def _by_small_inputs(case: _Case) -> Explanation | None:
    """A layer norm of this place whose fault shows on a small input, if that accounts for what little is seen here."""
    from torch import nn
    for path, _ in case.place.modules(nn.LayerNorm):
        full = ".".join(part for part in (case.place.path, path) if part)
        found = _by_probe(case.session, case.inputs, (full, case.place.paddle(path)))
        if found is None:
            continue
        told, alone = found

        def change(root: Any, path: str = path, alone: Any = alone) -> Any:
            return alone(root.get_submodule(path))
        after = measure(case.run(change), case.candidate).rel_l2
        if case.fits(case.candidate, change) and after < case.before:
            sentence = f"{told.sentence.removesuffix('.')}; that of {case.name} from {case.before:.1e} to {after:.1e}."
            return replace(told, sentence=sentence, before=case.before, after=after)
    return None


def _simplest(fits: list[_Fit]) -> list[_Fit]:
    """Those with the fewest numbers solved for, and of each kind the narrowest."""
    least = [fit for fit in fits if fit.freedom == min(fit.freedom for fit in fits)]
    return [fit for fit in least if fit.variant.extent == min(
        other.variant.extent for other in least if _group(other.variant.kind) == _group(fit.variant.kind))]


def _stories(fits: list[_Fit]) -> set[tuple[str, str]]:
    return {(_group(fit.variant.kind), fit.variant.subject) for fit in fits}


def _group(kind: str) -> str:
    """Kinds that say one thing at different strengths count as one: a mask of 0 is no mask."""
    return "mask" if "mask" in kind else "gelu" if kind in ("gelu-variant", "activation") else kind


def _solve(case: _Case, dial: Dial) -> Variant | None:
    """The number of a dial by Gauss-Newton on its logarithm, from the best of the grid; None if none helps.

    A difference quotient is taken over a step that moves the output well beyond rounding.
    """
    errors = [(case.error_of(dial.at(value)), value) for value in dial.grid]
    error, value = min(errors)
    if not math.isfinite(error) or (error > SCREEN * case.before and len(dial.grid) > 1):
        return None
    target = case.candidate.astype(np.float64).ravel()
    visible = 50 * case.noise * float(np.linalg.norm(target))
    step = 1e-2
    for _ in range(STEPS):
        here = case.run(dial.change(value)).astype(np.float64).ravel()
        moved = case.run(dial.change(value * math.exp(step))).astype(np.float64).ravel() - here
        while float(np.linalg.norm(moved)) < visible and step < 0.5:
            step *= 3
            moved = case.run(dial.change(value * math.exp(step))).astype(np.float64).ravel() - here
        norm = float(moved @ moved)
        if not norm or not math.isfinite(norm):
            return None
        move = step * float((target - here) @ moved) / norm
        move = math.copysign(min(abs(move), 1.5), move)
        for _ in range(5):
            tried = case.error_of(dial.at(value * math.exp(move)))
            if tried < error:
                break
            move /= 3
        else:
            break
        done = error - tried < 1e-3 * error
        error, value = tried, value * math.exp(move)
        step = max(min(abs(move) / 2, step), 1e-4)
        if done:
            break
    return dial.at(value)


# Chance ---------------------------------------------------------------------------------------------------------------

RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
MATCHING = 0.999


def _by_chance(case: _Case) -> Explanation | None:
    """Dropout left on: what a place adds up, each element of it either 0 or divided by the share that is kept.

    Which elements fell is not reproducible, so it is read off the candidate: that is only possible where the
    dropped terms are added last, and only believed if nearly every element is one of the few possible values.
    """
    places = [({case.name: case.plain}, {case.name: case.candidate}, case.place.dropped_terms(
        lambda: {case.name: case.place.run()}))]
    if case.inside is not None:
        entering, found = case.inside
        places.append((case.place.run_inside(entering), found, case.place.dropped_terms(
            lambda: case.place.run_inside(entering))))
    for plain, candidate, terms in places:
        for name, several in terms.items():
            if name in candidate and candidate[name].shape == plain[name].shape:
                told = (_dropped(name, plain[name], candidate[name], some, rate) for rate in RATES
                        for count in range(len(several), 0, -1) for some in itertools.combinations(several, count))
                found = next(filter(None, told), None)
                if found:
                    return found
    return None


def _dropped(name: str, plain: np.ndarray, candidate: np.ndarray, terms: Sequence[np.ndarray],
             rate: float) -> Explanation | None:
    rest = plain.astype(np.float64) - sum(terms)
    scale = np.abs(candidate) + np.abs(rest) + sum(np.abs(term) for term in terms)
    nearest, best = np.zeros_like(rest), np.full(rest.shape, np.inf)
    kept = np.zeros((len(terms), *rest.shape), bool)
    for choice in itertools.product((False, True), repeat=len(terms)):
        value = rest + sum(term / (1 - rate) for term, keep in zip(terms, choice, strict=True) if keep)
        nearer = np.abs(candidate - value) < best
        best = np.where(nearer, np.abs(candidate - value), best)
        nearest = np.where(nearer, value, nearest)
        kept[:, nearer] = np.array(choice)[:, None]
    before, after = measure(plain, candidate).rel_l2, measure(nearest.astype(np.float32), candidate).rel_l2
    slack = 6 * math.sqrt(rate * (1 - rate) / best.size)
    if (best <= 1e-5 * scale).mean() < MATCHING or after > FORWARD or not all(
            abs(float(part.mean()) - (1 - rate)) < slack for part in kept):
        return None
    subject = f"{name.removeprefix('arriving at ')} dropout"
    return Explanation(
        "dropout", subject, f"{subject} of {rate:g} is left on: {1 - kept[0].mean():.1%} of the elements are 0 and the "
        f"others divided by {1 - rate:g}; with that in the reference, the error there falls from {before:.1e} to "
        f"{after:.1e}.", before, after)


# A case ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Case:
    """One place, what the reference and the candidate gave there, and the question whether a change accounts for it.

    ``entering``, whole, is what some modules are fed instead of what the recorded pass has.
    """

    session: Session
    inputs: Inputs
    place: Place
    plain: np.ndarray
    candidate: np.ndarray
    unchanged: Any = nullcontext
    entering: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.place.name

    @cached_property
    def before(self) -> float:
        return measure(self.plain, self.candidate).rel_l2

    @cached_property
    def noise(self) -> float:
        """The relative noise of the reference as it is."""
        return self.floor(self.unchanged).relative

    @cached_property
    def worst_before(self) -> float:
        """The largest share of a limit that the candidate uses up against the reference as it is."""
        return max((found.share for found in self.judge(self.floor(self.unchanged), self.candidate)), default=0.0)

    def run(self, change: Any) -> np.ndarray:
        return self.place.with_change(change)

    def error_of(self, variant: Variant) -> float:
        """Relative L2 of the candidate against a variant; infinite where the variant cannot be run."""
        try:
            found = self.run(variant.change)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return math.inf
        if found.shape != self.candidate.shape or not np.isfinite(found).all():
            return math.inf
        return measure(found, self.candidate).rel_l2

    def floor(self, change: Any) -> NoiseFloor:
        """The changed reference's own noise floor."""
        return self.place.floor(change)

    def judge(self, floor: NoiseFloor, array: np.ndarray) -> list[Judgement]:
        return floor.judge(array, "isolated")

    def fits(self, array: np.ndarray, change: Any) -> bool:
        """Whether ``array`` would pass as this place of the changed reference."""
        close = measure(self.run(change), array).rel_l2 <= FORWARD
        return close and all(found.passed for found in self.judge(self.floor(change), array))

    def plainly_fits(self, array: np.ndarray) -> bool:
        return bool(np.isfinite(array).all()) and self.fits(array, self.unchanged)

    def explains(self, change: Any, after: float) -> bool:
        """Whether the error falls far enough, in total or in the test that it fails by most, and to noise."""
        if after > FORWARD:
            return False
        found = self.judge(self.floor(change), self.candidate)
        worst = max((one.share for one in found), default=math.inf)
        return all(one.passed for one in found) and (
            after * FALL <= self.before or worst * FALL <= self.worst_before)

    @cached_property
    def inside(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """What enters the sublayers in the reference, and what the candidate gives for it and would have fed them."""
        from .explanations.place import ARRIVING
        pair = next((pair for pair in self.session.run.modules if pair[1] == self.name), None)
        if pair is None or not self.place.sublayers:
            return None
        inside = [(f"{pair[0]}.{path}", name) for path, name in self.place.sublayers]
        modules = [*_with_single(self.session, pair), *inside]
        _, entering = self.session.reference.record_inside(self.inputs, modules, self.entering)
        entering |= self.entering
        outputs, arriving = self.session.candidate.record_inside(self.inputs, modules, entering)
        found = {name: outputs[name] for _, name in (pair, *inside) if name in outputs}
        return entering, found | {ARRIVING + name: arriving[name] for _, name in inside if name in arriving}

    @cached_property
    def worst_inside_before(self) -> float:
        return self.worst_inside(self.unchanged)

    def worst_inside(self, change: Any) -> float:
        """The largest share of a limit that is used up by anything inside this place; infinite if not comparable."""
        entering, found = self.inside
        floors = self.place.floors_inside(change, entering)
        if not found or any(
                name not in floors or floors[name].oracle.size != array.size or not np.isfinite(array).all()
                for name, array in found.items()):
            return math.inf
        return max(one.share for name, array in found.items() for one in self.judge(floors[name], array))

    def explains_inside(self, change: Any) -> bool:
        """As :meth:`explains`, where the whole block shows too little: by its worst sublayer or operation."""
        worst = self.worst_inside(change)
        return self.fits(self.candidate, change) and worst <= 1 and worst * FALL <= self.worst_inside_before

    def holds(self, weight: _Wrong) -> bool:
        """Whether a weight belongs to this place."""
        inside = [path for path, _ in self.session.run.modules if weight.path and weight.path.startswith(path + ".")]
        if self.place.whole:
            return weight.path is not None and not inside and self.place.looks_up(weight.path) == bool(self.place.start)
        return weight.path is not None and self.place.path in inside

    def below(self, weight: _Wrong) -> str:
        """The path of a weight below the root of the place."""
        return weight.path if self.place.whole else weight.path.removeprefix(self.place.path + ".")

    def tensor(self, array: np.ndarray) -> Any:
        import torch
        return torch.from_numpy(np.ascontiguousarray(array))


# The stage ------------------------------------------------------------------------------------------------------------

def find(session: Session) -> Findings:
    """The forward stage once more, and a sentence on why it is diverged; its traces are not saved again."""
    from .forward import STAGE as FORWARD_STAGE
    session.inspect()
    findings = FORWARD_STAGE.judge(session, paired(FORWARD_STAGE, session))
    _, told = session.evidence
    bad = session.weights_divergence or findings.named
    none = f"No explanation in stock accounts for {bad}." if bad else "Nothing to explain: every place agrees."
    return replace(findings, notes=[*told, *([] if findings.diagnosis else [none])])


def _flags(parser: argparse.ArgumentParser) -> None:
    from .forward import STAGE as FORWARD_STAGE
    FORWARD_STAGE.flags(parser)


STAGE = Stage("diagnose", "Say why the first bad place of the forward stage is bad.", find, _flags)

if __name__ == "__main__":
    sys.exit(main(STAGE))
