"""align.optimizer: updates computed by hand, schedules of others, set-ups that are right, and mistakes of set-ups."""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop, torch_model
from transformers import get_cosine_schedule_with_warmup

from align import optimizer as stage
from align.explanations.updates import explained_rates, rate_of
from align.faults.fault import EXPLANATIONS
from align.faults.optimizer import FAULTS
from align.optimizing.paddle_side import PaddleTraining
from align.optimizing.paddle_side import rates_of as rates_of_paddle
from align.optimizing.recipe import KINDS, SCHEDULES, Recipe, decayed
from align.optimizing.torch_side import TorchTraining, rates_of
from align.optimizing.torch_updates import given
from align.optimizing.updates import Course, floor_of
from align.runs import load_run
from align.stage import Session, add_flags
from align.tolerance import RATE
from align.torch_side import is_rms_norm
from convert.errors import BadInput

SHORT = ("--updates", "6", "--steps", "10", "--warmup", "3")
MISTAKE = "align.faults.optimizer:"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("optimizer"))
    made.make("GPTJForCausalLM", "gptj")
    return made


@functools.cache
def recorded(root, flags):
    """What the reference says, but for its own training."""
    session = session_of(root, flags)
    first, *_ = found = list(islice(stage.reference(session), 1))
    return found + list(islice(stage.reference(session), 1, 1 + len(first.told["courses"])))


