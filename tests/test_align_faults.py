"""Planted faults: each must be caught, named, and end in exit code 1."""

import json
from contextlib import contextmanager

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop, all_aligned
from safetensors.numpy import load_file, save_file

import models
from align.inputs import seeded
from align.paddle_net import PaddleNet
from align.selftest import one_reference
from models.activation import activation

Q, K = "bert.encoder.layers.1.self_attn.q_proj.weight", "bert.encoder.layers.1.self_attn.k_proj.weight"
KEY_BIAS = "bert.encoder.layers.0.self_attn.k_proj.bias"
ONE_ELEMENT = "bert.encoder.layers.2.linear1.weight"


@pytest.fixture(scope="module", autouse=True)
def one_torch_side():
    """It is the same however wrong the net is: each of its passes is computed once."""
    with one_reference():
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("faults"))
    workshop.make("BertForMaskedLM", "bert")
    workshop.make("GPTJForCausalLM", "gptj")
    for run in ("bert", "gptj"):
        assert all_aligned({"weights": workshop.align("weights", run)})
    return workshop


@contextmanager
def planted(workshop, run, edit):
    """``edit(tensors)`` done to the output's checkpoint, and undone."""
    file = workshop.output(run) / "model.safetensors"
    whole, verified = file.read_bytes(), (workshop.reports / run / "weights.json").read_bytes()
    tensors = load_file(file)
    edit(tensors)
    save_file({name: np.array(array, order="C") for name, array in tensors.items()}, file, {"format": "np"})
    try:
        yield
    finally:
        file.write_bytes(whole)
        (workshop.reports / run / "weights.json").write_bytes(verified)


def transpose(tensors):
    tensors[K] = tensors[K].T


def swap(tensors):
    tensors[Q], tensors[K] = tensors[K], tensors[Q]


def nudge_bias(tensors):
    tensors["bert.encoder.layers.1.linear2.bias"][5] += 1e-3


def nudge_one_ulp(tensors):
    weight = tensors[ONE_ELEMENT]
    weight[3, 7] = np.nextafter(weight[3, 7], np.float32(np.inf))


def nudge_key_bias(tensors):
    tensors[KEY_BIAS] += 1.0


def flip_the_sign_of_zero(tensors):
    tensors["bert.pooler.dense.bias"][4] = -0.0


def break_with_nan(tensors):
    tensors["bert.encoder.layers.0.norm1.weight"][:] = np.nan


