"""The reports: the interface that other people's scripts stand on, and the files that users of reprod_log know."""

import json
import logging
import numbers
import re

import numpy as np
import pytest
from align_fixtures import STAGES, Workshop
from reprod_log import ReprodDiffHelper

import models
from align import progress
from align.compare import Measures, TensorResult, compare
from align.noise import NoiseFloor
from align.report import StageResult
from convert.errors import BadInput

TYPES = {"schema": str, "run": str, "family": str, "stage": str, "verdict": str, "first_divergence": (str, type(None)),
         "tensors": list, "reference": dict, "candidate": dict, "inputs_digest": (str, type(None)),
         "seconds": numbers.Real, "peak_rss_bytes": int}
MEASURES = ("max_abs", "mean_abs", "rel_l2", "cosine")
TRACED = ("forward", "metric", "loss")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("reports"))
    workshop.make("GPTJForCausalLM", "gptj", tokenizer=True)
    return workshop


@pytest.fixture(scope="module")
def outcomes(workshop):
    return workshop.align_all("gptj")


@pytest.fixture(scope="module")
def diverged(workshop):
    """Forward of a net whose last block has lost its MLP."""
    load = models.from_pretrained

    def broken(directory):
        net = load(directory)
        net.transformer.h[2].mlp.forward = lambda hidden: hidden * 0.0
        return net
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "from_pretrained", broken)
        outcome = workshop.align("forward", "gptj")
        markdown = (workshop.reports / "gptj" / "forward.md").read_text("utf-8")
    workshop.align("forward", "gptj")
    return outcome, markdown


