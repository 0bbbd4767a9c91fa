"""The vocabulary of a family file: each rule claims source tensors by name and says what becomes of them.

A name is a template: ``{i}`` is a layer number, ``{a,b}`` are alternatives that the target side answers in the
same order. Sizes are words that the family reads from the config, so every shape is known before a byte moves.
Every rule can be undone: :meth:`Rule.invert` takes what a Paddle layer holds back to torch's layout, and
:meth:`Rule.inverse` is the rule that carries a Paddle checkpoint back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from .traits import Prompts, Traits

Config = Mapping[str, Any]
Sizes = Mapping[str, int]
Size = str | int | tuple["Size", ...]
"""A word, a number, or several that stand one behind the other along the same axis."""
Shape = tuple[Size, ...]
Names = tuple[str, ...]
Layers = Mapping[str, int | range]
"""The numbers that each letter for a layer number stands for: ``{"i": 28}`` from 0 on, ``{"i": range(1, 28)}``."""
Condition = Callable[[Config], bool]
Inside = Mapping[str, tuple[tuple[str, str, str], ...]]
MAX_SIZE = 2**30
MAX_LAYERS = 100_000


@dataclass(frozen=True)
class Filling:
    """How a target tensor comes to be when no source tensor is moved into it.

    ``rows`` makes some rows of it (numpy, float32, [rows, columns]; the last axis is the columns, the others are the
    rows), so that no mask need be held whole; ``copies`` names the source tensor that it is a copy of instead.
    ``checked`` says that a source which carries the tensor must hold this very value; of a ``mask`` only what is 0.
    """

    name: str
    rows: Callable[[tuple[int, ...], range], Any] | None = None
    copies: str | None = None
    checked: bool = False
    mask: bool = False

    def make(self, shape: tuple[int, ...]) -> Any:
        """The whole array."""
        return self.rows(shape, range(prod(shape[:-1]))).reshape(shape)


@dataclass(frozen=True)
class Gather:
    """One part of a fused tensor, or all parts fused; in the source's layout, on arrays and matrices alike.

    The fused axis holds ``groups`` times (one for each head, say) the parts in turn, of ``widths`` in each group.
    ``part`` says which of them is taken; None joins one array per part.
    """

    widths: tuple[int, ...]
    groups: int
    part: int | None
    leading: bool
    """Whether the fused axis is the first of two, rather than the last."""

    def __call__(self, arrays: Sequence[Any]) -> Any:
        turned = [array if self.leading else array.T for array in arrays]
        joined = _stacked(self._joined(turned) if self.part is None else self._taken(turned[0]))
        return joined if self.leading else joined.T

    def _taken(self, fused: Any) -> list[Any]:
        start, period = sum(self.widths[: self.part]), sum(self.widths)
        return [fused[first: first + self.widths[self.part]]
                for first in range(start, period * self.groups, period)]

    def _joined(self, parts: Sequence[Any]) -> list[Any]:
        return [part[group * width: (group + 1) * width]
                for group in range(self.groups) for part, width in zip(parts, self.widths, strict=True)]


@dataclass(frozen=True)
class Rule:
    """One elementary line of a family: one tensor, or one tensor per layer where the names hold ``{i}``.

    ``sources`` holds for each source tensor the names it goes by, transformers' own first. Only ``split`` has several
    targets and only ``merge`` several sources. ``shape`` is the source side's, of the fused tensor where there is one:
    its fused axis is then a tuple, the sizes of the parts. ``again`` is what Paddle's net calls a tied parameter
    besides the name that the file has. ``returns`` is the dtype in which torch's class saves what is dropped, if it
    does: so it is made again on the way back.
    """

    kind: str
    sources: tuple[Names, ...]
    targets: Names = ()
    shape: Shape = ()
    transposed: bool = False
    groups: Size = 1
    otherwise: Filling | None = None
    why: str = ""
    again: str = ""
    returns: str = ""
    when: Condition = field(default=lambda config: True, compare=False)

    @property
    def names(self) -> Names:
        """Every name that it stands for, on both sides."""
        return (*(name for names in self.sources for name in names), *self.targets)

    @property
    def moves(self) -> bool:
        """Whether source tensors go into target tensors, rather than something made or nothing at all."""
        return bool(self.targets) and self.kind not in ("buffer", "made")

    @property
    def parts(self) -> Sequence[Size]:
        """The sizes of what is fused; empty where nothing is."""
        return next((size for size in self.shape if isinstance(size, tuple)), ())

    def source_shape(self, sizes: Sizes, number: int = 0) -> tuple[int, ...]:
        """The shape in the source of tensor ``number`` of ``sources``."""
        return in_numbers(self._of_part(number) if self.kind == "merge" else self.shape, sizes)

    def taken_shape(self, sizes: Sizes, number: int = 0) -> tuple[int, ...]:
        """The shape of what target ``number`` takes from the sources, still in their layout."""
        return in_numbers(self._of_part(number) if self.kind == "split" else self.shape, sizes)

    def gather(self, sizes: Sizes, number: int = 0) -> Gather | None:
        """How target ``number`` is taken from the sources; None where it is the one source."""
        if not self.parts:
            return None
        groups = in_numbers((self.groups,), sizes)[0]
        widths = tuple(size // groups for size in in_numbers(tuple(self.parts), sizes))
        leading = len(self.shape) == 2 and isinstance(self.shape[0], tuple)
        return Gather(widths, groups, number if self.kind == "split" else None, leading)

    def turned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The target's shape where ``shape`` is what is taken from the source."""
        return shape[::-1] if self.transposed else shape

    def apply(self, array: Any) -> Any:
        """What is taken from the source, in the target's layout."""
        return array.T if self.transposed else array

    def invert(self, array: Any) -> Any:
        """What the target holds, in the source's layout."""
        return array.T if self.transposed else array

    def inverse(self) -> Rule | None:
        """The rule that carries Paddle's tensors back; None where Paddle has none.

        A tied copy that Paddle holds must still be one, and what was made to hold one thing only must still hold it;
        whatever else the conversion made is left out.
        """
        if self.again:
            return replace(self, sources=((self.again,),), again=self.sources[0][0], why=ONCE)
        if self.returns:
            return Rule("made", (), self.sources[0][:1], self.shape, otherwise=self.otherwise or zeros(),
                        returns=self.returns, when=self.when)
        if not self.targets:
            return None
        back = tuple((target,) for target in self.targets)
        if self.otherwise and self.otherwise.copies:
            return Rule("tied", back, shape=self.shape, otherwise=self.otherwise, why=ONCE, when=self.when)
        if self.otherwise:
            return Rule("drop", back, shape=self.turned_shape(self.shape), when=self.when,
                        otherwise=self.otherwise if self.otherwise.checked else None,
                        why=f"torch's class has none; a conversion makes it for Paddle's ({self.otherwise.name})")
        return replace(self, kind=INVERSE.get(self.kind, self.kind), sources=back,
                       targets=tuple(names[0] for names in self.sources),
                       shape=self.shape[::-1] if self.transposed else self.shape)

    def at(self, letter: str, number: int) -> Rule:
        """The rule for one layer: ``number`` for ``{letter}`` in every name."""
        def put(name: str) -> str:
            return name.replace(f"{{{letter}}}", str(number))
        copied = self.otherwise and self.otherwise.copies and replace(self.otherwise, copies=put(self.otherwise.copies))
        return replace(self, sources=tuple(tuple(map(put, names)) for names in self.sources),
                       targets=tuple(map(put, self.targets)), otherwise=copied or self.otherwise, again=put(self.again))

    def _of_part(self, number: int) -> Shape:
        return tuple(size[number] if isinstance(size, tuple) else size for size in self.shape)


