"""A run as a whole: all or nothing, the same bytes again, proof, report, names and flags."""

import fcntl
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import xxhash
from conftest import call, files_under
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

import convert.__main__ as by_config
import convert.bert
import convert.gptj
import convert.verify as verifying
import convert.writer as writing
from convert.writer import Staging

FAMILIES = {"gptj": convert.gptj.FAMILY, "bert": convert.bert.FAMILY}


@pytest.fixture
def source(checkpoint):
    return checkpoint()


def hidden_files(workdir):
    return sorted(path.name for path in workdir.rglob(".*"))


# --- all or nothing


def test_what_an_interrupted_run_left_is_removed_by_the_next(source, convert, workdir):
    left = workdir / "out" / ".run.staging"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "surplus").write_bytes(b"")
    (workdir / "out" / ".run.lock").touch()
    assert convert(source).code == 0
    assert hidden_files(workdir) == []
    assert {path.name for path in (workdir / "out" / "run").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "paddle_parity.json"}


def test_a_run_killed_between_its_two_renames_loses_nothing(source, convert, workdir):
    weights = convert(source).weights
    (workdir / "out" / "run").rename(workdir / "out" / ".run.replaced")
    again = convert(source)
    assert again.code == 2 and "--overwrite" in again.stderr
    assert again.weights == weights and hidden_files(workdir) == []


@pytest.mark.parametrize("error,code", [(KeyboardInterrupt, 130), (RuntimeError("broken"), 4)])
@pytest.mark.parametrize("where", ["convert.writer.Staging.write", "convert.stream._Worker.check",
                                   "convert.verify.verify", "convert.cli._bring_along"])
def test_whatever_happens_on_the_way_nothing_is_left(error, code, where, torch_model, tmp_path, convert, workdir,
                                                     monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(where, fail)
    model = torch_model("BertForPreTraining")
    model.save_pretrained(tmp_path / "source")
    run = convert(tmp_path / "source") if "check" not in where else convert(with_tied_copies(model, tmp_path / "tied"))
    assert run.code == code
    assert files_under(workdir) == {} and hidden_files(workdir) == []


def with_tied_copies(model, directory):
    import torch
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def test_a_fault_of_ours_is_one_sentence_and_a_log(source, convert, monkeypatch):
    monkeypatch.setattr(Staging, "write", lambda *_: 1 / 0)
    run = convert(source)
    log = re.fullmatch(r"error: ZeroDivisionError: division by zero\. This is a fault of paddle-parity; "
                       r"traceback in (\S+)\n", run.stderr)
    assert run.code == 4 and "Traceback" in Path(log[1]).read_text()
    Path(log[1]).unlink()


def test_two_runs_at_once(source, convert, workdir):
    (workdir / "out").mkdir()
    with open(workdir / "out" / ".run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = convert(source)
        assert run.code == 2 and "another conversion is writing to out/run" in run.stderr
    assert files_under(workdir / "out") == {".run.lock": b""}
    assert convert(source).code == 0


def test_a_lock_that_the_run_before_takes_away_is_none(source, convert, workdir, monkeypatch):
    """Between our opening the file and our locking it the other run ends, and a third one comes."""
    lock, plain, third = workdir / "out" / ".run.lock", fcntl.flock, []

    def overtaken(handle, how):
        if not third:
            lock.unlink()
            third.append(lock.open("w"))
            plain(third[0], fcntl.LOCK_EX)
        plain(handle, how)
    monkeypatch.setattr(writing.fcntl, "flock", overtaken)
    run = convert(source)
    assert run.code == 2 and "another conversion is writing to out/run" in run.stderr
    third[0].close()
    assert convert(source).code == 0 and hidden_files(workdir) == []


def test_an_output_that_is_a_link_stays_one(source, convert, workdir):
    """Its result is made where the link leads, and replaced there as often as one likes."""
    convert(source)
    (workdir / "disk").mkdir()
    (workdir / "out" / "run").rename(workdir / "disk" / "real")
    (workdir / "out" / "run").symlink_to(workdir / "disk" / "real")
    (workdir / "disk" / "real" / "old").write_text("")
    for _ in range(2):
        assert convert(source, "--overwrite").code == 0
        assert (workdir / "out" / "run").is_symlink() and hidden_files(workdir) == []
        assert "model.safetensors" in files_under(workdir / "disk" / "real")
        assert "old" not in files_under(workdir / "disk" / "real")


def test_a_source_within_the_output_is_not_lost(source, convert, workdir):
    inner = convert(source).output / "inner"
    shutil.copytree(source, inner)
    before = files_under(inner)
    run = convert(inner, "--overwrite")
    assert run.code == 2 and "would replace the source" in run.stderr
    assert files_under(inner) == before


@pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])
def test_no_shard_holds_more_than_was_asked_for_unless_it_is_one_tensor(source, convert, file_format):
    run = convert(source, "--shard-size", "3KB", "--format", file_format)
    held, widths = {}, {"F32": 4, "float32": 4}
    index = json.loads(next(run.output.glob("*.index.json")).read_text())["weight_map"]
    for tensor in run.report["tensors"]:
        size = widths[tensor["dtype"]] * math.prod(tensor["shape"])
        held.setdefault(index[tensor["target"]], []).append(size)
    assert len(held) > 3 and any(len(sizes) > 1 for sizes in held.values())
    assert all(sum(sizes) <= 3_000 or len(sizes) == 1 for sizes in held.values())


