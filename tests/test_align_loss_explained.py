"""Why a loss is not torch's: the mistakes in stock are torch's own cross entropy, wrongly divided or paired."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from align.explanations.losses import DIVISOR, explained, supposed
from align.tasks import TASKS, UNSHIFTED

LOGITS = torch.randn((3, 7, 11), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1)).masked_fill(
    torch.rand((3, 7), generator=torch.Generator().manual_seed(2)) < 0.4, -100)
SHIFTED = LOGITS[:, :-1].reshape(-1, 11), LABELS[:, 1:].reshape(-1)
FLAT = LOGITS.reshape(-1, 11), LABELS.reshape(-1)
UNSHIFTED_TOLD = next(iter(UNSHIFTED))


def token_loss(logits, labels):
    return cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none").numpy()


def mistakes(task, **outputs):
    labels = {"labels": LABELS.numpy()}
    return supposed(TASKS[task], {name: tensor.numpy() for name, tensor in outputs.items()}, labels, token_loss)


@pytest.mark.parametrize("told,value", [
    (DIVISOR, cross_entropy(*SHIFTED, reduction="sum") / 18),
    (UNSHIFTED_TOLD, cross_entropy(*FLAT)),
    (f"{UNSHIFTED_TOLD}, and {DIVISOR}", cross_entropy(*FLAT, reduction="sum") / 21),
])
def test_a_mistake_gives_what_torch_gives_with_it(told, value):
    assert mistakes("causal-lm", logits=LOGITS)[told] == pytest.approx(float(value), rel=1e-6)


def test_a_span_is_the_mean_of_its_two_ends():
    logits = torch.randn((2, 4, 6), generator=torch.Generator().manual_seed(3))
    labels = {"start_positions": torch.tensor([1, 9, 2, 3]), "end_positions": torch.tensor([2, 9, 9, 5])}
    found = supposed(TASKS["question-answering"], {"start_logits": logits[0].numpy(), "end_logits": logits[1].numpy()},
                     {name: tensor.numpy() for name, tensor in labels.items()}, token_loss)
    ends = [cross_entropy(scores, positions.clamp(max=6), ignore_index=6, reduction="sum") / 4
            for scores, positions in zip(logits, labels.values(), strict=True)]
    assert found[DIVISOR] == pytest.approx(float(sum(ends) / 2), rel=1e-6)


def test_one_mistake_must_explain_every_loss_that_is_wrong():
    right = {"loss.plain": 2.0, "loss.padded": 3.0, "loss.ignored": 4.0}
    known = {"loss.padded": {"a": 1.5, "b": 1.0}, "loss.ignored": {"a": 1.0, "b": 2.0}}
    assert explained(right, right, known) is None
    assert explained(right, {**right, "loss.padded": 1.5, "loss.ignored": 1.0}, known)[:2] == ("a", "loss.ignored")
    assert explained(right, {**right, "loss.padded": 1.5, "loss.ignored": 2.0}, known) is None
    assert explained(right, {**right, "loss.plain": 1.5}, known) is None
    assert explained(right, {**right, "loss.padded": np.nan}, known) is None
