"""``python -m benchmarks``: the checkpoints it makes, the ratios it takes, the tables it writes, the way it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import call
from safetensors import safe_open
from safetensors.numpy import load_file

from benchmarks import __main__ as command
from benchmarks.bench import ROOT, Bench, Unmeasured, settle, without_paths
from benchmarks.claim import Claim, Limit, Measured, absolute, growth, paired, ratios_of
from benchmarks.claims import CLAIMS
from benchmarks.claims.copy import beside_cp
from benchmarks.claims.paging import differing_tensors
from benchmarks.results import (
    BEGIN,
    END,
    FAILED,
    HOLDS,
    MISSED,
    TOLD,
    Outcome,
    judge,
    load,
    machine,
    outcome_of,
    publish,
    published,
    save,
    table,
)
from benchmarks.shapes import FULL, SCALES, SMALL, Shape
from benchmarks.synthetic import make_checkpoint, outliers, scales_of, values
from convert.checkpoint import open_checkpoint
from convert.errors import BadInput

GPTJ = Shape("GPTJForCausalLM", layers=2, hidden=32, heads=2, vocab=100, positions=16)
BERT = Shape("BertForPreTraining", layers=2, hidden=32, heads=2, vocab=100, positions=16, dtype="float32",
             container="bin")
TINY = replace(SCALES[SMALL], copied=GPTJ, float32=replace(GPTJ, dtype="float32"), pairs=2, starts=2)
MACHINE = {"cores": 2, "memory_bytes": 8 << 30, "processor": "Some CPU", "system": "Linux 6", "file_system": "ext4",
           "omp_num_threads": None, "versions": {"python": "3.11", "paddlenlp": None}}


TENTH_MORE = Limit(1.1, "x")


def claim(name: str = "some.claim", measure=lambda bench: paired([1.0], [2.0], "s"), limit: Limit | None = TENTH_MORE,
          timed: bool = False) -> Claim:
    return Claim(name, "what is claimed", limit, "a rival", measure, timed=timed)


def outcome(name: str = "some.claim", judgement: str = HOLDS, measured: Measured | None = None,
            why: str | None = None) -> Outcome:
    return Outcome(name, "what is claimed", "a rival", Limit(1.1, "x"), judgement, measured, why, 1.5, "2026-11-21")


@pytest.fixture
def run(workdir: Path):
    """``run(*arguments)``: code, stdout and stderr of the command, its results and scratch in ``workdir``."""
    def command_line(*arguments: str) -> tuple[int, str, str]:
        places = ["--results", "results.json", "--readme", "README.md", "--directory", "scratch"]
        return call(lambda: command.main([*places, *arguments], {SMALL: TINY, FULL: TINY}))
    return command_line


# the synthetic checkpoint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_transformers_loads_what_is_made(tmp_path: Path, dtype: str, container: str):
    for shape in (GPTJ, BERT):
        shape = replace(shape, dtype=dtype, container=container)
        source = make_checkpoint(shape, tmp_path / shape.name)
        model, told = getattr(transformers, shape.architecture).from_pretrained(source, output_loading_info=True)
        assert not any(told.values())
        with torch.no_grad():
            scores = model.float().eval()(torch.arange(16).reshape(1, 16))[0]
        assert torch.isfinite(scores).all() and scores.std() > 0.1


def test_torch_and_convert_read_the_same_bits_from_a_zip(tmp_path: Path):
    source = make_checkpoint(BERT, tmp_path / "bert")
    loaded = torch.load(source / "pytorch_model.bin", weights_only=True)
    with open_checkpoint(source) as checkpoint:
        assert loaded.keys() == checkpoint.tensors.keys() == {tensor.name for tensor in BERT.tensors}
        for name, tensor in loaded.items():
            assert np.array_equal(tensor.numpy(), checkpoint.read(name))


def test_both_containers_and_shards_hold_the_same_values(tmp_path: Path):
    whole = load_file(make_checkpoint(GPTJ, tmp_path / "whole") / "model.safetensors")
    zipped = torch.load(make_checkpoint(replace(GPTJ, container="bin"), tmp_path / "zip") / "pytorch_model.bin",
                        weights_only=True)
    sharded = make_checkpoint(replace(GPTJ, shard_bytes=20_000), tmp_path / "shards")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(sharded.glob("*.safetensors"))
    assert {file.name for file in files} == set(index.values()) and len(files) > 2
    parts = {name: array for file in files for name, array in load_file(file).items()}
    assert whole.keys() == zipped.keys() == parts.keys() == index.keys()
    for name, array in whole.items():
        assert np.array_equal(array, zipped[name].numpy()) and np.array_equal(array, parts[name])


def test_equal_seeds_equal_bytes(tmp_path: Path):
    made = [make_checkpoint(GPTJ, tmp_path / name, seed) / "model.safetensors"
            for name, seed in (("one", 1), ("again", 1), ("other", 2))]
    one, again, other = (file.read_bytes() for file in made)
    assert one == again != other


def test_the_header_says_pt_and_has_every_tensor(tmp_path: Path):
    with safe_open(make_checkpoint(GPTJ, tmp_path / "gptj") / "model.safetensors", "np") as file:
        names = file.keys()
        assert file.metadata() == {"format": "pt"}
        assert {name: tuple(file.get_slice(name).get_shape()) for name in names} == {
            tensor.name: tensor.shape for tensor in GPTJ.tensors}
    assert os.path.getsize(tmp_path / "gptj" / "model.safetensors") > GPTJ.nbytes


def test_weights_are_like_trained_ones():
    shape = replace(GPTJ, hidden=256, layers=1)
    for tensor in shape.tensors:
        drawn = values(tensor, 0, 0, tensor.shape[0] if len(tensor.shape) == 2 else 1).astype(np.float64)
        if tensor.kind == "linear":
            channels = np.sqrt((drawn**2).mean(1))
            assert 8 < channels.max() / np.median(channels) < 60
            ordinary = drawn[channels < 5 * np.median(channels)]
            assert 0.7 < ordinary.std() * np.sqrt(drawn.shape[1]) < 2.2
            assert np.std(np.log(np.sqrt((ordinary**2).mean(1)))) > 0.1
            assert (ordinary**4).mean() / (ordinary**2).mean() ** 2 > 3.5
        elif tensor.kind == "norm":
            assert abs(np.median(drawn) - 1) < 0.1 and np.abs(drawn).max() > 5
        else:
            assert 0 < drawn.std() < 1


def test_large_channels_are_the_same_everywhere_and_few():
    factors = outliers(4096, 3)
    assert (factors > 1).sum() == 4 and (factors[factors > 1] >= 10).all() and factors.max() <= 30
    assert np.array_equal(factors, outliers(4096, 3)) and not np.array_equal(factors, outliers(4096, 4))
    assert (outliers(1, 0) > 1).all()
    out = [tensor for tensor in GPTJ.tensors if tensor.name.endswith("out_proj.weight")]
    places = [scales_of(tensor, 3).rows[:, 0].argmax() for tensor in out]
    assert len(set(places)) == 1


def test_memory_of_making_does_not_grow_with_the_model(tmp_path: Path):
    """How much of the chunks ahead is held at one time is the scheduler's: a tenth or two of one peak, little beside
    151 MB of layers."""
    small = replace(GPTJ, hidden=1024, vocab=1024)
    few, many = (small.layered(layers) for layers in (2, 8))
    peaks = [_peak_of_making(shape, tmp_path) for shape in (few, many)]
    added = many.nbytes - few.nbytes
    assert added > 150e6 and peaks[1] - peaks[0] < added / 5 and max(peaks) < 200e6


def _peak_of_making(shape: Shape, directory: Path) -> int:
    program = (f"from benchmarks.shapes import Shape; from benchmarks.synthetic import make_checkpoint; "
               f"from pathlib import Path; make_checkpoint({shape!r}, Path('made'))")
    bench = Bench(TINY, directory)
    try:
        return bench.python("-c", program).peak_rss
    finally:
        shutil.rmtree(directory / "made")


def test_shapes_at_full_size():
    full = SCALES[FULL]
    assert full.large.layers == 28 and len(full.large.tensors) == 285
    assert full.large.nbytes == 12_101_765_568 and full.copied.nbytes == 2_436_712_896
    assert len({shape.name for shape in (full.copied, full.large, full.float32, full.zipped, full.bert)}) == 5


# measuring


def test_memory_of_a_command_is_its_own_and_not_ours(tmp_path: Path):
    ballast = np.ones(40_000_000)
    ran = Bench(TINY, tmp_path).python("-c", "print('said')")
    assert ran.peak_rss < 60e6 < ballast.nbytes and ran.seconds > 0 and ran.output == "said\n"
    assert Bench(TINY, tmp_path).python("-c", "x = bytearray(200_000_000)").peak_rss > 200e6


def test_a_command_that_fails_is_told_without_directories(tmp_path: Path):
    bench = Bench(TINY, tmp_path)
    with pytest.raises(Unmeasured, match=re.escape("ended with code 1: OSError: no place.bin")) as told:
        bench.python("-c", f"raise OSError('no {tmp_path}/place.bin')")
    assert str(tmp_path) not in str(told.value)
    assert bench.python("-c", "raise SystemExit(7)", accept=(0, 7)).code == 7
    with pytest.raises(Unmeasured, match="could not be started"):
        bench.run("no-such-command-anywhere")


def test_paths_lose_their_directories():
    assert without_paths("a /tmp/x/model.bin b") == "a model.bin b"
    assert without_paths("https://host/a/b and 3/4 and out/run") == "https://host/a/b and 3/4 and out/run"


def test_who_goes_first_changes(tmp_path: Path):
    order: list[str] = []
    ours, rival = Bench(TINY, tmp_path).alternately("it", lambda: order.append("ours") or 1.0,
                                                    lambda: order.append("rival") or 2.0, 3)
    assert order == ["ours", "rival", "rival", "ours", "ours", "rival"] and (ours, rival) == ([1.0] * 3, [2.0] * 3)


def test_settling_reads_and_drops(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"1" * 100_000)
    for warm in (True, False):
        settle(tmp_path, warm=warm)
    assert (tmp_path / "file").read_bytes() == b"1" * 100_000


def test_ratios_are_taken_pair_by_pair():
    assert ratios_of([1, 6, 3], [2, 3, 4]) == [0.5, 2, 0.75]
    measured = paired([1, 6, 3], [2, 3, 4], "s")
    assert (measured.value, measured.ratio, measured.spread, measured.n) == (0.75, 0.75, (0.5, 2), 3)
    inverse = paired([1, 1, 1], [8, 10, 9], "s", inverse=True)
    assert inverse.value == pytest.approx(9) and inverse.ratio == pytest.approx(1 / 9)
    with pytest.raises(ValueError):
        ratios_of([1], [1, 2])


def test_absolute_values_and_growth():
    measured = absolute([80e6, 100e6, 90e6], [900e6], "B", scale=1e6, pick=max)
    assert (measured.value, measured.spread, measured.ratio) == (100, (80, 100), pytest.approx(0.1))
    assert absolute([1.0], (), "s").ratio is None
    grown = growth({4: 100_000_000, 14: 98_000_000, 28: 102_900_000})
    assert grown.value == pytest.approx(5) and grown.n == 3
    assert grown.notes == ("100 MB with 4, 98 MB with 14, 103 MB with 28 layers.",)


def test_limits():
    assert Limit(1.1, "x").holds(1.1) and not Limit(1.1, "x").holds(1.2)
    assert Limit(8, "x", at_least=True).holds(9) and not Limit(8, "x", at_least=True).holds(7.9)
    assert str(Limit(8, "times as fast", at_least=True)) == "at least 8 times as fast"


def test_times_are_judged_at_full_size_only():
    slow = paired([3.0], [1.0], "s")
    assert judge(claim(timed=True), slow, full=False) == TOLD
    assert judge(claim(timed=True), slow, full=True) == MISSED
    assert judge(claim(timed=False), slow, full=False) == MISSED
    assert judge(claim(limit=None), slow, full=True) == TOLD
    assert judge(claim(), absolute([1.0], (), "s"), full=True) == HOLDS


def test_reports_that_differ_in_any_number_are_told():
    one = {"tensors": [{"name": "a", "rel_l2": 1.0}, {"name": "b", "rel_l2": 2.0}]}
    other = {"tensors": [{"name": "a", "rel_l2": 1.0}, {"name": "b", "rel_l2": np.nextafter(2.0, 3)}]}
    assert differing_tensors(one, one) == [] and differing_tensors(one, other) == ["b"]
    assert differing_tensors(one, {"tensors": one["tensors"][:1]}) == ["b"]
    assert differing_tensors(one, {"tensors": one["tensors"][::-1]}) == ["a", "b"]


# results


def test_the_table_has_a_row_for_each_claim():
    rows = [outcome(measured=paired([1.2, 1.4], [2.0, 2.0], "s", notes=("small.",))),
            outcome("other.claim", FAILED, why="It broke."),
            outcome("third", MISSED, absolute([2e6, 3e6], [5e9], "B", scale=1e6, pick=max))]
    text = table(SMALL, rows, MACHINE)
    lines = text.splitlines()
    assert all(line.count("|") == 7 for line in lines if line.startswith("|"))
    assert lines[2] == ("| what is claimed (`some.claim`) | 1.3 s | a rival: 2.0 s | 0.65 x (0.6 to 0.7, 2) "
                        "| at most 1.1 x | ok |")
    assert "| – | a rival | – | at most 1.1 x | **failed** |" in lines[3]
    assert "| 2 MB | a rival: 5.00 GB | 3 x (2 to 3, 2) 0.0005 x the rival | at most 1.1 x | **missed** |" in lines[4]
    assert "- `some.claim`: small." in lines and "- `other.claim`: It broke." in lines
    assert lines[-1].startswith("`python -m benchmarks` on 2 cores of Some CPU, 8 GiB") and "paddlenlp" not in lines[-1]


def test_results_are_kept_by_scale_and_by_claim(tmp_path: Path):
    file = tmp_path / "deep" / "results.json"
    first, second = outcome("a", measured=paired([1.0], [2.0], "s")), outcome("b", FAILED, why="No.")
    save(file, SMALL, [first, second], MACHINE)
    newer = outcome("a", MISSED, paired([3.0], [2.0], "s"))
    held = save(file, SMALL, [newer], MACHINE)
    assert [outcome_of(found) for found in held["scales"][SMALL]["claims"]] == [newer, second]
    save(file, FULL, [first], MACHINE)
    assert load(file)["scales"].keys() == {SMALL, FULL}
    assert "--full" in published(load(file)).splitlines()[-1]
    elsewhere = save(file, SMALL, [newer], MACHINE | {"cores": 64})
    assert len(elsewhere["scales"][SMALL]["claims"]) == 1


def test_the_machine_has_no_name_and_no_path(tmp_path: Path):
    text = json.dumps(machine(tmp_path))
    assert os.uname().nodename not in text and str(tmp_path) not in text and not re.search(r'"/', text)


def test_the_readme_is_written_between_its_markers(tmp_path: Path):
    readme = tmp_path / "README.md"
    assert not publish(readme, "table")
    readme.write_text("no markers")
    assert not publish(readme, "table") and readme.read_text() == "no markers"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert publish(readme, "table") and publish(readme, "table")
    assert readme.read_text() == f"before\n{BEGIN}\ntable\n{END}\nafter\n"


# the command


def test_start_from_end_to_end(run, workdir: Path):
    (workdir / "README.md").write_text(f"{BEGIN}{END}")
    code, out, err = run("--only", "start")
    assert code == 0, err
    assert "`start.help`" in out and "`start.rules`" in out and "start.help: told" in err
    found = json.loads((workdir / "results.json").read_text())["scales"][SMALL]
    assert [claim["measured"]["n"] for claim in found["claims"]] == [2, 2]
    assert all(claim["measured"]["value"] > 0 for claim in found["claims"])
    assert "`start.rules`" in (workdir / "README.md").read_text()
    assert sorted(path.name for path in workdir.iterdir()) == ["README.md", "results.json"]


def test_a_copy_from_end_to_end(run, workdir: Path):
    code, out, err = run("--only", "copy.stream")
    assert code == 0, err
    measured = json.loads((workdir / "results.json").read_text())["scales"][SMALL]["claims"][0]["measured"]
    assert measured["n"] == 2 and len(measured["rival"]) == 2 and measured["ratio"] > 0
    assert "in the page cache" in out and not (workdir / "scratch").exists()


def test_neither_side_of_a_copy_leaves_anything(tmp_path: Path):
    bench = Bench(TINY, tmp_path)
    beside_cp(bench, GPTJ, 1, "--no-verify", warm=False)
    assert [path.name for path in (tmp_path / "sources").iterdir()] == [GPTJ.name]
    assert not (tmp_path / "copied").exists()
    bench.wanted = frozenset([GPTJ])
    bench.release(GPTJ)
    assert bench.source(GPTJ).exists()
    bench.wanted = frozenset()
    bench.release(GPTJ)
    assert not list((tmp_path / "sources").iterdir())


def test_a_claim_that_fails_stops_no_other(run, monkeypatch: pytest.MonkeyPatch, workdir: Path):
    def broken(bench: Bench) -> Measured:
        raise Unmeasured("the rival is gone.")

    def crashed(bench: Bench) -> Measured:
        raise ZeroDivisionError(f"at {workdir}/secret/place.py")

    monkeypatch.setattr(command, "CLAIMS", (claim("a", broken), claim("b", crashed), claim("c")))
    code, out, err = run()
    assert code == 1
    assert "a: failed, the rival is gone." in err and "b: failed, ZeroDivisionError: at place.py" in err
    assert "c: holds" in err and out.count("**failed**") == 2
    assert str(workdir) not in (workdir / "results.json").read_text()


def test_a_missed_limit_is_exit_code_1(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "CLAIMS", (claim(measure=lambda bench: paired([3.0], [1.0], "s")),))
    assert run()[0] == 1


def test_an_interruption_deletes_what_was_made_and_keeps_what_was_measured(run, monkeypatch: pytest.MonkeyPatch,
                                                                           workdir: Path):
    def interrupted(bench: Bench) -> Measured:
        bench.source(GPTJ)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "CLAIMS", (claim("a"), claim("b", interrupted)))
    assert run()[0] == 130
    assert [path.name for path in workdir.iterdir()] == ["results.json"]
    assert [found["name"] for found in load(workdir / "results.json")["scales"][SMALL]["claims"]] == ["a"]


def test_keep_keeps(run, monkeypatch: pytest.MonkeyPatch, workdir: Path):
    kept = claim("a", lambda bench: paired([float(bench.source(GPTJ).exists())], [1.0], "s"))
    monkeypatch.setattr(command, "CLAIMS", (kept,))
    assert "kept: scratch/benchmarks-" in run("--keep")[2]
    assert list(workdir.glob(f"scratch/benchmarks-*/sources/{GPTJ.name}/model.safetensors"))


def test_bad_input_gets_a_sentence(run, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    for arguments, says in ((["--only", "nonsense"], "names no claim"),
                            (["--only", "copy.large"], "add --full"),
                            (["--only", "start", "--directory", "file"], "is a file")):
        (workdir / "file").write_text("")
        code, _, err = run(*arguments)
        assert code == 2 and says in err and "Traceback" not in err
    (workdir / "results.json").write_text("[]")
    code, _, err = run("--only", "start")
    assert code == 2 and "holds no results" in err
    (workdir / "results.json").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))
    code, _, err = run("--only", "copy")
    assert code == 2 and "are needed" in err
    assert [path.name for path in workdir.iterdir()] == ["file"]


def test_the_disk_that_is_needed():
    full = SCALES[FULL]
    chosen = command.choose(None, full)
    assert 35e9 < command.disk_needed(chosen, full) < 60e9
    assert command.disk_needed(command.choose(["start"], full), full) == 0
    one = command.disk_needed(command.choose(["copy.stream"], full), full)
    assert 2.1 * full.copied.nbytes < one < 3.5 * full.copied.nbytes


def test_the_list(run):
    code, out, _ = run("--list")
    assert code == 0 and "| script |" in out and "copy.large" not in out
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    with pytest.raises(BadInput):
        command.choose(["copies"], TINY)


def test_the_module_can_be_run():
    found = subprocess.run([sys.executable, "-m", "benchmarks", "--full", "--list"], cwd=ROOT, capture_output=True,
                           text=True, check=False)
    assert found.returncode == 0 and "copy.large" in found.stdout
