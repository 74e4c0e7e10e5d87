"""linear_logp's C++ pieces against float64, and their reasons where they cannot run."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cream_kernels import linear_logp_native as ours
from cream_kernels import native, reference
from cream_kernels.linear_logp_torch import Statistics
from tests.conftest import Processor

LOWEST = torch.finfo(torch.float32).min
SQUASHES = {
    "plain": {},
    "scaled": {"factor": 0.25 / 0.7},
    "capped": {"factor": 1 / 5.0, "ceiling": 5.0},
    "both": {"factor": 1.5 / 30.0, "ceiling": 30.0 / 2.0},
}
EMPTY = torch.empty(1, 2, dtype=torch.bfloat16)
needs_bf16 = pytest.mark.usefixtures("product")


def use(question, isa, name, monkeypatch, **answers):
    processor = Processor(**{question: isa}, **answers)
    if isa > getattr(processor.library, question)():
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setattr(native, "load", lambda: processor)


@pytest.fixture(params=["AVX512-BF16", "AMX"])
def product(request, monkeypatch):
    use("cream_bf16_isa", ["AVX512-BF16", "AMX"].index(request.param) + 1, request.param, monkeypatch)


def problem(N, V, D, seed=0):
    """Logits of order 10, and among the targets those at the ends of 64-wide panels and of 512-wide chunks."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).bfloat16()
    weight = (torch.randn(V, D, generator=g) * 3 / math.sqrt(D)).bfloat16()
    targets = torch.randint(V, (N,), generator=g)
    edges = torch.tensor([t for t in (0, V - 1, 63, 64, 511, 512) if t < V])[:N]
    targets[: len(edges)] = edges
    return hidden, weight, targets, torch.randn(V, generator=g)


def squash64(x, *, factor=1.0, ceiling=0.0):
    return ceiling * torch.tanh(factor * x) if ceiling else factor * x


def logits64(hidden, weight, bias=None, **squash):
    return squash64(hidden.double() @ weight.double().T + (0 if bias is None else bias.double()), **squash)


def hemmed(x):
    """x (n, m) with nothing but nan before, after and between its rows."""
    wide = torch.full((x.shape[0] + 2, x.shape[1] + 3), torch.nan, dtype=x.dtype)
    wide[1:-1, 1:-2] = x
    return wide[1:-1, 1:-2]


def statistics64(z, targets):
    """maximum, others, target_logit and moment of float64 logits."""
    own = z.gather(1, targets[:, None])
    rest = z.scatter(1, targets[:, None], -torch.inf)
    maximum = rest.amax(1).clamp(min=LOWEST)
    below = rest - maximum[:, None]
    return maximum, below.exp().sum(1), own[:, 0], (below.exp() * below.clamp(min=-1e4)).sum(1)


def logp_of(maximum, others, target_logit, *_):
    return Statistics(maximum, others, target_logit, None).finish()[0]


def worst(x, y):
    return (x - y).abs().max().item()


@needs_bf16
@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize(
    "N, V, D", [(1, 64, 32), (2, 1, 5), (6, 65, 1), (127, 1030, 64), (129, 515, 77), (8, 3001, 576)]
)
def test_statistics_are_those_of_float64(N, V, D, squash):
    hidden, weight, targets, some = problem(N, V, D)
    for bias in (None, some):
        z = logits64(hidden, weight, bias, **SQUASHES[squash])
        wanted = statistics64(z, targets)
        found = ours.statistics(hidden, weight, targets, bias, **SQUASHES[squash], want_moment=True)
        assert all(values.dtype == torch.float32 and values.shape == (N,) for values in found)
        maximum, others, target_logit, moment = found
        assert worst(maximum, wanted[0]) < 1e-5 and worst(target_logit, wanted[2]) < 1e-5
        assert ((others - wanted[1]).abs() <= 1e-5 * wanted[1]).all()
        assert ((moment - wanted[3]).abs() <= 1e-5 * (wanted[1] - wanted[3])).all()
        *same, nothing = ours.statistics(hidden, weight, targets, bias, **SQUASHES[squash])
        assert nothing is None and all(map(torch.equal, same, found))
        assert worst(logp_of(*found), z.log_softmax(1).gather(1, targets[:, None])[:, 0]) < 1e-5


