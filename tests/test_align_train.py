"""A fine-tuning on both sides: masks and bands by formula, right nets of every kind of head, mistakes that only a
training shows, and checkpoints."""

import io
import json
import os
import signal
import zipfile

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop
from resnet_fixtures import TINY, reference

from align.faults.fault import EXPLANATIONS
from align.faults.train import DROPPING, FAULTS, SHORT
from align.noise import EPS, Grown
from align.optimizing.rates import judged_rates
from align.page import write_page
from align.submission import lay_out
from align.train import widths
from align.training import held_out
from align.training.checkpoints import Checkpoint
from align.training.course import Course, require_finite
from align.training.curves import Curves
from align.training.dropping import Call, Drops, differing
from align.training.paddle_side import PaddleTrainer
from align.training.torch_side import Dropped, TorchTrainer
from convert.errors import BadInput
from models.layer import BatchNorm2D

SET_UP = ("--warmup", "1", "--accumulate", "2", "--weight-decay", "0.1")


# By formula -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate, p", [(0.0, 0.25), (0.25, 0.0)])
def test_both_frameworks_drop_by_the_same_masks(rate, p):
    array = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    drops = [Drops(7, rate) for _ in range(2)]
    for one in drops:
        one.places.append("net.block")
    with Dropped(drops[0]):
        theirs = torch.nn.Dropout(p)(torch.from_numpy(array)).numpy()
    ours = array * drops[1].scale(p, True, "upscale_in_train", array.shape)
    np.testing.assert_array_equal(theirs, ours)
    kept = theirs != 0
    np.testing.assert_allclose(theirs[kept], array[kept] / 0.75, rtol=2e-7)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / array.size)


def test_a_mask_depends_on_its_place_and_step_and_on_no_other_call():
    def mask(place, before=0, step=0):
        drops = Drops(7, 0.0)
        drops.begin(step, 0)
        for _ in range(before):
            drops.scale(0.5, True, "upscale_in_train", (64,))
        drops.places.append(place)
        return drops.scale(0.5, True, "upscale_in_train", (64,)).tobytes()
    assert mask("a") == mask("a", before=3)
    assert len({mask("a"), mask("b"), mask("a", step=1)}) == 3


CALLS = [Call("net.a", 1, 0.1, True, "upscale_in_train", (2, 3)), Call("net.a", 2, 0.1, True, "upscale_in_train", (6,))]


@pytest.mark.parametrize("change, name, word", [
    (lambda calls: calls[:1], "net.a (dropout 2)", "this net drops nothing"),
    (lambda calls: [*calls, Call("net.b", 1, 0.2, True, "upscale_in_train", (1,))], "net.b (dropout 1)",
     "where torch drops nothing"),
    (lambda calls: [calls[0], Call("net.a", 2, 0.3, True, "upscale_in_train", (6,))], "net.a (dropout 2)",
     "the rate is 0.3, torch's is 0.1"),
    (lambda calls: [Call("net.a", 1, 0.1, True, "downscale_in_infer", (2, 3)), calls[1]], "net.a (dropout 1)",
     "downscale_in_infer"),
    (lambda calls: [Call("net.a", 1, 0.1, False, "upscale_in_train", (2, 3)), calls[1]], "net.a (dropout 1)",
     "eval mode"),
    (lambda calls: [Call("net.a", 1, 0.1, True, "upscale_in_train", (2, 4)), calls[1]], "net.a (dropout 1)", "shape"),
])
def test_what_differs_between_calls_is_named(change, name, word):
    assert differing(CALLS, CALLS) == {}
    (found, told), = differing(CALLS, change(CALLS)).items()
    assert found == name and word in told


def test_the_width_of_a_band_is_the_root_of_a_mean_square_and_never_shrinks():
    runs = np.zeros((3, 9))
    runs[1, 4], runs[2, 4] = 3.0, 4.0
    expected = np.array([0, 0, *[np.sqrt((9 + 16) / 2 / 5)] * 7])
    np.testing.assert_allclose(widths(runs), expected, rtol=1e-12)
    first = np.zeros((2, 9))
    first[1, 0] = 1.0
    np.testing.assert_allclose(widths(first), np.full(9, np.sqrt(1 / 3)), rtol=1e-12)


