"""The memory of a conversion: bounded by a tile, whatever the dtype, the container and the number of layers."""

from __future__ import annotations

from collections.abc import Callable

from ..bench import Bench, Unmeasured, settle
from ..claim import Claim, Limit, Measured, absolute, growth
from ..shapes import Scale, Shape
from .script import RIVAL, copied_script

MEGABYTES = 128
PERCENT = 5
RUNS = 2


def peak(bench: Bench, shape: Shape, *flags: str) -> int:
    """Peak resident set in bytes of one conversion with read-back."""
    source = bench.source(shape)
    with bench.scratch("measured") as target:
        settle(source, warm=True)
        return bench.convert(shape, target, *flags).peak_rss


def beside_script(bench: Bench, shape: Shape, *flags: str) -> Measured:
    """The greatest of a few runs, beside what the copied script takes for this checkpoint."""
    bench.tell(f"memory of convert {' '.join(flags)} on {shape.name}")
    ours = [peak(bench, shape, *flags) for _ in range(RUNS)]
    bench.tell(f"memory of the copied script on {shape.name}")
    try:
        rival, notes = [bench.once(("script", shape), lambda: copied_script(bench, shape).peak_rss)], ()
    except Unmeasured as error:
        rival, notes = [], (f"The copied script did not get through: {error}",)
    return absolute(ours, rival, "B", scale=1e6, pick=max, notes=notes)


def over_layers(bench: Bench) -> Measured:
    """The growth of the peak from the fewest to the most layers."""
    peaks = {}
    for shape in deep(bench.scale):
        bench.tell(f"memory of convert on {shape.name}")
        peaks[shape.layers] = max(peak(bench, shape) for _ in range(RUNS))
        bench.release(shape)
    return growth(peaks)


def deep(scale: Scale) -> tuple[Shape, ...]:
    return tuple(scale.deep.layered(layers) for layers in scale.layers)


def _bounded(name: str, what: str, shape: Callable[[Scale], Shape], *flags: str) -> Claim:
    return Claim(f"memory.{name}", f"converting {what} takes little memory", Limit(MEGABYTES, "MB"), RIVAL,
                 lambda bench: beside_script(bench, shape(bench.scale), *flags), lambda scale: (shape(scale),),
                 timed=False)


CLAIMS = (
    _bounded("float16", "float16", lambda scale: scale.copied),
    _bounded("pdparams", "float16 to `.pdparams`", lambda scale: scale.copied, "--format", "pdparams"),
    _bounded("float32", "float32", lambda scale: scale.float32),
    _bounded("cast", "float32 with `--dtype float16`", lambda scale: scale.float32, "--dtype", "float16"),
    _bounded("bin", "a zip `.bin`", lambda scale: scale.zipped),
)
LARGE = (
    Claim("memory.flat", "the memory of a conversion does not grow with the number of layers", Limit(PERCENT, "%"),
          "the fewest layers", over_layers, deep, timed=False),
)
