"""Where Paddle's optimizers and schedules are not torch's, each proved by a few lines, so that a README may say so."""

from __future__ import annotations

import inspect

import numpy as np
import paddle
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from align.optimizing.paddle_side import PaddleTraining
from align.optimizing.recipe import Recipe
from align.optimizing.torch_side import TorchTraining


def parameter(*values: float):
    made = paddle.create_parameter([len(values)], "float32")
    made.set_value(np.array(values, np.float32))
    return made


def step(optimizer, parameters, *gradients: float):
    for one, gradient in zip(parameters, gradients, strict=True):
        (one * gradient).sum().backward()
    optimizer.step()
    optimizer.clear_grad()


def rates(schedule, many: int) -> list[float]:
    found = []
    for _ in range(many):
        found.append(schedule())
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adam", "AdamW"])
def test_paddle_clips_each_group_by_its_own_norm(name):
    """Gradients 30 and 40 have the norm 50: clipped to 1 they are 0.6 and 0.8. Paddle clips each group to 1."""
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    for grouped in (False, True):
        one, two = parameter(0.0), parameter(0.0)
        given = [{"params": [one]}, {"params": [two]}] if grouped else [one, two]
        betas = {"beta1": 0.0, "beta2": 0.0, "epsilon": 1e6} if name.startswith("Adam") else {}
        optimizer = getattr(paddle.optimizer, name)(1e6 if betas else 1.0, parameters=given, grad_clip=clip, **betas)
        step(optimizer, (one, two), 30.0, 40.0)
        expected = [-1, -1] if grouped else [-0.6, -0.8]
        assert [one.item(), two.item()] == pytest.approx(expected, rel=1e-4)


def test_torch_clips_groups_by_the_norm_of_all():
    recipe = Recipe("sgd", 1.0, "constant", warmup=0, clip=1.0, weight_decay=0.1)
    one, two = torch.nn.Parameter(torch.zeros(1, 1)), torch.nn.Parameter(torch.zeros(1))
    training = TorchTraining(recipe, [one, two])
    assert len(training.optimizer.param_groups) == 2
    one.grad, two.grad = torch.full((1, 1), 30.0), torch.full((1,), 40.0)
    training.update()
    assert [one.item(), two.item()] == pytest.approx([-0.6, -0.8])


def test_a_groups_learning_rate_is_a_factor_in_paddle_and_the_rate_in_torch():
    ours = parameter(0.0)
    step(paddle.optimizer.SGD(0.1, parameters=[{"params": [ours], "learning_rate": 0.01}]), [ours], 1.0)
    theirs = torch.nn.Parameter(torch.zeros(1))
    theirs.grad = torch.ones(1)
    torch.optim.SGD([{"params": [theirs], "lr": 0.01}], lr=0.1).step()
    assert (ours.item(), theirs.item()) == pytest.approx((-0.001, -0.01))


def test_apply_decay_param_fun_is_asked_about_names_of_tensors_and_not_of_the_net():
    net, asked = paddle.nn.Sequential(paddle.nn.Linear(2, 2), paddle.nn.LayerNorm(2)), []
    optimizer = paddle.optimizer.AdamW(parameters=net.parameters(), apply_decay_param_fun=asked.append)
    net(paddle.ones([1, 2])).square().sum().backward()
    optimizer.step()
    assert not {name for name, _ in net.named_parameters()} & set(asked)
    assert sorted(name.rpartition(".")[2] for name in asked) == ["b_0", "b_0", "w_0", "w_0"]


def test_weight_decay_of_a_group_stays_in_the_parameter_for_the_next_optimizer():
    """It is a regularizer of the parameter from then on, which an AdamW without weight decay then has as L2."""
    ours = parameter(1.0)
    paddle.optimizer.SGD(0.1, parameters=[{"params": [ours], "weight_decay": 0.5}])
    step(paddle.optimizer.AdamW(0.1, parameters=[ours], weight_decay=0.0), [ours], 0.0)
    fresh = parameter(1.0)
    step(paddle.optimizer.AdamW(0.1, parameters=[fresh], weight_decay=0.0), [fresh], 0.0)
    assert (ours.item(), fresh.item()) == pytest.approx((0.9, 1.0))


