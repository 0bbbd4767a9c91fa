"""Alignment of a model larger than memory: its time, its memory, and that paging changes no number."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bench import Bench, Ran, Unmeasured, settle
from ..claim import Claim, Limit, Measured, absolute, growth, paired
from ..shapes import Scale, Shape

ROWS, TOKENS = 2, 64
MEGABYTES = 3000
PERCENT = 5
BESIDE = ("verdict", "sublayers", "values", "inputs_digest", "reference", "candidate")
PASSES = "one torch-only and one Paddle-only paged pass"


@dataclass(frozen=True)
class Alignment:
    """One alignment: what it took, and its report."""

    ran: Ran
    report: dict[str, Any]


def align(bench: Bench, shape: Shape, paging: str, stage: str = "forward") -> Alignment:
    """``align.forward`` with noise floor and isolated blocks, or ``align.quick`` without; :class:`Unmeasured` unless
    it says aligned.
    """
    run = bench.converted(shape)
    told = f"align.{stage} --paging {paging} on {shape.name}"
    bench.tell(told)
    _settle(bench, shape)
    ran = bench.python("-m", f"align.{stage}", "--run", run, "--paging", paging, "--rows", str(ROWS),
                       "--tokens", str(TOKENS), "--reports", bench.reports, accept=(0, 1))
    report = bench.reports / run / f"{stage}.json"
    if not report.is_file():
        raise Unmeasured(f"{told} wrote no report.")
    found = json.loads(report.read_text("utf-8"))
    if ran.code:
        raise Unmeasured(f"{told} says {found['verdict']}, first at {found['first_divergence']}.")
    return Alignment(ran, found)


def passes(bench: Bench, shape: Shape) -> tuple[Ran, Ran, float]:
    """Both single passes, and the relative L2 between their logits: that they computed the same model."""
    converted = bench.outputs / bench.converted(shape)
    bench.tell(f"one paged pass of torch and one of Paddle on {shape.name}")
    with bench.scratch("passes") as directory:
        directory.mkdir()
        rans = []
        for framework, weights in (("torch", bench.source(shape)), ("paddle", converted)):
            _settle(bench, shape)
            rans.append(bench.python("-m", f"benchmarks.rivals.{framework}_paged", weights,
                                     directory / f"{framework}.npy", str(ROWS), str(TOKENS)))
        torch, paddle = (np.load(directory / f"{name}.npy").astype(np.float64) for name in ("torch", "paddle"))
    return *rans, float(np.linalg.norm(paddle - torch) / np.linalg.norm(torch))


def seconds(bench: Bench, stage: str) -> Measured:
    """Alignment beside the two passes, alternately; the first alignment is shared with the claims on its memory."""
    shape = bench.scale.paged
    distances: list[float] = []
    fresh = [lambda: align(bench, shape, "on", stage)] * (bench.scale.passes - 1)
    alignments = iter([lambda: _paged(bench, shape, stage), *fresh])

    def both() -> float:
        torch, paddle, distance = passes(bench, shape)
        distances.append(distance)
        return torch.seconds + paddle.seconds

    ours, rival = bench.alternately(f"align.{stage} and single passes of {shape.name}",
                                    lambda: next(alignments)().ran.seconds, both, bench.scale.passes)
    return paired(ours, rival, "s", notes=(f"The logits of the two passes are {max(distances):.1e} apart in relative "
                                           "L2.",))


def memory(bench: Bench, stage: str) -> Measured:
    """The peak of one paged alignment, beside the bytes of the model in float32 on both sides."""
    shape = bench.scale.paged
    alignment = _paged(bench, shape, stage)
    elements = sum(tensor.elements for tensor in shape.tensors)
    return absolute((alignment.ran.peak_rss,), (2.0 * 4 * elements,), "B", scale=1e6, pick=max)


def over_layers(bench: Bench) -> Measured:
    """How far peaks lie apart from the fewest to the most layers, each the least of as many runs as the scale says.

    When memory is given back hangs on which thread runs first: of a gigabyte that is 3 % to either side, now and then
    6. What a layer leaves behind is in every run.
    """
    peaks = {}
    for shape in deep(bench.scale):
        again = [align(bench, shape, "on").ran.peak_rss for _ in range(1, bench.scale.peaks)]
        peaks[shape.layers] = min([_paged(bench, shape).ran.peak_rss, *again])
        bench.release(shape)
    found = growth(peaks)
    return replace(found, notes=(*found.notes, f"Least of how many runs: {bench.scale.peaks}."))


def same_numbers(bench: Bench) -> Measured:
    """How many entries of ``tensors`` in forward.json differ between a paged and an unpaged run, in any number."""
    paged, whole = _paged(bench, bench.scale.fits), _whole(bench, bench.scale.fits)
    differing = differing_tensors(paged.report, whole.report)
    verdicts = f"Verdicts: {paged.report['verdict']} paged, {whole.report['verdict']} in memory."
    shown = (f"They differ at {', '.join(differing[:3])}.",) if differing else ()
    return Measured(len(differing), "tensors", (float(len(paged.report["tensors"])),),
                    (float(len(whole.report["tensors"])),), notes=(verdicts, *shown))


def beside_whole(bench: Bench, quantity: str) -> Measured:
    """The paged alignment of a model that fits beside the same with all weights in memory."""
    paged, whole = _paged(bench, bench.scale.fits).ran, _whole(bench, bench.scale.fits).ran
    if quantity == "seconds":
        return paired([paged.seconds], [whole.seconds], "s")
    return paired([paged.peak_rss], [whole.peak_rss], "B")


def differing_tensors(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names whose entries are not equal in every field, or that one report lacks, or holds in another place."""
    names = [[tensor["name"] for tensor in report["tensors"]] for report in (left, right)]
    if names[0] != names[1]:
        return sorted(set(names[0]) ^ set(names[1])) or names[0]
    beside = [key for key in BESIDE if left.get(key) != right.get(key)]
    return beside + [one["name"] for one, other in zip(left["tensors"], right["tensors"], strict=True) if one != other]


