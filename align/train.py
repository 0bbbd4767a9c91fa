"""``python -m align.train``: a fine-tuning on real text on both sides, from the same start, on the same batches.

Both are in training mode. Nothing is dropped, unless ``--dropout`` asks for it: then both sides drop by the same masks.
The same training is carried out by torch in float64, and several times with its sums in other orders. What these differ
by is the band: two trainings part, step by step, for rounding alone, and no curve can be asked to lie closer to torch's
than torch's own do.

Judged are the learning rates; the losses, each against the band at its step; global norms of gradients and how far
every weight and running statistic has moved after the first steps, where rounding has not grown yet; and the head's
natural metric on rows held out, after the last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from convert.errors import BadInput

from .compare import TensorResult, compare, missing
from .explanations.training import explained
from .floor import look_again
from .gradients.batches import Batch, backwards, digest_of
from .inputs import SEED, Inputs
from .noise import Grown, NoiseFloor
from .optimizing.own import told_of
from .optimizing.rates import judged_rates
from .optimizing.recipe import KINDS, SCHEDULES, Recipe, decayed
from .options import above_zero, between_zero_and_one, not_below_zero, positive, whole
from .recording import SIDES
from .stage import Findings, RecordedStage, Session, main
from .tasks import BARE, base_of
from .tolerance import BAND_STEPS, CHAOTIC, LIMITS, REORDERED_RUNS, SECOND_LOOK
from .trace import RECORDED, Step
from .training import dropping, held_out, lessons
from .training.checkpoints import Checkpoint
from .training.course import Course, Settings, carry_out, key_of, require_finite, require_moved
from .training.curves import Curves
from .training.lessons import Lessons, lessons_of

LOSS, NORM, RATES = "loss", "gradient_norm", "learning_rate"
MOVED, BAND, SCORED, PLACE = "moved", "band", "scored", "train"
USUAL = {"adamw": 1e-4, "adam": 1e-4, "sgd": 1e-2, "momentum": 1e-3}
"""The rate of each optimizer, where none is asked for."""
ROWS = {False: 4, True: 16}
"""Of a batch, where no number is asked for: of pictures more. In batches of 4 a batch norm's own statistics are of so
few places that two runs of torch part by a tenth of the loss in 60 steps."""
COPIES = 24
"""How many times a side's weights this stage holds, worked out rather than measured: weights, those to go back to,
gradients and two moments; torch's also in float64; and how far all have moved, by run."""


def flags(parser: argparse.ArgumentParser) -> None:
    """How long, of what, and how the weights are moved."""
    parser.set_defaults(copies=COPIES)
    add = parser.add_argument
    add("--steps", type=positive, default=60, metavar="N", help="how many steps the optimizer takes; default 60")
    add("--batch-size", type=positive, metavar="N", help=f"rows of a micro-batch; default {ROWS[False]}, of pictures "
        f"{ROWS[True]}")
    add("--tokens", type=positive, default=64, metavar="N", help="where a row of text is cut; default 64")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="micro-batches whose gradients are added up for a step; default 1")
    add("--optimizer", choices=KINDS, help="what moves the weights; default adamw, of nets that look at pictures "
        "momentum")
    add("--lr", type=above_zero, metavar="RATE", help="the highest learning rate; default "
        + ", ".join(f"{rate:g} of {name}" for name, rate in USUAL.items()))
    add("--weight-decay", type=not_below_zero, default=0.01, metavar="SHARE",
        help="of matrices and tables, not of biases and norms; default 0.01")
    add("--schedule", choices=SCHEDULES, default="linear", help="how the rate goes down; default linear")
    add("--warmup", type=whole, default=0, metavar="N", help="steps in which the rate rises from 0; default 0")
    add("--candidate-optimizer", metavar="MODULE:FUNCTION", help="a set-up of yours for the Paddle side, as "
        "my_training:build, as align.optimizer takes it: an optimizer, or that and what your loop does after each "
        "backward pass; the other flags say what torch does")
    add("--clip", type=above_zero, default=1.0, metavar="NORM",
        help="to which global norm gradients are clipped; default 1.0")
    add("--dropout", type=between_zero_and_one, nargs="?", const=0.0, metavar="RATE",
        help="drop by the same seeded masks on both sides: at each net's own rates, or everywhere at this one, as 0.1; "
        "default: drop nothing")
    add("--dataset", metavar="ID-OR-FILE", help="what to train on: a set of the datasets library or a json, csv, "
        "parquet or txt file, as align.metric takes them; default: what ships with the project")
    add("--split", help="which split of a set of the datasets library, as train; default test")
    add("--columns", metavar="OURS=THEIRS,…", help="what the set calls text, label, question, …, as text=sentence")
    add("--limit", type=positive, metavar="N", help=f"rows at most, as 500; default {lessons.ROWS}")
    add("--checkpoint-every", type=positive, default=20, metavar="N", help="steps after which both sides are kept, in "
        "reports/<run>/train; default 20")
    add("--resume", action="store_true", help="go on from the last checkpoint of a training that was broken off")
    add("--seed", type=whole, default=SEED, metavar="N", help=f"of the order of rows and of masks; default {SEED}")


