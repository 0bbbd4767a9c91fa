"""Which tensor of one checkpoint is which of another: by values where both have them, else by shapes, names and order.

Tensors are taken together twice: those that layers alike have in the same place, and those of one module (weight and
bias). What is left is an assignment problem: each module of one side to at most one of the other, so that the sum of
their likenesses is largest (Kuhn 1955, Munkres 1957; here scipy's ``linear_sum_assignment``, Crouse 2016).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

Shape = tuple[int, ...]
ROOT = 0.75
LEAVES = {"weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias", "running_mean": "mean",
          "_mean": "mean", "running_var": "variance", "_variance": "variance", "num_batches_tracked": "tracked"}
SYNONYMS = {
    "attn": "attention", "q": "query", "k": "key", "v": "value", "o": "out", "output": "out", "ln": "norm",
    "layernorm": "norm", "bn": "norm", "normalization": "norm", "wte": "word", "tokens": "word", "wpe": "position",
    "positions": "position", "embed": "embedding", "embeddings": "embedding", "fc": "linear", "dense": "linear",
    "proj": "linear", "conv": "convolution", "f": "final", "downsample": "shortcut", "h": "layer", "layers": "layer",
    "block": "layer", "blocks": "layer",
}
THIRDS = {"query", "key", "value", "gate", "up", "0", "1", "2"}
"""What parts of a fused tensor are called."""
WEIGHTS = {"values": 5.0, "same name": 2.0, "words": 0.6, "last word": 0.2, "order": 0.2, "leaf missing": -0.15}
KINDS = {"linear", "norm", "layer", "embedding", "convolution", "weight"}
"""What a module is, rather than which one."""
SHORT = 16
"""An axis that is shorter may well be as long as another by chance."""
FITTING, GROUPS = -100.0, 128


@dataclass(frozen=True)
class Side:
    """One checkpoint: its shapes by name, in its order, and how to read a tensor; None where it holds no values."""

    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Lane:
    """A tensor, or the one that each layer of ``numbers`` has; ``template`` has ``{}`` for the number."""

    template: str
    names: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True, eq=False)
class Module:
    """The tensors of one module, by what they are in it; ``numbers`` are its layers in the list at path ``layers``."""

    path: str
    layers: str
    numbers: tuple[int, ...]
    leaves: Mapping[str, Lane]
    place: int


@dataclass(frozen=True)
class Match:
    """Two modules taken for the same. ``turned`` says of each pair of lanes whether it is transposed."""

    torch: Module
    paddle: Module
    pairs: tuple[tuple[Lane, Lane], ...]
    turned: tuple[bool, ...]
    doubts: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Fusion:
    """Tensors of one module, each ``parts`` along its ``axis``, these transposed where ``turned``.

    ``split`` says that torch has them whole, rather than Paddle.
    """

    whole: tuple[Lane, ...]
    parts: tuple[tuple[Lane, ...], ...]
    axis: tuple[int, ...]
    turned: tuple[bool, ...]
    groups: int
    split: bool
    doubts: tuple[str, ...]
    reason: str


@dataclass
class Matching:
    """All that was found. ``lists`` pairs the paths of lists of layers, with how far each counts."""

    matches: list[Match] = field(default_factory=list)
    fusions: list[Fusion] = field(default_factory=list)
    torch_left: list[Module] = field(default_factory=list)
    paddle_left: list[Module] = field(default_factory=list)
    lists: dict[str, str] = field(default_factory=dict)


def match(torch: Side, paddle: Side) -> Matching:
    """The likeliest matching of two checkpoints."""
    return _Matcher(torch, paddle).matching()


def modules_of(shapes: Mapping[str, Shape]) -> list[Module]:
    """The modules of a checkpoint, layers that are alike taken together."""
    lists = _lists(shapes)
    lanes: dict[tuple[str, str, Shape], list[tuple[int, str]]] = defaultdict(list)
    for name, shape in shapes.items():
        layers, number, rest = _located(name, lists)
        lanes[layers, rest, shape].append((number, name))
    found: dict[tuple[str, str, tuple[int, ...]], dict[str, Lane]] = defaultdict(dict)
    for (layers, rest, shape), members in lanes.items():
        for run in _runs(sorted(members)):
            numbers = tuple(number for number, _ in run) if layers else ()
            inside = f"{layers}.{'{}' if len(run) > 1 else run[0][0]}.{rest}" if layers else rest
            owner, _, last = inside.rpartition(".")
            leaf = LEAVES.get(last, "")
            lane = Lane(inside, tuple(name for _, name in run), shape)
            found[layers, owner if leaf else inside, numbers][leaf] = lane
    return [Module(path, layers, numbers, leaves, place)
            for place, ((layers, path, numbers), leaves) in enumerate(found.items())]


def _lists(shapes: Mapping[str, Shape]) -> set[str]:
    """The paths below which numbers stand for layers: so chosen that as few lanes as possible are left."""
    return _fewest("", [(name.split("."), shape) for name, shape in shapes.items()])[1]


def _fewest(path: str, tensors: Sequence[tuple[list[str], Shape]]) -> tuple[int, set[str]]:
    """How many lanes there are below ``path`` at least, and the lists that make them; names are as seen from there."""
    below: dict[str, list[tuple[list[str], Shape]]] = defaultdict(list)
    for (first, *rest), shape in tensors:
        below[first].append((rest, shape))
    if below.keys() == {""}:
        return len(tensors), set()
    parts = [_fewest(f"{path}.{first}".lstrip("."), some) if some[0][0] else (1, set())
             for first, some in below.items()]
    apart = sum(count for count, _ in parts), set[str]().union(*(lists for _, lists in parts))
    if len(below) < 2 or not path or not all(first.isdecimal() and len(first) < 7 and some[0][0]
                                             for first, some in below.items()):
        return apart
    lanes: dict[tuple[str, Shape], list[tuple[int, str]]] = defaultdict(list)
    for first, some in below.items():
        for rest, shape in some:
            lanes[".".join(rest), shape].append((int(first), ""))
    count = sum(len(_runs(sorted(members))) for members in lanes.values())
    return (count, {path}) if count < apart[0] else apart


def _located(name: str, lists: set[str]) -> tuple[str, int, str]:
    """The outermost list that ``name`` is in, the number of its layer, and its name in the layer."""
    parts = name.split(".")
    for place, part in enumerate(parts[1:-1], 1):
        path = ".".join(parts[:place])
        if part.isdecimal() and path in lists:
            return path, int(part), ".".join(parts[place + 1:])
    return "", 0, name


def _runs(members: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Members with consecutive numbers."""
    runs: list[list[tuple[int, str]]] = []
    for member in members:
        if not runs or member[0] != runs[-1][-1][0] + 1:
            runs.append([])
        runs[-1].append(member)
    return runs


