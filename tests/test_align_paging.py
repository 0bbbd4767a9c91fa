"""Weights that come in block by block give the numbers that they give when all of them are in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from align_fixtures import BERT_HEADS, GPTJ_HEADS, Workshop
from conftest import fast

from align import paging, recording
from align.lockstep import halt, in_step
from align.paging import Frames, Pages, divide, gates_of
from align.trace import Step

STAGES = ("weights", "forward", "metric", "loss")
SAME = ("verdict", "first_divergence", "tensors", "sublayers", "values", "candidate", "reference", "inputs_digest",
        "named")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("paged"))


def same(shop, run, stage, *flags):
    whole, paged = (shop.align(stage, run, *flags, "--paging", word) for word in ("off", "on"))
    assert whole.report and whole.code == paged.code, paged.stderr
    assert [whole.report[key] for key in SAME] == [paged.report[key] for key in SAME]
    return paged


@pytest.mark.parametrize("head", fast([*GPTJ_HEADS, *BERT_HEADS], "GPTJForCausalLM", "BertModel"))
def test_paged_equals_unpaged_for_every_head(shop, head):
    run = shop.make(head, head, tokenizer=True)
    for stage in STAGES:
        assert same(shop, run, stage).code == 0


def test_nothing_that_the_reference_asks_is_left_unanswered(shop, monkeypatch):
    """Every module, sublayer and arrival, and every module and norm on a small input, has its figure in the report."""
    run = shop.make("GPTJForCausalLM", "asked")
    report = shop.align("forward", run).report
    blocks = [f"transformer.h.{layer}" for layer in range(3)]
    assert [tensor["name"] for tensor in report["tensors"]] == [
        "transformer.drop", "transformer.drop (small input)",
        *(name for block in blocks for name in (block, f"{block}.ln_1 (small input)", f"{block} (small input)")),
        "transformer.ln_f", "transformer.ln_f (small input)", "logits"]
    assert len(report["sublayers"]) == 3 * (7 + 7 + 1)
    from align.candidate import Inside
    monkeypatch.setattr(Inside, "probed", lambda *_: None)
    outcome = shop.align("forward", run)
    assert outcome.code == 1
    assert outcome.failing == [f"{block}.ln_1 (small input)" for block in blocks] + ["transformer.ln_f (small input)"]


PADDLENLP = ("GPTJForCausalLM", "BertForPreTraining", "BertForMaskedLM", "GPT2LMHeadModel", "OPTForCausalLM",
             "BloomForCausalLM", "T5ForConditionalGeneration")


@pytest.mark.parametrize("head", fast(PADDLENLP, "GPTJForCausalLM"))
def test_paged_equals_unpaged_for_paddlenlp(shop, head):
    pytest.importorskip("paddlenlp")
    run = shop.make(head, f"{head}-nlp", tokenizer=True)
    for stage in STAGES:
        outcome = same(shop, run, stage, "--target", "paddlenlp")
        if head == "GPTJForCausalLM" and stage == "forward":
            assert any("the mask value of the candidate is -1e+09" in note for note in outcome.report["notes"])


FILES = {
    "float16": dict(dtype="float16"), "bfloat16": dict(dtype="bfloat16"), "bin": dict(binary=True),
    "cast": dict(flags=("--dtype", "bfloat16")), "shards": dict(shard="20KB", flags=("--shard-size", "20KB")),
    "pdparams": dict(flags=("--format", "pdparams"))}
KINDS = [(head, kind) for head in ("GPTJForCausalLM", "BertForPreTraining") for kind in FILES]


@pytest.mark.parametrize("case", fast(KINDS, *[(head, kind) for head, kind in KINDS if kind in (
    ("bfloat16", "shards") if head.startswith("GPTJ") else ("bin", "cast", "pdparams"))]), ids="-".join)
def test_from_every_kind_of_file(shop, case):
    head, kind = case
    run = shop.make(head, "-".join(case), **FILES[kind])
    for stage in ("weights", "forward"):
        assert same(shop, run, stage).code == 0


def test_a_wrong_weight_is_named_when_paged(shop):
    run = shop.make("GPTJForCausalLM", "wrong")
    _, reports = shop.align("forward", run), shop.reports
    from safetensors.numpy import load_file, save_file
    file = shop.output(run) / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.1.attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].T.copy()}, file, {"format": "np"})
    outcome = same(shop, run, "forward")
    assert (outcome.code, outcome.report["first_divergence"]) == (1, name)
    assert "transpose" in json.loads((reports / run / "forward.json").read_text())["diagnosis"]["sentence"]


def test_a_wrong_operation_is_explained_when_paged(shop):
    run = shop.make("GPTJForCausalLM", "epsilon")
    config = shop.output(run) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"activation_function": "gelu"}))
    outcome = same(shop, run, "forward")
    assert outcome.code == 1 and "gelu" in outcome.report["diagnosis"]["sentence"]


def test_auto_pages_where_the_models_do_not_fit(shop, monkeypatch):
    run = shop.make("GPTJForCausalLM", "auto")
    entered = []
    enter = Pages.enter
    monkeypatch.setattr(Pages, "enter", lambda self, gate: entered.append(gate) or enter(self, gate))
    assert shop.align("forward", run).code == 0 and not entered
    monkeypatch.setattr(paging, "available_memory", lambda: 1 << 20)
    assert shop.align("forward", run).code == 0 and "transformer.h.1" in entered


def test_a_net_of_the_users_own_cannot_be_paged_and_says_so(shop, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_unpaged.py").write_text("from models import from_pretrained\n"
                                              "def build(config, directory): return from_pretrained(directory)\n")
    run = shop.make("GPTJForCausalLM", "mine")
    refused = shop.align("forward", run, "--target", "mine_unpaged:build", "--paging", "on")
    assert refused.code == 2 and "--paging" in refused.stderr


def test_a_checkpoint_of_the_old_torch_format_cannot_be_paged_and_says_so(shop):
    source = shop.source("GPTJForCausalLM", "old", binary=True)
    file = source / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    run = shop.convert("gptj", source, "old")
    assert shop.align("forward", run).code == 0
    refused = shop.align("forward", run, "--paging", "on")
    assert refused.code == 2 and "zip format" in refused.stderr and "--paging off" in refused.stderr


@pytest.mark.full
def test_memory_is_flat_in_the_number_of_layers(shop):
    """A block of 1024 x 4096 is 50 MB in float32: sixteen more of them would be 800 MB on each side.

    Of 15 runs of 6 to 18 layers the peaks were 1,153 to 1,202 MB, in no order: how often the next block comes in just
    when most is needed for this one. With two layers, where it comes in once, they were 1,124 to 1,133.
    """
    peaks = []
    for layers in (6, 22):
        run = shop.make("GPTJForCausalLM", f"deep-{layers}", n_layer=layers, n_embd=1024, n_inner=4096, n_head=8,
                        rotary_dim=32)
        done = subprocess.run([sys.executable, "-m", "align.forward", "--run", run, "--reports", str(shop.reports),
                               "--paging", "on", "--rows", "2", "--tokens", "64"],
                              cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads((shop.reports / run / "forward.json").read_text())["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 800e6 / 8


# Gates and pages ------------------------------------------------------------------------------------------------------

def test_gates_are_the_outermost_modules_and_the_leaves_beside_them():
    parameters = ["wte.weight", "h.0.ln.weight", "h.0.mlp.fc.weight", "h.1.ln.weight", "head.inner.weight", "odd.scale"]
    assert gates_of(["drop", "h.0", "h.1", "h.1.ln"], parameters, {"wte", "head.inner", "drop"}) == [
        "drop", "h.0", "h.1", "wte", "head.inner"]


def test_what_two_gates_share_stays():
    found = divide({"wte.weight": 1, "h.0.a": 2, "h.0.b": 2, "head.weight": 1, "loose": 3}, ["wte", "h.0", "head"])
    assert dict(found.pages) == {"h.0": [["h.0.a", "h.0.b"]]}
    assert list(found.resident) == [["wte.weight", "head.weight"], ["loose"]]


class Counted:
    filled: ClassVar[set[str]] = set()

    def __init__(self, names):
        self.names, self.elements = names, 2

    def fill(self, memory):
        assert memory.shape == (2,) and memory.dtype == "float32"
        self.filled.add(self.names[0])

    def release(self):
        self.filled.discard(self.names[0])


def test_only_one_page_is_in_at_a_time():
    Counted.filled = set()
    pages = Pages(divide({"a.x": 1, "a.y": 2, "b.x": 3, "stays": 4}, ["a", "b"]), Counted)
    for gate, expected in (("a", {"a.x", "a.y"}), ("a", {"a.x", "a.y"}), ("b", {"b.x"}), ("none", set())):
        pages.enter(gate)
        assert Counted.filled == expected | {"stays"}
    assert [slot.names for slot in pages.each()] == [["stays"], ["a.x"], ["a.y"], ["b.x"]]
    assert Counted.filled == {"stays"}


def test_every_slot_is_shown_once_and_while_it_is_filled():
    Counted.filled = set()
    pages = Pages(divide({"a.x": 1, "b.x": 2, "b.y": 3, "stays": 4}, ["a", "b"]), Counted)
    shown = []

    def look(slot):
        assert slot.names[0] in Counted.filled
        shown.append(slot.names[0])
    pages.enter("a")
    pages.show(look)
    assert shown == ["stays", "a.x"]
    pages.enter("b")
    pages.enter("a")
    assert shown == ["stays", "a.x", "b.x", "b.y"]
    pages.show(look)
    pages.show_rest()
    assert shown[4:] == ["stays", "a.x", "b.x", "b.y"] and Counted.filled == {"stays"}


def test_memory_is_lent_again_only_when_nothing_refers_to_it():
    frames = Frames()
    first, = frames.lend([8])
    first[:] = 1
    held, place = torch.from_numpy(first).view(2, 4)[1:], first.ctypes.data
    del first
    other, = frames.lend([8])
    other[:] = 2
    assert other.ctypes.data != place and held.unique().tolist() == [1]
    place = other.ctypes.data
    del other
    again, more = frames.lend([8, 4])
    assert again.ctypes.data == place and more.shape == (4,)


def test_passes_go_through_each_gate_one_after_another():
    seen = []

    def run(name):
        for gate in ("one", "two"):
            assert halt(gate)
            seen.append((gate, name))
    with in_step([lambda: run("a"), lambda: run("b")], lambda gate: seen.append(("enter", gate))) as walks:
        while walks.gate is not None:
            walks.advance()
    assert seen == [("enter", "one"), ("one", "a"), ("one", "b"), ("enter", "two"), ("two", "a"), ("two", "b")]


def test_an_error_in_a_pass_is_raised_where_it_is_waited_for_and_ends_the_others():
    ended = []

    def good():
        try:
            halt("gate")
        finally:
            ended.append(True)

    def bad():
        halt("gate")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), in_step([bad, good], lambda gate: None) as walks:
        walks.advance()
    assert ended == [True]


def test_passes_that_come_to_different_gates_are_a_fault():
    with pytest.raises(RuntimeError, match="different gates"), in_step(
            [lambda: halt("one"), lambda: halt("two")], lambda gate: None):
        pass


def test_outside_a_walk_a_gate_holds_nobody():
    assert halt("gate") is False


def test_large_recorded_arrays_wait_in_a_file_and_come_out_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "LARGE", 1000)
    kept = recording._Recording(tmp_path / "traces")
    step, generator = Step(), np.random.default_rng(0)
    large = generator.standard_normal((20, 30)).astype(np.float32)
    step.recorded.update(large=large, small=np.float32(3.0).reshape(()))
    kept.add(step)
    assert isinstance(kept.arrays["large"].base, np.memmap)
    assert not isinstance(kept.arrays["small"].base, np.memmap)
    assert all(np.array_equal(kept.arrays[name], array) for name, array in step.recorded.items())
    assert list((tmp_path / "traces").iterdir()) == []