def reference(session: Session) -> Iterator[Step]:
    """Torch's training and those that span the band, with the batches for the candidate."""
    _refuse_paging(session)
    if session.options.split and session.options.dataset is None:
        raise BadInput(f"--split {session.options.split} is of a set that --dataset names, and there is none. Give it, "
                       "or leave --split out.")
    settings = _settings(session)
    given = lessons_of(session, settings, _rows(session), session.options.tokens)
    trained = _Trained(session, settings, given, _rows(session), session.options.resume)
    yield trained.step(REORDERED_RUNS)
    trained.forget()


def candidate(session: Session, steps: Iterable[Step]) -> Iterator[Step]:
    """Paddle's training on the same batches."""
    for step in steps:
        if "settings" not in step.told:
            raise BadInput("the reference was recorded without its batches, so the candidate cannot be fed them. "
                           "Record it again: python -m align.train --only reference")
        _refuse_paging(session)
        settings, given, side = Settings.told(step.told["settings"]), _lessons_of(step), session.candidate
        own = session.options.candidate_optimizer
        kept = Checkpoint(session.reports / PLACE, f"candidate-{side.framework}", key_of(
            settings, batches=step.told["inputs_digest"], weights=side.weights_digest, version=side.version,
            candidate_optimizer=own), session.options.checkpoint_every, session.options.resume)
        with _candidate_trainer(side, settings, own).training() as trainer:
            course = carry_out(trainer, given.batches, settings, kept, session.advance)
            with trainer.tested():
                scores = held_out.scored(side, given.held_out, session.run, step.told["rows"])
        answer = _of_course(session, course, scores)
        answer.told |= {"inputs_digest": digest_of(given.batches), "notes": [told_of(own)] if own else []}
        yield answer
        kept.remove()


def judge(session: Session, pairs: Iterable[tuple[Step, Step]]) -> Findings:
    """Learning rates, what has moved, losses and norms against the band, and the metric."""
    pairs = iter(pairs)
    taken = next((pair for pair in pairs if pair[0].recorded), None)
    if taken is None:
        return Findings([])
    step, answer = taken
    found, notes = _judged(session, step, answer)
    looked = {"step": step}

    def look() -> int:
        trained = _Trained(session, Settings.told(step.told["settings"]), _lessons_of(step), step.told["rows"], True)
        looked["step"] = trained.step(SECOND_LOOK)
        trained.forget()
        found.update(_judged(session, looked["step"], answer)[0])
        return sum(not result.passed for result in found.values())
    failing = [result for result in found.values() if not result.passed]
    doubtful = len(failing) if all(result.doubtful for result in failing) else 0
    notes = [*step.told["notes"], *answer.told.get("notes", ()), *_unseen_decay(session, step), *notes,
             *look_again(session, "train", doubtful, look)]
    curves = _curves(looked["step"], answer)
    for side, each in zip(SIDES, (step, answer), strict=True):
        _write_log(session, side, each)
    for _ in pairs:  # both sides learn that they are no longer needed
        pass
    diagnosis = explained(session.run, step, answer, [result.name for result in found.values() if not result.passed])
    return Findings(list(found.values()), [*notes, *_chaos(curves)], _values(step, answer), diagnosis=diagnosis,
                    curves=curves)


