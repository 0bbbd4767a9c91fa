"""``python -m align.optimizer``: learning rates, and what optimizers make of parameters.

Schedules: the rate of every update of a long training. Then updates of the run's weights, by SGD, Momentum, Adam and
AdamW, which both sides are given the same gradients for, so that a difference is the optimizer's alone: torch's own
gradients of two seeded batches, scaled by powers of two so that clipping has something to do and now and then nothing.
Last the net trains with one of them, each side with its own gradients. Of a model that is larger than memory the first
rows of each parameter are updated, with seeded gradients.

The reference is ``torch.optim``, ``transformers``' schedules and ``clip_grad_norm_``, the candidate Paddle's as
somebody who knows their differences sets them up, or with ``--candidate-optimizer`` a set-up of the user's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from convert.errors import BadInput

from .compare import TensorResult, compare, missing
from .diagnose import Explanation
from .explanations.updates import Case, explained, explained_rates
from .floor import YARDSTICK, Quantity, floors_of, look_again
from .gradients.batches import Batch, digest_of
from .inputs import Inputs
from .noise import NoiseFloor
from .optimizing.own import OwnOptimizer, told_of
from .optimizing.rates import judged_rates
from .optimizing.recipe import KINDS, RATES, SCHEDULES, Recipe, decayed
from .optimizing.updates import GIVEN, Course, Rounding, courses_of, own_batches, with_rounding
from .options import above_zero, below_one, not_below_zero, positive, whole
from .stage import Findings, RecordedStage, Session, chosen, main, spelled
from .tolerance import REORDERED_RUNS, SECOND_LOOK
from .trace import RECORDED, Step

OWN = "own gradients"
RATES_OF = "learning-rate"
ISOLATED, PROPAGATED = "isolated", "propagated"
BEHIND, START = "behind", "start"
UPDATES, DECAY = "updates", "weight decay"
ADAMS = ("adam", "adamw")
OWNERS = {"momentum": ("momentum",), "nesterov": ("momentum",), "beta1": ADAMS, "beta2": ADAMS, "epsilon": ADAMS}
"""Which optimizers know a flag that not all know."""
LONG, LONG_WARMUP, BEYOND = 1000, 100, 50
"""Updates of the schedules that are compared by themselves, those that warm up, and how many behind the last."""
COPIES = 17
"""As in backward.py: with float64 at two moments, and an optimizer's two, for a training of the reference."""
SAMPLED = ("The weights do not fit into memory: of each parameter the first rows are updated, with seeded gradients, "
           "and no net is trained.")
RATES_LEFT_OUT = ("Rates are compared in the updates that are carried out, and not in the steps of the schedule behind "
                  "them.")
GIVEN_YARDSTICK = ("Yardstick of given gradients: torch's own error against float64, and what float32 does to each "
                   "update by running error analysis; of a side's own gradients that too.")


def flags(parser: argparse.ArgumentParser) -> None:
    """What torch trains with, which is what the candidate is asked for."""
    parser.set_defaults(copies=COPIES)
    add = parser.add_argument
    add("--optimizer", choices=KINDS, help="compare this one alone; default all, and adamw for a training with "
        "gradients of each side's own")
    add("--candidate-optimizer", metavar="MODULE:FUNCTION", help="a set-up of yours, as my_training:build: given the "
        "Paddle net it returns an optimizer, or that and what your loop does after each backward pass")
    add("--updates", type=positive, default=10, metavar="N", help="how many are carried out; default 10")
    add("--schedule", choices=SCHEDULES, help="how rates go in them; default linear, and all kinds by themselves")
    add("--steps", type=positive, metavar="N", help="how long the schedule is; default as long as the updates")
    add("--warmup", type=whole, metavar="N", help="updates in which the rate rises; default a third of the steps")
    add("--lr", type=above_zero, metavar="RATE", help="the largest rate; default "
        f"{', '.join(f'{rate:g} for {name}' for name, rate in RATES.items())}")
    add("--accumulate", type=positive, default=2, metavar="N", help="how many micro-batches an update has; default 2")
    add("--clip", type=not_below_zero, default=1.0, metavar="NORM", help="to which global norm gradients are clipped, "
        "0 for no clipping; default 1.0")
    add("--weight-decay", type=not_below_zero, default=0.01, metavar="RATE", help="of all parameters but biases and "
        "norms; default 0.01")
    add("--momentum", type=below_one, default=0.9, metavar="SHARE", help="what Momentum keeps of its velocity; "
        "default 0.9")
    add("--nesterov", action="store_true", help="let Momentum look ahead, as Nesterov's does")
    add("--beta1", type=below_one, default=0.9, metavar="SHARE", help="what Adam and AdamW keep of the first moment; "
        "default 0.9")
    add("--beta2", type=below_one, default=0.999, metavar="SHARE", help="what Adam and AdamW keep of the second "
        "moment; default 0.999")
    add("--epsilon", type=not_below_zero, default=1e-8, metavar="NUMBER", help="what Adam and AdamW add to the root of "
        "the second moment; default 1e-8")


