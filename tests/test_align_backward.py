"""Gradients: by formula, of right nets of every family, and of nets whose forward pass is right and whose gradients are
not."""

import gc
import json
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop
from resnet_fixtures import reference as resnet

from align import backward
from align.faults.planting import in_net
from align.gradients import recompute
from align.gradients.batches import Batch, Settings, batches_of
from align.gradients.paddle_recompute import PagedPaddleGradients
from align.gradients.paddle_side import PaddleGradients, _Norm
from align.gradients.torch_recompute import PagedTorchGradients
from align.gradients.torch_side import ReorderedGradients, TorchGradients
from align.inputs import Inputs
from align.noise import NoiseFloor, Pool
from align.oracle import Float64
from align.paddle_net import OwnNet
from align.reference import Reference
from align.runs import load_run
from align.tolerance import SECOND_LOOK
from models.gptj import GPTJBlock
from models.layer import BatchNorm2D

X, Y = np.float32([0.5, -1.0, 2.0, 4.0]), np.float32([1.0, 3.0, -2.0, 0.25])
SHORT = ("--iterations", "2")


# By formula -----------------------------------------------------------------------------------------------------------

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor([value])) for value in (1.5, -0.5))

    def forward(self, x, labels):
        return {"loss": (self.a * x + self.b - labels).square().mean()}


class PaddleLine(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.a, self.b = (self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(value))
                          for value in (1.5, -0.5))

    def forward(self, x, labels):
        return {"loss": (self.a * x + self.b - labels).square().mean()}


def side_of(model):
    moves = [SimpleNamespace(target=name, sources=(name,), shape=(1,), filling=None, take=lambda read, name=name: read(
        name), turn=lambda array: array) for name in ("a", "b")]
    run = SimpleNamespace(plan=SimpleNamespace(keys={"a": "a", "b": "b"}, moves=moves), modules=[], tied={},
                          batch_first=lambda name, array: array)
    return SimpleNamespace(model=model, run=run, call=lambda tensors: model(**tensors), blamed=nullcontext)


def by_formula(halves, settings):
    """(gradients, norm, norm after clipping) of each iteration: d/da mean (a x + b - y)^2 = mean 2 (a x + b - y) x."""
    a, b = 1.5, -0.5
    for _ in range(settings.iterations):
        found = np.zeros(2)
        for x, y in halves:
            error = 2 * (a * x.astype(np.float64) + b - y)
            found += np.array([np.mean(error * x), np.mean(error)]) / len(halves)
        norm = np.hypot(*found)
        clipped = found * settings.clip / max(norm, settings.clip)
        yield found, norm, np.hypot(*clipped)
        a, b = np.array([a, b]) - settings.lr * clipped


@pytest.mark.parametrize("made", [lambda: TorchGradients(side := side_of(Line()), side.run, trained=True),
                                  lambda: PaddleGradients(side_of(PaddleLine()))], ids=["torch", "paddle"])
@pytest.mark.parametrize("clip", [2.0, 100.0])
def test_two_parameters_have_the_gradients_of_the_formula(made, clip):
    settings = Settings(iterations=3, accumulate=2, clip=clip, lr=0.1)
    halves = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    several = [Batch(Inputs({"x": x}), {"labels": y}) for x, y in halves]
    gradients = made()
    course = gradients.iterate([several] * 3, settings)
    expected = list(by_formula(halves, settings))
    for number in settings.kept:
        found = [course.gradients[number][name] for name in ("a", "b")]
        np.testing.assert_allclose(np.ravel(found), expected[number - 1][0], rtol=1e-6)
    np.testing.assert_allclose([np.linalg.norm(course.norms[k]) for k in (1, 2, 3)], [one[1] for one in expected],
                               rtol=1e-6)
    np.testing.assert_allclose([course.clipped[k] for k in (1, 2, 3)], [one[2] for one in expected], rtol=1e-6)
    assert (expected[0][2] < expected[0][1]) == (clip == 2.0)
    weights = [float(gradients.model.a.detach()), float(gradients.model.b.detach())]
    assert weights == [1.5, -0.5], "the weights are given back"


