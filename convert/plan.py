"""Rules x header -> moves. A plan is total, every source key and every target key exactly once, or an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from .dtypes import BY_NAME, Dtype
from .errors import BadInput
from .rules import Config, Family, Filling, Head, Rule, Sizes

Header = Mapping[str, Any]
MAX_LAYERS = 100_000
SHOWN = 3


@dataclass(frozen=True)
class Move:
    """One target tensor: where it comes from, and what it looks like on both sides.

    ``source`` is None where ``filling`` makes the tensor. Shapes are of the whole tensor, dtypes as files say.
    """

    target: str
    rule: Rule
    source: str | None
    filling: Filling | None
    source_shape: tuple[int, ...]
    source_dtype: Dtype
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size

    @property
    def kind(self) -> str:
        return "buffer" if self.filling else self.rule.kind

    @property
    def transposed(self) -> bool:
        return self.rule.transposed and self.filling is None


@dataclass(frozen=True)
class Check:
    """A source tensor that is not moved because ``move`` makes it; its values must agree all the same."""

    source: str
    move: Move


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, before it does anything. ``moves`` are in the order of execution."""

    family: Family
    head: Head
    declared: str | None
    config: Config
    moves: tuple[Move, ...]
    checks: tuple[Check, ...]
    dropped: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        return sum(move.nbytes for move in self.moves)

    @property
    def buffers(self) -> list[Move]:
        return [move for move in self.moves if move.filling]


def make_plan(family: Family, config: Config, header: Header, dtype: str = "keep") -> Plan:
    """The plan for ``header``: name -> object with ``.shape`` and ``.dtype`` (a :class:`Dtype`).

    The config's architecture names the head; where its rules do not fit the tensors but exactly one other
    head's do, the tensors are believed. Raises :class:`BadInput` that names the keys and the nearest rule.
    """
    _refuse_other_family(family, config)
    declared = _declared(config)
    candidates = sorted(family.heads, key=lambda head: head.architecture != declared)
    attempts = [_attempt(family, head, config, header, dtype) for head in candidates]
    total = [attempt for attempt in attempts if isinstance(attempt, _Total)]
    if isinstance(attempts[0], _Total) and candidates[0].architecture == declared:
        return attempts[0].plan(declared)
    if len(total) == 1:
        return total[0].plan(declared)
    if len(total) > 1:
        fitting = " and ".join(attempt.head.architecture for attempt in total)
        raise BadInput(f"{family.name}: the tensors fit {fitting}. Say which in config.json: architectures.")
    closest = attempts[0] if declared in {head.architecture for head in family.heads} else min(
        (attempt for attempt in attempts if isinstance(attempt, _Faulty)), key=lambda attempt: len(attempt.faults))
    raise BadInput(f"{closest.describe()} Nothing was written.")


def _declared(config: Config) -> str | None:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise BadInput(f"config.json: architectures is {architectures!r}; a list of class names is needed.")
    return architectures[0] if architectures else None