def words_of(path: str) -> list[str]:
    """The words of a path, common spellings of one thing made the same."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", path)
    return [SYNONYMS.get(word.lower(), word.lower()) for word in found]


def fitting(one: Module, other: Module) -> tuple[tuple[Lane, Lane], ...]:
    """Their tensors in pairs of one shape, or one and its transpose; empty where they do not fit."""
    common = [leaf for leaf in one.leaves if leaf in other.leaves]
    pairs = tuple((one.leaves[leaf], other.leaves[leaf]) for leaf in common)
    if not pairs and len(one.leaves) == len(other.leaves) == 1:
        pairs = ((*one.leaves.values(), *other.leaves.values()),)
    return pairs if all(_fit(left.shape, right.shape) for left, right in pairs) else ()


def _fit(one: Shape, other: Shape) -> bool:
    return one == other or (len(one) == 2 and one == other[::-1]) or {one, other} == {(), (1,)}


def _as_it_lies(one: Lane, other: Lane) -> bool:
    return one.shape == other.shape or {one.shape, other.shape} == {(), (1,)}


def root_of(names: Iterable[str]) -> str:
    """The first part that nearly all names have in common, with its dot; empty where there is none."""
    names = list(names)
    first, count = Counter(name.split(".")[0] for name in names if "." in name).most_common(1)[0] if any(
        "." in name for name in names) else ("", 0)
    return f"{first}." if count >= ROOT * len(names) else ""


def is_sorted(names: Iterable[str]) -> bool:
    """Whether the order of these names is that of the alphabet, so that it says nothing."""
    names = list(names)
    return names == sorted(names)


class _Matcher:
    """What is known of two checkpoints while their modules are matched."""

    def __init__(self, torch: Side, paddle: Side) -> None:
        self.sides = (torch, paddle)
        self.modules = (modules_of(torch.shapes), modules_of(paddle.shapes))
        self.roots = tuple(root_of(side.shapes) for side in self.sides)
        self.ordered = not any(is_sorted(side.shapes) for side in self.sides)
        self.values = _Values(*self.sides, *self.modules) if torch.read and paddle.read else None
        words = [set(words_of(module.path)) for modules in self.modules for module in modules]
        seen = Counter(word for some in words for word in some)
        self.rarity = {word: math.log(1 + len(words) / count) for word, count in seen.items()}
        self.found = Matching()

    def matching(self) -> Matching:
        """Lists of layers first, then what is in them."""
        groups = tuple(self._grouped(modules) for modules in self.modules)
        self.found.lists = self._lists_in_pairs(groups)
        for (layers, numbers), ours in groups[0].items():
            theirs = groups[1].pop((self.found.lists.get(layers, ""), numbers), []) if (
                layers in self.found.lists or not layers) else []
            self._match_group(list(ours), list(theirs))
        self.found.paddle_left += [module for modules in groups[1].values() for module in modules]
        return self.found

    def _grouped(self, modules: Sequence[Module]) -> dict[tuple[str, tuple[int, ...]], list[Module]]:
        groups: dict[tuple[str, tuple[int, ...]], list[Module]] = defaultdict(list)
        for module in modules:
            groups[module.layers, module.numbers].append(module)
        return groups

    def _lists_in_pairs(self, groups: Sequence[Mapping[tuple[str, tuple[int, ...]], list[Module]]]) -> dict[str, str]:
        held = [defaultdict(Counter), defaultdict(Counter)]
        for side, some in enumerate(groups):
            for (layers, numbers), modules in some.items():
                for module in modules if layers else ():
                    held[side][layers].update((numbers, *sorted(lane.shape)) for lane in module.leaves.values())
        ours, theirs = map(list, held)
        likeness = [[(held[0][one] & held[1][other]).total() / max(1, (held[0][one] | held[1][other]).total())
                     + 0.5 * self._in_words(one, other) for other in theirs] for one in ours]
        return {ours[row]: theirs[column] for row, column in _assigned(likeness)}

    def _in_words(self, one: str, other: str) -> float:
        """Cosine of the words of two paths, rare words weighing more."""
        left, right = ({word: self.rarity.get(word, 1.0) for word in words_of(path)} for path in (one, other))
        norms = math.sqrt(sum(weight**2 for weight in left.values()) * sum(weight**2 for weight in right.values()))
        return sum(weight * right.get(word, 0) for word, weight in left.items()) / norms if norms else 0.0

    def _match_group(self, ours: list[Module], theirs: list[Module]) -> None:
        self._fuse(ours, theirs, split=True)
        self._fuse(theirs, ours, split=False)
        likeness = [[self._likeness(one, other, ours, theirs) for other in theirs] for one in ours]
        matched = _assigned(likeness)
        self.found.matches += [self._told(ours[row], theirs[column], ours, theirs) for row, column in matched]
        rows, columns = {row for row, _ in matched}, {column for _, column in matched}
        self.found.torch_left += [module for number, module in enumerate(ours) if number not in rows]
        self.found.paddle_left += [module for number, module in enumerate(theirs) if number not in columns]

    def _likeness(self, one: Module, other: Module, ours: Sequence[Module], theirs: Sequence[Module]) -> float:
        pairs = fitting(one, other)
        if not pairs:
            return FITTING
        missing = len((one.leaves.keys() ^ other.leaves.keys()) - {"tracked", ""})
        last = [words_of(module.path.rpartition(".")[2]) for module in (one, other)]
        rivals = [[module for module in some if fitting(*pair(module))] for some, pair in (
            (ours, lambda module: (module, other)), (theirs, lambda module: (one, module)))]
        places = [self._rank(module, some) for module, some in zip((one, other), rivals, strict=True)]
        return (WEIGHTS["words"] * self._in_words(self._inside(one, 0), self._inside(other, 1))
                + WEIGHTS["last word"] * bool(set(last[0]) & set(last[1]))
                + WEIGHTS["order"] * (1 - abs(places[0] - places[1])) + WEIGHTS["leaf missing"] * missing
                + WEIGHTS["same name"] * self._same_name(one.path, other.path)
                + WEIGHTS["values"] * (self.values is not None and self.values.alike(pairs)))

    def _rank(self, module: Module, rivals: Sequence[Module]) -> float:
        """Where ``module`` stands among ``rivals``, 0 to 1; by name, unless both files have orders of their own."""
        ranked = sorted(rivals, key=lambda rival: rival.place if self.ordered else rival.path)
        return ranked.index(module) / max(1, len(ranked) - 1)

    def _inside(self, module: Module, side: int) -> str:
        return module.path.removeprefix(f"{module.layers}." if module.layers else self.roots[side])

    def _told(self, one: Module, other: Module, ours: Sequence[Module], theirs: Sequence[Module]) -> Match:
        """The match with all that can be said for and against it."""
        pairs = fitting(one, other)
        if self.values is not None and (turned := self.values.turned(pairs)) is not None:
            return Match(one, other, pairs, turned, (), "the same values")
        alike = self.values is not None and self.values.alike(pairs)
        told = self.values.told(pairs) if alike else None
        turned = told or tuple(left.shape != right.shape and len(left.shape) == 2 for left, right in pairs)
        doubts = []
        if told is None and any(len(left.shape) == 2 and left.shape[0] == left.shape[1] for left, _ in pairs):
            doubts.append("square: shapes cannot tell whether it is transposed")
        rivals = [_shown(module) for module in theirs if module is not other and fitting(one, module)]
        rivals += [_shown(module) for module in ours if module is not one and fitting(module, other)
                   and _shown(module) not in rivals]
        named = self._same_name(one.path, other.path)
        alone = not rivals and self._akin(one, other, pairs) and (
            not one.layers or self._same_name(one.layers, other.layers) or self._only_list(one, other))
        if not named and not alone:
            doubts.append(f"by name and order, where {' or '.join(rivals[:3])} would fit as well" if rivals else
                          "by shape alone; the names have little in common")
        if len(pairs) < max(len(one.leaves.keys() - {"tracked"}), len(other.leaves)):
            doubts.append("one side has more tensors in it")
        reason = "the same name" if named else "the only one of its shape"
        if alike:
            shared = f"the same values, which {self._sharing(one, other, pairs)} too"
            return Match(one, other, pairs, turned, (*doubts, shared) if doubts else (), f"{reason}, and {shared}")
        if self.values is not None and self.values.trusted:
            doubts.append("the values differ, where others are the same")
        return Match(one, other, pairs, turned, tuple(doubts), reason)

    def _sharing(self, one: Module, other: Module, pairs: Sequence[tuple[Lane, Lane]]) -> str:
        """Which other modules of both sides hold values of ``pairs``, or that these are so whichever way they lie."""
        names = [_shown(module) for module in (*self.modules[1], *self.modules[0]) if module not in (one, other)
                 and any(self.values.shared(lane, pair) for lane in module.leaves.values() for pair in pairs)]
        names = list(dict.fromkeys(names))
        if len(names) > 2:
            return f"{names[0]}, {names[1]} and {len(names) - 2} more have"
        return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'}" if names else "the transpose has"

    def _same_name(self, one: str, other: str) -> bool:
        left, right = ({path, path.removeprefix(root)} for path, root in zip((one, other), self.roots, strict=True))
        return bool(left & right)

    def _akin(self, one: Module, other: Module, pairs: Sequence[tuple[Lane, Lane]]) -> bool:
        """Whether the names have words in common; that both are linears, say, is not enough where an axis is short."""
        common = set(words_of(self._inside(one, 0))) & set(words_of(self._inside(other, 1)))
        short = any(size < SHORT for left, _ in pairs for size in left.shape)
        return bool(common - KINDS if short else common)

    def _only_list(self, one: Module, other: Module) -> bool:
        """Whether no other list of either side counts as far."""
        return all(len({module.layers for module in modules if module.layers and module.numbers == one.numbers}) == 1
                   for modules in self.modules)

    # Fused tensors: of a module that nothing fits, whether it is several of the other side's.

    def _fuse(self, wholes: list[Module], others: list[Module], split: bool) -> None:
        for whole in list(wholes):
            if any(fitting(whole, other) for other in others):
                continue
            candidates = [fusion for some in _siblings(others) for count in (3, 2, 4)
                          for parts in combinations(some, count) for fusion in self._fusions(whole, parts, split)]
            if candidates:
                _, fusion, parts = max(candidates, key=lambda candidate: candidate[0])
                self.found.fusions.append(fusion)
                wholes.remove(whole)
                for part in parts:
                    others.remove(part)

    def _fusions(self, whole: Module, parts: tuple[Module, ...], split: bool) -> Iterable[tuple[float, Fusion, Any]]:
        leaves = [leaf for leaf in whole.leaves if leaf in ("weight", "bias")]
        if not leaves or any(leaf not in part.leaves for part in parts for leaf in leaves):
            return
        lanes = tuple(whole.leaves[leaf] for leaf in leaves)
        cut = [tuple(part.leaves[leaf] for leaf in leaves) for part in parts]
        ways = [list(_ways(lane.shape, [part[number].shape for part in cut])) for number, lane in enumerate(lanes)]
        if not all(ways):
            return
        last = [set(words_of(_difference(parts, part))) for part in parts]
        score = sum(bool(some & THIRDS) for some in last) + self._in_words(
            self._inside(whole, not split), parts[0].path)
        if self.values is not None:
            known = self.values.fused(lanes, cut, ways, split)
            if known is not None:
                order, axes, turned, groups = known
                told = Fusion(lanes, tuple(cut[number] for number in order), axes, turned, groups, split, (),
                              "the same values")
                yield score + WEIGHTS["values"], told, parts
                return
        axes, turned = zip(*(options[0] for options in ways), strict=True)
        doubts = ("that these are its parts, their order, and whether they take turns head by head (groups=…), shapes "
                  "cannot tell",)
        if any(len(options) > 1 for options in ways):
            doubts += ("square parts: shapes cannot tell whether they are transposed",)
        yield score, Fusion(lanes, tuple(cut), axes, turned, 1, split, doubts, ""), parts


def _shown(module: Module) -> str:
    return module.path.replace("{}", "*")


def _siblings(modules: Sequence[Module]) -> Iterable[list[Module]]:
    """Modules that lie side by side in one other."""
    owners: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        owners[module.path.rpartition(".")[0]].append(module)
    return owners.values()


def _difference(parts: Sequence[Module], part: Module) -> str:
    """What of a path is not that of the others too."""
    common = set.intersection(*(set(words_of(one.path)) for one in parts))
    return " ".join(word for word in words_of(part.path) if word not in common)


def _ways(whole: Shape, parts: Sequence[Shape]) -> Iterable[tuple[int, bool]]:
    """(axis, transposed) by which ``parts`` can make ``whole``; those that keep the layout first."""
    for turned in (False, True) if len(whole) == 2 else (False,):
        shapes = [shape[::-1] if turned else shape for shape in parts]
        for axis in range(len(whole)):
            rests = {shape[:axis] + shape[axis + 1:] for shape in (whole, *shapes)}
            if {len(shape) for shape in shapes} == {len(whole)} and len(rests) == 1 and whole[axis] == sum(
                    shape[axis] for shape in shapes):
                yield axis, turned


def _assigned(likeness: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs of rows and columns whose sum is largest, those left out that do not fit."""
    if not likeness or not likeness[0]:
        return []
    rows, columns = linear_sum_assignment(np.array(likeness), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)
            if likeness[row][column] > FITTING / 2]


