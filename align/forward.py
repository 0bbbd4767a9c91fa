"""``python -m align.forward``: embeddings, every block, final hidden states and logits, on the same inputs."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

from .compare import TensorResult, compare, missing
from .inputs import seeded
from .stage import Findings, Session, Stage, main
from .tolerance import FORWARD


def find(session: Session) -> Findings:
    """Each module twice: in one pass of its own (propagated), and fed the reference's input (isolated)."""
    inputs = seeded(session.run.config, session.run.sizes)
    inputs.save(session.reports / "traces" / "forward_inputs.npz")
    reference, entering = session.reference.record(inputs, lambda name: session.advance(f"torch {name}"))
    candidate = session.candidate.record(inputs, on_module=lambda name: session.advance(f"paddle {name}"))
    isolated = session.candidate.record(inputs, entering, lambda name: session.advance(f"paddle {name}, isolated"))
    judged = {name: array for name, array in isolated.items() if name in entering}
    notes = [*inputs.notes, f"Inputs: {inputs.mask.shape[0]} rows of {inputs.mask.shape[1]} seeded tokens: whole, "
                            "padded left, right, and on both sides; padded positions are not compared."]
    return Findings(compare_traces(reference, candidate, judged), inputs.digest, reference, candidate, notes)


def compare_traces(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray],
                   isolated: Mapping[str, np.ndarray]) -> list[TensorResult]:
    """One result per name that either side recorded, in the reference's order."""
    shared = [compare(name, array, candidate[name], FORWARD, isolated.get(name)) if name in candidate
              else missing(name, "candidate") for name, array in reference.items()]
    return shared + [missing(name, "reference") for name in candidate
                     if name not in reference and name not in UNASKED]


UNASKED = frozenset({"bert.pooler", "pooler_output"})
STAGE = Stage("forward", "Compare embeddings, blocks, final hidden states and logits.", find)

if __name__ == "__main__":
    sys.exit(main(STAGE))