def test_a_log_is_told_now_and_then_what_is_being_done(workshop, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", float("inf"))
    assert not re.search(r"^loss: ", workshop.align("loss", "gptj").stderr, re.M)
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    assert re.search(r"^loss: .+ \(\d+ s\)$", workshop.align("loss", "gptj").stderr, re.M)


@pytest.mark.parametrize("stage", STAGES)
def test_the_json_has_what_is_promised(outcomes, stage):
    report = outcomes[stage].report
    for key, kind in TYPES.items():
        assert isinstance(report[key], kind), key
    assert (report["schema"], report["run"], report["family"], report["stage"]) == (
        "paddle-parity/1", "gptj", "gptj", stage)
    assert (report["verdict"], report["first_divergence"]) == ("aligned", None)
    assert report["seconds"] > 0 and report["peak_rss_bytes"] > 1e7
    for side, framework in (("reference", "torch"), ("candidate", "paddle")):
        assert report[side]["framework"] == framework
        assert set(report[side]) >= {"version", "weights_digest"} and all(map(bool, report[side].values()))


@pytest.mark.parametrize("stage", STAGES)
def test_every_tensor_has_finite_measures(outcomes, stage):
    for tensor in outcomes[stage].report["tensors"]:
        assert isinstance(tensor["name"], str) and isinstance(tensor["dtype"], str)
        assert all(isinstance(size, int) for size in tensor["shape"])
        assert tensor["passed"] is True and isinstance(tensor["allowed"], float)
        assert all(isinstance(tensor[name], float) and np.isfinite(tensor[name]) for name in MEASURES)


def test_the_source_digest_is_the_conversions(workshop, outcomes):
    converted = json.loads((workshop.reports / "gptj" / "convert.json").read_text())["source_digest"]
    assert {outcomes[stage].report["reference"]["weights_digest"] for stage in STAGES} == {converted}
    assert len({outcomes[stage].report["candidate"]["weights_digest"] for stage in STAGES}) == 1


def test_the_weights_are_named_and_shaped_as_torch_has_them(workshop, outcomes):
    from safetensors import safe_open
    tensors = {tensor["name"]: tuple(tensor["shape"]) for tensor in outcomes["weights"].report["tensors"]}
    with safe_open(workshop.root / "source-gptj" / "model.safetensors", "pt") as source:
        assert tensors == {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118


@pytest.mark.parametrize("stage", STAGES)
def test_the_markdown_tells_the_verdict_first(workshop, outcomes, stage):
    first = (workshop.reports / "gptj" / f"{stage}.md").read_text("utf-8").splitlines()[0]
    assert stage in first and "aligned" in first


def test_a_divergence_is_told_in_json_markdown_and_terminal(diverged):
    outcome, markdown = diverged
    assert (outcome.code, outcome.report["verdict"]) == (1, "diverged")
    assert outcome.report["first_divergence"] == "transformer.h.2"
    assert "diverged" in markdown.splitlines()[0] and "`transformer.h.2`" in markdown.splitlines()[2]
    assert "forward: diverged" in outcome.stdout and "FAIL transformer.h.2" in outcome.stdout


def result_of(tensors):
    sides = dict.fromkeys(("framework", "version", "weights_digest"), "–")
    return StageResult("net", "gptj", "GPTJForCausalLM", "backward", "models", tensors, sides, sides, None, 1.0, 1)


def test_more_failures_than_are_shown_are_counted(capsys):
    failing = [TensorResult(f"h.{number}", (1,), "float32", 0.0, False, failure=f"h.{number}: bad")
               for number in range(12)]
    result_of(failing).print()
    assert "… and 2 more, in backward.json" in capsys.readouterr().out


def test_of_many_tensors_those_that_failed_or_differ_most_are_shown(capsys):
    tensors = [TensorResult(f"h.{number}", (1,), "float32", 0.0, number != 70,
                            Measures(0.0, 0.0, number / 1e3, 1.0, (), (0.0, 0.0))) for number in range(90)]
    result_of(tensors).print()
    told = capsys.readouterr().out
    names = re.findall(r"^ *h\.(\d+) ", told, re.M)
    assert list(map(int, names)) == list(range(50, 90)) and "… and 50 more, in backward.md" in told


def test_the_first_that_failed_is_shown_and_what_could_not_be_compared(capsys):
    tensors = [TensorResult(f"h.{number}", (1,), "float32", 0.0, False, None if number == 5 else
                            Measures(0.0, 0.0, number / 1e3, 1.0, (), (0.0, 0.0))) for number in range(60)]
    result_of(tensors).print()
    told = capsys.readouterr().out
    names = list(map(int, re.findall(r"^ *h\.(\d+) ", told, re.M)))
    assert names == [0, 5, *range(22, 60)] and "… and 20 more, 20 of them FAIL, in backward.md" in told


def test_a_report_that_cannot_be_saved_says_so(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match="cannot be made a directory"):
            result_of([]).save(place)


def test_a_name_is_shown_as_it_is(capsys):
    result_of([TensorResult("greedy [prompt 2]", (1,), "float32", 0.0, True)]).print()
    assert "greedy [prompt 2]" in capsys.readouterr().out


def test_what_cancels_is_no_part_of_the_largest_error_that_is_told():
    """The gradient of a key's bias is 0 by mathematics: 1.5e-9 against 0.5e-9 says nothing of how well two sides agree.
    """
    noisy = NoiseFloor(np.array([[1e-9, 1e-9]]), np.array([[1e-9, 1e-9]], np.float32), 1e-9)
    zero = compare("bias", np.float32([1e-9, 1e-9]), np.float32([2e-9, 1e-9]), np.inf, None, {"propagated": noisy})
    right = compare("weight", np.float32([1.0, 1.0]), np.float32([1.0, 1.0 + 2**-20]), np.inf)
    assert zero.measures.rel_l2 > 0.5
    told = result_of([right, zero]).summary()
    assert "relative L2 at most 6.7e-07 (1 that torch itself does not know to 0.01 left out)" in told


def test_nothing_else_ends_in_json(workshop, outcomes):
    found = {str(file.relative_to(workshop.reports)) for file in workshop.reports.rglob("*.json")}
    assert found == {f"gptj/{stage}.json" for stage in ("convert", *STAGES)}


@pytest.mark.parametrize("stage", TRACED)
def test_reprod_log_opens_the_traces(workshop, outcomes, stage):
    helper, traces = ReprodDiffHelper(), workshop.reports / "gptj" / "traces"
    sides = [helper.load_info(str(traces / f"{stage}_{framework}.npy")) for framework in ("torch", "paddle")]
    helper.compare_info(*sides)
    assert set(helper.diff_dict) == set(sides[0])
    assert all(diff["mean"] <= 1e-5 * max(1.0, np.abs(sides[0][name]).mean())
               for name, diff in helper.diff_dict.items())
    assert set(sides[0]) == set(sides[1]) and all(isinstance(array, np.ndarray) for array in sides[0].values())
    assert "check passed: True" in (traces / f"{stage}_diff.txt").read_text()


@pytest.mark.parametrize("stage", TRACED)
def test_traces_carry_their_provenance(workshop, outcomes, stage):
    one, other = (json.loads((workshop.reports / "gptj" / "traces" / f"{stage}_{framework}.provenance").read_text())
                  for framework in ("torch", "paddle"))
    assert (one["framework"], other["framework"]) == ("torch", "paddle")
    assert one["inputs_digest"] == other["inputs_digest"] == outcomes[stage].report["inputs_digest"]
    assert one["source_digest"] == other["source_digest"] == outcomes[stage].report["reference"]["weights_digest"]


def test_stages_in_one_process_leave_no_log_handlers_behind(workshop, outcomes):
    before = list(logging.getLogger().handlers)
    workshop.align_all("gptj")
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_run_twice_gives_the_same_inputs_and_numbers(workshop, outcomes, stage):
    again = workshop.align(stage, "gptj").report
    for key in ("inputs_digest", "tensors", "verdict", "values"):
        assert again[key] == outcomes[stage].report[key], key


def test_each_stage_has_inputs_of_its_own(outcomes):
    digests = [outcomes[stage].report["inputs_digest"] for stage in TRACED]
    assert len(set(digests)) == 3 and all(digests)


def test_the_latest_run_is_the_latest_conversion(tmp_path):
    workshop = Workshop(tmp_path)
    workshop.make("GPTJModel", "z-first")
    workshop.make("BertModel", "a-last")
    outcome = workshop.align("weights", None)
    assert outcome.code == 0
    assert json.loads((workshop.reports / "a-last" / "weights.json").read_text())["run"] == "a-last"
    assert not (workshop.reports / "z-first" / "weights.json").exists()