def session_of(root, flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    stage.flags(parser)
    options = parser.parse_args(["--run", "gptj", "--reports", str(root / "reports"), *flags])
    return Session(load_run("gptj", root / "reports"), options, lambda told: None)


# By hand --------------------------------------------------------------------------------------------------------------

ANSWERS = {
    # One weight of 1 with a rate of 0.1 and a decay of 0.1, and one without decay; gradients 0.5 and -0.25.
    # L2: 0.5 + 0.1 = 0.6, 1 - 0.06 = 0.94; -0.25 + 0.094 = -0.156, 0.94 + 0.0156. Without: 0.95, 0.975.
    ("sgd", False): (0.9556, 0.975),
    # v = 0.6, 0.94; v = 0.54 - 0.156 = 0.384, 0.94 - 0.0384. Without: 0.95; 0.45 - 0.25 = 0.2, 0.93.
    ("momentum", False): (0.9016, 0.93),
    # 0.6 + 0.54 = 1.14, 0.886; v = 0.54 - 0.1614, -0.1614 + 0.9 v = 0.17934. Without: 0.95, 0.905; v = 0.2, -0.07.
    ("momentum", True): (0.868066, 0.912),
    # beta 0.9 and 0.99, epsilon 0.1. Without: 0.5 / 0.6; m = 0.02 / 0.19, v = 0.0031 / 0.0199, 0.105263 / 0.494688.
    # L2: 0.6 / 0.7; g = -0.158571, m = 0.0381429 / 0.19, v = 0.00381545 / 0.0199, 0.200752 / 0.537871.
    ("adam", False): (0.8769623, 0.8953880),
    # 0.99 - 0.0833333 = 0.9066667; 0.8976 - 0.0212787.
    ("adamw", False): (0.8763213, 0.8953880),
}


@pytest.mark.parametrize("optimizer, nesterov", ANSWERS)
def test_two_updates_are_those_computed_by_hand(optimizer, nesterov):
    recipe = Recipe(optimizer, 0.1, "constant", warmup=0, clip=None, weight_decay=0.1, nesterov=nesterov, beta2=0.99,
                    epsilon=0.1)
    for make in (updated_by_torch, updated_by_paddle):
        found = make(recipe, [np.ones((1, 1), np.float32), np.ones(1, np.float32)],
                     [[np.full((1, 1), g, np.float32), np.full(1, g, np.float32)] for g in (0.5, -0.25)])
        np.testing.assert_allclose([array.item() for array in found], ANSWERS[optimizer, nesterov], rtol=3e-7)


def test_clipping_is_by_the_norm_of_all_parameters():
    """3 and 4 have the norm 5, so a norm of 1 leaves 0.6 and 0.8."""
    recipe = Recipe("sgd", 1.0, "constant", warmup=0, clip=1.0, weight_decay=0.0)
    for make in (updated_by_torch, updated_by_paddle):
        found = make(recipe, [np.zeros((1, 1), np.float32), np.zeros(1, np.float32)],
                     [[np.full((1, 1), 3, np.float32), np.full(1, 4, np.float32)]])
        np.testing.assert_allclose([array.item() for array in found], [-0.6, -0.8], rtol=2e-7)


def updated_by_torch(recipe, start, gradients, **choices):
    parameters = [torch.nn.Parameter(torch.tensor(array)) for array in start]
    training = TorchTraining(recipe, parameters, **choices)
    for several in gradients:
        for parameter, gradient in zip(parameters, several, strict=True):
            parameter.grad = torch.tensor(gradient)
        training.update()
    return [parameter.detach().numpy() for parameter in parameters]


def updated_by_paddle(recipe, start, gradients):
    parameters = []
    for array in start:
        parameters.append(paddle.create_parameter(list(array.shape), "float32"))
        parameters[-1].set_value(array)
    training = PaddleTraining(recipe, [(str(len(one.shape)), one) for one in parameters], "2".__eq__)
    for several in gradients:
        for parameter, gradient in zip(parameters, several, strict=True):
            (parameter * paddle.to_tensor(gradient)).sum().backward()
        training.update()
    training.close()
    assert all(parameter.regularizer is None for parameter in parameters)
    return [parameter.numpy() for parameter in parameters]


# Schedules ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1000, 100), (10, 3), (7, 1), (50, 0)])
def test_paddles_rates_and_closed_forms_are_those_of_transformers(schedule, steps, warmup):
    if schedule == "noam" and not warmup:
        return
    recipe = Recipe(lr=3e-4, schedule=schedule, steps=steps, warmup=warmup)
    expected = rates_of(recipe, steps + 20)
    np.testing.assert_allclose(rates_of_paddle(recipe, steps + 20), expected, rtol=RATE, atol=1e-18)
    np.testing.assert_allclose([rate_of(recipe, done) for done in range(steps + 20)], expected, rtol=1e-9, atol=1e-18)
    assert max(expected) == pytest.approx(3e-4, rel=1e-12)


def test_noams_rates_are_those_of_the_paper():
    """Vaswani et al. 2017, eq. 3 with d_model 512 and 4000 steps of warm-up: 512^-0.5 4000^-0.5 = 6.987712e-4."""
    recipe = replace(Recipe(schedule="noam", steps=10000, warmup=4000), lr=512**-0.5 * 4000**-0.5)
    assert recipe.scale == pytest.approx(1.0)
    for found in (rates_of(recipe, 16000), rates_of_paddle(recipe, 16000)):
        assert [found[0], found[3999], found[15999]] == pytest.approx(
            [512**-0.5 * 4000**-1.5, 6.987712429686843e-4, 512**-0.5 * 16000**-0.5], rel=1e-9)


def test_the_reference_is_transformers_own_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 9)
    for rate in rates_of(Recipe("sgd", 0.5, "cosine", 9, 2), 9):
        assert schedule.get_last_lr() == [rate]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("changes, word", [
    (dict(warmup=10, steps=10), "--warmup"), (dict(schedule="noam", warmup=0), "--warmup 1"),
    (dict(schedule="polynomial", lr=1e-8), "larger --lr"), (dict(optimizer="lion"), "adamw")])
def test_what_no_schedule_can_do_is_refused(changes, word):
    with pytest.raises(BadInput, match=word):
        Recipe(**changes)


