"""A model of which torch itself is less sure than the fixed bounds is judged by torch's own noise, and only by that."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from align_fixtures import TOKENIZERS, Workshop, family_of, torch_model

from align import metric
from align.agreement import Noise, compare_scores, may_be_rounding, moved_margins, settle
from align.decoding.greedy import Limits, greedy, reread
from align.noise import EPS
from align.scores import choices, negative_log_likelihood
from align.tolerance import LIMITS, METRIC, TOKEN_LOSS

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
    assert any("beyond the fixed bounds" in note and "none" not in note for note in outcome.report["notes"])


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
    assert results["value.perplexity"] == passed


def test_the_floor_of_a_perplexity_is_that_of_a_mean_of_its_tokens():
    """200 losses whose errors of 1e-3 are independent: their mean is off by 1e-3 / sqrt(200), over runs and by terms,
    and the perplexity by as large a share of itself.
    """
    floor = Noise.of(runs_of([1e-3] * 5)).floors["value.perplexity"]
    assert floor.spread[0, 0] == pytest.approx(np.hypot(1, 1) * 1e-3 / np.sqrt(200), rel=0.5)
    assert floor.oracle[0, 0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("mean", [5.0, 355.5, 500.0, 5000.0])
def test_perplexities_of_any_size_are_compared_by_their_share(mean):
    """e^355 cannot be squared and e^5000 is no number; 0.5 % is 0.5 % all the same."""
    runs = [run | {"token_nll": run["token_nll"] - run["token_nll"].mean() + mean} for run in runs_of([0.0] * 5)]
    for shift, passed in ((0.0, True), (1e-7, True), (2e-6, False), (5e-3, False)):
        off = runs[1] | {"token_nll": runs[1]["token_nll"] + shift}
        found = {result.name: result for result in compare_scores("causal-lm", runs[1], off)[0]}["value.perplexity"]
        assert found.passed == passed, (mean, shift)
        assert found.measures.rel_l2 == pytest.approx(np.expm1(shift), abs=1e-10)


def test_what_has_no_floor_of_its_own_is_held_to_the_fixed_bound_where_torch_is_sure():
    """One chaotic token among 200 does not excuse the others."""
    runs = runs_of([1e-9] * 6)
    for number, run in enumerate(runs[1:]):
        run["token_nll"][7] += 3e-2 * (-1) ** number * (1 + number)
    noise = Noise.of(runs[:-1])
    assert all(result.passed for result in compare_scores("causal-lm", runs[1], runs[-1], noise)[0])
    off = runs[-1] | {"token_nll": runs[-1]["token_nll"] + 1e-3}
    off["token_nll"][7] = runs[-1]["token_nll"][7]
    found = {result.name: result for result in compare_scores("causal-lm", runs[1], off, noise)[0]}["token_nll"]
    assert not found.passed and "allowed 1.0e-05" in found.failure


def test_one_chaotic_row_does_not_excuse_the_predictions_of_the_others():
    def run(chaos, shift=0.0):
        logits = np.tile(np.float32([5, 4.95, 0]), (64, 1))
        logits[63, 0] += chaos
        logits[:, 1] += shift
        return choices("class", logits, np.zeros(64, int))
    runs = [run(chaos) for chaos in (0.0, 0.0, 0.3, -0.3, 0.2, -0.2)]
    results, notes = compare_scores("sequence-classification", runs[1], run(0.0, 0.1), Noise.of(runs))
    assert "class.predictions" in [result.name for result in results if not result.passed]
    assert notes[0].startswith("1 of 64 class predictions differ")


@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_a_run_of_torch_that_gives_no_number_excuses_nothing(broken):
    runs = [choices("class", np.float32([[5, 4.5, 0], [3, 0, 1]]), np.zeros(2, int)) for _ in range(4)]
    runs[2]["class.margins"] = np.float32([broken, 2.0])
    wrong = choices("class", np.float32([[4.5, 5, 0], [3, 0, 1]]), np.zeros(2, int))
    results, _ = compare_scores("sequence-classification", runs[1], wrong, Noise.of(runs))
    assert "class.predictions" in [result.name for result in results if not result.passed]


def test_places_without_a_margin_say_nothing_of_how_far_others_move():
    """Of texts that have ended, 4 of 100 steps are left."""
    def run(moved):
        margins = np.full((1, 100), np.inf)
        margins[0, :4] = 1 + moved
        return {"text.predictions": np.zeros((1, 100), int), "text.margins": margins, "text.largest": np.ones((1, 100))}
    places, live = moved_margins([run(0.0), run(0.0), run(1e-2), run(-1e-2)], run(0.0), "text")
    assert live.sum() == 4
    np.testing.assert_allclose(places[0, :4], 1e-2 * np.sqrt(2 / 3), rtol=1e-6)
    moved = Noise.of([run(0.0), run(0.0), run(1e-2), run(-1e-2)]).moved["text"][0, :4]
    np.testing.assert_allclose(moved, LIMITS["propagated"]["row"] * np.sqrt(2) * 1e-2 * np.sqrt(2 / 3), rtol=1e-6)


def test_squared_errors_have_the_floor_of_their_mean():
    generator = np.random.default_rng(1)
    scores = 3 + generator.standard_normal(100)
    runs = [{"scores": scores + error * generator.standard_normal(100), "score_targets": np.zeros(100)}
            for error in (0.0, *[1e-4] * 6)]
    noise = Noise.of(runs[:-1])
    assert all(result.passed for result in compare_scores("sequence-classification", runs[1], runs[-1], noise)[0])
    off = runs[-1] | {"scores": runs[-1]["scores"] + 2e-3}
    failing = [result.name for result in compare_scores("sequence-classification", runs[1], off, noise)[0]
               if not result.passed]
    assert failing == ["scores", "value.mean_squared_error"]


def test_a_loss_near_0_is_judged_by_the_last_digit_of_1():
    """As in align.loss: -log p of a sure token is the logarithm of a sum that begins with 1."""
    losses = np.full(50, 1e-6)
    runs = [{"token_nll": losses} for _ in range(5)]
    for number, run in enumerate(runs[1:]):
        run["token_nll"] = losses + 1e-13 * (-1) ** number
    floor = Noise.of(runs).floors["token_nll"]
    assert all(found.passed for found in floor.judge(losses + 0.5 * EPS, "propagated"))


def test_what_keeps_its_fixed_bound_is_not_held_against_the_noise():
    runs = runs_of([1e-12] * 5)
    near = runs[1] | {"token_nll": runs[1]["token_nll"] * (1 + 1e-7)}
    results = compare_scores("causal-lm", runs[1], near, Noise.of(runs))[0]
    assert all(result.passed and not result.judgements for result in results)


def test_what_cannot_be_compared_is_no_matter_of_rounding():
    runs = runs_of([1e-3] * 2)
    broken = runs[1] | {"token_nll": np.where(np.arange(200) == 5, np.nan, runs[1]["token_nll"])}
    assert not may_be_rounding(compare_scores("causal-lm", runs[1], broken)[0])
    assert may_be_rounding(compare_scores("causal-lm", runs[1], runs[2])[0])
    assert not may_be_rounding(compare_scores("causal-lm", runs[1], runs[1])[0])


def test_a_prediction_may_be_another_one_within_what_torch_moves_margins_there():
    """Two tokens nearly tie; torch's runs move the margin of the first by 1e-2, and hardly that of the second."""
    def run(first, second):
        return choices("token", np.float32([[5 + first, 5, 0], [5 + second, 5, 0]]), np.zeros(2, int))
    runs = [run(1e-2 * (1 + step), 1e-2) for step in (0.0, 0.0, 1.0, -0.5, 0.5)]
    moved = Noise.of(runs).moved["token"]
    there = 1e-2 * np.sqrt(np.mean(np.square([0.0, 1.0, -0.5, 0.5])))
    limit = LIMITS["propagated"]["row"]
    np.testing.assert_allclose(moved, [limit * np.hypot(there, there / 2), limit * there / 2], rtol=1e-3)
    swapped = run(-1e-2, -1e-2)
    assert settle("token", runs[1], swapped, 0.0)[1] == 0
    assert settle("token", runs[1], swapped, moved)[1] == 2
    assert settle("token", runs[1], swapped, moved * np.array([1.0, 1e-3]))[0].tolist() == [0, 1]


