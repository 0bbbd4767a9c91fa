"""``python -m align.example``: one run that passes and one that fails, for reading before anything is installed.

Both are the demo GPT-J. In the second one a square matrix was left untransposed, as scripts do whose list of what to
transpose misses a name: no shape tells.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from convert import errors, gptj
from convert.cli import main as convert
from convert.demo import build_demo

from . import forward, loss, metric, weights
from .stage import main as align

PASSING, FAILING = "gptj-aligned", "gptj-diverged"
LEFT_ALONE = "transformer.h.1.attn.q_proj.weight"
HERE = Path("reports/example")


def main() -> int:
    """Replace ``reports/example/`` of the directory that this is called in."""
    return errors.guarded(lambda: _make(HERE.resolve()))


def _make(example: Path) -> int:
    with TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        source = build_demo(gptj.FAMILY, Path("checkpoints/gptj"))
        for run in (PASSING, FAILING):
            _quietly(errors.ALIGNED, convert, gptj.FAMILY, ["--source", str(source), "--output", f"out/{run}"])
        _leave_untransposed(Path("out") / FAILING / "model.safetensors")
        for stage in (weights, forward, metric, loss):
            _quietly(errors.ALIGNED, align, stage.STAGE, ["--run", PASSING])
        for stage in (weights, forward):
            _quietly(errors.DIVERGED, align, stage.STAGE, ["--run", FAILING])
        shutil.rmtree(example, ignore_errors=True)
        for run in (PASSING, FAILING):
            shutil.copytree(Path("reports") / run, example / run, ignore=shutil.ignore_patterns("traces"))
    for page in sorted(example.glob("*/index.html")):
        print(os.path.relpath(page))
    return errors.ALIGNED


def _quietly(expected: int, run: Callable[..., int], *arguments: object) -> None:
    """Call a command line; RuntimeError with what it said when it ends otherwise than expected."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(*arguments)
    if code != expected:
        raise RuntimeError(f"{arguments} ended with {code} instead of {expected}: {said.getvalue()}")


def _leave_untransposed(file: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file
    tensors = load_file(file)
    save_file(tensors | {LEFT_ALONE: np.ascontiguousarray(tensors[LEFT_ALONE].T)}, file, {"format": "np"})


if __name__ == "__main__":
    sys.exit(main())