def test_what_has_grown_is_judged_by_its_size_alone():
    floor = Grown(np.ones((4, 4)), np.array([[1e-3]]), 1.0)
    found, = floor.judge(np.ones((4, 4)) + 3e-3 * np.eye(4), "propagated")
    assert (found.test, found.ratio) == ("total", pytest.approx(1.5))
    exact = Grown(np.ones((1, 1)), np.zeros((1, 1)), 1e-12)
    assert exact.judge(np.array([1 + EPS]), "propagated")[0].ratio == pytest.approx(2.0)


def test_a_batch_norm_in_training_keeps_torchs_statistics():
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 4)).astype(np.float32)
    theirs, ours = torch.nn.BatchNorm2d(5), BatchNorm2D(5)
    theirs.train(), ours.train()
    for _ in range(2):
        given = theirs(torch.from_numpy(x)).detach().numpy(), ours(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(given[1], given[0], atol=1e-5)
    np.testing.assert_allclose(ours._variance.numpy(), theirs.running_var.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours._mean.numpy(), theirs.running_mean.numpy(), rtol=1e-5, atol=1e-7)


def test_each_rate_is_judged_by_itself():
    """The last of a linear schedule, 1e-4 of the largest, a thousandth off: of the norm of all that is nothing."""
    rates = np.linspace(1e-4, 1e-8, 60)
    for off, passed in ((1 + 1e-7, True), (1 + 1e-3, False)):
        found = judged_rates("rate", {"rate": rates}, {"rate": np.append(rates[:-1], off * rates[-1])})
        assert found.passed is passed
    assert "first at update 60" in found.failure


# Whole trainings ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("trained"))
    found.make("GPTJForCausalLM", "gptj", tokenizer=True)
    directory = found.root / "source-resnet"
    reference("ResNetForImageClassification", hidden_sizes=[8, 8, 16, 16], **{
        name: value for name, value in TINY.items() if name != "hidden_sizes"}).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}, "crop_pct": 1.0}))
    found.convert("resnet", directory, "resnet")
    return found


@pytest.fixture(scope="module")
def recorded(shop):
    """Torch's side of a training with everything in it, which each mistake is judged against."""
    assert shop.align("train", "gptj", "--only", "reference", *SHORT, *SET_UP, *DROPPING).code == 0
    assert shop.align("train", "resnet", "--only", "reference", *SHORT).code == 0
    return shop


def judged(shop, run, *flags):
    outcome = shop.align("train", run, "--only", "candidate", *flags)
    assert outcome.code == 0, outcome.stderr
    return shop.align("train", run, "--compare")


@pytest.mark.parametrize("run", ["gptj", "resnet"])
def test_two_environments_are_aligned_with_dropout_and_with_batch_norms(run, recorded):
    outcome = judged(recorded, run)
    assert (outcome.code, outcome.failing) == (0, []), outcome.report["failures"]
    names = {tensor["name"] for tensor in outcome.report["tensors"]}
    assert {"learning_rate", "loss (step 1)", "loss (step 4)", "gradient_norm (step 3)"} <= names
    assert ("perplexity (held out)" if run == "gptj" else "top1_accuracy (held out)") in names, names
    moved = {name.removesuffix(" (after step 3)") for name in names if name.endswith(" (after step 3)")}
    assert moved >= ({"transformer.h.1.attn.q_proj.weight", "lm_head.bias"} if run == "gptj" else
                     {"bn1.weight", "bn1._mean", "bn1._variance", "fc.bias"})
    notes = " ".join(outcome.report["notes"])
    assert ("places drop at rate 0.1" in notes) == (run == "gptj") and "torch's loss goes from" in notes


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_mistake_is_caught_named_and_explained(fault, recorded):
    """Against one recording of torch, with dropout, accumulation and decay, whatever of these the fault needs."""
    with fault.plant(recorded.output(fault.family)):
        outcome = judged(recorded, fault.family)
    assert outcome.code == 1
    word, = fault.explanation
    assert outcome.report["diagnosis"]["kind"] in EXPLANATIONS[word], outcome.report["diagnosis"]
    assert any(map(fault.is_named_by, (outcome.report["first_divergence"], outcome.report["diagnosis"]["subject"])))


