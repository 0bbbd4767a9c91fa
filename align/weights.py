"""``python -m align.weights``: what the Paddle side really holds, inverted, against the source, bit by bit."""

from __future__ import annotations

import sys

from .evidence import compare_weights
from .stage import Findings, Session, Stage, main


def find(session: Session) -> Findings:
    """Every tensor of the plan, and every tensor that the candidate holds beyond it."""
    results, notes = compare_weights(session.run, session.candidate)
    dtype = session.run.conversion.dtype
    cast = [] if dtype == "keep" else [f"The conversion cast to {dtype}: compared with the source rounded to it."]
    return Findings(results, [*cast, *notes])


STAGE = Stage("weights", "Compare what the Paddle side holds with the source, bit by bit.", find)

if __name__ == "__main__":
    sys.exit(main(STAGE))
