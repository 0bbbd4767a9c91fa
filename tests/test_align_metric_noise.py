"""A model of which torch itself is less sure than the fixed bounds is judged by torch's own noise, and only by that."""

import numpy as np
import pytest
import torch
from align_fixtures import TOKENIZERS, Workshop, family_of, torch_model

from align import metric
from align.agreement import Noise, compare_scores, settle
from align.scores import choices, negative_log_likelihood
from align.tolerance import METRIC, TOKEN_LOSS

SHARP = ("q_proj", "k_proj", "lm_head", "query", "key", "c_attn", "qa_outputs", "q.weight", "k.weight")
HEADS = {"GPTJForCausalLM": 10.0, "GPT2LMHeadModel": 30.0, "BertForQuestionAnswering": 10.0, "BertModel": 10.0,
         "T5ForConditionalGeneration": 3.0}


def sharpened(shop, head, by, run):
    """A net whose attention is ``by`` times as peaked as a trained one's, so that rounding grows in it."""
    model = torch_model(head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in SHARP):
                parameter.mul_(by)
    source = shop.root / f"source-{run}"
    model.save_pretrained(source)
    for name, text in TOKENIZERS[family_of(head)].items():
        (source / name).write_text(text, "utf-8")
    return shop.convert(family_of(head), source, run)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("unruly"))


@pytest.fixture(scope="module")
def gptj(shop):
    return sharpened(shop, "GPTJForCausalLM", HEADS["GPTJForCausalLM"], "gptj")


@pytest.mark.parametrize("head", HEADS)
def test_what_torch_does_not_know_itself_is_no_divergence(shop, head):
    outcome = shop.align("metric", sharpened(shop, head, HEADS[head], head))
    assert (outcome.code, outcome.report["failures"]) == (0, [])
    judged = [tensor for tensor in outcome.report["tensors"] if tensor["judgements"]]
    assert max(tensor["rel_l2"] for tensor in judged) > METRIC
    assert any("beyond the fixed bounds" in note and "none of them fails" in note for note in outcome.report["notes"])


def test_a_model_that_keeps_the_fixed_bounds_costs_no_run_more(shop, monkeypatch):
    run = shop.make("GPTJForCausalLM", "tame", tokenizer=True)
    monkeypatch.setattr(metric, "_noise", None)
    outcome = shop.align("metric", run)
    assert outcome.code == 0 and not any("fixed bounds" in note for note in outcome.report["notes"])


@pytest.mark.parametrize("epsilon", [3e-5, 1e-3])
def test_a_mistake_larger_than_the_noise_is_still_one(shop, gptj, monkeypatch, epsilon):
    """Another epsilon in every norm of the Paddle net."""
    from align.paddle_net import OwnNet
    build = OwnNet._build

    def wrong(self):
        model = build(self)
        for _, layer in model.named_sublayers():
            if type(layer).__name__ == "LayerNorm":
                layer._epsilon = epsilon
        return model
    monkeypatch.setattr(OwnNet, "_build", wrong)
    outcome = shop.align("metric", gptj)
    assert outcome.code == 1 and "token_nll" in outcome.failing
    assert "torch's own noise" in outcome.report["failures"][0]
    assert any("beyond the fixed bounds" in note for note in outcome.report["notes"])


def test_recorded_apart_it_is_judged_by_the_same_noise(shop, gptj):
    together = shop.align("metric", gptj)
    for side in ("reference", "candidate"):
        assert shop.align("metric", gptj, "--only", side).code == 0
    apart = shop.align("metric", gptj, "--compare")
    assert (together.code, apart.code) == (0, 0)
    assert [apart.report[key] for key in ("tensors", "values", "notes")] == [
        together.report[key] for key in ("tensors", "values", "notes")]
    assert any(tensor["judgements"] for tensor in apart.report["tensors"])


def test_paged_it_is_the_same_noise_to_the_bit(shop, gptj):
    whole, paged = (shop.align("metric", gptj, "--paging", word) for word in ("off", "on"))
    assert whole.report["tensors"] == paged.report["tensors"]
    assert any(tensor["judgements"] for tensor in paged.report["tensors"])