ONCE = "a tied copy with the same values; torch's file has it once"
INVERSE = {"split": "merge", "merge": "split"}


def linear(name: str, rows: Size, columns: Size, to: str | None = None, *, bias: bool = True,
           also: Sequence[str] = (), otherwise: Filling | None = None, when: Condition | None = None) -> list[Rule]:
    """``nn.Linear``: torch keeps [out, in], Paddle [in, out]. ``rows`` = out, ``columns`` = in.

    ``also`` are further names of the module in the source.
    """
    weight = _rules("linear", f"{name}.weight", f"{to or name}.weight", (rows, columns), otherwise, when, turn=True)
    biases = _rules("keep", f"{name}.bias", f"{to or name}.bias", (rows,), otherwise, when) if bias else []
    return [*_also_called(weight, [f"{other}.weight" for other in also]),
            *_also_called(biases, [f"{other}.bias" for other in also])]


def conv1d(name: str, rows: Size, columns: Size, to: str | None = None, *, bias: bool = True,
           when: Condition | None = None) -> list[Rule]:
    """GPT-2's ``Conv1D``, a linear that torch keeps as [in, out], as Paddle does. ``rows`` = in, ``columns`` = out."""
    weight = _rules("conv1d", f"{name}.weight", f"{to or name}.weight", (rows, columns), None, when)
    return weight + (_rules("keep", f"{name}.bias", f"{to or name}.bias", (columns,), None, when) if bias else [])


