"""The vocabulary of a family file: each rule claims source tensors by name and says what becomes of them.

A name is a template: ``{i}`` is a layer number, ``{a,b}`` are alternatives that the target side answers in the
same order. Sizes are words that the family reads from the config, so every shape is known before a byte moves.
Every rule can be undone: :meth:`Rule.invert` takes what a Paddle layer holds back to torch's layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

Config = Mapping[str, Any]
Sizes = Mapping[str, int]
Size = str | int
Condition = Callable[[Config], bool]
MAX_SIZE = 2**30


@dataclass(frozen=True)
class Filling:
    """How a target tensor comes to be when no source tensor is moved into it.

    ``rows`` makes some rows of it (numpy, float32, [rows, columns]; the last axis is the columns, the others are the
    rows), so that no mask need be held whole; ``copies`` names the source tensor that it is a copy of instead.
    ``checked`` says that a source which carries the tensor must hold this very value.
    """

    name: str
    rows: Callable[[tuple[int, ...], range], Any] | None = None
    copies: str | None = None
    checked: bool = False

    def make(self, shape: tuple[int, ...]) -> Any:
        """The whole array."""
        return self.rows(shape, range(prod(shape[:-1]))).reshape(shape)


@dataclass(frozen=True)
class Rule:
    """One elementary line of a family: one tensor, or one tensor per layer where the name holds ``{i}``.

    ``shape`` is the torch side's; ``spellings`` are further names the source tensor goes by.
    """

    kind: str
    source: str | None
    target: str | None
    shape: tuple[Size, ...] = ()
    spellings: tuple[str, ...] = ()
    otherwise: Filling | None = None
    why: str = ""
    when: Condition = field(default=lambda config: True, compare=False)

    @property
    def transposed(self) -> bool:
        return self.kind == "linear" and len(self.shape) == 2

    @property
    def per_layer(self) -> bool:
        return "{i}" in (self.target or self.source or "")

    def target_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on the Paddle side of a tensor that has ``shape`` on the torch side."""
        return shape[::-1] if self.transposed else shape

    def apply(self, array: Any) -> Any:
        """Torch's layout to Paddle's."""
        return array.T if self.transposed else array

    def invert(self, array: Any) -> Any:
        """Paddle's layout back to torch's."""
        return array.T if self.transposed else array


def linear(name: str, rows: Size, columns: Size, to: str | None = None, *, bias: bool = True,
           otherwise: Filling | None = None, when: Condition | None = None) -> list[Rule]:
    """``nn.Linear``: torch keeps [out, in], Paddle [in, out]. ``rows`` = out, ``columns`` = in."""
    weight = _rules("linear", f"{name}.weight", f"{to or name}.weight", (rows, columns), otherwise, when)
    return weight + (_rules("keep", f"{name}.bias", f"{to or name}.bias", (rows,), otherwise, when) if bias else [])


def norm(name: str, size: Size, to: str | None = None) -> list[Rule]:
    """A layer norm; checkpoints converted from TensorFlow call weight and bias gamma and beta."""
    return [
        replace(rule, spellings=(rule.source.removesuffix(new) + old,))
        for new, old in (("weight", "gamma"), ("bias", "beta"))
        for rule in _rules("keep", f"{name}.{new}", f"{to or name}.{new}", (size,))
    ]


def keep(name: str, *shape: Size, to: str | None = None, when: Condition | None = None) -> list[Rule]:
    """The same bytes on both sides: embeddings, biases, and whatever has one dimension."""
    return _rules("keep", name, to or name, shape, None, when)


def buffer(name: str, *shape: Size, filling: Filling, when: Condition | None = None) -> list[Rule]:
    """What the Paddle side wants beyond the source. A source that carries it is claimed and checked."""
    return _rules("buffer", name, name, shape, filling, when)


def drop(name: str, *, why: str) -> list[Rule]:
    """A source tensor, if it is there, that the Paddle side has no place for."""
    return [Rule("drop", source, None, why=why) for source in _alternatives(name)]


def copy_of(source: str) -> Filling:
    """The tied copy of another tensor; a source that holds both must hold the same bits twice."""
    return Filling(f"copy of {source}", copies=source, checked=True)


def zeros() -> Filling:
    """Zeros, for a parameter that Paddle's class owns and torch's class does not have."""
    return Filling("zeros", constant(0.0).rows)


def causal_mask() -> Filling:
    """Lower triangle of ones, [1, 1, positions, positions]."""
    def rows(shape: tuple[int, ...], some: range) -> Any:
        import numpy as np
        positions = np.arange(some.start, some.stop, dtype=np.int32) % shape[-2]
        return (np.arange(shape[-1], dtype=np.int32) <= positions[:, None]).astype(np.float32)
    return Filling("causal mask", rows, checked=True)


