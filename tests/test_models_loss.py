"""models/loss.py against torch."""

import numpy as np
import paddle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models import loss

IGNORED = -100


def logits_and_labels(seed=0, rows=40, classes=11, spread=1.0, ignored=0.3, dtype="int64"):
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(rows, classes)) * spread).astype("float32")
    labels = random.integers(0, classes, rows)
    return logits, np.where(random.random(rows) < ignored, IGNORED, labels).astype(dtype)


def both(ours, theirs, *arrays):
    """Values of both sides, and gradients with respect to the first array."""
    results = []
    for function, tensor in [(ours, paddle.to_tensor), (theirs, torch.tensor)]:
        first, *rest = map(tensor, arrays)
        if tensor is torch.tensor:
            first.requires_grad_()
        else:
            first.stop_gradient = False
        value = function(first, *rest)
        value.sum().backward()
        results.append((value.detach().numpy(), first.grad.numpy()))
    return results


def assert_same(ours, theirs, *arrays, rel=1e-6, gradient_rel=3e-6):
    (value, gradient), (expected, expected_gradient) = both(ours, theirs, *arrays)
    assert value.shape == expected.shape and value.dtype == expected.dtype
    np.testing.assert_allclose(value, expected, rtol=rel, atol=rel * np.abs(expected).max(initial=0))
    bound = gradient_rel * np.linalg.norm(np.nan_to_num(expected_gradient)) + 1e-12
    assert np.linalg.norm(gradient - expected_gradient) <= bound


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.97])
def test_cross_entropy(reduction, spread, ignored):
    logits, labels = logits_and_labels(spread=spread, ignored=ignored)
    assert_same(
        lambda x, y: loss.cross_entropy(x, y, reduction=reduction),
        lambda x, y: F.cross_entropy(x, y, reduction=reduction),
        logits,
        labels,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 20),
    classes=st.integers(1, 70),
    spread=st.floats(0, 1000),
    ignored=st.floats(0, 0.9),
)
def test_cross_entropy_of_anything(seed, rows, classes, spread, ignored):
    logits, labels = logits_and_labels(seed, rows, classes, spread, ignored)
    labels[0] = 0
    (value, gradient), (expected, expected_gradient) = both(
        loss.cross_entropy, F.cross_entropy, logits, labels
    )
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_not_clipped_at_64():
    logits, labels = np.array([[0.0, 500.0]], "float32"), np.array([0])
    assert float(loss.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels))) == 500.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_label_ignored(reduction):
    """NaN for the mean as in torch, and gradients of zero."""
    logits, labels = logits_and_labels(ignored=1.0)
    (value, gradient), (expected, expected_gradient) = both(
        lambda x, y: loss.cross_entropy(x, y, reduction=reduction),
        lambda x, y: F.cross_entropy(x, y, reduction=reduction),
        logits,
        labels,
    )
    np.testing.assert_array_equal(value, expected)
    assert np.isnan(value).any() == (reduction == "mean")
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_a_vocabulary_of_50400():
    """Paddle's own sum is 5e-6 off here."""
    logits, labels = logits_and_labels(rows=64, classes=50400, spread=3.0)
    true = F.cross_entropy(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)).item()
    assert float(loss.cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(labels))) == pytest.approx(
        true, rel=2e-7
    )
    assert_same(loss.cross_entropy, F.cross_entropy, logits, labels)


def test_int32_labels_and_an_axis_of_time():
    logits, labels = logits_and_labels(rows=40, dtype="int32")
    assert_same(
        lambda x, y: loss.cross_entropy(x.reshape([4, 10, 11]), y.reshape([4, 10]), reduction="none"),
        lambda x, y: F.cross_entropy(x, y.long(), reduction="none").reshape(4, 10),
        logits,
        labels,
    )


def test_minus_infinity_in_the_logits():
    logits, labels = logits_and_labels(ignored=0.0)
    logits[:, 0] = -np.inf
    labels[labels == 0] = 1
    assert_same(loss.cross_entropy, F.cross_entropy, logits, labels)


