"""``python -m align.quick``: one pass a side sees gross faults, says where, and says what it did not look at."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from align_fixtures import Workshop
from safetensors.numpy import load_file, save_file

from align.page import stage_names
from align.quick import CAVEAT, Comparison
from align.runs import load_run
from align.trace import RECORDED, Step

SAME = ("verdict", "first_divergence", "tensors", "inputs_digest", "reference", "candidate", "notes", "caveat")
GPTJ, GPT2 = "GPTJForCausalLM", "GPT2LMHeadModel"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("quick"))
    found.make(GPTJ, "gptj")
    found.make(GPT2, "gpt2", n_embd=48, n_head=12)
    found.make("BertForPreTraining", "bert")
    return found


@pytest.fixture
def config(shop):
    """``config(run, **changes)`` changes the config that Paddle reads; undone afterwards."""
    before = {}

    def change(run, **changes):
        file = shop.output(run) / "config.json"
        before.setdefault(file, file.read_text())
        file.write_text(json.dumps(json.loads(before[file]) | changes))
    yield change
    for file, text in before.items():
        file.write_text(text)


@pytest.mark.parametrize("run", ["gptj", "gpt2", "bert"])
def test_a_right_net_is_aligned_paged_or_not_and_every_report_says_what_was_not_looked_at(shop, run):
    whole, paged = (shop.align("quick", run, "--paging", word) for word in ("off", "on"))
    assert (whole.code, whole.report["verdict"], whole.report["first_divergence"]) == (0, "aligned", None)
    assert [whole.report[key] for key in SAME] == [paged.report[key] for key in SAME]
    modules = [name for _, name in load_run(run, shop.reports).modules]
    names = [tensor["name"] for tensor in whole.report["tensors"]]
    assert names[:len(modules)] == modules and any("logits" in name for name in names[len(modules):])
    assert whole.report["caveat"] == CAVEAT
    files = (shop.reports / run / name for name in ("quick.md", "index.html"))
    for told in (whole.stdout, *(file.read_text("utf-8") for file in files)):
        assert CAVEAT in " ".join(told.replace("&#39;", "'").split())


def test_a_transposed_square_weight_is_named_and_so_is_the_first_output_that_it_makes_wrong(shop):
    file, name = shop.output("gptj") / "model.safetensors", "transformer.h.1.attn.q_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].T.copy()}, file, {"format": "np"})
    try:
        outcome = shop.align("quick", "gptj")
    finally:
        save_file(tensors, file, {"format": "np"})
    assert (outcome.code, outcome.report["first_divergence"], outcome.failing[0]) == (1, name, "transformer.h.1")
    assert outcome.tensor("transformer.h.0")["passed"] and "transpose" in outcome.stdout


@pytest.mark.parametrize("run, changes, first", [
    ("gpt2", dict(n_head=8), "gpt.decoder.layers.0"),
    ("gpt2", dict(scale_attn_weights=False), "gpt.decoder.layers.0"),
    ("gptj", dict(activation_function="relu"), "transformer.h.0"),
    ("bert", dict(hidden_act="relu"), "bert.encoder.layers.0")])
def test_a_gross_fault_is_diverged_from_the_first_module_on_that_it_makes_wrong(shop, config, run, changes, first):
    config(run, **changes)
    outcome = shop.align("quick", run)
    assert (outcome.code, outcome.report["verdict"], outcome.report["first_divergence"]) == (1, "diverged", first)
    assert f"First divergence: {first}" in outcome.stdout
    assert any(f" to {outcome.tensor(first)['rel_l2']:.1e} at {first}. Why: python -m align.forward --run {run}" in note
               for note in outcome.report["notes"])


def test_what_it_says_may_hide_does_hide_and_forward_finds_it(shop, config):
    config("gptj", layer_norm_epsilon=1.02e-5)
    quick, forward = (shop.align(stage, "gptj") for stage in ("quick", "forward"))
    assert (quick.code, forward.code) == (0, 1)
    assert any("layer_norm_epsilon" in note for note in quick.report["notes"])


def test_recorded_apart_and_together_give_one_report(shop):
    together = shop.align("quick", "gptj")
    for side in ("reference", "candidate"):
        told = shop.align("quick", "gptj", "--only", side)
        assert told.code == 0 and "python -m align.quick --run gptj" in told.stdout
    apart = shop.align("quick", "gptj", "--compare")
    assert apart.code == 0
    assert [together.report[key] for key in SAME] == [apart.report[key] for key in SAME]
    refused = shop.align("quick", "gptj", "--compare", "--rows", "2")
    assert refused.code == 2 and "--only reference" in refused.stderr


def test_a_net_of_the_users_own_is_looked_at_too(shop, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "quick_own_net.py").write_text(
        "from models import from_pretrained\n"
        "def wrong(config, directory):\n"
        "    net = from_pretrained(directory)\n"
        "    net.transformer.h[1].mlp.act.name = 'relu'\n"
        "    return net\n")
    outcome = shop.align("quick", "gptj", "--target", "quick_own_net:wrong", "--rows", "1", "--tokens", "64")
    sys.modules.pop("quick_own_net")
    report = json.loads((shop.reports / "gptj" / "quick_own_net.wrong" / "quick.json").read_text())
    assert (outcome.code, report["first_divergence"]) == (1, "transformer.h.1")
    assert report["tensors"][0]["shape"] == [64, 32]


def test_it_is_no_part_of_the_whole():
    assert "quick" not in stage_names() and "forward" in stage_names()


# The judge ------------------------------------------------------------------------------------------------------------

X = np.linspace(1, 2, 12, dtype=np.float32).reshape(4, 3)


def judged(shop, reference, candidate, absent=()):
    """Results by name of two recordings, of which torch's class lacks the modules ``absent``."""
    run = load_run("bert", shop.reports)
    found = Comparison(run)
    present = [name for _, name in run.modules if name not in absent]
    found.add(Step({RECORDED: reference}, told={"present": present}), Step({RECORDED: candidate}))
    return {result.name: result for result in found.results()}


