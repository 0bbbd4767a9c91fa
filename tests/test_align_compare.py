"""align/compare.py: measures worked out by hand, and everything that must never pass."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from align.compare import CHUNK, Measures, compare, measure
from align.noise import NoiseFloor
from align.tolerance import EXACT, FORWARD

finite = st.floats(-1e6, 1e6, width=32)
vectors = arrays(np.float32, st.integers(1, 40), elements=finite)
pairs = st.integers(1, 40).flatmap(lambda size: st.tuples(*[arrays(np.float32, size, elements=finite)] * 2))


def passes(reference, candidate, allowed=FORWARD, **options):
    return compare("x", np.array(reference), np.array(candidate), allowed, **options).passed


def test_measures_by_hand():
    found = measure(np.array([[3.0, 0.0], [0.0, 4.0]], np.float32), np.array([[3.0, 1.0], [0.0, 2.0]], np.float32))
    assert found == Measures(max_abs=2.0, mean_abs=0.75, rel_l2=math.sqrt(5 / 25), cosine=17 / (5 * math.sqrt(14)),
                             worst=(1, 1), worst_values=(4.0, 2.0))


def test_measures_are_added_up_over_chunks():
    reference, candidate = np.ones(CHUNK + 5, np.float32), np.ones(CHUNK + 5, np.float32)
    candidate[[7, CHUNK + 3]] = 1.5, 3.0
    found = measure(reference, candidate)
    assert (found.max_abs, found.worst) == (2.0, (CHUNK + 3,))
    assert found.mean_abs == 2.5 / (CHUNK + 5)
    assert found.rel_l2 == pytest.approx(math.sqrt(4.25 / (CHUNK + 5)), rel=1e-12)


def test_differences_are_taken_in_float64():
    """In float16 the difference of these two would overflow, and their squares too."""
    found = measure(np.float16([60000.0]), np.float16([-60000.0]))
    assert (found.max_abs, found.rel_l2, found.cosine) == (120000.0, 2.0, -1.0)


@pytest.mark.parametrize("reference, candidate, told", [
    ([1.0, 2.0], [1.0, math.nan], "1 elements of the candidate are NaN or inf, the first at [1]"),
    ([math.nan, 2.0], [1.0, 2.0], "1 elements of the reference are NaN or inf, the first at [0]"),
    ([math.nan, 2.0], [math.nan, 2.0], "1 elements of the reference are NaN or inf, the first at [0]"),
    ([math.inf, 2.0], [math.inf, 2.0], "1 elements of the reference are NaN or inf, the first at [0]"),
    ([1.0, 2.0], [-math.inf, math.inf], "2 elements of the candidate are NaN or inf, the first at [0]"),
    ([[1.0, 1.0]], [[1.0], [1.0]], "the shape is [2, 1], the reference's [1, 2]"),
    ([1.0, 1.0], 1.0, "the shape is [], the reference's [2]"),
    ([[1.0, 1.0]], [1.0, 1.0], "the shape is [2], the reference's [1, 2]"),
    ([1, 2], [1.0, 2.0], "the dtype is float64, the reference's int64"),
    (np.float32([1.0]), np.float64([1.0]), "the dtype is float64, the reference's float32"),
    ([], [], "there is nothing to compare: the tensor is empty"),
    (np.zeros((0, 4)), np.zeros((0, 4)), "there is nothing to compare: the tensor is empty"),
], ids=str)
@pytest.mark.parametrize("allowed", [EXACT, FORWARD, math.inf])
def test_what_cannot_be_compared_fails_and_says_why(reference, candidate, told, allowed):
    found = compare("h.0", np.array(reference), np.array(candidate), allowed)
    assert (found.passed, found.measures, found.failure) == (False, None, f"h.0: {told}")


def test_one_outlier_in_a_million_fails():
    reference = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    candidate = reference.copy()
    candidate[123_456] += 0.9
    found = compare("h.0", reference, candidate, FORWARD)
    assert not found.passed
    assert found.measures.mean_abs < 1e-6
    assert found.measures.worst == (123_456,)
    assert "worst at [123456]" in found.failure


@pytest.mark.parametrize("candidate, passed", [([0.0, 0.0], True), ([0.0, 1e-30], False)])
@pytest.mark.parametrize("allowed", [EXACT, FORWARD])
def test_against_a_reference_of_zeros_only_zeros_pass(candidate, passed, allowed):
    assert passes([0.0, 0.0], candidate, allowed) is passed


@pytest.mark.parametrize("reference, candidate", [
    (1.0, np.nextafter(1.0, 2.0)), (0.0, 5e-324), ([1e30, 0.0], [1e30, 1e-30]), (2**53, 2**53 - 1),
])
def test_exact_lets_no_difference_pass(reference, candidate):
    assert not passes(reference, candidate, EXACT)
    assert passes(reference, reference, EXACT)


@pytest.mark.parametrize("excess, passed", [(0.99, True), (1.01, False)])
def test_the_limit_is_where_it_says(excess, passed):
    assert passes([1.0], [1.0 + excess * FORWARD]) is passed


def test_rows_that_are_nothing_beside_the_others_are_not_asked_for_digits_of_their_own():
    """16 rows of 1 and 48 of 1e-40, which torch has exactly and the candidate not at all."""
    oracle = np.concatenate([np.ones((16, 8)), np.full((48, 8), 1e-40)])
    floor = NoiseFloor(oracle, np.where(oracle == 1, 1e-7, 0).astype(np.float32), 1e-7)
    candidate = np.where(oracle == 1, 1 + 1e-7, 0)
    assert all(one.passed for one in floor.judge(candidate, "isolated"))
    assert not all(one.passed for one in floor.judge(np.where(oracle == 1, 1 + 1e-6, 0), "isolated"))


@pytest.mark.parametrize("size, passed", [(3.5, True), (4.5, False)])
def test_of_what_is_rounding_alone_only_the_size_is_asked(size, passed):
    """64 elements that are 0 but for noise of 1: as large all over as no element of torch's is but for chance."""
    noise = np.random.default_rng(5).normal(size=(64, 1))
    floor = NoiseFloor(1e-9 * noise, np.ones((64, 1), np.float32), 3.0)
    found = floor.judge(size * np.ones(64), "isolated")
    assert [one.test for one in found] == ["total"] and found[0].passed is passed


