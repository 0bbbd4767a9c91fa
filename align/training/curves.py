"""The curves of a training: both sides' losses, and their distance beside torch's own band, as a picture.

Drawn twice from the same figures: as a file beside the report, and with the page's own colours in the page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "train.png"
COLOURS = {"ink": "#1c1b1a", "muted": "#6d6a66", "line": "#d9d5cf", "torch": "#1f5fa8", "paddle": "#c2571a",
           "band": "#dfe6ee", "bad": "#b3261e", "paper": "#ffffff"}


@dataclass(frozen=True)
class Curves:
    """Losses by step: torch's, the candidate's, and torch's in float64, from which torch's own runs lie ``width`` away.
    A curve may lie ``limit`` times as far from ``exact``.
    """

    reference: Sequence[float]
    candidate: Sequence[float]
    exact: Sequence[float]
    width: Sequence[float]
    limit: float

    @classmethod
    def read(cls, content: Any) -> Curves | None:
        """From a report's JSON; None where that has none, or other things in their place."""
        if not isinstance(content, Mapping):
            return None
        rows = [content.get(name) for name in ("reference", "candidate", "exact", "width")]
        limit = content.get("limit")
        sound = all(isinstance(row, list) and row and all(_is_number(value) or value is None for value in row)
                    for row in rows) and len({len(row) for row in rows if isinstance(row, list)}) == 1
        return cls(*([math.nan if value is None else value for value in row] for row in rows), limit) if (
            sound and _is_number(limit)) else None

    def as_json(self) -> dict[str, Any]:
        """Every number in it is finite or null."""
        return {name: [value if math.isfinite(value) else None for value in found] if isinstance(found, Sequence)
                else found for name, found in asdict(self).items()}

    def save(self, directory: Path) -> Path:
        """``train.png`` in ``directory``."""
        (directory / FILE).write_bytes(self.drawn("png", (9.0, 6.2), COLOURS))
        return directory / FILE

    def drawn(self, kind: str, size: tuple[float, float], colours: Mapping[str, str], salt: str = "curves",
              **how: Any) -> bytes:
        """Losses above, distances from float64 below; ``kind`` is a format of matplotlib's, ``salt`` makes the names
        in an SVG its own."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        file = io.BytesIO()
        with rc_context({"font.size": 9, "axes.linewidth": 0.6, "svg.fonttype": "none", "svg.hashsalt": salt,
                         "text.parse_math": False}):
            figure = Figure(size, layout="constrained", dpi=110)
            FigureCanvasAgg(figure)
            above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            self._draw_losses(above, colours)
            self._draw_distances(below, colours)
            for axes in (above, below):
                _dress(axes, colours)
            figure.savefig(file, format=kind, **how)
        return file.getvalue()

    def _draw_losses(self, axes: Any, colours: Mapping[str, str]) -> None:
        steps = self._steps
        low, high = ([value + sign * self.limit * width for value, width in zip(self.exact, self.width, strict=True)]
                     for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colours["band"], linewidth=0, label="allowed")
        axes.plot(steps, self.reference, color=colours["torch"], linewidth=2.4, label="torch")
        axes.plot(steps, self.candidate, color=colours["paddle"], linewidth=1.1, linestyle=(0, (4, 2)), marker="o",
                  markersize=2.6, label="candidate")
        axes.set_ylabel("loss", color=colours["muted"])

    def _draw_distances(self, axes: Any, colours: Mapping[str, str]) -> None:
        steps = self._steps
        far = [self.limit * width for width in self.width]
        apart = {name: [abs(value - exact) for value, exact in zip(values, self.exact, strict=True)]
                 for name, values in (("torch", self.reference), ("paddle", self.candidate))}
        seen = [value for values in (*apart.values(), far) for value in values if value > 0]
        least = min(seen, default=1e-9) / 2
        axes.fill_between(steps, [least] * len(steps), [max(value, least) for value in far], color=colours["band"],
                          linewidth=0)
        axes.plot(steps, [max(value, least) for value in self.width], color=colours["muted"], linewidth=1.0,
                  linestyle=(0, (2.5, 2)), label="torch's own runs (rms)")
        for name, label in (("torch", "torch"), ("paddle", "candidate")):
            axes.plot(steps, [max(value, least) for value in apart[name]], color=colours[name], linewidth=1.1,
                      label=label)
        out = [(step, value) for step, value, limit in zip(steps, apart["paddle"], far, strict=True)
               if not value <= limit and math.isfinite(value)]
        if out:
            axes.plot(*zip(*out, strict=True), color=colours["bad"], linestyle="none", marker="X", markersize=6,
                      label="beyond what is allowed")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"1e{round(math.log10(value))}" if value > 0 else "")
        axes.set_ylim(bottom=least)
        axes.set_ylabel("distance from float64", color=colours["muted"])
        axes.set_xlabel("step", color=colours["muted"])
        axes.xaxis.get_major_locator().set_params(integer=True)

    @property
    def _steps(self) -> list[int]:
        return list(range(1, len(self.reference) + 1))


def _dress(axes: Any, colours: Mapping[str, str]) -> None:
    axes.patch.set_visible(False)
    axes.grid(True, axis="y", color=colours["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=colours["line"], labelcolor=colours["muted"], length=3, width=0.6)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["line"])
    axes.legend(frameon=False, labelcolor=colours["ink"], loc="best")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