def reference(session: Session) -> Iterator[Step]:
    """Torch's rates, and its parameters behind each course with their noise floors."""
    from .optimizing.torch_side import rates_of
    from .optimizing.torch_updates import TorchSample, TorchUpdates
    recipes, options = _recipes(session.options), session.options
    side = TorchSample(session.run) if session.paged else TorchUpdates(session.reference, session.run, trained=True)
    session.advance("torch")
    own = Course(f"{recipes[-1].optimizer}, {OWN}", recipes[-1], options.updates)
    batches = own_batches(session.run, own)
    some = [batch for several in own_batches(session.run, replace(own, updates=GIVEN)) for batch in several]
    micro = side.gradients_of(some[:GIVEN])
    gradients = [side.in_paddle(one) for one in micro]
    size = _size(gradients[0])
    if not 0 < size[0] < np.inf:
        raise BadInput(f"the norm of torch's gradients is {size[0]:g}, and nothing can be trained by them.")
    if not any(rates_of(recipes[-1], options.updates)):
        raise BadInput(f"the rate is 0 in all {options.updates} updates, of {recipes[-1].warmup} of warm-up, so "
                       "nothing is moved. Give more --updates or less --warmup.")
    courses = courses_of(recipes, options.updates, *size)
    decays = {name: bool(held) for name, held in decayed(session.run).items() if name in gradients[0]}
    first = Step({RECORDED: {_by_itself(one): np.array(rates_of(one, LONG + BEYOND)) for one in _schedules(options)},
                  START: {name: array for name, array in side.start.items() if name in decays}},
                 told={"courses": [course.as_told for course in courses], "own": own.as_told, "decays": decays,
                       "schedules": [vars(one) for one in _schedules(options)], "sampled": session.paged,
                       "inputs_digest": digest_of(batches),
                       "notes": [*_told(recipes[-1], options, decays), SAMPLED if session.paged else YARDSTICK,
                                 GIVEN_YARDSTICK]})
    for number, found in enumerate(gradients):
        first.view(f"gradients.{number}").update(found)
    for number, several in enumerate(batches):
        for part, batch in enumerate(several):
            first.view(f"inputs.{number}.{part}").update(batch.inputs.arrays)
            first.view(f"labels.{number}.{part}").update(batch.labels)
    yield first
    moved = False
    for course in courses:
        session.advance(f"torch, {course.name}")
        rates, found, floors = side.given(course, micro)
        _require_finite(course, found)
        unseen = _unseen(side, course, micro, floors)
        moved |= UPDATES not in unseen
        yield Step({RECORDED: {_rates(course): np.array(rates)}, BEHIND: found}, {ISOLATED: floors},
                   {"course": course.as_told, "unseen": unseen})
    if not moved:
        raise BadInput(f"{options.updates} updates at these rates move no weight by more than rounding does, so that "
                       "nothing would be judged. Give a larger --lr, more --updates or less --warmup.")
    if not session.paged:
        yield _own_step(session, side, own, batches)


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """The same of the candidate."""
    first = next(steps := iter(steps), Step())
    if "courses" not in first.told:
        raise BadInput("the reference was recorded without its gradients, so the candidate cannot be given them. "
                       "Record it again: python -m align.optimizer --only reference")
    own, chosen = Course.told(first.told["own"]), session.options.candidate_optimizer
    batches, gradients = _batches_of(first, own), [first.view(f"gradients.{number}") for number in range(GIVEN)]
    session.advance(session.candidate.framework)
    side = _updates_of(session, first)
    yield Step({RECORDED: {} if chosen or _is_torch(session) else _schedules_of_paddle(first)},
               told={"inputs_digest": digest_of(batches), "notes": [told_of(chosen), RATES_LEFT_OUT] if chosen else []})
    for step in steps:
        course = Course.told(step.told["course"])
        session.advance(f"{session.candidate.framework}, {course.name}")
        if course.factors and (_is_torch(session) or (chosen and course.recipe.optimizer != own.recipe.optimizer)):
            yield Step(told={"left out": course.name})
        elif course.factors:
            rates, found = side.given(course, gradients)
            yield Step({RECORDED: {_rates(course): np.array(rates)}, BEHIND: found})
        else:
            rates, found = side.own(course, batches)
            yield Step({RECORDED: {_rates(course): np.array(rates), **_suffixed(found, course)}})


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Schedules by themselves, then each course: its rates and each parameter; the net's own training is last."""
    first, answer = next(pairs := iter(pairs), (Step(), Step()))
    if "courses" not in first.told:
        return Findings([])
    found: dict[str, TensorResult] = {}
    notes, why, left_out, unseen = [*first.told["notes"], *answer.told.get("notes", ())], [], [], {}
    for told in first.told["schedules"]:
        recipe = Recipe(**told)
        if answer.recorded:
            name = _by_itself(recipe)
            found[name] = judged_rates(name, first.recorded, answer.recorded)
            why.append(_why_of_rates(recipe, name, found, first, answer))
    for step, answer in pairs:
        if "left out" in answer.told:
            left_out.append(answer.told["left out"])
            continue
        course = Course.told(step.told["course"])
        for told in step.told.get("unseen", ()):
            unseen.setdefault(told, []).append(course)
        expected, given = (one.recorded | {f"{name} ({course.name})": array for name, array in one.view(BEHIND).items()}
                           for one in (step, answer))
        kind, floors = next((kind, held) for kind, held in step.floors.items())
        results = {name: _judged(name, expected, given, kind, floors) for name in expected if name != _rates(course)}
        results = {_rates(course): judged_rates(_rates(course), expected, given)} | results
        found |= results
        failing = [name for name, result in results.items() if not result.passed]
        why.append(_why_of_rates(course.recipe, _rates(course), found, step, answer))
        if failing and course.factors:
            why.append(explained(Case(course, first, failing, expected, given, floors)))
        if not course.factors:
            notes += _look_again(session, first, step, found, given)
    own_wrong = [name for name, result in found.items() if not result.passed and name.endswith(f"{OWN})")]
    if own_wrong and len(own_wrong) == sum(not result.passed for result in found.values()):
        notes.append("Of given gradients all parameters agree, of each side's own they do not: it is the gradients "
                     "that differ, not the optimizer. See align.backward.")
    if left_out:
        notes.append(f"Left out, as the set-up of the candidate's is another: {', '.join(left_out)}.")
    causes: dict[str, Explanation] = {}
    for one in filter(None, why):
        causes.setdefault(one.sentence.partition(": ")[0], one)
    first_why, *others = [*causes.values()] or [None]
    notes += [f"Besides: {one.sentence}" for one in others if one.kind != first_why.kind]
    return Findings(list(found.values()), notes, diagnosis=first_why, caveat=_caveat(unseen))