def test_what_one_side_alone_gives_is_a_failure_unless_torch_has_no_such_module(shop):
    found = judged(shop, {"bert.embeddings": X, "bert.encoder.layers.0": X}, {"bert.embeddings": X, "bert.pooler": X})
    assert {name: result.passed for name, result in found.items()} == {
        "bert.embeddings": True, "bert.encoder.layers.0": False, "bert.pooler": False}
    assert "bert.pooler" not in judged(shop, {"bert.embeddings": X}, {"bert.embeddings": X, "bert.pooler": X},
                                       {"bert.pooler"})


@pytest.mark.parametrize("other", [X * np.float32(np.nan), X.T.copy(), X.astype(np.float64), -X, X * np.float32(1.1)])
def test_nan_another_shape_or_dtype_and_gross_errors_fail(shop, other):
    assert not judged(shop, {"bert.embeddings": X}, {"bert.embeddings": other})["bert.embeddings"].passed


def with_error(size):
    """``X``, a relative L2 of ``size`` away."""
    return (X.astype(np.float64) * (1 + size)).astype(np.float32)


@pytest.mark.parametrize("errors, passed", [
    ([0.9e-3], [True]), ([1.1e-3], [False]),
    ([1e-4, 1.05e-2], [True, True]), ([1e-4, 1.15e-2], [True, False]),
    ([0.9e-3, 0.08, 0.09, 0.11], [True, True, True, False]),
    ([0.5, 0.5, 0.9e-3], [False, False, True])])
def test_a_place_may_add_1e3_and_make_a_hundredfold_of_what_was_right_before_up_to_a_tenth(shop, errors, passed):
    names = ["bert.embeddings", *(f"bert.encoder.layers.{layer}" for layer in range(3))][:len(errors)]
    found = judged(shop, dict.fromkeys(names, X), {name: with_error(size) for name, size in
                                                   zip(names, errors, strict=True)})
    assert [found[name].passed for name in names] == passed
