"""``python -m align.page``: everything a run's stages reported, as one self-contained page, ``index.html``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from convert.errors import ALIGNED as EXIT_OK
from convert.errors import BadInput, guarded
from convert.report import SCHEMA, latest_run

from .training.curves import Curves

Json = Mapping[str, Any]

ORDER = ("convert", "weights", "data", "forward", "quick", "metric", "loss", "backward", "optimizer", "train",
         "generate")
BESIDE = {"quick"}
"""What is no part of the whole: another stage asks all that it asks, and more."""
CORE = ("weights", "forward", "metric", "loss")
ALIGNED, DIVERGED, INCOMPLETE = "aligned", "diverged", "incomplete"
SHOWN_FAILURES = 20


PAGE = "index.html"


def stage_names() -> list[str]:
    """The stages that there are, in the guide's order."""
    found = {name: find_spec(f"{__package__}.{name}") for name in ORDER if name not in BESIDE}
    return [name for name, spec in found.items() if spec and spec.origin]


@dataclass(frozen=True)
class Tensor:
    """A compared tensor as its row and its place in the chart want it; ``order`` counts executions from 1."""

    order: int
    name: str
    shape: str
    dtype: str
    passed: bool
    comparable: bool
    rel_l2: float | None
    isolated: float | None
    floor: float | None
    allowed: float | None
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    closest: Json | None
    inherited: bool

    @property
    def error(self) -> float | None:
        """The larger of both passes' relative L2."""
        return max((found for found in (self.rel_l2, self.isolated) if found is not None), default=None)

    @property
    def excess(self) -> float:
        """How much of the limit is used up; infinite where nothing could be measured or equality is broken."""
        if self.error is None:
            return math.inf if not self.passed else 0.0
        used = [self.error / self.allowed if self.allowed else math.inf if self.error else 0.0]
        if self.closest:
            used.append(self.closest["share"])
        return max(used)