def test_accumulated_micro_batches_are_the_gradient_of_the_whole_batch():
    one = [Batch(Inputs({"x": X}), {"labels": Y})]
    two = [Batch(Inputs({"x": X[half]}), {"labels": Y[half]}) for half in (slice(0, 2), slice(2, 4))]
    gradients = PaddleGradients(side_of(PaddleLine()))
    whole, parts = (gradients.iterate([several], Settings(1, len(several), 1.0, 0.1)).gradients[1]
                    for several in (one, two))
    for name in ("a", "b"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-6)


def transformed(x, weight, bias, scale, ids, table):
    scores = torch.nn.functional.linear(x + torch.nn.functional.embedding(ids, table), weight, bias)
    normed = torch.nn.functional.layer_norm(scores, scale.shape, scale, bias)
    return torch.nn.functional.softmax(torch.matmul(normed, normed.mT), -1).square().mean() + (scale * normed).sum()


def test_reordered_gradients_are_the_same_in_exact_arithmetic_and_differ_in_rounding():
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(shape, generator=generator) for shape in ((3, 40, 24), (24, 24), (24,), (24,), (9, 24))]
    ids = torch.arange(120).view(3, 40) % 9

    def gradients(dtype, mode):
        x, *weights, table = [torch.nn.Parameter(array.to(dtype)) for array in arrays]
        with mode:
            transformed(x, *weights, ids, table).backward()
        return [one.grad for one in (x, *weights, table)]
    exact = gradients(torch.float64, Float64())
    seen = [set() for _ in exact]
    for seed in range(1, 9):
        for known, found in zip(exact, gradients(torch.float64, ReorderedGradients(seed)), strict=True):
            torch.testing.assert_close(found, known, rtol=1e-11, atol=1e-11)
        for kinds, found in zip(seen, gradients(torch.float32, ReorderedGradients(seed)), strict=True):
            kinds.add(found.numpy().tobytes())
    assert all(len(kinds) > 1 for kinds in seen)


def one_after_the_other(rows):
    """The float32 sum of ``rows`` [n, k], as Paddle adds up the gradients of what n tokens share."""
    total = np.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total


SHARED = {"bias": lambda x, parameter: torch.nn.functional.linear(x, torch.eye(parameter.numel()), parameter),
          "norm's bias": lambda x, parameter: torch.nn.functional.layer_norm(x, parameter.shape, None, parameter),
          "norm": lambda x, parameter: torch.nn.functional.layer_norm(x, parameter.shape, parameter, None, 0.0),
          "scale": lambda x, parameter: parameter * x}


@pytest.mark.parametrize("use", SHARED.values(), ids=SHARED)
def test_the_noise_of_equal_gradients_is_that_of_a_sum_one_after_the_other(use):
    """Behind a mean pool all tokens of a row have one gradient: such a sum drifts, a tree and a shuffled one do not."""
    random = np.random.default_rng(0)
    signs = random.permuted(np.tile(np.float32([-1, 1]), 16))  # their own layer norm
    x = torch.tensor(np.tile(signs, (4, 64, 1)))
    arriving = np.repeat(random.normal(size=(4, 1, 32)).astype("float32"), 64, axis=1)
    terms = arriving.reshape(-1, 32)
    exact = terms.astype(np.float64).sum(axis=0)

    def error_of(seed):
        parameter = torch.nn.Parameter(torch.ones(32))
        with ReorderedGradients(seed):
            use(x, parameter).backward(torch.tensor(arriving))
        return np.abs(parameter.grad.numpy()) - np.abs(exact)  # scaled by a sign or not
    drift = np.sqrt(np.mean(np.square(one_after_the_other(terms) - exact)))
    pooled = np.sqrt(np.mean(np.square([error_of(seed) for seed in range(1, 9)])))
    assert drift / 2 < pooled < 2 * drift


