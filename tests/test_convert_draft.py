"""Drafts of known families against their real rule files: what share is right, and that nothing sure is wrong."""

import importlib.util
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import torch
from conftest import call, files_under
from safetensors.numpy import load_file, save_file

from convert.__main__ import families, family_named, load_family
from convert.__main__ import main as convert_any
from convert.checkpoint import open_checkpoint, read_config
from convert.cli import main as convert_main
from convert.demo import build_demo
from convert.draft import main as draft_main
from convert.drafting import draft
from convert.dtypes import to_float32
from convert.matching import Side
from convert.plan import make_plan

FAMILIES = families()
PROJECT = Path(__file__).resolve().parents[1]
RIGHT_BY_SHAPES = {"bert": 0.96, "bloom": 1, "chatglm": 1, "gpt2": 1, "gptj": 1, "opt": 0.77, "resnet": 1, "t5": 1}
"""The share of tensors that a draft without values must get right. OPT's norms cannot be told by their names."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """``pair(name)``: the demo checkpoint of a family and its conversion, made once."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            source = build_demo(family_named(name), directory / "torch")
            out, reports = directory / "paddle", directory / "reports"
            code, _, said = call(convert_main, family_named(name), [
                "--source", str(source), "--output", str(out), "--reports", str(reports)])
            assert code == 0, said
            made[name] = source, out
        return made[name]
    return make


def header(path):
    with open_checkpoint(path) as checkpoint:
        return {name: list(info.shape) for name, info in checkpoint.tensors.items()}


def drafted(torch_side, paddle_side, output, *flags):
    code, _, said = call(draft_main, ["--torch", str(torch_side), "--paddle", str(paddle_side), "--output",
                                      str(output), *flags])
    assert code == 0, said
    return load_family(output), said


def meant(move):
    """What a move does, whichever of several equal ways it is said in."""
    return move.sources, move.transposed, move.filling and move.filling.name, move.gather


def compared(name, source, family):
    """(share of Paddle's tensors that come about as the real family has it, those wrong though they are sure)."""
    config = read_config(source)
    with open_checkpoint(source) as checkpoint:
        real = {move.target: move for move in make_plan(family_named(name), config, checkpoint.tensors).moves}
        ours = {move.target: move for move in make_plan(family, config, checkpoint.tensors).moves}
    right = {target for target, move in real.items() if target in ours and meant(ours[target]) == meant(move)}
    return len(right) / len(real), real.keys() - right


def sides(source, out, with_values):
    made = []
    for path in (source, out):
        checkpoint = open_checkpoint(path)
        tensors = checkpoint.tensors
        made.append(Side({key: tuple(info.shape) for key, info in tensors.items()},
                         (lambda key, held=checkpoint: to_float32(held.read(key), held.tensors[key].dtype.name))
                         if with_values else None))
    return made


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("with_values", [True, False], ids=["values", "shapes"])
def test_a_known_family_is_drafted(name, with_values, pair, tmp_path):
    source, out = pair(name)
    if not with_values:
        (tmp_path / "paddle.json").write_text(json.dumps(header(out)))
        out_given = tmp_path / "paddle.json"
    else:
        out_given = out
    family, said = drafted(source, out_given, tmp_path / "mine.py")
    assert "no tensor of either checkpoint is without a rule" in said
    share, wrong = compared(name, source, family)
    assert share >= (0.96 if with_values else RIGHT_BY_SHAPES.get(name, 0.75))
    made = draft(*sides(source, out, with_values), read_config(source))
    sure = {one for line in made.lines if line.sure for one in line.names}
    assert not sure & wrong
    assert len(sure) >= 0.5 * len(made.lines)
    if with_values:
        untold = [one for line in made.lines if not line.sure for one in line.names]
        assert len(untold) <= 9 and "square" not in made.text


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_sure_is_wrong_in_any_head_and_variant(name, tmp_path):
    """By shapes alone, from the real plan of each head's demo checkpoint; the draft's own plan is total each time."""
    family = family_named(name)
    cases = [{"architectures": [head.architecture]} for head in family.heads] + list(family.variants.values())
    for number, changes in enumerate(cases):
        source = build_demo(family, tmp_path / str(number), changes)
        config = read_config(source)
        with open_checkpoint(source) as checkpoint:
            held = {one: tuple(info.shape) for one, info in checkpoint.tensors.items()}
            real = {move.target: move for move in make_plan(family, config, checkpoint.tensors).moves}
            made = draft(Side(held), Side({target: move.shape for target, move in real.items()}), config)
            assert not made.fault, (changes, made.fault)
            (tmp_path / "mine.py").write_text(made.text)
            ours = {move.target: move for move in make_plan(
                load_family(tmp_path / "mine.py"), config, checkpoint.tensors).moves}
        sure = {one for line in made.lines if line.sure for one in line.names}
        wrong = {target for target, move in real.items() if meant(ours[target]) != meant(move)}
        assert not sure & wrong, (changes, sure & wrong)
        square = {one for one in (*held, *real) if len(shape := held.get(one) or real[one].shape) == 2
                  and shape[0] == shape[1]}
        assert not sure & square


