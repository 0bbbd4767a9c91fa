"""Made-up families of every rule kind, there and back, against formulas and what torch and safetensors write."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import paddle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as as_safetensors
from test_convert_engine import CONSTANTS, with_constants

from convert.back import TO_TORCH
from convert.checkpoint import open_checkpoint
from convert.cli import Task, convert, parser_of
from convert.direction import TO_PADDLE
from convert.errors import BadInput
from convert.rules import (
    Family,
    Filling,
    Head,
    buffer,
    constant,
    conv1d,
    copy_of,
    drop,
    keep,
    linear,
    merge,
    norm,
    split,
    tied,
)

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ["linear", "conv1d", "keep", "norm", "split", "merge", "tied", "buffer", "checked buffer", "drop", "returning"]
DIMENSION = st.integers(1, 9)
LAYERS = 3
HEADS = {"heads1": 1, "heads2": 2, "heads3": 3}


@dataclass
class Made:
    """A family under way: its rules, a source for them, and what must come of it in both directions."""

    rules: list = field(default_factory=list)
    source: dict = field(default_factory=dict)
    target: dict = field(default_factory=dict)
    back: dict = field(default_factory=dict)


def fused_formula(parts, groups, axis):
    """Group after group, in each the parts' shares one behind the other: by index, not by cutting and joining."""
    widths = [part.shape[axis] // groups for part in parts]
    period = sum(widths)
    shape = list(parts[0].shape)
    shape[axis] = period * groups
    whole = torch.empty(shape, dtype=parts[0].dtype)
    for position in range(shape[axis]):
        group, inside = divmod(position, period)
        part = next(number for number in range(len(widths)) if inside < sum(widths[: number + 1]))
        index = group * widths[part] + inside - sum(widths[:part])
        whole.select(axis, position).copy_(parts[part].select(axis, index))
    return whole


@st.composite
def families_of_rules(draw):
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    made, generator = Made(), torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    for number, kind in enumerate(kinds):
        layered = draw(st.booleans())
        template = f"m{number}.h.{{i}}.x" if layered else f"m{number}.x"
        paddles = f"p{number}.{{i}}.y" if layered else f"p{number}.y"
        places = [(template.replace("{i}", str(layer)), paddles.replace("{i}", str(layer)))
                  for layer in range(LAYERS if layered else 1)]
        add(made, kind, draw, template, paddles, places, random)
    return made, dtype


def add(made, kind, draw, template, paddles, places, random):
    rows, columns = draw(DIMENSION), draw(DIMENSION)
    if kind in ("linear", "conv1d"):
        bias = draw(st.booleans())
        made.rules += (linear if kind == "linear" else conv1d)(template, rows, columns, to=paddles, bias=bias)
        for name, paddle_name in places:
            weight = random(rows, columns)
            keep_both(made, f"{name}.weight", f"{paddle_name}.weight", weight, weight.T if kind == "linear" else weight)
            if bias:
                some = random(rows if kind == "linear" else columns)
                keep_both(made, f"{name}.bias", f"{paddle_name}.bias", some, some)
    elif kind == "keep":
        shape = draw(st.lists(DIMENSION, max_size=4))
        made.rules += keep(f"{template}.weight", *shape, to=f"{paddles}.w")
        for name, paddle_name in places:
            some = random(*shape)
            keep_both(made, f"{name}.weight", f"{paddle_name}.w", some, some)
    elif kind == "norm":
        old = draw(st.booleans())
        made.rules += norm(template, rows, to=paddles)
        for name, paddle_name in places:
            for word, legacy in (("weight", "gamma"), ("bias", "beta")):
                some = random(rows)
                made.source[f"{name}.{legacy if old else word}"] = made.back[f"{name}.{word}"] = some
                made.target[f"{paddle_name}.{word}"] = some
    elif kind in ("split", "merge"):
        add_fused(made, kind, draw, template, paddles, places, random)
    elif kind == "tied":
        made.rules += [*keep(f"{template}.weight", rows, columns, to=f"{paddles}.w"),
                       *tied(f"{template}.copy", rows, columns, of=f"{template}.weight", again=f"{paddles}.again")]
        for name, paddle_name in places:
            some = random(rows, columns)
            keep_both(made, f"{name}.weight", f"{paddle_name}.w", some, some)
            if draw(st.booleans()):
                made.source[f"{name}.copy"] = some.clone()
    elif kind == "buffer":
        made.rules += [*keep(f"{template}.weight", rows, columns, to=f"{paddles}.w"),
                       *buffer(f"{template}.twin", rows, columns, filling=copy_of(f"{template}.weight"),
                               to=f"{paddles}.twin"),
                       *buffer(f"{template}.made", rows, filling=constant(2.5), to=f"{paddles}.made")]
        for name, paddle_name in places:
            some = random(rows, columns)
            keep_both(made, f"{name}.weight", f"{paddle_name}.w", some, some)
            made.target[f"{paddle_name}.twin"] = some
            made.target[f"{paddle_name}.made"] = torch.full((rows,), 2.5)
    elif kind == "checked buffer":
        made.rules += buffer(f"{template}.ones", rows, filling=constant(1.0, checked=True), to=f"{paddles}.ones")
        for name, paddle_name in places:
            made.target[f"{paddle_name}.ones"] = torch.ones(rows)
            if draw(st.booleans()):
                made.source[f"{name}.ones"] = torch.ones(rows)
    elif kind == "drop":
        made.rules += drop(f"{template}.gone", why="a test")
        for name, _ in places:
            made.source[f"{name}.gone"] = random(rows)
    else:
        made.rules += drop(f"{template}.count", why="a test", returns="int64")
        for name, _ in places:
            made.source[f"{name}.count"] = made.back[f"{name}.count"] = torch.tensor(draw(st.integers(0, 2**60)))


def add_fused(made, kind, draw, template, paddles, places, random):
    heads = draw(st.sampled_from([1, 2, 3, "heads2", "heads3"]))
    groups = HEADS.get(heads, heads)
    shares = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    widths = tuple(share * groups for share in shares)
    two = draw(st.booleans())
    axis = draw(st.integers(0, 1)) if two else 0
    across = two and draw(st.booleans())
    other = draw(DIMENSION)
    shape = ((widths, other) if axis == 0 else (other, widths)) if two else (widths,)
    letters = "{" + ",".join("qkvz"[: len(widths)]) + "}"
    if kind == "split":
        made.rules += split(f"{template}.c", shape, f"{paddles}.{letters}", groups=heads, transposed=across)
    else:
        made.rules += merge(f"{template}.{letters}", shape, f"{paddles}.c", groups=heads, transposed=across)
    for name, paddle_name in places:
        parts = [random(*((width, other) if axis == 0 else (other, width))) if two else random(width)
                 for width in widths]
        whole = fused_formula(parts, groups, axis)
        separate = {f".{letter}": part for letter, part in zip("qkvz", parts, strict=False)}
        ours, theirs = ({".c": whole}, separate) if kind == "split" else (separate, {".c": whole})
        for end, some in ours.items():
            made.source[name + end] = made.back[name + end] = some
        for end, some in theirs.items():
            made.target[paddle_name + end] = some.T if across else some


def keep_both(made, name, paddle_name, source, target):
    made.source[name] = made.back[name] = source
    made.target[paddle_name] = target


def strided(tensor, way):
    """The same values, laid into their storage otherwise."""
    if way == "plain" or tensor.ndim == 0:
        return tensor.clone()
    if way == "turned":
        return tensor.T.contiguous().T if tensor.ndim == 2 else tensor.clone()
    spaced = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2 + 3, dtype=tensor.dtype)
    view = spaced[..., 2: 2 + 2 * tensor.shape[-1]: 2]
    view.copy_(tensor)
    return view


