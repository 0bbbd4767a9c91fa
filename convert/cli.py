"""The flags that every family shares, progress, and the one way through: header, plan, stream, verify, report."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import BadInput, guarded

if TYPE_CHECKING:
    from .plan import Plan
    from .rules import Config, Family
    from .writer import Layout

COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "*.model", "preprocessor_config.json")
HALF = ("float16", "bfloat16", "torch.float16", "torch.bfloat16")


def main(family: Family, arguments: Sequence[str] | None = None) -> int:
    """The command line of one family. Returns the exit code."""
    options = _parser(f"python -m convert.{family.name}", family.name).parse_args(arguments)
    return guarded(lambda: run(family, options))


def run(family: Family, options: argparse.Namespace) -> int:
    """Carry out what ``options`` ask for."""
    if options.rules:
        from .report import print_rules
        print_rules(family)
        return 0
    demo = options.source is None
    output = Path(options.output or (f"out/demo-{family.name}" if demo else f"out/{_last_component(options.source)}"))
    if not output.name or output.name == "..":
        raise BadInput(f"--output {options.output} has no last component to name the run after.")
    from .report import refuse_unwritable
    from .writer import made_from, parse_size, refuse_existing
    try:
        shard_size = parse_size(options.shard_size)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"--shard-size {options.shard_size} is not a size; give for example 5GB or 512MiB.") from error
    if not options.dry_run:
        rebuilt = demo and options.output is None and made_from(output) == str(_demo_source(family))
        options.overwrite = options.overwrite or rebuilt
        refuse_existing(output, options.overwrite)
        refuse_unwritable(Path(options.reports))
    with _source(family, options) as (source, path, revision):
        conversion_of(family, options, source, path, revision, output, shard_size)
    return 0


def conversion_of(family: Family, options: argparse.Namespace, source: str, path: Path, revision: str | None,
                  output: Path, shard_size: int) -> None:
    """Header, plan, stream, verify, report. Nothing is written before the plan is total."""
    from .checkpoint import opened
    from .plan import config_for, make_plan
    from .writer import make_layout, refuse_overlap
    refuse_overlap(path, output)
    with opened(path) as checkpoint:
        plan = make_plan(family, config_for(family, path, checkpoint.tensors), checkpoint.tensors, options.dtype)
        layout = make_layout(plan.moves, options.format, shard_size)
        if options.dry_run:
            from .report import print_plan
            print_plan(plan, [(file.name, file.size) for file in layout.files], output)
            return
        _convert(plan, layout, checkpoint, options, source, path, revision, output)


def _convert(plan: Plan, layout: Layout, checkpoint: Any, options: argparse.Namespace, source: str, path: Path,
             revision: str | None, output: Path) -> None:
    from .report import Conversion, tensor_rows, versions
    from .stream import carry_out, digest_of
    from .verify import verify
    from .writer import MARKER, Staging, refuse_existing
    started = time.perf_counter()
    config, notes = target_config(plan)
    with Staging(output) as staging:
        refuse_existing(output, options.overwrite)  # again, now that nobody else can be writing it
        staging.allocate(layout)
        with _progress(f"converting {output.name}", plan.nbytes) as advance:
            digests = carry_out(plan, checkpoint, layout, staging, allow_nonfinite=options.allow_nonfinite,
                                advance=advance)
        if not options.no_verify:
            with _progress("reading back", plan.nbytes) as advance:
                verify(plan, checkpoint, staging.path, advance)
        conversion = Conversion(
            run=output.name, family=plan.family.name, head=plan.head.architecture, source=source,
            path=str(path), revision=revision,
            output=str(output), format=options.format, dtype=options.dtype,
            files=[file.name for file in layout.files],
            tensors=tensor_rows(plan, digests.source, digests.target),
            dropped=[{"source": name, "why": why} for name, why in plan.dropped],
            verified=not options.no_verify, bytes=plan.nbytes,
            source_digest=digest_of(checkpoint.tensors, digests.source),
            target_digest=digest_of({move.target: move for move in plan.moves}, digests.target),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            versions=versions("paddle-parity", "numpy", "xxhash"), notes=notes,
            finished=datetime.now(timezone.utc).isoformat(),
        )
        (staging.path / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (staging.path / MARKER).write_text(json.dumps({
            "family": conversion.family, "head": conversion.head, "source": conversion.source,
            "source_digest": conversion.source_digest, "target_digest": conversion.target_digest}, indent=2) + "\n")
        _bring_along(path, staging.path)
        staging.publish()
    reports = conversion.save(Path(options.reports))
    _tell(conversion, reports, getattr(options, "family", None))


def target_config(plan: Plan) -> tuple[Config, list[str]]:
    """The config for the result, and a sentence for everything in it that differs from the source's."""
    config, notes = dict(plan.config), []
    if plan.declared != plan.head.architecture:
        config["architectures"] = [plan.head.architecture]
        notes.append(f"The config names {plan.declared or 'no architecture'}, the tensors are those of "
                     f"{plan.head.architecture}: the result says so.")
    for key, value in plan.family.additions(config).items():
        if config.get(key) is None and value is not None:
            config[key] = value
            notes.append(f"config.json: {key} = {value} is added, because PaddleNLP's class asks for it.")
    half = config.pop("torch_dtype", None) or config.get("dtype")
    if half in HALF:
        config["dtype"] = "float32"
        notes.append(f"config.json: dtype = float32 instead of {half}, because Paddle's CPU cannot compute in half; "
                     f'on a GPU load with from_pretrained(..., dtype="{half.removeprefix("torch.")}").')
    return config, notes


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


def _last_component(source: str) -> str:
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


def _tell(conversion: Any, reports: Path, family_file: str | None) -> None:
    made = sum(tensor["rule"] == "buffer" for tensor in conversion.tensors)
    exact = "bit-exact" if conversion.dtype == "keep" else f"bit-exact but for the cast to {conversion.dtype}"
    proof = f"{exact}, read back and compared" if conversion.verified else "NOT verified (--no-verify)"
    print(f"{conversion.output}: {len(conversion.tensors)} tensors ({made} of them made here), {conversion.bytes:,} "
          f"bytes, {proof}, in {conversion.seconds:.1f} s.")
    for note in conversion.notes:
        print(f"note: {note}")
    print(f"report: {reports / 'convert.md'}\nnext: python -m align.weights --run {conversion.run}"
          f"{f' --family {family_file}' if family_file else ''}")


def _parser(program: str, family: str,
            without: str = "Without arguments: the built-in demo checkpoint.") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Convert a torch checkpoint of {family} to PaddlePaddle, bit-exactly.\n{without}")
    add = parser.add_argument
    add("--source", metavar="PATH-OR-ID", help="a checkpoint directory, one file, or a hub id (EleutherAI/gpt-j-6b)")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--output", metavar="DIR", help="the directory to make; default out/<last component of the source>")
    add("--dtype", choices=("keep", "float32", "float16", "bfloat16"), default="keep", help="default keep")
    add("--format", choices=("safetensors", "pdparams"), default="safetensors", help="default safetensors")
    add("--shard-size", metavar="SIZE", default="5GB", help="largest file, as 5GB or 512MiB; default 5GB")
    add("--no-verify", action="store_true", help="do not read the result back")
    add("--allow-nonfinite", action="store_true", help="convert NaN and inf instead of refusing them")
    add("--overwrite", action="store_true", help="replace an output that an earlier conversion made")
    add("--rules", action="store_true", help="print the name map, the do-not-transpose list and the buffers, and stop")
    add("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    add("--reports", metavar="DIR", default="reports", help="where the report goes; default reports")
    return parser