def normed(x, mean, variance, scale, bias):
    return torch.nn.functional.batch_norm(x, mean, variance, scale, bias, True, 0.3, 1e-5)


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (9, 6)])
def test_a_trained_batch_norm_that_is_reordered_is_torchs_in_exact_arithmetic(shape):
    generator = torch.Generator().manual_seed(0)
    x, seed, scale, bias = (torch.randn(size, generator=generator) for size in (shape, shape, (6,), (6,)))

    def found(dtype, mode):
        inputs = [torch.nn.Parameter(one.to(dtype)) for one in (x, scale, bias)]
        mean, variance = torch.zeros(6, dtype=dtype), torch.full((6,), 2.0, dtype=dtype)
        with mode:
            given = normed(inputs[0], mean, variance, *inputs[1:])
            (given * seed.to(dtype)).sum().backward()
        return [given.detach(), mean, variance, *(one.grad for one in inputs)]
    exact, plain = found(torch.float64, nullcontext()), found(torch.float32, nullcontext())
    for number in (1, 2):
        for known, array in zip(exact, found(torch.float64, ReorderedGradients(number)), strict=True):
            torch.testing.assert_close(array, known, rtol=1e-11, atol=1e-11)
        others = found(torch.float32, ReorderedGradients(number))
        assert any((one != other).any() for one, other in zip(plain, others, strict=True))


def test_running_statistics_are_those_that_the_net_moves():
    """A third of each batch, torch's momentum, is 1 - 2 / 3 of Paddle's; Paddle's own layer divides by n."""
    torchs, paddles = torch.nn.BatchNorm2d(3, momentum=1 / 3), BatchNorm2D(3, momentum=2 / 3)
    bare = paddle.nn.BatchNorm2D(3, momentum=2 / 3)
    bare._variance.set_value(np.float32([0.5, 2.0, 30.0]))
    start = np.float32([0.5, 2.0, 30.0])
    torchs.running_var.copy_(torch.tensor(start))
    paddles._variance.set_value(start)
    paddles.eval()
    norm = _Norm("bn", paddles)
    with norm.trained():
        for number in range(3):
            batch = np.random.default_rng(number).normal(1.0, 2.0, (2, 3, 2, 2)).astype("float32")
            torchs(torch.tensor(batch))
            paddles(paddle.to_tensor(batch))
            bare(paddle.to_tensor(batch))
        found = dict(norm.statistics())
    np.testing.assert_allclose(found["bn._mean"], torchs.running_mean, rtol=1e-6)
    np.testing.assert_allclose(found["bn._variance"], torchs.running_var, rtol=1e-6)
    assert (np.abs(bare._variance.numpy() / torchs.running_var.numpy() - 1) > 1e-3).all()
    assert (paddles._variance.numpy() == start).all() and not paddles.training


def test_the_nearest_kink_of_a_relu_is_told_and_exact_zeros_are_none():
    net = torch.nn.Sequential(torch.nn.ReLU())
    net.forward = lambda x, labels: {"loss": net[0](x).mean()}
    x = np.float32([3.0, -4.0, 1e-6, 0.0])
    side = side_of(net)
    found = TorchGradients(side, side.run, trained=True).nearest_kink(Batch(Inputs({"x": x}), {"labels": x}))
    assert found == pytest.approx(1e-6 / np.sqrt(25 / 3), rel=1e-5)


class OneArray:
    """A side of one gradient."""

    def __init__(self, array):
        self.arrays, self.asked = {"w (isolated)": array}, {}


@pytest.mark.parametrize("off, noise, passed", [
    (5e-5, 2e-5, True), (2e-4, 2e-5, False), (2e-4, 1e-3, True), (5e-3, 1e-3, False), (2e-4, 2e-2, True)])
def test_a_gradient_is_held_to_torchs_noise_alone(off, noise, passed):
    """A right GPT-2 of 8 channels and one head was a false alarm with a ceiling there: its peaked softmax leaves of the
    gradient of a query what torch itself knows to 2e-3.
    """
    array = np.ones((32, 32), np.float32)
    floor = NoiseFloor(array.astype(np.float64), np.full((32, 32), noise, np.float32), noise)
    found = backward._judged("w (isolated)", OneArray(array), OneArray(array * np.float32(1 + off)),
                             {"w (isolated)": ("isolated", floor)})
    assert found.passed is passed


