"""top_p_sample: every path draws the reference's tokens, and the reference draws from the nucleus."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from cream_kernels import native
from cream_kernels import top_p as module
from cream_kernels.top_p import top_p_sample, top_p_sample_native, top_p_sample_reference, top_p_sample_torch

ISA = {"plain": 0, "avx2": 1, "avx512": 2}
PATHS = ["torch", *ISA]


def sample(path, logits, uniform, temperature=1.0, top_p=1.0):
    if path == "torch":
        return top_p_sample_torch(logits, uniform, temperature, top_p)
    library = native.load()
    if library is None:
        pytest.skip(f"no native library: {native.why_not()}")
    if ISA[path] > library.cream_top_p_isa():
        pytest.skip(f"this processor has no {path}")
    return top_p_sample_native(library, logits, uniform, temperature, top_p, ISA[path])


def problem(N, V, dtype=torch.float32, seed=0):
    """Logits shaped like a language model's, a broad bell with some peaks, and a uniform number a row."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=g) * 2.5
    peaks = torch.randint(V, (N, 20), generator=g)
    logits.scatter_add_(1, peaks, torch.rand(N, 20, generator=g) * 12)
    return logits.to(dtype), torch.rand(N, generator=g, dtype=torch.float64)


def agree(tokens, logits, uniform, temperature, top_p):
    """The reference's tokens, but for rows that a change of 1e-6 in uniform or top_p would decide otherwise."""
    for row in range(len(tokens)):
        at = logits[row : row + 1]
        for du, dp in ((0, 0), (1e-6, 0), (-1e-6, 0), (0, 1e-6), (0, -1e-6)):
            u = (uniform[row : row + 1] + du).clamp(0, math.nextafter(1, 0))
            p = top_p if top_p in (0, 1) else min(max(top_p + dp, 0), 1)
            if top_p_sample_reference(at, u, temperature=temperature, top_p=p).item() == tokens[row].item():
                break
        else:
            pytest.fail(f"row {row}: token {tokens[row].item()} is not the reference's")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 3001])
def test_draws_what_the_reference_draws(path, dtype, V):
    logits, uniform = problem(40, V, dtype, seed=V)
    for temperature, top_p in ((0.8, 0.95), (1, 1), (1.3, 0.999), (0.7, 0.1), (1, 0), (0, 0.9), (5, 0.9)):
        tokens = sample(path, logits, uniform, temperature, top_p)
        assert tokens.dtype == torch.int64 and tokens.shape == (40,)
        agree(tokens, logits, uniform, temperature, top_p)


@pytest.mark.parametrize("path", PATHS)
def test_real_vocabulary(path):
    logits, uniform = problem(12, 49152, torch.bfloat16)
    agree(sample(path, logits, uniform, 0.8, 0.95), logits, uniform, 0.8, 0.95)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    levels=st.lists(st.sampled_from([-math.inf, -3.0, -0.0, 0.0, 1.0, 1.0078125]), min_size=1, max_size=300),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 50.0]),
    top_p=st.floats(0, 1),
)
def test_ties_and_bans(path, levels, uniform, temperature, top_p):
    logits = torch.tensor([[*levels, 0.0]])
    u = torch.tensor([uniform], dtype=torch.float64)
    tokens = sample(path, logits, u, temperature, top_p)
    assert logits[0, tokens[0]] > -math.inf
    agree(tokens, logits, u, temperature, top_p)


@pytest.mark.parametrize("path", PATHS)
def test_equal_logits_are_counted_from_the_lower_id_up(path):
    V = 4 * module.TOP_K  # larger than what the torch path looks at first
    logits = torch.zeros(V, V)
    uniform = (torch.arange(V, dtype=torch.float64) + 0.5) / V
    tokens = sample(path, logits, uniform, 1.0, 0.25)
    assert tokens.unique().tolist() == list(range(V // 4))
    logits[:, -1] = 1e-3  # the most probable one comes first in the nucleus, and last in id order
    tokens = sample(path, logits, uniform, 1.0, 0.25)
    assert tokens.unique().tolist() == [*range(V // 4 - 1), V - 1]


@pytest.mark.parametrize("path", PATHS)
def test_order_is_by_logit_where_the_weights_round_to_the_same(path):
    logits = torch.arange(1000.0)[None].repeat(64, 1) / 1000
    uniform = torch.arange(64, dtype=torch.float64) / 64
    tokens = sample(path, logits, uniform, 1e9, 0.5)  # every weight is 1 in float32
    assert tokens.min() >= 499
    tokens = sample(path, logits, uniform, 1e-30, 0.5)
    assert tokens.unique().tolist() == [999]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_distribution_is_the_nucleus(path, top_p):
    logits = torch.tensor([[2.0, -1.0, 0.5, -math.inf, 1.0, 0.5, -2.0, 1.5, -6.0, 0.0]])
    draws = 40_000
    uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    tokens = sample(path, logits.expand(draws, -1), uniform, 0.9, top_p)
    p = (logits[0].double() / 0.9).softmax(0)
    if top_p < 1:
        rank = p.argsort(descending=True)
        p[rank[int((p[rank].cumsum(0) < top_p).sum()) + 1 :]] = 0
        p /= p.sum()
    counts = tokens.bincount(minlength=10)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], p[p > 0] * draws).pvalue > 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_a_boundary_belongs_to_the_next_token(path, top_p):
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, math.nextafter(0.75, 0)], dtype=torch.float64)
    assert sample(path, torch.zeros(5, 4), uniform, 1.0, top_p).tolist() == [0, 1, 2, 3, 2]
    assert top_p_sample_reference(torch.zeros(5, 4), uniform, temperature=1.0, top_p=top_p).tolist() == [0, 1, 2, 3, 2]