def norm(name: str, size: Size, to: str | None = None, *, bias: bool = True,
         when: Condition | None = None) -> list[Rule]:
    """A layer norm; checkpoints converted from TensorFlow call weight and bias gamma and beta."""
    words = (("weight", "gamma"), ("bias", "beta"))[: 1 + bias]
    return [
        replace(rule, sources=((rule.sources[0][0], rule.sources[0][0].removesuffix(new) + old),))
        for new, old in words
        for rule in _rules("keep", f"{name}.{new}", f"{to or name}.{new}", (size,), None, when)
    ]


def keep(name: str, *shape: Size, to: str | None = None, also: Sequence[str] = (),
         when: Condition | None = None) -> list[Rule]:
    """The same bytes on both sides: embeddings, biases, and whatever has one dimension.

    ``also`` are further names of the source tensor.
    """
    return _also_called(_rules("keep", name, to or name, shape, None, when), also)


def activation(name: str, key: str, to: str | None = None) -> list[Rule]:
    """The one slope of an activation that the config's ``key`` calls prelu; no other holds a tensor."""
    return keep(f"{name}.weight", 1, to=f"{to or name}.weight", when=lambda config: config.get(key) == "prelu")


def batch_norm(name: str, size: Size, to: str | None = None, *, also: Sequence[str] = (),
               when: Condition | None = None) -> list[Rule]:
    """Weight, bias and the running statistics. ``also`` are further names of the module in the source."""
    moved = [rule for torch, paddle in (("weight", "weight"), ("bias", "bias"), ("running_mean", "_mean"),
                                        ("running_var", "_variance"))
             for rule in keep(f"{name}.{torch}", size, to=f"{to or name}.{paddle}",
                              also=[f"{other}.{torch}" for other in also], when=when)]
    tracked = drop(f"{name}.num_batches_tracked", also=[f"{other}.num_batches_tracked" for other in also], when=when,
                   returns="int64",
                   why="how many batches training has seen: torch asks only where momentum is None; Paddle has none")
    return moved + tracked


def split(name: str, shape: Shape, to: str, *, groups: Size = 1, transposed: bool = False,
          when: Condition | None = None) -> list[Rule]:
    """A fused tensor into its parts: ``split("c_attn.weight", ("hidden", 3 * ("hidden",)), "{q,k,v}_proj.weight")``.

    The axis of ``shape`` that is a tuple is the fused one; ``groups="heads"`` where the parts take turns head by head.
    """
    rule = Rule("split", ((name,),), tuple(_alternatives(to)), shape, transposed, groups)
    return [_sound(rule if when is None else replace(rule, when=when))]


def merge(name: str, shape: Shape, to: str, *, groups: Size = 1, transposed: bool = False,
          when: Condition | None = None) -> list[Rule]:
    """Parts into one fused tensor, the inverse of :func:`split`: ``merge("{q,k,v}.weight", (…), "qkv.weight")``.

    ``shape`` is the fused tensor's in the source's layout.
    """
    rule = Rule("merge", tuple((source,) for source in _alternatives(name)), (to,), shape, transposed, groups)
    return [_sound(rule if when is None else replace(rule, when=when))]


