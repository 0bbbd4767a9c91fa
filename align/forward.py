"""``python -m align.forward``: embeddings, every block, final hidden states and logits, on the same inputs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from .compare import TensorResult, compare, missing
from .diagnose import Explanation, diagnose
from .inputs import Inputs, seeded
from .inside import PROBE, all_sublayers, judge_sublayers, probe_norms
from .noise import Kind, NoiseFloor
from .runs import Run
from .scores import log_softmax
from .stage import Findings, Session, Stage, main
from .tolerance import FORWARD, REORDERED_RUNS, margin_noise


def find(session: Session) -> Findings:
    """Each module twice: in one pass of its own (propagated), and fed the reference's input (isolated).

    The layer norms once more on a small input, and the sublayers, all in the order of execution. A module that torch's
    class does not have, such as the pooler of PaddleNLP's masked LM, is not compared.
    """
    inputs = seeded(session.run.config, session.run.sizes)
    inputs.save(session.reports / "traces" / "forward_inputs.npz")
    reference, entering = session.reference.record(inputs, lambda name: session.advance(f"torch {name}"))
    candidate = session.candidate.record(inputs, on_module=lambda name: session.advance(f"paddle {name}"))
    isolated = session.candidate.record(inputs, entering, lambda name: session.advance(f"paddle {name}, isolated"))
    floors = session.reference.noise_floors(inputs, reference, entering, session.advance)
    absent = {name for _, name in session.run.modules} - reference.keys()
    candidate, isolated = ({name: array for name, array in recorded.items() if name not in absent}
                           for recorded in (candidate, isolated))
    tensors = compare_traces(reference, candidate, isolated, floors)
    session.advance("layer norms on a small input")
    probes = probe_norms(session, inputs)
    session.advance("sublayers")
    sublayers = judge_sublayers(session, inputs)
    tensors = sorted([*tensors, *probes], key=lambda tensor: position(tensor.name, session.run))
    bad = first_bad(tensors, session.run)
    named = _named(sublayers, bad, session.run)
    diagnosis = _diagnosis(session, inputs, reference, entering, isolated, floors, bad)
    present = [name for _, name in session.run.modules if name in reference]
    notes = [*inputs.notes, *_told(inputs, bool(floors)),
             *unjudged(session.run, present, [*probes, *sublayers], bool(floors)),
             *agreement(reference, candidate), *lint(session.run)]
    return Findings(tensors, inputs.digest, reference, candidate, notes, sublayers=sublayers, named=named,
                    diagnosis=diagnosis)


def first_bad(tensors: Sequence[TensorResult], run: Run) -> TensorResult | None:
    """The first module that fails on the reference's own input; else the first that fails at all.

    An output of the whole model has no input of its own: its error may be its modules' wiring.
    """
    modules = {name for _, name in run.modules}
    failing = [tensor for tensor in tensors if not tensor.passed]
    own = [tensor for tensor in failing if tensor.name.removesuffix(PROBE) in modules and (
        not tensor.judgements or any(found.kind == "isolated" and not found.passed for found in tensor.judgements))]
    return next(iter(own or failing), None)


def position(name: str, run: Run) -> int:
    """Where in the order of execution the module lies that ``name`` is, or is a part of; outputs come last."""
    paths = [path for _, path in run.modules]
    holding = [number for number, path in enumerate(paths) if name == path or name.startswith((f"{path}.", f"{path}:",
                                                                                              f"{path} "))]
    return max(holding, key=lambda number: len(paths[number]), default=len(paths))


def unjudged(run: Run, present: Sequence[str], parts: Sequence[TensorResult], floored: bool) -> list[str]:
    """What was not judged on its own: sublayers of the modules ``present`` that this net has no module for."""
    if not floored:
        return ["Sublayers, and layer norms on a small input, were not judged: they need torch in float64."]
    judged = {part.name.removesuffix(PROBE) for part in parts}
    absent = [name for _, name in all_sublayers(run)
              if name not in judged and any(name.startswith(f"{module}.") for module in present)]
    more = f" (+{len(absent) - 6} more)" if len(absent) > 6 else ""
    return [f"Not judged on their own, because this net has no such module or does not call it: {', '.join(absent[:6])}"
            f"{more}. A wrong epsilon there may not show."] if absent else []


def _named(sublayers: Sequence[TensorResult], bad: TensorResult | None, run: Run) -> str | None:
    """The first failing sublayer or operation, unless a module or a norm's epsilon fails in an earlier module."""
    inside = next((part.name for part in sublayers if not part.passed), None)
    place = bad and bad.name.replace(PROBE, ": epsilon")
    if inside is None or place is None:
        return inside or place
    return place if position(place, run) < position(inside, run) else inside


