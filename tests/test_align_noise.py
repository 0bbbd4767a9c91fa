"""The yardstick: torch in other arithmetic, the pooled floor and its five tests, agreement of class scores."""

import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from align_fixtures import Workshop
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
)

from align import noise
from align.compare import compare
from align.forward import agreement, top_agreement
from align.gradients.torch_side import ReorderedGradients
from align.inside import Places
from align.noise import EPS, NoiseFloor, Pool
from align.oracle import Float64, Reordered
from align.runs import load_run
from align.tolerance import FORWARD

IDS = torch.arange(24).reshape(2, 12) % 40
PICTURES = torch.randn((2, 3, 97, 64), generator=torch.Generator().manual_seed(0))


def t5_encoder(**overrides):
    return T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                   attn_implementation="eager", **overrides))


MODELS = {
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32)),
    "bert": lambda: BertModel(BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, attn_implementation="eager")),
    "t5": t5_encoder,
    "resnet": lambda: with_statistics(ResNetForImageClassification(ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 24, 32], depths=[1, 2, 1, 1], num_labels=20))),
    "opt": lambda: OPTForCausalLM(OPTConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                            ffn_dim=64, max_position_embeddings=32, attn_implementation="eager")),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4,
                                                  attn_implementation="eager")),
}


def with_statistics(net):
    """Fresh running statistics, 0 and 1, would leave a batch norm little to round."""
    for name, statistic in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistic.normal_(std=0.2).add_(name.endswith("running_var"))
    return net


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def first(model):
    with torch.no_grad():
        return model(PICTURES if model.main_input_name == "pixel_values" else IDS)[0]


def test_reordered_sums_change_only_the_rounding(model):
    plain = first(model)
    with Reordered(1):
        other = first(model)
    assert not torch.equal(plain, other)
    assert torch.allclose(plain, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(1, 5))
def test_in_float64_reordering_changes_nothing_to_speak_of(model, seed):
    double = __import__("copy").deepcopy(model).double()
    with Float64():
        plain = first(double)
        with Reordered(seed):
            other = first(double)
    assert plain.dtype == torch.float64
    assert (plain - other).abs().max() < 1e-12 * plain.abs().max()


def test_a_float32_resnet_in_the_mode_computes_what_its_double_computes():
    torch.manual_seed(0)
    net = MODELS["resnet"]().eval()
    with torch.no_grad():
        expected = __import__("copy").deepcopy(net).double()(PICTURES.double()).logits
    assert not torch.equal(expected[0], expected[1])
    with Float64():
        assert torch.equal(first(net), expected)


@pytest.mark.parametrize("name, call", {
    "convolution": lambda x: torch.nn.functional.conv2d(x, WEIGHT, None, (2, 1), (3, 0), (1, 2)),
    "in groups": lambda x: torch.nn.functional.conv2d(x, WEIGHT[:, :3], None, 1, 1, 1, 2),
    "batch norm": lambda x: torch.nn.functional.batch_norm(x, *STATISTICS, *STATISTICS, False, 0.1, 1e-3),
    "average": lambda x: torch.nn.functional.adaptive_avg_pool2d(x, (1, 1)),
    "averages": lambda x: torch.nn.functional.adaptive_avg_pool2d(x, (2, 3)),
}.items())
def test_what_a_picture_goes_through_is_reordered_and_stays_the_same(name, call):
    x = torch.randn((2, 6, 9, 11), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain, seen = call(x), set()
    for seed in range(8):
        with Reordered(seed):
            other = call(x)
        assert torch.allclose(plain, other, rtol=1e-12, atol=1e-12), (name, seed)
        seen.add(other.numpy().tobytes())
    assert len(seen) > 1 or name == "averages"


@pytest.mark.parametrize("product", {
    "linear": lambda x, w: torch.nn.functional.linear(x, w, w[:, 0]),
    "matmul": lambda x, w: x @ w.T,
    "addmm": lambda x, w: torch.addmm(w[:, 0], x, w.T),
    "addmm of rows": lambda x, w: torch.addmm(x[:, :5], x, w.T),
    "baddbmm": lambda x, w: torch.baddbmm(x[None, :, :5], x[None], w.T[None])[0],
}.values())
def test_for_odd_seeds_few_rows_are_computed_as_many_are(product):
    """torch takes another kernel for few rows of float32, so a row's rounding depends on how many are with it."""
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn((4, 384), generator=generator), torch.randn((5, 384), generator=generator)
    with Reordered(1):
        few = product(x, w)
    with Reordered(1):
        many = product(x.repeat(16, 1), w)
    assert few.shape == (4, 5) and few.is_contiguous() and torch.equal(few, many[:4])


def test_one_row_without_rows_is_computed_too():
    x, w = torch.ones(8), torch.ones((3, 8))
    for seed in (1, 2):
        with Reordered(seed):
            assert torch.equal(torch.nn.functional.linear(x, w), torch.full((3,), 8.0))


def test_without_the_mode_gptj_in_double_still_computes_in_float32():
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32))
    double = model.eval().double()
    assert first(double).dtype == torch.float32
    with Float64():
        found = first(double)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("reordered", [False, True])