def tied(name: str, *shape: Size, of: str, again: str = "", when: Condition | None = None) -> list[Rule]:
    """A source tensor, if it is there, that must hold the bits of ``of``: Paddle's net has one parameter for both.

    ``again`` is the second name of that parameter, if the net has one; the file need not hold it.
    """
    rule = Rule("tied", ((name,),), shape=shape, otherwise=copy_of(of), again=again)
    return [rule if when is None else replace(rule, when=when)]


def buffer(name: str, *shape: Size, filling: Filling, to: str | None = None,
           when: Condition | None = None) -> list[Rule]:
    """What the Paddle side wants beyond the source. A source that carries it is claimed and checked."""
    return _rules("buffer", name, to or name, shape, filling, when)


def drop(name: str, *shape: Size, why: str, holding: Filling | None = None, returns: str = "",
         also: Sequence[str] = (), when: Condition | None = None) -> list[Rule]:
    """A source tensor, if it is there, that the Paddle side has no place for.

    ``holding`` is what it must hold, in ``shape``, where the Paddle side makes the same by itself; ``returns`` the
    dtype in which torch's class saves it.
    """
    rules = _also_called([Rule("drop", ((source,),), shape=shape, otherwise=holding, why=why, returns=returns)
                          for source in _alternatives(name)], also)
    return rules if when is None else [replace(rule, when=when) for rule in rules]


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
    return Filling("causal mask", rows, checked=True, mask=True)


def constant(value: float, *, checked: bool = False) -> Filling:
    """One value everywhere."""
    def rows(shape: tuple[int, ...], some: range) -> Any:
        import numpy as np
        return np.full((len(some), *(shape[-1:] or (1,))), value, np.float32)
    return Filling(f"{value:g}", rows, checked=checked)


def _rules(kind: str, source: str, target: str, shape: Shape, otherwise: Filling | None = None,
           when: Condition | None = None, turn: bool = False) -> list[Rule]:
    sources, targets = _alternatives(source), _alternatives(target)
    if len(sources) != len(targets):
        raise ValueError(f"{source} and {target} spell out different numbers of tensors")
    rules = [Rule(kind, ((one,),), (other,), shape, turn, otherwise=otherwise)
             for one, other in zip(sources, targets, strict=True)]
    return rules if when is None else [replace(rule, when=when) for rule in rules]


def _also_called(rules: Sequence[Rule], also: Sequence[str]) -> list[Rule]:
    """``rules`` of one source each, which goes by further names too; these spell out alternatives as the first does."""
    spellings = [_alternatives(other) for other in also]
    return [replace(rule, sources=((*rule.sources[0], *(names[number] for names in spellings)),))
            for number, rule in enumerate(rules)]


def _sound(rule: Rule) -> Rule:
    many = rule.targets if rule.kind == "split" else rule.sources
    if len(many) != len(rule.parts) or sum(isinstance(size, tuple) for size in rule.shape) != 1:
        raise ValueError(f"{rule.kind} of {rule.sources[0][0]}: one axis of the shape is to be a tuple of {len(many)} "
                         "sizes, one for each name")
    return rule


