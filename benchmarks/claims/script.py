"""Conversion against the script that people copy today: load all, transpose what has two dimensions, save all."""

from __future__ import annotations

from ..bench import Bench, Ran, settle
from ..claim import Claim, Limit, Measured, paired
from ..shapes import Shape

PAIRS = 3
RIVAL = "the copied script (load all, transpose, `paddle.save`)"


def copied_script(bench: Bench, shape: Shape) -> Ran:
    """One run of the script on the checkpoint of ``shape``; its result is deleted."""
    source = bench.source(shape)
    with bench.scratch("scripted") as target:
        target.mkdir()
        settle(source, warm=True)
        return bench.python("-m", "benchmarks.rivals.copied_script", source, target / "model_state.pdparams")


def beside_script(bench: Bench) -> Measured:
    """How many times as fast as the script, both to ``.pdparams`` and without a read-back."""
    shape = bench.scale.copied
    source = bench.source(shape)

    def convert() -> float:
        with bench.scratch("scripted") as target:
            settle(source, warm=True)
            return bench.convert(shape, target, "--format", "pdparams", "--no-verify").seconds

    ours, rival = bench.alternately(f"convert --format pdparams and the copied script on {shape.name}", convert,
                                    lambda: copied_script(bench, shape).seconds, PAIRS)
    return paired(ours, rival, "s", inverse=True)


CLAIMS = (
    Claim("script", "4 layers of GPT-J in float16 become `.pdparams` many times faster than by the copied script",
          Limit(8, "times as fast", at_least=True), RIVAL, beside_script, lambda scale: (scale.copied,)),
)