# What is judged -------------------------------------------------------------------------------------------------------

def _judged(name: str, expected: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray], kind: Any,
            floors: Mapping[str, Any]) -> TensorResult:
    """Of given gradients and of a net's own alike only the ratio to the noise decides: see :class:`Rounding`."""
    if name not in given:
        return missing(name, "candidate")
    known = floors[name if kind == PROPAGATED else name.partition(" ")[0]]
    alone = given[name] if kind == ISOLATED else None
    return compare(name, expected[name], given[name], np.inf, alone, {kind: known})


def _why_of_rates(recipe: Recipe, name: str, found: Mapping[str, TensorResult], step: Step, answer: Step,
                  ) -> Explanation | None:
    if found[name].passed or name not in answer.recorded:
        return None
    return explained_rates(recipe, step.recorded[name], answer.recorded[name])


def _look_again(session: Session, first: Step, step: Step, found: dict[str, TensorResult],
                given: Mapping[str, np.ndarray]) -> list[str]:
    failing = [result for result in found.values() if not result.passed]

    def look() -> int:
        from .optimizing.torch_updates import TorchUpdates
        course = Course.told(first.told["own"])
        side = TorchUpdates(session.reference, session.run, trained=True)
        again = _own_step(session, side, course, _batches_of(first, course), SECOND_LOOK)
        found.update({result.name: _judged(result.name, step.recorded, given, PROPAGATED, again.floors[PROPAGATED])
                      for result in failing})
        return sum(not result.passed for result in found.values())
    doubtful = all(result.doubtful and result.name in step.recorded for result in failing)
    return look_again(session, "optimizer", len(failing) if doubtful else 0, look)