def _stacked(pieces: Sequence[Any]) -> Any:
    """Arrays or matrices one below the other."""
    if len(pieces) == 1:
        return pieces[0]
    if hasattr(pieces[0], "above"):
        return pieces[0].above(pieces[1:])
    import numpy as np
    return np.concatenate(pieces)


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

    ``architecture`` is the class in transformers and in ``models/``, ``paddlenlp`` the one in PaddleNLP, if there is
    one; ``inputs`` is their kind (``align/inputs.py``), ``task`` names natural metric and loss (``align/tasks.py``),
    ``prefix`` says in words, before a text that ships, what is to be done with it.
    Where the torch side is not transformers' class, ``reference(config, source)`` builds a ``torch.nn.Module`` that has
    its weights, takes transformers' arguments, and returns a mapping with its output names.
    """

    architecture: str
    paddlenlp: str | None
    task: str
    rules: tuple[Rule, ...] = ()
    base: bool = False
    inputs: str | Prompts = "tokens"
    prefix: str = ""
    reference: Callable[[Config, Any], Any] | None = None


@dataclass(frozen=True)
class Family:
    """One architecture: how its weights move, and what align needs to know of it."""

    name: str
    prefix: str
    """What the base model's names go without on torch's side, and on Paddle's where there is no ``target_prefix``."""
    layers: Callable[[Config], Layers]
    sizes: Callable[[Config], Sizes]
    rules: tuple[Rule, ...]
    heads: tuple[Head, ...]
    modules: tuple[tuple[str, str], ...] = ()
    """(torch, Paddle) paths of the modules that align records, in the order of execution."""
    inside: Inside | Callable[[Config], Inside] = field(default_factory=dict)
    """For a module's Paddle path its sublayers in that order too: (torch, Paddle, the operation before it)."""
    demo: Config = field(default_factory=dict)
    """The config of the built-in checkpoint."""
    variants: Mapping[str, Config] = field(default_factory=dict)
    """By name, what can be otherwise in ``demo`` and changes the numbers."""
    tokenizer: str = "none"
    """Of the built-in checkpoint: wordpiece, byte-level, byte-level fast, sentencepiece, prompts, pictures (a
    preprocessor) or none."""
    unsupported: Callable[[Config], str | None] = lambda config: None
    """Why a config cannot be converted."""
    additions: Callable[[Config], Config] = lambda config: {}
    """Keys that PaddleNLP's class wants in a config that does not have them."""
    paddle_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of torch's config that PaddleNLP's has under other names: what it calls them."""
    target_prefix: str | None = None
    config_of: Callable[[Mapping[str, Any]], Config] | None = None
    """The config of a checkpoint that comes without a config.json, read from its header."""
    states: Config = field(default_factory=dict)
    """What the family file itself says of the config; no config.json may say otherwise."""
    model_type: str = ""
    """As the config has it; ``name`` unless given."""
    paddlenlp: str = ""
    """The package below ``paddlenlp.transformers``; ``name`` unless given."""
    paddlenlp_tokenizer: str = ""
    """The tokenizer's ``module:class`` below ``paddlenlp.transformers``, where PaddleNLP has one."""
    remote_code: bool = False
    """Whether torch's classes are in code that the checkpoint brings along."""
    time_first: Callable[[str], bool] = lambda name: False
    """Whether a module's or output's arrays, by Paddle's name, are [tokens, batch, width]."""
    paddlenlp_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """The arguments that PaddleNLP's class takes, of those that torch's takes."""
    settings: Mapping[str, Names] = field(default_factory=dict)
    """Keys of torch's config for what a net's outputs may not show, by what they are about."""
    traits: Traits = field(default_factory=Traits)

    @property
    def paddle_prefix(self) -> str:
        return self.prefix if self.target_prefix is None else self.target_prefix

    def head(self, architecture: str) -> Head:
        """The head whose class is ``architecture``; KeyError when the family has none."""
        return {head.architecture: head for head in self.heads}[architecture]

    def inside_of(self, config: Config) -> Inside:
        """The sublayers of a module, by its Paddle path, ``{i}`` still in place."""
        return self.inside(config) if callable(self.inside) else self.inside

    def rules_of(self, head: Head) -> list[Rule]:
        """Every rule that holds for ``head``. Names with and without the prefix are accepted, as transformers does."""
        return [self._prefixed(rule, head.base) for rule in (*self.rules, *head.rules)]

    def modules_of(self, head: Head) -> list[tuple[str, str]]:
        """The module paths for ``head``, ``{i}`` still in place."""
        if not head.base:
            return list(self.modules)
        return [(torch.removeprefix(self.prefix), paddle.removeprefix(self.paddle_prefix))
                for torch, paddle in self.modules]

    def inverse(self) -> Family:
        """The family that carries what its conversion makes back to torch."""
        targets = {rule.sources[0][0]: rule.targets[0] for head in self.heads for rule in (*self.rules, *head.rules)
                   if rule.targets and not rule.otherwise}

        def inverted(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            found = (rule.inverse() for rule in rules)
            return tuple(_copying(rule, targets) for rule in found if rule is not None)
        return replace(self, prefix=self.paddle_prefix, target_prefix=self.prefix, rules=inverted(self.rules),
                       heads=tuple(replace(head, rules=inverted(head.rules)) for head in self.heads))

    def _prefixed(self, rule: Rule, base: bool) -> Rule:
        """``rule`` with the names of a base model, or of one with a head, in front."""
        def spelled(names: Names) -> Names:
            bare = tuple(name.removeprefix(self.prefix) for name in names)
            kinds = (bare, names) if base else (names, bare)
            return tuple(dict.fromkeys(name for kind in kinds for name in kind))
        if not self.prefix and not self.paddle_prefix:
            return rule
        targets = tuple(target.removeprefix(self.paddle_prefix) for target in rule.targets) if base else rule.targets
        filling = rule.otherwise
        if base and filling and filling.copies:
            filling = replace(filling, copies=filling.copies.removeprefix(self.prefix))
        again = rule.again.removeprefix(self.paddle_prefix) if base else rule.again
        return replace(rule, sources=tuple(map(spelled, rule.sources)), targets=targets, otherwise=filling, again=again)


def _copying(rule: Rule, targets: Mapping[str, str]) -> Rule:
    """An inverse rule that copies what the other side calls by ``targets``' name."""
    if rule.otherwise is None or rule.otherwise.copies is None:
        return rule
    return replace(rule, otherwise=copy_of(targets[rule.otherwise.copies]))


def rules(*groups: Sequence[Rule]) -> tuple[Rule, ...]:
    """Flatten what the builders return."""
    return tuple(rule for group in groups for rule in group)


def counted(*names: str, letter: str = "i") -> Callable[[Config], Layers]:
    """The usual :attr:`Family.layers`: one letter, counted by the first of these keys that the config has."""
    return lambda config: {letter: depth_of(config, *names)}


def numbers_of(layers: Layers, letter: str) -> range:
    """What ``letter`` stands for."""
    known = layers[letter]
    return known if isinstance(known, range) else range(known)


def depth_of(config: Config, *names: str) -> int:
    """:func:`size_of` for a number of layers."""
    from .errors import BadInput
    depth = size_of(config, *names)
    if depth > MAX_LAYERS:
        raise BadInput(f"config.json: {names[0]} is {depth}, which is absurd.")
    return depth


def in_numbers(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    """A shape whose words are numbers."""
    return tuple(_number(size, sizes) for size in shape)


def _number(size: Size, sizes: Sizes) -> int:
    if isinstance(size, tuple):
        return sum(_number(part, sizes) for part in size)
    return sizes[size] if isinstance(size, str) else size


def size_of(config: Config, *names: str, default: int | None = None) -> int:
    """The first of ``names`` that the config has; :class:`BadInput` when it has none and there is no default."""
    from .errors import BadInput
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise BadInput(f"config.json: {names[0]} is {str(value)[:40]}; a whole number up to {MAX_SIZE:,} is needed.")
    return value


def heads_fault(config: Config, width: Names, heads: Names, default: int | None = None) -> str | None:
    """Why the heads do not divide the width, if so; each by the first of its keys that the config has."""
    hidden, number = size_of(config, *width), size_of(config, *heads, default=default)
    if number and hidden % number == 0:
        return None
    return f"{heads[0]} is {number}; a number of heads that divides {width[0]} {hidden} is needed"


def activation_fault(config: Config, key: str) -> str | None:
    """Why the config's activation is none, if so; one that it does not name is the class's own."""
    named = config.get(key, "")
    return None if isinstance(named, str) else f"{key} is {str(named)[:40]}; the name of an activation is needed"


def labels_of(config: Config) -> int:
    """How many classes a classification head has: as transformers, from ``id2label`` before ``num_labels``, else 2."""
    from .errors import BadInput
    names = config.get("id2label")
    if not names:
        return size_of(config, "num_labels", default=2)
    if not isinstance(names, Sized):
        raise BadInput(f"config.json: id2label is {names!r}; a name for each label is needed.")
    return len(names)
