"""kendall_tau against SciPy, by each of its three ways; ties, nan, infinities, types, threads and forks."""

import math
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from scipy import stats

from cream_kernels import kendall_tau, reference

module = sys.modules["cream_kernels.kendall"]
WAYS = ["numpy", "pairs", "sorting"]


def take(monkeypatch, way):
    """Make every call go the given way, whatever its size."""
    limit = 2**62 if way == "numpy" else -1
    monkeypatch.setattr(module, "_NUMPY_COMPARISONS", limit)
    monkeypatch.setattr(module, "_NUMPY_COMPARISONS_WITH_NUMBA_LOADED", limit)
    monkeypatch.setattr(module, "_LONGEST_PAIR_COUNTED", -1 if way == "sorting" else 2**62)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    take(monkeypatch, request.param)
    return request.param


def rankings(P, R, seed=0, dtype=np.float64, ties=True):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(P, R))
    y = x + generator.normal(size=(P, R))
    return (np.round(x, 1).astype(dtype), np.round(y).astype(dtype)) if ties else (x.astype(dtype), y.astype(dtype))


def scipy_tau(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)  # SciPy 1.18 answers in the dtype it is given
    return np.array([stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)])


@pytest.mark.parametrize("P, R", [(1, 2), (1, 5), (31, 5), (33, 8), (5, 70), (2, 600)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_scipy(way, P, R, ties, dtype):
    x, y = rankings(P, R, dtype=dtype, ties=ties)
    tau = kendall_tau(x, y)
    assert tau.dtype == np.float64 and tau.shape == (P,)
    np.testing.assert_allclose(tau, scipy_tau(x, y), rtol=0, atol=1e-15)


def test_ways_agree_to_the_last_bit(monkeypatch):
    x, y = rankings(300, 9)
    taus = []
    for way in WAYS:
        take(monkeypatch, way)
        taus.append([kendall_tau(x, y), kendall_tau(x, y, variant="a")])
    assert np.array_equal(taus[0], taus[1], equal_nan=True) and np.array_equal(taus[0], taus[2], equal_nan=True)


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-300, math.inf, -math.inf, math.nan])


@settings(max_examples=150, deadline=None)
@given(some.arrays(np.float64, st.tuples(st.just(2), st.integers(0, 4), st.integers(0, 7)), elements=NUMBERS))
def test_means_what_the_reference_says(xy):
    for variant in "ab":
        expected = np.array(reference.kendall_tau(*xy, variant=variant), dtype=np.float64)
        for way in WAYS:
            with pytest.MonkeyPatch.context() as patch:
                take(patch, way)
                np.testing.assert_allclose(kendall_tau(*xy, variant=variant), expected, rtol=1e-15, atol=0)


def test_equal_and_reversed_rankings_give_exactly_one(way):
    x, _ = rankings(50, 7, ties=True)
    x[:, 0] = -9  # not all tied
    assert (kendall_tau(x, x) == 1).all() and (kendall_tau(x, -x) == -1).all()


def test_ties(way):
    flat, rising, pair = [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 3.0]
    x, y = np.array([flat, rising, flat, pair, pair]), np.array([rising, flat, flat, pair, rising])
    np.testing.assert_array_equal(kendall_tau(x, y), [math.nan, math.nan, math.nan, 1, 5 / math.sqrt(30)])
    np.testing.assert_array_equal(kendall_tau(x, y, variant="a"), [0, 0, 0, 5 / 6, 5 / 6])


def test_duplicates_are_not_agreement(way):
    """Four responses tied and one apart, ranked the other way round: ordinal ranks would call this agreement 0.6."""
    assert kendall_tau(np.array([[0, 0, 0, 0, 1.0]]), np.array([[0, 0, 0, 0, -1.0]])) == [-1]


def test_nan_stays_in_its_row(way):
    x, y = rankings(40, 6)
    clean = kendall_tau(x, y)
    x[3, 5], y[20, 0] = math.nan, math.nan
    for variant in "ab":
        assert np.flatnonzero(np.isnan(kendall_tau(x, y, variant=variant))).tolist() == [3, 20]
    others = np.delete(np.arange(40), [3, 20])
    assert np.array_equal(kendall_tau(x, y)[others], clean[others])