def test_gpt2_in_double_is_what_the_oracle_computes_also_of_an_attention_that_refuses_double(reordered):
    """``reorder_and_upcast_attn`` raises where the scores are not float32; its float32 is scaled before the product."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    whole = first(__import__("copy").deepcopy(model).double())
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = reordered
    with Float64():
        found = first(model)
    assert found.dtype == torch.float64 and (found - whole).norm() < 1e-14 * whole.norm()


def test_the_oracle_looks_up_the_rows_that_torch_looks_up():
    """T5's row for a distance of 728 of 939 is 16 + 16 log(728 / 16) / log(939 / 16), rounded down."""
    torch.manual_seed(0)
    model = t5_encoder(relative_attention_num_buckets=64, relative_attention_max_distance=939).eval()
    attention = model.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        plain = attention.compute_bias(730, 730)
        with Float64():
            found = attention.compute_bias(730, 730)
    assert found.dtype == torch.float64 and torch.equal(found, plain.double())


def test_a_mean_over_the_last_axis_is_reordered_and_others_are_not():
    values = torch.randn(64, 999, generator=torch.Generator().manual_seed(0)) + 100
    with Reordered(1):
        found = [values.mean(-1, keepdim=True), torch.mean(values, dim=-1), values.mean(0), values.mean()]
    plain = [values.mean(-1, keepdim=True), values.mean(-1), values.mean(0), values.mean()]
    assert [torch.equal(*two) for two in zip(found, plain, strict=True)] == [False, False, True, True]
    assert all(torch.allclose(*two, rtol=1e-6) for two in zip(found, plain, strict=True))


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_softmax_that_asks_for_float32_computes_in_float64(name):
    """Of a model in double, ``softmax(…, dtype=torch.float32)`` alone rounds, by some 1e-8."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    double = __import__("copy").deepcopy(model).double()
    rounded = first(double)
    with Float64():
        whole, widened = first(double), first(model)
    assert torch.equal(whole, widened)
    assert 1e-10 < (rounded - whole).norm() / whole.norm() < 1e-6


@pytest.mark.parametrize("call", [
    lambda a, b, c: c[0].addmm(a[0], b[0]), lambda a, b, c: torch.addmm(c[0], mat1=a[0], mat2=b[0], alpha=0.5, beta=2),
    lambda a, b, c: c.baddbmm(batch1=a, batch2=b, beta=1.0, alpha=0.25), lambda a, b, c: torch.baddbmm(c, a, b),
    lambda a, b, c: torch.bmm(a, b), lambda a, b, c: a @ b,
])
def test_products_sum_in_another_order_and_nothing_else_changes(call):
    """Of [2, 3, 700] with [2, 700, 5], plus [2, 3, 5]: other bits than torch's, and a float64 sum that is the same."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((2, 3, 700), (2, 700, 5), (2, 3, 5)))
    plain, exact = call(a, b, c), call(a.double(), b.double(), c.double())
    with Reordered(1):
        other = call(a, b, c)
        exact_other = call(a.double(), b.double(), c.double())
    assert not torch.equal(plain, other)
    assert (exact - exact_other).abs().max() < 1e-12


