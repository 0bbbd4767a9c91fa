"""Rules x header -> moves. A plan is total, every source key and every target key exactly once, or an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from .checkpoint import read_config
from .depth import misfits
from .dtypes import BY_NAME, Dtype
from .errors import BadInput
from .rules import Config, Family, Filling, Gather, Head, Layers, Names, Rule, Size, Sizes, in_numbers, numbers_of

Header = Mapping[str, Any]
SHOWN = 3
LETTER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Move:
    """One target tensor: where it comes from, and what it looks like on both sides.

    ``sources`` is empty where ``filling`` makes the tensor. ``gather`` takes what is wanted from the sources, None
    where that is all of the one source; ``source_shape`` is the shape of what is taken, still in the source's layout.
    """

    target: str
    rule: Rule
    sources: tuple[str, ...]
    filling: Filling | None
    source_shape: tuple[int, ...]
    source_dtype: Dtype
    shape: tuple[int, ...]
    dtype: Dtype
    gather: Gather | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size

    @property
    def kind(self) -> str:
        return "buffer" if self.filling else self.rule.kind

    @property
    def transposed(self) -> bool:
        return self.rule.transposed and self.filling is None

    @property
    def source(self) -> str:
        """The names of the source tensors, for people."""
        return " + ".join(self.sources)

    @property
    def origin(self) -> str:
        """What the tensor is made of, for people."""
        return self.source or f"({self.filling.name})"

    def take(self, read: Callable[[str], Any]) -> Any:
        """What the target holds, in the source's layout: an array or a matrix, as ``read`` gives for each source."""
        return read(self.sources[0]) if self.gather is None else self.gather([read(name) for name in self.sources])

    def turn(self, taken: Any) -> Any:
        """:meth:`take`'s in the target's layout."""
        return self.rule.apply(taken) if self.transposed else taken

    def turn_back(self, held: Any) -> Any:
        """The inverse of :meth:`turn`."""
        return self.rule.invert(held) if self.transposed else held


@dataclass(frozen=True)
class Check:
    """A source tensor that is not moved; it must hold what ``filling`` makes in ``shape``, or what it copies."""

    source: str
    filling: Filling
    shape: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, before it does anything. ``moves`` are in the order of execution.

    ``keys`` are the header's names of the tensors that transformers' class calls otherwise or the same.
    """

    family: Family
    head: Head
    declared: str | None
    config: Config
    moves: tuple[Move, ...]
    checks: tuple[Check, ...]
    dropped: tuple[tuple[str, str], ...]
    keys: Mapping[str, str]

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
    closest = min((attempt for attempt in attempts if isinstance(attempt, _Faulty)),
                  key=lambda attempt: attempt.unclaimed)
    raise BadInput(f"{closest.describe()} Nothing was written.")


def config_for(family: Family, source: Path, header: Header) -> Config:
    """The ``config.json`` beside a checkpoint; where there is none, what the family reads from the header."""
    directory = source if source.is_dir() else source.parent
    if (directory / "config.json").is_file():
        return agreed(family, read_config(source))
    if family.config_of is None:
        raise BadInput(f"there is no config.json in {directory}; it says how many layers and heads the model has. Put "
                       "the one that belongs to the checkpoint there. A net of your own has none: write a family file, "
                       f"as examples/my_gpt.py is, and python -m convert --family FILE --source {source}")
    return family.config_of(header)


def agreed(family: Family, config: Config) -> Config:
    """A ``config.json`` and what the family file states besides; :class:`BadInput` where the two are at odds."""
    for key, stated in family.states.items():
        said = next((name for name in (key, family.paddle_keys.get(key)) if config.get(name) is not None), key)
        if config.get(said, stated) not in (None, stated):
            raise BadInput(f"config.json says {said} {config[said]}, the family file of {family.name} {stated}: "
                           "correct the one that is wrong; the tensors do not show it. Nothing was written.")
    return {**config, **family.states}


def _declared(config: Config) -> str | None:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise BadInput(f"config.json: architectures is {architectures!r}; a list of class names is needed.")
    return architectures[0] if architectures else None


def expand(rules: Sequence[Rule], layers: Layers) -> Iterator[Rule]:
    """Rules in execution order, a rule for each layer: all of layer 0, then all of layer 1, …"""
    for letter, group in groupby(rules, key=lambda rule: letter_of(rule.names)):
        members = list(group)
        for number in numbers_of(layers, letter) if letter else (0,):
            yield from (rule.at(letter, number) for rule in members) if letter else members


def spelled(groups: Sequence[Names], layers: Layers) -> Iterator[Names]:
    """:func:`expand` for groups of names whose last is a template that stays as it is."""
    for letter, alike in groupby(groups, key=lambda names: letter_of(names)):
        members = list(alike)
        for number in numbers_of(layers, letter) if letter else (0,):
            yield from ((*(name.replace(f"{{{letter}}}", str(number)) for name in names), template)
                        for *names, template in members)


def letter_of(names: Sequence[str]) -> str | None:
    """The letter that stands for a layer number in these names."""
    return next((found.group(1) for found in map(LETTER.search, names) if found), None)


@dataclass
class _Faulty:
    """``unclaimed`` is how many of the source's tensors no rule claims: the fewer, the nearer is this head."""

    family: Family
    head: Head
    faults: list[str]
    unclaimed: int

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
    keys: dict[str, str]

    def plan(self, declared: str | None) -> Plan:
        return Plan(self.family, self.head, declared, self.config, tuple(self.moves), tuple(self.checks),
                    tuple(self.dropped), self.keys)


