"""Inside the blocks: sublayers compared the same way, so that the report ends at one layer or one operation.

In one pass every sublayer is fed what entered torch's. A sublayer's output then shows that sublayer alone, and what
arrives at it shows the operation before it alone: rotary, scale, mask and softmax before the attention's output
projection, the activation before the second linear, the residual before a norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from .compare import TensorResult, compare
from .inputs import Inputs
from .noise import NoiseFloor
from .runs import Run
from .stage import Session
from .tasks import token_rows
from .tolerance import FORWARD

Module = tuple[tuple[str, str], list[tuple[str, str, str]]]
BUDGET = 2 << 30
SMALL = 1e-3
PROBE = " (small input)"


def judge_sublayers(session: Session, inputs: Inputs) -> list[TensorResult]:
    """The sublayers of every module for which the family names them, in the order of execution.

    A small fault may drown in its block's noise and still stand out of its sublayer's by a factor of 50. As many
    modules are taken together in a pass as memory allows.
    """
    if not session.reference.has_room_for_float64:
        return []
    found = [module for _, name in session.run.modules if (module := sublayers_of(session.run, name))]
    size = max(1, BUDGET // max(1, _bytes_a_module(session.run, inputs)))
    return [result for start in range(0, len(found), size)
            for result in _judge(session, inputs, found[start: start + size])]


def _judge(session: Session, inputs: Inputs, found: Sequence[Module]) -> Iterator[TensorResult]:
    modules = [pair for block, sublayers in found for pair in (block, *((torch, name) for torch, name, _ in sublayers))]
    recorded, entering = session.reference.record_inside(inputs, modules)
    outputs, arriving = session.candidate.record_inside(inputs, modules, entering)
    floors, arrival_floors = session.reference.floors_inside(inputs, modules, recorded, entering)
    for (_, module), sublayers in found:
        for _, name, operation in sublayers:
            if name in entering and name in arriving:
                expected = token_rows(name, entering[name], inputs.mask)
                yield _isolated(f"{module}: {operation}", expected, arriving[name], arrival_floors[name])
            if name in recorded and name in outputs:
                yield _isolated(name, recorded[name], outputs[name], floors[name])
        if module in recorded and module in outputs:
            yield _isolated(f"{module}: output", recorded[module], outputs[module], floors[module])


def _isolated(name: str, reference: np.ndarray, candidate: np.ndarray, floor: NoiseFloor) -> TensorResult:
    return compare(name, reference, candidate, FORWARD, candidate, {"isolated": floor})


def _bytes_a_module(run: Run, inputs: Inputs) -> int:
    """About what one block's sublayers take: inputs and outputs of each, in some float64 copies."""
    width = 10 * run.sizes["hidden"] + 4 * run.sizes["inner"]
    return inputs.mask.size * width * 8 * 6


def probe_norms(session: Session, inputs: Inputs) -> list[TensorResult]:
    """Every layer norm on a small input, where its epsilon shows.

    On the activations of a late block the variance is so much larger that a wrong epsilon hides in the last bits;
    scaled to an rms of 1e-3, a variance of 1e-6, even 1e-7 for 1e-12 moves the output by a twentieth.
    """
    norms = session.reference.norms(all_sublayers(session.run))
    if not norms or not session.reference.has_room_for_float64:
        return []
    _, entering = session.reference.record_inside(inputs, norms)
    small = {name: small_input(array) for name, array in entering.items()}
    recorded, _ = session.reference.record_inside(inputs, norms, small)
    outputs, _ = session.candidate.record_inside(inputs, norms, small)
    floors, _ = session.reference.floors_inside(inputs, norms, recorded, small)
    return [_isolated(f"{name}{PROBE}", recorded[name], outputs[name], floors[name])
            for _, name in norms if name in outputs]


def small_input(array: np.ndarray) -> np.ndarray:
    """``array`` scaled to an rms of 1e-3."""
    return array * np.float32(SMALL / max(float(np.sqrt(np.mean(np.square(array)))), 1e-30))


def all_sublayers(run: Run) -> list[tuple[str, str]]:
    """(torch, Paddle) path of every recorded module and of every sublayer that the family names."""
    found = []
    for torch_path, name in run.modules:
        inside = sublayers_of(run, name)
        found += [(torch_path, name), *((torch, paddle) for torch, paddle, _ in (inside[1] if inside else []))]
    return found


def sublayers_of(run: Run, module: str) -> Module | None:
    """((torch, Paddle) path of the module, the same and the operation before it for each of its sublayers)."""
    torch_path = {paddle: torch for torch, paddle in run.modules}.get(module)
    prefix = run.family.prefix if run.head.base else ""
    template = prefix + re.sub(r"\.\d+(?=\.|$)", ".{i}", module)
    inside = run.family.inside.get(template)
    if torch_path is None or inside is None:
        return None
    return (torch_path, module), [(f"{torch_path}.{torch}", f"{module}.{paddle}", f"{operation}, before {paddle}")
                                  for torch, paddle, operation in inside]
