"""``python -m convert.draft --torch CHECKPOINT --paddle CHECKPOINT``: a rule file for an unknown pair, to be finished.

The draft says of every rule whether it is sure, and if not, what else could be. A square weight is never sure by its
shape; where both checkpoints hold the same values, these decide.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import described
from .errors import BadInput, guarded

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .drafting import Draft
    from .matching import Side
    from .rules import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of a draft."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Write the draft to ``--output``, or to stdout, and tell on stderr what is left to do."""
    from contextlib import ExitStack

    from .drafting import draft
    output = Path(options.output) if options.output else None
    if output and output.suffix != ".py":
        raise BadInput(f"--output {output} does not end in .py; a family file is a Python file.")
    if output and output.exists():
        raise BadInput(f"{output} exists; it is not touched. Give another --output.")
    with ExitStack() as stack:
        torch, paddle = (_side(Path(name), stack, flag) for flag, name in (
            ("--torch", options.torch), ("--paddle", options.paddle)))
        drafted = draft(torch, paddle, _config(Path(options.torch)))
    if output:
        try:
            output.write_text(drafted.text, "utf-8")
        except OSError as error:
            raise BadInput(f"--output {output} cannot be written: {error.strerror}.") from error
    else:
        print(drafted.text, end="")
    _tell(drafted, options, output)
    return 0


def _side(path: Path, stack: Any, flag: str) -> Side:
    """What ``flag`` gives: a checkpoint, or the JSON of a header: ``{"name": [2, 3], …}``."""
    from .checkpoint import open_checkpoint, read_json
    from .dtypes import to_float32
    from .matching import Side
    if path.suffix == ".json" and path.is_file():
        shapes = read_json(path)
        for name, shape in shapes.items():
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise BadInput(f"{path.name}: {name} is {str(shape)[:40]}; its shape is needed, as whole numbers.")
        return Side(_named({name: tuple(shape) for name, shape in shapes.items()}, path))
    checkpoint = stack.enter_context(open_checkpoint(path))
    _refuse_other_side(checkpoint, flag)
    tensors = checkpoint.tensors
    return Side(_named({name: tuple(info.shape) for name, info in tensors.items()}, path),
                lambda name: to_float32(checkpoint.read(name), tensors[name].dtype.name))


def _refuse_other_side(checkpoint: Checkpoint, flag: str) -> None:
    """As far as files say which framework they are for. Of safetensors that numpy wrote none can tell."""
    from .checkpoint import framework_of
    from .writer import marker_of
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    paddles = "target_digest" in marker_of(directory) or checkpoint.files[0].suffix == ".pdparams"
    if paddles if flag == "--torch" else framework_of(checkpoint.files[0]) == "pt":
        sides = ("Paddle", "torch") if flag == "--torch" else ("torch", "Paddle")
        raise BadInput(f"{flag} {checkpoint.path} is a checkpoint of {sides[0]}, and one of {sides[1]} is needed "
                       "there. Are --torch and --paddle exchanged? No draft was made.")


def _named(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Mapping[str, tuple[int, ...]]:
    """``shapes``, after making sure that the names can stand in a family file."""
    for name in shapes:
        if not name.isprintable() or set(name) & set("{},\"'\\#"):
            raise BadInput(f"{path.name}: no rule can name the tensor {name!r}.")
    if not shapes:
        raise BadInput(f"{path.name} names no tensor.")
    return shapes


def _config(path: Path) -> Config:
    """The config.json beside torch's checkpoint; empty where there is none."""
    from .checkpoint import read_json
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file) if file.is_file() else {}


def _tell(drafted: Draft, options: argparse.Namespace, output: Path | None) -> None:
    sure = sum(line.sure for line in drafted.lines)
    name = output or "my_family.py"
    many = len(drafted.lines)
    alone = [f"{count} {framework} {'tensor has' if count == 1 else 'tensors have'} no counterpart and "
             f"{'is' if count == 1 else 'are'} {fate}" for count, framework, fate in (
                 (drafted.torch_left, "torch", "dropped"), (drafted.paddle_left, "Paddle", "made")) if count]
    fault = f"As it is, the plan is not whole: {drafted.fault}" if drafted.fault else (
        "As it is, the plan is whole: no tensor of either checkpoint is without a rule.")
    others = drafted.text.count("# check:") - (many - sure)
    besides = f", and {others} other {'mark' if others == 1 else 'marks'} to check" if others else ""
    print(f"{output or 'draft'}: {many} rules, {sure} of them sure, {many - sure} to check{besides}.\n"
          f"{'; '.join(alone) or 'Every tensor has a counterpart'}.\n{fault}\n"
          f"next: read what is marked `check`, then\n"
          f"      python -m convert --family {name} --source {options.torch} --output out/mine --dry-run",
          file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = described(
        "python -m convert.draft",
        "Draft a family file from a torch and a Paddle checkpoint of one architecture, by values where both hold the\n"
        "same, else by names, shapes and order. Nothing in a checkpoint is run.\n"
        "The draft marks each rule as sure or to be checked; a square weight is never sure by its shape.", (
            "python -m convert.draft --torch my.pt --paddle my.pdparams --output my_family.py",
            "python -m convert --family my_family.py --source my.pt --output out/mine --dry-run"))
    add = parser.add_argument
    told = "a checkpoint directory, one file, or a .json that holds {name: shape}"
    add("--torch", metavar="CHECKPOINT", required=True,
        help=f"torch's side, as checkpoints/original: {told}; the config.json beside it gives sizes their names")
    add("--paddle", metavar="CHECKPOINT", required=True, help=f"Paddle's side, as my.pdparams: {told}")
    add("--output", metavar="FILE", help="the family file to write, as my_family.py; without it the draft is printed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
