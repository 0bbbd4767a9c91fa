"""``python -m align``: every stage in order, on one run, each in a process of its own.

A process for each, so that what one leaves in memory is gone before the next, and a stage that the system ends does not
take the others along. What was carried out and would come out the same is not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from convert import errors
from convert.cli import described

from .page import stage_names
from .stage import RecordedStage, add_flags, latest_told

if TYPE_CHECKING:
    from .done import Done

NEXT = {errors.DIVERGED: "diverged", errors.BAD_INPUT: "could not be carried out",
        errors.FRAMEWORK_MISSING: "lacks a framework", errors.OUR_FAULT: "failed by a fault of paddle-parity"}


def run_all(arguments: Sequence[str] | None = None) -> int:
    """The worst exit code of the stages that were carried out, or were before and are unchanged."""
    parser = described("python -m align", f"Every stage in order: {', '.join(stage_names())}. Stops at the first "
                       "that is not aligned, and ends with its exit code.", (
                           "python -m align", "python -m align --run gpt-j-6b --target paddlenlp",
                           "python -m align --keep-going --submission to-review",
                           "python -m align.forward --help   (a stage by itself, and its own flags)"))
    add_flags(parser)
    add = parser.add_argument
    add("--keep-going", action="store_true", help="carry out the stages behind one that is not aligned, too")
    add("--again", action="store_true", help="repeat what was carried out before, though nothing has changed since")
    add("--submission", metavar="DIR", help="lay the results out as the paper-reproduction guide's pipeline/Step1 to "
        "Step5, as to-review")
    options = parser.parse_args(arguments)
    if options.only and options.compare:
        parser.error("--only records a side, --compare judges two: give one of them")
    return errors.guarded(lambda: _run_all(options))


def _run_all(options: argparse.Namespace) -> int:
    from convert.report import latest_run

    from .done import Done
    from .runs import load_run
    from .submission import lay_out, require_free
    if options.submission:
        require_free(Path(options.submission))
    if options.run is None:
        print(latest_told(options), flush=True)
        options.run = latest_run(Path(options.reports))
    run = load_run(options.run, Path(options.reports), Path(options.family) if options.family else None)
    directory = run.directory if options.target == "models" else run.directory / options.target.replace(":", ".")
    done, codes, passed_by = Done.of(run, directory, options), {}, {}
    for name in stage_names():
        stage = import_module(f"{__package__}.{name}").STAGE
        if (options.only or options.compare) and not isinstance(stage, RecordedStage):
            continue
        if lacking := stage.lacking(run) or (isinstance(stage, RecordedStage) and stage.too_large(run, options)):
            passed_by[name] = lacking
            print(f"{name}: passed by. {lacking}", flush=True)
            continue
        codes[name] = _carry_out(name, options, done)
        if codes[name] == errors.INTERRUPTED:
            return errors.INTERRUPTED
        if codes[name] and not options.keep_going:
            break
    _tell(codes, passed_by, options)
    if (page := directory / "index.html").is_file() and not options.only:
        print(f"page: {page}")
    if options.submission:
        outdated = [name for name in stage_names() if codes.get(name) not in (errors.ALIGNED, errors.DIVERGED)
                    and done.code(name) is None]
        print(f"submission: {lay_out(directory, Path(options.submission), outdated)}")
    return max(codes.values(), default=errors.BAD_INPUT)


def _carry_out(stage: str, options: argparse.Namespace, done: Done) -> int:
    """The exit code of a stage: what it was before, where nothing has changed since, or what it is now."""
    before = None if options.again or options.only or options.compare else done.code(stage)
    if before is not None:
        print(f"{stage}: {'diverged' if before else 'aligned'}, as before: neither source, output, flags, versions nor "
              "code have changed since. --again repeats it.", flush=True)
        return before
    code = subprocess.run([sys.executable, "-m", f"{__package__}.{stage}", *_flags(options)]).returncode
    if code == errors.INTERRUPTED:
        return code
    if code not in (errors.ALIGNED, *NEXT):
        ended = f"signal {-code}" if code < 0 else f"code {code}"
        print(f"error: align.{stage} was ended by the system ({ended}). If memory is short, try --paging on.",
              file=sys.stderr)
        return errors.OUR_FAULT
    return code


def _flags(options: argparse.Namespace) -> list[str]:
    """The shared flags that were given, or their defaults, as a command line."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return [word for action in parser._actions if (value := getattr(options, action.dest, None)) not in (None, False)
            for word in ([action.option_strings[-1]] if value is True else [action.option_strings[-1], str(value)])]


def _tell(codes: dict[str, int], passed_by: dict[str, str], options: argparse.Namespace) -> None:
    """How each stage ended, and which were not come to."""
    if options.only:
        return
    left = [name for name in stage_names() if name not in codes.keys() | passed_by.keys() and not options.compare]
    print("; ".join([*(f"{name} {NEXT.get(code, 'aligned')}" for name, code in codes.items()),
                     *[f"not carried out: {', '.join(left)} (--keep-going does)"] * bool(left)]) + ".", flush=True)


if __name__ == "__main__":
    sys.exit(run_all())