@needs_bf16
@pytest.mark.parametrize("D", [576, 4096])
def test_no_worse_than_torch_in_float32(D):
    """One running sum over all of D would be three times as wrong at D = 4096."""
    hidden, weight, targets, _ = problem(64, 700, D)
    truth = logits64(hidden, weight).log_softmax(1).gather(1, targets[:, None])[:, 0]
    plain = reference.linear_logp(hidden, weight, targets)
    wide = reference.linear_logp(hidden.float(), weight.float(), targets)
    error = (logp_of(*ours.statistics(hidden, weight, targets)) - truth).double()
    assert error.abs().max() < 1e-5 and error.abs().max() <= worst(plain, truth)
    assert error.norm() <= 1.25 * (wide - truth).norm()


@needs_bf16
def test_a_sure_token_keeps_its_digits():
    hidden, weight, targets, _ = problem(40, 300, 16)
    hidden = (6 * weight[targets].float()).bfloat16()
    hidden += (4 * weight[targets].float().sign()).bfloat16()
    z = logits64(hidden, weight)
    maximum, others, target_logit, _ = statistics64(z, targets)
    truth = torch.nn.functional.logsigmoid(target_logit - maximum - others.log())
    assert truth.max() > -1e-9  # which float32 cannot tell from 0 beside 1
    found = logp_of(*ours.statistics(hidden, weight, targets)).double()
    assert ((found - truth).abs() <= 1e-4 * truth.abs()).all()