def test_a_near_tie_of_torch_does_not_excuse_a_choice_that_the_candidate_is_sure_of():
    """Torch's margin is 1e-5, which rounding explains; the candidate's is 1."""
    near = choices("token", np.float32([[5 + 1e-5, 5, 0]]), np.zeros(1, int))
    for found, close in (([5, 5 + 1e-5, 0], 1), ([5, 6, 0], 0), ([5, 5, 6], 0)):
        assert settle("token", near, choices("token", np.float32([found]), np.zeros(1, int)), 0.0)[1] == close


# Around it ------------------------------------------------------------------------------------------------------------

class Recorder:
    """A side whose logits [rows, steps, words] come from what the decoder has read so far, and nothing else."""

    framework = "torch"

    def __init__(self, ends):
        self.ends, self.told = ends, []

    def sweep(self, passes, purpose=None):
        self.told.append(purpose)
        for run in passes:
            run()

    def outputs(self, arrays):
        ids = arrays["decoder_input_ids"]
        seen = np.cumsum(ids * np.arange(1, ids.shape[1] + 1), axis=1)
        logits = np.sin(seen[..., None] * np.arange(1, 12) + arrays["input_ids"][:, :1, None]).astype(np.float32)
        logits[..., 1] += 9.0 * (np.arange(ids.shape[1]) >= self.ends[arrays["input_ids"][:, 0]][:, None])
        return {"logits": logits}