def deep(scale: Scale) -> tuple[Shape, ...]:
    return tuple(scale.paged.layered(layers) for layers in scale.layers)


def _paged(bench: Bench, shape: Shape, stage: str = "forward") -> Alignment:
    return bench.once(("paged", shape, stage), lambda: align(bench, shape, "on", stage))


def _whole(bench: Bench, shape: Shape) -> Alignment:
    return bench.once(("whole", shape), lambda: align(bench, shape, "off"))


def _settle(bench: Bench, shape: Shape) -> None:
    """Both checkpoints in the page cache, or out of it where they are too large to be in it together."""
    for directory in (bench.source(shape), bench.outputs / shape.name):
        settle(directory, warm=not bench.scale.full)


def _fits(scale: Scale) -> tuple[Shape]:
    return (scale.fits,)


CLAIMS = (
    Claim("paging.exact", "paged alignment finds the same numbers as with all weights in memory",
          Limit(0, "tensors that differ"), "alignment in memory", same_numbers, _fits, timed=False),
    Claim("paging.seconds-in-memory", "what paging costs where it is not needed", None, "alignment in memory",
          lambda bench: beside_whole(bench, "seconds"), _fits),
    Claim("paging.memory-in-memory", "what paging saves", None, "alignment in memory",
          lambda bench: beside_whole(bench, "memory"), _fits, timed=False),
)
LARGE = (
    Claim("paging.seconds", "paged alignment with noise floor and isolated blocks takes a few passes", Limit(3, "x"),
          PASSES, lambda bench: seconds(bench, "forward"), lambda scale: (scale.paged,)),
    Claim("paging.quick", "a paged quick look takes hardly longer than one pass of each side", Limit(1.2, "x"), PASSES,
          lambda bench: seconds(bench, "quick"), lambda scale: (scale.paged,)),
    Claim("paging.quick-memory", "a paged quick look of the whole model takes little memory", Limit(MEGABYTES, "MB"),
          "both models in float32, counted, not measured", lambda bench: memory(bench, "quick"),
          lambda scale: (scale.paged,), timed=False),
    Claim("paging.memory", "paged alignment of the whole model takes little memory", Limit(MEGABYTES, "MB"),
          "both models in float32, counted, not measured", lambda bench: memory(bench, "forward"),
          lambda scale: (scale.paged,), timed=False),
    Claim("paging.flat", "the memory of a paged alignment does not grow with the number of layers",
          Limit(PERCENT, "%"), "the fewest layers", over_layers, deep, timed=False),
)