def _attempt(family: Family, head: Head, config: Config, header: Header, dtype: str) -> _Total | _Faulty:
    layers = family.layers(config)
    rules = [rule for rule in family.rules_of(head) if rule.when(config)]
    expanded = list(expand(rules, layers))
    keys = {names[0]: name for rule in expanded for names in rule.sources for name in names if name in header}
    pour = _Pouring(family.sizes(config), header, keys, dtype, _weight_dtype(header, dtype))
    for rule in expanded:
        pour.add(rule)
    claimed = {name for rule in expanded for names in rule.sources for name in names}
    unclaimed = [name for name in header if name not in claimed]
    wrong = misfits(family, rules, config, header) if unclaimed or pour.unfilled else []
    unknown, unfilled = ([name for name in names if not any(one.explains(name) for one in wrong)]
                         for names in (unclaimed, pour.unfilled))
    faults = pour.faults + pour.doubled + [one.sentence for one in wrong] + _unclaimed(rules, unknown)
    if unfilled:
        absent = pour.absent.get(unfilled[0], unfilled[0])
        wanted = f"; {absent} is not in the source" if absent != unfilled[0] else ""
        faults.append(f"{_count(unfilled, 'target tensor')} that no source tensor fills: {_some(unfilled)}{wanted}.")
    if faults:
        return _Faulty(family, head, faults, len(unclaimed))
    moved = {name for move in pour.moves for name in move.sources}
    told = [(check.source, check.why) for check in pour.checks if check.source not in moved]
    return _Total(family, head, config, pour.moves, pour.checks, pour.dropped + told, keys)