def test_noise_in_one_row_does_not_hide_that_all_others_are_wrong():
    oracle = np.random.default_rng(6).normal(size=(64, 64))
    spread = np.full(oracle.shape, 1e-7, np.float32)
    spread[0] = 1
    wrong = oracle.copy()
    wrong[1:] *= 1.3
    for kind in ("isolated", "propagated"):
        assert not all(one.passed for one in NoiseFloor(oracle, spread, 1.0).judge(wrong, kind))


@pytest.mark.parametrize("propagated, isolated, passed", [
    (1.0, 1.0, True), (1.1, 1.0, False), (1.0, 1.1, False), (1.0, math.nan, False),
])
def test_a_block_must_pass_both_in_its_own_run_and_isolated(propagated, isolated, passed):
    assert passes([1.0], [propagated], isolated=np.array([isolated])) is passed


@given(pairs)
def test_max_abs_and_cosine_are_symmetric(pair):
    one, other = measure(*pair), measure(*pair[::-1])
    assert (one.max_abs, one.mean_abs) == (other.max_abs, other.mean_abs)
    assert one.cosine == pytest.approx(other.cosine, abs=1e-12)


@given(pairs, st.integers(-40, 40))
def test_rel_l2_does_not_depend_on_the_scale(pair, exponent):
    assume(np.abs(pair[0]).max() > 1e-3)
    wide = [array.astype(np.float64) for array in pair]
    scaled = [array * 2.0**exponent for array in wide]
    assert measure(*scaled).rel_l2 == pytest.approx(measure(*wide).rel_l2, rel=1e-12)


@given(vectors)
def test_an_array_equals_itself(array):
    found = compare("x", array, array.copy(), EXACT)
    assert found.passed and found.failure is None
    assert (found.measures.max_abs, found.measures.rel_l2) == (0.0, 0.0)


@given(pairs)
@settings(max_examples=50)
def test_exact_agrees_with_numpy(pair):
    assert passes(*pair, EXACT) == np.array_equal(*pair)
