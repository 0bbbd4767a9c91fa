"""What cannot be aligned is refused in one sentence, with an exit code that is no verdict."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import STAGES, Workshop

from align import forward
from align.paddle_net import PaddleNet
from align.reference import outputs_of
from align.runs import load_run
from align.stage import Findings, main
from align.trace import Provenance, require_comparable
from convert.errors import BadInput

PROJECT = Path(forward.__file__).parents[1]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("refusals"))
    workshop.make("BertForMaskedLM", "bert", tokenizer=True)
    return workshop


@pytest.fixture
def fresh(tmp_path):
    """A workshop with a run ``bert`` that a test may spoil."""
    workshop = Workshop(tmp_path)
    workshop.make("BertForMaskedLM", "bert")
    return workshop


def refused(outcome, code, *words):
    """One sentence on stderr that says ``words``, the exit code, and no report."""
    assert outcome.code == code, (outcome.stdout, outcome.stderr)
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
    for word in words:
        assert str(word) in lines[0]
    assert outcome.report == {}
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_no_run_at_all(tmp_path, stage):
    assert refused(Workshop(tmp_path).align(stage, None), 2, "there is no run in", "python -m convert.gptj")


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_run(workshop, stage):
    assert refused(workshop.align(stage, "nosuch"), 2, "there is no run nosuch in")


@pytest.mark.parametrize("side", ["source", "output"])
def test_a_side_that_is_gone(fresh, side):
    gone = fresh.output("bert") if side == "output" else fresh.root / "source-bert"
    gone.rename(gone.with_name("elsewhere"))
    assert refused(fresh.align("forward", "bert"), 2, f"the {side} of run bert, {gone}, is gone")


@pytest.mark.parametrize("stage, flags", [*((stage, ()) for stage in STAGES), ("forward", ("--paging", "on"))])
def test_a_source_that_changed_after_the_conversion(fresh, stage, flags):
    file = fresh.root / "source-bert" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert refused(fresh.align(stage, "bert", *flags), 2, "is not what run bert converted", "Convert again")


@pytest.mark.parametrize("damage, told", [
    (lambda text: "{", "cannot be read"), (lambda text: text.replace("paddle-parity/1", "paddle-parity/0"), "schema"),
    (lambda text: json.dumps({**json.loads(text), "family": "nosuch"}), "there is no family 'nosuch'"),
    (lambda text: json.dumps({**json.loads(text), "head": "BertForNothing"}), "has head BertForNothing"),
])
def test_a_damaged_report_of_the_conversion(fresh, damage, told):
    file = fresh.reports / "bert" / "convert.json"
    file.write_text(damage(file.read_text()))
    assert refused(fresh.align("forward", "bert"), 2, told)


@pytest.mark.parametrize("flags, told", [
    (("--target", "nosuch"), "--target nosuch is not one of models, paddlenlp"),
    (("--device", "gpu:0"), "--device gpu:0 cannot be used by this Paddle"),
    (("--device", "toaster"), "--device toaster cannot be used by this Paddle"),
    (("--family", "nosuch.py"), "--family nosuch.py does not exist"),
])
def test_a_flag_that_cannot_be_followed(workshop, flags, told):
    assert refused(workshop.align("forward", "bert", *flags), 2, told)


def test_a_family_file_without_the_head_of_the_run(workshop, tmp_path):
    (tmp_path / "mine.py").write_text("from convert.gptj import FAMILY")
    outcome = workshop.align("forward", "bert", "--family", str(tmp_path / "mine.py"))
    assert refused(outcome, 2, "run bert has head BertForMaskedLM, which family gptj does not have")


@pytest.mark.parametrize("flags", [("--nosuch",), ("--limit", "0"), ("--limit", "many"), ("--batch-size", "-1")])
def test_a_flag_that_does_not_exist_or_parse(workshop, flags):
    outcome = workshop.align("metric", "bert", *flags)
    assert outcome.code == 2 and "usage:" in outcome.stderr and outcome.report == {}


@pytest.mark.parametrize("flags, told", [
    (("--dataset", "gone.jsonl"), "the data set gone.jsonl does not exist"),
    (("--columns", "text"), "--columns text is not of the form text=sentence,label=stars"),
    (("--columns", "text=nosuch"), "the set has no column nosuch; it has text, label"),
    (("--max-length", "2"), "2 tokens a row are too few"),
])
def test_data_that_cannot_be_had(workshop, flags, told):
    assert refused(workshop.align("metric", "bert", *flags), 2, told)


@pytest.mark.parametrize("framework", ["torch", "transformers", "paddle"])
@pytest.mark.parametrize("stage", ["forward", "metric", "loss"])
def test_a_missing_framework(workshop, monkeypatch, stage, framework):
    monkeypatch.setitem(sys.modules, framework, None)
    assert refused(workshop.align(stage, "bert"), 3, f"{framework} cannot be imported", f"pip install {framework}")


def test_a_missing_paddlenlp(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "paddlenlp", None)
    outcome = workshop.align("weights", "bert", "--target", "paddlenlp")
    assert refused(outcome, 3, "paddlenlp cannot be imported", 'pip install "paddle-parity[paddlenlp]"')


def python(cwd, *arguments):
    """A fresh interpreter in ``cwd``, which comes first on its path; the project comes after."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=os.environ | {"PYTHONPATH": str(PROJECT)},
                          capture_output=True, text=True)