def write(directory, state, form, way):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "made", "architectures": ["Made"]}))
    if form == "bin":
        torch.save({name: strided(tensor, way) for name, tensor in state.items()}, directory / "pytorch_model.bin")
    elif form == "shards":
        names = sorted(state)
        files = {name: f"model-{number % 3 + 1:05d}-of-00003.safetensors" for number, name in enumerate(names)}
        for file in set(files.values()):
            (directory / file).write_bytes(as_safetensors({name: state[name].contiguous() for name in names
                                                           if files[name] == file}, {"format": "pt"}))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        (directory / "model.safetensors").write_bytes(
            as_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"}))


def family_of(rules):
    return Family(name="made", prefix="", layers=lambda config: {"i": LAYERS}, sizes=lambda config: HEADS,
                  rules=tuple(rules), heads=(Head("Made", None, "encoder"),))


def carried(direction, family, source, output, *flags):
    options = parser_of("made", "made").parse_args(["--reports", str(output.parent / "reports"), *flags])
    convert(direction, Task(family, str(source), source, None, output, 10**9, options))


def held(path):
    """Every tensor of a result as torch has it."""
    with open_checkpoint(path) as checkpoint:
        return {name: torch.from_numpy(checkpoint.read(name).copy()).view(
            torch.bfloat16 if info.dtype.name == "bfloat16" else torch.from_numpy(checkpoint.read(name)).dtype)
            for name, info in checkpoint.tensors.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        bits = [(some.dtype, some.contiguous().reshape(-1).view(torch.uint8).tolist())
                for some in (found[name], tensor)]
        assert bits[0] == bits[1], name
        assert found[name].shape == tensor.shape or {found[name].shape, tensor.shape} == {(), (1,)}, name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(family=families_of_rules(), form=st.sampled_from(["safetensors", "shards", "bin"]),
       way=st.sampled_from(["plain", "turned", "spaced"]), target=st.sampled_from(["safetensors", "pdparams"]),
       constants=CONSTANTS)
def test_every_rule_kind_goes_there_by_the_formula_and_back_to_the_byte(family, form, way, target, constants):
    made, _ = family
    assume(made.back and made.target)
    with with_constants(constants), TemporaryDirectory() as name:
        directory = Path(name)
        write(directory / "source", made.source, form, way)
        carried(TO_PADDLE, family_of(made.rules), directory / "source", directory / "there", "--format", target)
        same(held(directory / "there"), made.target)
        carried(TO_TORCH, family_of(made.rules), directory / "there", directory / "back")
        assert (directory / "back/model.safetensors").read_bytes() == as_safetensors(
            {name: tensor.contiguous() for name, tensor in made.back.items()}, {"format": "pt"})
        assert json.loads((directory / "back/config.json").read_text()) == json.loads(
            (directory / "source/config.json").read_text())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(family=families_of_rules(), wanted=st.sampled_from(["float32", "float16", "bfloat16"]), constants=CONSTANTS)
def test_casts_of_fused_tensors_are_torchs(family, wanted, constants):
    """Every float is rounded as torch rounds it; what is made for Paddle alone stays float32."""
    made, _ = family
    assume(made.back and made.target)
    own = {name for name in made.target if name.endswith((".made", ".ones"))}
    expected = {name: tensor if name in own else tensor.to(DTYPES[wanted]) for name, tensor in made.target.items()}
    if not all(torch.isfinite(tensor).all() for tensor in expected.values()):
        return
    with with_constants(constants), TemporaryDirectory() as name:
        directory = Path(name)
        write(directory / "source", made.source, "safetensors", "plain")
        carried(TO_PADDLE, family_of(made.rules), directory / "source", directory / "there", "--dtype", wanted)
        same(held(directory / "there"), expected)


@pytest.mark.parametrize("way", ["plain", "turned", "spaced"])
def test_a_large_fused_tensor_in_many_tiles(way, tmp_path):
    """Real constants, a width that no tile divides, interleaved by heads, float64 to bfloat16, into .pdparams."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(12 * width, 701, generator=generator, dtype=torch.float64) for width in (64, 32, 32)]
    whole = fused_formula(parts, 12, 0)
    rules = split("qkv.weight", ((12 * 64, 12 * 32, 12 * 32), 701), "{q,k,v}.weight", groups=12, transposed=True)
    write(tmp_path / "source", {"qkv.weight": whole}, "bin", way)
    carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there", "--format", "pdparams",
            "--dtype", "bfloat16")
    loaded = paddle.load(str(tmp_path / "there/model_state.pdparams"), return_numpy=True)
    for letter, part in zip("qkv", parts, strict=True):
        assert np.array_equal(loaded[f"{letter}.weight"],
                              part.T.contiguous().to(torch.bfloat16).view(torch.uint16).numpy())
    carried(TO_TORCH, family_of(rules), tmp_path / "there", tmp_path / "back")
    same(held(tmp_path / "back"), {"qkv.weight": whole.to(torch.bfloat16)})


def test_parts_of_different_dtypes_are_refused(tmp_path):
    rules = merge("{q,k}.weight", ((3, 4), 5), "qk.weight")
    write(tmp_path / "source", {"q.weight": torch.zeros(3, 5), "k.weight": torch.zeros(4, 5).half()}, "safetensors", "")
    with pytest.raises(BadInput, match=r"q.weight and k.weight have different dtypes, and are one tensor in Paddle"):
        carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")


def test_groups_that_do_not_divide_the_parts_are_refused(tmp_path):
    rules = split("qk.weight", ((3, 4), 5), "{q,k}.weight", groups=2)
    write(tmp_path / "source", {"qk.weight": torch.zeros(7, 5)}, "safetensors", "")
    with pytest.raises(BadInput, match="2 do not divide the parts"):
        carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")


def test_half_of_what_is_fused_is_not_enough(tmp_path):
    rules = split("qk.weight", ((4, 4), 5), "{q,k}.weight")
    write(tmp_path / "source", {"qk.weight": torch.arange(40.0).reshape(8, 5)}, "safetensors", "")
    carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")
    state = held(tmp_path / "there")
    half = as_safetensors({"q.weight": state["q.weight"]}, {"format": "np"})
    (tmp_path / "there/model.safetensors").write_bytes(half)
    with pytest.raises(BadInput, match=r"1 target tensor that no source tensor fills: qk.weight"):
        carried(TO_TORCH, family_of(rules), tmp_path / "there", tmp_path / "back")


def test_what_paddle_makes_by_itself_is_checked_there_and_made_again_back(tmp_path):
    """As ChatGLM's frequencies: dropped, held against a formula, saved by torch's class in a dtype of their own."""
    halves = Filling("halves", lambda shape, rows: 0.5 ** np.arange(shape[-1], dtype=np.float32)[None].repeat(
        len(rows), 0), checked=True)
    rules = [*drop("rotary.freq", 5, why="a test", holding=halves, returns="float16"), *keep("x.weight", 3)]
    powers = torch.tensor([math.pow(0.5, number) for number in range(5)]).half()
    state = {"rotary.freq": powers, "x.weight": torch.ones(3)}
    write(tmp_path / "source", state, "safetensors", "")
    carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")
    assert held(tmp_path / "there").keys() == {"x.weight"}
    carried(TO_TORCH, family_of(rules), tmp_path / "there", tmp_path / "back")
    same(held(tmp_path / "back"), state)
    write(tmp_path / "wrong", {**state, "rotary.freq": torch.ones(5).half()}, "safetensors", "")
    with pytest.raises(BadInput, match=r"rotary.freq in the source is not the halves"):
        carried(TO_PADDLE, family_of(rules), tmp_path / "wrong", tmp_path / "never")
    assert not (tmp_path / "never").exists()


TWICE = {
    "one source, two targets": (
        [*norm("ln_1", 3, to="norm1"), *norm("ln_1", 3, to="norm2"), *drop("ln_2.{weight,bias}", why="a test")],
        r"ln_1.weight is moved 2 times, and once is right: ln_1.weight -> norm1.weight; ln_1.weight -> norm2.weight."),
    "two sources, one target": (
        [*keep("ln_{1,2}.weight", 3, to="norm{1,1}.weight"), *drop("ln_{1,2}.bias", why="a test")],
        r"norm1.weight is filled 2 times, and once is right: ln_1.weight -> norm1.weight; ln_2.weight -> norm1.weight"),
    "moved and made": (
        [*norm("ln_{1,2}", 3, to="norm{1,2}"), *buffer("ones", 3, filling=constant(1.0), to="norm2.bias")],
        r"norm2.bias is filled 2 times, and once is right: ln_2.bias -> norm2.bias; ones -> norm2.bias."),
    "moved and dropped": (
        [*norm("ln_{1,2}", 3, to="norm{1,2}"), *drop("ln_1.bias", why="a test")],
        r"ln_1.bias is moved by one rule \(ln_1.bias -> norm1.bias\) and dropped by another \(a test\): keep the one"),
    "moved, and dropped if it holds ones": (
        [*drop("ln_2.bias", 3, why="a test", holding=constant(1.0, checked=True)), *norm("ln_{1,2}", 3)],
        r"ln_2.bias is moved by one rule \(ln_2.bias -> ln_2.bias\) and dropped by another \(a test\)"),
    "dropped twice": (
        [*norm("ln_1", 3), *drop("ln_2.{weight,bias}", why="a test"), *drop("ln_2.bias", why="another")],
        r"ln_2.bias is dropped 2 times, and once is right: ln_2.bias -> dropped, a test; ln_2.bias -> dropped, anoth"),
}


@pytest.mark.parametrize("case", TWICE)
def test_every_source_is_moved_once_and_every_target_filled_once(case, tmp_path):
    rules, says = TWICE[case]
    state = {f"ln_{number}.{word}": torch.full((3,), float(number)) for number in (1, 2) for word in ("weight", "bias")}
    write(tmp_path / "source", state, "safetensors", "")
    with pytest.raises(BadInput, match=says):
        carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_copy_of_what_is_moved_is_no_second_move(tmp_path):
    """As are the parts that one rule splits a fused tensor into, which are each filled once."""
    rules = [*split("c", ((2, 2), 3), "{q,k}"), *buffer("d", (2, 2), 3, filling=copy_of("c"), to="twin")]
    write(tmp_path / "source", {"c": torch.ones(4, 3)}, "safetensors", "")
    carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")
    assert held(tmp_path / "there").keys() == {"q", "k", "twin"}


def test_what_is_dropped_may_be_told_by_a_filling_that_nobody_checks(tmp_path):
    rules = [*drop("gone", 3, why="a test", holding=constant(0.0)), *keep("x", 3)]
    write(tmp_path / "source", {"gone": torch.ones(3), "x": torch.ones(3)}, "safetensors", "")
    carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")
    assert held(tmp_path / "there").keys() == {"x"}
    report = json.loads((tmp_path / "reports/there/convert.json").read_text())
    assert "a test" in json.dumps(report)


@pytest.mark.parametrize("number", [10**30, -(2**63) - 1])
def test_a_count_that_no_int64_holds_is_refused(number, tmp_path):
    rules = [*drop("count", why="a test", returns="int64"), *keep("x", 3)]
    write(tmp_path / "source", {"count": torch.tensor(2**63 - 1), "x": torch.ones(3)}, "safetensors", "")
    carried(TO_PADDLE, family_of(rules), tmp_path / "source", tmp_path / "there")
    marker = json.loads((tmp_path / "there/paddle_parity.json").read_text())
    marker["numbers"]["count"] = number
    (tmp_path / "there/paddle_parity.json").write_text(json.dumps(marker))
    with pytest.raises(BadInput, match=rf"numbers has {number}, which is no int64"):
        carried(TO_TORCH, family_of(rules), tmp_path / "there", tmp_path / "back")
    assert not (tmp_path / "back").exists()
