"""The example in the repository is what ``make example`` makes, and says what it is meant to say."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from align import example

TRACKED = Path(__file__).resolve().parents[1] / "reports" / "example"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("example"))
        assert example.main() == 0
        yield Path("reports/example").resolve()


def stages(directory):
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(directory.glob("*.json"))}


@pytest.mark.parametrize("place", ["made", "tracked"])
def test_one_passes_in_every_stage_and_the_other_names_the_parameter(made, place):
    directory = made if place == "made" else TRACKED
    passing, failing = (stages(directory / run) for run in (example.PASSING, example.FAILING))
    assert passing.pop("convert")["verified"] and failing.pop("convert")["verified"]
    assert {stage: found["verdict"] for stage, found in passing.items()} == dict.fromkeys(
        ("weights", "forward", "metric", "loss"), "aligned")
    assert {stage: found["verdict"] for stage, found in failing.items()} == dict.fromkeys(
        ("weights", "forward"), "diverged")
    assert {found["first_divergence"] for found in failing.values()} == {example.LEFT_ALONE}
    told = failing["forward"]["diagnosis"]
    assert told["kind"] == "transposed-weight" and told["before"] > 0.1 and told["after"] < 1e-6


@pytest.mark.parametrize("place", ["made", "tracked"])
def test_the_known_story_ends_at_the_number_of_heads(made, place):
    """Weights equal bit by bit, norms and linears and the activation right: not gelu, not Conv1D, no pruned heads."""
    found = stages((made if place == "made" else TRACKED) / example.STORY)
    assert found["weights"]["verdict"] == "aligned" and found["forward"]["verdict"] == "diverged"
    told = found["forward"]["diagnosis"]
    assert told["kind"] == "head-count" and "heads are 12 instead of 8" in told["sentence"]
    assert told["before"] > 0.1 and told["after"] < 1e-6
    parts = {part["name"]: part["passed"] for part in found["forward"]["sublayers"]}
    assert {name.partition(": ")[2] for name, passed in parts.items() if not passed} == {
        "attention: scale, mask, softmax, before self_attn.out_proj"}
    assert parts["gpt.decoder.layers.1: mlp activation, before linear2"]


def test_what_is_tracked_has_the_figures_that_are_made(made):
    """Digests, and which tensors pass; times, versions and the last digits differ."""
    def figures(stage, found):
        if stage == "convert":
            return found["source_digest"], found["target_digest"]
        return (found["inputs_digest"], found["candidate"]["weights_digest"], found["named"],
                [(tensor["name"], tensor["passed"]) for tensor in [*found["tensors"], *found["sublayers"]]])
    for run in (example.PASSING, example.FAILING, example.STORY):
        for stage, found in stages(made / run).items():
            assert figures(stage, stages(TRACKED / run)[stage]) == figures(stage, found), (run, stage)


def test_pages_are_whole_and_small_and_say_nothing_of_the_machine():
    files = [file for file in TRACKED.rglob("*") if file.is_file()]
    places = [f"{place}/" for place in (Path.home(), tempfile.gettempdir(), TRACKED.parents[2], "/home")]
    assert {file.name for file in files} >= {"index.html", "forward.md", "forward.json", "convert.md"}
    for file in files:
        text = file.read_text("utf-8")
        assert file.stat().st_size < 300_000 and not file.match("traces/*")
        assert not any(word in text for word in places), file
