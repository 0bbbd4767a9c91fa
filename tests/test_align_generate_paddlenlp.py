"""``--target paddlenlp`` with its cache: called as PaddleNLP's own generate calls it; right, wrong, and failing."""

from __future__ import annotations

from types import SimpleNamespace

import chatglm_fixtures
import numpy as np
import paddle
import pytest
from align_fixtures import Workshop, rel_l2
from paddlenlp.transformers.bloom.modeling import BloomForCausalLM
from paddlenlp.transformers.gptj import modeling as gptj

from align.decoding import starts
from align.decoding.feeding import Cached, Feed, Whole
from align.decoding.search import Strategy, behind, write
from align.decoding.torch_side import takes
from align.paddle_net import PaddleNLPNet
from align.reference import Reference
from align.runs import load_run

HEADS = {"gptj": "GPTJForCausalLM", "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "bloom": "BloomForCausalLM",
         "t5": "T5ForConditionalGeneration"}
TARGET = "--target", "paddlenlp"
CACHED = " (with cache)"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("keeping"))
    for family, head in HEADS.items():
        found.make(head, family)
    source = chatglm_fixtures.save_checkpoint(found.root / "glm", dtype="float32", architectures=[
        "ChatGLMForConditionalGeneration"])
    found.convert("chatglm", source, "chatglm")
    return found


def asked(outcome):
    """The names of what was compared with the cache."""
    return [tensor["name"] for tensor in outcome.report["tensors"] if tensor["name"].endswith(CACHED)]


def told(outcome):
    return " ".join(outcome.report["notes"])


# Right classes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["gptj", "t5", *(pytest.param(family, marks=pytest.mark.full) for family in (
    "opt", "bloom"))])
def test_right_classes_are_aligned_with_their_cache(shop, family):
    outcome = shop.align("generate", family, *TARGET, "--tokens", "6")
    assert (outcome.code, outcome.report["verdict"]) == (0, "aligned"), outcome.report.get("failures", outcome.stderr)
    assert asked(outcome) == [f"{name}{CACHED}" for name in (
        "greedy", "greedy-ended", "beam", "beam-ended", "top-k", "top-k-few", "top-p", "top-p-few", "temperature")]
    assert "nothing is compared" not in told(outcome) and "attention_mask" not in told(outcome)


def opened(shop, family, rows):
    """Torch, PaddleNLP's class, what is continued, and what both sides are given."""
    run = load_run(family, shop.reports)
    start, _ = starts.shipped(run, rows, 8)
    side = Reference(run, trust_remote_code=family == "chatglm")
    return side, PaddleNLPNet(run), start, Feed(run, takes(side), start)


@pytest.mark.parametrize("family", [*HEADS, "chatglm"])
def test_it_is_called_as_by_paddlenlps_own_generate(shop, family):
    _, net, start, feed = opened(shop, family, 4)
    ends = net.model.config.eos_token_id
    strategy = Strategy("greedy", 8, net.model.config.pad_token_id, (ends,))
    ours = write(Cached(net, feed), start.ids, start.mask, strategy).tokens
    arguments = {name: paddle.to_tensor(array) for name, array in feed.whole(start.ids, start.mask).items()
                 if name != "decoder_input_ids"}
    arguments = dict(net.run.family.paddlenlp_inputs(arguments))
    arguments["attention_mask"] = arguments["attention_mask"].astype("int64")
    theirs, _ = net.model.generate(**arguments, decode_strategy="greedy_search", max_new_tokens=8, eos_token_id=ends,
                                   pad_token_id=strategy.pad)
    assert np.array_equal(ours[:, : theirs.shape[1]], theirs.numpy()) and len(np.unique(ours)) > 2


@pytest.mark.parametrize("family", [*HEADS, "chatglm"])
def test_what_is_kept_follows_the_rows(shop, family):
    """Each text goes on from the other one's: torch, given these texts as a whole, gives the same logits. ChatGLM's
    frequencies are not quite torch's.
    """
    side, net, start, feed = opened(shop, family, 1 if family == "gpt2" else 3)
    cached, rows = Cached(net, feed), np.arange(2 * len(start.ids)) ^ 1
    ids, mask = (array.repeat(2, axis=0) for array in (start.ids, start.mask))
    for tokens in (5 + np.arange(len(ids)), 40 + np.arange(len(ids))):
        cached.next(ids, mask)
        ids, mask = behind(ids, mask, tokens)
    cached.next(ids, mask)
    cached.select(rows)
    ids, mask = behind(ids[rows], mask, np.full(len(ids), 9))
    expected = Whole(side, feed).next(ids, mask)
    assert rel_l2(expected, expected[rows]) > 1e-2
    assert rel_l2(expected, cached.next(ids, mask)) < (1e-4 if family == "chatglm" else 2e-6)


@pytest.mark.full
def test_pages_change_nothing(shop):
    flags = (*TARGET, "--tokens", "4", "--strategy", "greedy", "beam")
    paged = shop.align("generate", "t5", *flags, "--paging", "on")
    assert paged.code == 0 and asked(paged)


# What PaddleNLP does itself -------------------------------------------------------------------------------------------

def test_a_mask_that_generate_withholds_is_told_and_seen_in_padded_rows(shop):
    outcome = shop.align("generate", "gpt2", *TARGET, "--tokens", "6", "--strategy", "greedy")
    assert outcome.code == 1 and outcome.failing[0] == f"greedy{CACHED}"
    assert set(outcome.failing) <= set(asked(outcome))
    assert "PaddleNLP's own generate gives its GPTForCausalLM no attention_mask" in told(outcome)
    assert "the padding mask is left out" in outcome.report["diagnosis"]["sentence"]
    rows = [row for row in outcome.report["tables"][-1]["rows"] if row[0] == f"greedy{CACHED}"]
    assert rows[0][4] == "–" and all("(padded)" in row[1] for row in rows[1:])