def _write_log(session: Session, side: str, step: Step) -> None:
    """The log of a side's training, a line a step, and the metric's values, beside its recording."""
    curves = zip(*(step.recorded[name] for name in (RATES, LOSS, NORM)), strict=True)
    lines = [f"step {number}: {RATES} {rate:.9g}, {LOSS} {loss:.9g}, {NORM} {norm:.9g}"
             for number, (rate, loss, norm) in enumerate(curves, 1)]
    lines += [f"held out: {name.removeprefix('value.')} {float(value):.9g}" for name, value in step.recorded.items()
              if name.startswith("value.")]
    directory = session.reports / "traces"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"train_{side}.log").write_text("\n".join(lines) + "\n", "utf-8")


# Judging --------------------------------------------------------------------------------------------------------------

def _judged(session: Session, step: Step, answer: Step) -> tuple[dict[str, TensorResult], list[str]]:
    settings = Settings.told(step.told["settings"])
    wrong = dropping.differing(*(dropping.unpacked(side.told["drops"]) for side in (step, answer)))
    results = [*dropping.judged(wrong), judged_rates(RATES, step.recorded, answer.recorded)]
    losses, norms = (_against_the_band(name, step, answer) for name in (LOSS, NORM))
    results += [losses[0], norms[0], *_moved(session, step, answer)]
    results += [result for pair in zip(losses[1: settings.early], norms[1: settings.early], strict=True)
                for result in pair]
    results += losses[settings.early:]
    metric, notes = held_out.compared(session.run.head.task, held_out.unpacked(step.view(SCORED)),
                                      held_out.unpacked(answer.view(SCORED))[0])
    return {result.name: result for result in [*results, *metric]}, notes


def _against_the_band(name: str, step: Step, answer: Step) -> list[TensorResult]:
    """A result for each step: the distance from float64 against the band's width there."""
    runs, base = step.view(BAND)[name], step.told["base"] if name == LOSS else 0.0
    found = []
    for number, (exact, width) in enumerate(zip(runs[0], widths(runs), strict=True)):
        floor = Grown(np.array([[exact]]), np.array([[width]]), width, base=base)
        given = [side.recorded[name][number].reshape(()) for side in (step, answer)]
        found.append(compare(f"{name} (step {number + 1})", *given, np.inf, None, {"propagated": floor}))
    return found


def widths(runs: np.ndarray) -> np.ndarray:
    """[steps]: how far torch's runs, [runs, steps] of which the first is in float64, lie from that one.

    At one step five runs may by luck lie close, and in the next one no closer than before: so the mean square is taken
    over ``BAND_STEPS`` to either side too, and a band never narrows.
    """
    squares = np.square(runs[1:] - runs[0]).mean(axis=0)
    around = np.array([squares[max(0, step - BAND_STEPS): step + BAND_STEPS + 1].mean()
                       for step in range(len(squares))])
    return np.sqrt(np.maximum.accumulate(around))


