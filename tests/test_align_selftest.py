"""The selftest itself: its list of faults, a sample of them in the real pipeline, and how an outcome is judged."""

import csv
import os
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from align import faults, progress, selftest
from align.faults import EXPLANATIONS, FAULTS, Fault, NotPlanted, in_config, in_net
from align.selftest import Outcome, Proof, prove
from convert.__main__ import families
from convert.errors import BadInput

SUBTLE = ("epsilon of a late block/bert/net", "bias element off by 1e-4/gptj/net-weights")
INVISIBLE = ("key bias changed/bert/checkpoint", "MLP units permuted on both sides/gptj/checkpoint")
SAMPLE = (*SUBTLE, *INVISIBLE, "missed transpose of q/gptj/checkpoint", "q and k swapped/bert/net-weights",
          "mask of -10 on one row/bert/net", "wrong constant in the rotary table/gptj/net",
          "heads of the config halved/bert/config", "NaN in one weight/gptj/net-weights",
          "element of a kernel changed by 1 %/resnet/net-weights", "running statistics not loaded/resnet/checkpoint",
          "q, k and v cut per head from the fused matrix/gpt2/net-weights")
MORE = ("blocks run in the wrong order/gptj/net", "softmax in bf16/gptj/net", "batch norm epsilon 1e-6/resnet/net",
        "missed transpose of the classifier/resnet/net-weights", "stride in the first convolution/resnet/net",
        "heads of the config halved/gpt2/config")
"""For ``make test-full``, as ``python -m align.selftest`` plants all there are."""
BEYOND = {"set-up": "optimizer", "training": "train", "decoding": "generate"}
"""Where a fault may lie beside a net, and the stage that has to tell."""


def proven(names, directory):
    return prove([next(fault for fault in FAULTS if fault.name == name) for name in names], directory)


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    return proven(SAMPLE, tmp_path_factory.mktemp("selftest"))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_planted_fault_is_caught(proof, name):
    outcome = next(outcome for outcome in proof.outcomes if outcome.fault.name == name)
    assert (outcome.code, outcome.verdict, outcome.caught) == (1, "diverged", True)
    assert outcome.in_right_block, outcome.failing
    assert outcome.named_right, outcome.named


def test_runs_without_a_fault_are_aligned_before_the_faults_and_after_each_is_undone(proof):
    assert len(proof.outcomes) == len(SAMPLE)
    assert proof.false_alarms == []


@pytest.mark.full
def test_more_planted_faults_are_caught_and_named(tmp_path):
    proof = proven(MORE, tmp_path)
    assert (len(proof.outcomes), proof.false_alarms) == (len(MORE), [])
    for outcome in proof.outcomes:
        assert outcome.caught and outcome.in_right_block and outcome.named_right, (outcome.fault.name, outcome.named)
    assert proof.explained_wrongly == []


def test_none_of_the_sample_is_explained_wrongly(proof):
    assert [(outcome.fault.name, outcome.explanation, outcome.subject) for outcome in proof.explained_wrongly] == []


