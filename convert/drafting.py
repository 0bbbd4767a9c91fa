"""From a matching of two checkpoints to the text of a family file, in the words of ``rules.py``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from .dtypes import BY_NAME
from .errors import BadInput
from .matching import (
    Fusion,
    Lane,
    Match,
    Matching,
    Module,
    Shape,
    Side,
    is_sorted,
    match,
    modules_of,
    root_of,
    words_of,
)
from .rules import Config, Family, labels_of

WIDTH = 120
BUILDERS = {"Family", "Head", "Rule", "batch_norm", "buffer", "causal_mask", "constant", "conv1d", "copy_of", "counted",
            "depth_of", "drop", "keep", "labels_of", "linear", "merge", "norm", "rules", "size_of", "split", "zeros"}
LAST = 10**6
LETTERS = "ijklmnopqrstuvwxyz"
KEYS = {
    "vocab": ("vocab_size",), "hidden": ("n_embd", "hidden_size", "d_model", "n_embed"),
    "inner": ("n_inner", "intermediate_size", "ffn_dim", "d_ff", "inner_hidden_size"),
    "attention": ("num_heads * d_kv",),
    "positions": ("n_positions", "max_position_embeddings", "max_sequence_length"),
    "types": ("type_vocab_size",), "buckets": ("relative_attention_num_buckets",),
    "heads": ("n_head", "num_attention_heads", "num_heads"), "words": ("word_embed_proj_dim",),
    "stem": ("embedding_size",), "channels": ("num_channels",),
}
SIGNS = {
    "positions": {"position"}, "types": {"type"}, "buckets": {"relative"}, "heads": {"relative"},
    "vocab": {"word", "lm", "shared", "decoder"}, "stem": {"embedder", "stem"}, "channels": {"embedder", "stem"},
}
"""What the name of a tensor says where a size is meant by one of these words, and is not equal to it by chance."""
SMALL = ("types", "buckets", "heads", "stem", "channels")
"""Words for numbers so small that without a sign the number itself is written."""
DEPTHS = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers")
MULTIPLES = {2: "double", 3: "fused", 4: "inner"}
TASKS = {"LMHead": "causal-lm", "CausalLM": "causal-lm", "MaskedLM": "masked-lm", "PreTraining": "pre-training",
         "SequenceClassification": "sequence-classification", "TokenClassification": "token-classification",
         "QuestionAnswering": "question-answering", "ConditionalGeneration": "translation",
         "ImageClassification": "image-classification"}
EMBEDDING = {"embedding", "word", "position", "shared"}


@dataclass(frozen=True)
class Line:
    """One rule: its text over as many lines as it needs, what is to be said of it, and the tensors that it is about."""

    text: str
    remark: str
    sure: bool
    names: frozenset[str]
    layers: tuple[str, tuple[int, ...]]
    place: int


@dataclass(frozen=True)
class Draft:
    """A family file. ``fault`` is what its plan for the torch checkpoint lacks; empty where it is total."""

    text: str
    lines: tuple[Line, ...]
    torch_left: int
    paddle_left: int
    fault: str


def draft(torch: Side, paddle: Side, config: Config) -> Draft:
    """The draft of a family for two checkpoints."""
    return _Writer(torch, paddle, config).draft()


class _Writer:
    """What the lines of one draft share."""

    def __init__(self, torch: Side, paddle: Side, config: Config) -> None:
        self.torch, self.paddle, self.config = torch, paddle, config
        self.found: Matching = match(torch, paddle)
        self.sizes = _Sizes(config)
        self.letters: dict[tuple[str, tuple[int, ...]], str] = {}
        self.sources: dict[str, str] = {}
        self.as_paddle = is_sorted(torch.shapes) and not is_sorted(paddle.shapes)
        told = [turned for one in self.found.matches for (left, _), turned in zip(one.pairs, one.turned, strict=True)
                if len(left.shape) == 2 and (left.shape[0] != left.shape[1] or not one.doubts) and _is_linear(one)]
        self.turned, self.told = sum(told), len(told)

    def draft(self) -> Draft:
        lines = [line for one in self.found.matches for line in self._matched(one)]
        lines += [line for fusion in self.found.fusions for line in self._fused(fusion)]
        paired = {id(lane) for one in self.found.matches for pair in one.pairs for lane in pair}
        torch_left, paddle_left = (
            [(module, lane) for module in modules for lane in module.leaves.values() if id(lane) not in paired]
            for modules in ([*(one.torch for one in self.found.matches), *self.found.torch_left],
                            [*(one.paddle for one in self.found.matches), *self.found.paddle_left]))
        torch_left = [(module, lane) for module, lane in torch_left
                      if not (module.leaves.get("tracked") is lane and "mean" in module.leaves)]
        lines += [self._dropped(module, lane) for module, lane in torch_left]
        lines += [self._made(module, lane) for module, lane in paddle_left]
        first: dict[Any, int] = {}
        for line in lines:
            first[line.layers] = min(line.place, first.get(line.layers, line.place))
        lines.sort(key=lambda line: (first[line.layers], line.layers, line.place))
        text = self._text(lines)
        return Draft(text, tuple(lines), sum(len(lane.names) for _, lane in torch_left),
                     sum(len(lane.names) for _, lane in paddle_left), self._fault(text))

    # Rules

    def _matched(self, one: Match) -> Iterator[Line]:
        torch, paddle = self._path(one.torch, one.torch.path), self._path(one.torch, one.paddle.path)
        doubts, turned = list(one.doubts), one.turned
        if one.doubts and one.doubts[0].startswith("square"):
            across = self._across(one)
            turned = tuple(across and len(left.shape) == 2 for left, _ in one.pairs)
            if self.told:
                doubts[0] += f" (of those that can be told {self.turned} of {self.told} are)"
        names = [name for pair in one.pairs for lane in pair for name in lane.names]
        place = one.paddle.place if self.as_paddle else one.torch.place
        for left, right in one.pairs:
            self.sources.update(dict.fromkeys(right.names, self._path(one.torch, left.template)))
        remark = f"check: {'; '.join(doubts)}" if doubts else f"sure: {one.reason}"

        def line(text: str) -> Line:
            return Line(text, remark, not doubts, frozenset(names), self._layers(one.torch), place)

        def to(source: str, target: str) -> list[str]:
            return [] if source == target else [f'to="{target}"']

        shapes = {leaf: lane.shape for leaf, lane in one.torch.leaves.items()
                  if any(lane is left for left, _ in one.pairs)}
        weight, bias = shapes.get("weight"), shapes.get("bias")
        plain = self._plainly_named(one)
        flags = [] if bias else ["bias=False"]
        if plain and "mean" in shapes and weight and bias:
            yield line(_call("batch_norm", f'"{torch}"', self._size(bias[0], torch), *to(torch, paddle)))
        elif plain and weight and len(weight) == 1:
            yield line(_call("norm", f'"{torch}"', self._size(weight[0], torch), *to(torch, paddle), *flags))
        elif plain and weight and len(weight) == 2 and any(turned):
            yield line(_call("linear", f'"{torch}"', *self._all(weight, torch), *to(torch, paddle), *flags))
        elif plain and weight and bias and len(weight) == 2 and bias[0] == weight[1]:
            yield line(_call("conv1d", f'"{torch}"', *self._all(weight, torch), *to(torch, paddle)))
        else:
            for (left, right), across in zip(one.pairs, turned, strict=True):
                source, target = (self._path(one.torch, lane.template) for lane in (left, right))
                stem = (source.removesuffix(".weight"), target.removesuffix(".weight"))
                if across and source.endswith(".weight") and target.endswith(".weight"):
                    yield line(_call("linear", f'"{stem[0]}"', *self._all(left.shape, torch), *to(*stem), "bias=False"))
                elif across:
                    yield line(_call("Rule", '"linear"', f'(("{source}",),)', f'("{target}",)',
                                     f"({', '.join(self._all(left.shape, torch))})", "transposed=True"))
                else:
                    yield line(_call("keep", f'"{source}"', *self._all(left.shape, torch), *to(source, target)))

    def _plainly_named(self, one: Match) -> bool:
        """Whether the builders for whole modules spell its tensors as they are."""
        told = {tuple(lane.template.rpartition(".")[2] for lane in pair) for pair in one.pairs}
        statistics = told & {("running_mean", "_mean"), ("running_var", "_variance")}
        return told - statistics in ({("weight", "weight")}, {("weight", "weight"), ("bias", "bias")},
                                     {("gamma", "weight"), ("beta", "bias")}) and len(statistics) in (0, 2)

    def _across(self, one: Match) -> bool:
        """The likelier layout of a square weight: as the others of this pair that can be told."""
        embeds = bool(EMBEDDING & set(words_of(one.torch.path.rpartition(".")[2]))) and "bias" not in one.torch.leaves
        return not embeds and (not self.told or self.turned * 2 >= self.told)

    def _fused(self, fusion: Fusion) -> Iterator[Line]:
        owner = self._owner(fusion)
        remark = f"check: {'; '.join(fusion.doubts)}" if fusion.doubts else f"sure: {fusion.reason}"
        for number, whole in enumerate(fusion.whole):
            lanes, axis, turned = [part[number] for part in fusion.parts], fusion.axis[number], fusion.turned[number]
            if not fusion.split and turned:
                axis = 1 - axis
            shape = whole.shape[::-1] if turned and not fusion.split else whole.shape
            widths = [(lane.shape[::-1] if turned and fusion.split else lane.shape)[axis] for lane in lanes]
            one, many = self._path(owner, whole.template), self._path(owner, _alternatives(lanes))
            if turned is False and len(whole.shape) == 2 and "square parts" in remark and self.turned * 2 > self.told:
                turned = True
                axis, shape = self._as_turned(fusion, whole, axis)
            words = [self._size(width, one) for width in widths]
            fused = f"{len(words)} * ({words[0]},)" if len(set(words)) == 1 else f"({', '.join(words)})"
            sizes = [fused if place == axis else self._size(size, one) for place, size in enumerate(shape)]
            flags = [f"groups={self._size(fusion.groups, one, prefer='heads')}"] * (fusion.groups > 1)
            flags += ["transposed=True"] * turned
            source, target = (one, many) if fusion.split else (many, one)
            shown = f"({', '.join(sizes)}{',' * (len(sizes) < 2)})"
            text = _call("split" if fusion.split else "merge", f'"{source}"', shown, f'to="{target}"', *flags)
            names = [name for lane in (whole, *lanes) for name in lane.names]
            yield Line(text, remark, not fusion.doubts, frozenset(names), self._layers(owner),
                       self._paddle_place(names) if self.as_paddle else owner.place)

    def _as_turned(self, fusion: Fusion, whole: Lane, axis: int) -> tuple[int, Shape]:
        """Axis and shape, in torch's layout, of a fused tensor of square parts that is taken to be transposed."""
        return (axis, whole.shape) if fusion.split else (1 - axis, whole.shape[::-1])

    def _owner(self, fusion: Fusion) -> Module:
        """A module that stands where the fused one does, for letters and places."""
        torch = fusion.whole[0] if fusion.split else fusion.parts[0][0]
        return next(module for module in modules_of(self.torch.shapes) if any(
            lane.names == torch.names for lane in module.leaves.values()))

    def _dropped(self, module: Module, lane: Lane) -> Line:
        name = self._path(module, lane.template)
        nearest = difflib.get_close_matches(lane.template, [other.template for _, other in self._paddle_lanes()], 2, 0)
        text = _call("drop", f'"{name}"', 'why="Paddle has no tensor for it"')
        return Line(text, f"check: no counterpart was found; nearest by name: {_shown(nearest)}", False,
                    frozenset(lane.names), self._layers(module), LAST * self.as_paddle + module.place)

    def _made(self, module: Module, lane: Lane) -> Line:
        filling, doubt = self._filling(lane)
        owner = self._torch_list(module)
        name = self._path(owner, lane.template)
        nearest = difflib.get_close_matches(lane.template, [other.template for _, other in self._torch_lanes()], 2, 0)
        told = f"{doubt}; nearest by name: {_shown(nearest)}"
        text = _call("buffer", f'"{name}"', *self._all(lane.shape, name), f"filling={filling}")
        return Line(text, f"check: {told}", False, frozenset(lane.names), self._layers(owner),
                    LAST * (not self.as_paddle) + module.place)

    def _paddle_place(self, names: Sequence[str]) -> int:
        return min(module.place for module, lane in self._paddle_lanes() if set(lane.names) & set(names))

    def _filling(self, lane: Lane) -> tuple[str, str]:
        """What Paddle's tensor could be made of, and why that is not certain."""
        doubt = "torch's file does not have it, Paddle's does"
        if self.paddle.read:
            array = self.paddle.read(lane.names[0])
            if array.size and (array == array.flat[0]).all():
                value = float(array.flat[0])
                return ("zeros()" if value == 0 else f"constant({value!r})"), f"{doubt}, all of it {value:g}"
            if array.ndim > 1 and np.array_equal(array, np.broadcast_to(np.tri(*array.shape[-2:]), array.shape)):
                return "causal_mask()", f"{doubt}, a lower triangle of ones"
            for name, source in self.sources.items():
                if "{" not in source and self.paddle.shapes[name] == lane.shape and np.array_equal(
                        self.paddle.read(name), array):
                    return f'copy_of("{source}")', f"{doubt}, with the values of {name}"
        if len(lane.shape) == 4 and lane.shape[:2] == (1, 1) and lane.shape[2] == lane.shape[3]:
            return "causal_mask()", f"{doubt}; of a mask's shape"
        alike = [source for name, source in self.sources.items() if "{" not in source
                 and self.paddle.shapes[name] == self.torch.shapes.get(source) == lane.shape]
        alike = alike if len(lane.shape) == 2 or len(alike) == 1 else []
        if alike:
            return f'copy_of("{alike[0]}")', f"{doubt}; of the shape of {alike[0]}"
        return ("constant(-1e9)" if "mask" in lane.template else "zeros()"), f"{doubt}; what it holds is a guess"

    def _torch_lanes(self) -> list[tuple[Module, Lane]]:
        return [(module, lane) for module in modules_of(self.torch.shapes) for lane in module.leaves.values()]

    def _paddle_lanes(self) -> list[tuple[Module, Lane]]:
        return [(module, lane) for module in modules_of(self.paddle.shapes) for lane in module.leaves.values()]

    def _torch_list(self, module: Module) -> Module:
        """``module`` with the torch list that its own is taken for."""
        back = {paddle: torch for torch, paddle in self.found.lists.items()}
        return Module(module.path, back.get(module.layers, module.layers), module.numbers, module.leaves, module.place)

    # Words

    def _layers(self, module: Module) -> tuple[str, tuple[int, ...]]:
        return (module.layers, module.numbers) if len(module.numbers) > 1 else ("", ())

    def _path(self, module: Module, template: str) -> str:
        """``template`` with the letter of the list that ``module`` is in."""
        if "{}" not in template:
            return template
        key = self._layers(module)
        letter = self.letters.setdefault(key, LETTERS[len(self.letters) % len(LETTERS)])
        return template.replace("{}", f"{{{letter}}}")

    def _size(self, size: int, name: str, prefer: str = "") -> str:
        return self.sizes.word(size, name, prefer)

    def _all(self, shape: Shape, name: str) -> list[str]:
        """A word for each axis, a number for a kernel's, and for those that are not the first where labels are."""
        kernel = 2 if len(shape) > 2 and shape[:2] != (1, 1) else len(shape)
        words = [self._size(size, name) for size in shape[:kernel]]
        return [str(size) if axis >= kernel or (axis and words[axis] == '"labels"') else words[axis]
                for axis, size in enumerate(shape)]

    # The file

    def _text(self, lines: Sequence[Line]) -> str:
        named = self.config.get("architectures")
        architecture = str(named[0]) if isinstance(named, list) and named else "Model"
        name = str(self.config.get("model_type") or "mine")
        root = root_of(self.torch.shapes)
        target_root = root_of(self.paddle.shapes)
        inside = [line for line in lines if f'"{root}' in line.text or f'"{target_root}' in line.text]
        outside = [line for line in lines if line not in inside]
        has_head = bool(root and target_root and outside)
        if not has_head:
            inside, outside, root, target_root = list(lines), [], "", ""
        task = next((task for word, task in TASKS.items() if word in architecture), "encoder")
        head = [f'Head("{_quoted(architecture)}", None, "{task}"' + (", rules(" if outside else "),")]
        if outside:
            head += [f"    {row}" for line in outside for row in _rows(line, 12)] + [")),"]
        prefixes = f'prefix="{root}"' + (f', target_prefix="{target_root}"' if target_root != root else "")
        config_of = "" if self.config else f', config_of=lambda header: {{"model_type": "{_quoted(name)}"}}'
        modules = [f'("{self._list_path(torch)}", "{self._list_path(torch, paddle)}"),'
                   for torch, paddle in self.found.lists.items() if self._list_path(torch)]
        body = [
            "FAMILY = Family(",
            f'    name="{_quoted(name)}", {prefixes}, layers={self._depths()}, sizes=sizes{config_of},',
            "    rules=rules(  # check: their order is to be that of execution",
            *(f"        {row}" for line in inside for row in _rows(line, 8)), "    ),",
            "    heads=(", *(f"        {row}" for row in head), "    ),",
            "    modules=(  # check: which modules align is to record, in the order of execution",
            *(f"        {row}" for row in modules), "    ),", ")", "",
            'if __name__ == "__main__":', "    from convert.cli import main", "    sys.exit(main(FAMILY))", ""]
        text = "\n".join(body)
        function = self.sizes.text()
        used = sorted({"Config", "Sizes"} | BUILDERS & set(re.findall(r"(\w+)\(", text + function)),
                      key=lambda word: (word.islower(), word))
        sure = f"{sum(line.sure for line in lines)} of {len(lines)} rules are sure"
        return "\n".join([
            f'"""{_quoted(name)}: a draft. {sure}; finish what says `check`."""', "", "import sys", "",
            "from convert.rules import (", *(f"    {word}," for word in used), ")", "", "", function, "", text])

    def _list_path(self, torch: str, paddle: str | None = None) -> str:
        letter = next((letter for (layers, _), letter in self.letters.items() if layers == torch), None)
        return f"{paddle or torch}.{{{letter}}}" if letter else ""

    def _depths(self) -> str:
        """The family's ``layers``."""
        told = {letter: (numbers[0], numbers[-1] + 1, self._depth_key(layers, numbers[-1] + 1))
                for (layers, numbers), letter in self.letters.items()}
        if not told:
            return "lambda config: {}"
        if len(told) == 1 and (only := next(iter(told.items())))[0] == "i" and not only[1][0] and only[1][2]:
            return f'counted("{only[1][2]}")'
        depths = {letter: (start, f'depth_of(config, "{key}")' if key else str(stop))
                  for letter, (start, stop, key) in told.items()}
        entries = [f'        "{letter}": {f"range({start}, {stop})" if start else stop},'
                   for letter, (start, stop) in depths.items()]
        return "\n".join(["lambda config: {  # check: numbers that are not of the config", *entries, "    }"])

    def _depth_key(self, layers: str, depth: int) -> str | None:
        """The config's key for a number of layers, the one that has words of the list's path first."""
        keys = [key for key in DEPTHS if self.config.get(key) == depth]
        return max(keys, key=lambda key: len(set(words_of(key)) & set(words_of(layers))), default=None)

    def _fault(self, text: str) -> str:
        from .plan import make_plan
        module = ModuleType("draft")
        exec(compile(text, "draft", "exec"), module.__dict__)
        family: Family = module.FAMILY
        float32 = BY_NAME["float32"]
        header = {name: SimpleNamespace(shape=shape, dtype=float32) for name, shape in self.torch.shapes.items()}
        config = {"model_type": family.name, **self.config}
        try:
            plan = make_plan(family, config, header)
        except BadInput as error:
            return str(error).removesuffix(" Nothing was written.")
        made = {move.target: move.shape for move in plan.moves}
        wanted = self.paddle.shapes
        wrong = [name for name in {*made, *wanted} if made.get(name) != wanted.get(name) and not (
            {made.get(name), wanted.get(name)} <= {(), (1,)})]
        told = f"{len(wrong)} Paddle tensors would be missing or of another shape: {', '.join(sorted(wrong)[:3])}."
        return told if wrong else ""