def _caveat(unseen: Mapping[str, Sequence[Course]]) -> str | None:
    """What is not judged in which courses, if there is anything."""
    told = [f"Of {what} this says nothing ({', '.join(course.name for course in courses)}): torch itself would pass "
            "without." for what, courses in unseen.items()]
    if not told:
        return None
    course = next(iter(unseen.values()))[0]
    return " ".join([*told, f"In the first {course.updates} of {course.recipe.steps} steps, {course.recipe.warmup} of "
                     "them warm-up, weights move by less for it than they are rounded by. More --updates show it, less "
                     "--warmup, or a larger --lr."])


# The two sides --------------------------------------------------------------------------------------------------------

def _own_step(session: Session, side: Any, course: Course, batches: Sequence[Sequence[Batch]],
              reordered: int = REORDERED_RUNS) -> Step:
    """The reference's own training and its noise floor."""
    session.advance(f"torch, {course.name}")
    rounding = Rounding(course.recipe)
    rates, behind = side.own(course, batches, rounding)
    _require_finite(course, behind)
    arrays = _suffixed(behind, course)
    session.advance("torch's own noise")

    def measured() -> dict[str, Quantity]:
        return {name: Quantity(array) for name, array in _suffixed(side.own(course, batches)[1], course).items()}
    floors = floors_of(session.reference, [measured], [{name: Quantity(array) for name, array in arrays.items()}],
                       reordered, side.modes)[0]
    spread = _suffixed(side.spread(rounding), course)
    floors = {name: with_rounding(floor, spread[name]) for name, floor in floors.items()}
    return Step({RECORDED: {_rates(course): np.array(rates), **arrays}}, {PROPAGATED: floors},
                {"course": course.as_told})


def _require_finite(course: Course, arrays: Mapping[str, np.ndarray]) -> None:
    bad = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if bad is not None:
        raise BadInput(f"torch's own {bad} holds numbers that are not finite behind {course.updates} updates "
                       f"({course.name}), so there is nothing to compare with. Give a smaller --lr, or an --epsilon "
                       "above 0.")


def _unseen(side: Any, course: Course, gradients: Sequence[Any], floors: Mapping[str, NoiseFloor]) -> list[str]:
    """What of a course torch itself could leave out and would pass: all updates, or the weight decay."""
    without = {UPDATES: side.start}
    if course.recipe.weight_decay:
        _, without[DECAY], _ = side.given(replace(course, recipe=replace(course.recipe, weight_decay=0.0)), gradients)
    return [told for told, arrays in without.items() if all(
        found.passed for name, floor in floors.items() for found in floor.judge(arrays[name], ISOLATED))]


def _updates_of(session: Session, first: Step) -> Any:
    """Of a Paddle net, of a few rows of its parameters, or of a torch net that is compared with torch."""
    chosen, decays = session.options.candidate_optimizer, first.told["decays"]
    if chosen and (_is_torch(session) or first.told["sampled"]):
        raise BadInput(f"--candidate-optimizer {chosen} is given a Paddle net with its weights in memory, and this "
                       "candidate is none. Use --paging off, or --target models.")
    if _is_torch(session):
        from .optimizing.torch_updates import TorchUpdates
        return TorchUpdates(session.candidate, session.run, trained=False)
    from .optimizing.paddle_updates import PaddleSample, PaddleUpdates
    if first.told["sampled"]:
        return PaddleSample(first.view(START), lambda name: decays.get(name, False))
    if session.paged:
        raise BadInput("the reference was recorded with all of its weights in memory: give --paging off here too.")
    return PaddleUpdates(session.candidate, lambda name: decays.get(name, False),
                         OwnOptimizer(chosen) if chosen else None)