def test_infinities_and_signed_zeros(way):
    x = np.array([[-math.inf, -1, -0.0, 0.0, math.inf], [math.inf, math.inf, 0, 1, 2]])
    y = np.array([[1.0, 2, 3, 3, 4], [5.0, 5, 1, 2, 3]])
    for dtype in (np.float32, np.float64):
        assert kendall_tau(x.astype(dtype), y.astype(dtype)).tolist() == [1, 1]


@pytest.mark.parametrize("length", [0, 1])
def test_fewer_than_two_responses_have_no_order(way, length):
    for variant in "ab":
        assert np.isnan(kendall_tau(np.zeros((3, length)), np.zeros((3, length)), variant=variant)).all()


def test_no_rows(way):
    assert kendall_tau(np.zeros((0, 5)), np.zeros((0, 5))).shape == (0,)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint16, np.int64, np.uint64, np.float16])
def test_numpy_types(way, dtype):
    x, y = (np.abs(v * 3).astype(dtype) for v in rankings(20, 6))
    np.testing.assert_allclose(kendall_tau(x, y), scipy_tau(x.astype(float), y.astype(float)), rtol=0, atol=1e-15)


def test_whole_numbers_are_not_rounded(way):
    big = np.array([[2**63 - 3, 2**63 - 2, 2**63 - 1]])  # one and the same float64
    assert kendall_tau(big, np.array([[1.0, 2.0, 3.0]])) == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
def test_tensors_in_tensor_out(way, dtype):
    x, y = (torch.from_numpy(v).to(dtype) for v in rankings(20, 6))
    expected = scipy_tau(x.double().numpy(), y.double().numpy())
    for tau in (kendall_tau(x, y), kendall_tau(x.double().numpy(), y)):
        assert isinstance(tau, torch.Tensor) and tau.dtype == torch.float64
        np.testing.assert_allclose(tau.numpy(), expected, rtol=0, atol=1e-15)


def test_tensor_that_needs_a_gradient_and_strides(way):
    x, y = rankings(30, 10)
    tau = kendall_tau(torch.from_numpy(x).requires_grad_()[::2, 1::2], np.asfortranarray(y)[::2, 1::2])
    np.testing.assert_allclose(tau.numpy(), scipy_tau(x[::2, 1::2], y[::2, 1::2]), rtol=0, atol=1e-15)


def test_long_ranking_is_not_quadratic(monkeypatch):
    x, y = rankings(1, 50_000, dtype=np.float32)
    monkeypatch.setattr(module, "_count_pairs", None)
    np.testing.assert_allclose(kendall_tau(x, y), scipy_tau(x, y), rtol=0, atol=1e-14)


def as_dtype(ranks, dtype):
    """Numbers in the order of ranks, of both signs where there are two, and of several sizes."""
    middle = ranks.shape[-1] // 2
    if dtype == np.uint64:
        return ranks.astype(np.uint64) + np.uint64(2**64 - 2**20)  # the higher digits all alike
    if dtype == np.int64:
        return (ranks - middle) * 2**45 + ranks
    return np.sinh((ranks - middle) / 50).astype(dtype)