class _Sizes:
    """Words for sizes: the config's keys of that value, or a multiple of one."""

    def __init__(self, config: Config) -> None:
        self.known = {key: value for key, value in config.items() if type(value) is int and value > 1
                      and re.fullmatch(r"\w+(?<!_id)", key)}
        self.config = config
        self.used: dict[str, tuple[str, str]] = {}

    def word(self, size: int, name: str, prefer: str = "") -> str:
        """A quoted word, or the number where no key has it."""
        if size < 2:
            return str(size)
        held = {word: key for word, keys in KEYS.items() for key in keys[::-1] if self._known(key) == size
                and (word == prefer or word not in SMALL or self._signed(word, name))}
        if prefer not in held:
            prefer = next((word for word in SIGNS if word in held and self._signed(word, name)), "")
        word = prefer or next(iter(sorted(held, key=["hidden", *KEYS].index)), "")
        if word:
            rivals = " and ".join(key for one, key in held.items() if one != word)
            self.used[word] = (self._value(held[word]), f"{size} is {rivals} too" if rivals else "")
            return f'"{word}"'
        if {"score", "classifier"} & set(words_of(name)) and _labels(self.config) == size:
            self.used["labels"] = ("labels_of(config)", "")
            return '"labels"'
        return self._derived(size, name)

    def _signed(self, word: str, name: str) -> bool:
        """Whether ``name`` says that its sizes are those of ``word``."""
        words = set(words_of(name))
        return bool(SIGNS.get(word, set()) & words) and not (word == "vocab" and "layer" in words)

    def _known(self, key: str) -> int | None:
        """The value of a key, or of the product of two."""
        values = [self.known.get(one) for one in key.split(" * ")]
        return None if None in values else prod(values)

    def _value(self, key: str) -> str:
        return " * ".join(f'size_of(config, "{one}")' for one in key.split(" * "))

    def _derived(self, size: int, name: str) -> str:
        for times in (4, 3, 2, 8):
            for key in KEYS["hidden"]:
                if self.known.get(key, 0) * times == size:
                    word = MULTIPLES.get(times, f"hidden x {times}")
                    self.used[word] = (f'{times} * size_of(config, "{key}")', f"{size} is {times} times {key}")
                    return f'"{word}"'
        for more in (1, 2):
            keys = [(sign, key) for sign in ("positions", "vocab") if self._signed(sign, name) for key in KEYS[sign]]
            for sign, key in keys:
                if key in self.known and self.known[key] + more == size:
                    word = f"{sign} and {more}"
                    self.used[word] = (f'size_of(config, "{key}") + {more}', f"{size} is {key} + {more}")
                    return f'"{word}"'
        key = next((key for key in sorted(self.known) if self.known[key] == size
                    and set(words_of(key)) & set(words_of(name))), None)
        if key:
            self.used[key] = (f'size_of(config, "{key}")', f"{size} is the value of {key}")
            return f'"{key}"'
        return str(size)

    def text(self) -> str:
        """The function ``sizes``."""
        rows = [row for word, (value, doubt) in self.used.items() for row in (
            *([f"        # check: {doubt}"] if doubt else []), f'        "{word}": {value},')]
        return "\n".join(["def sizes(config: Config) -> Sizes:", "    return {", *rows, "    }", ""])


