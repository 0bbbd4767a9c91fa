"""``--target paddlenlp``: weights and forward are PaddleNLP's strength, ignored labels its fault, and we say both."""

import pytest
from align_fixtures import Workshop, all_aligned

WRONG = {"GPTJForCausalLM": ["loss.padded", "loss.ignored"], "BertForPreTraining": ["loss.padded", "loss.ignored"]}


@pytest.fixture(scope="module", params=WRONG)
def paddlenlp(request, tmp_path_factory):
    """(head, workshop, outcome by stage)."""
    workshop = Workshop(tmp_path_factory.mktemp("paddlenlp"))
    run = workshop.make(request.param, tokenizer=True)
    return request.param, workshop, workshop.align_all(run, "--target", "paddlenlp")


def test_weights_forward_and_metric_are_aligned(paddlenlp):
    _, _, outcomes = paddlenlp
    assert all_aligned({stage: outcomes[stage] for stage in ("weights", "forward", "metric")})
    assert all(tensor["rel_l2"] <= 1e-5 for tensor in outcomes["forward"].report["tensors"])


def test_the_loss_diverges_exactly_where_labels_are_ignored(paddlenlp):
    head, _, outcomes = paddlenlp
    loss = outcomes["loss"]
    assert (loss.code, loss.report["verdict"]) == (1, "diverged")
    assert loss.failing == WRONG[head]
    assert loss.report["first_divergence"] == "loss.padded"
    assert "divided by all positions" in loss.report["diagnosis"]["sentence"]


def test_the_fault_is_the_division_by_all_labels(paddlenlp):
    """Paddle's mean is the right sum over the wrong count, so it is too small."""
    _, _, outcomes = paddlenlp
    for name in ("loss.padded", "loss.ignored"):
        value = outcomes["loss"].report["values"][name]
        assert value["candidate"] < 0.95 * value["reference"]


def test_reports_lie_beside_those_of_our_own_net(paddlenlp):
    head, workshop, _ = paddlenlp
    directory = workshop.reports / head
    assert sorted(file.name for file in directory.glob("*.json")) == ["convert.json"]
    assert sorted(file.name for file in (directory / "paddlenlp").rglob("*.json")) == [
        "forward.json", "loss.json", "metric.json", "weights.json"]
    assert (directory / "paddlenlp" / "traces" / "loss_paddle.npy").is_file()


def test_every_tensor_of_the_file_is_held_buffers_too(paddlenlp):
    _, workshop, outcomes = paddlenlp
    report = outcomes["weights"].report
    assert report["target"] == "paddlenlp"
    from align_fixtures import strict_json
    promised = strict_json(workshop.reports / report["run"] / "convert.json")["tensors"]
    assert {tensor["name"] for tensor in report["tensors"]} == {tensor["target"] for tensor in promised}