@pytest.mark.parametrize("label", [-1, 11, -101])
def test_labels_outside_are_refused(label):
    logits, labels = map(paddle.to_tensor, logits_and_labels())
    labels[0] = label
    with pytest.raises(ValueError, match=r"neither in \[0, 11\) nor the ignored index -100"):
        loss.cross_entropy(logits, labels)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        loss.cross_entropy(*map(paddle.to_tensor, logits_and_labels()), reduction="max")


def test_causal_lm():
    logits, labels = logits_and_labels(rows=40)
    from transformers.loss.loss_utils import ForCausalLMLoss

    assert_same(
        lambda x, y: loss.causal_lm_loss(x.reshape([4, 10, 11]), y.reshape([4, 10])),
        lambda x, y: ForCausalLMLoss(x.reshape(4, 10, 11), y.reshape(4, 10), vocab_size=11),
        logits,
        labels,
    )


def test_mse():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 300, 70)).astype("float32")
    assert_same(loss.mse, F.mse_loss, a, b)


@pytest.mark.parametrize("spread", [1.0, 20.0, 300.0])
def test_bce_with_logits(spread):
    random = np.random.default_rng(0)
    logits = (random.normal(size=(30, 7)) * spread).astype("float32")
    logits[0] = 0.0
    targets = random.integers(0, 2, (30, 7)).astype("float32")
    targets[1] = 0.4
    assert_same(loss.bce_with_logits, F.binary_cross_entropy_with_logits, logits, targets)


def test_bce_of_a_nearly_perfect_prediction():
    """torch's own gradient is 0 at x = 17, y = 1, where the true one is -4e-8; so float64 is the judge."""
    targets = np.tile([[0.0, 1.0]], (5, 1)).astype("float32")
    logits = (targets * 2 - 1) * 17
    (value, gradient), _ = both(loss.bce_with_logits, F.binary_cross_entropy_with_logits, logits, targets)
    _, (expected, expected_gradient) = both(
        loss.bce_with_logits,
        F.binary_cross_entropy_with_logits,
        logits.astype("float64"),
        targets.astype("float64"),
    )
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)


def test_classification_by_labels():
    """The four cases of transformers; the nets' tests hold them against its heads."""
    logits = paddle.to_tensor(logits_and_labels(rows=6, classes=3)[0])
    classes, shares = paddle.to_tensor([0, 2, 1, 1, 0, 2]), paddle.rand([6, 3])
    assert loss.classification_loss(logits, classes, 3) == loss.cross_entropy(logits, classes)
    assert loss.classification_loss(logits, shares, 3) == loss.bce_with_logits(logits, shares)
    assert loss.classification_loss(logits, shares, 3, "regression") == loss.mse(logits, shares)
    single = loss.classification_loss(logits[:, :1], shares[:, 0], 1)
    assert single == loss.mse(logits[:, 0], shares[:, 0])
    with pytest.raises(ValueError, match="unknown problem_type 'ranking'"):
        loss.classification_loss(logits, classes, 3, "ranking")


def test_spans_outside_are_clamped_or_ignored():
    start, end = np.random.default_rng(0).normal(size=(2, 5, 9)).astype("float32")
    starts, ends = np.array([0, 8, 9, 30, -4]), np.array([[3], [8], [9], [2], [0]])

    def theirs(x, y, i, j):
        i, j = i.clamp(0, 9), j.squeeze(-1).clamp(0, 9)
        return (F.cross_entropy(x, i, ignore_index=9) + F.cross_entropy(y, j, ignore_index=9)) / 2

    assert_same(loss.span_loss, theirs, start, end, starts, ends)


@pytest.mark.parametrize("candidates", [8, 20])
def test_contrastive(candidates):
    random = np.random.default_rng(0)
    a = random.normal(size=(8, 16)).astype("float32")
    b = random.normal(size=(candidates, 16)).astype("float32")
    b[:8] += a

    def theirs(x, y):
        return F.cross_entropy(20.0 * F.normalize(x) @ F.normalize(y).T, torch.arange(8))

    assert_same(loss.contrastive_loss, theirs, a, b, rel=3e-6, gradient_rel=1e-5)


def test_mean_pool():
    hidden = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])

    def theirs(x, m):
        weights = m.unsqueeze(-1).expand(x.size()).float()
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    assert_same(loss.mean_pool, theirs, hidden, mask)