OWN = """
import paddle

def build(net, decays=lambda name: not name.endswith("bias") and ".ln_" not in name):
    warm = paddle.optimizer.lr.LinearWarmup(paddle.optimizer.lr.PolynomialDecay(1e-4, 3, 0.0, 1.0), 1, 0.0, 1e-4)
    names = {tensor.name for name, tensor in net.named_parameters() if decays(name)}
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    return paddle.optimizer.AdamW(warm, parameters=net.parameters(), weight_decay=0.1, epsilon=1e-8, grad_clip=clip,
                                  apply_decay_param_fun=names.__contains__)

def all_decay(net):
    return build(net, lambda name: True)
"""


def test_a_set_up_of_the_users_own_is_judged_by_the_same_training(recorded, tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert judged(recorded, "gptj", "--candidate-optimizer", "my_training:build").code == 0
    told = recorded.reports / "gptj" / "train.json"
    assert "my_training:build (--candidate-optimizer)" in told.read_text()
    assert "Of weight decay this says nothing" not in told.read_text()
    wrong = judged(recorded, "gptj", "--candidate-optimizer", "my_training:all_decay")
    assert (wrong.code, wrong.report["diagnosis"]["kind"]) == (1, "weight-decay")


def test_what_a_net_does_only_while_it_trains_is_seen_by_no_earlier_stage(shop):
    moving, = [fault for fault in FAULTS if fault.kind == "labels shifted once more in training"]
    with moving.plant(shop.output("gptj")):
        assert shop.align("loss", "gptj").code == 0


@pytest.mark.full
@pytest.mark.parametrize("fault", [one for one in FAULTS if one.family == "gptj"], ids=lambda fault: fault.kind)
def test_no_earlier_stage_sees_a_mistake_of_a_training(fault, shop):
    with fault.plant(shop.output("gptj")):
        assert [shop.align(stage, "gptj").code for stage in ("weights", "forward", "metric", "loss", "backward")
                ] == [0] * 5


@pytest.mark.parametrize("head, flags", [
    ("BertForSequenceClassification", ("--dropout",)),
    pytest.param("BertModel", (), marks=pytest.mark.full),
    pytest.param("T5ForConditionalGeneration", DROPPING, marks=pytest.mark.full),
    pytest.param("BertForTokenClassification", ("--optimizer", "sgd"), marks=pytest.mark.full)])
def test_a_right_net_is_aligned(head, flags, shop):
    run = shop.make(head, tokenizer=True)
    left = shop.reports / run / "train" / "torch-reordered-7.npz"
    left.parent.mkdir()
    left.write_bytes(b"of a training of other flags that was broken off in its second look")
    outcome = shop.align("train", run, *SHORT, *flags)
    assert (outcome.code, outcome.failing) == (0, []), (outcome.report.get("failures"), outcome.stderr)
    assert all(tensor["max_abs"] is not None for tensor in outcome.report["tensors"])
    assert not (shop.reports / run / "train").exists(), "a training that is over leaves no checkpoint"


def test_the_report_shows_both_curves_and_the_submission_has_log_and_plot(recorded, tmp_path):
    assert judged(recorded, "gptj").code == 0
    reports = recorded.reports / "gptj"
    found = json.loads((reports / "train.json").read_text())
    curves = Curves.read(found["curves"])
    assert len(curves.reference) == len(curves.candidate) == 4
    assert curves.reference[0] == found["values"]["loss (step 1)"]["reference"]
    assert (reports / "train.png").read_bytes().startswith(b"\x89PNG") and "(train.png)" in (
        reports / "train.md").read_text()
    assert "Losses of a training" in write_page(reports).read_text()
    place = tmp_path / "submitted"
    lay_out(reports, place)
    there = {file.name for file in (place / "pipeline/Step5").iterdir()}
    assert {"train_align_torch.npy", "train_align_paddle.npy", "train_align_diff.log", "train_align_torch.log",
            "train_align_paddle.log", "train_align.png", "train.md"} <= there
    lines = (place / "pipeline/Step5/train_align_paddle.log").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == [f"step {number}" for number in range(1, 5)]


@pytest.mark.parametrize("flags, word", [
    (("--dropout",), "drops nothing"), (("--warmup", "60"), "--warmup"), (("--limit", "1"), "too few"),
    (("--tokens", "1"), "2 --tokens or more"),
    (("--paging", "on"), "in memory"), (("--lr", "1e30", "--optimizer", "sgd", *SHORT), "no finite number in step"),
    (("--dropout", "1.5"), "between 0 and 1"), (("--split", "train"), "--dataset names"),
    (("--seed", "-1"), "-1 is not a whole number"),
    (("--steps", "1", "--schedule", "constant", "--warmup", "2"), "the rate is 0 in all 1 steps")])
def test_what_cannot_be_trained_is_refused_in_a_sentence(flags, word, shop):
    outcome = shop.align("train", "gptj", *flags)
    assert outcome.code == 2 and word in outcome.stderr


def test_labels_of_ones_own_that_the_head_does_not_have_are_refused(shop, tmp_path):
    run = shop.make("BertForSequenceClassification", "classes", tokenizer=True)
    (tmp_path / "stars.jsonl").write_text("".join(f'{{"text": "the house {n}", "label": {n}}}\n' for n in range(6)))
    refused = shop.align("train", run, "--dataset", str(tmp_path / "stars.jsonl"), *SHORT)
    assert refused.code == 2 and "has the label 2, and the head of this checkpoint the 2 classes 0 to 1" in (
        refused.stderr)


def test_a_report_says_so_where_no_step_shows_weight_decay(shop):
    """Two of three steps with a third and two of 1e-6: a decay of 0.01 is 1e-8 of a weight, rounding 6e-8."""
    outcome = shop.align("train", "gptj", *SHORT, "--warmup", "3", "--lr", "1e-6")
    assert outcome.code == 0 and any("Of weight decay this says nothing" in note for note in outcome.report["notes"])


def test_a_loss_that_is_0_trains_nothing(shop):
    """Of one pair of a bare encoder every score is the right one: two nets that do nothing would agree."""
    outcome = shop.align("train", shop.make("BertModel", "bare", tokenizer=True), *SHORT, "--batch-size", "1")
    assert outcome.code == 2 and "gradients are 0" in outcome.stderr


@pytest.mark.parametrize("course, word", [
    (Course([1.0, np.inf], [1.0, 1.0]), "loss is no finite number in step 2"),
    (Course([1.0, 1.0], [np.nan, 1.0]), "gradients is no finite number in step 1")])
def test_a_band_of_what_is_no_number_is_none(course, word):
    with pytest.raises(BadInput, match=word):
        require_finite(course)


def test_an_infinite_perplexity_allows_no_other():
    """exp(710) is above what a float64 holds."""
    arrays = {"token_nll": np.full(3, 710.0), "token.predictions": np.zeros(3), "token.targets": np.zeros(3)}
    with pytest.raises(BadInput, match="perplexity of torch's own"):
        held_out.require_finite("translation", arrays)


# The metric held out --------------------------------------------------------------------------------------------------

def scores(loss, predictions=(), margins=()):
    """What is kept of a causal model: a loss a token, predictions and how far they lie above the next."""
    return {"token_nll": np.full(8, loss), "token.predictions": np.array(predictions or [1] * 8),
            "token.margins": np.array(margins or [1.0] * 8), "token.largest": np.ones(8), "token.targets": np.ones(8)}


@pytest.mark.parametrize("off, passed", [(1e-3, True), (-1e-3, True), (2e-3, False), (-2e-3, False), (np.nan, False)])
def test_a_perplexity_may_be_a_share_of_0_0015_off(off, passed):
    """exp(3 + log(1 + off)) is (1 + off) exp(3)."""
    found, notes = held_out.compared("causal-lm", [scores(3.0)] * 3, scores(3.0 + np.log1p(off)))
    by_name = {result.name: result.passed for result in found}
    assert by_name["perplexity (held out)"] is passed and not notes
    assert all(by_name[name] for name in by_name if "accuracy" in name)


def test_a_rate_may_be_0_0015_off_and_what_torchs_own_runs_are():
    seven = [1] * 7 + [0]
    def accuracy(runs, candidate):
        found, notes = held_out.compared("causal-lm", runs, candidate)
        return next(result.passed for result in found if "accuracy" in result.name), bool(notes)
    assert accuracy([scores(3.0)] * 3, scores(3.0, seven)) == (False, False)
    assert accuracy([scores(3.0), scores(3.0), scores(3.0, seven)], scores(3.0, seven)) == (True, True)


def test_another_prediction_is_none_where_torchs_own_margins_move_as_far():
    """Two runs move all margins by 0.1: within 6 times that a margin may turn round, from 0.5 to 0.05 the other way.
    From 0.7 it may not, nor from 0.5 to 0.2.
    """
    seven = [1] * 7 + [0]
    for last, turned, passed in ((0.5, 0.05, True), (0.7, 0.05, False), (0.5, 0.2, False)):
        margins = [5.0] * 7 + [last]
        moved = [scores(3.0, margins=[one + by for one in margins]) for by in (0.1, 0.0, -0.1)]
        found, notes = held_out.compared("causal-lm", moved, scores(3.0, seven, margins=[5.0] * 7 + [turned]))
        assert all(result.passed for result in found) is passed and any("taken as equal" in note for note in notes
                                                                        ) is passed


# Checkpoints ----------------------------------------------------------------------------------------------------------

def test_a_checkpoint_that_was_broken_off_leaves_the_one_before(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path / "train", "side", {"steps": 4}, 2, resume=True)
    kept.save({"a": np.arange(3)}, {"step": 2})
    write = np.savez

    def stop(file, **arrays):
        write(file, **arrays)
        file.truncate(file.tell() // 2)
        raise KeyboardInterrupt
    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        kept.save({"a": np.arange(4)}, {"step": 4})
    arrays, told = kept.load()
    assert told == {"step": 2} and arrays["a"].tolist() == [0, 1, 2]
    assert zipfile.is_zipfile(kept.file)


def archive(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    def kept(**key):
        return Checkpoint(tmp_path / "train", "side", key, 2, resume=True)
    kept(steps=4).save({}, {})
    with pytest.raises(BadInput, match="its steps is 4, now it is 5"):
        kept(steps=5).load()
    for damaged in (b"PK", b"", archive(told=np.frombuffer(b"[]", np.uint8)), archive(other=np.zeros(1))):
        kept(steps=4).file.write_bytes(damaged)
        with pytest.raises(BadInput, match="damaged"):
            kept(steps=4).load()
    assert Checkpoint(tmp_path / "train", "side", {"steps": 4}, 2, resume=False).load() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer, schedule", [
    ("adamw", "cosine"), pytest.param("momentum", "constant", marks=pytest.mark.full)])
def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(optimizer, schedule, shop, monkeypatch):
    flags = (*SHORT, "--optimizer", optimizer, "--schedule", schedule, "--seed", "3", "--dropout", "0.1")
    whole = shop.align("train", "gptj", *flags)
    assert whole.code == 0, whole.report.get("failures")
    for cls in (PaddleTrainer, TorchTrainer):
        right = cls.step

        def step(self, right=right, cls=cls, taken=[]):  # noqa: B006
            taken.append(self)
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return right(self)
        monkeypatch.setattr(cls, "step", step)
    ends = [shop.align("train", "gptj", *flags, *["--resume"] * resumed) for resumed in (False, True, True)]
    codes, err = [end.code for end in ends], ends[-1].stderr
    assert codes == [130, 130, 0]
    assert "torch-plain: goes on behind step 4 of 4." in err and "candidate-paddle: goes on behind step 2 of 4." in err
    assert "nothing of it is kept, so it begins" in ends[1].stderr
    again = json.loads((shop.reports / "gptj" / "train.json").read_text())
    assert again["tensors"] == whole.report["tensors"] and again["curves"] == whole.report["curves"]
    assert again["values"] == whole.report["values"]