@pytest.mark.parametrize("name", FAMILIES)
def test_the_draft_runs_and_is_in_the_projects_style(name, pair, tmp_path, workdir):
    source, out = pair(name)
    drafted(source, out, tmp_path / "mine.py")
    code, told, said = call(convert_any, ["--family", str(tmp_path / "mine.py"), "--source", str(source), "--dry-run"])
    assert code == 0, said
    assert "Nothing was written (--dry-run)" in told
    lint = [sys.executable, "-m", "ruff", "check", "--no-cache", "--line-length", "120", "--select", "E,F,W,I"]
    linted = subprocess.run([*lint, str(tmp_path / "mine.py")], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout
    assert not files_under(workdir)


@pytest.mark.parametrize("name", ["gptj", "bert", "gpt2"])
def test_a_draft_by_values_converts_to_the_same_bytes(name, pair, tmp_path, workdir):
    source, out = pair(name)
    drafted(source, out, tmp_path / "mine.py")
    code, _, said = call(convert_any, ["--family", str(tmp_path / "mine.py"), "--source", str(source)])
    assert code == 0, said
    ours, theirs = load_file(workdir / "out/torch/model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key].reshape(-1), theirs[key].reshape(-1)) for key in ours)


# --- what is sure, and what never is


def text_of(torch_shapes, paddle_shapes, **config):
    made = draft(Side(torch_shapes), Side(paddle_shapes), {"model_type": "mine", **config})
    assert not made.fault
    return made


def test_a_square_weight_is_never_sure_by_its_shape():
    made = text_of({"a.weight": (8, 8), "b.weight": (8, 9)}, {"a.weight": (8, 8), "b.weight": (9, 8)})
    square, oblong = sorted(made.lines, key=lambda line: "b.weight" in line.names)
    assert not square.sure and "square: shapes cannot tell whether it is transposed" in square.remark
    assert oblong.sure and oblong.text.startswith('linear("b", 8, 9')


@pytest.mark.parametrize("across", [False, True])
def test_equal_values_make_a_square_weight_sure(across):
    weight = np.random.default_rng(5).standard_normal((8, 8)).astype(np.float32)
    held = weight.T if across else weight
    made = draft(Side({"a.weight": (8, 8)}, lambda name: weight), Side({"x.weight": (8, 8)}, lambda name: held),
                 {"model_type": "mine"})
    (line,) = made.lines
    assert line.sure and line.remark == "sure: the same values"
    assert line.text.startswith("linear" if across else "keep")


def test_values_that_are_everywhere_the_same_prove_nothing():
    zeros = np.zeros((8, 8), np.float32)
    shapes = {"a.weight": (8, 8), "b.weight": (8, 8)}
    made = draft(Side(shapes, lambda name: zeros), Side(shapes, lambda name: zeros), {"model_type": "mine"})
    assert not any(line.sure for line in made.lines)
    symmetric = np.add.outer(np.arange(8), np.arange(8)).astype(np.float32)
    made = draft(Side({"a.weight": (8, 8)}, lambda name: symmetric), Side({"a.weight": (8, 8)}, lambda name: symmetric),
                 {"model_type": "mine"})
    assert not made.lines[0].sure


def test_a_name_is_not_believed_against_the_values():
    """Query and key have changed names on Paddle's side: where values can tell, they do."""
    rng = np.random.default_rng(6)
    held = {name: rng.standard_normal((8, 6)).astype(np.float32) for name in ("q.weight", "k.weight", "v.weight")}
    theirs = {"q.weight": held["k.weight"].T, "k.weight": held["q.weight"].T, "v.weight": held["v.weight"].T}
    made = draft(Side({name: (8, 6) for name in held}, held.__getitem__),
                 Side({name: (6, 8) for name in theirs}, theirs.__getitem__), {"model_type": "mine"})
    assert all(line.sure for line in made.lines)
    assert {frozenset(line.names) for line in made.lines} == {frozenset({"q.weight", "k.weight"}),
                                                              frozenset({"v.weight"})}
    assert 'linear("q", 8, 6, to="k", bias=False)' in made.text
    theirs["v.weight"] = rng.standard_normal((6, 8)).astype(np.float32)
    made = draft(Side({name: (8, 6) for name in held}, held.__getitem__),
                 Side({name: (6, 8) for name in theirs}, theirs.__getitem__), {"model_type": "mine"})
    assert [line.sure for line in made.lines if "v.weight" in line.names] == [False]
    assert "the values differ, where others are the same" in made.text


@pytest.mark.parametrize("groups,unequal,across", [
    (1, False, False), (2, False, True), (4, False, False), (2, True, True)])
@pytest.mark.parametrize("torchs_whole", [True, False], ids=["split", "merge"])
def test_fused_tensors_are_found_and_proved_by_values(groups, unequal, across, torchs_whole):
    rng = np.random.default_rng(7)
    widths = (8, 4, 4) if unequal else (8, 8, 8)
    parts = [rng.standard_normal((width, 5)).astype(np.float32) for width in widths]
    whole = np.concatenate([part.reshape(groups, -1, 5)[group] for group in range(groups) for part in parts])
    separate = {f"attn.{letter}_proj.weight": part for letter, part in zip("qkv", parts, strict=True)}
    fused = {"attn.qkv.weight": whole}
    ours, theirs = (fused, separate) if torchs_whole else (separate, fused)
    theirs = {name: array.T if across else array for name, array in theirs.items()}
    shapes = [{name: array.shape for name, array in side.items()} for side in (ours, theirs)]
    told = draft(Side(shapes[0], ours.__getitem__), Side(shapes[1], theirs.__getitem__), {"model_type": "mine"})
    assert not told.fault
    (line,) = told.lines
    assert line.sure and line.text.startswith("split" if torchs_whole else "merge")
    assert ("transposed=True" in line.text) == across and (f"groups={groups}" in line.text) == (groups > 1)
    guess = draft(Side(shapes[0]), Side(shapes[1]), {"model_type": "mine"})
    assert not guess.fault and not guess.lines[0].sure and "head by head" in guess.lines[0].remark


def test_what_has_no_counterpart_is_listed_with_the_nearest():
    made = text_of({"a.weight": (4, 5), "rotary.inv_freq": (3,)},
                   {"a.weight": (5, 4), "attn.bias": (1, 1, 7, 7), "rotary.masked_freq": (2,)})
    assert (made.torch_left, made.paddle_left) == (1, 2)
    assert 'drop("rotary.inv_freq"' in made.text
    assert "nearest by name: rotary.masked_freq" in " ".join(line.remark for line in made.lines)
    assert "filling=causal_mask()" in made.text and "filling=constant(-1e9)" in made.text
    assert not any(line.sure for line in made.lines if "a.weight" not in line.names)


def test_config_keys_become_sizes_and_their_doubles_are_told():
    tables = {"wte.weight": (50, 12), "wpe.weight": (12, 12)}
    made = text_of({**tables, "h.0.fc.weight": (48, 12), "h.1.fc.weight": (48, 12)},
                   {**tables, "h.0.fc.weight": (12, 48), "h.1.fc.weight": (12, 48)},
                   vocab_size=50, n_embd=12, n_positions=12, n_layer=2)
    assert 'keep("wpe.weight", "positions", ' in made.text
    assert "# check: 12 is n_embd too" in made.text or "# check: 12 is n_positions too" in made.text
    assert "# check: 48 is 4 times n_embd" in made.text
    assert 'layers=counted("n_layer")' in made.text and 'linear("h.{i}.fc", "inner", ' in made.text


def test_shared_values_are_told_as_shared_and_the_name_decides_among_them():
    """A tied table and its copy; one norm and another that nobody trained; and a tensor that does differ."""
    rng = np.random.default_rng(9)
    table, third, *others = (rng.standard_normal((9, 5)).astype(np.float32) for _ in range(7))
    norms = {"n2.weight": np.ones(7, np.float32)}
    torchs = {"wte.weight": table, "c.weight": third, "n1.weight": np.ones(7, np.float32), **norms,
              **{f"{letter}.weight": other for letter, other in zip("dbefg", others, strict=True)}}
    paddles = {"wte.weight": table, "lm_head.weight": table, "c.weight": -third, "first.weight": np.ones(7, np.float32),
               **norms, **{f"{letter}.weight": other for letter, other in zip("xyzuv", others, strict=True)}}
    made = draft(*(Side({name: array.shape for name, array in side.items()}, side.__getitem__)
                   for side in (torchs, paddles)), {"model_type": "mine"})
    remarks = {name: line.remark for line in made.lines for name in line.names}
    assert remarks["wte.weight"] == "sure: the same name, and the same values, which lm_head has too"
    assert remarks["b.weight"] == "sure: the same values"
    assert remarks["n2.weight"] == "sure: the same name, and the same values, which first and n1 have too"
    assert remarks["n1.weight"].startswith("check: ") and "the same values, which n2 has too" in remarks["n1.weight"]
    assert remarks["c.weight"] == "check: the values differ, where others are the same"


def test_a_weight_proves_its_module_whose_bias_is_zero_as_others_are():
    rng = np.random.default_rng(10)
    torchs = {f"{name}.{leaf}": array for name in "qk" for leaf, array in (
        ("weight", rng.standard_normal((6, 6)).astype(np.float32)), ("bias", np.zeros(6, np.float32)))}
    paddles = {f"{new}.{leaf}": torchs[f"{old}.{leaf}"].T for new, old in (("x", "k"), ("z", "q"))
               for leaf in ("weight", "bias")}
    made = draft(*(Side({name: array.shape for name, array in side.items()}, side.__getitem__)
                   for side in (torchs, paddles)), {"model_type": "mine"})
    assert all(line.sure for line in made.lines)
    assert {line.text for line in made.lines} == {'linear("q", 6, 6, to="z"),', 'linear("k", 6, 6, to="x"),'}


def test_no_size_has_a_word_by_chance(pair, tmp_path):
    """BERT's two answers to "is it the next sentence?" are no token types; a draft fits a net of three types too."""
    source, out = pair("bert")
    family, _ = drafted(source, out, tmp_path / "mine.py")
    assert 'linear("cls.seq_relationship", 2, "hidden")' in (tmp_path / "mine.py").read_text()
    other = build_demo(family_named("bert"), tmp_path / "other", {"type_vocab_size": 3})
    with open_checkpoint(other) as checkpoint:
        assert checkpoint.tensors["bert.embeddings.token_type_embeddings.weight"].shape[0] == 3
        make_plan(family, read_config(other), checkpoint.tensors)


def test_kernels_and_widths_of_convolutions_are_numbers(pair, tmp_path):
    """A kernel of 3 x 3 is not the number of channels of a picture, and a width not that of labels."""
    source, out = pair("resnet")
    drafted(source, out, tmp_path / "mine.py")
    rules = [line.strip() for line in (tmp_path / "mine.py").read_text().splitlines() if "(\"resnet." in line]
    assert [rule for rule in rules if '"channels"' in rule] == [
        'keep("resnet.embedder.embedder.convolution.weight", "stem", "channels", 7, 7, to="conv1.weight"),']
    assert not any("labels" in rule for rule in rules)


def test_the_only_one_of_its_shape_is_not_sure_where_an_axis_is_short_and_names_say_no_more_than_the_kind():
    for size, theirs, sure in ((3, "types.linear", False), (40, "types.linear", True), (3, "nsp_head.linear", True)):
        made = text_of({"a.weight": (5,), "nsp.dense.weight": (size, 50)},
                       {"a.weight": (5,), f"{theirs}.weight": (50, size)})
        assert [line.sure for line in made.lines if "nsp.dense.weight" in line.names] == [sure], made.lines


def test_the_readme_says_how_many_tensors_come_out_right(pair, tmp_path):
    english, chinese = (" ".join((PROJECT / name).read_text("utf-8").split())
                        for name in ("README.md", "README.zh.md"))
    found = re.search(r"all but (\d+) of BERT's (\d+) and (\d+) of OPT's (\d+) tensors come out right, and nothing "
                      "that is marked sure is wrong", english)
    in_chinese = "除 BERT 的 {1} 个张量中的 {0} 个和 OPT 的 {3} 个张量中的 {2} 个以外全部正确"
    assert found and in_chinese.format(*found.groups()) in chinese
    for name, wrong, many in (("bert", *found.group(1, 2)), ("opt", *found.group(3, 4))):
        source, out = pair(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(header(out)))
        family, _ = drafted(source, tmp_path / f"{name}.json", tmp_path / f"{name}.py")
        share, unlike = compared(name, source, family)
        assert (len(unlike), round(len(unlike) / (1 - share))) == (int(wrong), int(many))


# --- what is told


def test_the_summary_agrees_with_itself(pair, tmp_path):
    source, out = pair("bert")
    _, said = drafted(source, out, tmp_path / "mine.py")
    assert "2 Paddle tensors have no counterpart and are made.\nAs it is, the plan is whole" in said
    _, said = drafted(*pair("bloom"), tmp_path / "same.py")
    assert "Every tensor has a counterpart.\nAs it is, the plan is whole" in said


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_as_many_marks_are_told_as_the_draft_has(name, pair, tmp_path):
    _, said = drafted(*pair(name), tmp_path / "mine.py")
    written = [line for line in (tmp_path / "mine.py").read_text("utf-8").splitlines() if "# check:" in line]
    told = re.search(r"(\d+) rules, (\d+) of them sure, (\d+) to check(?:, and (\d+) other marks? to check)?", said)
    rules, sure, doubtful, others = (int(figure or 0) for figure in told.groups())
    assert rules == sure + doubtful and len(written) == doubtful + others


def test_a_draft_whose_plan_is_not_whole_says_so_and_not_that_nothing_was_written(tmp_path):
    held = {f"h.{number}.w.weight": [4, 4] for number in (0, 1)} | {"h.0.w.bias": [4]}
    for name, shapes in (("torch", held), ("paddle", held | {"h.1.w.bias": [5]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(shapes))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "architectures": 3}))
    _, said = drafted(tmp_path / "torch.json", tmp_path / "paddle.json", tmp_path / "mine.py")
    assert "As it is, the plan is not whole: config.json: architectures is 3" in said
    assert "Nothing was written" not in said and (tmp_path / "mine.py").is_file()


# --- input


def refused(*arguments, says):
    code, _, said = call(draft_main, [str(argument) for argument in arguments])
    assert code == 2 and says in said, said
    if said.startswith("error: "):
        assert said.count("\n") == 1


def test_bad_input_gets_a_sentence(pair, tmp_path, workdir):
    source, out = pair("gptj")
    both = ("--torch", source, "--paddle", out)
    refused("--torch", tmp_path / "no", "--paddle", out, says="no does not exist")
    refused("--torch", source, says="--paddle")
    refused(*both, "--output", "mine.txt", says="does not end in .py")
    (workdir / "mine.py").write_text("precious")
    refused(*both, "--output", "mine.py", says="mine.py exists; it is not touched")
    assert (workdir / "mine.py").read_text() == "precious"
    refused(*both, "--output", "no/such/mine.py", says="cannot be written")
    for content, says in (({"a": 3}, "its shape is needed"), ({"a": [-1]}, "its shape is needed"),
                          ({}, "names no tensor"),
                          ({"a{i}": [2]}, "no rule can name"), ({'a"': [2]}, "no rule can name"),
                          ({"a\n": [2]}, "no rule can name"), ({"a#": [2]}, "no rule can name")):
        (tmp_path / "header.json").write_text(json.dumps(content))
        refused("--torch", source, "--paddle", tmp_path / "header.json", says=says)


@pytest.mark.parametrize("kind", ["safetensors", "pdparams and bin", "a header and a checkpoint"])
def test_exchanged_sides_are_told(kind, pair, tmp_path):
    source, out = pair("gptj")
    if kind == "pdparams and bin":
        held = load_file(source / "model.safetensors")
        torch.save({name: torch.from_numpy(array.copy()) for name, array in held.items()}, tmp_path / "torch.bin")
        paddle.save({name: paddle.to_tensor(array) for name, array in load_file(out / "model.safetensors").items()},
                    str(tmp_path / "net.pdparams"))
        source, out = tmp_path / "torch.bin", tmp_path / "net.pdparams"
    flag, wrong = "--torch", out
    if kind == "a header and a checkpoint":
        (tmp_path / "paddle.json").write_text(json.dumps(header(out)))
        flag, wrong, out = "--paddle", source, tmp_path / "paddle.json"
    refused("--torch", out, "--paddle", source, "--output", tmp_path / "mine.py",
            says=f"{flag} {wrong} is a checkpoint of {'Paddle' if flag == '--torch' else 'torch'}, and one of ")
    assert not (tmp_path / "mine.py").exists()


def test_no_code_of_a_pickle_and_none_of_a_config_is_run(pair, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    source, _ = pair("gptj")
    (tmp_path / "evil.pdparams").write_bytes(pickle.dumps({"a": Evil()}, protocol=4))
    refused("--torch", source, "--paddle", tmp_path / "evil.pdparams", says="wants to run code")
    attack = f'x")) or open("{tmp_path}/owned", "w") or print(("'
    hostile = draft(Side({"a.weight": (13, 17)}), Side({"a.weight": (17, 13)}),
                    {"model_type": attack, "architectures": [attack], attack: 13, "n_embd": 17, "num_labels": attack})
    assert not (tmp_path / "owned").exists()
    compile(hostile.text, "draft", "exec")


def test_every_format_is_read_and_torch_is_not_imported(pair, tmp_path):
    source, out = pair("gpt2")
    held = load_file(source / "model.safetensors")
    torch.save({name: torch.from_numpy(array.copy()) for name, array in held.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    paddle.save({name: paddle.to_tensor(array) for name, array in load_file(out / "model.safetensors").items()},
                str(tmp_path / "net.pdparams"))
    code = ("import sys\nfrom convert.draft import main\n"
            f"code = main(['--torch', {str(tmp_path / 'pytorch_model.bin')!r}, '--paddle', "
            f"{str(tmp_path / 'net.pdparams')!r}, '--output', {str(tmp_path / 'mine.py')!r}])\n"
            "sys.exit(code or 9 * bool({'torch', 'paddle'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    share, wrong = compared("gpt2", source, load_family(tmp_path / "mine.py"))
    assert share == 1 and not wrong


def test_half_files_are_compared_by_value(pair, tmp_path):
    source, out = pair("gptj")
    (tmp_path / "half").mkdir()
    save_file({name: array.astype(np.float16) for name, array in load_file(source / "model.safetensors").items()},
              tmp_path / "half/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "half/config.json").write_text((source / "config.json").read_text())
    save_file({name: array.astype(np.float16).astype(np.float32)
               for name, array in load_file(out / "model.safetensors").items() if "masked" not in name},
              tmp_path / "paddle.safetensors")
    made = draft(*sides(tmp_path / "half", tmp_path / "paddle.safetensors", True), read_config(source))
    assert sum(line.sure for line in made.lines) >= len(made.lines) - 1


def test_without_output_the_draft_is_printed_and_without_a_config_it_runs_all_the_same(pair, tmp_path, workdir):
    source, out = pair("gptj")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    code, told, said = call(draft_main, ["--torch", str(tmp_path / "bare"), "--paddle", str(out)])
    assert code == 0 and told.startswith('"""mine: a draft.') and "next: read what is marked" in said
    assert not files_under(workdir)
    (tmp_path / "mine.py").write_text(told)
    code, _, said = call(convert_any, ["--family", str(tmp_path / "mine.py"), "--source",
                                       str(tmp_path / "bare/model.safetensors"), "--dry-run"])
    assert code == 0, said


def test_help_answers_at_once():
    slow = "import sys; sys.argv = ['draft', '--help']\nimport runpy\ntry: runpy.run_module('convert.draft')\n" \
           "except SystemExit: pass\nassert not {'numpy', 'torch', 'scipy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", slow], check=False).returncode == 0
    assert importlib.util.find_spec("scipy")