F = torch.nn.functional
CLASSES = torch.tensor([3, 0, -100, 6, 2, 2, 5, 1, 4])
UNUSUAL = {
    "weighted classes": lambda x, w: F.cross_entropy(x, CLASSES, weight=w.detach().exp()),
    "weighted classes, one ignored": lambda x, w: F.cross_entropy(
        x, CLASSES.clamp(0), w.detach().exp(), ignore_index=2),
    "weighted labels": lambda x, w: F.binary_cross_entropy_with_logits(
        x, (x > w).double(), pos_weight=w.detach().exp()),
    "weighted elements": lambda x, w: F.binary_cross_entropy_with_logits(x, (x > w).double(), x.detach().exp()),
    "a norm over two axes": lambda x, w: F.layer_norm(x.view(3, 3, 7), (3, 7), x[:3] + w, x[3:6]),
    "a picture without a batch": lambda x, w: F.conv2d(x.view(3, 3, 7), x[:4, :3].reshape(4, 3, 1, 1)),
    "strides in a list": lambda x, w: F.conv2d(x.view(1, 1, 9, 7), x[:2].view(2, 1, 7, 1), stride=[1, 3]),
    "a linear by name": lambda x, w: F.linear(input=x, weight=x[:4], bias=w[:4]),
    "a convolution by name": lambda x, w: F.conv2d(weight=x[:2].view(2, 1, 7, 1), input=x.view(1, 1, 9, 7), stride=2),
    "a transposed convolution by name": lambda x, w: F.conv_transpose1d(input=x, weight=x.view(9, 7, 1)),
    "a product by name": lambda x, w: torch.matmul(x, other=x.mT) + torch.addmm(input=x, mat1=x, mat2=x[:7]).sum(),
    "a softmax by name": lambda x, w: torch.softmax(input=x, dim=-1) + torch.mean(input=x, dim=-1, keepdim=True),
}