def test_noam_decay_counts_from_zero():
    """Eq. 3 of Vaswani et al. 2017 counts from 1: no update has the rate 0. last_epoch=0 counts so."""
    formula = [512**-0.5 * min(number**-0.5, number * 4000**-1.5) for number in range(1, 6)]
    assert rates(paddle.optimizer.lr.NoamDecay(512, 4000), 6) == pytest.approx([0.0, *formula])
    assert rates(paddle.optimizer.lr.NoamDecay(512, 4000, last_epoch=0), 5) == pytest.approx(formula)


def test_polynomial_decay_raises_a_rate_below_its_default_end():
    assert rates(paddle.optimizer.lr.PolynomialDecay(5e-5, 10), 11)[-1] == pytest.approx(1e-4)


def test_linear_warmup_asks_for_a_step_or_more():
    with pytest.raises(AssertionError):
        paddle.optimizer.lr.LinearWarmup(0.1, 0, 0.0, 0.1)


def test_paddlenlps_cosine_decay_makes_a_whole_wave():
    """Half way down to 0, and back to the full rate at the end; transformers' ends at 0."""
    from paddlenlp.transformers import CosineDecayWithWarmup
    ours = rates(CosineDecayWithWarmup(1.0, 10, 0), 11)
    assert (ours[5], ours[10]) == pytest.approx((0.0, 1.0))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 10)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.0])


def test_defaults_that_differ_and_that_do_not():
    def default(cls, name):
        return inspect.signature(cls.__init__).parameters[name].default
    assert (default(paddle.optimizer.Momentum, "momentum"), default(torch.optim.SGD, "momentum")) == (0.9, 0)
    for ours, theirs in (("weight_decay", "weight_decay"), ("epsilon", "eps"), ("learning_rate", "lr")):
        assert default(paddle.optimizer.AdamW, ours) == default(torch.optim.AdamW, theirs)


def test_epsilon_is_added_at_the_same_place():
    """g / (|g| + epsilon) for the first update of both: outside the root, behind the correction for bias."""
    ours, theirs = parameter(0.0), torch.nn.Parameter(torch.zeros(1))
    step(paddle.optimizer.Adam(1.0, epsilon=0.1, parameters=[ours]), [ours], 0.5)
    theirs.grad = torch.full((1,), 0.5)
    torch.optim.Adam([theirs], lr=1.0, eps=0.1).step()
    assert (ours.item(), theirs.item()) == pytest.approx((-0.5 / 0.6, -0.5 / 0.6), rel=1e-6)


def test_paddles_adam_keeps_the_powers_of_beta_in_float32():
    """So that 1 - beta2^2, about 0.002, has an error of 1e-5; torch's are float64, unless its betas are tensors."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(32, 32)).astype(np.float32) * 0.02
    gradients = [rng.normal(size=(32, 32)).astype(np.float32) for _ in range(10)]
    recipe = Recipe("adam", 1e-3, "constant", warmup=0, clip=None, weight_decay=0.0)

    def torchs(dtype, **choices):
        weight = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
        training = TorchTraining(recipe, [weight], **choices)
        for gradient in gradients:
            weight.grad = torch.tensor(gradient, dtype=dtype)
            training.update()
        return weight.detach().numpy()
    ours = paddle.create_parameter([32, 32], "float32")
    ours.set_value(start)
    training = PaddleTraining(recipe, [("w", ours)], lambda name: True)
    for gradient in gradients:
        (ours * paddle.to_tensor(gradient)).sum().backward()
        training.update()
    exact = torchs(torch.float64)
    tensors = torchs(torch.float32, betas=(torch.tensor(0.9), torch.tensor(0.999)))
    errors = [np.linalg.norm(found - exact) for found in (torchs(torch.float32), tensors, ours.numpy())]
    assert errors[1] > 3 * errors[0] and errors[2] > 3 * errors[0]
    assert errors[2] < 3 * errors[1]


def test_the_norm_that_torch_clips_by_is_less_exact_than_paddles():
    """Of four million alike elements torch's float32 sum on the CPU is off by more than 1e-5, Paddle's is not."""
    gradient = np.random.default_rng(0).normal(size=4_000_000).astype(np.float32)
    exact = np.linalg.norm(gradient.astype(np.float64))
    theirs = torch.nn.utils.get_total_norm([torch.from_numpy(gradient)]).item()
    weight = paddle.create_parameter([len(gradient)], "float32")
    (_, ours), = paddle.nn.ClipGradByGlobalNorm(1.0)([(weight, paddle.to_tensor(gradient))])
    assert abs(theirs / exact - 1) > 1e-5 > 1e-6 > abs(np.linalg.norm(ours.numpy().astype(np.float64)) - 1)