def _moved(session: Session, step: Step, answer: Step) -> list[TensorResult]:
    """How far each weight has come, in the order of execution."""
    suffix = f" (after step {Settings.told(step.told['settings']).early})"
    theirs, ours = step.view(MOVED), answer.view(MOVED)
    made = {move.target for move in session.run.plan.moves if move.filling}
    found = {}
    for name in [*theirs, *(name for name in ours if name not in theirs and name not in made)]:
        if name not in theirs or name not in ours:
            found[name] = missing(f"{name}{suffix}", "candidate" if name in theirs else "reference")
            continue
        total = _grown(step.floors[MOVED][name])
        found[name] = compare(f"{name}{suffix}", theirs[name], ours[name], np.inf, None, {"propagated": total})
    return [found[name] for name in reversed(backwards(session.run, list(found)))]


def _grown(known: NoiseFloor) -> Grown:
    return Grown(known.oracle, known.spread, known.largest, base=known.base)


def _unseen_decay(session: Session, step: Step) -> list[str]:
    """That nothing is said of weight decay, where every weight could be off by all of it and would pass."""
    settings = Settings.told(step.told["settings"])
    recipe = settings.recipe
    share = recipe.weight_decay * float(np.sum(step.recorded[RATES][: settings.early]))
    decays = decayed(session.run)
    floors = [_grown(floor) for name, floor in step.floors[MOVED].items() if decays.get(name)]
    if not share or recipe.optimizer == "adam" or not all(
            floor.judge(floor.oracle + share * floor.base, "propagated")[0].passed for floor in floors):
        return []
    return [f"Of weight decay this says nothing: {recipe.weight_decay:g} moves weights in the first {settings.early} "
            "steps by less than torch's own runs lie apart. align.optimizer judges it."]


def _curves(step: Step, answer: Step) -> Curves:
    runs = step.view(BAND)[LOSS]
    return Curves(step.recorded[LOSS].tolist(), answer.recorded[LOSS].tolist(), runs[0].tolist(),
                  widths(runs).tolist(), LIMITS["propagated"]["total"])


def _chaos(curves: Curves) -> list[str]:
    """What a wide band still excludes."""
    first, last = (curves.width[place] / abs(curves.exact[place] or 1.0) for place in (0, -1))
    told = [f"Band: torch's own runs lie {first:.1e} of the loss from float64 in the first step, {last:.1e} in the "
            f"last; a curve may lie {curves.limit:g} times as far."]
    if last > CHAOTIC:
        told.append(f"This training is chaotic: torch parts from itself by {last:.0%} of the loss. Its late steps can "
                    "only exclude what is larger; the first steps are judged as closely as ever. A smaller --lr or "
                    "fewer --steps keep the band narrow.")
    return told


def _values(step: Step, answer: Step) -> dict[str, tuple[float, float]]:
    theirs, ours = step.recorded, answer.recorded
    last = len(theirs[LOSS])
    found = {f"loss (step {number})": (float(theirs[LOSS][number - 1]), float(ours[LOSS][number - 1]))
             for number in dict.fromkeys((1, last))}
    return found | {name.removeprefix("value."): (float(value), float(ours[name])) for name, value in theirs.items()
                    if name.startswith("value.") and name in ours}


# The reference --------------------------------------------------------------------------------------------------------