def _diagnosis(session: Session, inputs: Inputs, reference: Mapping[str, np.ndarray],
               entering: Mapping[str, np.ndarray], isolated: Mapping[str, np.ndarray],
               floors: Mapping[str, Mapping[Kind, NoiseFloor]], bad: TensorResult | None) -> Explanation | None:
    """Why: of the weight that differs, else of the first bad place."""
    name = session.weights_divergence or (bad and bad.name)
    if name is None or not floors:
        return None
    session.advance(f"looking for an explanation of {name}")
    return diagnose(session, inputs, reference, entering, isolated, floors, name)


def agreement(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> list[str]:
    """For each output of class scores: KL divergence, and agreement of the best and the five best classes.

    Only rows count in which the margin between the scores in question exceeds what rounding can move.
    """
    told = []
    for name, expected in reference.items():
        found = candidate.get(name)
        if not name.endswith("logits") or expected.ndim != 2 or expected.shape[1] < 2 or found is None:
            continue
        if found.shape != expected.shape or not np.isfinite(found).all():
            continue
        left, right = log_softmax(expected), log_softmax(found)
        divergence = float((np.exp(left) * (left - right)).sum(-1).mean())
        shares = [top_agreement(expected, found, count) for count in (1, 5) if count < expected.shape[1]]
        equal = ", ".join(f"top-{count} equal in {same} of {sure}" for count, same, sure in shares)
        told.append(f"{name}: KL divergence {max(divergence, 0.0):.1e}; {equal} rows whose margin exceeds rounding.")
    return told


def top_agreement(expected: np.ndarray, found: np.ndarray, count: int) -> tuple[int, int, int]:
    """(count, rows with the same ``count`` best classes, rows in which rounding cannot decide which they are)."""
    ordered = np.sort(expected, axis=-1)
    sure = ordered[:, -count] - ordered[:, -count - 1] > margin_noise(1.0) * np.abs(expected).max(-1)
    best = [np.sort(np.argpartition(scores, -count, axis=-1)[:, -count:], axis=-1) for scores in (expected, found)]
    return count, int(((best[0] == best[1]).all(-1) & sure).sum()), int(sure.sum())


def lint(run: Run) -> list[str]:
    """What the output's config says differently from what the conversion of this source writes."""
    held, intended = run.target_config, run.intended_config
    return [f"config.json: {key} is {held.get(key)!r} in the output; the conversion wrote {intended.get(key)!r}."
            for key in sorted(held.keys() | intended.keys()) if held.get(key) != intended.get(key)]


def _told(inputs: Inputs, floored: bool) -> list[str]:
    yardstick = (f"torch's own rounding error, pooled over float64 against {REORDERED_RUNS + 1} float32 runs with "
                 "their sums reordered" if floored else
                 "the fixed ceiling, because there is no memory for torch in float64 beside the model")
    rows, tokens = inputs.mask.shape
    return [f"Inputs: {rows} rows of {tokens} seeded tokens: whole, padded left, right, and on both sides; padded "
            "positions are not compared.", f"Yardstick: {yardstick}."]


def compare_traces(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray],
                   isolated: Mapping[str, np.ndarray],
                   floors: Mapping[str, Mapping[Kind, NoiseFloor]]) -> list[TensorResult]:
    """One result per name that either side recorded, in the reference's order."""
    shared = [compare(name, array, candidate[name], FORWARD, isolated.get(name), floors.get(name))
              if name in candidate else missing(name, "candidate") for name, array in reference.items()]
    return shared + [missing(name, "reference") for name in candidate if name not in reference]


STAGE = Stage("forward", "Compare embeddings, blocks, final hidden states and logits.", find)

if __name__ == "__main__":
    sys.exit(main(STAGE))