def _is_torch(session: Session) -> bool:
    return session.candidate.framework == "torch"


def _schedules_of_paddle(first: Step) -> dict[str, np.ndarray]:
    from .optimizing.paddle_side import rates_of
    recipes = [Recipe(**told) for told in first.told["schedules"]]
    return {_by_itself(recipe): np.array(rates_of(recipe, LONG + BEYOND)) for recipe in recipes}


# What is asked --------------------------------------------------------------------------------------------------------

def _recipes(options: argparse.Namespace) -> list[Recipe]:
    """One for each optimizer that is compared; the last is the one that the nets train with."""
    steps = options.steps or options.updates
    warmup = steps // 3 if options.warmup is None else options.warmup
    alone = [options.optimizer or "adamw"]
    names = alone if options.optimizer or options.candidate_optimizer else KINDS
    idle = [flag for flag in chosen(STAGE, options) if flag in OWNERS and not {*OWNERS[flag]} & {*names}]
    if idle:
        raise BadInput(f"{spelled(idle)}: that is of {' and '.join(OWNERS[idle[0]])}, and {names[0]} is what is "
                       "compared. Leave it out.")
    return [Recipe(name, options.lr or RATES[name], options.schedule or "linear", steps, warmup, options.clip or None,
                   options.accumulate, options.weight_decay, options.momentum, options.nesterov, options.beta1,
                   options.beta2, options.epsilon) for name in names]


def _schedules(options: argparse.Namespace) -> list[Recipe]:
    """The schedules that are compared by themselves."""
    return [Recipe(schedule=name, steps=LONG, warmup=warmup) for name in SCHEDULES
            if options.schedule in (None, name) for warmup in (LONG_WARMUP, 0) if warmup or name != "noam"]


def _told(recipe: Recipe, options: argparse.Namespace, decays: Mapping[str, bool]) -> list[str]:
    plain = [name for name, decaying in decays.items() if not decaying]
    clipped = f"clips them to a global norm of {recipe.clip:g}" if recipe.clip else "does not clip them"
    return [
        f"{options.updates} updates in eval mode, so without dropout: each adds up the gradients of "
        f"{recipe.accumulate} micro-batches and {clipped}. Schedule {recipe.schedule}: {recipe.steps} steps, "
        f"{recipe.warmup} of warm-up. torch's clip_grad_norm_ divides by the norm + 1e-6, Paddle's by the norm; that "
        "difference is allowed for.",
        f"Weight decay {recipe.weight_decay:g}, decoupled in AdamW and L2 in the others, of {len(decays) - len(plain)} "
        f"parameters; not of {len(plain)} that have one axis, biases and norms"
        f"{f': {plain[0]} and the like' if plain else ''}."]


def _by_itself(recipe: Recipe) -> str:
    return f"{RATES_OF} ({recipe.schedule}, {recipe.steps} steps, warm-up {recipe.warmup})"


def _rates(course: Course) -> str:
    return f"{RATES_OF} ({course.name})"


def _suffixed(arrays: Mapping[str, np.ndarray], course: Course) -> dict[str, np.ndarray]:
    return {f"{name} ({course.name})": array for name, array in arrays.items()}


def _size(gradients: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """(global norm, rms)."""
    norm = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in gradients.values()))
    return float(norm), float(norm / np.sqrt(sum(array.size for array in gradients.values())))


def _batches_of(step: Step, course: Course) -> list[list[Batch]]:
    return [[Batch(Inputs(step.view(f"inputs.{number}.{part}")), step.view(f"labels.{number}.{part}"))
             for part in range(course.recipe.accumulate)] for number in range(course.updates)]


STAGE = RecordedStage("optimizer", "Compare learning rates, and what optimizers make of parameters.", reference,
                      candidate, judge, flags, of_candidate=("candidate_optimizer",))

if __name__ == "__main__":
    sys.exit(main(STAGE))
