"""Wrong ChatGLMs: some of the selftest's faults through the real pipeline, and what it says of them."""

import pytest
from align_fixtures import Workshop
from chatglm_fixtures import save_checkpoint

from align.faults.chatglm import FAULTS
from align.selftest import prove
from models import heads
from models.loss import cross_entropy

TRUST = "--trust-remote-code"
ATTENTION = "attention: heads, rotary, scale, mask, softmax, before attention.dense"
SAMPLE = {
    "frequencies unrounded/chatglm/net":
        ("layers.0.attention rotary", "unrounded; in the reference they are rounded to float16"),
    "second place ignored/chatglm/net": (f"layers.0: {ATTENTION}", None),
    "context causal/chatglm/net": ("layers.1.attention mask", "is causal, which the reference's is not"),
    "head tied to the words/chatglm/net": ("lm_head.decoder_weight", "is tied to "),
    "scale off by 1e-4/chatglm/net": ("layers.1.attention scale", "is off by a factor of 1.0001"),
    "q, k and v cut as wholes/chatglm/net":
        ("layers.1.attention.query_key_value.weight", "has been cut as q, k, v, though its rows are ordered head by"),
    "alpha of 28 layers/chatglm/net": ("layers.1", "as with 28 layers instead of 3"),
    "residuals of what enters the norms/chatglm/net":
        ("layers.1: residual, before post_attention_layernorm", None),
    "gelu with erf/chatglm/net": ("layers.1: activation, before mlp.dense_4h_to_h", None),
    "epsilon 1e-6 of the config/chatglm/config": ("layers.0 layer norms", "epsilon 1e-06 instead of 1e-05"),
    "missed transpose of dense/chatglm/checkpoint": ("layers.1.attention.dense.weight", "is transposed"),
    "heads permuted everywhere/chatglm/checkpoint":
        ("layers.1.attention.query_key_value.weight", "no output of these inputs shows it"),
}
MORE = {
    "second place ignored/chatglm/net",
    "context causal/chatglm/net",
    "head tied to the words/chatglm/net",
    "gelu with erf/chatglm/net",
    "epsilon 1e-6 of the config/chatglm/config",
}
"""For ``make test-full``, as ``python -m align.selftest`` plants all there are."""


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "more"])
def proof(tmp_path_factory, request):
    """Of the sample without ``MORE``, and of ``MORE``."""
    return prove([fault for fault in FAULTS if fault.name in SAMPLE and (fault.name in MORE) is request.param],
                 tmp_path_factory.mktemp("planted"))


def test_planted_faults_are_caught_named_and_explained(proof):
    assert proof.false_alarms == []
    assert {outcome.fault.name for outcome in proof.outcomes} in (MORE, SAMPLE.keys() - MORE)
    for outcome in proof.outcomes:
        named, sentence = SAMPLE[outcome.fault.name]
        assert outcome.caught and outcome.in_right_block and outcome.named_right, (outcome.fault.name, outcome.named)
        assert outcome.named.removeprefix("chatglm.transformer.") == named, outcome.fault.name
        told = outcome.result.diagnosis
        assert (told is None) if sentence is None else sentence in told.sentence, (outcome.fault.name, told)


@pytest.mark.parametrize("stage", ["forward", "metric", "loss"])
def test_a_loss_that_is_not_shifted_is_diverged_at_the_loss_alone(tmp_path, monkeypatch, stage):
    workshop = Workshop(tmp_path)
    run = workshop.convert("chatglm", save_checkpoint(workshop.root / "source"), "sound")
    monkeypatch.setattr(heads, "causal_lm_loss", cross_entropy)
    assert workshop.align(stage, run, TRUST).code == (1 if stage == "loss" else 0)