def test_an_output_that_appears_meanwhile_is_not_replaced(source, convert, workdir, monkeypatch):
    enter = Staging.__enter__

    def overtaken(staging):
        (workdir / "out" / "run").mkdir(parents=True)
        (workdir / "out" / "run" / "thesis.tex").write_text("years of work")
        return enter(staging)
    monkeypatch.setattr(Staging, "__enter__", overtaken)
    assert convert(source).code == 2
    assert files_under(workdir) == {"out/run/thesis.tex": b"years of work"}


# --- the same bytes, and proof


@pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])
def test_again_gives_the_same_bytes(file_format, source, convert):
    first = convert(source, "--format", file_format)
    files, report = files_under(first.output), first.report
    again = convert(source, "--format", file_format, "--overwrite")
    assert files_under(again.output) == files
    volatile = {"seconds", "peak_rss_bytes", "finished"}
    assert {key: value for key, value in again.report.items() if key not in volatile} == {
        key: value for key, value in report.items() if key not in volatile}


@pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])
@pytest.mark.parametrize("dtype", ["keep", "float16"])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.attn.q_proj.weight",
                                  "transformer.ln_f.bias", "transformer.h.0.attn.bias"])
def test_a_bit_that_flips_on_the_disk_is_named(name, dtype, file_format, source, convert, workdir, monkeypatch):
    verify, lay_out, places = verifying.verify, writing.make_layout, {}

    def after_a_flip(plan, checkpoint, result, *rest):
        file, offset = places[name]
        with open(result / file, "r+b") as handle:
            handle.seek(offset)
            byte = handle.read(1)[0]
            handle.seek(offset)
            handle.write(bytes([byte ^ 1]))
        return verify(plan, checkpoint, result, *rest)

    def remembering(*arguments):
        layout = lay_out(*arguments)
        places.update(layout.places)
        return layout
    monkeypatch.setattr(writing, "make_layout", remembering)
    monkeypatch.setattr(verifying, "verify", after_a_flip)
    run = convert(source, "--format", file_format, "--dtype", dtype)
    assert run.code == 4 and f"{name} read back is not" in run.stderr
    assert files_under(workdir) == {}


def test_no_verify_says_so(source, convert):
    proved = convert(source, output="out/proved")
    assert proved.report["verified"] is True and "bit-exact" in proved.stdout
    run = convert(source, "--no-verify")
    assert run.report["verified"] is False and "NOT verified" in run.stdout
    assert "**not verified** (`--no-verify`)" in (run.reports / "run" / "convert.md").read_text()
    assert run.weights == proved.weights


# --- the report


def test_the_report_has_what_scripts_stand_on(source, convert):
    run = convert(source, "--dtype", "float16")
    report = run.report
    assert {"schema", "run", "family", "stage", "source", "revision", "output", "format", "dtype", "tensors",
            "verified", "bytes", "source_digest", "target_digest", "seconds", "peak_rss_bytes"} <= report.keys()
    assert (report["run"], report["family"], report["stage"]) == ("run", "gptj", "convert")
    assert (report["source"], report["revision"], report["output"]) == (str(source), None, "out/run")
    assert (report["format"], report["dtype"], report["verified"]) == ("safetensors", "float16", True)
    assert report["seconds"] > 0 and report["peak_rss_bytes"] > 10**7
    held = load_file(run.output / "model.safetensors")
    assert report["bytes"] == sum(array.nbytes for array in held.values())
    for row in report["tensors"]:
        assert {"source", "target", "rule", "shape", "dtype", "transposed"} <= row.keys()
        assert held[row["target"]].dtype == row["dtype"]
        assert list(held[row["target"]].shape) == (row["shape"] or [1])
    assert {path.name for path in (run.reports / "run").iterdir()} == {"convert.json", "convert.md"}