def test_the_report_is_a_table_to_read_and_one_to_compute_with_and_no_json(proof, tmp_path):
    written = proof.save(tmp_path / "selftest")
    assert sorted(file.name for file in written.parent.iterdir()) == ["selftest.md", "selftest.tsv"]
    rows = list(csv.DictReader((tmp_path / "selftest" / "selftest.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert [row["kind"] for row in rows] == [outcome.fault.kind for outcome in proof.outcomes]
    assert written.read_text("utf-8").count("\n| ") == len(SAMPLE) + 2


def test_there_are_at_least_40_kinds_and_8_of_them_have_no_explanation():
    unexplained = {fault.kind for fault in FAULTS if not fault.explanation and not fault.also and fault.visible}
    assert len({fault.kind for fault in FAULTS}) >= 40
    assert len(unexplained) >= 8
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_every_place_of_every_family_has_faults_in_the_family_s_own_module():
    of_nets = [fault for fault in FAULTS if fault.place not in BEYOND]
    assert {(fault.family, fault.place) for fault in of_nets} == {
        (family, place) for family in families() for place in ("checkpoint", "config", "net")}
    for family in families():
        own = import_module(f"align.faults.{family}").FAULTS
        assert {fault.family for fault in own} == {family}
        assert list(own) == [fault for fault in of_nets if fault.family == family]


def test_what_trains_a_net_and_continues_texts_with_it_has_faults_of_its_own_stage():
    assert {(fault.place, fault.stage) for fault in FAULTS if fault.place in BEYOND} == set(BEYOND.items())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_says_what_would_be_right(fault):
    assert fault.expected
    assert bool(fault.block) == fault.visible
    assert fault.visible or (fault.why and fault.place == "checkpoint" and fault.explanation is None)
    assert (fault.explanation or frozenset()) | fault.also <= EXPLANATIONS.keys()


def test_the_faults_know_nothing_of_the_explanations():
    for file in Path(faults.__file__).parent.glob("*.py"):
        source = file.read_text("utf-8")
        assert "import diagnose" not in source and "explanations import" not in source and ".diagnose" not in source


@pytest.mark.parametrize("plant", [in_config(n_head=4), in_net(lambda net: None)], ids=["config", "net"])
def test_a_fault_without_effect_is_an_error_and_not_a_miss(plant, tmp_path):
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    with pytest.raises(NotPlanted), plant(tmp_path):
        pass
    assert (tmp_path / "config.json").read_text() == '{"n_head": 4}'


FAULT = Fault("kind", "bert", "net", "weights held", in_net(print), "layers.1", frozenset({"layers.1.q*"}),
              frozenset({"transposed"}), also=frozenset({"sign"}))


def outcome(fault=FAULT, *, failing="layers.1", weights=None, code=1, diagnosis=None, named=None):
    """What a stage might say, made up."""
    tensors = [SimpleNamespace(name="layers.0", passed=True, share=0.3)]
    tensors += [SimpleNamespace(name=failing, passed=False, share=7.0)] if failing else []
    result = SimpleNamespace(tensors=tensors, verdict="diverged" if code else "aligned", weights_divergence=weights,
                             first_divergence=weights or failing, named=named, diagnosis=diagnosis)
    return Outcome(fault, code, result, 0.1)


def explained(kind, subject):
    return SimpleNamespace(kind=kind, subject=subject, sentence="")


def test_caught_means_a_failing_output_and_not_only_a_weight():
    assert outcome().caught
    assert not outcome(failing=None, weights="layers.1.q.weight").caught
    assert outcome(replace(FAULT, visible=False), failing=None, weights="layers.1.q.weight").caught
    assert not outcome(code=0, failing=None).caught
    assert not Outcome(FAULT, 4, None, 0.1).caught


def test_named_is_the_weight_or_the_explanation_or_the_sublayer_or_the_block():
    assert outcome().named == "layers.1" and not outcome().named_right
    assert outcome(named="layers.1.q").named_right
    assert outcome(named="layers.1.k", diagnosis=explained("transposed-weight", "layers.1.q.weight")).named_right
    assert outcome(weights="layers.1.q.weight").named == "layers.1.q.weight"
    assert not outcome(failing="layers.2").in_right_block


@pytest.mark.parametrize("kind, subject, verdict", [
    ("transposed-weight", "layers.1.q.weight", "yes"), ("transposed-weight", "layers.1.k.weight", "wrong"),
    ("transposed-weight", None, "wrong"), ("gelu-variant", "layers.1.q.weight", "wrong"),
    ("changed-weight", "layers.1.q.weight", "true"), ("changed-weight", "layers.1.k.weight", "wrong"),
    ("sign", "layers.1.q.weight", "true"), (None, None, "no"), ("unexplained", None, "no"),
])
def test_an_explanation_is_judged_by_its_kind_and_its_subject(kind, subject, verdict):
    assert outcome(diagnosis=explained(kind, subject)).explained == verdict


def test_any_explanation_of_what_has_none_is_wrong():
    fault = replace(FAULT, explanation=None, how="code", also=frozenset())
    for kind in ("transposed-weight", "changed-weight", "sign"):
        assert outcome(fault, diagnosis=explained(kind, "layers.1.q")).explained == "wrong"
    assert outcome(fault).explained == "no"


def test_the_promises_hold_only_if_all_is_caught_nothing_wrongly_explained_and_clean_runs_are_aligned():
    good = outcome(diagnosis=explained("transposed-weight", "layers.1.q"))
    assert Proof([good]).holds
    assert not Proof([]).holds
    assert not Proof([good, outcome(code=0, failing=None)]).holds
    assert not Proof([good] * 9 + [outcome(diagnosis=explained("gelu-variant", "layers.1.q"))]).holds
    assert not Proof([good], ["bert, models: exit code 1"]).holds
    assert not Proof([good], unplanted=["kind/bert/net: no net was loaded"]).holds
    assert Proof([good] * 19 + [outcome()]).holds
    assert not Proof([good] * 18 + [outcome()] * 2).holds
    assert not Proof([good] * 79 + [outcome(named="layers.1.q")] * 21).holds


def test_a_fault_that_does_not_come_into_effect_is_told_and_stops_no_other(tmp_path):
    @contextmanager
    def nothing(output):
        yield
        raise NotPlanted("nothing was broken")
    real = next(fault for fault in FAULTS if fault.name == "missed transpose of q/bert/checkpoint")
    proof = prove([replace(real, plant=nothing), real], tmp_path)
    assert [told for told in proof.totals() if told.startswith("NOT PLANTED: missed transpose of q/bert/checkpoint")]
    assert len(proof.outcomes) == 1 and proof.outcomes[0].caught and not proof.holds


def test_unknown_faults_are_refused_and_the_list_needs_no_model(capsys):
    assert selftest.main(["--only", "no such fault"]) == 2
    assert selftest.main(["--only", "*gelu*", "--list"]) == 0
    assert "other gelu in the last block/bert/net" in capsys.readouterr().out


def test_the_environment_is_prepared_before_a_framework_is_loaded(monkeypatch, capsys):
    """Where the defaults stay, threads that spin make a selftest beside other programs take many times as long."""
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"})
        patch.setattr(selftest.errors, "require", lambda name: seen.update({name: os.environ.get("GOMP_SPINCOUNT")}))
        assert selftest.main(["--list", "--only", "*/decoding"]) == 0
    assert seen == dict.fromkeys(("torch", "transformers", "paddle"), "5000")


def test_a_log_is_told_which_fault_is_planted(monkeypatch, capsys, tmp_path):
    def stopped(chosen, root, tell):
        tell("demo-gptj 1/9: the end does not stop a text, greedy")
        raise BadInput("stopped")
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    monkeypatch.setattr(selftest, "prove", stopped)
    assert selftest.main(["--only", "*/decoding", "--reports", str(tmp_path)]) == 2
    assert "align.selftest: demo-gptj 1/9: the end does not stop a text, greedy (0 s)\n" in capsys.readouterr().err
