"""gather_logp against float64 and against what plain torch makes of the same logits in the same dtype."""

import sys

import pytest
import torch
from torch.nn import functional

from cream_kernels import IGNORE, gather_logp, reference

module = sys.modules["cream_kernels.gather_logp"]  # the package's attribute of that name is the function


def problem(N, V, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(N, V, generator=generator) * scale).to(dtype), torch.randint(V, (N,), generator=generator)


def upstream(N, seed=1):
    """Every row its own factor, of both signs, some zero."""
    grad = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad[3::5] = 0
    return grad


def run(function, logits, targets, grad, **settings):
    logits = logits.detach().requires_grad_()
    logp = function(logits, targets, **settings)
    return [logp.detach(), *torch.autograd.grad(logp, logits, grad.to(logp.dtype))]


def assert_no_worse(ours, plain, truth):
    """L2 error at most 1.25 times, largest error at most 2 times plain torch's, but for float32 rounding."""
    for name, a, b, exact in zip(("logp", "dlogits"), ours, plain, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == exact.shape, name
        a, b = (a.double() - exact).abs(), (b.double() - exact).abs()
        floor = torch.finfo(torch.float32).eps
        assert a.norm() <= 1.25 * b.norm() + floor * exact.norm(), name
        assert a.max() <= 2 * b.max() + floor * exact.abs().max(), name


@pytest.mark.parametrize("N, V", [(1, 1), (2, 37), (127, 5000), (3, 152064)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_no_worse_than_torch(N, V, temperature, dtype, library):
    logits, targets = problem(N, V, dtype)
    targets[1::4] = IGNORE
    ours = run(gather_logp, logits, targets, upstream(N), temperature=temperature)
    plain = run(reference.gather_logp, logits, targets, upstream(N), temperature=temperature)
    truth = run(reference.gather_logp, logits.double(), targets, upstream(N), temperature=temperature)
    assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("ignored", [slice(0, 0), slice(0, 1), slice(30, 31), slice(0, 31)], ids=str)
def test_float64_and_ignored_rows(ignored):
    logits, targets = problem(31, 50_000, torch.float64)  # blocks of 10 rows, the last of 1
    targets[ignored] = IGNORE
    truth = run(reference.gather_logp, logits, targets, upstream(31))
    logits[ignored] = torch.nan
    grad = upstream(31)
    grad[ignored] = torch.nan
    ours = run(gather_logp, logits, targets, grad)
    for a, exact in zip(ours, truth, strict=True):
        assert (a[ignored] == 0).all()
        torch.testing.assert_close(a, exact, rtol=1e-12, atol=1e-14)


def test_no_rows():
    logp, dlogits = run(gather_logp, *problem(0, 5)[:1], torch.zeros(0, dtype=torch.int64), upstream(0))
    assert logp.shape == (0,) and dlogits.shape == (0, 5)


def test_reads_strided_logits_and_leaves_them_alone():
    whole, _ = problem(40, 3000)
    before = whole.clone()
    logits, targets = whole[::2, 1::3], torch.arange(20)
    assert not logits.is_contiguous()
    for a, exact in zip(
        run(gather_logp, logits, targets, upstream(20), temperature=2.0),
        run(reference.gather_logp, logits, targets, upstream(20), temperature=2.0),
        strict=True,
    ):
        torch.testing.assert_close(a, exact)
    run(gather_logp, whole, torch.arange(40), upstream(40), temperature=2.0)
    assert torch.equal(whole, before)


def test_nan_row_touches_no_other():
    logits, targets = problem(9, 400)
    logits[4, 7] = torch.nan
    others = [row for row in range(9) if row != 4]
    ours = run(gather_logp, logits, targets, upstream(9))
    truth = run(reference.gather_logp, logits[others], targets[others], upstream(9)[others])
    for a, exact in zip(ours, truth, strict=True):
        assert torch.isnan(a[4]).all()
        torch.testing.assert_close(a[others], exact)


def test_confident_targets_keep_their_digits():
    """1 - p_y from 1e-2 to 1e-26: z_y - logsumexp, 1 - p_y and onehot - p would all round to 0 in float32."""
    logits, _ = problem(10, 1100, scale=0.1)
    logits[:, 5] = torch.arange(12, 72, 6)
    others = torch.cat((logits[:, :5], logits[:, 6:]), dim=1).double()
    exact = functional.logsigmoid(logits[:, 5].double() - others.logsumexp(1))
    logp, dlogits = run(gather_logp, logits, torch.full((10,), 5), torch.ones(10))
    assert exact.max() > -1e-20 and exact.min() < -1e-3
    assert ((logp - exact) / exact).abs().max() < 1e-5
    assert ((dlogits[:, 5] + exact.expm1()) / exact.expm1()).abs().max() < 1e-5


def test_huge_and_forbidden_logits():
    logits, targets = problem(20, 300, scale=3e3)
    targets[:10] = logits.argmax(1)[:10]
    logits[:, 7] = -torch.inf
    logits[0] = -torch.inf
    logits[0, 11], targets[0] = -1e4, 11  # the only token that is allowed
    logits[1, :] = -torch.inf
    logits[1, 11], targets[1] = 0, 12  # a token that is not
    ours = run(gather_logp, logits, targets, upstream(20))
    plain = run(reference.gather_logp, logits, targets, upstream(20))
    truth = run(reference.gather_logp, logits.double(), targets, upstream(20))
    assert ours[0][0] == 0 and ours[0][1] == -torch.inf
    finite = [0, *range(2, 20)]
    assert_no_worse(*([tensor[finite] for tensor in result] for result in (ours, plain, truth)))


def test_second_backward_over_a_retained_graph():
    logits, targets = problem(5, 40)
    logits.requires_grad_()
    logp, grad = gather_logp(logits, targets), upstream(5).float()
    (first,) = torch.autograd.grad(logp, logits, grad, retain_graph=True)
    (twice,) = torch.autograd.grad(logp, logits, 2 * grad, retain_graph=True)
    (again,) = torch.autograd.grad(logp, logits, grad)
    assert torch.equal(first, again) and torch.equal(2 * first, twice)


def test_second_derivative_is_refused():
    logits, targets = problem(3, 5)
    logits.requires_grad_()
    (first,) = torch.autograd.grad(gather_logp(logits, targets).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()
    logp = gather_logp(1 * logits, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="gather_logp has no second derivative"):
        torch.autograd.grad(logp.sum(), logits, create_graph=True)


def test_opcheck():
    logits, targets = problem(5, 40)
    targets[2] = IGNORE
    torch.library.opcheck(module._gather_logp, (logits.detach().requires_grad_(), targets, 0.5, False))
    logp, *statistics = module._gather_logp(logits, targets, 0.5, True)
    torch.library.opcheck(
        module._gather_logp_backward_, (torch.ones(5), logits.clone(), targets, logp, *statistics, 0.5)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_in_place_is_the_same_gradient_in_the_logits_own_memory(dtype):
    logits, targets = problem(37, 2300)
    targets[::5] = IGNORE
    leaf = logits.to(dtype).requires_grad_()
    logp = gather_logp(leaf, targets, temperature=0.7)
    (plain,) = torch.autograd.grad(logp, leaf, upstream(37).to(logp.dtype))
    made = leaf * 1  # not a leaf, as the output of a head is not
    before, where = made.detach().clone(), made.data_ptr()
    logp = gather_logp(made, targets, temperature=0.7, inplace_backward=True)
    assert torch.equal(made.detach(), before)
    (ours,) = torch.autograd.grad(logp, made, upstream(37).to(logp.dtype), retain_graph=True)
    assert ours.data_ptr() == where and torch.equal(ours, plain)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp, made, upstream(37).to(logp.dtype))


def test_in_place_reaches_what_made_the_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(50, 4, generator=generator).requires_grad_()
    targets = torch.arange(9)
    for inplace in (False, True):
        compiled = torch.compile(
            lambda w, inplace=inplace: gather_logp(hidden @ w.T, targets, inplace_backward=inplace).sum(),
            fullgraph=True,
            backend="aot_eager",
        )
        (ours,) = torch.autograd.grad(compiled(weight), weight)
        (eager,) = torch.autograd.grad(gather_logp(hidden @ weight.T, targets, inplace_backward=inplace).sum(), weight)
        (truth,) = torch.autograd.grad(reference.gather_logp(hidden @ weight.T, targets).sum(), weight)
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(eager, truth)


def test_compiles_without_a_graph_break():
    logits, targets = problem(11, 60)
    compiled = torch.compile(lambda z, t: gather_logp(2 * z, t, temperature=0.5), fullgraph=True, backend="aot_eager")
    ours = run(compiled, logits, targets, upstream(11))
    direct = run(lambda z, t: gather_logp(2 * z, t, temperature=0.5), logits, targets, upstream(11))
    for a, b in zip(ours, direct, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(6)), "logits must be"),
        (dict(logits=torch.zeros(3, 0)), "logits must be"),
        (dict(logits=torch.zeros(3, 6, dtype=torch.int64)), "logits must be"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "targets must be"),
        (dict(targets=torch.tensor([0, 6, 0])), r"targets\[1\] is 6"),
        (dict(targets=torch.zeros(3, dtype=torch.int64, device="meta")), "targets must be on cpu, .* not on meta"),
        (dict(temperature=-1.0), "temperature must be"),
    ],
)
def test_says_what_does_not_fit(change, message):
    good = dict(logits=torch.zeros(3, 6), targets=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        gather_logp(**(good | change))
