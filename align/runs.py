"""A run: one conversion, what it was made from, and the plan that says which tensor is which."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TypeVar

import numpy as np

from convert.__main__ import families, family_named, load_family
from convert.checkpoint import Checkpoint, open_checkpoint, opened, read_config
from convert.direction import target_config
from convert.errors import BadInput
from convert.plan import Plan, config_for, expand, make_plan, spelled
from convert.report import Conversion, latest_run, load_conversion
from convert.rules import Config, Family, Head, Layers, Rule, Sizes
from convert.stream import chunks_of, digest_of
from convert.traits import Wiring

from .inputs import Inputs
from .parts import part_name

Told = TypeVar("Told")

@dataclass(frozen=True)
class Run:
    """Everything the stages need to know. ``directory`` is ``reports/<run>``."""

    conversion: Conversion
    family: Family
    directory: Path

    @property
    def name(self) -> str:
        return self.conversion.run

    @property
    def head(self) -> Head:
        return self.family.head(self.conversion.head)

    @property
    def source(self) -> Path:
        return Path(self.conversion.path)

    @property
    def output(self) -> Path:
        return Path(self.conversion.output)

    @cached_property
    def config(self) -> Config:
        """The source's config."""
        return config_for(self.family, self.source, self.checkpoint.tensors)

    @cached_property
    def target_config(self) -> Config:
        """The config that came out."""
        return read_config(self.output)

    @cached_property
    def intended_config(self) -> Config:
        """The config that the conversion of this source writes, worked out anew from the source."""
        return target_config(self.plan)[0]

    @cached_property
    def sizes(self) -> Sizes:
        sizes = self.family.sizes(self.config)
        absent = [word for word in ("vocab", "positions") if word not in sizes]
        if absent and self.head.inputs == "tokens":
            raise BadInput(f"family {self.family.name}: its sizes do not say {' nor '.join(absent)}, which the inputs "
                           "need. Add it to the family file's sizes.")
        return sizes

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.source)

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.family, self.config, self.checkpoint.tensors, self.conversion.dtype)

    @cached_property
    def rules(self) -> list[Rule]:
        """The rules of the head for this config, one for each layer."""
        return list(expand([rule for rule in self.family.rules_of(self.head) if rule.when(self.config)], self.layers))

    @cached_property
    def layers(self) -> Layers:
        return self.family.layers(self.config)

    @cached_property
    def paddle_names(self) -> dict[str, str]:
        """Paddle's name of every parameter of the head that is one in Paddle too, by its path in torch's class.

        What torch has fused and Paddle has not goes by the names of its parts.
        """
        found = {}
        for rule in self.rules:
            if len(rule.sources) == 1:
                gathered = [rule.gather(self.sizes, number) for number in range(len(rule.targets))]
                parts = [part_name(rule.sources[0][0], gather) if gather else rule.sources[0][0] for gather in gathered]
                found |= {part: target for part, target in zip(parts, rule.targets, strict=True) if part}
        return found

    def paddle_path(self, path: str) -> str:
        """Paddle's path of a torch module or parameter: by its weights, else by the recorded module that holds it."""
        for ending in ("", ".weight", ".bias"):
            if path + ending in self.paddle_names:
                return self.paddle_names[path + ending].removesuffix(ending)
        return next((paddle + path.removeprefix(torch) for torch, paddle in self.modules
                     if f"{path}.".startswith(f"{torch}.")), path)

    def batch_first(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array of a module or output, by Paddle's name, with its batch in front; its own inverse."""
        return array.swapaxes(0, 1) if array.ndim > 2 and self.family.time_first(name) else array

    @cached_property
    def dropped(self) -> set[str]:
        """Torch's names of what the Paddle side has no place for, and has not under another name either."""
        return {name for rule in self.rules if not rule.targets for names in rule.sources for name in names
                } - self.tied.keys()

    @cached_property
    def tied(self) -> dict[str, tuple[str, str]]:
        """By torch's name of a tensor that is tied: its name where a net holds it, Paddle's of what it must equal."""
        return {path: (rule.again or rule.sources[0][0], self.paddle_names[rule.otherwise.copies])
                for rule in self.rules if rule.kind == "tied" and rule.otherwise.copies in self.paddle_names
                for path in rule.sources[0]}

    @cached_property
    def modules(self) -> list[tuple[str, str]]:
        """(torch path, Paddle path) of every module that is recorded, in the order of execution."""
        return [(torch, paddle) for torch, paddle, _ in self._modules]

    @cached_property
    def inside(self) -> dict[str, tuple[tuple[str, str, str], ...]]:
        """What the family says is inside of each recorded module, by its Paddle path."""
        return self._by_path(self.family.inside_of(self.config))

    @cached_property
    def wiring(self) -> dict[str, Wiring]:
        """How each recorded module joins its parts, by its Paddle path, where the family says it."""
        return self._by_path(self.family.traits.wiring)

    def _by_path(self, told: Mapping[str, Told]) -> dict[str, Told]:
        return {paddle: told[template] for _, paddle, template in self._modules if template in told}

    @property
    def before(self) -> dict[str, str]:
        """What is told of what arrives at a recorded module: families say such things of sublayers only."""
        return {}

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> Inputs:
        """What the models of this run are fed."""
        return Inputs(arrays)

    @cached_property
    def _modules(self) -> list[tuple[str, str, str]]:
        templates = [template for _, template in self.family.modules]
        return list(spelled([(*paths, template) for paths, template in
                             zip(self.family.modules_of(self.head), templates, strict=True)], self.layers))

    @property
    def source_digest(self) -> str:
        """Digest of the source as it is now; :class:`BadInput` when it is not what was converted."""
        digest = self.hashing.result()
        if digest != self.conversion.source_digest:
            raise BadInput(f"{self.source} is not what run {self.name} converted: its digest is {digest}, it was "
                           f"{self.conversion.source_digest}. Convert again.")
        return digest

    @cached_property
    def hashing(self) -> Future[str]:
        """The source's digest, which a thread works out from now on: twelve gigabytes take as long as a pass."""
        future: Future[str] = Future()

        def hash_source() -> None:
            try:
                future.set_result(_digest_of(self.source))
            except BaseException as error:
                future.set_exception(error)
        Thread(target=hash_source, daemon=True).start()
        return future


def _digest_of(source: Path) -> str:
    import xxhash
    digests = {}
    with opened(source) as checkpoint:
        for name in checkpoint.tensors:
            hasher = xxhash.xxh3_128()
            for chunk in chunks_of(checkpoint, name):
                hasher.update(chunk.view("u1"))
            digests[name] = hasher.hexdigest()
        return digest_of(checkpoint.tensors, digests)


def load_run(name: str | None, reports: Path, family: Path | None = None) -> Run:
    """The run ``name`` of ``reports``, or the latest; :class:`BadInput` when it, its source or its output is gone."""
    name = name or latest_run(reports)
    if not (reports / name / "convert.json").is_file():
        runs = sorted(file.parent.name for file in reports.glob("*/convert.json"))
        there = f"The runs there: {', '.join(runs)}." if runs else "Convert a model first: python -m convert.gptj"
        raise BadInput(f"there is no run {name} in {reports}. {there}")
    conversion = load_conversion(reports / name)
    if family is None and conversion.family not in families():
        raise BadInput(f"there is no family {conversion.family!r} here: run {name} was converted with a family file of "
                       f"your own. Give it again: --run {name} --family FILE")
    found = load_family(family) if family else family_named(conversion.family)
    run = Run(conversion, found, reports / name)
    if conversion.head not in {head.architecture for head in run.family.heads}:
        raise BadInput(f"run {name} has head {conversion.head}, which family {run.family.name} does not have.")
    for told, path in (("source", run.source), ("output", run.output)):
        if not path.exists():
            raise BadInput(f"the {told} of run {name}, {path}, is gone. Convert again, or give another --run.")
    return run