def layers_of(family: Family, config: Config) -> int:
    """The number of layers that the config promises."""
    from .rules import size_of
    layers = size_of(config, family.layers, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise BadInput(f"config.json: {family.layers} is {layers}, which is absurd.")
    return layers


def expand(rules: Sequence[Rule], layers: int) -> Iterator[tuple[Rule, int]]:
    """Rules in execution order, each with the layer it is for: all of layer 0, then all of layer 1, …"""
    for per_layer, group in groupby(rules, key=lambda rule: rule.per_layer):
        members = list(group)
        for layer in range(layers if per_layer else 1):
            for rule in members:
                yield rule, layer


def name_in(template: str, layer: int) -> str:
    return template.replace("{i}", str(layer))


@dataclass
class _Faulty:
    family: Family
    head: Head
    faults: list[str]

    def describe(self) -> str:
        more = f" (+{len(self.faults) - SHOWN} more such faults)" if len(self.faults) > SHOWN else ""
        return f"{self.family.name} ({self.head.architecture}): {' '.join(self.faults[:SHOWN])}{more}"


@dataclass
class _Total:
    family: Family
    head: Head
    config: Config
    moves: list[Move]
    checks: list[Check]
    dropped: list[tuple[str, str]]

    def plan(self, declared: str | None) -> Plan:
        return Plan(self.family, self.head, declared, self.config, tuple(self.moves), tuple(self.checks),
                    tuple(self.dropped))


def _attempt(family: Family, head: Head, config: Config, header: Header, dtype: str) -> _Total | _Faulty:
    sizes, layers = family.sizes(config), layers_of(family, config)
    rules = [rule for rule in family.rules_of(head) if rule.when(config)]
    weight_dtype = _weight_dtype(header, dtype)
    moves: list[Move] = []
    checks: list[Check] = []
    dropped: list[tuple[str, str]] = []
    unfilled: list[str] = []
    faults: list[str] = []
    claimed: set[str] = set()

    for rule, layer in expand(rules, layers):
        spelled = [name_in(name, layer) for name in (rule.source, *rule.spellings) if name]
        present = [name for name in spelled if name in header]
        claimed.update(present)
        if len(present) > 1:
            faults.append(f"{' and '.join(present)} are two spellings of one tensor; keep one.")
        elif rule.kind == "drop":
            dropped += [(name, rule.why) for name in present]
        else:
            move = _move(rule, layer, present, header, sizes, weight_dtype, dtype)
            if move is None:
                unfilled.append(name_in(rule.target, layer))
                continue
            faults += _misfits(move, rule, sizes, header)
            moves.append(move)
            if move.filling and move.filling.checked and present:
                checks.append(Check(present[0], move))
            elif move.filling and present:
                dropped.append((present[0], f"Paddle's own {move.target} is {move.filling.name}"))

    moved = {move.source for move in moves if move.source}
    dropped += [(check.source, f"made again as {check.move.filling.name}; the source's values agree")
                for check in checks if check.source not in moved]
    faults += _unclaimed(family, rules, layers, [name for name in header if name not in claimed])
    if unfilled:
        faults.append(f"{_count(unfilled, 'target tensor')} that no source tensor fills: {_some(unfilled)}.")
    return _Faulty(family, head, faults) if faults else _Total(family, head, config, moves, checks, dropped)


def _move(rule: Rule, layer: int, present: list[str], header: Header, sizes: Sizes, weight_dtype: Dtype,
          dtype: str) -> Move | None:
    target = name_in(rule.target, layer)
    expected = tuple(sizes[size] if isinstance(size, str) else size for size in rule.shape)
    if present and rule.kind != "buffer":
        info = header[present[0]]
        wanted = info.dtype if dtype == "keep" or not info.dtype.floating else BY_NAME[dtype]
        return Move(target, rule, present[0], None, info.shape, info.dtype, rule.target_shape(info.shape), wanted)
    if rule.otherwise is None:
        return None
    copied = rule.otherwise.copies
    if copied is None:
        shape = rule.target_shape(expected)
        own = BY_NAME["float32"] if rule.kind == "buffer" else weight_dtype
        return Move(target, rule, None, rule.otherwise, shape, BY_NAME["float32"], shape, own)
    if copied not in header:
        return None
    info = header[copied]
    wanted = info.dtype if dtype == "keep" else BY_NAME[dtype]
    return Move(target, rule, copied, rule.otherwise, info.shape, info.dtype, info.shape, wanted)


def _misfits(move: Move, rule: Rule, sizes: Sizes, header: Header) -> list[str]:
    if move.source is None:
        return []
    expected = tuple(sizes[size] if isinstance(size, str) else size for size in rule.shape)
    faults = []
    if move.source_shape != expected:
        meaning = " x ".join(f"{size} {sizes[size]}" if isinstance(size, str) else str(size) for size in rule.shape)
        faults.append(f"{move.source} has shape {list(move.source_shape)}, the config asks for {list(expected)} "
                      f"({meaning or 'a scalar'}).")
    if not move.source_dtype.floating:
        faults.append(f"{move.source} has dtype {move.source_dtype.name}; a weight is a floating dtype.")
    return faults


def _weight_dtype(header: Header, dtype: str) -> Dtype:
    if dtype != "keep":
        return BY_NAME[dtype]
    return next((info.dtype for info in header.values() if info.dtype.floating), BY_NAME["float32"])


def _refuse_other_family(family: Family, config: Config) -> None:
    kind = config.get("model_type")
    if kind != family.name:
        told = f"model_type is {kind!r}" if kind else "there is no model_type"
        known = isinstance(kind, str) and kind.isidentifier() and Path(__file__).with_name(f"{kind}.py").is_file()
        advice = f" Try: python -m convert.{kind}" if known else ""
        raise BadInput(f"config.json is not of the {family.name} family: {told}.{advice}")
    reason = family.unsupported(config)
    if reason:
        raise BadInput(f"{family.name}: {reason}. Nothing was written.")


def _unclaimed(family: Family, rules: Sequence[Rule], layers: int, names: list[str]) -> list[str]:
    if not names:
        return []
    numbers = {int(found) for name in names for found in re.findall(r"\.(\d{1,9})\.", name)}
    surplus = sorted(number for number in numbers if number >= layers)
    if surplus and all(re.search(r"\.\d+\.", name) for name in names):
        return [f"the config says {layers} layers, the source has layers up to {surplus[-1]} ({_some(names)})."]
    templates = [rule.source or rule.target for rule in rules]
    nearest = max(templates, key=lambda template: difflib.SequenceMatcher(None, template, names[0]).ratio())
    return [f"{_count(names, 'source tensor')} that no rule claims: {_some(names)}. Nearest rule: {nearest}."]


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (+{len(names) - 1} more)"