@pytest.mark.parametrize("foreign", ["models/__init__.py", "models.py"])
def test_another_package_named_models(workshop, tmp_path, foreign):
    """Found before any of its code is run."""
    file = tmp_path / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise SystemExit('the code of a stranger was run')")
    done = python(tmp_path, "-m", "align.weights", "--run", "bert", "--reports", str(workshop.reports))
    assert done.returncode == 2, done.stderr
    assert f"another package named models, at {file}" in done.stderr.splitlines()[-1]


def test_weights_need_no_torch_and_work_from_any_directory(workshop, tmp_path):
    program = (f"import sys; sys.modules['torch'] = None; sys.argv[1:] = ['--run', 'bert', '--reports', "
               f"{str(workshop.reports)!r}]; import runpy; runpy.run_module('align.weights', run_name='__main__')")
    done = python(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert "weights: aligned" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_is_no_verdict_and_leaves_a_traceback_in_a_file(workshop, monkeypatch, stage):
    def crash(*arguments, **options):
        raise ZeroDivisionError("planted\non two lines")
    monkeypatch.setattr(PaddleNet, "state" if stage == "weights" else "outputs", crash)
    outcome = workshop.align(stage, "bert")
    assert refused(outcome, 4, "ZeroDivisionError: planted", "fault of paddle-parity")
    log = Path(re.search(r"traceback in (\S+\.log)", outcome.stderr).group(1))
    assert "Traceback (most recent call last)" in log.read_text() and "in crash" in log.read_text()
    log.unlink()


def test_inputs_that_are_too_large_for_memory_are_told():
    """What torch itself says of 2^50 bytes."""
    class Wide(torch.nn.Module):
        def forward(self, input_ids):
            return {"logits": torch.empty(1 << 50, dtype=torch.uint8)}
    with pytest.raises(BadInput, match=r"torch's own Wide has too little memory for its inputs \(input_ids \[2, 9\]\). "
                                       "Give fewer rows or tokens"):
        outputs_of(Wide(), {"input_ids": np.zeros((2, 9), np.int64)})


def test_comparing_nothing_is_diverged(workshop, capsys):
    nothing = dataclasses.replace(forward.STAGE, name="nothing", judge=lambda session, pairs: Findings(list(pairs)[:0]))
    assert main(nothing, ["--run", "bert", "--reports", str(workshop.reports)]) == 1
    assert "nothing is not evidence" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((workshop.reports / "bert" / "nothing.json").read_text())["verdict"] == "diverged"


def test_a_tensor_that_only_one_side_recorded_fails(workshop, monkeypatch):
    outputs = PaddleNet.outputs
    monkeypatch.setattr(PaddleNet, "outputs", lambda self, arrays: {
        name.replace("logits", "elsewhere"): array for name, array in outputs(self, arrays).items()})
    outcome = workshop.align("forward", "bert")
    assert (outcome.code, outcome.failing) == (1, ["logits", "elsewhere"])
    assert outcome.report["failures"] == ["logits: the candidate did not record it",
                                          "elsewhere: the reference did not record it"]


def trace(**changed):
    told = dict(stage="forward", framework="torch", version="2", model="M", weights_digest="w", source_digest="s",
                inputs_digest="i", weights_divergence=None)
    return Provenance(**{**told, **changed})


@pytest.mark.parametrize("changed, told", [
    (dict(framework="torch"), "both traces come from torch"), (dict(inputs_digest="j"), "different inputs"),
    (dict(source_digest="t"), "different source checkpoints"), (dict(stage="loss"), "different stages"),
])
def test_traces_that_prove_nothing_are_refused(changed, told):
    with pytest.raises(BadInput, match=told):
        require_comparable(trace(), trace(**{"framework": "paddle", **changed}))


def test_traces_of_two_frameworks_are_compared():
    require_comparable(trace(), trace(framework="paddle", version="3", model="N", weights_digest="v"))


def test_a_family_whose_sizes_do_not_say_the_positions_is_told_so(workshop):
    """As a draft of an OPT, whose table has two rows more than there are positions."""
    run = load_run(workshop.make("GPTJForCausalLM", "no-positions"), workshop.reports)
    family = dataclasses.replace(run.family, sizes=lambda config: {"hidden": 32, "vocab": 257})
    with pytest.raises(BadInput, match="its sizes do not say positions"):
        assert dataclasses.replace(run, family=family).sizes


def test_a_run_of_a_family_file_asks_for_the_file_again(workshop):
    run = workshop.make("GPTJForCausalLM", "of-a-file")
    file = workshop.reports / run / "convert.json"
    file.write_text(file.read_text().replace('"family": "gptj"', '"family": "mine"'))
    outcome = workshop.align("forward", run)
    assert refused(outcome, 2, "was converted with a family file of your own", f"--run {run} --family FILE")


@pytest.mark.parametrize("stage", STAGES)
def test_which_run_is_taken_where_none_is_named_is_the_first_that_is_said(tmp_path, stage):
    workshop = Workshop(tmp_path)
    for run in ("older", "newer"):
        workshop.make("BertForMaskedLM", run)
    finished = json.loads((workshop.reports / "newer" / "convert.json").read_text())["finished"]
    told = f"run newer: the latest conversion, of {finished[:10]} {finished[11:16]} UTC. --run NAME takes another."
    outcome = workshop.align(stage, None)
    assert (outcome.code, outcome.stdout.splitlines()[0]) == (0, told)
    assert "the latest conversion" not in workshop.align(stage, "older").stdout


@pytest.mark.parametrize("flags, told", [
    (("--stride", "8"), "BertForMaskedLM is none"), (("--prefix", "say: "), "BertForMaskedLM does not translate"),
    (("--split", "train"), "--split train is of a set that --dataset names, and there is none"),
])
def test_a_flag_of_another_kind_of_metric(workshop, flags, told):
    assert refused(workshop.align("metric", "bert", *flags), 2, told, "Leave it out" if "--split" not in flags else "")


def test_a_prefix_where_no_text_is_read(tmp_path):
    workshop = Workshop(tmp_path)
    workshop.make("T5ForConditionalGeneration", "t5")
    assert refused(workshop.align("metric", "t5", "--prefix", "say: "), 2, "this checkpoint has no tokenizer")


def test_a_split_of_a_file(workshop, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a row"}) + "\n")
    outcome = workshop.align("metric", "bert", "--dataset", str(tmp_path / "rows.jsonl"), "--split", "train")
    assert refused(outcome, 2, "--split train:", "is a file, which has no splits")


def test_a_gpu_that_is_not_there(workshop):
    """What there is, and what to do; the machine that tests run on has none."""
    if paddle.is_compiled_with_cuda():
        pytest.skip("this Paddle could use one")
    assert refused(workshop.align("forward", "bert", "--device", "gpu:0"), 2, paddle.__version__,
                   "is built for the CPU alone, and a GPU needs paddlepaddle-gpu. Leave --device out: the CPU is the")


@pytest.mark.parametrize("built, there, told", [
    (True, 2, "it finds gpu:0 to gpu:1 and the CPU. Give one of these"), (True, 0, "it finds no GPU here. Leave"),
])
def test_gpus_of_another_number(workshop, monkeypatch, built, there, told):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: built)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: there)
    monkeypatch.setattr(paddle, "set_device", lambda device: 1 / 0)
    assert refused(workshop.align("forward", "bert", "--device", "gpu:7"), 2, "--device gpu:7 cannot be used", told)


def test_a_set_of_the_hub_where_there_is_no_network(workshop, tmp_path):
    """The libraries retry and log it; the user is told once. Port 9 of this machine answers nobody."""
    program = (f"import sys, time; time.sleep = lambda seconds: None; sys.argv[1:] = ['--run', 'bert', '--reports', "
               f"{str(workshop.reports)!r}, '--dataset', 'owner/words']; import runpy; "
               "runpy.run_module('align.metric', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": str(PROJECT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 2
    assert done.stderr == ("error: the data set owner/words (split test) is not here, and the hub cannot be reached. "
                           "Connect, set HF_ENDPOINT to a mirror, or give a file: --dataset rows.jsonl\n")