class _Pouring:
    """Takes in rules one at a time, and knows what becomes of a header by them."""

    def __init__(self, sizes: Sizes, header: Header, keys: Mapping[str, str], dtype: str, weight_dtype: Dtype) -> None:
        self.sizes, self.header, self.keys = sizes, header, keys
        self.dtype, self.weight_dtype = dtype, weight_dtype
        self.moves: list[Move] = []
        self.checks: list[Check] = []
        self.dropped: list[tuple[str, str]] = []
        self.unfilled: list[str] = []
        self.absent: dict[str, str] = {}
        self.faults: list[str] = []
        self.movers: dict[str, list[Rule]] = {}
        self.droppers: dict[str, list[Rule]] = {}
        self.fillers: dict[str, list[Rule]] = {}

    @property
    def doubled(self) -> list[str]:
        """Faults: source tensors that several rules move, or one moves and another drops, and target tensors that
        several fill."""
        told = [f"{name} is {done} {len(rules)} times, and once is right: {'; '.join(map(_arrow, rules))}."
                for done, by_name in (("moved", self.movers), ("filled", self.fillers), ("dropped", self.droppers))
                for name, rules in by_name.items() if len(rules) > 1]
        return told + [f"{name} is moved by one rule ({_arrow(self.movers[name][0])}) and dropped by another "
                       f"({rules[0].why or _arrow(rules[0])}): keep the one that is meant."
                       for name, rules in self.droppers.items() if name in self.movers]

    def add(self, rule: Rule) -> None:
        """Claim what ``rule`` names, and fill its targets."""
        spelled = [[name for name in names if name in self.header] for names in rule.sources]
        repeated = next((names for names in spelled if len(names) > 1), None)
        if repeated:
            self.faults.append(f"{' and '.join(repeated)} are two spellings of one tensor; keep one.")
            return
        present = [names[0] for names in spelled if names]
        for name in present if rule.kind == "drop" else ():
            self.droppers.setdefault(name, []).append(rule)
        if rule.kind == "drop" and rule.otherwise is None:
            self.dropped += [(name, rule.why) for name in present]
        elif rule.kind in ("drop", "tied"):
            self._check(present, rule, in_shape=rule.source_shape(self.sizes))
        elif rule.kind == "made":
            self._make(rule)
        elif rule.kind == "buffer":
            self._make(rule)
            self._check(present, rule, in_shape=rule.taken_shape(self.sizes))
        elif len(present) == len(rule.sources):
            self._move(rule, tuple(present))
        elif rule.otherwise and not present:
            self._make(rule)
        else:
            self.unfilled += rule.targets
            absent = next(names[0] for names, held in zip(rule.sources, spelled, strict=True) if not held)
            self.absent |= dict.fromkeys(rule.targets, absent)

    def _move(self, rule: Rule, present: tuple[str, ...]) -> None:
        infos = [self.header[name] for name in present]
        faults = [fault for number, name in enumerate(present) for fault in self._misfits(name, rule, number)]
        if len({info.dtype for info in infos}) > 1:
            faults.append(f"{' and '.join(present)} have different dtypes, and are one tensor in Paddle.")
        self.faults += faults
        for name in present:
            self.movers.setdefault(name, []).append(rule)
        dtype = infos[0].dtype
        wanted = dtype if self.dtype == "keep" or not dtype.floating else BY_NAME[self.dtype]
        for number, target in enumerate(rule.targets):
            gather = rule.gather(self.sizes, number)
            taken = rule.taken_shape(self.sizes, number) if gather or not rule.shape else infos[0].shape
            self._fill(Move(target, rule, present, None, taken, dtype, rule.turned_shape(taken), wanted, gather))

    def _make(self, rule: Rule) -> None:
        (target,), filling = rule.targets, rule.otherwise
        if filling.copies is None:
            shape = rule.turned_shape(rule.taken_shape(self.sizes))
            own = (BY_NAME[rule.returns] if rule.returns else
                   BY_NAME["float32"] if rule.kind == "buffer" else self.weight_dtype)
            self._fill(Move(target, rule, (), filling, shape, BY_NAME["float32"], shape, own))
        elif filling.copies in self.keys:
            key = self.keys[filling.copies]
            info = self.header[key]
            wanted = info.dtype if self.dtype == "keep" else BY_NAME[self.dtype]
            self.faults += self._misfits(key, rule, 0)
            self._fill(Move(target, rule, (key,), filling, info.shape, info.dtype, info.shape, wanted))
        else:
            self.unfilled.append(target)

    def _fill(self, move: Move) -> None:
        self.moves.append(move)
        self.fillers.setdefault(move.target, []).append(move.rule)

    def _check(self, present: Sequence[str], rule: Rule, in_shape: tuple[int, ...]) -> None:
        """What the file has beside what is made: it must be the same, or where only Paddle knows it is dropped."""
        filling = rule.otherwise
        why = rule.why or (f"made again as {filling.name}; the source's values agree" if rule.targets else
                           f"{filling.name}, with the same values; Paddle has one parameter for both")
        for name in present:
            if not filling.checked:
                own = f"Paddle's own {rule.targets[0]} is {filling.name}" if rule.targets else rule.why
                self.dropped.append((name, own))
            elif filling.copies is None:
                self.checks.append(Check(name, filling, in_shape, why))
            elif filling.copies in self.keys:
                self.checks.append(Check(name, replace(filling, copies=self.keys[filling.copies]), in_shape, why))
            else:
                self.faults.append(f"{name} is {filling.name}, which is not there.")

    def _misfits(self, name: str, rule: Rule, number: int) -> list[str]:
        info, expected = self.header[name], rule.source_shape(self.sizes, number)
        faults = []
        if info.shape != expected and (info.shape, expected) != ((1,), ()):  # a scalar, as a result for Paddle has it
            faults.append(f"{name} has shape {list(info.shape)}, the config asks for {list(expected)} "
                          f"({' x '.join(_worded(size, self.sizes) for size in rule.shape) or 'a scalar'}).")
        if not info.dtype.floating:
            faults.append(f"{name} has dtype {info.dtype.name}; a weight is a floating dtype.")
        groups = rule.gather(self.sizes, number)
        if groups and sum(groups.widths) * groups.groups != sum(in_numbers(rule.parts, self.sizes)):
            faults.append(f"{name}: {rule.groups} do not divide the parts that are fused in it.")
        return faults


def _arrow(rule: Rule) -> str:
    """What ``rule`` is called: its sources, or what it fills with, and its targets."""
    sources = " + ".join(names[0] for names in rule.sources) or f"({rule.otherwise.name})"
    return f"{sources} -> {' + '.join(rule.targets) or f'dropped, {rule.why}'}"


def _worded(size: Size, sizes: Sizes) -> str:
    if isinstance(size, tuple):
        return f"({' + '.join(_worded(part, sizes) for part in size)})"
    return f"{size} {sizes[size]}" if isinstance(size, str) else str(size)


def _weight_dtype(header: Header, dtype: str) -> Dtype:
    if dtype != "keep":
        return BY_NAME[dtype]
    return next((info.dtype for info in header.values() if info.dtype.floating), BY_NAME["float32"])


def _refuse_other_family(family: Family, config: Config) -> None:
    kind = config.get("model_type")
    if kind != (family.model_type or family.name):
        told = f"model_type is {kind!r}" if kind else "there is no model_type"
        known = isinstance(kind, str) and kind.isidentifier() and Path(__file__).with_name(f"{kind}.py").is_file()
        advice = f" Try: python -m convert.{kind}" if known else ""
        raise BadInput(f"config.json is not of the {family.name} family: {told}.{advice}")
    reason = family.unsupported(config)
    if reason:
        raise BadInput(f"{family.name}: {reason}. Nothing was written.")


def _unclaimed(rules: Sequence[Rule], names: list[str]) -> list[str]:
    if not names:
        return []
    nearest = max((rule.names[0] for rule in rules),
                  key=lambda template: difflib.SequenceMatcher(None, template, names[0]).ratio())
    return [f"{_count(names, 'source tensor')} that no rule claims: {_some(names)}. Nearest rule: {nearest}."]


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (+{len(names) - 1} more)"