@pytest.mark.parametrize("R", [2, 15, 16, 17, 33, 64, 257, 513, 1000, 4097])
@pytest.mark.parametrize("dtypes", [(np.float64, np.uint64), (np.float32, np.int64)])
def test_sorting_counts_what_comparing_counts(monkeypatch, R, dtypes):
    generator = np.random.default_rng(R)
    rising, shuffled = np.arange(R), generator.permutation(R)
    tied, near = generator.integers(0, 7, R), rising + generator.integers(0, 40, R)
    orders = [rising, rising[::-1], np.zeros(R, dtype=np.int64), rising // 3, shuffled, shuffled // 5, tied, near]
    first, second = np.triu_indices(len(orders))
    x, y = as_dtype(np.stack(orders)[first], dtypes[0]), as_dtype(np.stack(orders)[second], dtypes[1])
    expected = module._count_numpy(x, y)
    take(monkeypatch, "sorting")
    assert np.array_equal(module._count(x, y), expected)
    assert np.array_equal(module._count(np.asfortranarray(y), np.asfortranarray(x)), expected[:, [0, 2, 1]])


def test_sorting_special_values(monkeypatch):
    take(monkeypatch, "sorting")
    generator = np.random.default_rng(0)
    some = [-math.inf, math.inf, -0.0, 0.0, 1.0, -1.0, 1e-45, -1e-45, 1e38, -1e38]
    x, y = generator.choice(some, (6, 700)), generator.choice(some, (6, 700))
    for dtype in (np.float32, np.float64):
        a, b = x.astype(dtype), y.astype(dtype)
        assert np.array_equal(module._count(a, b), module._count_numpy(a, b))
    x[2, 5], y[4, 699] = math.nan, -math.nan
    assert np.flatnonzero(np.isnan(kendall_tau(x, y))).tolist() == [2, 4]


def large():
    return rankings(120_001, 10, dtype=np.float32)  # which 3 threads do not divide


def compute(numbers):
    return kendall_tau(*numbers)


def test_many_threads_at_once(monkeypatch):
    take(monkeypatch, "pairs")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    numbers = large()
    expected = module._count_numpy(*numbers)
    with ThreadPoolExecutor(6) as pool:
        for counts in pool.map(lambda _: module._count(*numbers), range(12)):
            assert np.array_equal(counts, expected)


@pytest.mark.parametrize("P, R", [(7, 3000), (70, 2000)])  # 3 and 4 blocks, which divide neither
def test_long_rankings_on_many_threads(monkeypatch, P, R):
    take(monkeypatch, "sorting")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    numbers = rankings(P, R)
    expected = module._count_numpy(*numbers)
    with ThreadPoolExecutor(4) as pool:
        for counts in pool.map(lambda _: module._count(*numbers), range(4)):
            assert np.array_equal(counts, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_child_forked_after_a_parallel_call(monkeypatch):
    take(monkeypatch, "pairs")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    numbers = large()
    expected = compute(numbers)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for tau in pool.map_async(compute, [numbers] * 4).get(timeout=60):
            assert np.array_equal(tau, expected, equal_nan=True)


def test_many_small_calls_load_numba_in_the_end(monkeypatch):
    module._compiled.cache_clear()
    monkeypatch.setattr(module, "_done_by_numpy", 0)
    monkeypatch.setattr(module, "_NUMPY_COMPARISONS", 40)
    by_numpy = []
    monkeypatch.setattr(module, "_count_numpy", lambda *given, f=module._count_numpy: by_numpy.append(1) or f(*given))
    x, y = rankings(1, 6)  # 15 comparisons
    taus = [kendall_tau(x, y) for _ in range(4)]
    assert len(by_numpy) == 2 + 1  # numba answers the third; the fourth is so little that NumPy is faster all the same
    assert all(np.array_equal(tau, taus[0]) for tau in taus)


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    module._compiled.cache_clear()
    monkeypatch.setattr(module, "_NUMPY_COMPARISONS", 10)
    x, y = rankings(20, 6)
    with pytest.warns(UserWarning, match="numba is not installed"):
        tau = kendall_tau(x, y)
    np.testing.assert_allclose(tau, scipy_tau(x, y), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "x, y, settings, message",
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), {}, "must both be"),
        (np.zeros(3), np.zeros(3), {}, "must both be"),
        (np.zeros((2, 3)), np.zeros((2, 3)), dict(variant="c"), "variant must be"),
        (np.zeros((2, 3)), np.zeros((2, 3), dtype=complex), {}, "y must hold real numbers"),
        (np.array([["a", "b"]]), np.zeros((1, 2)), {}, "x must hold real numbers"),
    ],
)
def test_says_what_does_not_fit(x, y, settings, message):
    with pytest.raises(ValueError, match=message):
        kendall_tau(x, y, **settings)
