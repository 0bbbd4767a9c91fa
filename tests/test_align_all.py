"""``python -m align``: all stages, each in its own process; what is repeated, what is not, and what is handed in."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from align_fixtures import Workshop
from reprod_log import ReprodDiffHelper

from align import __main__ as program
from align import done
from align.done import FILE, Done
from align.page import BESIDE, ORDER, stage_names
from align.runs import load_run
from align.stage import add_flags
from align.submission import MARK, lay_out, require_free
from convert import gptj
from convert.errors import BadInput
from convert.report import SCHEMA

OPTIONS = SimpleNamespace(run="gptj", target="models", device="cpu", paging="auto", allow_same_framework=False,
                          trust_remote_code=False, family=None)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    """One conversion, its stages carried out once, for the tests that only look."""
    made = Workshop(tmp_path_factory.mktemp("all"))
    made.make("GPTJForCausalLM", "gptj", tokenizer=True)
    return made


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A run whose stages write a report and end as told, and the list of those that were started."""
    made = Workshop(tmp_path)
    made.make("GPTJForCausalLM", "gptj", tokenizer=True)
    started: list[str] = []
    codes: dict[str, int] = {}

    def run(command: list[str], **_):
        stage = command[2].removeprefix("align.")
        started.append(stage)
        code = codes.get(stage, 0)
        (made.reports / "gptj" / f"{stage}.json").write_text(json.dumps({
            "schema": SCHEMA, "stage": stage, "verdict": "diverged" if code else "aligned"}))
        if code in (0, 1) and "--compare" not in command:
            parser = argparse.ArgumentParser()
            add_flags(parser)
            options = parser.parse_args(command[3:])
            Done.of(load_run("gptj", made.reports), made.reports / "gptj", options).put(stage, code)
        return SimpleNamespace(returncode=code)
    monkeypatch.setattr(program.subprocess, "run", run)
    return SimpleNamespace(workshop=made, started=started, codes=codes, run=lambda *flags: program.run_all(
        ["--run", "gptj", "--reports", str(made.reports), *flags]))


def test_the_stages_are_those_of_the_guide_that_there_are():
    files = {file.stem for file in Path(program.__file__).parent.glob("*.py")}
    assert stage_names() == [name for name in ORDER if name in files - BESIDE]
    assert stage_names()[:1] == ["weights"] and {"forward", "metric", "loss"} <= set(stage_names())


def test_a_stage_is_a_process_of_its_own(workshop, monkeypatch, capfd):
    monkeypatch.setattr(program, "stage_names", lambda: ["weights"])
    arguments = ["--run", "gptj", "--reports", str(workshop.reports), "--again"]
    assert program.run_all(arguments) == 0
    assert "weights: aligned." in capfd.readouterr().out
    file = next((workshop.root / "out" / "gptj").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\xff\x3f")
    try:
        assert program.run_all(arguments) == 1
    finally:
        file.write_bytes(whole)
    assert "weights diverged" in capfd.readouterr().out


def test_all_stages_of_a_real_run_and_what_is_handed_in(workshop, tmp_path, capfd, monkeypatch):
    """In this process, so that the frameworks are imported once."""
    def run(command):
        module = import_module(command[2])
        return SimpleNamespace(returncode=module.main(module.STAGE, command[3:]))
    monkeypatch.setattr(program.subprocess, "run", run)
    place = tmp_path / "to-review"
    code = program.run_all(["--run", "gptj", "--reports", str(workshop.reports), "--submission", str(place)])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert [line.split(":")[0] for line in out.splitlines() if ": aligned." in line] == stage_names()
    assert f"\npage: {workshop.reports / 'gptj' / 'index.html'}\n" in out[out.index("weights aligned;"):]
    page = (workshop.reports / "gptj" / "index.html").read_text("utf-8")
    assert all(f">{name}<" in page for name in stage_names())
    for step, name in ((1, "forward"), (2, "metric"), (3, "loss")):
        folder = place / "pipeline" / f"Step{step}"
        helper = ReprodDiffHelper()
        torch, paddle = (helper.load_info(str(folder / f"{name}_{side}.npy")) for side in ("torch", "paddle"))
        assert torch.keys() == paddle.keys() and all(np.allclose(torch[key], paddle[key], atol=1e-4) for key in torch)
        assert "check passed: True" in (folder / f"{name}_diff.log").read_text("utf-8")
    readme = (place / "README.md").read_text("utf-8")
    for step, name in ((4, "bp_align"), (5, "train_align")):
        assert (place / "pipeline" / f"Step{step}").is_dir()
        assert (f"pipeline/Step{step}/{name}_*" in readme) is not (
            place / "pipeline" / f"Step{step}" / f"{name}_torch.npy").is_file()
    rows = [line for line in readme.splitlines() if line.startswith("| Step")]
    told = {word for row in rows for word in re.findall(r"`([\w.]+)`", row)}
    assert {file.name for file in (place / "pipeline").rglob("*") if file.is_file()} <= told

    again = program.run_all(["--run", "gptj", "--reports", str(workshop.reports), "--submission", str(place)])
    out = capfd.readouterr().out
    assert again == 0 and out.count("as before") == len(stage_names()) and ": aligned." not in out


def test_what_is_done_and_unchanged_is_not_repeated(stubbed):
    assert stubbed.run() == 0 and stubbed.started == stage_names()
    stubbed.started.clear()
    assert stubbed.run() == 0 and stubbed.started == []
    assert stubbed.run("--again") == 0 and stubbed.started == stage_names()


def test_a_command_that_is_refused_leaves_what_was_done(workshop, monkeypatch, capfd):
    monkeypatch.setattr(program, "stage_names", lambda: ["metric"])
    arguments = ["--run", "gptj", "--reports", str(workshop.reports)]
    assert workshop.align("metric", "gptj").code == 0
    report = workshop.reports / "gptj" / "metric.json"
    before = report.read_bytes()
    module = import_module("align.metric")
    assert module.main(module.STAGE, [*arguments, "--prefix", "say: "]) == 2
    assert report.read_bytes() == before
    capfd.readouterr()
    assert program.run_all(arguments) == 0 and "metric: aligned, as before" in capfd.readouterr().out


def turned_over(file):
    """The last bit is another one."""
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))


