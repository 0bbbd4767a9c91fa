"""``python -m align.example``: a run that passes and two that fail, for reading before anything is installed.

The first two are the demo GPT-J. In the second one a square matrix was left untransposed, as scripts do whose list of
what to transpose misses a name: no shape tells. The third is the known story of a home-made GPT-2 that was given
OpenAI's weights: its class says 8 heads instead of 12, which no shape tells either.
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

from convert import back, errors, gpt2, gptj
from convert.__main__ import main as convert_own
from convert.cli import main as convert
from convert.demo import build_demo

from . import forward, loss, metric, weights
from .stage import main as align

PASSING, FAILING = "gptj-aligned", "gptj-diverged"
LEFT_ALONE = "transformer.h.1.attn.q_proj.weight"
STORY = "gpt2-eight-heads"
STORY_SHAPE = {"n_embd": 48, "n_head": 12, "n_layer": 2, "embd_pdrop": 0.1}
"""As 768 is, 48 is a multiple of 12 and of 8."""
THEIR_FAMILY = Path(__file__).resolve().parents[1] / "examples" / "eight_heads.py"
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
        _tell_the_story()
        shutil.rmtree(example, ignore_errors=True)
        for run in (PASSING, FAILING, STORY):
            shutil.copytree(Path("reports") / run, example / run, ignore=shutil.ignore_patterns("traces"))
    for page in sorted(example.glob("*/index.html")):
        print(os.path.relpath(page))
    return errors.ALIGNED


def _tell_the_story() -> None:
    """OpenAI's weights into the home-made net, and Paddle's net of the same weights against it."""
    openais = build_demo(gpt2.FAMILY, Path("checkpoints/gpt2"), STORY_SHAPE)
    own = ["--family", str(THEIR_FAMILY)]
    _quietly(errors.ALIGNED, convert, gpt2.FAMILY, ["--source", str(openais), "--output", "out/gpt2"])
    _quietly(errors.ALIGNED, back.main, [*own, "--source", "out/gpt2", "--output", "checkpoints/home-made"])
    their_weights = Path("checkpoints/home-made/model.safetensors")
    their_weights.rename("checkpoints/home-made.safetensors")
    _quietly(errors.ALIGNED, convert_own, [*own, "--source", "checkpoints/home-made.safetensors", "--output",
                                           f"out/{STORY}"])
    _quietly(errors.ALIGNED, align, weights.STAGE, ["--run", STORY, *own])
    _quietly(errors.DIVERGED, align, forward.STAGE, ["--run", STORY, *own])


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