class _Trained:
    """Torch's trainings: plain, in float64, and with sums reordered."""

    def __init__(self, session: Session, settings: Settings, given: Lessons, rows: int, resume: bool) -> None:
        self.session, self.settings, self.given, self.rows = session, settings, given, rows
        self._resume, self._kept = resume, []
        self._digest = digest_of(given.batches)
        self._place = (session.run.directory if session.options.only else session.reports) / PLACE
        if not resume:
            for left in self._place.glob("torch-*"):  # of a training that was broken off, perhaps with more runs
                left.unlink()

    def step(self, reordered: int) -> Step:
        """All that the reference has to say, with ``reordered`` runs in the band."""
        from .training import torch_side as torch_training
        session, settings = self.session, self.settings
        start = self._start()
        ways = {"plain": (torch_training.plain,), "float64": (torch_training.in_float64,)} | {
            f"reordered-{number}": (torch_training.reordered(number), torch_training.rounding(settings.recipe, number))
            for number in range(1, reordered + 1)}
        trained = {name: self._train(name, *way) for name, way in ways.items()}
        runs = [trained[name] for name in ("float64", "plain", *list(ways)[2:])]
        course, scores = trained["plain"]
        step = _of_course(session, course, scores)
        step.views[SCORED] = held_out.packed([scores for _, scores in runs])
        step.views[BAND] = {LOSS: np.array([one.losses for one, _ in runs]),
                            NORM: np.array([one.norms for one, _ in runs])}
        step.floors[MOVED] = {name: _floor([one.moved[name] for one, _ in runs], start["sizes"][name])
                              for name in course.moved}
        examples, shown = lessons.packed(self.given.held_out)
        step.views["shown"] = shown
        for number, several in enumerate(self.given.batches):
            for part, batch in enumerate(several):
                step.view(f"inputs.{number}.{part}").update(batch.inputs.arrays)
                step.view(f"labels.{number}.{part}").update(batch.labels)
        step.told |= {"settings": settings.as_json(), "inputs_digest": self._digest, "examples": examples,
                      "rows": self.rows, "base": _base(session, self.given), **start,
                      "notes": [*self.given.notes, *_told(settings, course)]}
        return step

    def forget(self) -> None:
        """A training that is over is not gone on with."""
        for kept in self._kept:
            kept.remove()

    def _train(self, name: str, *way: Any) -> tuple[Course, dict[str, np.ndarray]]:
        from .training.torch_side import TorchTrainer
        session, side = self.session, self.session.reference
        kept = Checkpoint(self._place, f"torch-{name}", key_of(
            self.settings, batches=self._digest, source=session.run.conversion.source_digest, version=side.version),
            session.options.checkpoint_every, self._resume)
        self._kept.append(kept)
        with TorchTrainer(side, side.run, self.settings, True, *way).training(double=name == "float64") as trainer:
            course = carry_out(trainer, self.given.batches, self.settings, kept, session.advance)
            require_finite(course)
            require_moved(course, self.settings)
            with trainer.tested():
                scores = held_out.scored(side, self.given.held_out, session.run, self.rows)
            held_out.require_finite(session.run.head.task, scores)
            return course, scores

    def _start(self) -> dict[str, Any]:
        """What torch makes of the mistakes in stock; :class:`BadInput` where nothing can be dropped."""
        from .explanations.training import schedules, supposed
        from .optimizing.torch_side import rates_of
        from .training.torch_side import TorchTrainer
        side = self.session.reference
        with TorchTrainer(side, side.run, self.settings, trained=True).training() as trainer:
            found = supposed(trainer, self.session.run, self.given.batches, side.token_loss)
            if self.settings.dropout is not None and not trainer.drops:
                why = ("every rate in its config is 0, or it has none. Give a rate, as --dropout 0.1, or leave it out"
                       if self.settings.dropout == 0 else "it has none. Leave --dropout out")
                raise BadInput(f"{self.session.run.head.architecture} drops nothing: {why}.")
            return {"mistakes": found, "schedules": schedules(self.settings.recipe, rates_of), "sizes": trainer.sizes()}


def _floor(runs: Sequence[np.ndarray], size: float) -> NoiseFloor:
    """Of ``runs``, of which the first is in float64; its spread is one number for all elements.

    How far a weight has moved is the difference of two numbers of its ``size``, and each step rounds the weight.
    """
    errors = [run.astype(np.float64) - runs[0] for run in runs[1:]]
    spread = np.sqrt(np.mean([np.mean(np.square(error)) for error in errors]))
    oracle = runs[0].astype(np.float64)
    return NoiseFloor(oracle.reshape(len(oracle), -1) if oracle.ndim else oracle.reshape(1, 1), np.array([[spread]]),
                      float(max(np.abs(error).max(initial=0.0) for error in errors)), base=size)