def test_digests_are_xxh3_of_the_bytes(source, convert):
    run = convert(source)
    for side, file in (("source", source), ("target", run.output)):
        held = load_file(file / "model.safetensors")
        shapes = {row["target"]: row["shape"] for row in run.report["tensors"]} if side == "target" else {}
        each = {name: xxhash.xxh3_128(array.tobytes()).hexdigest() for name, array in held.items()}
        lines = [f"{name} {held[name].dtype} {shapes.get(name, list(held[name].shape))} {each[name]}\n"
                 for name in sorted(held)]
        assert run.report[f"{side}_digest"] == xxhash.xxh3_128("".join(lines).encode()).hexdigest()
        for row in run.report["tensors"]:
            assert row[f"{side}_digest"] == each.get(row[side])


def test_converting_again_replaces_the_reports_of_the_run(source, convert):
    run = convert(source)
    (run.reports / "run" / "forward.json").write_text("{}")
    (run.reports / "run" / "traces").mkdir()
    assert convert(source, "--overwrite").code == 0
    assert {path.name for path in (run.reports / "run").iterdir()} == {"convert.json", "convert.md"}


def test_a_report_directory_that_is_not_ours_keeps_its_files(source, convert, workdir):
    (workdir / "reports" / "run").mkdir(parents=True)
    (workdir / "reports" / "run" / "notes.txt").write_text("mine")
    assert convert(source).code == 0
    assert (workdir / "reports" / "run" / "notes.txt").read_text() == "mine"


# --- names and flags


def test_the_run_is_named_after_the_last_component(source, convert, workdir):
    shutil.copytree(source, workdir / "models" / "tiny")
    assert convert(source, output="deep/down/name/").report["run"] == "name"
    convert("models/tiny/", output=None)
    assert json.loads((workdir / "reports/tiny/convert.json").read_text())["output"] == "out/tiny"
    assert (workdir / "out/tiny/model.safetensors").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_arguments_is_the_demo_rebuilt_each_time(family, convert, workdir):
    for _ in range(2):
        run = convert(None, output=None, family=family)
        assert run.code == 0 and "--source" in run.stderr
    report = json.loads((workdir / f"reports/demo-{family}/convert.json").read_text())
    assert (report["run"], report["output"]) == (f"demo-{family}", f"out/demo-{family}")
    assert files_under(workdir).keys() >= {f"out/demo-{family}/vocab.{'json' if family == 'gptj' else 'txt'}"}


def test_the_demo_replaces_only_its_own(source, convert, refused):
    assert convert(source, output="out/demo-gptj").code == 0
    refused(None, output=None, family="gptj", says="out/demo-gptj exists")


def test_reports_go_where_they_are_told(source, convert, workdir):
    assert convert(source, "--reports", "else/where").code == 0
    assert (workdir / "else/where/run/convert.json").is_file() and not (workdir / "reports").exists()


@pytest.mark.parametrize("head,facts", [
    ("GPTJForCausalLM", ["transformer.h.1.attn.q_proj.weight", "(causal mask)", "29 tensors", "model.safetensors"]),
    ("BertForMaskedLM", ["bert.encoder.layers.1.norm2.bias", "(zeros)", "46 tensors", "expected memory"])])
def test_dry_run_prints_the_plan_and_writes_nothing(head, facts, checkpoint, convert, workdir):
    run = convert(checkpoint(head), "--dry-run")
    assert run.code == 0 and [fact for fact in facts if fact not in run.stdout] == []
    assert list(workdir.iterdir()) == []


def test_dry_run_of_the_demo_writes_nothing_either(convert, workdir):
    assert convert(None, "--dry-run", output=None).code == 0
    assert list(workdir.iterdir()) == []


