"""The flags that every family shares, progress, and the one way through: header, plan, stream, verify, report."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import BadInput, guarded

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .direction import Direction
    from .plan import Plan
    from .report import Conversion
    from .rules import Family
    from .writer import Layout

COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "*.model", "preprocessor_config.json")


@dataclass(frozen=True)
class Task:
    """One conversion that is asked for. ``source`` is what the user calls it, ``path`` where it lies."""

    family: Family
    source: str
    path: Path
    revision: str | None
    output: Path
    shard_size: int
    options: argparse.Namespace


def main(family: Family, arguments: Sequence[str] | None = None) -> int:
    """The command line of one family. Returns the exit code."""
    options = parser_of(f"python -m convert.{family.name}", family.name).parse_args(arguments)
    return guarded(lambda: run(family, options))


def run(family: Family, options: argparse.Namespace) -> int:
    """Carry out what ``options`` ask for."""
    if options.rules:
        from .report import print_rules
        print_rules(family)
        return 0
    from .direction import TO_PADDLE
    from .writer import marker_of
    demo = options.source is None
    if demo and options.revision:
        raise BadInput(f"--revision {options.revision} is of a hub id, and there is no --source. Give one, as --source "
                       "EleutherAI/gpt-j-6b")
    output = Path(options.output or (f"out/demo-{family.name}" if demo else f"out/{last_component(options.source)}"))
    rebuilt = demo and options.output is None and marker_of(output).get("source") == str(_demo_source(family))
    options.overwrite = options.overwrite or rebuilt
    shard_size = prepared(options, output)
    with _source(family, options) as (source, path, revision):
        convert(TO_PADDLE, Task(family, source, path, revision, output, shard_size, options))
    return 0


def prepared(options: argparse.Namespace, output: Path) -> int:
    """The shard size in bytes, after making sure that the result and its report can be written."""
    from .report import refuse_unwritable
    from .writer import parse_size, refuse_existing
    if not output.name or output.name == "..":
        raise BadInput(f"--output {options.output} has no last component to name the run after.")
    try:
        shard_size = parse_size(options.shard_size)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"--shard-size {options.shard_size} is not a size; give for example 5GB or 512MiB.") from error
    if not options.dry_run:
        refuse_existing(output, options.overwrite)
        refuse_unwritable(Path(options.reports))
    return shard_size


def convert(direction: Direction, task: Task) -> None:
    """Header, plan, stream, verify, report. Nothing is written before the plan is total."""
    from .checkpoint import opened
    from .writer import make_layout, refuse_overlap
    options = task.options
    if not options.dry_run:
        refuse_overlap(task.path, task.output)
    with opened(task.path) as checkpoint:
        plan = direction.plan(task.family, task.path, checkpoint, options.dtype)
        layout = make_layout(plan.moves, options.format, task.shard_size, direction.framework)
        if options.dry_run:
            from .report import print_plan
            print_plan(plan, [(file.name, file.size) for file in layout.files], task.output, direction.stage)
            return
        _write(direction, task, plan, layout, checkpoint)


def _write(direction: Direction, task: Task, plan: Plan, layout: Layout, checkpoint: Checkpoint) -> None:
    from .report import Conversion, tensor_rows, versions
    from .stream import carry_out, digest_of
    from .verify import verify
    from .writer import MARKER, Staging, refuse_existing
    started = time.perf_counter()
    options, output = task.options, task.output
    with Staging(output) as staging:
        refuse_existing(output, options.overwrite)  # again, now that nobody else can be writing it
        staging.allocate(layout)
        with _progress(f"converting {output.name}", plan.nbytes) as advance:
            digests = carry_out(plan, checkpoint, layout, staging, allow_nonfinite=options.allow_nonfinite,
                                advance=advance)
        if not options.no_verify:
            with _progress("reading back", plan.nbytes) as advance:
                verify(plan, checkpoint, staging.path, advance)
        source_digest = digest_of(checkpoint.tensors, digests.source)
        target_digest = digest_of({move.target: move for move in plan.moves}, digests.target)
        result = direction.conclude(plan, checkpoint, source_digest, target_digest)
        conversion = Conversion(
            run=output.name, family=plan.family.name, head=plan.head.architecture, source=task.source,
            path=str(task.path), revision=task.revision,
            output=str(output), format=options.format, dtype=options.dtype,
            files=[file.name for file in layout.files],
            tensors=tensor_rows(plan, digests.source, digests.target),
            dropped=[{"source": name, "why": why} for name, why in plan.dropped],
            verified=not options.no_verify, bytes=plan.nbytes,
            source_digest=source_digest, target_digest=target_digest,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            versions=versions("paddle-parity", "numpy", "xxhash"), notes=result.notes,
            finished=datetime.now(timezone.utc).isoformat(), stage=direction.stage,
        )
        _write_json(staging.path / "config.json", result.config)
        _write_json(staging.path / MARKER, {
            "family": conversion.family, "head": conversion.head, "source": conversion.source,
            "source_digest": source_digest, **result.marker})
        _bring_along(task.path, staging.path)
        staging.publish()
    reports = conversion.save(Path(options.reports))
    _tell(conversion, reports, direction.next_step(task, plan))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def _source(family: Family, options: argparse.Namespace) -> Iterator[tuple[str, Path, str | None]]:
    """What the user calls the source, where it lies, and its pinned revision."""
    if options.source is not None:
        from .hub import resolve
        yield options.source, *resolve(options.source, options.revision)
        return
    if not family.demo:
        raise BadInput(f"family {family.name} has no built-in demo; give --source.")
    from .demo import build_demo
    beside = {"pictures": " that takes pictures", "none": ""}.get(family.tokenizer, " with a tokenizer")
    print(f"No --source: converting the built-in demo checkpoint, a small random {family.name}{beside}.\n"
          f"A real one: python -m convert.{family.name} --source DIRECTORY-OR-HUB-ID --output out/NAME",
          file=sys.stderr)
    with TemporaryDirectory() if options.dry_run else nullcontext() as elsewhere:
        directory = Path(elsewhere or "") / _demo_source(family)
        yield str(directory), build_demo(family, directory), None


def _demo_source(family: Family) -> Path:
    return Path("out") / f"demo-{family.name}-source"


def last_component(source: str) -> str:
    path = Path(source)
    return path.resolve().name if path.exists() else path.name


def _bring_along(source: Path, target: Path) -> None:
    directory = source if source.is_dir() else source.parent
    for pattern in COMPANIONS:
        for file in sorted(directory.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


@contextmanager
def _progress(task: str, total: int) -> Iterator[Any]:
    """A bar with bytes, rate and time left on stderr; quiet where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                  TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(task, total=total)
        yield lambda nbytes: progress.advance(bar, nbytes)