def _of_course(session: Session, course: Course, scores: Mapping[str, np.ndarray]) -> Step:
    """What there is of one side."""
    values = held_out.values_of(session.run.head.task, scores)
    curves = {LOSS: course.losses, NORM: course.norms, RATES: course.rates}
    return Step({RECORDED: {**{name: np.array(curve) for name, curve in curves.items()},
                            **{f"value.{name}": np.array(value) for name, value in values.items()}},
                 MOVED: course.moved, SCORED: held_out.packed([scores])}, told={"drops": course.drops})


def _told(settings: Settings, course: Course) -> list[str]:
    dropped = {None: "nothing is dropped", 0: f"{len(course.drops)} places drop at their own rates, by the same seeded "
               "masks on both sides"}.get(settings.dropout, f"{len(course.drops)} places drop at rate "
                                          f"{settings.dropout}, by the same seeded masks on both sides")
    recipe = settings.recipe
    several = f" of {recipe.accumulate} micro-batches" if recipe.accumulate > 1 else ""
    warm = f" after {recipe.warmup} steps of warm-up" if recipe.warmup else ""
    some = max(1, min(5, settings.steps // 2))
    before, after = np.mean(course.losses[:some]), np.mean(course.losses[-some:])
    return [f"{recipe.steps} steps{several} of {recipe.optimizer} (rate {recipe.lr:g}, {recipe.schedule}{warm}, decay "
            f"{recipe.weight_decay:g} of matrices and none of biases and norms), clipped to a global norm of "
            f"{recipe.clip:g}, in training mode; {dropped}.",
            f"torch's loss goes from {before:.4g} to {after:.4g} (mean of {some} steps each)."]


def _base(session: Session, given: Lessons) -> float:
    return 1.0 if session.run.head.task in BARE else base_of(given.batches[0][0].labels, session.run.config)


def _lessons_of(step: Step) -> Lessons:
    settings = Settings.told(step.told["settings"])
    several = [[Batch(Inputs(step.view(f"inputs.{number}.{part}")), step.view(f"labels.{number}.{part}"))
                for part in range(settings.recipe.accumulate)] for number in range(settings.steps)]
    return Lessons(several, lessons.unpacked(step.told["examples"], step.view("shown")), [])


def _candidate_trainer(side: Any, settings: Settings, own: str | None) -> Any:
    """Of a Paddle net, or of a torch net that is compared with torch."""
    if side.framework != "torch":
        from .optimizing.own import OwnOptimizer
        from .training.paddle_side import PaddleTrainer
        return PaddleTrainer(side, settings, OwnOptimizer(own) if own else None)
    if own:
        raise BadInput(f"--candidate-optimizer {own} is for a Paddle net, and the candidate is a torch net.")
    from .training.torch_side import TorchTrainer
    return TorchTrainer(side, side.run, settings, trained=False)


def _settings(session: Session) -> Settings:
    options = session.options
    optimizer = options.optimizer or ("momentum" if session.run.head.inputs == "pixels" else "adamw")
    given = {one.name: getattr(options, one.name) for one in fields(Recipe) if hasattr(options, one.name)}
    recipe = Recipe(**{**given, "optimizer": optimizer, "lr": options.lr or USUAL[optimizer]})
    return Settings(recipe, options.dropout, options.seed)


def _rows(session: Session) -> int:
    return session.options.batch_size or ROWS[session.run.head.inputs == "pixels"]


def _refuse_paging(session: Session) -> None:
    if session.paged:
        raise BadInput("a training holds weights, gradients and moments in memory, and here weights would come in "
                       "block by block (--paging on, or the model does not fit). align.backward compares the gradients "
                       "of such a model.")


STAGE = RecordedStage("train", "Fine-tune both sides on the same batches and compare their curves with torch's band.",
                      reference, candidate, judge, flags, of_candidate=("candidate_optimizer",),
                      of_both=("checkpoint_every", "resume"), copies=COPIES)

if __name__ == "__main__":
    sys.exit(main(STAGE))