@pytest.mark.parametrize("distances, chosen", [([1.0], 0), ([0.0, 1e-9, 1.0], 2), ([1e-8, 1e-7, *[0.0] * 7], 1)])
def test_a_batch_on_the_kink_of_a_relu_is_drawn_anew(distances, chosen, monkeypatch):
    """Until one is clear of it, and of 9 of which none is the farthest is taken; no other batch is touched."""
    left = iter(distances)
    monkeypatch.setattr(TorchGradients, "__init__", lambda *given, **named: None)
    monkeypatch.setattr(TorchGradients, "nearest_kink", lambda self, batch: next(left))
    monkeypatch.setattr(backward, "other_batches", lambda run: iter(range(1, 9)))
    found = backward._clear_of_kinks(SimpleNamespace(reference=None, run=None), [[0, "b"], ["c", "d"]])
    assert found == [[chosen, "b"], ["c", "d"]] and next(left, None) is None


# Of whole nets --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("gradients"))
    found.make("GPTJForCausalLM", "gptj")
    found.make("GPT2LMHeadModel", "gpt2")
    return found


@pytest.mark.parametrize("head", ["BertForPreTraining", "BertModel", "OPTForCausalLM", "BloomForCausalLM",
                                  "T5ForConditionalGeneration"])
def test_a_right_net_is_aligned_and_every_parameter_is_compared(head, shop):
    run = shop.make(head)
    outcome = shop.align("backward", run, *SHORT)
    assert (outcome.code, outcome.failing) == (0, []), (outcome.report.get("failures"), outcome.stderr)
    compared = {tensor["name"].removesuffix(" (iteration 2)") for tensor in outcome.report["tensors"]
                if tensor["name"].endswith(" (iteration 2)")}
    model = getattr(__import__("transformers"), head).from_pretrained(shop.root / f"source-{head}")
    unused = 2 if head == "BertModel" else 0  # the pooler's, which last_hidden_state does not come from
    weights = {id(parameter) for parameter in model.parameters()}
    assert len(compared - {"global norm", "clipped global norm"}) >= len(weights) - unused
    assert all(tensor["max_abs"] is not None for tensor in outcome.report["tensors"])


@pytest.mark.parametrize("flags", [(*SHORT, "--paging", "off"), ("--paging", "on")])
def test_two_environments_find_the_same_as_one(shop, flags):
    both = shop.align("backward", "gpt2", *flags)
    assert both.code == 0, both.stdout + both.stderr
    assert shop.align("backward", "gpt2", "--only", "reference", *flags).code == 0
    assert shop.align("backward", "gpt2", "--only", "candidate", *flags[-2:]).code == 0
    apart = shop.align("backward", "gpt2", "--compare")
    assert (apart.code, apart.report["tensors"]) == (0, both.report["tensors"])


@pytest.mark.parametrize("head", ["GPTJForCausalLM", "GPT2LMHeadModel", "BertForPreTraining",
                                  "T5ForConditionalGeneration"])
def test_paged_gradients_are_those_of_the_whole_model_bit_for_bit(head, shop):
    shop.make(head, f"paged-{head}")
    run = load_run(f"paged-{head}", shop.reports)
    batch = batches_of(run, Settings(1, 1, 1.0, 1.0), 2)[0][0]
    once = Settings(1, 1, 1e9, 1.0)
    whole = TorchGradients(Reference(run), run, trained=True).iterate([[batch]], once).gradients[1]
    mine = PaddleGradients(OwnNet(run)).iterate([[batch]], once).gradients[1]
    steps = list(PagedTorchGradients(Reference(run, True), run).steps(batch, 1))
    answers = list(PagedPaddleGradients(OwnNet(run, paged=True)).answers(batch, steps))
    for expected, found in ((whole, steps), (mine, answers)):
        paged = {name.removesuffix(" (iteration 1)"): array for step in found for name, array in step.recorded.items()
                 if name.endswith(" (iteration 1)")}
        assert paged.keys() == expected.keys()
        wrong = [name for name in expected if paged[name].tobytes() != expected[name].tobytes()]
        assert all(is_near(paged[name], expected[name]) for name in wrong)
        assert not [name for name in wrong if not any(word in name for word in SUMS)]


