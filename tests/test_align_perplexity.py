"""Perplexity with a stride, as transformers' documentation has it, and over ranks, where an average goes wrong."""

import math

import numpy as np
import pytest
import torch
from align_fixtures import Workshop, all_aligned, torch_model

from align.inputs import Inputs, batches
from align.scores import SCORES, perplexity
from align.texts import Encoder, Example, sliding_windows

HEAD = "GPTJForCausalLM"
CONFIG = {"vocab_size": 257, "pad_token_id": 256}
SIZES = {"positions": 96, "vocab": 257}
TEXT = np.random.default_rng(3).integers(0, 256, 301).tolist()


class Tokens:
    """A tokenizer of texts that are numbers; its calls are what the documentation makes of a text."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


def windows(text, max_length, stride):
    encoder = Encoder(Tokens(), CONFIG, SIZES, max_length)
    half = len(text) // 2
    rows = [{"text": " ".join(map(str, part))} for part in (text[:half], text[half:])]
    return sliding_windows(rows, encoder, stride)


def losses_of(model, text, max_length, stride):
    """-log p of every scored token, by the loop of "Perplexity of fixed-length models" with its labels of -100."""
    found, previous = {}, 0
    for begin in range(0, len(text), stride):
        end = min(begin + max_length, len(text))
        ids = torch.tensor([text[begin:end]])
        labels = ids.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            logits = model(ids).logits.double()
        per_token = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
        for place in torch.nonzero(labels[0, 1:] != -100)[:, 0].tolist():
            assert begin + place + 1 not in found
            found[begin + place + 1] = per_token[place].item()
        previous = end
        if end == len(text):
            break
    return found


def evaluated(model, examples, batch_size):
    """Arrays and values as align.metric makes them of a model."""
    reduced = []
    for number, inputs in enumerate(batches([example.inputs for example in examples], CONFIG, SIZES, batch_size)):
        with torch.no_grad():
            logits = model(**{name: torch.tensor(array) for name, array in inputs.arrays.items()}).logits.numpy()
        chunk = examples[number * batch_size: (number + 1) * batch_size]
        reduced.append(SCORES["causal-lm"].reduce({"logits": logits}, inputs, chunk))
    return {name: np.concatenate([batch[name] for batch in reduced]) for name in reduced[0]}


@pytest.fixture(scope="module")
def model():
    return torch_model(HEAD, pad_token_id=256)


@pytest.mark.parametrize("max_length, stride", [(64, 32), (96, 7), (96, 95), (50, 1), (400, 60)])
def test_perplexity_with_a_stride_as_the_documentation_computes_it(model, max_length, stride):
    expected = losses_of(model, TEXT, min(max_length, 96), stride)
    assert sorted(expected) == list(range(1, len(TEXT)))
    arrays = evaluated(model, windows(TEXT, max_length, stride), batch_size=5)
    assert len(arrays["token_nll"]) == len(TEXT) - 1
    np.testing.assert_allclose(arrays["token_nll"], [expected[place] for place in sorted(expected)], rtol=1e-5)
    perplexity = math.exp(sum(expected.values()) / len(expected))
    assert SCORES["causal-lm"].values(arrays)["perplexity"] == pytest.approx(perplexity, rel=1e-6)


def test_a_text_of_one_window_is_one_row(model):
    text = TEXT[:60]
    assert [example.targets for example in windows(text, 96, 48)] == [{"first": 1}]
    alone = Example({"input_ids": text, "attention_mask": [1] * 60}, {})
    with_stride, without = (evaluated(model, examples, 8) for examples in (windows(text, 96, 48), [alone]))
    np.testing.assert_array_equal(with_stride["token_nll"], without["token_nll"])


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_ranks_that_gather_tokens_agree_and_ranks_that_average_perplexities_do_not(model, ranks):
    """Texts of unequal length dealt out to ranks, as a distributed sampler does; of 3 ranks the errors cancel."""
    lengths = [4, 90, 8, 60, 5, 40, 6, 75, 9, 12, 7, 80, 30, 4]
    texts = [TEXT[start: start + length] for start, length in enumerate(lengths)]
    examples = [Example({"input_ids": text, "attention_mask": [1] * len(text)}, {}) for text in texts]
    losses = [list(losses_of(model, text, 96, 95).values()) for text in texts]
    true = math.exp(sum(map(sum, losses)) / sum(map(len, losses)))

    parts = [evaluated(model, examples[rank::ranks], batch_size=3) for rank in range(ranks)]
    gathered = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert SCORES["causal-lm"].values(gathered)["perplexity"] == pytest.approx(true, rel=1e-6)

    averaged = np.mean([SCORES["causal-lm"].values(part)["perplexity"] for part in parts])
    if ranks == 1:
        assert averaged == pytest.approx(true, rel=1e-6)
    else:
        assert abs(averaged / true - 1) > 0.02


@pytest.mark.parametrize("tokens, losses, true, averaged", [
    ((50, 50), (math.log(2), math.log(8)), 4.0, 5.0),
    ((99, 1), (math.log(2), math.log(100)), math.exp((99 * math.log(2) + math.log(100)) / 100), 51.0),
], ids=["a mean of exponentials is at least the exponential of the mean", "a rank of one token counts like one of 99"])
def test_the_two_errors_of_an_average_by_hand(tokens, losses, true, averaged):
    parts = [np.full(count, loss) for count, loss in zip(tokens, losses, strict=True)]
    assert perplexity(np.concatenate(parts)) == pytest.approx(true, rel=1e-12)
    assert np.mean([perplexity(part) for part in parts]) == pytest.approx(averaged, rel=1e-12)


@pytest.mark.parametrize("size", [1, 4, 14])
def test_the_size_of_a_batch_does_not_matter(model, size):
    examples = windows(TEXT, 64, 20)
    one, other = (SCORES["causal-lm"].values(evaluated(model, examples, batch)) for batch in (size, 3))
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)


def test_first_counts_from_the_start_of_the_row():
    logits = np.log([[[1, 1], [1, 3], [7, 1], [1, 1]]]).astype(np.float32)
    inputs = Inputs({"input_ids": np.array([[0, 0, 1, 0]]), "attention_mask": np.ones((1, 4), int)})
    arrays = SCORES["causal-lm"].reduce({"logits": logits}, inputs, [Example({}, {"first": 2})])
    np.testing.assert_allclose(np.exp(-arrays["token_nll"]), [3 / 4, 7 / 8], rtol=1e-6)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("perplexity"))
    workshop.make(HEAD, tokenizer=True)
    workshop.make(HEAD, run="without-tokenizer")
    workshop.make("BertForMaskedLM", tokenizer=True)
    return workshop


@pytest.mark.parametrize("run", [HEAD, "without-tokenizer"])
def test_both_sides_agree_with_a_stride(workshop, run):
    outcome = workshop.align("metric", run, "--stride", "40", "--max-length", "64", "--limit", "3")
    assert all_aligned({"metric": outcome})
    assert any("joined, that move on by 40 tokens" in note for note in outcome.report["notes"])
    alone = workshop.align("metric", run, "--max-length", "64", "--limit", "3")
    assert alone.report["inputs_digest"] != outcome.report["inputs_digest"]


@pytest.mark.parametrize("head, flags, told", [
    (HEAD, ("--stride", "96"), "leaves tokens without anything before them in windows of 96"),
    (HEAD, ("--stride", "64", "--max-length", "64"), "give a smaller one"),
    (HEAD, ("--stride", "0"), "not a whole number above 0"),
    ("BertForMaskedLM", ("--stride", "8"), "BertForMaskedLM is none"),
])
def test_a_stride_that_cannot_be_is_refused(workshop, head, flags, told):
    outcome = workshop.align("metric", head, *flags)
    assert outcome.code == 2 and told in outcome.stderr and outcome.report == {}
