"""``python -m convert.back --source OUT --output DIR``: Paddle back to torch, as ``save_pretrained`` writes it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .__main__ import families, family_named, load_family
from .cli import Task, add_shared_flags, convert, described, last_component, prepared
from .direction import ABSENT, Direction, Result, main_dtype
from .errors import BadInput, guarded

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .plan import Plan
    from .rules import Config, Family, Filling

TORCHS_DROPPED = ("paddlenlp_version",)
TORCHS_FILES = (".bin", ".pt", ".pth")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of a conversion back."""
    options = _parser().parse_args(arguments, argparse.Namespace(format="safetensors"))
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Carry out what ``options`` ask for."""
    if options.source is None and not (options.rules and options.family):
        raise BadInput("give --source, the directory of a Paddle checkpoint or its one file.")
    family = _family_of(options)
    if options.rules:
        from .report import print_rules
        print_rules(family.inverse(), TO_TORCH.stage)
        return 0
    path = Path(options.source)
    named = path if path.is_dir() else path.resolve().parent
    output = Path(options.output or f"out/{last_component(str(named))}-torch")
    shard_size = prepared(options, output)
    convert(TO_TORCH, Task(family, options.source, path, None, output, shard_size, options))
    return 0


def paddle_config(family: Family, path: Path) -> Config:
    """The ``config.json`` of a Paddle checkpoint, with torch's names for what PaddleNLP calls otherwise."""
    from .checkpoint import read_config
    config = dict(read_config(path))
    if config.get("model_type") == (family.paddlenlp or family.name):
        config["model_type"] = family.model_type or family.name
    config |= {key: config[theirs] for key, theirs in family.paddle_keys.items()
               if key not in config and theirs in config}
    known = {head.architecture for head in family.heads}
    torchs = {head.paddlenlp: head.architecture for head in reversed(family.heads)}
    named = config.get("architectures")
    if isinstance(named, list):
        config["architectures"] = [name if name in known else torchs.get(name, name) if isinstance(name, str) else name
                                   for name in named]
    return config


