"""The results of a run as PaddlePaddle's paper-reproduction guide wants them handed in: ``pipeline/Step1`` to ``5``.

The names are the guide's (``docs/lwfx/ArticleReproduction_NLP.md`` and ``_CV.md`` of PaddlePaddle/models, section
2.2.3, and the folders of its BERT example): ``forward``, ``metric``, ``loss``, ``bp_align``, ``train_align``, each as
``_torch.npy``, ``_paddle.npy`` and ``_diff.log``. What the guide has no name for goes by the stage's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import BadInput
from convert.report import SCHEMA

from .page import BESIDE, ORDER, PAGE, drawn, stage_names

STEPS = {"weights": 1, "forward": 1, "data": 2, "metric": 2, "loss": 3, "backward": 4, "optimizer": 4, "train": 5,
         "generate": 5}
ASKED = {"forward": "forward", "metric": "metric", "loss": "loss", "backward": "bp_align", "train": "train_align"}
"""What the guide asks for, and calls so."""
MARK = "<!-- laid out by python -m align --submission -->"
README = "README.md"
CONVERSION = ("convert.json", "convert.md")


@dataclass(frozen=True)
class Part:
    """One stage's place: its files by name, each from where, and what is said of those that are not there."""

    stage: str
    folder: str
    files: Mapping[str, Path]
    absent: str | None
    report: Mapping[str, Any]


def require_free(place: Path) -> None:
    """:class:`BadInput` where nothing can be laid out at ``place``, or something lies there that is not ours."""
    above = next((folder for folder in place.absolute().parents if folder.exists()), place)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"--submission {place}: {above} is no directory that can be written to. Give another place.")
    if place.is_dir() and not any(place.iterdir()):
        return
    ours = (place / README).is_file() and MARK in (place / README).read_text("utf-8", "replace")
    if not ours and (place.exists() or place.is_symlink()):
        raise BadInput(f"--submission {place}: there is something else at that place, which is left as it is. Give a "
                       "directory that does not exist yet.")
    added = sorted(file for file in place.rglob("*") if not file.is_dir() and not _is_ours(file.relative_to(place)))
    if added:
        more = f" (+{len(added) - 1} more)" if added[1:] else ""
        raise BadInput(f"--submission {place}: {added[0]}{more} was not laid out by paddle-parity and would be lost. "
                       "Move it elsewhere, or give a directory that does not exist yet.")


def _is_ours(file: Path) -> bool:
    """Whether :func:`lay_out` gives such a name to a file."""
    if file.parent == Path():
        return file.name in (README, *CONVERSION, PAGE)
    stage = next((stage for stage in STEPS if file.stem in (stage, *(
        f"{ASKED.get(stage, stage)}{side}" for side in ("", "_torch", "_paddle", "_diff")))), None)
    return stage is not None and file.parent == Path(_folder(stage)) and file.suffix in (
        ".md", ".json", ".npy", ".log", ".png")


def lay_out(reports: Path, place: Path, outdated: Collection[str] = ()) -> Path:
    """Copy what the stages left in ``reports`` to ``place``, which appears whole; returns its README.

    Of the stages that are ``outdated`` what is there tells of another state of the run, and is left out.
    """
    require_free(place)
    place = place.resolve()
    parts = [_part(stage, reports, stage in outdated) for stage in sorted(STEPS, key=STEPS.__getitem__)
             if stage in ORDER]
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as staging:
        staged = Path(staging) / "staged"
        for part in parts:
            (staged / part.folder).mkdir(parents=True, exist_ok=True)
            for name, source in part.files.items():
                shutil.copyfile(source, staged / part.folder / name)
        for name in CONVERSION:
            source = next((one for one in (reports / name, reports.parent / name) if one.is_file()), None)
            if source:
                shutil.copyfile(source, staged / name)
        if any(part.report for part in parts):
            (staged / PAGE).write_text(drawn(reports, {*outdated, *BESIDE}), "utf-8")
        (staged / README).write_text(_readme(reports, parts), "utf-8")
        if place.exists():
            shutil.rmtree(place)
        staged.rename(place)
    return place / README