def constant(value: float) -> Filling:
    """One value everywhere."""
    def rows(shape: tuple[int, ...], some: range) -> Any:
        import numpy as np
        return np.full((len(some), *(shape[-1:] or (1,))), value, np.float32)
    return Filling(f"{value:g}", rows)


def _rules(kind: str, source: str, target: str, shape: tuple[Size, ...], otherwise: Filling | None = None,
           when: Condition | None = None) -> list[Rule]:
    sources, targets = _alternatives(source), _alternatives(target)
    if len(sources) != len(targets):
        raise ValueError(f"{source} and {target} spell out different numbers of tensors")
    rules = [Rule(kind, *names, shape, otherwise=otherwise) for names in zip(sources, targets, strict=True)]
    return rules if when is None else [replace(rule, when=when) for rule in rules]


def _alternatives(name: str) -> list[str]:
    """``a.{q,k}.b`` spelled out: ``a.q.b``, ``a.k.b``. ``{i}`` stays."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", name)
    if match is None:
        return [name]
    return [
        spelled
        for word in match.group(1).split(",")
        for spelled in _alternatives(name[: match.start()] + word + name[match.end():])
    ]


@dataclass(frozen=True)
class Head:
    """What sits on a family's backbone: one of torch's classes, and everything that depends on it.

    ``architecture`` is the class in transformers and in ``models/``, ``paddlenlp`` the one in PaddleNLP;
    ``task`` names the natural inputs, metric and loss (see ``align/tasks.py``).
    """

    architecture: str
    paddlenlp: str
    task: str
    rules: tuple[Rule, ...] = ()
    base: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture. For align: ``modules`` pairs torch's and Paddle's module paths in the order of execution, and
    ``inside`` says, for a module's Paddle path, which sublayers it has: (torch, Paddle, the operation before it).
    ``demo`` is the config of the built-in checkpoint, ``tokenizer`` its kind: wordpiece, byte-level or none.
    """

    name: str
    prefix: str
    layers: str
    sizes: Callable[[Config], Sizes]
    rules: tuple[Rule, ...]
    heads: tuple[Head, ...]
    modules: tuple[tuple[str, str], ...]
    demo: Config = field(default_factory=dict)
    tokenizer: str = "none"
    unsupported: Callable[[Config], str | None] = lambda config: None
    additions: Config = field(default_factory=dict)
    inside: Mapping[str, tuple[tuple[str, str, str], ...]] = field(default_factory=dict)

    def head(self, architecture: str) -> Head:
        """The head whose class is ``architecture``; KeyError when the family has none."""
        return {head.architecture: head for head in self.heads}[architecture]

    def rules_of(self, head: Head) -> list[Rule]:
        """Every rule that holds for ``head``; the base model's names carry no prefix."""
        if not head.base:
            return [*self.rules, *head.rules]
        return [_without_prefix(rule, self.prefix) for rule in (*self.rules, *head.rules)]

    def modules_of(self, head: Head) -> list[tuple[str, str]]:
        """The module paths for ``head``, ``{i}`` still in place."""
        if not head.base:
            return list(self.modules)
        return [(torch.removeprefix(self.prefix), paddle.removeprefix(self.prefix)) for torch, paddle in self.modules]


def rules(*groups: list[Rule]) -> tuple[Rule, ...]:
    """Flatten what the builders return."""
    return tuple(rule for group in groups for rule in group)


def size_of(config: Config, *names: str, default: int | None = None) -> int:
    """The first of ``names`` that the config has; :class:`BadInput` when it has none and there is no default."""
    from .errors import BadInput
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise BadInput(f"config.json: {names[0]} is {str(value)[:40]}; a whole number up to {MAX_SIZE:,} is needed.")
    return value


def labels_of(config: Config) -> int:
    """How many classes a classification head has: as transformers, from ``id2label`` before ``num_labels``, else 2."""
    from .errors import BadInput
    names = config.get("id2label")
    if not names:
        return size_of(config, "num_labels", default=2)
    if not isinstance(names, Sized):
        raise BadInput(f"config.json: id2label is {names!r}; a name for each label is needed.")
    return len(names)


def _without_prefix(rule: Rule, prefix: str) -> Rule:
    bare = replace(
        rule,
        source=rule.source and rule.source.removeprefix(prefix),
        target=rule.target and rule.target.removeprefix(prefix),
        spellings=tuple(spelling.removeprefix(prefix) for spelling in rule.spellings),
    )
    prefixed = tuple(name for name in (rule.source, *rule.spellings) if name and name.startswith(prefix))
    return replace(bare, spellings=bare.spellings + prefixed)
