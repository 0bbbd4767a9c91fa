"""Inside a bad block: its sublayers compared the same way, so that the report ends at one layer or one operation.

In one pass every sublayer is fed what entered torch's. A sublayer's output then shows that sublayer alone, and what
arrives at it shows the operation before it alone: rotary, scale, mask and softmax before the attention's output
projection, the activation before the second linear, the residual before a norm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .compare import TensorResult, compare
from .inputs import Inputs
from .runs import Run
from .stage import Session
from .tasks import token_rows
from .tolerance import FORWARD

SMALL = 1e-3
PROBE = " (small input)"


@dataclass(frozen=True)
class Inside:
    """What was found inside ``module``; ``named`` is the first sublayer or operation that fails, None if none does."""

    module: str
    results: list[TensorResult]
    named: str | None


def look_inside(session: Session, inputs: Inputs, module: str) -> Inside | None:
    """Compare the sublayers of the module at this Paddle path; None where the family does not say what they are."""
    found = _sublayers(session.run, module)
    if found is None or not session.reference.has_room_for_float64():
        return None
    block, sublayers = found
    modules = [block, *((torch, paddle) for torch, paddle, _ in sublayers)]
    recorded, entering = session.reference.record_inside(inputs, modules)
    outputs, arriving = session.candidate.record_inside(inputs, modules, entering)
    floors, arrival_floors = session.reference.floors_inside(inputs, modules, recorded, entering)
    results: list[TensorResult] = []
    for _, name, operation in sublayers:
        if name in entering and name in arriving:
            told = f"{module}: {operation}"
            results.append(compare(told, token_rows(name, entering[name], inputs.mask), arriving[name], FORWARD,
                                   arriving[name], {"isolated": arrival_floors[name]}))
        if name in recorded and name in outputs:
            results.append(compare(name, recorded[name], outputs[name], FORWARD, outputs[name],
                                   {"isolated": floors[name]}))
    last = compare(f"{module}: output", recorded[module], outputs[module], FORWARD, outputs[module],
                   {"isolated": floors[module]})
    results.append(last)
    return Inside(module, results, next((result.name for result in results if not result.passed), None))


def probe_norms(session: Session, inputs: Inputs) -> list[TensorResult]:
    """Every layer norm on a small input, where its epsilon shows.

    On the activations of a late block the variance is so much larger that a wrong epsilon hides in the last bits;
    scaled to an rms of 1e-3, a variance of 1e-6, even 1e-7 for 1e-12 moves the output by a twentieth.
    """
    norms = session.reference.norms(_all_sublayers(session.run))
    if not norms or not session.reference.has_room_for_float64():
        return []
    _, entering = session.reference.record_inside(inputs, norms)
    small = {name: array * np.float32(SMALL / max(float(np.sqrt(np.mean(np.square(array)))), 1e-30))
             for name, array in entering.items()}
    recorded, _ = session.reference.record_inside(inputs, norms, small)
    outputs, _ = session.candidate.record_inside(inputs, norms, small)
    floors, _ = session.reference.floors_inside(inputs, norms, recorded, small)
    return [compare(f"{name}{PROBE}", recorded[name], outputs[name], FORWARD, outputs[name],
                    {"isolated": floors[name]}) for _, name in norms if name in outputs]


def _all_sublayers(run: Run) -> list[tuple[str, str]]:
    """(torch, Paddle) path of every recorded module and of every sublayer that the family names."""
    found = []
    for torch_path, name in run.modules:
        inside = _sublayers(run, name)
        found += [(torch_path, name), *((torch, paddle) for torch, paddle, _ in (inside[1] if inside else []))]
    return found


def _sublayers(run: Run, module: str) -> tuple[tuple[str, str], list[tuple[str, str, str]]] | None:
    """((torch, Paddle) path of the module, the same and the operation before it for each of its sublayers)."""
    torch_path = {paddle: torch for torch, paddle in run.modules}.get(module)
    prefix = run.family.prefix if run.head.base else ""
    template = prefix + re.sub(r"\.\d+(?=\.|$)", ".{i}", module)
    inside = run.family.inside.get(template)
    if torch_path is None or inside is None:
        return None
    return (torch_path, module), [(f"{torch_path}.{torch}", f"{module}.{paddle}", f"{operation}, before {paddle}")
                                  for torch, paddle, operation in inside]