def _part(stage: str, reports: Path, is_outdated: bool) -> Part:
    folder, name = _folder(stage), ASKED.get(stage, stage)
    report = _report(reports / f"{stage}.json")
    if report is not None and is_outdated:
        return Part(stage, folder, {}, "not carried out; the report that there is may tell of another state of the run",
                    {})
    if report is None:
        absent = "not carried out" if stage in stage_names() else "there is no such stage yet"
        return Part(stage, folder, {}, absent, {})
    files = {f"{stage}.{kind}": reports / f"{stage}.{kind}" for kind in ("md", "json")}
    traces = {f"{name}_{side}.npy": reports / "traces" / f"{stage}_{side}.npy" for side in ("torch", "paddle")}
    stale = [side for side, role in (("torch", "reference"), ("paddle", "candidate"))
             if not _is_of(reports / "traces" / f"{stage}_{side}.provenance", report, role)]
    absent = None
    if stage == "weights":
        return Part(stage, folder, _there(files), absent, report)
    if stale:
        absent = f"no recording of {' and '.join(stale)} belongs to this report"
    else:
        files |= traces | {f"{name}_diff.log": reports / "traces" / f"{stage}_diff.txt"}
        lost = [one for one, source in files.items() if not source.is_file()]
        more = {f"{name}_{side}.log": reports / "traces" / f"{stage}_{side}.log" for side in ("torch", "paddle")}
        files |= _there(more | {f"{one}.png": reports / f"{stage}.png" for one in (name, stage)})
        absent = f"{', '.join(lost)}: not written; reprod_log is not installed" if lost else None
    return Part(stage, folder, _there(files), absent, report)


def _folder(stage: str) -> str:
    return f"pipeline/Step{STEPS[stage]}"


def _there(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: source for name, source in files.items() if source.is_file()}


def _report(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None


def _is_of(provenance: Path, report: Mapping[str, Any], role: str) -> bool:
    """Whether a recording was made on the inputs, and of the weights and framework, that the report tells of."""
    try:
        told = json.loads(provenance.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("inputs_digest") == report.get("inputs_digest") and all(
        told.get(name) == value for name, value in (report.get(role) or {}).items())


def _readme(reports: Path, parts: list[Part]) -> str:
    first: Mapping[str, Any] = next((part.report for part in parts if part.report), {})
    return "\n".join([
        MARK, f"# {first.get('run', reports.name)}: {first.get('head', 'model')}, torch against Paddle", "",
        "Laid out as PaddlePaddle's paper-reproduction guide asks. `*_torch.npy` and `*_paddle.npy` open with "
        "`ReprodDiffHelper().load_info`; `*_diff.log` is its comparison of the two, which asks for 1e-5 on average, "
        "whatever the size of a figure: of a perplexity of 300 that is a rounding of float32. The verdict is not taken "
        "from that: it is `verdict` in each stage's `.json`, judged by torch's own rounding error, and told in its "
        "`.md`. "
        "`convert.md` says which weight became which, `index.html` shows everything on one page.", "",
        "| step | what | verdict | largest rel-L2 | files |", "| --- | --- | --- | --- | --- |", *map(_row, parts), "",
        *_absences(parts)]) + "\n"


def _row(part: Part) -> str:
    errors = [tensor.get("rel_l2") for tensor in part.report.get("tensors", ()) if tensor.get("rel_l2") is not None]
    verdict = part.report.get("verdict", "–")
    where = f", first at `{part.report['first_divergence']}`" if part.report.get("first_divergence") else ""
    files = ", ".join(f"`{name}`" for name in part.files) or f"none: {part.absent}"
    return (f"| {part.folder.removeprefix('pipeline/')} | {part.stage} | {verdict}{where} "
            f"| {f'{max(errors):.1e}' if errors else '–'} | {files} |")


def _absences(parts: list[Part]) -> Iterator[str]:
    """What the guide asks for and is not here, and why."""
    told = [f"- `{part.folder}/{ASKED[part.stage]}_*`: {part.absent}." for part in parts
            if part.absent and part.stage in ASKED]
    yield from ["Asked for by the guide, and not here:", "", *told] if told else ["Nothing that the guide asks for is "
                                                                                "absent."]