def test_a_second_look_at_isolated_gradients_runs_only_where_the_doubt_is(shop, monkeypatch):
    """The plain pass is the same, so is float64, and twenty reordered runs are pooled with it."""
    run = load_run("gptj", shop.reports)
    batch = batches_of(run, Settings(1, 1, 1.0, 1.0), 2)[0][0]
    name = "transformer.h.1"
    first = next(step for step in PagedTorchGradients(Reference(run, True), run).steps(batch, 1)
                 if name in step.view("arriving"))
    pooled = []
    right = Pool.add
    monkeypatch.setattr(Pool, "add", lambda self, array: pooled.append(array.shape) or right(self, array))
    [again] = PagedTorchGradients(Reference(run, True), run).isolated_again(batch, SECOND_LOOK, {name})
    assert again.recorded.keys() == first.recorded.keys() and len(pooled) == (SECOND_LOOK + 1) * len(again.recorded)
    [mine] = list(PagedPaddleGradients(OwnNet(run, paged=True)).isolated(batch, [again]))[:-1]
    assert mine.recorded.keys() == again.recorded.keys()
    for key, floor in again.floors["isolated"].items():
        assert again.recorded[key].tobytes() == first.recorded[key].tobytes()
        assert floor.oracle.tobytes() == first.floors["isolated"][key].oracle.tobytes()


def test_on_which_side_of_a_kink_an_element_lies_is_drawn_by_lot_where_rounding_decides_it():
    """Of 1, -1, 0 and, half a unit of rounding from it, 3e-8 and -3e-8; their rms is 0.6."""
    sides = set()
    for seed in range(1, 33):
        x = torch.tensor([1.0, -1.0, 0.0, 3e-8, -3e-8], requires_grad=True)
        with ReorderedGradients(seed):
            y = torch.nn.functional.relu(x)
            y.sum().backward()
        assert (y - torch.tensor([1.0, 0.0, 0.0, 3e-8, 0.0])).abs().max() <= 3e-8
        assert x.grad[:3].tolist() == [1.0, 0.0, 0.0]
        sides.add(tuple(x.grad[3:].tolist()))
    assert sides == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}


SUMS = ("embeddings.weight", "shared", "relative_attention_bias", "t5.encoder")
"""Of what is used several times, or what comes before that, gradients are sums in another order."""


def is_near(found, expected):
    return np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("run", ["gptj", "gpt2"])
def test_a_model_larger_than_memory_is_aligned_gate_by_gate(run, shop):
    outcome = shop.align("backward", run, "--paging", "on")
    assert (outcome.code, outcome.failing) == (0, []), (outcome.report.get("failures"), outcome.stderr)
    assert any(tensor["name"].endswith("layers.1.norm1.weight (isolated)") or tensor["name"].endswith(
        "h.1.ln_1.weight (isolated)") for tensor in outcome.report["tensors"])


@pytest.mark.parametrize("head", ["BertForPreTraining", "BertModel"])
def test_paged_heads_that_come_in_another_order_are_compared_and_not_as_zeros(head, shop):
    """torch and Paddle go back through two heads of one encoder in different orders; a bare encoder needs two pairs."""
    outcome = shop.align("backward", shop.make(head, f"heads-{head}"), "--paging", "on")
    assert (outcome.code, outcome.failing) == (0, []), outcome.report.get("failures")
    alone = [tensor for tensor in outcome.report["tensors"] if tensor["name"].endswith("linear1.weight (isolated)")]
    assert len(alone) == 3 and all(0 < tensor["rel_l2"] < 1e-4 for tensor in alone)


def test_nothing_of_a_gate_outlives_its_judgement(shop, monkeypatch):
    """Without the collector of cycles: what waits for it is a gigabyte a gate in a model of 6B."""
    large, seen = 1000, []
    monkeypatch.setattr(recompute, "SAMPLE", large)
    right = PagedTorchGradients._step

    def watched(self, *given):
        alive = [array().shape for array in seen if array() is not None]
        held = [one.shape for one in gc.get_objects() if isinstance(one, torch.nn.Parameter) and one.grad is not None]
        assert (alive, held) == ([], []), "what earlier gates gave is still in memory"
        step = right(self, *given)
        arrays = [*step.view(recompute.WHOLE).values(), *(part for floors in step.floors.values()
                  for floor in floors.values() for part in (floor.oracle, floor.spread))]
        seen.extend(weakref.ref(array) for array in arrays if array.size > large)
        return step
    monkeypatch.setattr(PagedTorchGradients, "_step", watched)
    gc.collect()
    gc.disable()
    try:
        assert shop.align("backward", "gptj", "--paging", "on").code == 0
    finally:
        gc.enable()
    assert len(seen) > 50


