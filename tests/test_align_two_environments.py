"""``--only reference``, ``--only candidate``, ``--compare``: recorded apart, judged as if recorded together."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from align_fixtures import Workshop, strict_json

STAGES = ("forward", "metric", "loss")
PROJECT = Path(__file__).resolve().parents[1]
HEADS = {"bert": "BertForPreTraining", "gptj": "GPTJForCausalLM"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("apart"))
    for family, head in HEADS.items():
        found.make(head, family, tokenizer=True)
    return found


def judged(report):
    return [report[key] for key in ("verdict", "first_divergence", "tensors", "sublayers", "values", "inputs_digest",
                                    "reference", "candidate", "named", "failures", "notes")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family, target", [("bert", "models"), ("gptj", "models"), ("gptj", "paddlenlp"),
                                            pytest.param("bert", "paddlenlp", marks=pytest.mark.full)])
def test_recorded_apart_and_together_give_one_report(shop, family, stage, target):
    if target == "paddlenlp":
        pytest.importorskip("paddlenlp")
    together = shop.align(stage, family, "--target", target)
    for side in ("reference", "candidate"):
        recorded = shop.align(stage, family, "--target", target, "--only", side)
        assert (recorded.code, recorded.report) == (0, {})
        assert "recorded" in recorded.stdout and "next:" in recorded.stdout
    apart = shop.align(stage, family, "--target", target, "--compare")
    assert apart.code == together.code
    assert judged(apart.report) == judged(together.report)


def test_each_side_needs_only_its_own_framework(shop):
    """torch records where paddle is not; a comparison needs neither. Each side is one process, for all stages."""
    def without(*missing):
        hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in missing)
        return (f"import sys; {hidden}; from importlib import import_module\n"
                f"for stage in {STAGES}:\n"
                "    module = import_module(f'align.{stage}')\n"
                "    if code := module.main(module.STAGE): sys.exit(code)")

    def run(program, *flags):
        return subprocess.run([sys.executable, "-c", program, "--run", "bert", "--reports", str(shop.reports), *flags],
                              cwd=PROJECT, capture_output=True, text=True)
    done = run(without("paddle", "paddlenlp", "reprod_log"), "--only", "reference")
    assert done.returncode == 0, done.stderr
    done = run(without("torch", "transformers"), "--only", "candidate")
    assert done.returncode == 0, done.stderr
    done = run(without("torch", "transformers", "paddle", "paddlenlp", "reprod_log"), "--compare")
    assert done.returncode == 0, done.stderr
    assert all(f"{stage}: aligned" in done.stdout for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_recorded_yet_is_asked_for(shop, stage):
    shutil.rmtree(shop.reports / "gptj" / "traces", ignore_errors=True)
    refused = shop.align(stage, "gptj", "--only", "candidate")
    command = f"align.{stage} --run gptj --reports {shop.reports} --only"
    assert refused.code == 2 and f"{command} reference" in refused.stderr
    assert shop.align(stage, "gptj", "--only", "reference").code == 0
    refused = shop.align(stage, "gptj", "--compare")
    assert refused.code == 2 and f"{command} candidate" in refused.stderr


def test_what_to_do_next_names_the_net_that_was_recorded(shop):
    recorded(shop)
    told = shop.align("forward", "bert", "--only", "candidate", "--target", "paddlenlp").stdout
    assert f"--run bert --target paddlenlp --reports {shop.reports} --compare" in told


def test_a_run_of_both_sides_is_no_recording_and_says_so(shop):
    assert shop.align("forward", "bert").code == 0
    refused = shop.align("forward", "bert", "--only", "candidate")
    assert refused.code == 2 and "a run of both sides" in refused.stderr and "--only reference" in refused.stderr


def test_inputs_are_chosen_where_the_reference_is_recorded(shop):
    recorded(shop)
    for flags in (("--only", "candidate", "--rows", "3"), ("--compare", "--tokens", "70")):
        refused = shop.align("forward", "bert", *flags)
        assert refused.code == 2 and f"{flags[-2]}: what both sides do is chosen" in refused.stderr


@pytest.mark.parametrize("flags, told", [
    (("--limit", "3"), "--limit: what both sides do is chosen where the reference is recorded"),
    (("--max-length", "40", "--batch-size", "2"), "--max-length and --batch-size: what both sides do")])
@pytest.mark.parametrize("then", [("--only", "candidate"), ("--compare",)])
def test_rows_are_chosen_where_the_reference_is_recorded(shop, flags, told, then):
    recorded(shop, stage="metric")
    refused = shop.align("metric", "bert", *then, *flags)
    assert refused.code == 2 and told in refused.stderr and "--only reference" in refused.stderr


@pytest.mark.parametrize("stage, flags", [
    ("optimizer", ("--updates", "3")), ("backward", ("--clip", "0.5")), ("train", ("--seed", "3"))])
def test_how_weights_are_moved_is_chosen_where_the_reference_is_recorded(shop, stage, flags):
    recorded(shop, stage=stage)
    refused = shop.align(stage, "bert", "--only", "candidate", *flags)
    assert refused.code == 2 and f"{flags[0]}: what both sides do is chosen" in refused.stderr


@pytest.mark.parametrize("stage, flag", [("data", "--tokenizer"), ("optimizer", "--candidate-optimizer")])
def test_what_is_asked_of_the_paddle_side_is_refused_where_torch_is_recorded(shop, stage, flag):
    refused = shop.align(stage, "bert", "--only", "reference", flag, "my:build")
    assert refused.code == 2 and f"{flag}: this is asked for where the Paddle side is recorded" in refused.stderr


@pytest.mark.parametrize("flag, value", [("--device", "gpu:0"), ("--paging", "on")])
def test_flags_of_a_model_that_runs_are_refused_where_none_does(shop, flag, value):
    recorded(shop)
    refused = shop.align("forward", "bert", "--compare", flag, value)
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert f"{flag} {value} is for running a model, and --compare runs none" in refused.stderr


def recorded(shop, family="bert", stage="forward"):
    """The directory of the two traces, as they are when both sides have just been recorded: what was, is put back."""
    traces, kept = shop.reports / family / "traces", shop.root / f"recorded-{family}-{stage}"
    if not kept.exists():
        shutil.copytree(record(shop, family, stage), kept)
    shutil.rmtree(traces, ignore_errors=True)
    return shutil.copytree(kept, traces)


def record(shop, family="bert", stage="forward"):
    for side in ("reference", "candidate"):
        assert shop.align(stage, family, "--only", side).code == 0
    return shop.reports / family / "traces"


@pytest.mark.parametrize("field, value, told", [
    ("framework", "torch", "both traces come from torch"), ("inputs_digest", "0" * 32, "different inputs"),
    ("source_digest", "0" * 32, "another source"), ("stage", "loss", "different stages")])
def test_a_pair_that_proves_nothing_is_refused(shop, field, value, told):
    file = recorded(shop) / "forward_paddle.provenance"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    outcome = shop.align("forward", "bert", "--compare")
    assert outcome.code == 2 and told in outcome.stderr and not outcome.report


def test_two_models_of_one_framework_are_compared_only_when_asked_for_and_the_report_says_so(shop):
    traces = recorded(shop)
    told = traces / "forward_paddle.provenance"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"framework": "torch"}))
    assert shop.align("forward", "bert", "--compare").code == 2
    outcome = shop.align("forward", "bert", "--compare", "--allow-same-framework")
    assert outcome.code == 0
    assert any("--allow-same-framework" in note for note in outcome.report["notes"])


def test_a_changed_trace_is_seen(shop):
    """The trace is what is judged, not a copy of it beside it."""
    file = recorded(shop) / "forward_paddle.npy"
    arrays = np.load(file, allow_pickle=True).item()
    arrays["bert.encoder.layers.1"][3, 4] += 1e-3
    np.save(file, arrays, allow_pickle=True)
    outcome = shop.align("forward", "bert", "--compare")
    assert (outcome.code, outcome.report["first_divergence"]) == (1, "bert.encoder.layers.1")
    del arrays["bert.encoder.layers.1"]
    np.save(file, arrays, allow_pickle=True)
    outcome = shop.align("forward", "bert", "--compare")
    assert outcome.code == 1 and "the candidate did not record it" in outcome.report["failures"][0]


def test_weights_that_differed_when_recorded_diverge_the_comparison(shop, monkeypatch):
    from align.paddle_net import PaddleNet
    state = PaddleNet.state
    monkeypatch.setattr(PaddleNet, "state", lambda self: (
        (name, array + 1 if name == "bert.encoder.layers.1.norm1.weight" else array) for name, array in state(self)))
    record(shop)
    monkeypatch.undo()
    outcome = shop.align("forward", "bert", "--compare")
    assert (outcome.code, outcome.report["first_divergence"]) == (1, "bert.encoder.layers.1.norm1.weight")


def halved(steps):
    sorted(steps.glob("*.npz"))[-1].unlink()


def damaged(steps):
    file = sorted(steps.glob("*.npz"))[1]
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("side", ["torch", "paddle"])
@pytest.mark.parametrize("harm", [shutil.rmtree, halved, damaged])
def test_a_recording_that_is_not_whole_is_refused(shop, side, harm):
    """Otherwise what is missing would silently not be judged."""
    harm(recorded(shop) / f"forward_{side}.steps")
    outcome = shop.align("forward", "bert", "--compare")
    assert outcome.code == 2 and "Record this side again" in outcome.stderr and not outcome.report


def test_steps_of_another_recording_are_refused(shop):
    traces = recorded(shop)
    shutil.copytree(traces / "forward_torch.steps", traces / "kept")
    assert shop.align("forward", "bert", "--only", "reference", "--tokens", "70").code == 0
    shutil.rmtree(traces / "forward_torch.steps")
    (traces / "kept").rename(traces / "forward_torch.steps")
    assert shop.align("forward", "bert", "--only", "candidate").code == 2
    assert shop.align("forward", "bert", "--compare").code == 2


def test_a_recording_that_is_broken_off_leaves_the_earlier_one(shop, monkeypatch):
    from align.reference import Reference
    recorded(shop)
    steps = Reference.steps

    def broken(self, inputs):
        yield next(steps(self, inputs))
        raise KeyboardInterrupt
    monkeypatch.setattr(Reference, "steps", broken)
    assert shop.align("forward", "bert", "--only", "reference").code == 130
    monkeypatch.undo()
    assert shop.align("forward", "bert", "--compare").code == 0


def test_modules_that_the_reference_did_not_record_fail(shop):
    file = recorded(shop) / "forward_torch.npy"
    arrays = np.load(file, allow_pickle=True).item()
    np.save(file, {name: array for name, array in arrays.items() if "logits" in name}, allow_pickle=True)
    outcome = shop.align("forward", "bert", "--compare")
    assert outcome.code == 1 and any("the reference did not record it" in told for told in outcome.report["failures"])


def test_silence_about_the_weights_is_no_proof_of_them(shop):
    file = recorded(shop) / "forward_paddle.provenance"
    told = json.loads(file.read_text())
    del told["weights_divergence"]
    file.write_text(json.dumps(told))
    assert shop.align("forward", "bert", "--compare").code == 2


class Hostile:
    def __reduce__(self):
        return (eval, ("open('pwned', 'w')",))


def test_a_trace_from_a_stranger_runs_no_code(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = recorded(shop) / "forward_paddle.npy"
    np.save(file, {"x": Hostile()}, allow_pickle=True)
    outcome = shop.align("forward", "bert", "--compare")
    assert outcome.code == 2 and "eval" in outcome.stderr and not (tmp_path / "pwned").exists()
    file.write_bytes(pickle.dumps([1]))
    assert shop.align("forward", "bert", "--compare").code == 2


@pytest.mark.parametrize("array", [np.array([1, "x"], object), np.zeros(2, [("a", "f4"), ("b", "O")]),
                                   np.array(["text"]), np.zeros(2, ">f4"), np.zeros(2, "M8[s]")])
def test_only_plain_numbers_come_out_of_a_trace(shop, array):
    file = recorded(shop) / "forward_paddle.npy"
    np.save(file, {"x": array}, allow_pickle=True)
    outcome = shop.align("forward", "bert", "--compare")
    assert outcome.code == 2 and "is not a trace" in outcome.stderr


@pytest.mark.parametrize("flags", [("--only", "reference"), ("--only", "candidate"), ("--compare",)])
def test_weights_have_no_side_to_record_alone(shop, flags):
    outcome = shop.align("weights", "bert", *flags)
    assert outcome.code == 2 and flags[0] in outcome.stderr


def test_only_and_compare_together_are_refused(shop):
    assert shop.align("forward", "bert", "--only", "reference", "--compare").code == 2


def test_a_later_run_of_both_sides_leaves_no_floors_of_an_earlier_recording(shop):
    traces = recorded(shop)
    assert list(traces.glob("forward_*.steps"))
    assert shop.align("forward", "bert").code == 0
    assert not list(traces.glob("forward_*.steps"))
    assert strict_json(shop.reports / "bert" / "forward.json")["verdict"] == "aligned"