# What is asked --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", KINDS)
def test_the_floor_holds_float32_and_not_much_more(optimizer):
    """torch in float32, with its betas as float32 tensors too, is within what Rounding says, and not far within."""
    rng = np.random.default_rng(3)
    start = {"w": rng.normal(size=(64, 48)).astype(np.float32) * 0.02}
    gradients = [{"w": rng.normal(size=(64, 48)).astype(np.float32) * 1e-3} for _ in range(2)]
    recipe = Recipe(optimizer, 0.1 if optimizer in ("sgd", "momentum") else 1e-3, clip=None)
    course = Course(optimizer, recipe, 10, [1.0] * 10)
    _, plain, oracle, spread = given(course, start, gradients)
    choices = {"betas": (torch.tensor(0.9), torch.tensor(0.999))} if optimizer.startswith("adam") else {}
    other, = updated_by_torch(recipe, list(start.values()), [[gradients[n % 2]["w"]] for n in range(10)], **choices)
    judged = floor_of(oracle["w"], plain["w"], spread["w"]).judge(other, "isolated")
    assert 0.02 < max(found.share for found in judged) < 0.7
    assert not all(found.passed for found in floor_of(oracle["w"], plain["w"], spread["w"]).judge(
        (start["w"] + (plain["w"] - start["w"]) * np.float32(1.001)), "isolated"))


@pytest.mark.parametrize("head", ["GPTJForCausalLM", "BertForPreTraining", "T5ForConditionalGeneration"])
def test_what_decays_is_neither_a_norm_nor_a_bias(tmp_path, head):
    """By torch's modules, which the plan knows nothing of."""
    made, model = Workshop(tmp_path), torch_model(head)
    made.make(head, "run")
    run = load_run("run", made.reports)
    paths = {key: path for path, key in run.plan.keys.items()}
    found = decayed(run)
    for move in run.plan.moves:
        if move.target in found:
            parent, _, name = paths[move.sources[0]].rpartition(".")
            module = model.get_submodule(parent)
            plain = isinstance(module, torch.nn.LayerNorm) or is_rms_norm(module) or name == "bias"
            assert found[move.target] is not plain, move.target
    assert any(name.endswith("relative_attention_bias.weight") and held for name, held in found.items()) is (
        head.startswith("T5"))


# Set-ups --------------------------------------------------------------------------------------------------------------

def test_a_right_set_up_is_aligned_and_leaves_the_net_as_it_was(shop):
    outcome = shop.align("optimizer", "gptj", "--updates", "4", "--steps", "10", "--warmup", "2")
    assert (outcome.code, outcome.failing) == (0, []), (outcome.report.get("failures"), outcome.stderr)
    names = {tensor["name"] for tensor in outcome.report["tensors"]}
    for course in (*KINDS, "adam, small gradients", "adamw, small gradients", "adamw, own gradients"):
        assert {f"learning-rate ({course})", f"lm_head.weight ({course})"} <= names
    assert {f"learning-rate ({name}, 1000 steps, warm-up 100)" for name in SCHEDULES} <= names
    assert any("not of" in note and "ln_1" in note for note in outcome.report["notes"])
    trace = np.load(shop.reports / "gptj/traces/optimizer_paddle.npy", allow_pickle=True).item()
    assert "lm_head.weight (adamw, own gradients)" in trace


def test_only_a_right_update_passes(shop):
    """A net whose optimizer is right, once with every parameter of the answer a ten-thousandth of its movement off."""
    flags = ("--optimizer", "adamw", *SHORT)
    steps, session = recorded(shop.root, flags), session_of(shop.root, flags)
    answers = list(stage.candidate(session, iter(steps)))
    assert all(result.passed for result in stage.judge(session, zip(steps, answers, strict=True)).tensors)
    start = steps[0].view("start")
    for answer in answers[1:]:
        for name, array in answer.view("behind").items():
            answer.view("behind")[name] = array + np.float32(1e-3) * (array - start[name])
    results = stage.judge(session, zip(steps, answers, strict=True)).tensors
    wrong = [result for result in results if not result.name.startswith("learning-rate")]
    assert wrong and not any(result.passed for result in wrong)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.how)
def test_a_mistake_of_a_set_up_is_caught_and_explained(shop, fault):
    steps = recorded(shop.root, fault.flags)
    session = session_of(shop.root, (*fault.flags, "--candidate-optimizer", MISTAKE + fault.how))
    found = stage.judge(session, zip(steps, stage.candidate(session, iter(steps)), strict=True))
    assert not all(result.passed for result in found.tensors)
    word, = fault.explanation
    assert found.diagnosis and found.diagnosis.kind in EXPLANATIONS[word], found.diagnosis
    besides = [note for note in found.notes if note.startswith("Besides: ")]
    assert len(besides) == (fault.how == "a_tenth_and_all_decay"), besides
    held = session.candidate.model.parameters()
    assert {(one.regularizer, one.optimize_attr["learning_rate"], one.need_clip) for one in held} == {(None, 1.0, True)}


