"""What converting and converting back (``back.py``) do not share; the one way through is in ``cli.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .cli import Task
    from .plan import Plan
    from .rules import Config, Family

HALF = ("float16", "bfloat16", "torch.float16", "torch.bfloat16")
ABSENT = object()


@dataclass(frozen=True)
class Result:
    """What lies beside the tensors of a result. ``marker`` is what a later conversion wants to know of this one."""

    config: Config
    marker: Mapping[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Direction:
    """``stage`` names the report; ``framework`` is what a safetensors file says it was made for.

    ``plan(family, path, checkpoint, dtype)`` is total or an error; ``conclude(plan, checkpoint, source_digest,
    target_digest)`` says what goes beside the tensors; ``next_step(task, plan)`` tells the user what to do then.
    """

    stage: str
    framework: str
    plan: Callable[[Family, Path, Checkpoint, str], Plan]
    conclude: Callable[[Plan, Checkpoint, str, str], Result]
    next_step: Callable[[Task, Plan], str]


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


def differences(before: Config, after: Config) -> dict[str, dict[str, Any]]:
    """Every key that two configs do not say the same of: what it ``was`` and what it ``is``, where it is there."""
    return {key: {word: config[key] for word, config in (("was", before), ("is", after)) if key in config}
            for key in (*before, *(key for key in after if key not in before))
            if before.get(key, ABSENT) != after.get(key, ABSENT)}


def dropped_numbers(plan: Plan, checkpoint: Checkpoint) -> dict[str, int]:
    """The whole numbers among what is dropped, by transformers' names: batch norms count what they have seen."""
    dropped = {name for name, _ in plan.dropped}
    return {name: int(checkpoint.read(key)) for name, key in plan.keys.items()
            if key in dropped and checkpoint.tensors[key].shape == () and not checkpoint.tensors[key].dtype.floating}


def main_dtype(plan: Plan, of_source: bool = False) -> str | None:
    """The dtype of most of a plan's weights; None where it moves none. Counts are no weights."""
    sizes: dict[str, int] = {}
    for move in plan.moves:
        dtype = move.source_dtype if of_source else move.dtype
        if dtype.floating:
            sizes[dtype.name] = sizes.get(dtype.name, 0) + (move.nbytes if move.sources else 0)
    return max(sizes, key=sizes.__getitem__, default=None)


def _plan(family: Family, path: Path, checkpoint: Checkpoint, dtype: str) -> Plan:
    from .plan import config_for, make_plan
    return make_plan(family, config_for(family, path, checkpoint.tensors), checkpoint.tensors, dtype)


def _conclude(plan: Plan, checkpoint: Checkpoint, source_digest: str, target_digest: str) -> Result:
    config, notes = target_config(plan)
    return Result(config, {
        "target_digest": target_digest, "source_dtype": main_dtype(plan, of_source=True),
        "config": differences(plan.config, config), "numbers": dropped_numbers(plan, checkpoint)}, notes)


def _next_step(task: Task, plan: Plan) -> str:
    file = getattr(task.options, "family", None)
    return f"python -m align.weights --run {task.output.name}{f' --family {file}' if file else ''}"


TO_PADDLE = Direction("convert", "np", _plan, _conclude, _next_step)
