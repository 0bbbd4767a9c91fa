"""``python -m align``: every stage in order, on one run; stops at the first that is not aligned."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from convert.cli import described

from . import forward, loss, metric, weights
from .stage import RecordedStage, add_flags, main

STAGES = (weights.STAGE, forward.STAGE, metric.STAGE, loss.STAGE)


def run_all(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the first stage that is not aligned, else 0."""
    parser = described("python -m align", "Every stage in order: weights, forward, metric, loss. Stops at the first "
                       "that is not aligned, and ends with its exit code.", (
                           "python -m align", "python -m align --run gpt-j-6b --target paddlenlp",
                           "python -m align.forward --help   (a stage by itself, and its own flags)"))
    add_flags(parser)
    options = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    apart = options.only or options.compare
    stages = [stage for stage in STAGES if not apart or isinstance(stage, RecordedStage)]
    return next((code for stage in stages if (code := main(stage, given))), 0)


if __name__ == "__main__":
    sys.exit(run_all())
