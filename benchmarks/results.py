"""What was measured: as JSON, as a table, and the machine it was measured on. No host's name, no absolute path."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from convert.errors import BadInput

from .claim import Claim, Limit, Measured
from .shapes import FULL

SCHEMA = 1
PACKAGES = ("numpy", "safetensors", "torch", "transformers", "paddlepaddle", "paddlenlp")
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
HOLDS, MISSED, TOLD, FAILED = "holds", "missed", "told", "failed"


@dataclass(frozen=True)
class Outcome:
    """One claim and what came of it. ``judgement``: holds, missed, told (not judged), or failed, and then ``why``."""

    name: str
    claim: str
    rival: str
    limit: Limit | None
    judgement: str
    measured: Measured | None
    why: str | None
    seconds: float
    finished: str

    def as_json(self) -> dict[str, Any]:
        limit = self.limit and {"bound": self.limit.bound, "unit": self.limit.unit, "at_least": self.limit.at_least}
        return {**asdict(self), "limit": limit,
                "measured": self.measured and {**asdict(self.measured), "n": self.measured.n}}


def judge(claim: Claim, measured: Measured, full: bool) -> str:
    """Times are judged at full scale only: a small checkpoint measures the start of a process."""
    if claim.limit is None or measured.value is None or (claim.timed and not full):
        return TOLD
    return HOLDS if claim.limit.holds(measured.value) else MISSED


def outcome_of(found: Mapping[str, Any]) -> Outcome:
    """The inverse of :meth:`Outcome.as_json`."""
    limit, measured = found["limit"], found["measured"]
    fields = {name: value for name, value in (measured or {}).items() if name != "n"}
    pairs = {name: tuple(fields[name]) for name in ("ours", "rival", "notes", "spread") if fields.get(name) is not None}
    return Outcome(**{**found, "limit": limit and Limit(**limit), "measured": measured and Measured(**fields | pairs)})


def machine(directory: Path) -> dict[str, Any]:
    """Cores, bytes of memory, processor, file system of the scratch ``directory``, threads and versions."""
    return {
        "cores": len(os.sched_getaffinity(0)), "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "processor": _processor(), "system": f"{platform.system()} {platform.release()}",
        "file_system": _said("stat", "--file-system", "--format=%T", str(directory)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES},
                     "cp": _said("cp", "--version").rpartition(" ")[2]},
    }


def save(file: Path, scale: str, outcomes: Sequence[Outcome], on: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``outcomes`` under ``scale`` into ``file``, beside what it holds from this very machine. Returns it all."""
    held = load(file)
    earlier = held["scales"].get(scale, {})
    kept = earlier["claims"] if earlier.get("machine") == on else []
    new = {outcome.name: outcome.as_json() for outcome in outcomes}
    merged = {claim["name"]: claim for claim in kept} | new
    held["scales"][scale] = {"machine": dict(on), "claims": list(merged.values())}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    return held


def load(file: Path) -> dict[str, Any]:
    """What ``file`` holds, or nothing; :class:`BadInput` when it is something else."""
    if not file.exists():
        return {"schema": SCHEMA, "scales": {}}
    try:
        held = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"--results {file} cannot be read ({error}). Delete it, or give another.") from error
    if not isinstance(held, dict) or held.get("schema") != SCHEMA or not isinstance(held.get("scales"), dict):
        raise BadInput(f"--results {file} holds no results of schema {SCHEMA}. Delete it, or give another.")
    return held


def published(held: Mapping[str, Any], order: Sequence[str] = ()) -> str:
    """The table for the README: the full scale's, or the small one's where that is all there is; rows in ``order``."""
    scale = FULL if FULL in held["scales"] else next(iter(held["scales"]))
    found = held["scales"][scale]
    place = {name: number for number, name in enumerate(order)}
    claims = sorted(found["claims"], key=lambda claim: place.get(claim["name"], len(place)))
    return table(scale, [outcome_of(claim) for claim in claims], found["machine"])


def table(scale: str, outcomes: Sequence[Outcome], on: Mapping[str, Any]) -> str:
    """Markdown: one row for each claim, what did not succeed and what is to be noted below, and the machine."""
    lines = ["| claim | ours | rival | measured (least to greatest, n) | limit | |",
             "| --- | --- | --- | --- | --- | --- |"]
    lines += [_row(outcome) for outcome in outcomes]
    told = [f"- `{outcome.name}`: {sentence}" for outcome in outcomes
            for sentence in ([outcome.why] if outcome.why else outcome.measured.notes if outcome.measured else [])]
    return "\n".join([*lines, "", *told, *([""] if told else []), described(scale, on)])


def described(scale: str, on: Mapping[str, Any]) -> str:
    """The machine in one sentence."""
    versions = ", ".join(f"{name} {told}" for name, told in on["versions"].items() if told)
    threads = on["omp_num_threads"] or "not set"
    command = f"python -m benchmarks{' --full' if scale == FULL else ''}"
    return (f"`{command}` on {on['cores']} cores of {on['processor']}, {on['memory_bytes'] / 2**30:.0f} GiB, "
            f"{on['system']}, {on['file_system']}, OMP_NUM_THREADS {threads}; {versions}."
            f"{'' if scale == FULL else ' Times are judged with `--full` only.'}")


def publish(readme: Path, text: str) -> bool:
    """Put ``text`` between the markers of ``readme``; False when it has none."""
    page = readme.read_text("utf-8") if readme.is_file() else ""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")
    return True


def _row(outcome: Outcome) -> str:
    measured, limit = outcome.measured, str(outcome.limit) if outcome.limit else "–"
    judgement = {HOLDS: "ok", MISSED: "**missed**", TOLD: "not judged", FAILED: "**failed**"}[outcome.judgement]
    if measured is None:
        return f"| {outcome.claim} (`{outcome.name}`) | – | {outcome.rival} | – | {limit} | {judgement} |"
    rival = f"{outcome.rival}: {amount(median(measured.rival), measured.unit)}" if measured.rival else outcome.rival
    return (f"| {outcome.claim} (`{outcome.name}`) | {amount(median(measured.ours), measured.unit)} | {rival} "
            f"| {_value(outcome)} | {limit} | {judgement} |")


def _value(outcome: Outcome) -> str:
    """The value that the limit speaks of, its spread and number, and the ratio to the rival where that is another."""
    measured, unit = outcome.measured, outcome.limit.unit if outcome.limit else "x"
    value = measured.value if outcome.limit else measured.ratio
    parts = [f"{number(value)} {unit}"] if value is not None else []
    if measured.spread and outcome.limit and measured.n > 1:
        parts.append(f"({number(measured.spread[0])} to {number(measured.spread[1])}, {measured.n})")
    elif measured.n > 1:
        parts.append(f"({measured.n})")
    if outcome.limit and measured.ratio is not None and measured.ratio != value:
        parts.append(f"{number(measured.ratio)} x the rival")
    return " ".join(parts) or "–"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def amount(value: float, unit: str) -> str:
    """Seconds, bytes as megabytes or gigabytes, or a number of things."""
    if unit == "s":
        return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"
    if unit == "B":
        return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"
    return f"{value:g} {unit}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    """The first line that a command prints; empty when it cannot."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except OSError:
        return ""
    return next(iter(answer.splitlines()), "")