def test_of_two_mistakes_both_are_told(shop):
    fault = next(fault for fault in FAULTS if fault.how == "a_tenth_and_all_decay")
    session = session_of(shop.root, (*fault.flags, "--candidate-optimizer", MISTAKE + fault.how))
    steps = recorded(shop.root, fault.flags)
    found = stage.judge(session, zip(steps, stage.candidate(session, iter(steps)), strict=True))
    assert "the base rate is 0.0001 rather than 0.001" in found.diagnosis.sentence
    besides, = (note for note in found.notes if note.startswith("Besides: "))
    assert "biases and norms" in besides and "rather than 0.01" not in besides


def rates(many=10, **choices):
    recipe = Recipe(**{"steps": 40, "warmup": 3, **choices})
    return recipe, np.array([rate_of(recipe, done) for done in range(many)])


@pytest.mark.parametrize("ours, theirs, many, kind, told", [
    ({}, {"lr": 1e-4}, 10, "base-rate", "the base rate is 0.0001 rather than 0.001"),
    ({"schedule": "polynomial"}, {"lr": 1e-4}, 10, "base-rate", "the base rate is 0.0001 rather than 0.001"),
    ({}, {"lr": 0.00100002}, 10, "base-rate", "the base rate is 0.00100002 rather than 0.001"),
    ({"warmup": 10}, {"warmup": 20}, 6, None, None), ({"warmup": 10}, {"lr": 5e-4}, 6, None, None)])
def test_another_base_rate_is_told_where_nothing_else_can_be_meant(ours, theirs, many, kind, told):
    """Of a rate that only rises, a warm-up twice as long is half of it."""
    (recipe, expected), (_, given) = rates(many, **ours), rates(many, **ours | theirs)
    found = explained_rates(recipe, expected, given)
    assert found is None if kind is None else (found.kind, told in found.sentence) == (kind, True)


def test_no_earlier_stage_sees_a_wrong_optimizer(shop, monkeypatch):
    right = paddle.optimizer.AdamW.__init__
    monkeypatch.setattr(paddle.optimizer.AdamW, "__init__", lambda self, *given, apply_decay_param_fun=None, **named:
                        right(self, *given, **named))
    for name, *flags in (("weights",), ("forward",), ("loss",), ("backward", "--iterations", "2", "--accumulate", "1")):
        assert shop.align(name, "gptj", *flags).code == 0, name
    outcome = shop.align("optimizer", "gptj", "--optimizer", "adamw", *SHORT)
    assert (outcome.code, outcome.report["diagnosis"]["kind"]) == (1, "decay-group")
    assert outcome.report["first_divergence"] == "transformer.h.0.ln_1.weight"
    assert not [name for name in outcome.failing if name.startswith(("learning-rate", "transformer.wte"))]


def test_two_environments(shop):
    flags = ("--optimizer", "sgd", "--updates", "2", "--warmup", "1")
    assert shop.align("optimizer", "gptj", *flags, "--only", "reference").code == 0
    assert shop.align("optimizer", "gptj", "--only", "candidate").code == 0
    outcome = shop.align("optimizer", "gptj", "--compare")
    assert (outcome.code, outcome.failing) == (0, []) and len(outcome.report["tensors"]) > 60


def test_of_a_model_larger_than_memory_rows_are_updated(shop):
    outcome = shop.align("optimizer", "gptj", "--paging", "on", *SHORT)
    assert (outcome.code, outcome.failing) == (0, []), (outcome.report.get("failures"), outcome.stderr)
    assert outcome.tensor("lm_head.weight (adamw)")["shape"][0] == 8
    assert any("do not fit" in note for note in outcome.report["notes"])
    assert shop.align("optimizer", "gptj", "--paging", "on", "--candidate-optimizer", MISTAKE + "l2_decay").code == 2


