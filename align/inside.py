"""Inside the blocks: sublayers compared the same way, so that the report ends at one layer or one operation.

In one pass every sublayer is fed what entered torch's. A sublayer's output then shows that sublayer alone, and what
arrives at it shows the operation before it alone: rotary, scale, mask and softmax before the attention's output
projection, the activation before the second linear, the residual before a norm. A small fault may drown in its block's
noise and still stand out of its sublayer's by a factor of 50.

Layer norms are run once more on a small input, where their epsilon shows. On the activations of a late block the
variance is so much larger that a wrong epsilon hides in the last bits; scaled to an rms of 1e-3, a variance of 1e-6,
even 1e-7 for 1e-12 moves the output by a twentieth. So is every block, on the first row: a net that computes its norms
without a module of their own shows a wrong epsilon there. A batch norm in eval mode divides by its running variance and
not by its input's: for its probe the running statistics are small too, mean 0 and variance 2^-20, which is 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from convert.rules import Config

from .parts import part_of_output
from .runs import Run

Module = tuple[tuple[str, str], list[tuple[str, str, str]]]
SMALL = 1e-3
SMALL_VARIANCE = 2.0**-20
PROBE = " (small input)"


@dataclass(frozen=True)
class Places:
    """Everything of a run's model that is looked at, by Paddle's names, in the order of execution."""

    modules: list[tuple[str, str]]
    found: list[Module]
    before: Mapping[str, str] = field(default_factory=dict)
    gelu: bool = False
    """Whether the activation is h / 2 (1 + …), with erf or with tanh."""

    @classmethod
    def of(cls, run: Run) -> Places:
        inside = {name: sublayers_of(run, name) for _, name in run.modules}
        return cls(run.modules, [found for found in inside.values() if found], run.before, is_gelu(run.config))

    @cached_property
    def sublayers(self) -> dict[str, str]:
        """What is told of the operation before each sublayer, by the sublayer's name."""
        return {name: f"{module}: {operation}" for (_, module), parts in self.found for _, name, operation in parts}

    @cached_property
    def operations(self) -> dict[str, str]:
        """What is told of what arrives at a sublayer, or at a module ``before`` which something is to be judged."""
        return {**self.before, **self.sublayers}

    @cached_property
    def activated(self) -> dict[str, str]:
        """By the sublayer at which what a gelu gave arrives, the one before, whose output the gelu was given."""
        pairs = [pair for _, parts in self.found for pair in pairwise(parts)] if self.gelu else []
        return {name: before for (_, before, _), (_, name, operation) in pairs
                if operation.partition(",")[0].endswith("activation")}

    @cached_property
    def inside(self) -> set[str]:
        """Names whose output is judged with every sublayer fed torch's input: sublayers, and modules that have some."""
        return self.sublayers.keys() | {module for (_, module), _ in self.found}

    @cached_property
    def all(self) -> list[tuple[str, str]]:
        """(torch, Paddle) path of every module and sublayer."""
        parts = {module: [(torch, name) for torch, name, _ in parts] for (_, module), parts in self.found}
        return [pair for module in self.modules for pair in (module, *parts.get(module[1], []))]

    @cached_property
    def names(self) -> set[str]:
        """Paddle's names of all modules and sublayers."""
        return {name for _, name in self.all}

    @cached_property
    def judged(self) -> list[str]:
        """The names under which the parts of modules are reported."""
        inside = {module: (*(name for _, sublayer, operation in parts
                             for name in (f"{module}: {operation}", sublayer)), f"{module}: output")
                  for (_, module), parts in self.found}
        return [told for _, module in self.modules
                for told in (*([self.before[module]] if module in self.before else []), *inside.get(module, ()))]


def is_gelu(config: Config) -> bool:
    """Whether the config names a gelu; quick_gelu is h times a sigmoid."""
    name = str(config.get("activation_function") or config.get("hidden_act") or "")
    return "gelu" in name and "quick" not in name


def small_input(array: np.ndarray) -> np.ndarray:
    """``array`` scaled to an rms of 1e-3."""
    return array * np.float32(SMALL / max(float(np.sqrt(np.mean(np.square(array)))), 1e-30))


def sublayers_of(run: Run, module: str) -> Module | None:
    """((torch, Paddle) path of the module, the same and the operation before it for each of its sublayers)."""
    torch_path, inside = {paddle: torch for torch, paddle in run.modules}.get(module), run.inside.get(module)
    if torch_path is None or inside is None:
        return None
    weights = {name.removesuffix(".weight"): path for path, name in run.paddle_names.items()}
    return (torch_path, module), [
        (part_of_output(weights.get(f"{module}.{paddle}", ""), f"{torch_path}.{torch}"), f"{module}.{paddle}",
         f"{operation}, before {paddle}") for torch, paddle, operation in inside]