RULES = {
    "gptj": (["transformer.h.{i}.mlp.fc_out.weight", "[hidden, inner]"],
             ["transformer.wte.weight"],
             ["transformer.h.{i}.attn.bias", "causal mask", "transformer.h.{i}.attn.masked_bias", "-1e+09"]),
    "bert": (["bert.encoder.layer.{i}.attention.self.query.weight", "bert.encoder.layers.{i}.self_attn.q_proj.weight",
              "bert.embeddings.LayerNorm.gamma"],
             ["bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight",
              "bert.embeddings.token_type_embeddings.weight"],
             ["cls.predictions.decoder.bias", "bert.pooler.dense.weight", "zeros", "bert.embeddings.position_ids"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_prints_map_list_and_buffers(family, convert, workdir):
    run = convert(None, "--rules", output=None, family=family)
    mapped, rest = run.stdout.split("do not transpose")
    kept, buffers = rest.split("buffers: ")
    for section, words in zip((mapped, kept, buffers), RULES[family], strict=True):
        assert [word for word in words if word not in section] == []
    assert "proj" not in kept and "dense" not in kept and "fc_" not in kept
    assert run.code == 0 and list(workdir.iterdir()) == []


@pytest.mark.parametrize("head,family", [("GPTJForCausalLM", "gptj"), ("BertModel", "bert")])
def test_the_family_is_found_in_the_config(head, family, checkpoint, workdir):
    code, _, told = call(by_config.main, ["--source", str(checkpoint(head)), "--output", "out/found"])
    assert code == 0, told
    assert json.loads((workdir / "reports/found/convert.json").read_text())["family"] == family


OWN_FAMILY = """
from dataclasses import replace
from convert.gptj import FAMILY as GPTJ
FAMILY = replace(GPTJ, name="mine")
"""


def test_a_family_file_of_the_users_own(source, workdir):
    (workdir / "mine.py").write_text(OWN_FAMILY)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mine"}
    (source / "config.json").write_text(json.dumps(config))
    code, _, told = call(by_config.main, ["--family", "mine.py", "--source", str(source), "--output", "out/run"])
    assert code == 0, told
    assert json.loads((workdir / "reports/run/convert.json").read_text())["family"] == "mine"


@pytest.mark.parametrize("name,text", [
    ("none.py", None), ("empty.py", ""), ("broken.py", "def"), ("raises.py", "1 / 0"), ("wrong.py", "FAMILY = 5"),
    ("family.txt", "FAMILY = 5")])
def test_a_family_file_that_is_none(name, text, source, workdir):
    if text is not None:
        (workdir / name).write_text(text)
    code, _, told = call(by_config.main, ["--family", name, "--source", str(source)])
    assert code == 2 and name in told and told.count("\n") == 1 and not (workdir / "out").exists()


@pytest.mark.parametrize("arguments,says", [([], "--source"), (["--rules"], "--source")])
def test_without_a_family_or_a_source(arguments, says, workdir):
    code, _, told = call(by_config.main, arguments)
    assert code == 2 and says in told


def test_a_family_that_there_is_not(source, workdir):
    config = json.loads((source / "config.json").read_text())
    for kind, says in (*((kind, repr(kind)) for kind in ("llama", "rules", "os.path")), (None, "names no model_type")):
        (source / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        code, _, told = call(by_config.main, ["--source", str(source)])
        assert code == 2 and says in told and "--family FILE" in told


# --- rules


@given(data=st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_has_its_inverse(family, data):
    family = FAMILIES[family]
    rule = data.draw(st.sampled_from([rule for head in family.heads for rule in family.rules_of(head)]))
    shape = data.draw(st.tuples(*[st.integers(0, 5)] * len(rule.shape)))
    array = data.draw(arrays("u2", shape))
    moved = rule.apply(array)
    assert moved.shape == rule.turned_shape(shape)
    assert rule.invert(moved).tobytes() == array.tobytes() and rule.invert(moved).shape == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_claimed_by_one_rule_that_says_whether_it_is_transposed(family):
    for head in FAMILIES[family].heads:
        rules = FAMILIES[family].rules_of(head)
        targets = [target for rule in rules if rule.when(FAMILIES[family].demo) for target in rule.targets]
        assert len(targets) == len(set(targets))
        assert {rule.kind for rule in rules if len(rule.shape) == 2 and rule.transposed} == {"linear"}


def test_a_rule_of_a_family_may_not_map_two_names_to_one():
    with pytest.raises(ValueError, match="different numbers"):
        convert.gptj.keep("a.{x,y}", 1, to="b")