@pytest.mark.full
def test_memory_is_flat_in_the_number_of_layers(shop):
    """A block of 768 x 3072 has 28 MB of weights and, in both passes, 400 MB of gradients and their noise."""
    peaks = []
    for layers in (2, 8):
        run = shop.make("GPTJForCausalLM", f"deep-{layers}", n_layer=layers, n_embd=768, n_inner=3072, n_head=8,
                        rotary_dim=32)
        done = subprocess.run([sys.executable, "-m", "align.backward", "--run", run, "--reports", str(shop.reports),
                               "--paging", "on"], cwd=Path(__file__).resolve().parents[1], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        peaks.append(json.loads((shop.reports / run / "backward.json").read_text())["peak_rss_bytes"])
    assert peaks[1] < 1.15 * peaks[0]


def test_what_is_doubtful_in_a_paged_model_is_judged_by_more_runs(shop, monkeypatch):
    right = NoiseFloor.judge
    kinds = []

    def stricter(self, candidate, kind):
        """One figure fails by little, and does so no more the second time it is looked at."""
        found = right(self, candidate, kind)
        if kind == "isolated" and self.oracle.shape == (32, 48):
            kinds.append(kind)
            if len(kinds) == 1:
                return [replace(found[0], ratio=2 * found[0].limit), *found[1:]]
        return found
    monkeypatch.setattr(NoiseFloor, "judge", stricter)
    outcome = shop.align("backward", "gptj", "--paging", "on")
    assert (outcome.code, outcome.failing) == (0, [])
    assert any("ran 21 times: none of them remain" in note for note in outcome.report["notes"])


def test_what_is_wrong_in_a_paged_net_is_named(shop, monkeypatch):
    right = GPTJBlock.forward
    calls = []

    def detaching(self, hidden, *rest, **named):
        calls.extend([self] if self not in calls else [])
        given, present = right(self, hidden, *rest, **named)
        return (given - (hidden - hidden.detach()) if calls.index(self) == 1 else given), present
    monkeypatch.setattr(GPTJBlock, "forward", detaching)
    outcome = shop.align("backward", "gptj", "--paging", "on")
    assert (outcome.code, outcome.report["first_divergence"]) == (1, "transformer.h.1")


def test_one_iteration_is_refused(shop):
    outcome = shop.align("backward", "gptj", "--iterations", "1")
    assert outcome.code == 2 and "give 2 or more" in outcome.stderr


@pytest.mark.parametrize("flags", [("--lr", "1e30"), ("--lr", "1e38", "--clip", "1e30")])
def test_a_rate_that_leaves_torch_no_numbers_is_refused_and_is_no_divergence(flags, shop):
    outcome = shop.align("backward", "gptj", *SHORT, *flags)
    assert outcome.code == 2 and "no finite numbers in iteration 2" in outcome.stderr


def test_gradients_that_are_all_0_are_no_evidence(shop):
    """The logarithm of the only class's share is 0, whatever the net."""
    run = shop.make("BertForSequenceClassification", "one-class", num_labels=1,
                    problem_type="single_label_classification")
    outcome = shop.align("backward", run, *SHORT)
    assert outcome.code == 2 and "0 in every iteration" in outcome.stderr


OWN_NETS = """
import paddle
from models.gptj import GPTJForCausalLM

class Stumbling(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back")

def changed(directory, change):
    net = GPTJForCausalLM.from_pretrained(directory)
    right = net.forward
    def forward(*given, **named):
        found = dict(right(*given, **named))
        return found | {"loss": change(found["loss"])} if found.get("loss") is not None else found
    net.forward = forward
    return net

def stumbling(config, directory):
    return changed(directory, Stumbling.apply)

def many(config, directory):
    return changed(directory, lambda loss: loss.expand([3]))
"""


@pytest.mark.parametrize("build, words", [
    ("stumbling", "your net own_losses:stumbling failed"), ("many", "one number is needed")])
def test_a_net_of_the_users_that_has_no_way_back_is_told_as_theirs(build, words, shop, tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN_NETS, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome = shop.align("backward", "gptj", *SHORT, "--target", f"own_losses:{build}")
    assert outcome.code == 2 and words in outcome.stderr


# Batch norms ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pictured(shop):
    source = shop.root / "source-resnet"
    resnet("ResNetForImageClassification", layer_type="basic").save_pretrained(source)
    return shop.convert("resnet", source, "resnet")


def test_batch_norms_are_trained_and_their_running_statistics_compared(shop, pictured):
    outcome = shop.align("backward", pictured, *SHORT)
    assert (outcome.code, outcome.failing) == (0, []), outcome.report.get("failures")
    names = {tensor["name"] for tensor in outcome.report["tensors"]}
    assert {f"{name} (iteration {number})" for name in ("bn1._mean", "layer4.0.bn2._variance") for number in (1, 2)
            } <= names
    assert any("Batch norms were trained" in note for note in outcome.report["notes"])


def swap_momentum(net):
    for layer in net.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._momentum = 0.1


def freeze_statistics(net):
    for layer in net.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._use_global_stats = True


@pytest.mark.parametrize("break_net, what", [(swap_momentum, {"_mean", "_variance"}), (freeze_statistics, {"weight"})])
def test_a_mistake_that_only_training_shows_is_caught_by_no_earlier_stage(shop, pictured, break_net, what):
    """torch's momentum given to Paddle's layer; statistics of the file used in a fine-tuning."""
    with planted(shop, pictured, break_net):
        assert [shop.align(stage, pictured).code for stage in ("forward", "loss")] == [0, 0]
        outcome = shop.align("backward", pictured, *SHORT)
    assert outcome.code == 1
    failing = {name.partition(" ")[0].rpartition(".")[2] for name in outcome.failing if "norm" not in name}
    assert failing == what if break_net is swap_momentum else what <= failing


# Nets whose forward pass is right -------------------------------------------------------------------------------------

def freeze(net):
    net.transformer.h[1].attn.q_proj.weight.stop_gradient = True


def halve(net):
    layer = net.transformer.h[1].mlp.fc_in
    right = layer.forward
    layer.forward = lambda x: 0.5 * right(x) + 0.5 * right(x).detach()


class Doubling(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def double(net):
    layer = net.transformer.h[1].attn.v_proj
    right = layer.forward
    layer.forward = lambda x: Doubling.apply(right(x))


class Losing(Doubling):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def lose(net):
    layer = net.transformer.h[1].attn.v_proj
    right = layer.forward
    layer.forward = lambda x: Losing.apply(right(x))


def detach_residual(net):
    block = net.transformer.h[1]

    def forward(hidden, *rest, **named):
        normed = block.ln_1(hidden)
        attended, present = block.attn(normed, *rest, **named)
        return attended + block.mlp(normed) + hidden.detach(), present
    block.forward = forward


@contextmanager
def planted(shop, run, break_net):
    with in_net(break_net)(shop.output(run)):
        yield


@pytest.mark.parametrize("break_net, first, alone", [
    (freeze, "transformer.h.1.attn.q_proj.weight", {"transformer.h.1.attn.q_proj.weight"}),
    (halve, "transformer.h.1.mlp.fc_in.bias", {"transformer.h.1.mlp.fc_in.bias", "transformer.h.1.mlp.fc_in.weight",
                                               "transformer.h.1.ln_1.weight", "transformer.h.1.ln_1.bias",
                                               "transformer.h.1"}),
    pytest.param(double, "transformer.h.1.attn.v_proj.weight", {
        "transformer.h.1.attn.v_proj.weight", "transformer.h.1.ln_1.weight", "transformer.h.1.ln_1.bias",
        "transformer.h.1"}, marks=pytest.mark.full),
    (detach_residual, "transformer.h.1", {"transformer.h.1"}),
])
def test_a_wrong_gradient_behind_a_right_forward_pass_is_named_and_other_blocks_are_cleared(
        shop, break_net, first, alone):
    with planted(shop, "gptj", break_net):
        assert [shop.align(stage, "gptj").code for stage in ("forward", "loss")] == [0, 0]
        outcome = shop.align("backward", "gptj", *SHORT)
    assert (outcome.code, outcome.report["first_divergence"]) == (1, first)
    failing = {name.removesuffix(" (isolated)") for name in outcome.failing if name.endswith(" (isolated)")}
    assert failing == alone
    if break_net is freeze:
        assert any("frozen" in failure for failure in outcome.report["failures"])


def test_gradients_that_are_no_numbers_are_diverged_in_a_report_that_any_parser_reads(shop):
    """Nothing bounds their relative error, as the ratio to torch's noise does; JSON has no word for that."""
    with planted(shop, "gptj", lose):
        outcome = shop.align("backward", "gptj", *SHORT)
    assert (outcome.code, outcome.report["first_divergence"]) == (1, "transformer.h.1.attn.v_proj.weight")
    failed = outcome.tensor("transformer.h.0.ln_1.weight (iteration 1)")
    assert not failed["passed"] and failed["allowed"] is None and "NaN" in failed["failure"]


def test_an_untied_weight_is_named_and_explained(shop):
    def untie(net):
        head = net.lm_head
        words = head.weight
        head.weight = head.create_parameter(words.shape)
        head.weight.set_value(words.numpy())
    with planted(shop, "gpt2", untie):
        outcome = shop.align("backward", "gpt2", *SHORT)
    assert outcome.code == 1
    assert outcome.report["diagnosis"]["kind"] == "untied-weight"
    assert outcome.report["first_divergence"] in ("lm_head.weight", outcome.report["diagnosis"]["subject"])


def clip_each(self, several):
    total = {}
    for batch in several:
        self._forget()
        (self.loss(batch) / len(several)).backward()
        pairs = [(tensor, tensor.grad) for tensor, _ in self._held if tensor.grad is not None]
        for tensor, gradient in paddle.nn.ClipGradByGlobalNorm(0.1)(pairs):
            total[id(tensor)] = total.get(id(tensor), 0.0) + gradient.numpy()
    for tensor, _ in self._held:
        if id(tensor) in total:
            tensor.grad.set_value(total[id(tensor)])


def only_add(self, several):
    self._forget()
    for batch in several:
        self.loss(batch).backward()


@pytest.mark.parametrize("mistake, kind, word", [(clip_each, "clipped-before-accumulation", "clipped by itself"),
                                                 (only_add, "accumulation", "without dividing")])
def test_a_mistake_of_accumulation_is_explained(shop, monkeypatch, mistake, kind, word):
    monkeypatch.setattr(PaddleGradients, "_accumulate", mistake)
    outcome = shop.align("backward", "gptj", *SHORT, "--clip", "0.1")
    assert outcome.code == 1
    assert not [name for name in outcome.failing if name.endswith(" (isolated)")]
    assert outcome.report["diagnosis"]["kind"] == kind and word in outcome.report["diagnosis"]["sentence"]


def test_what_clipping_does_is_compared(shop, monkeypatch):
    monkeypatch.setattr(paddle.nn.ClipGradByGlobalNorm, "__call__", lambda self, pairs: pairs)
    outcome = shop.align("backward", "gptj", *SHORT)
    assert outcome.code == 1
    assert "clipped global norm (iteration 1)" in outcome.failing
    assert not [name for name in outcome.failing if name.endswith("(iteration 1)") and "norm" not in name]


def test_a_floor_knows_the_noise_of_gradients(shop):
    outcome = shop.align("backward", "gptj", *SHORT)
    floors = [tensor["floor"] for tensor in outcome.report["tensors"]
              if tensor["name"].endswith(".weight (iteration 1)")]
    assert floors and all(1e-8 < floor < 1e-4 for floor in floors)


def test_flags_of_several_iterations_are_refused_where_weights_come_in_block_by_block(shop):
    refused = shop.align("backward", "gptj", "--paging", "on", "--clip", "0.5", "--lr", "1e-2")
    assert refused.code == 2 and "--clip and --lr: weights come in block by block here" in refused.stderr