@pytest.mark.parametrize("flags, word", [
    (("--updates", "1", "--steps", "9", "--warmup", "3"), "the rate is 0 in all 1 updates"),
    (("--optimizer", "adamw", "--lr", "1e-12", *SHORT), "by more than rounding"),
    (("--optimizer", "adamw", "--epsilon", "0", *SHORT), "--epsilon above 0"),
    (("--optimizer", "sgd", "--beta1", "0.8"), "--beta1: that is of adam and adamw, and sgd is what is compared"),
    (("--optimizer", "sgd", "--lr", "1e38", *SHORT), "smaller --lr")])
def test_what_moves_no_weight_or_none_to_a_number_is_refused(flags, word, shop):
    """Rows of an embedding that no token is have gradients of 0, and 0 / (sqrt(0) + 0) is no number."""
    outcome = shop.align("optimizer", "gptj", *flags)
    assert outcome.code == 2 and word in outcome.stderr


NO_DECAY = """
import paddle
from align.optimizing.paddle_side import schedule_of
from align.optimizing.recipe import Recipe

def build(net):
    rate = schedule_of(Recipe(lr=5e-5, steps=1000, warmup=100))
    return paddle.optimizer.AdamW(rate, parameters=net.parameters(), weight_decay=0.0,
                                  grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0))
"""


def test_a_report_says_so_where_no_update_shows_weight_decay(shop, tmp_path, monkeypatch):
    """The rates of ten of a hundred steps of warm-up add up to 2.25e-5: a decay of 0.01 is 2.25e-7 of a weight, and
    float32 rounds each update by up to 6e-8 of it."""
    (tmp_path / "no_decay.py").write_text(NO_DECAY, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ("--lr", "5e-5", "--steps", "1000", "--warmup", "100", "--candidate-optimizer", "no_decay:build")
    outcome = shop.align("optimizer", "gptj", *flags)
    assert outcome.code == 0 and "Of weight decay this says nothing (adamw" in outcome.report["caveat"]
    assert any("no_decay:build" in note for note in outcome.report["notes"])
    more = shop.align("optimizer", "gptj", *flags, "--weight-decay", "0.1")
    assert (more.code, more.report["caveat"]) == (1, None)


OWN = """
import paddle
def no_net(): ...
def nothing(net): return net
def broken(net): return paddle.optimizer.SGD(0.1, parameters=net.no_such())
"""


@pytest.mark.parametrize("name, words", [
    ("nowhere:build", "cannot be imported"), ("my_set_up", "package.module:function"),
    ("my_set_up:no_net", "called with the Paddle net"), ("my_set_up:nothing", "a paddle.optimizer.Optimizer is needed"),
    ("my_set_up:broken", "your optimizer my_set_up:broken failed at .*no_such"),
    ("my_typo:build", r"cannot be imported \(SyntaxError: .*my_typo.py, line 1"),
    ("my_script:build", r"cannot be imported \(ZeroDivisionError: ")])
def test_a_set_up_that_is_none_is_refused_in_a_sentence(shop, tmp_path, monkeypatch, name, words):
    for module, text in (("my_set_up", OWN), ("my_typo", "def build(net:"), ("my_script", "1 / 0")):
        (tmp_path / f"{module}.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_set_up", None)
    flags = (*SHORT, "--candidate-optimizer", name)
    session, steps = session_of(shop.root, flags), recorded(shop.root, ("--optimizer", "adamw", *SHORT))
    with pytest.raises(BadInput, match=words):
        list(stage.candidate(session, iter(steps)))


def test_a_script_that_ends_the_program_is_no_verdict(shop, tmp_path, monkeypatch):
    """Its 0 would be that of an aligned stage."""
    (tmp_path / "unguarded.py").write_text("import sys\nsys.exit(0)\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert shop.align("optimizer", "gptj", "--optimizer", "sgd", "--updates", "2", "--only", "reference").code == 0
    outcome = shop.align("optimizer", "gptj", "--only", "candidate", "--candidate-optimizer", "unguarded:build")
    assert outcome.code == 2 and 'if __name__ == "__main__"' in outcome.stderr