def test_what_was_carried_out_by_itself_is_not_repeated(workshop, monkeypatch, capfd):
    """Unless it was asked for something else, or from recordings. One that came to no verdict leaves the last one."""
    arguments = ["--run", "gptj", "--reports", str(workshop.reports)]

    def by_itself(*flags):
        return import_module("align.forward").main(import_module("align.forward").STAGE, [*arguments, *flags])

    def is_done():
        run = load_run("gptj", workshop.reports)
        return Done.of(run, run.directory, OPTIONS).code("forward") is not None
    assert by_itself() == 0 and is_done()
    monkeypatch.setattr(program, "stage_names", lambda: ["forward"])
    assert program.run_all(arguments) == 0 and "as before" in capfd.readouterr().out
    assert by_itself("--rows", "3") == 0 and not is_done()
    arguments[:] = arguments[2:]
    assert by_itself() == 0 and is_done()
    assert by_itself() == 0 and is_done()
    assert by_itself("--only", "reference") == by_itself("--only", "candidate") == by_itself("--compare") == 0
    assert not is_done()
    assert by_itself() == 0 and is_done()
    monkeypatch.setattr("align.recording.findings_of", lambda *_: (_ for _ in ()).throw(BadInput("no")))
    assert by_itself() == 2 and is_done()


@pytest.mark.parametrize("change", [
    lambda run: turned_over(next(run.source.glob("*.safetensors"))),
    lambda run: (run.output / "config.json").write_text("{}"),
    lambda run: (run.directory / "forward.json").write_text("{}"),
])
def test_what_has_changed_is_repeated(stubbed, change):
    assert stubbed.run() == 0
    stubbed.started.clear()
    change(load_run("gptj", stubbed.workshop.reports))
    assert stubbed.run() == 0 and "forward" in stubbed.started


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "modeling_own.py"])
def test_what_lies_beside_a_checkpoint_that_is_one_file_counts_too(stubbed, name):
    source = stubbed.workshop.source("GPTJForCausalLM", "file", tokenizer=True)
    stubbed.workshop.convert("gptj", source / "model.safetensors", "gptj", "--overwrite")
    assert stubbed.run() == 0 and stubbed.run() == 0 and stubbed.started == stage_names()
    (source / name).write_text("# another", "utf-8") if name.endswith("py") else turned_over(source / name)
    beside = Done.of(load_run("gptj", stubbed.workshop.reports), stubbed.workshop.reports / "gptj", OPTIONS)
    assert beside.code("forward") is None


def test_other_versions_and_other_code_are_repeated(stubbed, monkeypatch, tmp_path):
    run, directory = load_run("gptj", stubbed.workshop.reports), stubbed.workshop.reports / "gptj"
    (tmp_path / "code" / "models").mkdir(parents=True)
    (tmp_path / "code" / "models" / "net.py").write_text("one")
    monkeypatch.setattr(done, "CODE", tmp_path / "code")
    key = Done.of(run, directory, OPTIONS).key
    assert Done.of(run, directory, OPTIONS).key == key
    (tmp_path / "code" / "models" / "net.py").write_text("two")
    other = Done.of(run, directory, OPTIONS).key
    monkeypatch.setattr(done, "versions", lambda *names: dict.fromkeys(names, "9"))
    assert len({key, other, Done.of(run, directory, OPTIONS).key}) == 3