def test_texts_of_two_counts_that_part_are_a_verdict(shop):
    """PaddleNLP's ChatGLM ties its head whatever the config says; its positions are two to a token."""
    source = chatglm_fixtures.save_checkpoint(shop.root / "untied", dtype="float32", tie_word_embeddings=False,
                                              architectures=["ChatGLMForConditionalGeneration"])
    shop.convert("chatglm", source, "untied")
    outcome = shop.align("generate", "untied", *TARGET, "--tokens", "4", "--strategy", "greedy", "--trust-remote-code")
    assert outcome.code == 1 and "greedy" in outcome.failing, outcome.stderr


# Planted --------------------------------------------------------------------------------------------------------------

def wrongly_kept(monkeypatch, cls, change):
    right = cls.update_model_kwargs_for_generation

    def wrong(outputs, model_kwargs, is_encoder_decoder=False):
        return change(right(outputs, model_kwargs, is_encoder_decoder))
    monkeypatch.setattr(cls, "update_model_kwargs_for_generation", staticmethod(wrong))


def greedy(shop, family, *flags):
    return shop.align("generate", family, *TARGET, "--tokens", "8", "--strategy", *(flags or ("greedy",)))


def test_the_cache_of_another_layer_is_seen_and_named(shop, monkeypatch):
    wrongly_kept(monkeypatch, gptj.GPTJForCausalLM, lambda beside: beside | {
        "past_key_values": (beside["past_key_values"][-1], *beside["past_key_values"][:-1])})
    outcome = greedy(shop, "gptj")
    assert outcome.code == 1 and outcome.report["first_divergence"] == "greedy"
    assert set(outcome.failing) <= set(asked(outcome))
    assert "each layer is given what the layer before it keeps" in outcome.report["diagnosis"]["sentence"]


def test_positions_that_are_off_by_one_behind_the_cache_are_seen_and_named(shop, monkeypatch):
    right = gptj.apply_rotary_pos_emb
    monkeypatch.setattr(gptj, "apply_rotary_pos_emb", lambda tensor, sincos, offset=0: right(
        tensor, sincos, offset=max(0, offset - 1)))
    outcome = greedy(shop, "gptj")
    assert outcome.code == 1 and set(outcome.failing) <= set(asked(outcome))
    assert "the positions of new tokens are one too low" in outcome.report["diagnosis"]["sentence"]


@pytest.mark.parametrize("family", ["gptj", "opt"])
def test_beams_that_take_their_rows_along_wrongly_are_seen_and_named(shop, monkeypatch, family):
    monkeypatch.setattr(PaddleNLPNet._class(SimpleNamespace(run=load_run(family, shop.reports))), "reorder_cache",
                        lambda net, cache, rows: cache)
    outcome = greedy(shop, family, "greedy", "beam")
    assert outcome.code == 1 and f"beam{CACHED}" in outcome.failing
    assert all(name.startswith("beam") and name.endswith(CACHED) for name in outcome.failing)
    assert "what is kept does not follow the beams that survive" in outcome.report["diagnosis"]["sentence"]


def test_a_class_that_fails_with_its_cache_is_told_with_its_own_error(shop, monkeypatch):
    def fail(*_, **__):
        raise ValueError("keys and values of two minds")
    monkeypatch.setattr(BloomForCausalLM, "prepare_inputs_for_generation", fail)
    outcome = greedy(shop, "bloom")
    assert outcome.code == 1 and outcome.failing == asked(outcome) and "Traceback" not in outcome.stderr
    assert "PaddleNLP's BloomForCausalLM, with its cache, failed at" in outcome.report["failures"][0]
    assert "ValueError: keys and values of two minds" in outcome.report["failures"][0]
    assert outcome.tensor("greedy")["passed"]


def without_keys(arguments):
    return {name: value for name, value in arguments.items() if name not in ("cache", "past_key_values")}


def test_a_class_that_keeps_nothing_is_told_and_not_called_aligned_with_a_cache(shop, monkeypatch):
    """Nor is one that is never given again what it keeps, as one without a prepare_inputs_for_generation of its own."""
    with monkeypatch.context() as patch:
        wrongly_kept(patch, BloomForCausalLM, without_keys)
        outcomes = [greedy(shop, "bloom")]
    monkeypatch.setattr(BloomForCausalLM, "prepare_inputs_for_generation", lambda net, input_ids, attention_mask, **_: {
        "input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True})
    for outcome in (*outcomes, greedy(shop, "bloom")):
        assert outcome.code == 0 and not asked(outcome)
        assert "With cache nothing is compared: PaddleNLP's BloomForCausalLM keeps nothing" in told(outcome)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_recorded_apart_and_together_give_one_report(shop, monkeypatch, family):
    """Where the class withholds a mask, and where it fails."""
    if family == "bloom":
        monkeypatch.setattr(BloomForCausalLM, "reorder_cache", None)
    flags = (*TARGET, "--tokens", "4", "--strategy", "greedy", "beam")
    together = shop.align("generate", family, *flags)
    for only in (("--only", "reference"), ("--only", "candidate")):
        assert shop.align("generate", family, *(flags if "reference" in only else TARGET), *only).code == 0
    apart = shop.align("generate", family, *TARGET, "--compare")
    assert together.code == apart.code == 1
    assert family != "bloom" or "failed at" in apart.report["failures"][0]
    for name in ("verdict", "tensors", "notes", "tables", "failures"):
        assert together.report[name] == apart.report[name], name