def test_nucleus_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().repeat(4, 1)
    uniform = torch.tensor([0.0, 0.66, 0.67, 0.9999], dtype=torch.float64)
    # 0.5 alone is less than 0.7, 0.5 + 0.25 is enough: ids 1 and 3, with 2/3 and 1/3 of the mass
    tokens = top_p_sample(logits, uniform, temperature=1.0, top_p=0.7)
    assert tokens.tolist() == [1, 1, 3, 3]
    # temperature 1/2 squares the weights: 0.01, 0.25, 0.0225, 0.0625; the first alone has 0.72
    tokens = top_p_sample(logits, uniform, temperature=0.5, top_p=0.7)
    assert tokens.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_depend_on_its_batch(path):
    logits, uniform = problem(33, 2000, torch.bfloat16)
    logits[5] = 0  # a nucleus larger than the torch path's first look, so that this row alone is sorted
    together = sample(path, logits, uniform, 0.8, 0.95)
    alone = torch.cat([sample(path, logits[n : n + 1], uniform[n : n + 1], 0.8, 0.95) for n in range(33)])
    assert together.equal(alone)
    agree(together[5:6], logits[5:6], uniform[5:6], 0.8, 0.95)


def test_number_of_threads_changes_nothing():
    logits, uniform = problem(33, 2000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = top_p_sample(logits, uniform, temperature=0.8, top_p=0.95)
        torch.set_num_threads(3)
        assert top_p_sample(logits, uniform, temperature=0.8, top_p=0.95).equal(one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
def test_layouts(path):
    logits, uniform = problem(24, 700)
    wanted = sample(path, logits, uniform, 0.8, 0.95)
    assert sample(path, logits.T.contiguous().T, uniform, 0.8, 0.95).equal(wanted)
    wide = torch.full((24, 900), math.nan)
    wide[:, 100:800] = logits
    assert sample(path, wide[:, 100:800], uniform, 0.8, 0.95).equal(wanted)
    strided = torch.stack([uniform, uniform + 7], 1)[:, 0]
    assert sample(path, logits[:, :], strided, 0.8, 0.95).equal(wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("top_p", [0.0, 1e-12, 0.9, 1.0])
def test_banned_tokens_are_never_drawn(path, temperature, top_p):
    logits = torch.full((3, 300), -math.inf)
    logits[:, 137] = torch.tensor([-3e38, 0.0, 3e38])
    for u in (0.0, 0.5, math.nextafter(1, 0)):
        uniform = torch.full((3,), u, dtype=torch.float64)
        assert sample(path, logits, uniform, temperature, top_p).tolist() == [137] * 3


def test_cuda_goes_to_triton(monkeypatch):
    monkeypatch.setattr(module, "triton_serves", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(module, "top_p_sample_triton", lambda logits, *given: (logits.shape, *given[1:]))
    with FakeTensorMode():
        logits, uniform = torch.empty(2, 5, device="cuda"), torch.empty(2, dtype=torch.float64, device="cuda")
        assert top_p_sample(logits, uniform, temperature=0.8, top_p=0.9) == ((2, 5), 0.8, 0.9)


def test_no_rows():
    tokens = top_p_sample(torch.empty(0, 10), torch.empty(0, dtype=torch.float64), temperature=1.0, top_p=0.9)
    assert tokens.shape == (0,) and tokens.dtype == torch.int64


def test_draws_nothing_for_autograd():
    logits, uniform = problem(4, 50)
    logits.requires_grad_()
    wanted = top_p_sample(logits.detach(), uniform, temperature=1.0, top_p=0.9)
    assert top_p_sample(logits, uniform, temperature=1.0, top_p=0.9).equal(wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature, top_p", [(0.0, 0.9), (1.0, 1.0), (1.0, 0.9)])
@pytest.mark.parametrize(
    "value, what",
    [(math.nan, "a NaN"), (-math.nan, "a NaN"), (math.inf, "[+]inf"), (None, "nothing but -inf")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_distribution_is_named(path, temperature, top_p, value, what, dtype):
    logits, uniform = problem(6, 150, dtype)
    if value is None:
        logits[4] = -math.inf
    else:
        logits[4, 140] = value
    with pytest.raises(ValueError, match=f"row 4 .* {what}"):
        sample(path, logits, uniform, temperature, top_p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_uniform_out_of_range_is_named(path, value):
    logits, uniform = problem(6, 50)
    uniform[3] = value
    with pytest.raises(ValueError, match="row 3 has"):
        sample(path, logits, uniform, 1.0, 0.9)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(5)), r"\(N, V\)"),
        (dict(logits=torch.zeros(2, 0)), "V > 0"),
        (dict(logits=torch.zeros(2, 5, dtype=torch.float64)), "float32"),
        (dict(logits=torch.zeros(2, 5, dtype=torch.int64)), "float32"),
        (dict(uniform=torch.zeros(3, dtype=torch.float64)), "one number a row"),
        (dict(uniform=torch.zeros(2)), "must be float64"),
        (dict(uniform=torch.zeros(2, dtype=torch.float64, device="meta")), "uniform is on meta"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_p=-0.1), "top_p"),
        (dict(top_p=math.nan), "top_p"),
    ],
)
def test_arguments_are_checked(change, message):
    arguments = dict(logits=torch.zeros(2, 5), uniform=torch.zeros(2, dtype=torch.float64), temperature=1.0, top_p=0.9)
    with pytest.raises(ValueError, match=message):
        top_p_sample(**(arguments | change))