class _Values:
    """Digests of all tensors as they lie and, of matrices, transposed. What occurs twice is evidence of nothing."""

    def __init__(self, torch: Side, paddle: Side, *modules: Sequence[Module]) -> None:
        self.sides = (torch, paddle)
        self.plain: dict[Lane, str] = {}
        self.across: dict[Lane, str] = {}
        for side, some in zip(self.sides, modules, strict=True):
            for lane in (lane for module in some for lane in module.leaves.values()):
                arrays = [side.read(name) for name in lane.names]
                self.plain[lane] = _digest(arrays)
                if len(lane.shape) == 2:
                    self.across[lane] = _digest([array.T for array in arrays])
        self.often = [Counter(self.plain[lane] for module in some for lane in module.leaves.values())
                      for some in modules]
        known = [lane for module in modules[0] for lane in module.leaves.values()
                 if self._once(lane, self.plain[lane]) or self._once(lane, self.across.get(lane, ""))]
        self.trusted = len(known) >= 0.5 * sum(len(module.leaves) for module in modules[0])

    def _once(self, lane: Lane, digest: str) -> bool:
        """Whether torch's ``lane`` is like no other of torch's, and ``digest`` that of one only of Paddle's."""
        return self.often[0][self.plain[lane]] == 1 and self.often[1][digest] == 1

    def alike(self, pairs: Sequence[tuple[Lane, Lane]]) -> bool:
        """Whether each pair holds the same values, though others may hold them too."""
        return all(self._ways(left, right) for left, right in pairs)

    def told(self, pairs: Sequence[tuple[Lane, Lane]]) -> tuple[bool, ...] | None:
        """Whether each pair is transposed, where its values are the same in one way only."""
        ways = [self._ways(left, right) for left, right in pairs]
        return tuple(some[0] for some in ways) if all(len(some) == 1 for some in ways) else None

    def turned(self, pairs: Sequence[tuple[Lane, Lane]]) -> tuple[bool, ...] | None:
        """:meth:`told` of a module whose values are the same, and no other's in at least one tensor."""
        return self.told(pairs) if any(self._once(left, self.plain[right]) for left, right in pairs) else None

    def shared(self, lane: Lane, pair: tuple[Lane, Lane]) -> bool:
        """Whether ``lane`` holds the values of ``pair``."""
        return self.plain[lane] in {self.plain[one] for one in pair}

    def _ways(self, left: Lane, right: Lane) -> list[bool]:
        """Whether ``right`` is torch's ``left`` as it lies (False), and whether it is its transpose (True)."""
        digests = ((False, self.plain[left]), (True, self.across.get(left)))
        return [turned for turned, digest in digests if digest == self.plain[right]
                and (not turned or left.shape == right.shape[::-1]) and (turned or _as_it_lies(left, right))]

    def fused(self, whole: Sequence[Lane], parts: Sequence[Sequence[Lane]], ways: Sequence[Sequence[tuple[int, bool]]],
              split: bool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...], int] | None:
        """Order of the parts, axes, layouts and groups by which the values of ``whole`` are those of ``parts``."""
        ours, theirs = self.sides if split else self.sides[::-1]
        for order in permutations(range(len(parts))):
            for groups in _divisors(parts, ways):
                told = []
                for number, lane in enumerate(whole):
                    held = [[theirs.read(parts[part][number].names[layer]) for part in order]
                            for layer in range(len(lane.names))]
                    wholes = [ours.read(name) for name in lane.names]
                    told.append([(axis, turned) for axis, turned in ways[number] if all(
                        np.array_equal(whole, _joined(some, axis, turned, groups))
                        for whole, some in zip(wholes, held, strict=True))])
                if all(len(some) == 1 for some in told):
                    axes, turned = zip(*(some[0] for some in told), strict=True)
                    return order, axes, turned, groups
        return None


def _divisors(parts: Sequence[Sequence[Lane]], ways: Sequence[Sequence[tuple[int, bool]]]) -> list[int]:
    """How many groups the parts can take turns in."""
    axis, turned = ways[0][0]
    widths = [(part[0].shape[::-1] if turned else part[0].shape)[axis] for part in parts]
    return [groups for groups in range(1, GROUPS + 1) if all(width % groups == 0 for width in widths)]


def _joined(parts: Sequence[np.ndarray], axis: int, turned: bool, groups: int) -> np.ndarray:
    laid = [np.split(part.T if turned else part, groups, axis) for part in parts]
    return np.concatenate([pieces[group] for group in range(groups) for pieces in laid], axis)


def _digest(arrays: Sequence[np.ndarray]) -> str:
    import xxhash
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(np.ascontiguousarray(array))
    return state.hexdigest()
