"""``python -m benchmarks``: measure every claim of speed and memory beside its rival, and say what was found."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from convert.errors import ALIGNED, DIVERGED, BadInput, guarded

from .bench import ROOT, Bench, Unmeasured, without_paths
from .claim import Claim
from .claims import CLAIMS
from .results import FAILED, MISSED, Outcome, judge, machine, publish, published, save, table
from .shapes import FULL, SCALES, SMALL, Scale, Shape

RESULT_SHARE = 1.15


def main(arguments: Sequence[str] | None = None, scales: Mapping[str, Scale] = SCALES) -> int:
    """0: all measured, and no limit missed. 1: not so. 2: bad input."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options, scales[FULL if options.full else SMALL]))


def _run(options: argparse.Namespace, scale: Scale) -> int:
    chosen = choose(options.only, scale)
    if options.list:
        print(listed(chosen))
        return ALIGNED
    results, readme = _places(options)
    parent = Path(options.directory)
    refuse_full_disk(chosen, scale, parent)
    with _interruptible(), _scratch(parent, options.keep) as directory:
        on = machine(directory)
        with _progress(len(chosen)) as tell:
            bench = Bench(scale, directory, lambda told: tell(told, False))
            outcomes = []
            for outcome in measure_all(chosen, bench):
                outcomes.append(outcome)
                held = save(results, scale.name, [outcome], on)
                tell(f"{outcome.name}: {outcome.judgement}{f', {outcome.why}' if outcome.why else ''}", True)
    print(table(scale.name, outcomes, on))
    if readme:
        publish(readme, published(held, [claim.name for claim in CLAIMS]))
    return DIVERGED if any(outcome.judgement in (FAILED, MISSED) for outcome in outcomes) else ALIGNED


def _places(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where results and table go. Results that go elsewhere do not replace the project's table."""
    readme = options.readme or (None if options.results else ROOT / "README.md")
    return Path(options.results or ROOT / "benchmarks" / "results.json"), readme and Path(readme)


def measure_all(claims: Sequence[Claim], bench: Bench) -> Iterator[Outcome]:
    """Claim by claim; a checkpoint is deleted as soon as no later claim needs it."""
    for number, claim in enumerate(claims):
        bench.wanted = _shapes(claims[number + 1:], bench.scale)
        outcome = measure(claim, bench)
        for shape in claim.shapes(bench.scale):
            bench.release(shape)
        yield outcome


def measure(claim: Claim, bench: Bench) -> Outcome:
    """One claim; whatever goes wrong with it is its own failure and nobody else's."""
    started = time.perf_counter()
    try:
        measured, why = claim.measure(bench), None
        judgement = judge(claim, measured, bench.scale.full)
    except Unmeasured as error:
        measured, judgement, why = None, FAILED, without_paths(str(error))
    except Exception as error:
        measured, judgement, why = None, FAILED, without_paths(f"{type(error).__name__}: {error}")
    return Outcome(claim.name, claim.sentence, claim.rival, claim.limit, judgement, measured, why,
                   time.perf_counter() - started, datetime.now(timezone.utc).isoformat(timespec="seconds"))


def choose(names: Sequence[str] | None, scale: Scale) -> list[Claim]:
    """The claims with these names, or whose names begin with them before a dot; all where none are named."""
    for name in names or ():
        found = [claim for claim in CLAIMS if _named(claim, name)]
        if not found:
            groups = dict.fromkeys(claim.name.partition(".")[0] for claim in CLAIMS)
            raise BadInput(f"--only {name} names no claim. There are {', '.join(groups)}; see --list.")
        if not any(claim.possible(scale) for claim in found):
            raise BadInput(f"--only {name} is measured at full size only: add --full.")
    return [claim for claim in CLAIMS if claim.possible(scale)
            and (not names or any(_named(claim, name) for name in names))]


def disk_needed(claims: Sequence[Claim], scale: Scale) -> int:
    """Bytes at the worst moment: a checkpoint, its conversion and another result of it, and what waits for later."""
    moments = [
        sum(held.nbytes * (1 + RESULT_SHARE) for held in (waiting | {shape})) + shape.nbytes * RESULT_SHARE
        for number, claim in enumerate(claims) for shape in claim.shapes(scale)
        for waiting in [_shapes(claims[:number], scale) & _shapes(claims[number:], scale)]
    ]
    return int(max(moments, default=0))


def refuse_full_disk(claims: Sequence[Claim], scale: Scale, parent: Path) -> None:
    """:class:`BadInput` before anything is written when ``parent`` is no place for it."""
    existing = next(folder for folder in (parent.absolute(), *parent.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise BadInput(f"--directory {parent}: {existing.name} is a file. Give a directory.")
    needed, free = disk_needed(claims, scale), shutil.disk_usage(existing).free
    print(f"needs up to {needed / 1e9:.1f} GB of disk in {parent} for a while; {free / 1e9:.1f} GB are free.",
          file=sys.stderr)
    if free < needed:
        raise BadInput(f"{parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed. Give another "
                       "--directory, or fewer claims with --only.")


def listed(claims: Sequence[Claim]) -> str:
    """Names, sentences, limits and rivals as a Markdown table."""
    rows = [f"| {claim.name} | {claim.sentence} | {claim.limit or '–'} | {claim.rival} |" for claim in claims]
    return "\n".join(["| name | claim | limit | rival |", "| --- | --- | --- | --- |", *rows])


def _shapes(claims: Sequence[Claim], scale: Scale) -> frozenset[Shape]:
    return frozenset(shape for claim in claims for shape in claim.shapes(scale))


def _named(claim: Claim, name: str) -> bool:
    return claim.name == name or claim.name.startswith(f"{name}.")


@contextmanager
def _scratch(parent: Path, keep: bool) -> Iterator[Path]:
    """A new directory beneath ``parent``; it goes again, and so do the parents that were made for it."""
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="benchmarks-", dir=parent)).absolute()
    except OSError as error:
        raise BadInput(f"--directory {parent}: {error.strerror}.") from error
    try:
        yield directory
    finally:
        if keep:
            print(f"kept: {parent / directory.name}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def _interruptible() -> Iterator[None]:
    """A termination is an interruption: what was generated is deleted."""
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, bool], None]]:
    """``tell(text, done)``: a bar over the claims on stderr; a line for each that is done where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda told, done: console.print(told) if done else None
        return
    with Progress(MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False),
                  TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)

        def tell(told: str, done: bool) -> None:
            progress.update(bar, advance=int(done), description=told)
            if done:
                progress.console.print(told)
        yield tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(": ", 1)[1])
    add = parser.add_argument
    add("--full", action="store_true", help="GPT-J-6B's full shape with 28 layers, 12.1 GB, and judge times")
    add("--only", action="append", metavar="NAME", help="a claim, or a group of them (copy, memory, …); more than once")
    add("--list", action="store_true", help="print the claims and stop")
    add("--directory", metavar="DIR", default="out", help="where the directory for what is generated goes; default out")
    add("--keep", action="store_true", help="do not delete what was generated and is left at the end")
    add("--results", metavar="FILE",
        help="default benchmarks/results.json of this project")
    add("--readme", metavar="FILE",
        help="gets the table between its benchmarks markers; default README.md of this project, or none with --results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