def test_a_large_file_that_was_written_at_the_same_time_is_another(stubbed, monkeypatch):
    monkeypatch.setattr(done, "READ_WHOLE", 0)
    run, directory = load_run("gptj", stubbed.workshop.reports), stubbed.workshop.reports / "gptj"
    key, file = Done.of(run, directory, OPTIONS).key, next(run.output.glob("*.safetensors"))
    seen = file.stat()
    turned_over(file)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert Done.of(run, directory, OPTIONS).key != key


def test_a_family_file_of_ones_own_is_judged_anew(stubbed):
    """What it imports, the net that is the reference above all, is not known."""
    for _ in range(2):
        stubbed.started.clear()
        assert stubbed.run("--family", str(Path(gptj.__file__))) == 0 and stubbed.started == stage_names()


def test_what_was_compared_from_recordings_is_not_known_of_the_output(stubbed):
    assert stubbed.run("--compare") == 0
    stubbed.started.clear()
    assert stubbed.run() == 0 and stubbed.started == stage_names()


def test_other_flags_and_nets_of_ones_own_are_repeated(stubbed):
    assert stubbed.run() == 0
    stubbed.started.clear()
    assert stubbed.run("--paging", "on") == 0 and stubbed.started == [name for name in stage_names() if name != "train"]
    (stubbed.workshop.reports / "gptj" / "my.net").mkdir()
    for _ in range(2):
        stubbed.started.clear()
        assert stubbed.run("--target", "my:net") == 0 and stubbed.started == stage_names()


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_stops_at_the_first_failure_with_its_code(stubbed, code, capsys):
    stubbed.codes["forward"] = code
    assert stubbed.run() == code
    assert stubbed.started[-1] == "forward" and "loss" not in stubbed.started
    assert re.search(r"forward \w.*not carried out: .*loss", capsys.readouterr().out)
    stubbed.started.clear()
    assert stubbed.run() == code
    assert stubbed.started == ([] if code == 1 else ["forward"])


def test_keep_going_ends_with_the_worst(stubbed):
    stubbed.codes |= {"weights": 1, "metric": 3, "loss": 2}
    assert stubbed.run("--keep-going") == 3 and stubbed.started == stage_names()


def test_a_stage_that_the_system_ends_is_no_verdict(stubbed, capsys):
    stubbed.codes["weights"] = -signal.SIGKILL
    assert stubbed.run() == 4
    assert "align.weights was ended by the system (signal 9)" in capsys.readouterr().err
    assert not (stubbed.workshop.reports / "gptj" / FILE).exists()


def test_an_interruption_ends_it_all(stubbed):
    stubbed.codes["weights"] = 130
    assert stubbed.run("--keep-going") == 130 and stubbed.started == ["weights"]


def test_sides_apart_are_recorded_every_time_and_weights_are_left_out(stubbed):
    for flags in (["--only", "reference"], ["--only", "candidate"], ["--compare"]):
        stubbed.started.clear()
        assert stubbed.run(*flags) == 0
        assert "weights" not in stubbed.started and "forward" in stubbed.started


def test_shared_flags_are_passed_on(stubbed, monkeypatch):
    commands = []
    monkeypatch.setattr(program.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(
        returncode=0))
    assert stubbed.run("--target", "paddlenlp", "--paging", "off", "--trust-remote-code", "--keep-going") == 0
    for command in commands:
        words = command[3:]
        assert words[words.index("--target") + 1] == "paddlenlp" and words[words.index("--paging") + 1] == "off"
        assert "--trust-remote-code" in words and "--keep-going" not in words and "--run" in words


def test_a_stage_for_which_a_run_has_nothing_is_passed_by(stubbed, monkeypatch, capsys):
    from align import metric
    monkeypatch.setattr(metric, "STAGE", replace(metric.STAGE, lacking=lambda run: f"{run.name} has no tokenizer."))
    assert stubbed.run() == 0
    assert stubbed.started == [name for name in stage_names() if name != "metric"]
    out = capsys.readouterr().out
    assert "metric: passed by. gptj has no tokenizer." in out and "not carried out" not in out


def test_a_run_that_does_not_exist_is_bad_input(stubbed, capsys):
    assert program.run_all(["--run", "absent", "--reports", str(stubbed.workshop.reports)]) == 2
    assert stubbed.started == [] and "there is no run absent" in capsys.readouterr().err


