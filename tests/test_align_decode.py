"""Greedy decoding against transformers' own, and what becomes of texts that part."""

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from align.agreement import compare_scores
from align.decoding.greedy import Limits, greedy
from align.scores import bleu, packed, texts_of
from align.tolerance import margin_noise

VOCABULARY, START, END = 30, 0, 1


class Side:
    """What decoding needs of a side; ``calls`` counts the runs of the model, ``sweeps`` the times weights come in."""

    def __init__(self, model):
        self.model, self.calls, self.sweeps = model, 0, 0

    def outputs(self, arrays):
        self.calls += 1
        with torch.no_grad():
            found = self.model(**{name: torch.tensor(array) for name, array in arrays.items()})
        return {"logits": found.logits.numpy()}

    def sweep(self, passes, purpose=None):
        self.sweeps += 1
        for run in passes:
            run()


@pytest.fixture(scope="module")
def model():
    """Random, but with a head of its own that ends some texts early."""
    torch.manual_seed(3)
    net = T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=False,
        decoder_start_token_id=START, feed_forward_proj="gated-gelu")).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.normal_(std=1.0 if "shared" in name else 0.4)
            if "layer_norm" in name:
                weight += 1
    return net


@pytest.fixture(scope="module")
def sources():
    """Three batches, of other lengths, with padding."""
    generator = np.random.default_rng(0)
    found = []
    for rows, length in ((4, 9), (3, 6), (1, 12)):
        mask = np.ones((rows, length), np.int64)
        mask[0, length // 2:] = 0
        found.append({"input_ids": np.where(mask == 1, generator.integers(2, VOCABULARY, mask.shape), 0),
                      "attention_mask": mask})
    return found


def test_the_texts_are_those_of_transformers(model, sources):
    steps = 12
    found = greedy(Side(model), sources, Limits(START, END, steps))["text.predictions"]
    assert found.shape == (8, steps)
    expected = []
    for source in sources:
        rows = model.generate(**{name: torch.tensor(array) for name, array in source.items()}, max_new_tokens=steps,
                              num_beams=1, do_sample=False, pad_token_id=END)[:, 1:].numpy()
        expected += list(np.pad(rows, ((0, 0), (0, steps - rows.shape[1])), constant_values=END))
    assert np.array_equal(found, expected)
    lengths = [list(row).index(END) if END in row else steps for row in found]
    assert min(lengths) < steps == max(lengths), "some texts end, some are cut"
    assert len({tuple(row) for row in found}) > 4


def test_a_step_brings_the_weights_in_once_and_leaves_batches_alone_that_have_ended(model, sources):
    side, steps = Side(model), 12
    found = greedy(side, sources, Limits(START, END, steps))["text.predictions"]
    own = [max(list(row).index(END) + 1 if END in row else steps for row in rows) for rows in np.split(found, [4, 7])]
    assert (side.sweeps, side.calls) == (max(own), sum(own))


def scores(**changes):
    """Two texts of four tokens, the second of which might part at its third token; and a teacher's token."""
    arrays = {
        "text.predictions": np.array([[5, 6, 7, 1], [5, 6, 8, 9]]), "text.largest": np.full((2, 4), 10, np.float32),
        "text.margins": np.array([[3, 3, 3, 3], [3, 3, margin_noise(10.0) / 2, 3]], np.float32),
        "token.predictions": np.array([4]), "token.margins": np.ones(1), "token.largest": np.ones(1),
        "token.targets": np.array([4]), "token_nll": np.array([0.5], np.float32),
        "piece_targets": packed(["", "", "", "", "", "▁a", "▁b", "▁c", "▁d", "▁e"]),
        "sentence_targets": packed(["a b c", "a b d e"]),
    }
    return arrays | changes


def test_a_text_that_parts_within_the_noise_is_taken_as_equal_from_there_on():
    other = scores()["text.predictions"].copy()
    other[1, 2:] = 9, 5
    largest = scores()["text.largest"].copy()
    largest[1, 3] = 4
    results, notes = compare_scores("translation", scores(), scores(**{"text.predictions": other,
                                                                       "text.largest": largest}))
    assert all(result.passed for result in results)
    assert notes == ["1 of 2 decoded texts part where the two best tokens lie closer together than rounding can tell; "
                     "they are taken as equal from there on."]


def test_a_text_that_parts_elsewhere_fails_and_takes_its_bleu_along():
    other = scores()["text.predictions"].copy()
    other[0, 1] = 8
    results, notes = compare_scores("translation", scores(), scores(**{"text.predictions": other}))
    assert [result.name for result in results if not result.passed] == ["text.predictions", "value.bleu"]
    assert notes == []


def test_bleu_of_a_known_pair():
    """All 1-grams but one, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples: (5/6 * 3/5 * 2/4 * 1/3)^(1/4)."""
    assert bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(
        100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=1e-9)
    assert bleu(["a b c d"], ["a b c d"]) == pytest.approx(100)


def test_pieces_make_texts():
    pieces = ["", "", "", "▁Der", "▁Hund", "e", "."]
    assert texts_of(np.array([[3, 4, 5, 6, 1, 1], [3, 2, 1, 1, 1, 99]]), pieces) == ["Der Hunde.", "Der"]
    assert texts_of(np.array([[3, 4]]), []) == ["3 4"]
