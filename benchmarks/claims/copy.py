"""Conversion against ``cp`` of the same checkpoint: neither syncs, both find the page cache in the same state."""

from __future__ import annotations

from ..bench import Bench, settle
from ..claim import Claim, Limit, Measured, paired
from ..shapes import Shape

RIVAL = "`cp -r` of the source"


def beside_cp(bench: Bench, shape: Shape, pairs: int, *flags: str, warm: bool) -> Measured:
    """Wall time, pair by pair; what a side wrote is deleted and the disk is quiet before the next begins."""
    source = bench.source(shape)

    def convert() -> float:
        with bench.scratch("copied") as target:
            settle(source, warm=warm)
            return bench.convert(shape, target, *flags).seconds

    def copy() -> float:
        with bench.scratch("copied") as target:
            settle(source, warm=warm)
            return bench.run("cp", "-r", source, target).seconds

    ours, rival = bench.alternately(f"convert {' '.join(flags)} and cp of {shape.name}", convert, copy, pairs)
    cached = "in the page cache" if warm else "not in the page cache"
    return paired(ours, rival, "s", notes=(f"{shape.nbytes / 1e9:.2f} GB, {cached} before each side.",))


CLAIMS = (
    Claim("copy.stream", "4 layers of GPT-J in float16 are converted (`--no-verify`) at the speed of a copy",
          Limit(1.1, "x"), RIVAL,
          lambda bench: beside_cp(bench, bench.scale.copied, bench.scale.pairs, "--no-verify", warm=True),
          lambda scale: (scale.copied,)),
    Claim("copy.verified", "the same with the read-back that is on by default", Limit(2, "x"), RIVAL,
          lambda bench: beside_cp(bench, bench.scale.copied, bench.scale.pairs, warm=True),
          lambda scale: (scale.copied,)),
)
LARGE = (
    Claim("copy.large", "28 layers of GPT-J in float16 are converted (`--no-verify`) faster than they are copied",
          Limit(0.75, "x"), RIVAL,
          lambda bench: beside_cp(bench, bench.scale.large, bench.scale.large_pairs, "--no-verify", warm=False),
          lambda scale: (scale.large,)),
    Claim("copy.large-verified", "28 layers of GPT-J in float16, read back", Limit(2, "x"), RIVAL,
          lambda bench: beside_cp(bench, bench.scale.large, 1, warm=False), lambda scale: (scale.large,)),
)
