"""align/scores.py and the judging of predictions in align/metric.py, against known answers."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, top_k_accuracy_score

from align.agreement import compare_scores
from align.inputs import Inputs
from align.scores import MAX_ANSWER, SCORES, accuracy, choices, log_softmax, macro_f1, neighbours, perplexity
from align.texts import Example
from align.tolerance import FORWARD, margin_noise

GENERATOR = np.random.default_rng(7)


def score(task, outputs, mask, ids=None, **targets):
    """Arrays and values of one batch; ``targets`` has one entry a row."""
    mask = np.array(mask)
    inputs = Inputs({"input_ids": np.zeros_like(mask) if ids is None else np.array(ids), "attention_mask": mask})
    examples = [Example({}, {name: values[row] for name, values in targets.items()}) for row in range(len(mask))]
    outputs = {name: np.asarray(array, np.float32) for name, array in outputs.items()}
    arrays = SCORES[task].reduce(outputs, inputs, examples)
    return arrays, SCORES[task].values(arrays | (neighbours(arrays["embeddings"]) if "embeddings" in arrays else {}))


def test_perplexity_of_uniform_logits_is_the_size_of_the_vocabulary():
    _, values = score("causal-lm", {"logits": np.full((2, 6, 37), 1.25)}, np.ones((2, 6), int))
    assert values["perplexity"] == pytest.approx(37, rel=1e-12)


def test_perplexity_by_hand():
    """Two predicted tokens with probabilities 1/2 and 1/8: exp((ln 2 + ln 8) / 2) = 4."""
    logits = np.log([[[4, 2, 2], [1, 6, 1], [1, 1, 1]]])
    arrays, values = score("causal-lm", {"logits": logits}, [[1, 1, 1]], ids=[[2, 0, 2]])
    assert values["perplexity"] == pytest.approx(4, rel=1e-6)
    assert arrays["token.predictions"].tolist() == [0, 1]
    assert arrays["token.targets"].tolist() == [0, 2]
    assert values["next_token_accuracy"] == 0.5


def test_perplexity_as_torch_has_it_with_padding_on_either_side():
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits, ids = GENERATOR.standard_normal((3, 5, 11)) * 4, GENERATOR.integers(0, 11, (3, 5))
    _, values = score("causal-lm", {"logits": logits}, mask, ids=ids)
    wanted = np.where((mask[:, 1:] & mask[:, :-1]) == 1, ids[:, 1:], -100)
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits[:, :-1], dtype=torch.float32).double().flatten(0, 1),
                                             torch.tensor(wanted).flatten())
    assert values["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-12)


def test_perplexity_is_the_exponential_of_the_mean():
    assert perplexity(np.log([1.0, 100.0])) == pytest.approx(10)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30])
def test_log_softmax_as_torch_has_it(scale):
    logits = (GENERATOR.standard_normal((4, 9)) * scale).astype(np.float32)
    np.testing.assert_allclose(log_softmax(logits), torch.log_softmax(torch.tensor(logits).double(), -1), rtol=1e-12)


def test_accuracy_and_macro_f1_by_hand():
    """Class 0: tp 2, fp 2, fn 0: 4/6. Class 1: tp 1, fp 0, fn 1: 2/3. Class 2: tp 0, fp 0, fn 1: 0."""
    predictions, targets = np.array([0, 0, 0, 1, 0]), np.array([0, 0, 1, 1, 2])
    assert accuracy(predictions, targets) == 0.6
    assert macro_f1(predictions, targets) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)


def test_f1_is_sklearns():
    predictions, targets = GENERATOR.integers(0, 4, (2, 50))
    logits = np.eye(4)[predictions]
    _, values = score("sequence-classification", {"logits": logits}, np.ones((50, 1), int), label=targets)
    f1 = f1_score(targets, predictions, average="macro")
    assert values == {"accuracy": np.mean(predictions == targets), "f1": f1}


def test_mean_squared_error_of_a_regression():
    logits = [[1.0], [2.0], [4.0]]
    _, values = score("sequence-classification", {"logits": logits}, np.ones((3, 1), int), label=[1, 0, 1])
    assert values == {"mean_squared_error": (0 + 4 + 9) / 3}


def test_top_1_and_top_5_are_sklearns():
    targets, logits = GENERATOR.integers(0, 12, 60), GENERATOR.standard_normal((60, 12)).astype(np.float32)
    arrays, values = score("image-classification", {"logits": logits}, np.ones((60, 1), int), label=targets)
    assert values == {f"top{k}_accuracy": top_k_accuracy_score(targets, logits, k=k, labels=range(12)) for k in (1, 5)}
    assert 0 < values["top1_accuracy"] < values["top5_accuracy"] < 1
    best = np.argsort(-logits, axis=1)
    assert (arrays["classes.predictions"] == np.sort(best[:, :5], axis=1)).all()
    gaps = np.take_along_axis(logits, best[:, 4:5], 1) - np.take_along_axis(logits, best[:, 5:6], 1)
    assert (arrays["classes.margins"] == gaps).all()


def test_of_five_classes_the_five_best_are_no_question():
    _, values = score("image-classification", {"logits": np.eye(5)}, np.ones((5, 1), int), label=[0, 1, 2, 0, 0])
    assert values == {"top1_accuracy": 0.6}


def test_one_score_a_picture_is_a_regression():
    _, values = score("image-classification", {"logits": [[1.0], [3.0]]}, np.ones((2, 1), int), label=[1, 1])
    assert values == {"mean_squared_error": 2.0}


def test_the_fifth_and_the_sixth_class_may_change_places_within_rounding_only():
    logits = np.arange(8, dtype=np.float32)[None] + 1
    label = dict(label=[7])
    held, _ = score("image-classification", {"logits": logits}, [[1]], **label)
    for nearer, passed in ((np.nextafter(np.float32(4), np.float32(3)), True), (np.float32(3.9), False)):
        close = logits.copy()
        close[0, 2] = nearer
        swapped = close.copy()
        swapped[0, [2, 3]] = close[0, [3, 2]]
        left, _ = score("image-classification", {"logits": close}, [[1]], **label)
        right, _ = score("image-classification", {"logits": swapped}, [[1]], **label)
        results, notes = compare_scores("image-classification", left, right)
        assert all(result.passed for result in results) == passed
        assert bool(notes) == passed
    assert held["classes.predictions"].tolist() == [[3, 4, 5, 6, 7]]


def test_pictures_neighbours_are_those_of_their_pooled_features():
    pooled = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1.1]])[:, :, None, None]
    _, values = score("image-encoder", {"pooler_output": pooled}, np.ones((4, 1), int), label=[0, 0, 1, 1])
    assert values["nearest_neighbour_accuracy"] == 1.0


@pytest.mark.parametrize("task, logits", [("masked-lm", "logits"), ("token-classification", "logits"),
                                          ("pre-training", "prediction_logits")])
def test_only_labelled_positions_count(task, logits):
    tokens = np.zeros((2, 4, 3))
    tokens[0, 1, 2] = tokens[0, 3, 1] = tokens[1, 0, 1] = 5
    outputs = {logits: tokens, "seq_relationship_logits": [[0, 1], [0, 1]]}
    arrays, values = score(task, outputs, [[1, 1, 1, 1], [1, 1, 0, 0]], labels=[[-100, 2, -100, 0], [1, -100]],
                           sentence=[1, 0])
    assert arrays["token.predictions"].tolist() == [2, 1, 1]
    assert arrays["token.targets"].tolist() == [2, 0, 1]
    assert values[{"token-classification": "accuracy"}.get(task, "masked_token_accuracy")] == pytest.approx(2 / 3)
    assert values.get("next_sentence_accuracy", 0.5) == 0.5


def test_choices_tell_how_far_the_best_lies_above_the_next():
    found = choices("c", np.float32([[1, 5, 2], [-9, 0.5, 0.25]]), np.array([1, 1]))
    assert found["c.predictions"].tolist() == [1, 1]
    assert found["c.margins"].tolist() == [3, 0.25]
    assert found["c.largest"].tolist() == [5, 9]


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_the_best_of_all_by_brute_force(seed):
    generator, length = np.random.default_rng(seed), 50
    start, end = generator.standard_normal((2, 1, length)).astype(np.float32)
    passage = [0] * 8 + [1] * 40 + [0] * 2
    arrays, _ = score("question-answering", {"start_logits": start, "end_logits": end}, np.ones((1, length), int),
                      start=[9], end=[12], passage=[passage])
    spans = [(first, last) for first, last in itertools.product(range(length), repeat=2)
             if first <= last < first + MAX_ANSWER and passage[first] and passage[last]]
    best, second = sorted(spans, key=lambda span: -(start[0, span[0]] + end[0, span[1]]))[:2]
    assert tuple(arrays["span.predictions"][0]) == best
    margin = (start[0, best[0]] + end[0, best[1]]) - (start[0, second[0]] + end[0, second[1]])
    assert arrays["span.margins"][0] == pytest.approx(margin, abs=1e-5)


@pytest.mark.parametrize("gold, exact, overlap", [((2, 4), 1, 1), ((4, 7), 0, 2 / 7), ((6, 8), 0, 0), ((-1, -1), 0, 0)])
def test_exact_match_and_overlap_by_hand(gold, exact, overlap):
    start, end = np.zeros((2, 1, 10))
    start[0, 2] = end[0, 4] = 9
    _, values = score("question-answering", {"start_logits": start, "end_logits": end}, np.ones((1, 10), int),
                      start=[gold[0]], end=[gold[1]], passage=[[1] * 10])
    assert values == {"exact_match": exact, "f1": pytest.approx(overlap)}


def test_a_passage_of_one_token_has_one_span():
    arrays, _ = score("question-answering", {"start_logits": [[1.0]], "end_logits": [[2.0]]}, [[1]], start=[0], end=[0],
                      passage=[[1]])
    assert (arrays["span.predictions"].tolist(), arrays["span.margins"].tolist()) == ([[0, 0]], [[np.inf, np.inf]])


def test_neighbours_of_points_on_a_circle():
    """At 0, 10, 25 and 90 degrees; lengths do not matter."""
    angles, lengths = np.radians([0, 10, 25, 90]), np.array([1, 5, 0.1, 3])
    found = neighbours((np.stack([np.cos(angles), np.sin(angles)], -1) * lengths[:, None]).astype(np.float32))
    assert found["neighbour.predictions"].tolist() == [[1, 2, 3], [0, 2, 3], [1, 0, 3], [2, 1, 0]]
    cosine = np.cos(np.radians([10, 25, 90]))
    gaps = cosine[:-1] - cosine[1:]
    np.testing.assert_allclose(found["neighbour.margins"][0], [gaps[0], min(gaps), gaps[1]], atol=1e-6)


def test_a_sentence_embedding_is_the_mean_of_its_tokens_without_padding():
    hidden = np.array([[[1, 1], [3, 5], [99, 99]], [[2, 0], [4, 0], [6, 3]]])
    arrays, _ = score("encoder", {"last_hidden_state": hidden}, [[1, 1, 0], [1, 1, 1]], label=[0, 1])
    assert arrays["embeddings"].tolist() == [[2, 3], [4, 1]]


def judged(reference, candidate, targets=None):
    """compare_scores of a classification; logits [n, classes]."""
    targets = np.zeros(len(reference), int) if targets is None else targets
    sides = [choices("class", np.float32(logits), targets) for logits in (reference, candidate)]
    tensors, notes = compare_scores("sequence-classification", *sides)
    return [tensor.name for tensor in tensors if not tensor.passed], notes


def test_a_prediction_inside_the_noise_is_taken_as_equal_and_told():
    failing, notes = judged([[3.0, 1.0], [8.0, 8.0 + 4e-6]], [[3.0, 1.0], [8.0 + 4e-6, 8.0]])
    assert failing == []
    assert len(notes) == 1 and notes[0].startswith("1 of 2 class predictions differ")


def test_a_prediction_outside_the_noise_fails():
    failing, notes = judged([[3.0, 1.0], [8.0, 8.001]], [[3.0, 1.0], [8.001, 8.0]])
    assert failing[0] in ("class.largest", "class.predictions") and "class.predictions" in failing
    assert "value.accuracy" in failing and notes == []


def test_equal_predictions_pass_without_a_word():
    assert judged([[3.0, 1.0], [1.0, 2.0]], [[3.0, 1.0], [1.0, 2.0]]) == ([], [])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_logit_fails_though_the_choice_be_the_same(broken):
    failing, _ = judged([[3.0, 1.0], [1.0, 0.5]], [[3.0, 1.0], [broken, 0.5]])
    assert failing == ["class.largest"]


def test_a_broken_logit_of_a_span_fails():
    sides = [score("question-answering", {"start_logits": start, "end_logits": [[1, 0, 0]]}, [[1, 1, 1]], start=[0],
                   end=[0], passage=[[1, 1, 1]])[0] for start in ([[0, 9, 0]], [[np.nan, 9, 0]])]
    assert "span.largest" in [tensor.name for tensor in compare_scores("question-answering", *sides)[0]
                              if not tensor.passed]


def test_two_scores_may_each_be_off_by_the_tolerance():
    assert margin_noise(10.0) == pytest.approx(2 * FORWARD * 10.0)