WEIGHT_FAULTS = {
    transpose: [K], swap: [Q, K], nudge_bias: ["bert.encoder.layers.1.linear2.bias"], nudge_one_ulp: [ONE_ELEMENT],
    nudge_key_bias: [KEY_BIAS], flip_the_sign_of_zero: ["bert.pooler.dense.bias"],
    break_with_nan: ["bert.encoder.layers.0.norm1.weight"],
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_weight_is_named_exactly_and_no_stage_passes_over_it(workshop, fault):
    wrong = WEIGHT_FAULTS[fault]
    with planted(workshop, "bert", fault):
        outcomes = {stage: workshop.align(stage, "bert") for stage in ("forward", "metric", "loss", "weights")}
    for stage, outcome in outcomes.items():
        assert (outcome.code, outcome.report["verdict"]) == (1, "diverged"), stage
        assert outcome.report["first_divergence"] == wrong[0], stage
    assert outcomes["weights"].failing == wrong
    assert outcomes["weights"].report["failures"][0].startswith(f"{wrong[0]}: ")


def test_a_wrong_weight_that_no_output_shows_is_told_as_such(workshop):
    with planted(workshop, "bert", nudge_key_bias):
        outcome = workshop.align("loss", "bert")
    assert outcome.failing == [] and outcome.code == 1
    told = " ".join(outcome.stdout.split())
    assert f"{KEY_BIAS} is not the source's weight, though nothing here shows it: all " in told


def test_a_missed_transpose_of_a_square_weight_is_called_one(workshop):
    with planted(workshop, "bert", transpose):
        outcome = workshop.align("weights", "bert")
    assert outcome.report["failures"][0].endswith("(it is the source's transpose)")
    assert outcome.tensor(K)["rel_l2"] > 1


def test_one_ulp_is_one_element_and_its_place_is_told(workshop):
    """Paddle's [3, 7] is torch's [7, 3]."""
    with planted(workshop, "bert", nudge_one_ulp):
        outcome = workshop.align("weights", "bert")
    assert "worst at [7, 3]" in outcome.report["failures"][0]
    assert 0 < outcome.tensor(ONE_ELEMENT)["max_abs"] < 1e-6


@pytest.mark.parametrize("fault", [nudge_key_bias, nudge_one_ulp], ids=lambda fault: fault.__name__)
def test_what_no_output_shows_diverges_through_the_weights_alone(workshop, fault):
    with planted(workshop, "bert", fault):
        outcome = workshop.align("forward", "bert")
    assert outcome.failing == []
    assert (outcome.code, outcome.report["verdict"]) == (1, "diverged")
    assert outcome.report["first_divergence"] == WEIGHT_FAULTS[fault][0]


def test_the_key_bias_is_invisible_by_mathematics(workshop):
    """So that the test above tests what it says: torch itself cannot tell."""
    from align_fixtures import torch_model
    one, other = torch_model("BertForMaskedLM"), torch_model("BertForMaskedLM")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.key.bias += 1.0
        ids = torch.arange(64).reshape(1, 64)
        torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_nan_is_reported_as_null_and_in_words(workshop):
    with planted(workshop, "bert", break_with_nan):
        outcome = workshop.align("forward", "bert")
    assert outcome.failing[0] == "bert.encoder.layers.0"
    assert outcome.tensor("bert.encoder.layers.0")["rel_l2"] is None
    assert "NaN or inf" in next(sentence for sentence in outcome.report["failures"])


def test_a_fault_undone_is_aligned_again(workshop):
    with planted(workshop, "bert", swap):
        assert workshop.align("forward", "bert").code == 1
    assert workshop.align("forward", "bert").code == 0


SKIPPED, COMPARED = "as align.weights found for this very digest", "tensors compared with the source, equal bit by bit"


def told_of_weights(workshop):
    return next(note for note in workshop.align("forward", "bert").report["notes"] if note.startswith("Weights"))


def test_weights_compared_are_not_compared_again(workshop):
    assert SKIPPED in told_of_weights(workshop)


@pytest.mark.parametrize("key, value", [
    (("candidate", "weights_digest"), "0" * 32), (("reference", "weights_digest"), "0" * 32),
    (("verdict",), "diverged"), (("stage",), "forward"),
])
def test_the_weights_are_taken_as_compared_only_for_the_verified_digest(workshop, key, value):
    file = workshop.reports / "bert" / "weights.json"
    before = file.read_text()
    content = json.loads(before)
    place = content
    for part in key[:-1]:
        place = place[part]
    place[key[-1]] = value
    try:
        file.write_text(json.dumps(content))
        assert COMPARED in told_of_weights(workshop)
    finally:
        file.write_text(before)


def test_a_damaged_or_absent_report_of_the_weights_vouches_for_nothing(workshop):
    file = workshop.reports / "bert" / "weights.json"
    before = file.read_text()
    try:
        file.write_text("{")
        assert COMPARED in told_of_weights(workshop)
        file.unlink()
        assert COMPARED in told_of_weights(workshop)
    finally:
        file.write_text(before)


def test_weights_compared_before_a_change_do_not_vouch_for_the_changed_ones(workshop):
    assert workshop.align("weights", "bert").code == 0
    with planted(workshop, "bert", nudge_key_bias):
        assert workshop.align("forward", "bert").report["first_divergence"] == KEY_BIAS


@pytest.mark.parametrize("change, told", [
    (lambda tensors: tensors.pop(K), "missing"),
    (lambda tensors: tensors.update(extra=np.ones(3, np.float32)), "left over"),
])
def test_a_tensor_lost_or_added_is_refused(workshop, change, told):
    with planted(workshop, "bert", change):
        outcome = workshop.align("weights", "bert")
    assert outcome.code == 2 and told in outcome.stderr


@pytest.mark.parametrize("state, name, told", [
    (lambda held: held | {"extra": np.ones(3, np.float32)}, "extra", "the source's plan did not record it"),
    (lambda held: {name: array for name, array in held.items() if name != K}, K, "the candidate did not record it"),
])
def test_a_net_that_holds_more_or_less_than_the_source_is_diverged(workshop, monkeypatch, state, name, told):
    hold = PaddleNet.state
    monkeypatch.setattr(PaddleNet, "state", lambda self: iter(state(dict(hold(self))).items()))
    outcome = workshop.align("weights", "bert")
    monkeypatch.undo()
    assert workshop.align("weights", "bert").code == 0
    assert (outcome.code, outcome.failing, outcome.report["failures"]) == (1, [name], [f"{name}: {told}"])


def with_net(monkeypatch, break_net):
    """The candidate's net is broken after it was loaded: its weights stay the source's."""
    load = models.from_pretrained

    def broken(directory):
        net = load(directory)
        break_net(net)
        return net
    monkeypatch.setattr(models, "from_pretrained", broken)


def tanh_gelu(net):
    net.bert.encoder.layers[1].activation = activation("gelu_new")


def large_epsilon(net):
    net.bert.encoder.layers[1].norm1._epsilon = 1e-3


def ignore_padding(net):
    layer = net.bert.encoder.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, mask=None: forward(hidden, None)


def see_the_future(net):
    block = net.transformer.h[1]
    forward = block.forward
    block.forward = lambda hidden, mask, *rest: forward(hidden, paddle.zeros_like(mask), *rest)


def late_keys(net):
    """The keys of block 1 are turned as if they stood one position later."""
    from models import gptj
    block = net.transformer.h[1]
    forward, rotate, calls = block.forward, gptj.rotate, []

    def turn(x, sin, cos):
        calls.append(None)
        late = len(calls) == 2
        return rotate(x, *(paddle.roll(table, -1, 1) if late else table for table in (sin, cos)))

    def shifted(*arguments):
        calls.clear()
        gptj.rotate = turn
        try:
            return forward(*arguments)
        finally:
            gptj.rotate = rotate
    block.forward = shifted


def next_position(net):
    embeddings = net.bert.embeddings
    forward = embeddings.forward
    embeddings.forward = lambda ids, types, positions: forward(ids, types, (positions + 1) % 96)


NET_FAULTS = [
    (tanh_gelu, "bert", "bert.encoder.layers.1"), (large_epsilon, "bert", "bert.encoder.layers.1"),
    (ignore_padding, "bert", "bert.encoder.layers.1"), (next_position, "bert", "bert.embeddings"),
    (see_the_future, "gptj", "transformer.h.1"), (late_keys, "gptj", "transformer.h.1"),
]


@pytest.mark.parametrize("fault, run, block", NET_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_in_the_net_names_its_block_and_clears_those_behind_it(workshop, monkeypatch, fault, run, block):
    with_net(monkeypatch, fault)
    outcome = workshop.align("forward", run)
    assert (outcome.code, outcome.report["first_divergence"]) == (1, block)
    names = [tensor["name"] for tensor in outcome.modules]
    for tensor in outcome.modules[: names.index(block)]:
        assert tensor["passed"]
    behind = [tensor for tensor in outcome.modules[names.index(block) + 1:] if tensor["isolated"]]
    assert behind
    for tensor in behind:
        assert tensor["rel_l2"] > 1e-5 >= tensor["isolated"]["rel_l2"]
    isolated = outcome.tensor(block)["isolated"]
    assert isolated is None or isolated["rel_l2"] > 1e-5


@pytest.mark.parametrize("stage", ["metric", "loss"])
def test_a_fault_in_the_net_is_seen_by_the_later_stages_too(workshop, monkeypatch, stage):
    with_net(monkeypatch, ignore_padding)
    outcome = workshop.align(stage, "bert")
    assert (outcome.code, outcome.report["verdict"]) == (1, "diverged")


def test_a_loss_over_all_labels_is_caught_where_labels_are_ignored(workshop, monkeypatch):
    from models import bert
    monkeypatch.setattr(bert, "cross_entropy", lambda logits, labels: paddle.nn.functional.cross_entropy(
        logits, labels, reduction="mean"))
    outcome = workshop.align("loss", "bert")
    assert outcome.failing == ["loss.padded", "loss.ignored"]


def test_inputs_have_both_paddings_so_that_a_mask_matters():
    mask = seeded({"pad_token_id": 0}, {"positions": 96, "vocab": 9}).mask
    assert (~mask[:, 0]).any() and (~mask[:, -1]).any() and mask.all(1).any()