@needs_bf16
def test_logits_of_1e4():
    """Whole numbers, so that the products are exact and what is left is the exponentials' part."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randint(-100, 101, (300, 2), generator=g).bfloat16()
    weight[:, 1] = torch.randint(-2, 3, (300,), generator=g)
    hidden = torch.tensor([[100.0, 1.0], [-100.0, 1.0], [0.0, 1.0]]).bfloat16()
    z = logits64(hidden, weight)
    assert z.abs().max() >= 9900
    targets = torch.tensor([z[0].argmax(), z[0].argmax(), 7])
    truth = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    found = logp_of(*ours.statistics(hidden, weight, targets)).double()
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-6)


@needs_bf16
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("squash", ["plain", "capped"])
def test_a_bad_row_touches_no_other(bad, squash):
    hidden, weight, targets, _ = problem(13, 200, 9)
    before = ours.statistics(hidden, weight, targets, **SQUASHES[squash], want_moment=True)
    hidden[4, 3] = torch.nan
    after = ours.statistics(hidden, weight, targets, **SQUASHES[squash], want_moment=True)
    rest = torch.arange(13) != 4
    assert all(x[rest].equal(y[rest]) for x, y in zip(before, after, strict=True))
    assert all(x[4].isnan() for x in after)
    hidden[4] = bad
    assert logp_of(*ours.statistics(hidden, weight, targets))[4].isnan()


@needs_bf16
def test_forbidden_tokens():
    hidden, weight, targets, bias = problem(5, 1100, 8)
    targets = torch.tensor([3, 700, 70, 1099, 70])
    bias[64:600] = -torch.inf  # a chunk of nothing else, and row 2's and 4's own tokens
    found = ours.statistics(hidden, weight, targets, bias, want_moment=True)
    wanted = statistics64(logits64(hidden, weight, bias), targets)
    allowed = torch.tensor([0, 1, 3])
    assert worst(logp_of(*found)[allowed], logp_of(*wanted)[allowed]) < 1e-5
    assert (logp_of(*found)[[2, 4]] == -torch.inf).all()
    assert torch.allclose(found[3].double(), wanted[3], rtol=1e-5)

    bias[:] = -torch.inf
    bias[70] = 0
    found = ours.statistics(hidden, weight, targets, bias, want_moment=True)
    assert (found[0][[2, 4]] == LOWEST).all() and (found[1][[2, 4]] == 0).all() and (found[3][[2, 4]] == 0).all()
    assert (logp_of(*found)[[2, 4]] == 0).all() and (logp_of(*found)[allowed] == -torch.inf).all()


@needs_bf16
def test_a_target_that_is_no_token():
    hidden, weight, targets, _ = problem(6, 130, 8)
    targets[2], targets[4] = -100, 130
    maximum, others, target_logit, _ = ours.statistics(hidden, weight, targets)
    assert target_logit.isnan().tolist() == [False, False, True, False, True, False]
    z = logits64(hidden, weight)
    assert worst((maximum + others.log())[[2, 4]], z.logsumexp(1)[[2, 4]]) < 1e-5


@needs_bf16
def test_any_strides():
    hidden, weight, targets, bias = problem(11, 150, 7)
    wanted = ours.statistics(hidden, weight, targets, bias)

    def spread(x):
        wide = torch.full((2 * x.shape[0], *(x.shape[1:] + (3,))), torch.nan, dtype=x.dtype)
        if x.dim() == 2:
            wide[::2, :, 1] = x
            return wide[::2, :, 1]
        wide[::2, 1] = x
        return wide[::2, 1]

    own = torch.stack([targets, targets + 1], dim=1)[:, 0]
    columns_first = (hidden.T.contiguous().T, weight.T.contiguous().T)
    for h, w in ((spread(hidden), spread(weight)), (hemmed(hidden), hemmed(weight)), columns_first):
        found = ours.statistics(h, w, own, spread(bias))
        assert all(map(torch.equal, found[:3], wanted[:3]))
    found = ours.statistics(hidden, weight, targets, bias.double())
    assert all(map(torch.equal, found[:3], wanted[:3]))


@needs_bf16
def test_neither_threads_nor_neighbours_change_a_bit():
    hidden, weight, targets, _ = problem(1601, 1100, 8)  # more rows than a task takes
    one = ours.statistics(hidden, weight, targets, want_moment=True)
    try:
        torch.set_num_threads(2)
        two = ours.statistics(hidden, weight, targets, want_moment=True)
    finally:
        torch.set_num_threads(1)
    alone = ours.statistics(hidden[700:701], weight, targets[700:701], want_moment=True)
    assert all(map(torch.equal, one, two))
    assert all(x[700] == y[0] for x, y in zip(one, alone, strict=True))


@needs_bf16
def test_no_rows():
    _, weight, _, _ = problem(1, 10, 4)
    found = ours.statistics(weight[:0], weight, torch.empty(0, dtype=torch.int64), want_moment=True)
    assert [values.shape for values in found] == [(0,)] * 4


@needs_bf16
@pytest.mark.parametrize("n, c, D", [(1, 1, 1), (7, 65, 33), (129, 200, 257), (517, 130, 40), (5, 70, 1100)])
def test_a_tile_keeps_float32(n, c, D):
    hidden, weight, _, _ = problem(n, c, D)
    truth = hidden.double() @ weight.double().T
    frame = torch.full((n, c + 5), 7.0)
    tile = ours.multiply_bf16(hemmed(hidden), hemmed(weight.T), frame[:, 2:-3])
    assert tile.data_ptr() == frame[:, 2:].data_ptr()
    assert worst(tile, truth) <= 2 * worst(hidden.float() @ weight.float().T, truth) + 1e-6
    assert (frame[:, :2] == 7).all() and (frame[:, -3:] == 7).all()
    try:
        torch.set_num_threads(2)
        assert ours.multiply_bf16(hidden, hemmed(weight).T, torch.empty(n, c)).equal(tile)
    finally:
        torch.set_num_threads(1)


@needs_bf16
@pytest.mark.parametrize("n, m, c", [(1, 1, 1), (7, 9, 17), (6, 64, 64), (40, 35, 6), (1100, 200, 33), (65, 577, 200)])
def test_a_bfloat16_product_of_any_strides(n, m, c):
    g = torch.Generator().manual_seed(11)
    a, b = torch.randn(n, m, generator=g).bfloat16(), torch.randn(m, c, generator=g).bfloat16()
    before, shrink, truth = torch.randn(n, c, generator=g), torch.rand(n, generator=g), a.double() @ b.double()
    bound = 2 * worst(a.float() @ b.float(), truth) + 1e-6
    alone = ours.multiply_bf16(a, b, torch.empty(n, c))
    assert worst(alone, truth) <= bound
    wide, half = torch.full((n + 2, c + 5), 7.0), torch.full((n + 2, c + 5), 7.0).bfloat16()
    out, rounded = wide[1:-1, 2:-3], half[1:-1, 2:-3]
    apart, shrink_there = hemmed(b.repeat_interleave(2, 1))[:, ::2], torch.stack([shrink, shrink], 1)[:, 0]
    for a_there, b_there in itertools.product((a, hemmed(a), hemmed(a.T).T), (b, hemmed(b), hemmed(b.T).T, apart)):
        assert ours.multiply_bf16(a_there, b_there, out) is out and out.equal(alone)
        assert ours.multiply_bf16(a_there, b_there, rounded).equal(alone.bfloat16())
        ours.multiply_bf16(a_there, b_there, out.copy_(before), adds=True)
        assert worst(out, before + truth) <= bound
        ours.multiply_bf16(a_there, b_there, out.copy_(before), adds=True, shrink=shrink_there)
        assert worst(out, before * shrink[:, None].double() + truth) <= bound
    out.fill_(7.0), rounded.fill_(7.0)
    assert (wide == 7).all() and (half == 7).all()
    try:
        torch.set_num_threads(2)
        assert ours.multiply_bf16(a, b, torch.empty(n, c)).equal(alone)
    finally:
        torch.set_num_threads(1)


@needs_bf16
def test_bfloat16_products_of_nothing():
    nothing = torch.empty(0, 5).bfloat16()
    assert ours.multiply_bf16(nothing, torch.ones(5, 3).bfloat16(), torch.empty(0, 3)).shape == (0, 3)
    assert ours.multiply_bf16(torch.ones(2, 5).bfloat16(), nothing.T, torch.empty(2, 0)).shape == (2, 0)
    assert "no columns" in ours.why_not_multiply_bf16(nothing.T, nothing)


@needs_bf16
def test_short_sums_are_left_to_onednn(monkeypatch):
    processor = Processor(cream_bf16_across_serves=1)
    monkeypatch.setattr(native, "load", lambda: processor)
    left, right = torch.ones(300, 256).bfloat16(), torch.ones(256, 3).bfloat16()
    assert ours.why_not_multiply_bf16(left, right) is None
    assert "short" in ours.why_not_multiply_bf16(left[:, 1:], right[1:])


@pytest.fixture(params=["AVX2", "AVX-512"])
def float_product(request, monkeypatch):
    isa = ["AVX2", "AVX-512"].index(request.param) + 1
    use("cream_top_p_isa", isa, request.param, monkeypatch, cream_multiply_isa=isa)


@pytest.mark.usefixtures("float_product")
@pytest.mark.parametrize("left, right", [*itertools.product([torch.float32, torch.bfloat16], repeat=2)], ids=str)
@pytest.mark.parametrize("n, m, c", [(1, 1, 1), (7, 9, 17), (6, 40, 16), (40, 9, 6), (330, 200, 33), (65, 577, 100)])
def test_a_product_of_any_strides_keeps_float32(n, m, c, left, right):
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(n, m, generator=g).to(left), torch.randn(m, c, generator=g).to(right)
    before, truth = torch.randn(n, c, generator=g), a.double() @ b.double()
    error = worst(a.float() @ b.float(), truth)
    alone = ours.multiply(a, b, torch.empty(n, c))
    for a_there, b_there in itertools.product((a, hemmed(a), hemmed(a.T).T), (b, hemmed(b), hemmed(b.T).T)):
        frame = torch.full((n + 2, c + 5), 7.0)
        out = frame[1:-1, 2:-3]
        assert ours.multiply(a_there, b_there, out) is out
        assert out.equal(alone) and worst(out, truth) <= 2 * error + 1e-6
        out.copy_(before)
        ours.multiply(a_there, b_there, out, adds=True)
        assert worst(out, before + truth) <= 2 * error + 1e-6
        out.fill_(7.0)
        assert (frame == 7).all()
    try:
        torch.set_num_threads(2)
        assert ours.multiply(a, b, torch.empty(n, c)).equal(alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("float_product")
@pytest.mark.parametrize("m", [32, 320, 576, 4096])
def test_a_product_is_no_worse_than_a_blas(m):
    """One running sum over all of m would be 1.4 times as wrong at 320, and 4.4 times at 4096."""
    g = torch.Generator().manual_seed(10)
    a, b = torch.randn(96, m, generator=g), torch.randn(m, 200, generator=g)
    truth = a.double() @ b.double()
    error = (ours.multiply(a, b, torch.empty(96, 200)) - truth).norm()
    assert error <= 1.25 * (a @ b - truth).norm()


@pytest.mark.usefixtures("float_product")
def test_products_of_nothing():
    empty = torch.empty(0, 5)
    assert ours.multiply(empty, torch.ones(5, 3), torch.empty(0, 3)).shape == (0, 3)
    assert ours.multiply(torch.ones(2, 5), empty.T, torch.empty(2, 0)).shape == (2, 0)
    assert ours.multiply(torch.ones(2, 0), empty[:, :3], torch.full((2, 3), torch.nan)).equal(torch.zeros(2, 3))
    assert ours.multiply(torch.ones(2, 0), empty[:, :3], torch.ones(2, 3), adds=True).equal(torch.ones(2, 3))


@pytest.mark.parametrize("n, c", [(1, 1), (31, 33), (32, 64), (70, 5), (100, 131), (5, 200)])
def test_a_matrix_is_transposed_and_nothing_beside_it_written(n, c, product):
    matrix = hemmed(torch.randn(n, c, generator=torch.Generator().manual_seed(8)).bfloat16())
    frame = torch.full((c + 2, n + 5), 7.0).bfloat16()
    out = ours.transpose(matrix, frame[1:-1, 2:-3])
    assert out.equal(matrix.T) and out.data_ptr() == frame[1, 2:].data_ptr()
    try:
        torch.set_num_threads(2)
        assert ours.transpose(matrix, torch.empty(c, n).bfloat16()).equal(matrix.T)
    finally:
        torch.set_num_threads(1)
    frame[1:-1, 2:-3] = 7
    assert (frame == 7).all()


@pytest.fixture(params=["plain", "avx2", "avx512"])
def fold(request, monkeypatch):
    use("cream_top_p_isa", ["plain", "avx2", "avx512"].index(request.param), request.param, monkeypatch)
    return ours.fold_tile_


def folded(fold, x, targets, cuts):
    """All tiles of x (N, V), and what is left of each, brought to the last maximum."""
    statistics = [*Statistics.empty(x.shape[0], x)[:3]]
    moment = torch.zeros(x.shape[0])
    parts = []
    for first, end in zip(cuts[:-1], cuts[1:], strict=True):
        tile = x[:, first:end].clone()
        shrink = fold(tile, targets - first, *statistics, moment)
        parts = [part * shrink[:, None] for part in parts] + [tile]
    return *statistics, moment, torch.cat(parts, 1)


@pytest.mark.parametrize("forbidden", [False, True], ids=["all", "some at -inf"])
def test_fold_is_one_step_of_the_online_logsumexp(fold, forbidden):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(37, 533, generator=g) * 4
    x[5] = -x[5].sort().values  # its maximum is the first, and moves never again
    x[6] = x[6].sort().values  # always the last
    if forbidden:
        x[:, 100:300] = -torch.inf
    targets = torch.randint(533, (37,), generator=g)
    targets[:4] = torch.tensor([0, 99, 532, 400])
    maximum, others, target_logit, moment = statistics64(x.double(), targets)
    found = folded(fold, x, targets, [0, 100, 101, 300, 533])
    picked = target_logit.isfinite()
    assert picked.all() != forbidden
    assert worst(found[0], maximum) < 3e-6 and worst(found[2][picked], target_logit[picked]) < 3e-6
    assert (found[2][~picked] == -torch.inf).all()
    assert ((found[1] - others).abs() <= 5e-6 * others).all()
    assert ((found[3] - moment).abs() <= 5e-6 * (others - moment)).all()
    left = x.double().scatter(1, targets[:, None], -torch.inf).sub(maximum[:, None]).exp()
    assert worst(found[4], left) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_rows_that_are_only_read(fold, dtype, factor):
    g = torch.Generator().manual_seed(5)
    logits = (torch.randn(9, 4500, generator=g) * 4).to(dtype)
    logits[3] = logits[3].sort().values  # its maximum moves in every piece
    logits[:, 2048:4096] = -torch.inf  # a piece of nothing else
    logits[5, 4400] = torch.nan
    which = torch.tensor([[8, 0], [3, 0], [0, 0], [4, 0], [5, 0], [1, 0], [7, 0]])[:, 0]
    targets = torch.tensor([0, 2047, 4096, 4499, 17, -100, 4500])
    before = logits.clone()
    for rows in (hemmed(logits), logits):
        found = ours.read_rows(rows, which, targets, factor)
        for n, (row, own) in enumerate(zip(which.tolist(), targets.tolist(), strict=True)):
            z = factor * logits[row : row + 1].double()
            inside = 0 <= own < 4500
            maximum, others, target_logit, _ = statistics64(z, torch.tensor([own if inside else 0]))
            if not inside:
                maximum, others = z.amax(1), (z - z.amax(1)).exp().sum(1)
            if row == 5:
                assert found[0][n].isnan() and found[1][n].isnan()
                continue
            assert abs(found[0][n] - maximum) < 3e-6 and abs(found[1][n] - others) < 5e-6 * others
            assert abs(found[2][n] - target_logit) < 3e-6 if inside else found[2][n].isnan()
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    everything = ours.read_rows(logits, None, torch.arange(9), factor)
    some = ours.read_rows(logits, which[:4], which[:4].contiguous(), factor)
    assert all(x[which[:4]].equal(y) for x, y in zip(everything, some, strict=True))
    try:
        torch.set_num_threads(2)
        again = ours.read_rows(logits, None, torch.arange(9), factor)
    finally:
        torch.set_num_threads(1)
    assert all(x.nan_to_num(7).equal(y.nan_to_num(7)) for x, y in zip(everything, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_gradient_of_rows_that_were_read(fold, dtype, factor):
    g = torch.Generator().manual_seed(7)
    logits = (torch.randn(9, 300, generator=g) * 4).to(dtype)
    logits[3, 40:90] = -torch.inf
    logits[4, 17] = 100.0  # a sure target, above the maximum of the others
    logits[5, 299] = torch.nan
    logits[7] = -torch.inf
    which = torch.tensor([[8, 0], [3, 0], [0, 0], [4, 0], [5, 0], [1, 0], [7, 0]])[:, 0]
    targets = torch.tensor([0, 40, 299, 17, 17, 300, 2])
    maximum, others, _ = ours.read_rows(logits, which, targets, factor)
    at_others, at_target = torch.randn(2, 7, generator=g)
    exact = at_others[:, None].double() * (factor * logits[which].double() - maximum[:, None].double()).exp()
    own = (targets < 300).nonzero()[:, 0]
    exact[own, targets[own]] = at_target[own].double()
    wide = torch.full((11, 305), 7.0, dtype=dtype)
    frame = wide[1:-1, 2:-3]
    ours.write_gradient(hemmed(logits), which, targets, factor, maximum, at_others, at_target, frame)
    assert frame[4, 17] == at_target[3].to(dtype)
    assert frame[7].count_nonzero() == 1 and frame[7, 2] == at_target[6].to(dtype)
    assert (frame[which[4]].isnan() == exact[4].isnan()).all() and frame[5, 16].isnan()
    finite = [0, 1, 2, 3, 5, 6]
    error = (frame[which[finite]].double() - exact[finite]).abs()
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert (error <= (rounding + 5e-6) * exact[finite].abs() + 1e-37).all()
    wide[1 + which, 2:-3], written = 7.0, frame[which]
    assert (wide == 7).all()
    inside = logits.clone()
    try:
        torch.set_num_threads(2)
        ours.write_gradient(inside, which, targets, factor, maximum, at_others, at_target, inside)
    finally:
        torch.set_num_threads(1)
    assert inside[which].nan_to_num(9).equal(written.nan_to_num(9))
    assert inside[[2, 6]].equal(logits[[2, 6]])
    everything = torch.empty_like(logits)
    values = torch.empty(3, 9).index_copy_(1, which, torch.stack([maximum, at_others, at_target]))
    all_targets = torch.zeros(9, dtype=torch.int64).index_copy_(0, which, targets)
    ours.write_gradient(logits, None, all_targets, factor, *values, everything)
    assert everything[which].nan_to_num(9).equal(written.nan_to_num(9))


def test_fold_without_a_moment_is_the_same(fold):
    x = torch.randn(9, 70, generator=torch.Generator().manual_seed(4))
    targets = torch.arange(9)
    with_moment, without = [*Statistics.empty(9, x)[:3]], [*Statistics.empty(9, x)[:3]]
    frame = torch.full((9, 75), 7.0)
    frame[:, 2:-3] = x
    tile = x.clone()
    fold(tile, targets, *with_moment, torch.zeros(9))
    fold(frame[:, 2:-3], targets.repeat_interleave(2)[::2], *without)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(with_moment, without, strict=True))
    assert tile.equal(frame[:, 2:-3]) and (frame[:, :2] == 7).all() and (frame[:, -3:] == 7).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.tensor(torch.nan), torch.inf], ids=["nan", "-nan", "inf"])
def test_fold_of_nan_and_of_forbidden_tiles(fold, bad):
    x = torch.zeros(5, 40)
    x[1, 20] = bad
    x[2] = -torch.inf
    x[3, :30] = -torch.inf
    targets = torch.tensor([0, 0, 5, 5, 50])
    maximum, others, target_logit, moment, left = folded(fold, x, targets, [0, 10, 25, 40])
    assert maximum.tolist()[0] == 0 and maximum[2] == LOWEST and maximum[3] == 0
    assert others.tolist()[0] == 39 and others[2] == 0 and others[3] == 10 and others[4] == 40
    assert all(values[1].isnan() for values in (maximum, others, moment))
    assert target_logit[2] == -torch.inf and target_logit[4].isnan()
    assert moment[[0, 2, 3, 4]].eq(0).all() and left[2].eq(0).all() and left[3, :30].eq(0).all()


def test_fold_also_rounds(fold):
    x = torch.randn(9, 70, generator=torch.Generator().manual_seed(4))
    x[2, 3] = torch.nan
    frame = torch.full((9, 75), 7.0).bfloat16()
    fold(x, torch.arange(9), *Statistics.empty(9, x)[:3], rounded=frame[:, 2:-3])
    assert torch.equal(frame[:, 2:-3].nan_to_num(9.0), x.bfloat16().nan_to_num(9.0)) and x[2].isnan().all()
    assert (frame[:, :2] == 7).all() and (frame[:, -3:] == 7).all()


def test_rows_are_scaled_and_rounded_once(fold):
    g = torch.Generator().manual_seed(6)
    tile, scale = torch.rand(9, 75, generator=g).bfloat16()[:, 2:-3], torch.randn(9, generator=g)
    scale[1:4] = torch.tensor([0.0, torch.nan, 1e-30])
    exact = (tile.float() * scale[:, None]).bfloat16()
    out = torch.empty(9, 70).bfloat16()
    ours.scale_rows(tile, scale, out)
    assert torch.equal(out.nan_to_num(9.0), exact.nan_to_num(9.0))
    ours.scale_rows(tile, scale, tile)
    assert torch.equal(tile.nan_to_num(9.0), exact.nan_to_num(9.0))


def test_rows_are_added_to_wide_ones(fold):
    g = torch.Generator().manual_seed(9)
    frame, rows = torch.full((9, 75), 7.0), torch.randn(9, 75, generator=g).bfloat16()[:, 2:-3]
    total, shrink = torch.randn(9, 70, generator=g), torch.rand(9, generator=g)
    shrink[1:4] = torch.tensor([0.0, torch.nan, 1.0])
    for by in (None, shrink):
        frame[:, 2:-3] = total
        ours.add_rows_(frame[:, 2:-3], rows, by)
        exact = total.double() * (1 if by is None else by.double()[:, None]) + rows.double()
        torch.testing.assert_close(frame[:, 2:-3].double(), exact, rtol=1e-6, atol=1e-7, equal_nan=True)
        assert (frame[:, :2] == 7).all() and (frame[:, -3:] == 7).all()
    assert frame[2, 2:-3].isnan().all() and frame[1, 2:-3].equal(rows[1].float())


def test_fold_does_not_depend_on_threads(fold):
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(5))
    targets = torch.arange(50)
    one = folded(fold, x, targets, [0, 128, 300])
    try:
        torch.set_num_threads(2)
        two = folded(fold, x, targets, [0, 128, 300])
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, two))


def test_reasons(monkeypatch):
    wide = torch.empty(2, 3)
    assert "torch.float32" in ours.why_not(wide, wide)
    assert "meta" in ours.why_not(EMPTY.to("meta"), EMPTY.to("meta"))
    assert ours.why_not(EMPTY[:, :0], EMPTY[:, :0]) == "hidden has no columns"
    assert "torch.bfloat16" in ours.why_not_fold(EMPTY) and "torch.float32" in ours.why_not_scale(wide)
    assert "torch.float64" in ours.why_not_read(wide.double()) and "dense" in ours.why_not_read(wide.T)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    assert ours.why_not(EMPTY, EMPTY) == ours.why_not_fold(wide) == ours.why_not_scale(EMPTY) == "not built"

    class Bare:
        def cream_bf16_isa(self):
            return 0

        def cream_top_p_isa(self):
            return 0

    monkeypatch.setattr(native, "load", Bare)
    assert "no AVX512-BF16" in ours.why_not(EMPTY, EMPTY)
    assert "no AVX2" in ours.why_not_fold(wide)