def test_texts_that_are_read_again_are_what_was_decoded():
    """Three batches whose texts end at different steps, one of them never."""
    ends = np.array([2, 9, 4, 0, 7, 3])
    side, limits = Recorder(ends), Limits(0, 1, 8)
    sources = [{"input_ids": np.array(rows)[:, None]} for rows in ([0, 1], [2, 3], [4, 5])]
    decoded = greedy(side, sources, limits)
    chosen = decoded["text.predictions"]
    again = [reread(side, source, chosen[2 * number: 2 * number + 2], limits, [nullcontext()] * 2, "noise")
             for number, source in enumerate(sources)]
    assert all(len(of_source) == 2 for of_source in again)
    for name, array in decoded.items():
        np.testing.assert_array_equal(np.concatenate([of_source[1][name] for of_source in again]), array)
    assert np.isinf(decoded["text.margins"]).any() and np.isfinite(decoded["text.margins"]).any()


def test_a_sweep_tells_its_passes_and_the_gates_of_paged_ones(shop, gptj, monkeypatch):
    told = []
    monkeypatch.setattr("align.stage._progress", lambda stage, options: nullcontext(told.append))
    shop.align("loss", gptj, "--paging", "on")
    assert "torch, transformer.h.1, passes 1 to 3 of 3" in told
    assert "paddle, transformer.h.1, passes 1 to 3 of 3" in told
    assert "torch's own noise, transformer.h.2, passes 1 to 15 of 15" in told
    told.clear()
    shop.align("loss", gptj, "--paging", "off")
    assert {"torch, pass 1 of 3", "paddle, pass 3 of 3", "torch's own noise, pass 15 of 15"} <= set(told)


def test_what_fails_by_little_is_looked_at_again_with_its_predictions(shop, gptj, monkeypatch):
    """Limits at which a right net fails by less than four times."""
    from align import noise
    tight = {kind: {name: limit / 10 for name, limit in limits.items()} for kind, limits in LIMITS.items()}
    monkeypatch.setattr(noise, "LIMITS", tight)
    asked = []
    right = metric._noise

    def counted(session, step, reordered=4):
        asked.append(reordered)
        return right(session, step, 4)
    monkeypatch.setattr(metric, "_noise", counted)
    outcome = shop.align("metric", gptj)
    assert asked == [4, 20] and any("just beyond a limit of 5 runs" in note for note in outcome.report["notes"])


def test_a_wrong_weight_is_no_matter_of_noise(shop, gptj, monkeypatch):
    monkeypatch.setattr("align.stage.Session.weights_divergence", "transformer.wte.weight")
    monkeypatch.setattr(metric, "_noise", None)
    outcome = shop.align("metric", gptj)
    assert outcome.code == 1 and not any("torch's own noise" in note for note in outcome.report["notes"])


def test_a_recording_without_noise_is_judged_by_the_fixed_bounds_and_says_so(shop, gptj, monkeypatch):
    monkeypatch.setattr(metric, "_noise", lambda session, step: Noise())
    for side in ("reference", "candidate"):
        assert shop.align("metric", gptj, "--only", side).code == 0
    monkeypatch.setattr(metric, "_noise", None)
    outcome = shop.align("metric", gptj, "--compare")
    assert outcome.code == 1
    assert any("recorded without torch's own noise" in note and "--only reference" in note
               for note in outcome.report["notes"])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_losses_a_few_rows_at_a_time_are_torchs(rows):
    generator = np.random.default_rng(rows)
    logits, targets = generator.standard_normal((rows, 301)).astype(np.float32), generator.integers(0, 301, rows)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets), reduction="none")
    np.testing.assert_allclose(negative_log_likelihood(logits, targets), expected, rtol=1e-13)