def test_a_damaged_note_of_what_was_done_counts_as_nothing(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe forward")
    assert Done(tmp_path, "key").code("forward") is None


def test_a_submission_replaces_only_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    with pytest.raises(BadInput, match="something else"):
        require_free(tmp_path / "mine")
    with pytest.raises(BadInput, match="something else"):
        lay_out(tmp_path, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "README.md").write_text(MARK)
    assert lay_out(tmp_path, tmp_path / "ours").is_file()


def test_a_recording_of_other_inputs_is_not_handed_in(tmp_path):
    reports = tmp_path / "reports"
    (reports / "traces").mkdir(parents=True)
    (reports / "forward.json").write_text(json.dumps(
        {"schema": SCHEMA, "inputs_digest": "one", "verdict": "aligned"}))
    for side, digest in (("torch", "one"), ("paddle", "two")):
        (reports / "traces" / f"forward_{side}.npy").write_bytes(b"")
        (reports / "traces" / f"forward_{side}.provenance").write_text(json.dumps({"inputs_digest": digest}))
    readme = lay_out(reports, tmp_path / "out").read_text("utf-8")
    assert not list((tmp_path / "out").rglob("*.npy"))
    assert "`pipeline/Step1/forward_*`: no recording of paddle belongs to this report." in readme


@pytest.mark.parametrize("part", ["framework", "version", "weights_digest"])
def test_a_recording_of_another_model_on_the_same_inputs_is_not_handed_in(tmp_path, part):
    reports, told = tmp_path / "reports", {"framework": "paddle", "version": "3", "weights_digest": "mine"}
    (reports / "traces").mkdir(parents=True)
    (reports / "forward.json").write_text(json.dumps({
        "schema": SCHEMA, "inputs_digest": "one", "verdict": "aligned", "reference": told, "candidate": told}))
    for side, more in (("torch", {}), ("paddle", {part: "another"})):
        (reports / "traces" / f"forward_{side}.npy").write_bytes(b"")
        (reports / "traces" / f"forward_{side}.provenance").write_text(json.dumps(
            {"inputs_digest": "one"} | told | more))
    readme = lay_out(reports, tmp_path / "out").read_text("utf-8")
    assert "`pipeline/Step1/forward_*`: no recording of paddle belongs to this report." in readme


def test_what_somebody_put_into_a_submission_is_not_lost(workshop, tmp_path):
    place, reports = tmp_path / "out", workshop.reports / "gptj"
    lay_out(reports, place)
    lay_out(reports, place)
    for mine in ("notes.md", "pipeline/Step1/my_net.py", "pipeline/Step2/forward.json"):
        (place / mine).write_text("mine")
        with pytest.raises(BadInput, match=f"{mine} was not laid out by paddle-parity and would be lost"):
            lay_out(reports, place)
        assert (place / mine).read_text() == "mine"
        (place / mine).unlink()
    lay_out(reports, place)


def test_a_place_where_nothing_can_be_laid_out_is_told_before_the_stages(stubbed, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for place, told in (("file/x/y", "is no directory that can be written to"), ("nowhere", "something else"),
                        ("file", "something else")):
        assert stubbed.run("--submission", str(tmp_path / place)) == 2
        assert told in capsys.readouterr().err and stubbed.started == []


def test_a_link_to_a_submission_of_ours_stays_a_link(tmp_path):
    lay_out(tmp_path, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lay_out(tmp_path, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "README.md").is_file()


def test_a_submission_holds_no_report_of_another_state(stubbed, tmp_path):
    """Loss was carried out before something changed, and is not come to any more."""
    place = tmp_path / "handed-in"

    def handed_in():
        readme = (place / "README.md").read_text("utf-8")
        return dict(re.findall(r"\| Step\d \| (\w+) \| ([^|]+?) \|", readme))
    stubbed.codes["forward"] = 1
    assert stubbed.run("--keep-going") == 1
    assert stubbed.run("--submission", str(place)) == 1
    assert handed_in()["loss"] == "aligned" and handed_in()["forward"] == "diverged"
    turned_over(next((stubbed.workshop.root / "out" / "gptj").glob("*.safetensors")))
    assert stubbed.run("--submission", str(place)) == 1
    assert handed_in() == {**dict.fromkeys(handed_in(), "–"), "weights": "aligned", "data": "aligned",
                           "forward": "diverged"}
    assert "may tell of another state of the run" in (place / "README.md").read_text("utf-8")
    stages = re.findall(r'<h3 id="stage-\d+">(\w+)', (place / "index.html").read_text("utf-8"))
    assert "forward" in stages and "loss" not in stages