def _tell(conversion: Conversion, reports: Path, next_step: str) -> None:
    made = sum(tensor["rule"] == "buffer" for tensor in conversion.tensors)
    exact = "bit-exact" if conversion.dtype == "keep" else f"bit-exact but for the cast to {conversion.dtype}"
    proof = f"{exact}, read back and compared" if conversion.verified else "NOT verified (--no-verify)"
    print(f"{conversion.output}: {len(conversion.tensors)} tensors ({made} of them made here), {conversion.bytes:,} "
          f"bytes, {proof}, in {conversion.seconds:.1f} s.")
    for note in conversion.notes:
        print(f"note: {note}")
    print(f"report: {reports / conversion.stage}.md\nnext: {next_step}")


def parser_of(program: str, family: str, without: str = "Without arguments: the built-in demo checkpoint.",
              examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The flags of a conversion."""
    parser = described(program, f"Convert a torch checkpoint of {family} to PaddlePaddle, bit-exactly.\n{without}",
                       examples or (program, f"{program} --source DIRECTORY --output out/mine --dtype float16",
                                    f"{program} --source DIRECTORY --dry-run"))
    add = parser.add_argument
    add("--source", metavar="PATH-OR-ID", help="what to convert: a checkpoint's directory, its one file (my.pt), or a "
        "hub id (EleutherAI/gpt-j-6b)")
    add("--revision", help="of a hub id the branch, tag or commit, as float16; default main")
    add("--output", metavar="DIR", help="the directory to make, which names the run, as out/gpt-j-6b; default "
        "out/<last component of the source>")
    add("--format", choices=("safetensors", "pdparams"), default="safetensors", help="what to write, as pdparams for "
        "paddle.load; default safetensors")
    add_shared_flags(parser)
    return parser


def described(program: str, description: str, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser without flags, whose description keeps its lines; ``examples`` are command lines."""
    return argparse.ArgumentParser(
        prog=program, description="\n  ".join([f"{description}\n", *examples] if examples else [description]),
        formatter_class=argparse.RawDescriptionHelpFormatter)


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """What both directions can be told."""
    add = parser.add_argument
    add("--dtype", choices=("keep", "float32", "float16", "bfloat16"), default="keep",
        help="what weights are rounded to, as float16; default keep: as the source has them")
    add("--shard-size", metavar="SIZE", default="5GB", help="the largest file to write, as 5GB or 512MiB; default 5GB")
    add("--no-verify", action="store_true", help="do not read the result back and compare it; the report says so")
    add("--allow-nonfinite", action="store_true", help="convert NaN and inf as they are, instead of refusing them")
    add("--overwrite", action="store_true", help="replace an output that an earlier conversion made, and no other")
    add("--rules", action="store_true", help="print the name map, the do-not-transpose list and the buffers, and stop")
    add("--dry-run", action="store_true", help="print the plan for --source, and stop; nothing is written")
    add("--reports", metavar="DIR", default="reports", help="where the report goes, as ../reports; default reports")