def torch_config(plan: Plan, marker: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The config for the result: what the conversion changed is undone, unless somebody has changed it since."""
    config, notes = dict(plan.config), []
    for key, change in _entries(marker, "config").items():
        now, was = config.get(key, ABSENT), change.get("was", ABSENT)
        if now not in (was, change.get("is", ABSENT)):
            if now is not ABSENT:
                notes.append(f"config.json: {key} = {now} is kept; it is not what the conversion wrote.")
        elif was is ABSENT:
            config.pop(key, None)
        else:
            config[key] = was
    for key in TORCHS_DROPPED:
        config.pop(key, None)
    held = main_dtype(plan)
    if held != marker.get("source_dtype"):
        config.pop("dtype", None)
        if config.get("torch_dtype") != held:
            config["torch_dtype"] = held
            notes.append(f"config.json: torch_dtype = {held}, as the tensors are.")
    return config, notes


def _plan(family: Family, path: Path, checkpoint: Checkpoint, dtype: str) -> Plan:
    from .checkpoint import framework_of
    from .plan import agreed, make_plan
    torchs = next((file for file in checkpoint.files if framework_of(file) == "pt"), None)
    if torchs is not None:
        raise _of_torch(torchs)
    config = agreed(family, paddle_config(family, path))
    plan = make_plan(family.inverse(), config, checkpoint.tensors, dtype)
    numbers = _marker_of(path).get("numbers")
    return _with_numbers(plan, numbers) if isinstance(numbers, dict) else plan


def _of_torch(file: Path) -> BadInput:
    return BadInput(f"{file} was written for torch. Give a Paddle checkpoint: what a conversion made, or what "
                    "PaddleNLP or paddle.save wrote.")


def _with_numbers(plan: Plan, numbers: Mapping[str, Any]) -> Plan:
    """``plan`` with what the conversion dropped put in the place of zeros."""
    return replace(plan, moves=tuple(
        replace(move, filling=_number(numbers[move.target]))
        if move.rule.kind == "made" and move.shape == () and isinstance(numbers.get(move.target), int) else move
        for move in plan.moves))


def _number(value: int) -> Filling:
    import numpy as np

    from .rules import Filling
    from .writer import MARKER
    if not -(1 << 63) <= value < 1 << 63:
        raise BadInput(f"{MARKER}: numbers has {str(value)[:40]}, which is no int64. Delete the entry; 0 is written "
                       "then.")
    return Filling(f"{value}, as the source had it", lambda shape, rows: np.full((len(rows), 1), value, np.int64))


def _conclude(plan: Plan, checkpoint: Checkpoint, source_digest: str, target_digest: str) -> Result:
    marker = _marker_of(checkpoint.path)
    config, notes = torch_config(plan, marker)
    if plan.family.remote_code:
        notes.append("The code of torch's classes, which config.json names under auto_map, is not in a Paddle "
                     "checkpoint: copy it from the original.")
    origin = marker.get("source")
    if "target_digest" in marker:
        if marker["target_digest"] != source_digest:
            notes.append(f"The tensors are not those that the conversion of {origin} wrote: trained or changed since.")
        elif marker.get("source_digest") == target_digest:
            notes.append(f"The result is what was converted: it has the digest of {origin}, {target_digest}.")
    return Result(config, {"torch_digest": target_digest}, notes)


def _next_step(task: Task, plan: Plan) -> str:
    if plan.head.reference:
        return (f'in Python, with a net of yours: from convert.custom import fill; net = fill(net, "{task.output}")\n'
                "      (its own load_state_dict needs strict=False: shared weights are there once, and no buffers)")
    return f'transformers.{plan.head.architecture}.from_pretrained("{task.output}")'


TO_TORCH = Direction("back", "pt", _plan, _conclude, _next_step)


def _family_of(options: argparse.Namespace) -> Family:
    """The family of a file that the user named, or the one of whose model type the checkpoint's config is."""
    if options.source is not None:
        _refuse_doubtful(Path(options.source))
    if options.family is not None:
        return load_family(Path(options.family))
    from .checkpoint import read_config
    kind = read_config(Path(options.source)).get("model_type")
    known = [family_named(name) for name in families()]
    of_torch = [family for family in known if kind == (family.model_type or family.name)]
    of_paddle = [family for family in known if kind == (family.paddlenlp or family.name)]
    if not of_torch + of_paddle:
        told = f"model_type is {kind!r}" if kind else "there is no model_type"
        raise BadInput(f"config.json is of no family that is known here: {told}. Known are "
                       f"{', '.join(family.name for family in known)}; give --family FILE for another.")
    return (of_torch + of_paddle)[0]


def _refuse_doubtful(path: Path) -> None:
    from .checkpoint import weights_in
    if not path.exists():
        raise BadInput(f"{path} does not exist.")
    if path.suffix in TORCHS_FILES:
        raise _of_torch(path)
    several = weights_in(path) if path.is_dir() else []
    if len(several) > 1:
        raise BadInput(f"{path} holds {' and '.join(several)}. Say which is meant: --source {path / several[-1]}")


def _marker_of(path: Path) -> Mapping[str, Any]:
    from .writer import marker_of
    return marker_of(path if path.is_dir() else path.parent)


def _entries(marker: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """What a marker says of ``key``, as far as it is what a conversion writes."""
    entries = marker.get(key)
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict)} if isinstance(
        entries, dict) else {}


def _parser() -> argparse.ArgumentParser:
    parser = described("python -m convert.back",
                       "Convert a Paddle checkpoint back to torch, bit-exactly, as save_pretrained of transformers'\n"
                       "class writes it. The family is read from its config.json.", (
                           "python -m convert.back --source out/gpt-j-6b --output back/gpt-j-6b",
                           "python -m convert.back --source runs/tuned/model_state.pdparams",
                           "python -m convert.back --family examples/my_gpt.py --source out/gpt2 --output from-openai"))
    add = parser.add_argument
    add("--source", metavar="PATH", help="what to convert: the directory of a Paddle checkpoint (out/gpt-j-6b), or its "
        "one file (model_state.pdparams)")
    add("--output", metavar="DIR", help="the directory to make, as back/gpt-j-6b; default out/<last component of the "
        "source>-torch")
    add("--family", metavar="FILE", help="the family file of the torch net to go to, as examples/my_gpt.py; its code "
        "is run")
    add_shared_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