@dataclass(frozen=True)
class StageView:
    """One stage's report, read with nothing taken for granted."""

    name: str
    state: str
    content: Json
    tensors: Sequence[Tensor]
    doubt: str | None = None

    @property
    def mark(self) -> str:
        """The verdict in a word that fits the stage."""
        if self.name == "convert" and self.state != DIVERGED:
            return "bit-exact" if self.state == ALIGNED else "not verified" if not self.doubt else "unreadable"
        return self.state if self.state != INCOMPLETE else "no verdict"

    @property
    def first_divergence(self) -> str | None:
        found = self.content.get("first_divergence")
        return str(found) if found else None

    @property
    def failures(self) -> list[str]:
        return [str(told) for told in _list(self.content.get("failures"))]

    @property
    def notes(self) -> list[str]:
        return [str(told) for told in _list(self.content.get("notes"))]

    @property
    def caveat(self) -> str | None:
        """What its verdict does not say."""
        found = self.content.get("caveat")
        return str(found) if found else None

    @property
    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, rows) of what the stage shows beside its tensors; a row has a cell for each column."""
        found = [_dict(item) for item in _list(self.content.get("tables"))]
        named = [(str(item.get("title", "–")), [str(one) for one in _list(item.get("columns"))],
                  [[str(cell) for cell in _list(row)] for row in _list(item.get("rows"))]) for item in found]
        return [(title, columns, [row for row in rows if len(row) == len(columns)]) for title, columns, rows in named]

    @property
    def judged(self) -> bool:
        """Whether torch's noise, or a second pass on the reference's input, was measured."""
        return any(tensor.floor is not None or tensor.isolated is not None for tensor in self.tensors)

    @property
    def depth(self) -> list[Tensor]:
        """The places of the chart: modules and outputs. What is no path ("… on a small input") has no depth, nor has a
        loss.
        """
        deep = (self.judged and self.name != "loss") or self.name in BESIDE
        return [tensor for tensor in self.tensors if " " not in tensor.name] if deep else []

    @property
    def charted(self) -> bool:
        return sum(tensor.error is not None for tensor in self.depth) > 1

    @property
    def worst(self) -> Tensor | None:
        measured = [tensor for tensor in self.tensors if tensor.error is not None]
        return max(measured, key=lambda tensor: tensor.error or 0.0, default=None)

    @property
    def ranked(self) -> list[Tensor]:
        """Worst first: what failed, then by how much of its limit is used; equals in the order of execution."""
        return sorted(self.tensors, key=lambda tensor: (tensor.passed, -tensor.excess, -(tensor.error or 0.0)))

    @property
    def failing(self) -> list[Tensor]:
        return [tensor for tensor in self.ranked if not tensor.passed]

    @property
    def passing(self) -> list[Tensor]:
        return [tensor for tensor in self.ranked if tensor.passed]

    @property
    def figure(self) -> str:
        """The worst figure of the stage, or what stands in for it."""
        if self.doubt:
            return self.doubt
        if self.name == "convert":
            count = f"{len(_list(self.content.get('tensors')))} tensors, {count_bytes(self.content.get('bytes'))}"
            return f"{count}, every bit read back" if self.state == ALIGNED else f"{count}, not read back"
        if not self.tensors:
            return "nothing was compared"
        bad = len(self.failing)
        if any(not tensor.comparable for tensor in self.failing):
            return f"{bad} of {len(self.tensors)} fail; not all are comparable"
        if self.worst is None or not self.worst.error:
            return f"all {len(self.tensors)} equal" + (", bit for bit" if self.name == "weights" else "")
        told = f"{number(self.worst.error)} at {self.worst.name}"
        return f"{bad} of {len(self.tensors)} fail, {told}" if bad else told

    @property
    def values(self) -> list[tuple[str, float | None, float | None, float | None]]:
        """(name, torch, paddle, relative difference)."""
        rows = []
        for name, pair in _dict(self.content.get("values")).items():
            left, right = (_number(_dict(pair).get(side)) for side in ("reference", "candidate"))
            known = left is not None and right is not None
            rows.append((name, left, right, abs(left - right) / (abs(left) or 1.0) if known else None))
        return rows

    @property
    def named(self) -> str | None:
        """The sublayer or operation that the first bad block's error comes from."""
        found = self.content.get("named")
        return str(found) if found and found != self.first_divergence else None

    def _layers_of_first_bad_block(self, layers: list[Tensor]) -> list[Tensor]:
        """Those of the module in which the first failing one lies, and all others that fail; none where none does."""
        bad = next((layer.name for layer in layers if not layer.passed), None)
        if bad is None:
            return []
        block = max((tensor.name for tensor in self.tensors if _within(bad, tensor.name)), key=len, default=bad)
        return [layer for layer in layers if not layer.passed or _within(layer.name, block)]

    @property
    def diagnosis(self) -> Json | None:
        """``diagnosis`` and ``sublayers`` of the JSON, with numbers where numbers belong; None without either."""
        found = _dict(self.content.get("diagnosis"))
        layers = self._layers_of_first_bad_block(_tensors(found.get("sublayers") or self.content.get("sublayers")))
        if not found and not layers:
            return None
        texts = {key: str(found[key]) if found.get(key) else None for key in ("sentence", "kind", "subject")}
        return {**texts, "asked": bool(found), "before": _number(found.get("before")),
                "after": _number(found.get("after")), "sublayers": layers}


def _within(name: str, module: str) -> bool:
    return name.startswith((f"{module}.", f"{module}:"))


def write_page(directory: Path) -> Path:
    """Write ``index.html`` from the ``<stage>.json`` files of ``directory``; :class:`BadInput` when there are none."""
    text = drawn(directory)
    page = directory / PAGE
    staged = directory / f".{PAGE}.staged"
    staged.write_text(text, "utf-8")
    os.replace(staged, page)
    return page