@pytest.mark.parametrize("call", UNUSUAL.values(), ids=UNUSUAL)
def test_reordering_does_not_change_what_is_computed(call):
    """A reordered sum of something else would be noise that no error rises above. Gradients, too."""
    generator = torch.Generator().manual_seed(6)
    arrays = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((9, 7), (7,))]

    def found(mode):
        x, w = (torch.nn.Parameter(one.clone()) for one in arrays)
        with mode:
            result = call(x, w)
            result.square().sum().backward()
        return [result.detach(), *(one.grad for one in (x, w) if one.grad is not None)]
    plain = found(nullcontext())
    for mode in (Float64(), *map(Reordered, range(4)), *map(ReorderedGradients, range(4))):
        for one, other in zip(plain, found(mode), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


WEIGHT = torch.randn((8, 6, 5, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
STATISTICS = torch.rand((2, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_the_runs_take_both_of_torchs_convolutions_and_leave_the_setting_as_it_was(monkeypatch):
    """Which of them is the more exact, and by how much, differs from CPU to CPU."""
    x = torch.randn((4, 512, 2, 2), generator=torch.Generator().manual_seed(0)).relu()
    weight = torch.randn((64, 512, 3, 3), generator=torch.Generator().manual_seed(1)) / 68
    right, by_onednn = torch.conv2d, []

    def convolution(*given):
        by_onednn.append(torch._C._get_mkldnn_enabled())
        return right(*given)
    monkeypatch.setattr(F, "conv2d", convolution)
    for seed in (1, 2):
        with Reordered(seed):
            right(x, weight, None, 1, 1)
    assert by_onednn == [False, True]
    assert torch._C._get_mkldnn_enabled()


def floor_of(oracle, *runs):
    pool = Pool(oracle)
    for run in runs:
        pool.add(run)
    return pool.floor()


def ratios(floor, candidate, kind="isolated"):
    return {found.test: found.ratio for found in floor.judge(candidate, kind)}


@pytest.mark.parametrize("broken", [np.inf, -np.inf, np.nan])
def test_runs_that_give_no_numbers_are_pooled_without_a_warning_and_pass_nothing(broken):
    oracle = np.ones((32, 32))
    oracle[3] = broken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        floor = floor_of(oracle, oracle, oracle)
    assert not all(found.passed for found in floor.judge(np.ones((32, 32)), "isolated"))


def test_the_five_ratios_of_an_error_that_is_everywhere_twice_the_noise():
    oracle = np.ones((32, 32))
    floor = floor_of(oracle, oracle + 1e-5, oracle - 1e-5)
    found = ratios(floor, oracle + 2e-5)
    assert found == pytest.approx({"total": 2, "peak": 2, "typical": 2, "channel": 2, "row": 2 / np.sqrt(2)})
    assert floor.relative == pytest.approx(1e-5)


def by_formula(oracle, runs, candidate):
    """The five ratios as the head of noise.py has them, of whole arrays in float64."""
    def rms(array, axis=None):
        return np.sqrt(np.mean(np.square(array), axis))
    e, errors = candidate - oracle, np.stack(runs) - oracle
    s, unit, x = rms(errors, 0), EPS / 2, oracle
    typical = np.median(rms(s, 1) / rms(x, 1))
    row = np.maximum(np.hypot(rms(s, 1), typical * rms(x, 1)), unit * rms(x, 1) + EPS**2 * rms(x))
    return {"total": rms(e) / max(rms(s), unit * rms(x)),
            "peak": np.abs(e).max() / max(np.abs(errors).max(), unit * np.abs(x).max()),
            "typical": np.median(rms(e, 1) / rms(x, 1)) / max(typical, unit),
            "row": (rms(e, 1) / row).max(),
            "channel": (rms(e, 0) / np.maximum(rms(s, 0), unit * rms(x, 0) + EPS**2 * rms(x))).max()}


@pytest.mark.parametrize("shape", [(700, 900), (20, 40_000), (40_000, 20)])
@pytest.mark.parametrize("size", [1e-20, 1.0])
def test_an_array_taken_in_tiles_has_the_ratios_of_the_formula_however_it_lies_in_memory(shape, size):
    """Errors of 1e-27, whose squares are no numbers of float32, among them."""
    generator = np.random.default_rng(0)
    oracle = size * generator.standard_normal(shape)
    *runs, candidate = (np.float32(oracle * (1 + 1e-6 * generator.standard_normal(shape))) for _ in range(4))
    assert oracle.size > noise.TILE
    expected = by_formula(oracle, runs, candidate)
    turned = floor_of(np.asfortranarray(oracle), *map(np.asfortranarray, runs))
    for floor in (floor_of(oracle, *runs), turned):
        assert ratios(floor, candidate) == pytest.approx(expected, rel=1e-6)


def test_a_floor_stays_what_it_was_when_its_pool_is_given_more_runs():
    oracle = np.ones((32, 32))
    pool = Pool(oracle)
    pool.add(oracle + 1e-6)
    first = pool.floor()
    more = pool.with_run(oracle + 3e-6)
    pool.add(oracle + 3e-6)
    assert first.spread == pytest.approx(1e-6, rel=1e-6)
    assert more.spread == pytest.approx(np.sqrt(5) * 1e-6, rel=1e-6) == pool.floor().spread


def test_one_bad_row_and_one_bad_channel_show_in_their_own_tests():
    oracle = np.ones((100, 64))
    floor = floor_of(oracle, oracle + 1e-6)
    row, channel = oracle + 1e-6, oracle + 1e-6
    row[7] += 19e-6
    channel[:, 5] += 19e-6
    assert ratios(floor, row)["row"] == pytest.approx(20 / np.sqrt(2))
    assert ratios(floor, row)["typical"] == pytest.approx(1)
    assert ratios(floor, channel)["channel"] == pytest.approx(20)
    assert ratios(floor, channel)["total"] < 4


def test_a_channel_of_which_a_relu_leaves_few_rows_has_no_floor_of_its_own_unless_the_candidate_gives_it_more():
    oracle = np.ones((100, 64))
    oracle[:, 5] = 0.0
    oracle[:9, 5] = 1e-3
    noisy = oracle + 1e-6 * (oracle != 0)
    noisy[:9, 5] = oracle[:9, 5] + 1e-8
    candidate = noisy.copy()
    candidate[:9, 5] += 2e-6
    assert ratios(floor_of(oracle, noisy), candidate)["channel"] == pytest.approx(2, rel=0.1)
    assert ratios(floor_of(oracle, noisy), candidate)["peak"] == pytest.approx(2, rel=0.1)
    candidate[:30, 5] += 2e-6
    assert ratios(floor_of(oracle, noisy), candidate)["channel"] > 9


def test_nobody_is_asked_for_less_than_half_a_unit_in_the_last_place():
    oracle = np.full((32, 32), 3.0)
    floor = floor_of(oracle, oracle + 1e-12)
    assert ratios(floor, oracle * (1 + EPS / 2))["total"] == pytest.approx(1)


def test_where_torch_makes_no_error_equality_is_asked():
    table = np.arange(1024, dtype="float32").reshape(32, 32)
    floor = floor_of(table.astype("float64"), table, table)
    assert all(found.passed for found in floor.judge(table, "isolated"))
    off = table.copy()
    off[3, 4] = np.nextafter(off[3, 4], np.float32(1e9))
    assert not all(found.passed for found in floor.judge(off, "isolated"))


def test_a_channel_that_torch_rounds_to_zero_forgives_what_is_far_below_its_tensor():
    generator = np.random.default_rng(0)
    oracle = generator.standard_normal((40, 20))
    oracle[:, 3] = 0.0
    noisy = oracle * (1 + 1e-7)
    candidate = noisy.copy()
    candidate[:, 3] = -1e-17
    floor = floor_of(oracle, noisy)
    assert all(found.passed for found in floor.judge(candidate, "isolated"))
    candidate[:, 3] = -1e-9
    assert not all(found.passed for found in floor.judge(candidate, "isolated"))


def test_in_a_chaotic_model_only_the_robust_tests_of_the_propagated_error_are_asked():
    oracle = np.ones((32, 32))
    noisy = floor_of(oracle, oracle + 2 * FORWARD)
    assert set(ratios(noisy, oracle, "propagated")) == {"total", "typical"}
    assert set(ratios(noisy, oracle, "isolated")) == {"total", "peak", "typical", "channel", "row"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(17, 60), st.integers(17, 60))
def test_one_more_run_with_the_same_noise_passes(seed, rows, channels):
    generator = np.random.default_rng(seed)
    oracle = generator.standard_normal((rows, channels))
    runs = [oracle + 1e-7 * generator.standard_normal(oracle.shape) for _ in range(6)]
    floor = floor_of(oracle, *runs[:5])
    assert all(found.passed for found in floor.judge(runs[5], "isolated"))


def test_a_noisy_reference_does_not_lift_the_ceiling_of_the_isolated_error():
    oracle = np.ones((32, 32), "float32")
    floor = floor_of(oracle.astype("float64"), oracle * 1.001)
    off = oracle * np.float32(1 + 5 * FORWARD)
    assert not compare("block", oracle, off, FORWARD, off, {"isolated": floor, "propagated": floor}).passed
    assert compare("block", oracle, off, FORWARD, oracle, {"isolated": floor, "propagated": floor}).passed


def test_kl_divergence_and_top_agreement_by_hand():
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    found = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]))
    told, = agreement({"logits": expected}, {"logits": found})
    assert f"{0.5 * (0.25 * np.log(2)):.1e}" in told
    assert top_agreement(expected, found, 1) == (1, 1, 2)


def test_rows_whose_best_classes_tie_are_not_counted():
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert top_agreement(scores, scores[:, [1, 0, 2]], 1) == (1, 0, 1)


def test_a_channel_of_few_live_rows_is_judged_by_what_torchs_error_is_elsewhere():
    """Behind a relu 12 of 300 rows of one channel live; torch's error there is small by luck."""
    generator = np.random.default_rng(0)
    oracle = np.maximum(generator.standard_normal((300, 512)), 0)
    oracle[:, 7] = 0
    oracle[:12, 7] = 0.02
    error = 1e-7 * generator.standard_normal(oracle.shape) * (oracle > 0)
    lucky = np.where(np.arange(512) == 7, 1e-3, 1.0)
    floor = NoiseFloor(oracle, np.abs(error * lucky), float(np.abs(error).max()))
    channel = lambda candidate: next(  # noqa: E731
        found for found in floor.judge(candidate, "isolated") if found.test == "channel")
    assert channel(oracle + error).passed
    wrong = oracle.copy()
    wrong[:12, 7] += 1e-4
    assert channel(wrong).share > 10


# A gelu's tail --------------------------------------------------------------------------------------------------------

def gelu_floor(h, based=True):
    """Of a gelu of h, float64 by formula, of which torch's runs are but 1e-9 off."""
    exact = torch.nn.functional.gelu(torch.from_numpy(h)).numpy()
    floor = NoiseFloor(exact, np.full(h.shape, 1e-9, np.float32), 1e-9)
    return replace(floor, base=np.abs(h)) if based else floor


@pytest.mark.parametrize("units, passed", [(1, True), (20, False)])
def test_the_tail_of_a_gelu_is_as_exact_as_a_sum_that_begins_with_one(units, passed):
    """h/2 (1 + erf): an erf that is so many units in the last place of 1 off."""
    h = -np.random.default_rng(2).uniform(4.5, 5.5, (64, 32))
    floor = gelu_floor(h)
    given = floor.oracle + h / 2 * units * 2.0**-23
    assert all(judged.passed for judged in floor.judge(given, "isolated")) is passed
    assert not all(judged.passed for judged in gelu_floor(h, based=False).judge(given, "isolated"))


def test_a_small_gelu_that_is_not_in_the_tail_is_judged_by_its_own_size():
    h = np.random.default_rng(3).normal(size=(64, 32)) * 1e-3
    floor = replace(gelu_floor(h), spread=np.full(h.shape, 1e-11, np.float32), largest=1e-11)
    assert not all(judged.passed for judged in floor.judge(floor.oracle * (1 + 2e-6), "isolated"))
    assert all(judged.passed for judged in floor.judge(floor.oracle * (1 + 1e-7), "isolated"))


def test_which_sublayer_a_gelu_is_given(tmp_path):
    for name, act, found_there in (("gelu", "gelu", True), ("relu", "relu", False), ("quick", "quick_gelu", False)):
        shop = Workshop(tmp_path / name)
        shop.make("BertForMaskedLM", "run", hidden_act=act)
        found = Places.of(load_run("run", shop.reports)).activated
        assert (found.get("bert.encoder.layers.0.linear2") == "bert.encoder.layers.0.linear1") is found_there
        assert (found.get("cls.predictions.layer_norm") == "cls.predictions.transform") is found_there
        assert bool(found) is found_there