def _labels(config: Config) -> int | None:
    try:
        return labels_of(config)
    except BadInput:
        return None


def _shown(templates: Sequence[str]) -> str:
    return " and ".join(template.replace("{}", "*") for template in templates) or "none"


def _is_linear(one: Match) -> bool:
    return not EMBEDDING & set(words_of(one.torch.path)) and "bias" in one.torch.leaves


def _alternatives(lanes: Sequence[Lane]) -> str:
    """The names of several tensors as one: ``a.{q,k,v}.b``."""
    templates = [lane.template for lane in lanes]
    start = _beginning(templates)
    end = _beginning([template[len(start):][::-1] for template in templates])[::-1]
    return f"{start}{{{','.join(template[len(start): len(template) - len(end)] for template in templates)}}}{end}"


def _beginning(texts: Sequence[str]) -> str:
    """What all begin with."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def _quoted(text: str) -> str:
    """As it may stand between double quotes."""
    return "".join(letter for letter in text if letter.isprintable() and letter not in '"\\{}')


def _call(builder: str, *arguments: str) -> str:
    return f"{builder}({', '.join(arguments)}),"


def _rows(line: Line, indent: int) -> Iterator[str]:
    """The rule and what is said of it; in one line where that fits."""
    rows = [line.text]
    if indent + len(line.text) > WIDTH:
        opening, _, rest = line.text.partition("(")
        rows, row = [], f"{opening}("
        for part in _parts(rest):
            if len(row) + len(part) + indent > WIDTH and row.strip():
                rows.append(row.rstrip())
                row = " " * (len(opening) + 1)
            row += part
        rows.append(row)
    if line.sure and len(rows) == 1 and indent + len(rows[0]) + len(line.remark) + 4 <= WIDTH:
        yield f"{rows[0]}  # {line.remark}"
        return
    yield from _comment(line.remark, indent)
    yield from rows


def _comment(text: str, indent: int) -> Iterator[str]:
    row = "#"
    for word in text.split():
        if indent + len(row) + 1 + len(word) > WIDTH and row != "#":
            yield row
            row = "#  "
        row += f" {word}"
    yield row


def _parts(arguments: str) -> Iterator[str]:
    """Arguments that fit on a line of their own."""
    depth, start, quoted = 0, 0, False
    for place, letter in enumerate(arguments):
        quoted ^= letter == '"'
        depth += (letter in "([{") - (letter in ")]}") if not quoted else 0
        if letter == "," and depth == 0 and not quoted:
            yield arguments[start: place + 1] + (" " if place + 2 < len(arguments) else "")
            start = place + 2
    yield arguments[start:]
