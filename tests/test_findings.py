"""The README's table of findings, each proved in a few lines: where Paddle or PaddleNLP computes something else."""

import numpy as np
import paddle
import pytest
import torch

LOGITS = np.random.default_rng(0).standard_normal((8, 5)).astype("float32")
LABELS = np.array([0, 1, 2, 3, 4, -100, -100, -100])


def test_paddles_mean_cross_entropy_divides_by_ignored_positions_too():
    ours = paddle.nn.functional.cross_entropy(paddle.to_tensor(LOGITS), paddle.to_tensor(LABELS)).item()
    torchs = torch.nn.functional.cross_entropy(torch.from_numpy(LOGITS), torch.from_numpy(LABELS)).item()
    assert ours == pytest.approx(torchs * 5 / 8, rel=1e-6)


def test_paddles_cross_entropy_never_exceeds_64():
    logits, label = np.array([[0.0, 100.0]], "float32"), np.array([0])
    assert torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(label)).item() == 100.0
    assert paddle.nn.functional.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(label)).item() == 64.0


def test_paddles_padding_idx_returns_zeros():
    table = np.ones((3, 2), "float32")
    assert torch.nn.functional.embedding(torch.tensor([0]), torch.from_numpy(table), padding_idx=0).sum() == 2
    assert paddle.nn.functional.embedding(paddle.to_tensor([0]), paddle.to_tensor(table), padding_idx=0).sum() == 0


def test_paddles_relu_hides_nan():
    assert torch.nn.functional.relu(torch.tensor(float("nan"))).isnan()
    assert paddle.nn.functional.relu(paddle.to_tensor(float("nan"))).item() == 0.0


def test_the_gradient_of_paddles_silu_is_not_a_number_far_on_the_left():
    x = np.array([-87.0, -89.0], "float32")
    theirs, ours = torch.tensor(x, requires_grad=True), paddle.to_tensor(x, stop_gradient=False)
    torch.nn.functional.silu(theirs).sum().backward()
    paddle.nn.functional.silu(ours).sum().backward()
    assert theirs.grad.abs().max() < 1e-35
    assert np.isneginf(ours.grad.numpy()[0]) and np.isnan(ours.grad.numpy()[1])


def test_paddles_max_pool_hides_nan():
    picture = np.zeros((1, 1, 2, 2), "float32")
    picture[0, 0, 0, 0] = np.nan
    assert torch.nn.functional.max_pool2d(torch.from_numpy(picture), 2).isnan()
    assert paddle.nn.functional.max_pool2d(paddle.to_tensor(picture), 2).item() == 0.0


def test_paddles_batch_norm_keeps_momentum_of_what_torch_forgets():
    """torch: running = (1 - momentum) running + momentum batch; Paddle: running = momentum running + …"""
    batch = np.full((4, 1, 2, 2), 3.0, "float32")
    for momentum in (0.1, 0.25):
        torchs, paddles = torch.nn.BatchNorm2d(1, momentum=momentum), paddle.nn.BatchNorm2D(1, momentum=1 - momentum)
        torchs.train()(torch.from_numpy(batch))
        paddles.train()(paddle.to_tensor(batch))
        assert torchs.running_mean.item() == pytest.approx(3 * momentum, rel=1e-6)
        assert paddles._mean.item() == pytest.approx(3 * momentum, rel=1e-6)


def test_paddles_batch_norm_keeps_the_biased_variance_and_torchs_the_unbiased():
    """Outputs agree in training all the same, running variances part by n / (n - 1), n = batch x height x width."""
    batch = np.random.default_rng(2).standard_normal((2, 3, 2, 2)).astype("float32")
    torchs, paddles = torch.nn.BatchNorm2d(3, momentum=1.0).train(), paddle.nn.BatchNorm2D(3, momentum=0.0)
    paddles.train()
    given = torchs(torch.from_numpy(batch)).detach().numpy(), paddles(paddle.to_tensor(batch)).numpy()
    np.testing.assert_allclose(*given, atol=2e-6)
    np.testing.assert_allclose(torchs.running_var.numpy(), batch.var((0, 2, 3), ddof=1), rtol=1e-5)
    np.testing.assert_allclose(paddles._variance.numpy(), batch.var((0, 2, 3), ddof=0), rtol=1e-5)
    np.testing.assert_allclose(torchs.running_var.numpy(), paddles._variance.numpy() * 8 / 7, rtol=1e-5)


def test_paddles_layer_norm_refuses_a_large_epsilon():
    with pytest.raises(ValueError, match="epsilon"):
        paddle.nn.functional.layer_norm(paddle.ones([2, 4]), 4, epsilon=1e-2)


def test_paddles_float32_sum_over_the_last_axis_is_tens_of_times_less_exact_than_torchs():
    values = np.exp(np.random.default_rng(1).standard_normal((8, 50_400))).astype("float32")
    exact = values.astype("float64").sum(-1)
    paddles = np.abs(paddle.to_tensor(values).sum(-1).numpy() / exact - 1).max()
    torchs = np.abs(torch.from_numpy(values).sum(-1).numpy() / exact - 1).max()
    assert paddles > 10 * torchs


def test_paddlenlps_gptj_crashes_without_a_mask_when_the_config_has_no_pad_token():
    from paddlenlp.transformers.gptj.configuration import GPTJConfig
    from paddlenlp.transformers.gptj.modeling import GPTJModel
    tiny = dict(vocab_size=20, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=16)
    ids = paddle.to_tensor([[1, 2, 3]])
    with pytest.raises(Exception):  # noqa: B017 (Paddle raises whatever its operator raises)
        GPTJModel(GPTJConfig(**tiny, pad_token_id=None)).eval()(ids)
    GPTJModel(GPTJConfig(**tiny, pad_token_id=0)).eval()(ids)


def test_paddlenlps_gptj_ignores_position_ids():
    from paddlenlp.transformers.gptj.configuration import GPTJConfig
    from paddlenlp.transformers.gptj.modeling import GPTJModel
    model = GPTJModel(GPTJConfig(vocab_size=20, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=16,
                                 pad_token_id=0)).eval()
    ids, reversed_positions = paddle.to_tensor([[1, 2, 3]]), paddle.to_tensor([[2, 1, 0]])
    assert bool((model(ids)[0] == model(ids, position_ids=reversed_positions)[0]).all())


def test_paddlenlps_auto_class_takes_a_converted_gptj_for_another_architecture(tmp_path, monkeypatch):
    from paddlenlp.transformers import AutoModel
    monkeypatch.chdir(tmp_path)
    from convert.cli import main
    from convert.gptj import FAMILY
    assert main(FAMILY, []) == 0
    assert "GPTJ" not in type(AutoModel.from_pretrained("out/demo-gptj")).__name__