# By hand --------------------------------------------------------------------------------------------------------------

def runs_of(errors, size=200):
    """Arrays of torch runs over random tokens, whose losses are off by ``errors`` each; the first run is exact."""
    generator = np.random.default_rng(0)
    losses, targets = 5 + generator.standard_normal(size), np.zeros(size, int)
    return [{"token_nll": losses + error * generator.standard_normal(size), "token.predictions": targets,
             "token.margins": np.full(size, 1.0), "token.largest": np.full(size, 9.0), "token.targets": targets}
            for error in (0.0, *errors)]


@pytest.mark.parametrize("times, passed", [(1, True), (30, False)])
def test_losses_and_perplexity_against_a_noise_of_1e_3(times, passed):
    runs = runs_of([1e-3] * 6)
    noise = Noise.of(runs[:-1])
    exact = runs[0]["token_nll"]
    candidate = runs[-1] | {"token_nll": exact + times * (runs[-1]["token_nll"] - exact)}
    without = {result.name: result for result in compare_scores("causal-lm", runs[1], candidate)[0]}
    assert not without["token_nll"].passed and without["token_nll"].allowed == TOKEN_LOSS
    results = {result.name: result.passed for result in compare_scores("causal-lm", runs[1], candidate, noise)[0]}
    assert results["token_nll"] == passed
    assert results["value.perplexity (log)"] == passed


def test_the_floor_of_a_perplexity_is_that_of_a_mean_of_its_tokens():
    """200 losses whose errors of 1e-3 are independent: their mean is off by 1e-3 / sqrt(200), over runs and by terms.
    """
    floor = Noise.of(runs_of([1e-3] * 5)).floors["value.perplexity (log)"]
    assert floor.spread[0, 0] == pytest.approx(np.hypot(1, 1) * 1e-3 / np.sqrt(200), rel=0.5)
    assert floor.relative == pytest.approx(floor.spread[0, 0] / floor.oracle[0, 0])


def test_perplexities_beyond_what_can_be_squared_are_compared():
    runs = [run | {"token_nll": 100 * run["token_nll"]} for run in runs_of([1e-5] * 6)]
    results = compare_scores("causal-lm", runs[1], runs[-1], Noise.of(runs[:-1]))[0]
    assert all(result.passed for result in results)
    off = runs[-1] | {"token_nll": runs[-1]["token_nll"] + 0.1}
    assert not all(result.passed for result in compare_scores("causal-lm", runs[1], off, Noise.of(runs[:-1]))[0])


def test_a_prediction_may_be_another_one_within_what_torch_moves_margins_there():
    """Two tokens nearly tie; torch's runs move the margin of the first by 1e-2, and hardly that of the second."""
    def run(first, second):
        return choices("token", np.float32([[5 + first, 5, 0], [5 + second, 5, 0]]), np.zeros(2, int))
    runs = [run(1e-2 * (1 + step), 1e-2) for step in (0.0, 0.0, 1.0, -0.5, 0.5)]
    moved = Noise.of(runs).moved["token"]
    expected = 1e-2 * np.sqrt(np.mean(np.square([0.0, 1.0, -0.5, 0.5])))
    np.testing.assert_allclose(moved, [np.hypot(expected, expected / np.sqrt(2)), expected / np.sqrt(2)], rtol=1e-3)
    swapped = run(-1e-2, -1e-2)
    assert settle("token", runs[1], swapped, 0.0)[1] == 0
    assert settle("token", runs[1], swapped, moved)[1] == 2
    assert settle("token", runs[1], swapped, moved * np.array([1.0, 1e-3]))[0].tolist() == [0, 1]


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_losses_a_few_rows_at_a_time_are_torchs(rows):
    generator = np.random.default_rng(rows)
    logits, targets = generator.standard_normal((rows, 301)).astype(np.float32), generator.integers(0, 301, rows)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets), reduction="none")
    np.testing.assert_allclose(negative_log_likelihood(logits, targets), expected, rtol=1e-13)