def drawn(directory: Path, left_out: Collection[str] = ()) -> str:
    """The page as HTML, without the stages that are ``left_out``."""
    return _template().render(_view(directory, left_out))


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    environment = Environment(loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(path=_path, told=_told, number=number, value=_value, seconds=_seconds, memory=_memory,
                               bytes=count_bytes)
    return environment.get_template("report.html.j2")


def _view(directory: Path, left_out: Collection[str]) -> dict[str, Any]:
    """What the template shows, decided here."""
    stages = [stage for stage in read_stages(directory) if stage.name not in left_out]
    checked = [stage for stage in stages if stage.name != "convert"]
    conversion = next((stage.content for stage in stages if stage.name == "convert" and not stage.doubt), None)
    missing = [name for name in CORE if name not in {stage.name for stage in stages}]
    doubts = _doubts(checked, conversion)
    diverged = [stage for stage in stages if stage.state == DIVERGED]
    sound = checked and not doubts and all(stage.state == ALIGNED for stage in checked)
    content = next((stage.content for stage in stages if not stage.doubt), {})
    first = next((stage for stage in diverged if stage.first_divergence), None)
    charted = next((stage for stage in stages if stage.charted), None)
    return {
        "run": str(content.get("run") or directory.name), "family": str(content.get("family") or "–"),
        "head": str(content.get("head") or "–"),
        "target": next((str(stage.content["target"]) for stage in checked if stage.content.get("target")), None),
        "state": DIVERGED if diverged else ALIGNED if sound else INCOMPLETE,
        "absent": [name for name in stage_names() if name not in {stage.name for stage in stages}],
        "stages": stages, "checked": checked, "missing": missing, "doubts": doubts, "first": first,
        "agreeing": [stage.name for stage in checked if stage.state == ALIGNED],
        "diverged": diverged, "closest": _closest(checked),
        "diagnoses": [(stage, stage.diagnosis) for stage in stages if stage.diagnosis],
        "chart": charted and _charts(charted), "charted": charted, "training": _training(stages),
        "conversion": conversion, "plan": conversion and _plan(conversion), "sides": _sides(checked),
        "shown_failures": SHOWN_FAILURES,
    }


# Reading

def read_stages(directory: Path) -> list[StageView]:
    """Every stage of ``directory`` in the guide's order. A target's own directory shows its run's conversion too."""
    files = {file.stem: file for file in directory.glob("*.json") if file.stem != "back"}
    if not files:
        raise BadInput(f"{directory} has no stage's report (<stage>.json). Convert a model and align it first: "
                       "python -m convert.gptj, then python -m align.forward")
    if "convert" not in files and (directory.parent / "convert.json").is_file():
        files["convert"] = directory.parent / "convert.json"
    known = {name: place for place, name in enumerate(ORDER)}
    names = sorted(files, key=lambda name: (known.get(name, len(ORDER)), name))
    stages = [_read_stage(name, files[name]) for name in names]
    if all(stage.doubt and not stage.content for stage in stages):
        raise BadInput(f"no report in {directory} can be read: {'; '.join(str(stage.doubt) for stage in stages)}.")
    return stages


def _read_stage(name: str, file: Path) -> StageView:
    name = _clean(name)
    try:
        content = _clean(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        return StageView(name, INCOMPLETE, {}, (), f"{file.name} cannot be read ({error})")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return StageView(name, INCOMPLETE, {}, (), f"{file.name} is not a report of schema {SCHEMA}")
    if name == "convert":
        return StageView(name, ALIGNED if content.get("verified") is True else INCOMPLETE, content, ())
    tensors = _tensors(content.get("tensors"))
    verdict = content.get("verdict")
    if verdict == DIVERGED:
        return StageView(name, DIVERGED, content, tensors)
    if verdict != ALIGNED:
        return StageView(name, INCOMPLETE, content, tensors, f"{file.name} has no verdict")
    if not tensors or not all(tensor.passed for tensor in tensors):
        return StageView(name, INCOMPLETE, content, tensors, f"{file.name} says aligned, its tensors do not")
    return StageView(name, ALIGNED, content, tensors)


def _tensors(rows: Any) -> list[Tensor]:
    return [_tensor(order, item) for order, item in enumerate(_list(rows), 1) if isinstance(item, Mapping)]


def _tensor(order: int, item: Json) -> Tensor:
    rel_l2, isolated = _number(item.get("rel_l2")), _number(_dict(item.get("isolated")).get("rel_l2"))
    allowed, passed = _number(item.get("allowed")), item.get("passed") is True
    judgements = [_judgement(found) for found in _list(item.get("judgements")) if isinstance(found, Mapping)]
    alone = [found for found in judgements if found["kind"] == "isolated"]
    return Tensor(
        order, str(item.get("name", "–")), str(item.get("shape", "")), str(item.get("dtype", "–")), passed,
        rel_l2 is not None, rel_l2, isolated, _number(item.get("floor")), allowed, _number(item.get("max_abs")),
        _number(item.get("mean_abs")), _number(item.get("cosine")),
        max(judgements, key=lambda found: found["share"], default=None),
        inherited=(not passed and isolated is not None and allowed is not None and isolated <= allowed
                   and all(found["passed"] for found in alone)),
    )


def _judgement(found: Json) -> dict[str, Any]:
    """A null ratio is an infinite one: an error where torch makes none."""
    ratio, limit = _number(found.get("ratio")), _number(found.get("limit"))
    share = math.inf if ratio is None else ratio / limit if limit else math.inf if ratio else 0.0
    return {"kind": str(found.get("kind", "")), "test": str(found.get("test", "")), "ratio": ratio, "limit": limit,
            "passed": found.get("passed") is True, "share": share}


def _doubts(checked: Sequence[StageView], conversion: Json | None) -> list[str]:
    """Why the stages together give no verdict even if each of them agrees."""
    told = [] if checked else ["The model was converted; no stage has compared it with torch yet."]
    told += [f"{stage.doubt}." for stage in checked if stage.doubt]
    candidates: dict[str, list[str]] = defaultdict(list)
    sources: dict[str, list[str]] = defaultdict(list)
    if conversion and conversion.get("source_digest"):
        sources[str(conversion["source_digest"])].append("convert")
    for stage in checked:
        for side, seen in (("candidate", candidates), ("reference", sources)):
            digest = _dict(stage.content.get(side)).get("weights_digest")
            if digest:
                seen[str(digest)].append(stage.name)
    for digests, what in ((candidates, "Paddle weights"), (sources, "source")):
        if len(digests) > 1:
            groups = " / ".join(", ".join(names) for names in digests.values())
            told.append(f"The stages did not see the same {what}: {groups}. Run them again.")
    return told


def _closest(stages: Iterable[StageView]) -> Tensor | None:
    """The tensor that came closest to a limit of the noise floor, None where there is no floor."""
    found = [tensor for stage in stages for tensor in stage.tensors if tensor.closest]
    return max(found, key=lambda tensor: tensor.closest["share"], default=None)


def _sides(checked: Sequence[StageView]) -> list[tuple[str, str, str, str, str]]:
    """(side, framework, version, weights digest, stages): one row, unless stages differ."""
    seen: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for side in ("reference", "candidate"):
        for stage in checked:
            facts = _dict(stage.content.get(side))
            if facts:
                key = tuple(str(facts.get(name) or "–") for name in ("framework", "version", "weights_digest"))
                seen[(side, *key)].append(stage.name)
    return [(*facts, ", ".join(names)) for facts, names in seen.items()]


# The plan

def _plan(conversion: Json) -> dict[str, Any]:
    """Name map, do-not-transpose list, buffers and dropped tensors; layers that move alike share a row."""
    keys = ("source", "target", "rule", "shape", "transposed", "dtype", "filling")
    rows = [{key: item.get(key) for key in keys} for item in _list(conversion.get("tensors"))
            if isinstance(item, Mapping)]
    moved = [item for item in rows if item.get("rule") != "buffer"]
    return {
        "all": rows, "map": _grouped(moved),
        "transposed": sum(item.get("transposed") is True for item in moved),
        "kept": _grouped(item for item in moved if len(_list(item.get("shape"))) == 2 and not item.get("transposed")),
        "buffers": _grouped(item for item in rows if item.get("rule") == "buffer"),
        "dropped": [item for item in _list(conversion.get("dropped")) if isinstance(item, Mapping)],
    }


def _grouped(rows: Iterable[Json]) -> list[dict[str, Any]]:
    """Rows that differ in their numbers only, the same numbers on both sides, as one, with the numbers told."""
    groups: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for item in rows:
        target, numbers = _pattern(str(item.get("target") or "–"))
        source, others = _pattern(str(item.get("source") or ""))
        if source and numbers != others:
            source, target, numbers = str(item["source"]), str(item.get("target")), []
        facts = (str(item.get("rule", "")), str(item.get("shape", "")), str(item.get("dtype", "")),
                 "yes" if item.get("transposed") is True else "", str(item.get("filling") or ""))
        groups[(source, target, *facts)].append(numbers)
    keys = ("source", "target", "rule", "shape", "dtype", "transposed", "filling")
    return [{**dict(zip(keys, key, strict=True)), "count": len(numbers), "layers": _ranges(numbers)}
            for key, numbers in groups.items()]


def _pattern(name: str) -> tuple[str, list[int]]:
    """``h.3.attn`` -> ``h.{i}.attn`` and [3]."""
    parts, letters, numbers = name.split("."), iter("ijk"), []
    for place, part in enumerate(parts):
        letter = next(letters, None) if re.fullmatch(r"[0-9]{1,6}", part) else None
        if letter:
            parts[place] = f"{{{letter}}}"
            numbers.append(int(part))
    return ".".join(parts), numbers


def _ranges(numbers: Sequence[Sequence[int]]) -> str:
    """[[0], [1], [2], [5]] -> ``0–2, 5``; nothing where there is not one number each."""
    if any(len(found) != 1 for found in numbers):
        return ""
    spans: list[list[int]] = []
    for found in sorted({single[0] for single in numbers}):
        if spans and found == spans[-1][1] + 1:
            spans[-1][1] = found
        else:
            spans.append([found, found])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in spans)


# The chart

INKS = {"ink": "#010101", "muted": "#010102", "line": "#010103", "propagated": "#010104", "isolated": "#010105",
        "bad": "#010106", "band": "#010107", "paper": "#010108"}


def _charts(stage: StageView) -> dict[str, Any]:
    """The error over the depth, wide (depth to the right) and narrow (depth downwards), as safe inline SVG."""
    import warnings

    from markupsafe import Markup
    from matplotlib import rc_context
    style = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.linewidth": 0.6}
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks are the browser's to find
        return {shape: Markup(_svg(stage.depth, shape == "narrow")) for shape in ("wide", "narrow")}


def _training(stages: Sequence[StageView]) -> dict[str, Any] | None:
    """The curves of the first stage that has some, wide and narrow."""
    from markupsafe import Markup
    found = ((stage, Curves.read(stage.content.get("curves"))) for stage in stages if not stage.doubt)
    stage, curves = next(((stage, curves) for stage, curves in found if curves), (None, None))
    if curves is None:
        return None
    colours = {**INKS, "torch": INKS["isolated"], "paddle": INKS["propagated"]}
    bare = dict(transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = {shape: Markup(_inline(curves.drawn("svg", size, colours, f"curves {shape}", **bare).decode()))
             for shape, size in (("wide", (10.4, 5.6)), ("narrow", (4.6, 5.4)))}
    return {"name": stage.name, "steps": len(curves.reference), "limit": curves.limit, **drawn}


def _svg(tensors: Sequence[Tensor], downwards: bool) -> str:
    import io

    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    size = (4.6, 1.1 + 0.24 * len(tensors)) if downwards else (10.4, 4.0)
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, tensors, downwards)
    with rc_context({"svg.hashsalt": "narrow" if downwards else "wide"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(file.getvalue())


def _draw(axes: Any, tensors: Sequence[Tensor], downwards: bool) -> None:
    low, high = _span(tensors)
    fill = axes.fill_betweenx if downwards else axes.fill_between
    across = axes.axhspan if downwards else axes.axvspan

    def draw(depth: Sequence[float], error: Sequence[float], **look: Any) -> None:
        axes.plot(*((error, depth) if downwards else (depth, error)), **look)

    def stairs(name: str) -> tuple[list[float], list[float]]:
        levels = [_level(getattr(tensor, name), low, high) for tensor in tensors]
        return ([place + side for place in range(len(tensors)) for side in (-0.5, 0.5)],
                [level for level in levels for _ in "lr"])

    depth, allowed = stairs("allowed")
    fill(depth, [low] * len(depth), allowed, color=INKS["band"], linewidth=0, zorder=0)
    for place, tensor in enumerate(tensors):
        if not tensor.passed:
            across(place - 0.5, place + 0.5, color=INKS["bad"], alpha=0.07 if tensor.inherited else 0.16, linewidth=0,
                   zorder=1)
    draw(depth, allowed, color=INKS["muted"], linewidth=0.9, zorder=2)
    draw(*stairs("floor"), color=INKS["muted"], linewidth=1.1, linestyle=(0, (2.5, 2)), zorder=2)
    places = list(range(len(tensors)))
    small = 4.6 if len(tensors) <= 40 else 2.6
    for name, marker, look in (("isolated", "D", {"markersize": small * 0.86}), ("rel_l2", "o", {"markersize": small})):
        color = INKS["isolated" if name == "isolated" else "propagated"]
        draw(places, [_level(getattr(tensor, name), low, high) for tensor in tensors], color=color, linewidth=1.1,
             marker=marker, markerfacecolor=INKS["paper"] if name == "isolated" else color, markeredgecolor=color,
             markeredgewidth=1.1, zorder=4, clip_on=False, in_layout=False, **look)
    failed = [(place, tensor) for place, tensor in enumerate(tensors) if not tensor.passed]
    draw([place for place, _ in failed],
         [high * 0.6 if tensor.error is None else _level(tensor.error, low, high) for _, tensor in failed],
         color=INKS["bad"], linestyle="none", clip_on=False, in_layout=False, marker="X", markersize=8.5,
         markeredgecolor=INKS["paper"],
         markeredgewidth=0.8, zorder=5)
    _axes(axes, tensors, downwards, low, high)


def _axes(axes: Any, tensors: Sequence[Tensor], downwards: bool, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    error, depth = (axes.xaxis, axes.yaxis) if downwards else (axes.yaxis, axes.xaxis)
    (axes.set_xscale if downwards else axes.set_yscale)("log")
    if downwards:
        axes.xaxis.tick_top()
    (axes.set_xlim if downwards else axes.set_ylim)(low, high)
    (axes.set_ylim if downwards else axes.set_xlim)(*((len(tensors) - 0.5, -0.5) if downwards
                                                      else (-0.5, len(tensors) - 0.5)))
    bottom, top = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, math.ceil((top - bottom) / (5 if downwards else 8)))
    error.set_major_locator(FixedLocator([10.0**power for power in range(bottom, top + 1, step)]))
    error.set_major_formatter(FuncFormatter(lambda found, _: f"1e{round(math.log10(found))}"))
    error.set_minor_locator(NullLocator())
    keep = _labelled(tensors, len(tensors) if downwards else 26)
    depth.set_ticks(keep, [_short(tensors[place].name) for place in keep])
    for place, label in zip(keep, depth.get_ticklabels(), strict=True):
        failed = not tensors[place].passed
        label.set(color=INKS["bad" if failed else "ink"], fontweight="bold" if failed else "normal")
        if not downwards:
            label.set(rotation=38, ha="right", rotation_mode="anchor")
    for label in error.get_ticklabels():
        label.set_color(INKS["muted"])
    axes.tick_params(color=INKS["line"], length=3, width=0.6)
    error.grid(True, color=INKS["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == ("left" if downwards else "bottom"))
        spine.set_color(INKS["line"])


def _span(tensors: Sequence[Tensor]) -> tuple[float, float]:
    """From below the smallest level that is not zero to above the largest."""
    levels = [level for tensor in tensors for level in (tensor.rel_l2, tensor.isolated, tensor.floor, tensor.allowed)
              if level and 1e-30 < level < 1e30]
    low, high = min(levels, default=1e-8), max(levels, default=1e-5)
    return low / 2.5, max(high * 2.5, low * 40)


def _level(value: float | None, low: float, high: float) -> float:
    """NaN leaves a gap; zero, which a log scale has not, lies on the edge."""
    return math.nan if value is None else min(max(value, low), high)


def _labelled(tensors: Sequence[Tensor], most: int) -> list[int]:
    """Which places of the depth get a name: all, or what failed, what is no numbered block, and every few blocks."""
    if len(tensors) <= most:
        return list(range(len(tensors)))
    step = math.ceil(len(tensors) / most)
    wanted = [place for place, tensor in enumerate(tensors) if place % step == 0]
    first = next((place for place, tensor in enumerate(tensors) if not tensor.passed), None)
    if first is None or first in wanted:
        return wanted
    return sorted([place for place in wanted if abs(place - first) > step / 2] + [first])


def _short(name: str) -> str:
    """``bert.encoder.layers.3`` -> ``layers.3``; printable, 22 characters at most."""
    parts = name.split(".")
    tail = ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1] or name
    tail = "".join(letter if letter.isprintable() else "\ufffd" for letter in tail)
    return tail if len(tail) <= 22 else f"{tail[:21]}…"


def _inline(svg: str) -> str:
    """matplotlib's file as a part of the page: no prologue, no namespaces, and the page's colours."""
    svg = svg[svg.index("<svg"):]
    for noise in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<defs>\s*</defs>"):
        svg = re.sub(noise, "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([0-9. ]+)"', svg)
    size = box.group(1) if box else "0 0 1 1"
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{size}" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    for name, color in INKS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


# Words and numbers

def number(value: float | None) -> str:
    """Errors look the same everywhere: one decimal and an exponent, ``0`` where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def count_bytes(value: Any) -> str:
    found = _number(value)
    return "–" if found is None else f"{found:,.0f} bytes"


def _path(name: Any) -> Any:
    """A name that is best broken after its dots, where it has to be broken."""
    from markupsafe import Markup, escape
    return escape(name).replace(".", Markup(".<wbr>"))


def _told(sentence: str) -> str:
    """A sentence with its figures spelled as :func:`number` does: ``1.4e+00`` -> ``1.4e0``."""
    return re.sub(r"(?<![\w.])([0-9]\.[0-9]+)e([+-][0-9]{2,3})(?!\w|\.[0-9])",
                  lambda found: f"{found[1]}e{int(found[2])}" if float(found[1]) else "0", sentence)


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.9g}"


def _seconds(value: Any) -> str:
    found = _number(value)
    if found is None:
        return "–"
    if 0 < found < 0.05:
        return "< 0.1 s"
    return f"{found:.1f} s" if found < 120 else f"{int(found // 60)} min {int(found % 60)} s"


def _memory(value: Any) -> str:
    found = _number(value)
    return "–" if found is None else f"{found / 1e6:,.0f} MB"


def _number(value: Any) -> float | None:
    try:
        found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _clean(value: Any) -> Any:
    """``value`` with halves of surrogate pairs, which no file can hold, replaced in every string."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    return value


# The command

def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a run and print its path."""
    parser = argparse.ArgumentParser(prog="python -m align.page", description="Write a run's report as one page.")
    parser.add_argument("--run", help="the run's name; default the latest conversion")
    parser.add_argument("--target", default="models", metavar="models|paddlenlp",
                        help="which Paddle net's stages; default models")
    parser.add_argument("--reports", metavar="DIR", default="reports", help="where the runs are; default reports")
    options = parser.parse_args(arguments)
    return guarded(lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    reports = Path(options.reports)
    run = options.run or latest_run(reports)
    if not (reports / run).is_dir():
        raise BadInput(f"there is no run {run} in {reports}. Convert a model first: python -m convert.gptj")
    print(write_page(reports / run if options.target == "models" else reports / run / options.target))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
