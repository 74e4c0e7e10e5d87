"""The Triton bodies through the public functions, against float64 and against plain torch in the same dtype.

Not collected by itself, since TRITON_INTERPRET is read when a kernel is decorated and so needs a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/triton_bodies.py      without a GPU (tests/test_triton.py does this)
    python -m pytest tests/triton_bodies.py                         on one, bfloat16 and real shapes included

Without a GPU the operators' CUDA bodies are registered for the CPU, and tiles are small: the interpreter takes about
2 ms for each step of a kernel. It computes bfloat16 wrongly, so half precision is float16 there.
"""

import contextlib
import math
import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from cream_kernels import (
    IGNORE,
    gather_logp,
    gather_logp_triton,
    linear_logp,
    linear_logp_triton,
    linear_weighted_dpo,
    reference,
    tiles,
    weighted_dpo,
    weighted_dpo_triton,
)

MODULES = {name: sys.modules[f"cream_kernels.{name}"] for name in ("gather_logp", "linear_logp", "weighted_dpo")}
MODULES["linear_weighted_dpo"] = sys.modules["cream_kernels.linear_weighted_dpo"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)

if INTERPRETED:
    linear, gather, margins, pairs = (
        MODULES[name] for name in ("linear_logp", "gather_logp", "weighted_dpo", "linear_weighted_dpo")
    )
    linear._linear_logp.register_kernel("cpu")(linear._forward_on_cuda)
    linear._linear_logp_backward.register_kernel("cpu")(linear._gradients_on_cuda)
    gather._gather_logp.register_kernel("cpu")(gather._forward_on_cuda)
    gather._gather_logp_backward.register_kernel("cpu")(gather._backward_on_cuda)
    gather._gather_logp_backward_.register_kernel("cpu")(gather._backward_inplace_on_cuda)
    margins._weighted_dpo.register_kernel("cpu")(margins._loss_and_slope_on_cuda)
    pairs._linear_weighted_dpo.register_kernel("cpu")(pairs._run_on_cuda)


SMALL = tiles.Tile(16, 64, 16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, chunks and blocks in every direction."""
    if INTERPRETED:
        for module in MODULES.values():
            monkeypatch.setattr(module, "triton_serves", lambda tensor: tensor.dtype != torch.float64)
            monkeypatch.setattr(module, "check_linear", lambda *given: None, raising=False)  # refuses float16 on CPUs
        monkeypatch.setattr(pairs, "_loses_small_gradients", lambda dtype: False)  # float16 is bfloat16's place here
        monkeypatch.setattr(tiles, "architecture", lambda device: "sm90")
    for name, value in dict(ROW_BLOCK=64, COMBINE_ROWS=16, COMBINE_TILES=2, PAIR_BLOCK=16).items():
        monkeypatch.setattr(tiles, name, value)
    monkeypatch.setattr(tiles, "chunk_rows", lambda V, sums_dweight: 16)
    # float32 goes to the vendor's product by default; test_forward takes it through the store-free kernel as well.
    monkeypatch.setattr(tiles, "linear_logp", lambda arch, dtype, D: SMALL._replace(vendor_gemm=dtype == torch.float32))


def problem(N, V, D, dtype=torch.float32, seed=0):
    drawn = {"generator": torch.Generator(DEVICE).manual_seed(seed), "device": DEVICE}
    hidden = torch.randn(N, D, **drawn).to(dtype)
    weight = (torch.randn(V, D, **drawn) * 3 * D**-0.5).to(dtype)
    return hidden, weight, torch.randint(V, (N,), **drawn)


def upstream(N, seed=1):
    """Every row its own factor, of both signs, some zero."""
    grad = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad[3::5] = 0
    return grad.to(DEVICE)


def run(function, hidden, weight, targets, grad, *, frozen=False, bias=None, **settings):
    """Value and gradients in hidden and, unless frozen, in weight and bias."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(not frozen)
    bias = None if bias is None else bias.detach().clone().requires_grad_(not frozen)
    logp = function(hidden, weight, targets, bias=bias, **settings)
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    return [logp.detach(), *torch.autograd.grad(logp, wanted, grad.to(logp.dtype))]


def assert_no_worse(ours, plain, truth, floor=2.0**-23):
    """L2 error at most 1.25 times, largest error at most 2 times plain torch's, but for float32 rounding."""
    for i, (a, b, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.dtype == b.dtype and a.shape == exact.shape, i
        a, b = (a.double() - exact).abs(), (b.double() - exact).abs()
        assert a.norm() <= 1.25 * b.norm() + floor * exact.norm(), i
        assert a.max() <= 2 * b.max() + floor * exact.abs().max(), i


def widened(*tensors):
    return [tensor.double() if tensor is not None and tensor.is_floating_point() else tensor for tensor in tensors]


def three_runs(hidden, weight, targets, **settings):
    """Of ours, of plain torch in the same dtype, and of float64."""
    grad, bias = upstream(len(targets)), settings.pop("bias", None)
    return (
        run(linear_logp, hidden, weight, targets, grad, bias=bias, **settings),
        run(reference.linear_logp, hidden, weight, targets, grad, bias=bias, **settings),
        run(reference.linear_logp, *widened(hidden, weight, targets, grad), bias=widened(bias)[0], **settings),
    )


def compare(hidden, weight, targets, **settings):
    assert_no_worse(*three_runs(hidden, weight, targets, **settings))


# The store-free forward


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("N, V, D", [(1, 1, 16), (2, 63, 24), (33, 257, 40), (50, 130, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_forward(monkeypatch, dtype, N, V, D, tma):
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL._replace(tma=tma))
    hidden, weight, targets = problem(N, V, D, dtype)
    targets[1::7] = IGNORE
    ours = linear_logp(hidden, weight, targets)
    plain = reference.linear_logp(hidden, weight, targets)
    assert_no_worse([ours], [plain], [reference.linear_logp(hidden.double(), weight.double(), targets)])


@pytest.mark.parametrize("vendor_gemm", [False, True], ids=["store-free", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_forward_with_every_setting(monkeypatch, dtype, vendor_gemm):
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL._replace(vendor_gemm=vendor_gemm))
    hidden, weight, targets = problem(40, 150, 24, dtype)
    targets[2::5] = IGNORE
    bias = torch.randn(150, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    settings = dict(temperature=0.7, scale=2.0, softcap=5.0, return_entropy=True)
    ours = linear_logp(hidden, weight, targets, bias=bias, **settings)
    plain = reference.linear_logp(hidden, weight, targets, bias=bias, **settings)
    truth = reference.linear_logp(*widened(hidden, weight, targets), bias=bias.double(), **settings)
    assert_no_worse(ours, plain, truth)
    assert (ours[1][2::5] == 0).all()


@pytest.mark.parametrize("which", ["none", "first", "last", "tile", "all"])
def test_ignored_rows_are_left_out_of_the_product(monkeypatch, which):
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL)
    hidden, weight, targets = problem(35, 70, 16)
    clean = linear_logp(hidden, weight, targets)
    rows = {"none": [], "first": [0], "last": [34], "tile": list(range(16, 32)), "all": list(range(35))}[which]
    targets[rows] = IGNORE
    hidden[rows] = torch.nan
    logp = linear_logp(hidden, weight, targets)
    left = [row for row in range(35) if row not in rows]
    assert (logp[rows] == 0).all() and torch.equal(logp[left], clean[left])


def test_more_row_blocks_than_a_group_has(monkeypatch):
    """19 blocks of 16 rows, of which a group takes 16."""
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL)
    hidden, weight, targets = problem(300, 70, 16)
    truth = reference.linear_logp(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(linear_logp(hidden, weight, targets).double(), truth, rtol=1e-5, atol=1e-5)


def test_no_rows():
    hidden, weight, targets = problem(0, 20, 16)
    assert linear_logp(hidden, weight, targets).shape == (0,)
    logp, dhidden, dweight = run(linear_logp, hidden, weight, targets, upstream(0))
    assert logp.shape == (0,) and dhidden.shape == (0, 16) and (dweight == 0).all()


def test_a_target_outside_the_vocabulary_is_nan(monkeypatch):
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL)
    hidden, weight, targets = problem(20, 70, 16)
    targets[3], targets[5] = 70, -5
    for logp in (linear_logp(hidden, weight, targets), gather_logp(hidden @ weight.T, targets)):
        assert torch.isnan(logp[[3, 5]]).all() and torch.isfinite(logp[[0, 1, 2, 4, 6]]).all()


@pytest.mark.parametrize("vendor_gemm", [False, True], ids=["store-free", "chunked"])
def test_confident_targets_keep_their_digits(monkeypatch, vendor_gemm):
    """1 - p_y from 1e-2 to 1e-26: z_y - logsumexp, 1 - p_y and onehot - p would all round to 0 in float32."""
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL._replace(vendor_gemm=vendor_gemm))
    hidden, weight, _ = problem(10, 200, 16)
    weight = weight / 64
    weight[5] = 0
    weight[5, 0] = 1
    hidden[:, 0] = torch.arange(12, 72, 6)
    targets, grad = torch.full((10,), 5, device=DEVICE), upstream(10) + 3
    others = torch.cat((weight[:5], weight[6:])).double()
    z = hidden.double() @ others.T
    exact = torch.nn.functional.logsigmoid(hidden.double() @ weight[5].double() - z.logsumexp(1))
    p = (z - z.logsumexp(1, keepdim=True)).exp() * -exact.expm1()[:, None]
    slope = grad[:, None] * (p[:, :, None] * (weight[5] - others)).sum(1)
    assert exact.max() > -1e-20 and exact.min() < -1e-3
    assert ((linear_logp(hidden, weight, targets) - exact) / exact).abs().max() < 1e-5
    for frozen in (False, True):
        logp, dhidden, *_ = run(linear_logp, hidden, weight, targets, grad, frozen=frozen)
        assert ((logp - exact) / exact).abs().max() < 1e-5
        assert ((dhidden - slope).norm(dim=1) / slope.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("frozen", [None, False, True], ids=["forward", "trained", "frozen"])
def test_logits_of_ten_thousand_and_a_nan_row(monkeypatch, frozen):
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL._replace(vendor_gemm=frozen is not None))
    hidden, weight, targets = problem(20, 150, 16)
    hidden *= 1e4 / (hidden @ weight.T).abs().max()
    targets[:10] = (hidden[:10] @ weight.T).argmax(1)
    if frozen is None:
        compare_forward = linear_logp(hidden, weight, targets)
        plain = reference.linear_logp(hidden, weight, targets)
        truth = reference.linear_logp(hidden.double(), weight.double(), targets)
        assert_no_worse([compare_forward], [plain], [truth])
        hidden[7, 3] = torch.nan
        broken = linear_logp(hidden, weight, targets)
        others = [row for row in range(20) if row != 7]
        assert torch.isnan(broken[7]) and torch.equal(broken[others], compare_forward[others])
        return
    compare(hidden, weight, targets, frozen=frozen)
    clean = run(linear_logp, hidden, weight, targets, upstream(20), frozen=frozen)
    hidden[7, 3] = torch.nan
    broken = run(linear_logp, hidden, weight, targets, upstream(20), frozen=frozen)
    others = [row for row in range(20) if row != 7]
    for a, b in zip(clean[:2], broken[:2], strict=True):
        assert torch.isnan(b[7]).all() and torch.equal(a[others], b[others])


@pytest.mark.parametrize("vendor_gemm", [False, True], ids=["store-free", "chunked"])
def test_forbidden_tokens(monkeypatch, vendor_gemm):
    """A bias of -inf over whole tiles and blocks of the vocabulary, and over the target of row 0."""
    monkeypatch.setattr(tiles, "linear_logp", lambda *given: SMALL._replace(vendor_gemm=vendor_gemm))
    hidden, weight, targets = problem(6, 300, 16)
    bias = torch.zeros(300, device=DEVICE)
    bias[:128] = bias[290:] = -torch.inf
    targets[0], targets[1:] = 295, torch.arange(150, 155)
    truth = reference.linear_logp(hidden, weight, targets, bias=bias, return_entropy=True)
    ours = linear_logp(hidden, weight, targets, bias=bias, return_entropy=True)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
    for frozen in (False, True):
        logp, dhidden, *_ = run(linear_logp, hidden, weight, targets, upstream(6), frozen=frozen, bias=bias)
        exact = run(reference.linear_logp, hidden, weight, targets, upstream(6), frozen=frozen, bias=bias)
        torch.testing.assert_close(logp, exact[0])
        torch.testing.assert_close(dhidden[1:], exact[1][1:])


# Chunks of the vendor's product with the row kernels over them


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("N, V, D", [(1, 1, 3), (2, 63, 24), (33, 257, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients(dtype, N, V, D, frozen):
    results = []
    for seed in range(4):  # in float32 one draw's error is a matter of luck
        hidden, weight, targets = problem(N, V, D, dtype, seed)
        targets[1::7] = IGNORE
        results.append(three_runs(hidden, weight, targets, frozen=frozen))
    assert_no_worse(*([torch.cat(draws) for draws in zip(*side, strict=True)] for side in zip(*results, strict=True)))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients_with_every_setting(dtype, frozen):
    hidden, weight, targets = problem(30, 150, 24, dtype)
    targets[2::5] = IGNORE
    bias = torch.randn(150, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    compare(hidden, weight, targets, bias=bias, frozen=frozen, temperature=0.7, scale=2.0, softcap=5.0)


def test_softcap_far_above_the_logits():
    """tanh near 0, where (1 - t) / (1 + t) has lost its digits."""
    compare(*problem(20, 70, 16), softcap=1000.0)


def test_dweight_is_summed_in_float32():
    """Two chunks of 16 rows that push by 3841 and -3840: no half precision has the first."""
    hidden, weight = torch.ones(32, 1, device=DEVICE, dtype=HALF), torch.zeros(2, 1, device=DEVICE, dtype=HALF)
    targets = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    grad = torch.tensor([512.0] * 15 + [2.0] + [-512.0] * 15 + [0.0], device=DEVICE)
    *_, dweight = run(linear_logp, hidden, weight, targets, grad)
    torch.testing.assert_close(dweight.float().cpu(), torch.tensor([[1.0], [-1.0]]), rtol=0, atol=0.01)


def test_strides():
    hidden, weight, targets = problem(40, 120, 48)
    columns = weight[:, 1::3].T.contiguous()
    compare(hidden[::2, 1::3], columns.T, targets[::2])
    ours = linear_logp(hidden[::2, 1::3], columns.T, targets[::2])
    truth = reference.linear_logp(*widened(hidden[::2, 1::3], columns.T, targets[::2]))
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_second_backward_over_a_retained_graph():
    hidden, weight, targets = problem(9, 50, 16)
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, grad = linear_logp(hidden, weight, targets), upstream(9).float()
    first = torch.autograd.grad(logp, (hidden, weight), grad, retain_graph=True)
    again = torch.autograd.grad(logp, (hidden, weight), 2 * grad)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(2 * a, b)


# Logits that exist


@pytest.mark.parametrize("inplace", [False, True], ids=["afresh", "inplace"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("N, V", [(1, 1), (2, 37), (20, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gather_logp(dtype, N, V, temperature, inplace):
    logits = (torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE, dtype)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[1::4] = IGNORE
    logits[1::4] = torch.nan
    grad = upstream(N)
    grad[1::4] = torch.nan

    def value_and_gradient(function, leaf, **settings):
        leaf = leaf.clone().requires_grad_()
        logp = function(leaf * 1, targets, temperature=temperature, **settings)
        return [logp.detach(), torch.autograd.grad(logp, leaf, grad.to(logp.dtype))[0]]

    ours = value_and_gradient(gather_logp, logits, inplace_backward=inplace)
    assert (ours[0][1::4] == 0).all() and (ours[1][1::4] == 0).all()
    logits[1::4] = 0
    grad[1::4] = 0
    plain = value_and_gradient(reference.gather_logp, logits)
    assert_no_worse(ours, plain, value_and_gradient(reference.gather_logp, logits.double()))


def test_gather_logp_of_strided_logits():
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = torch.randint(100, (20,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    view = logits[::3, ::2].T  # (20, 100)
    leaf = view.detach().requires_grad_()
    logp = gather_logp(leaf, targets)
    exact = view.detach().double().requires_grad_()
    truth = reference.gather_logp(exact, targets)
    torch.testing.assert_close(logp.double(), truth, rtol=1e-6, atol=1e-6)
    ours, theirs = torch.autograd.grad(logp.sum(), leaf)[0], torch.autograd.grad(truth.sum(), exact)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)


# The loss


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.5, 1.0])
def test_weighted_dpo(agreement):
    margin = torch.cat((torch.linspace(-40, 40, 33), torch.tensor([-1e4, -100.0, 100.0, 1e4]))).to(DEVICE)

    def value_and_slope(function, leaf):
        leaf = leaf.clone().requires_grad_()
        loss = function(leaf, torch.full_like(leaf, agreement))
        return [loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]

    ours, plain = (value_and_slope(function, margin) for function in (weighted_dpo, reference.weighted_dpo))
    truth = value_and_slope(reference.weighted_dpo, margin.double())
    assert_no_worse(ours, plain, truth)
    if agreement == 1.0:  # every digit, where softplus and sigmoid are far below 1
        settled = truth[0] > 0
        close = 1e-6 if INTERPRETED else 3e-6  # compiled, exp is ex2 of a rounded product: by arithmetic 1.6e-6 at 22.5
        assert ((ours[0] - truth[0]) / truth[0])[settled & (truth[0] > 1e-30)].abs().max() < close
        assert ((ours[1] - truth[1]) / truth[1])[truth[1].abs() > 1e-30].abs().max() < close


def test_one_agreement_for_all_pairs():
    margin, one = torch.linspace(-4, 4, 40, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    assert torch.equal(weighted_dpo(margin, one), weighted_dpo(margin, one.repeat(40)))
    hidden, weight, targets, cu_seqlens, near, _ = pair_problem(V=20)
    weight.requires_grad_()
    ours, same = (
        linear_weighted_dpo(hidden, weight, targets, cu_seqlens, near, c, beta=0.7)[0] for c in (one, one.repeat(5))
    )
    assert torch.equal(ours, same)


LENGTHS = [3, 4, 1, 9, 0, 6, 30, 25, 2, 2]  # of 10 sequences, one of them empty: 5 pairs
UPSTREAM = {"mean": torch.full((5,), 0.2), "per pair": torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0])}


def pair_problem(dtype=torch.float32, V=150, D=16):
    N = sum(LENGTHS)
    hidden, weight, targets = problem(N, V, D, dtype)
    targets[:2] = targets[-1] = targets[20] = IGNORE
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    agreement = torch.tensor([1.0, 0.0, 0.5, 0.731, 0.2], dtype=torch.float64, device=DEVICE)
    about = torch.zeros(10, device=DEVICE)
    wide = hidden.double(), weight.double(), targets, cu_seqlens, about, agreement
    _, logp = reference.linear_weighted_dpo(*wide, beta=1)
    near = logp + torch.randn(10, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    return hidden, weight, targets, cu_seqlens, near, agreement


def run_pairs(function, hidden, weight, *rest, upstream, frozen=False, **settings):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(not frozen)
    loss, logp = function(hidden, weight, *rest, beta=0.7, **settings)
    wanted = (hidden,) if frozen else (hidden, weight)
    return [loss.detach(), logp.detach(), *torch.autograd.grad(loss, wanted, upstream.to(DEVICE, loss.dtype))]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("chunk_tokens", [1, 40, None])
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_linear_weighted_dpo(dtype, upstream, chunk_tokens, frozen):
    given, upstream = pair_problem(dtype), UPSTREAM[upstream]
    ours = run_pairs(linear_weighted_dpo, *given, upstream=upstream, chunk_tokens=chunk_tokens, frozen=frozen)
    plain = run_pairs(reference.linear_weighted_dpo, *given, upstream=upstream, frozen=frozen)
    truth = run_pairs(reference.linear_weighted_dpo, *widened(*given), upstream=upstream, frozen=frozen)
    plain[0] = plain[0].to(ours[0].dtype)
    # the loss rests on differences of sums of log-probs, and the gradients on the loss
    assert_no_worse(ours, plain, truth, floor=torch.finfo(torch.float32).eps * truth[1].abs().max().item())


def test_dweight_of_pairs_is_summed_in_float32():
    """Three chunks that push by 2048, 1 and -2048: no half precision has 2049."""
    hidden, weight = torch.ones(3, 1, device=DEVICE, dtype=HALF), torch.zeros(2, 1, device=DEVICE, dtype=HALF)
    cu_seqlens = torch.tensor([0, 1, 1, 2, 2, 3, 3])  # every rejected sequence is empty
    reference_logp = torch.tensor([-math.log(2), 0.0] * 3, device=DEVICE)
    agreement = 0.5 - torch.tensor([4096.0, 2.0, -4096.0], device=DEVICE) / 0.7
    given = hidden, weight, torch.zeros(3, dtype=torch.int64, device=DEVICE), cu_seqlens, reference_logp, agreement
    *_, dweight = run_pairs(linear_weighted_dpo, *given, upstream=torch.ones(3), chunk_tokens=1)
    torch.testing.assert_close(dweight.float().cpu(), torch.tensor([[1.0], [-1.0]]), rtol=0, atol=0.01)


def test_linear_weighted_dpo_of_ignored_and_nan_rows():
    hidden, weight, targets, cu_seqlens, near, agreement = pair_problem()
    clean = run_pairs(
        linear_weighted_dpo, hidden, weight, targets, cu_seqlens, near, agreement, upstream=UPSTREAM["mean"]
    )
    hidden[targets == IGNORE] = torch.nan
    again = run_pairs(
        linear_weighted_dpo, hidden, weight, targets, cu_seqlens, near, agreement, upstream=UPSTREAM["mean"]
    )
    for a, b in zip(clean, again, strict=True):
        assert torch.equal(a, b)
    hidden[8] = torch.nan  # in pair 1, rows 7 to 16
    loss, _, dhidden, _ = run_pairs(
        linear_weighted_dpo, hidden, weight, targets, cu_seqlens, near, agreement, upstream=UPSTREAM["mean"]
    )
    assert torch.isnan(loss).tolist() == [False, True, False, False, False]
    others = [row for row in range(len(dhidden)) if row not in range(7, 17)]
    assert torch.equal(dhidden[others], clean[2][others])
    targets[:] = IGNORE
    given = hidden, weight, targets, cu_seqlens, near * 0, agreement
    loss, logp, dhidden, dweight = run_pairs(linear_weighted_dpo, *given, upstream=torch.ones(5))
    assert (logp == 0).all() and (dhidden == 0).all() and (dweight == 0).all()
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    empty = hidden[:0], weight, targets[:0], cu_seqlens[:1], near[:0], agreement[:0]
    loss, logp, dhidden, dweight = run_pairs(linear_weighted_dpo, *empty, upstream=torch.ones(0))
    assert loss.shape == logp.shape == (0,) and dhidden.shape == (0, 16) and (dweight == 0).all()


class NoReadingBack(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        assert function.overloadpacket.__name__ not in waits, function
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back():
    """The loss with all its gradients, and the forward of linear_logp: sizes come from cu_seqlens alone."""
    hidden, weight, targets, cu_seqlens, near, agreement = pair_problem()
    module = MODULES["linear_weighted_dpo"]
    given = hidden, weight, targets, cu_seqlens, near.float(), agreement.float(), 0.7, 40
    with NoReadingBack():
        loss, _, *saved = module._run_on_cuda(*given, True)
        module._gradients(torch.ones((), device=DEVICE).expand(5), *given[:4], *saved, True)
        linear_logp_triton.store_free(hidden, weight, targets, None, 1.0, 0.0, True, SMALL)
    with pytest.raises(AssertionError), NoReadingBack():
        (loss > 0).nonzero()


@interpreted
def test_launches_are_on_the_device_of_the_tensors(monkeypatch):
    """Triton takes the current device, whatever its arguments are on."""
    current, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def watched(self, *args, **settings):
        launched.append((self.fn.__name__, len(current)))
        return run(self, *args, **settings)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "run", watched)
    given = pair_problem()
    run_pairs(linear_weighted_dpo, *given, upstream=UPSTREAM["mean"], frozen=False)
    run_pairs(linear_weighted_dpo, *given, upstream=UPSTREAM["mean"], frozen=True)
    hidden, weight, targets = (x.detach() for x in given[:3])
    for inplace in (False, True):
        logits = (hidden @ weight.T).requires_grad_()
        gather_logp(1 * logits, targets, inplace_backward=inplace).sum().backward()
    linear_logp(hidden, weight, targets)
    weight.requires_grad_()
    linear_logp(hidden, weight, targets).sum().backward()
    kernels = {"statistics_kernel", "gradient_kernel", "pairs_kernel", "weighted_dpo_kernel"}
    assert {name for name, _ in launched} == kernels and {depth for _, depth in launched} == {1}


@on_a_gpu
def test_the_card_is_never_waited_for():
    hidden, weight, targets, cu_seqlens, near, agreement = pair_problem(HALF)
    hidden.requires_grad_()
    weight.requires_grad_()
    given = hidden, weight, targets, cu_seqlens, near.float(), agreement.float()
    linear_weighted_dpo(*given, beta=0.7)[0].mean().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_weighted_dpo(*given, beta=0.7)[0].mean().backward()
        with torch.no_grad():
            linear_logp(hidden, weight, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Indices beyond 2^31


def far_apart(values):
    """The same rows, 2^30 elements from each other, in memory that is mapped where it is touched."""
    rows, columns = values.shape
    space = torch.empty((rows - 1) * 2**30 + columns, dtype=values.dtype, device=values.device)
    view = space.as_strided((rows, columns), (2**30, 1))
    view.copy_(values)
    return view


def test_rows_far_apart():
    """3 rows of 64 at a stride of 2^30: row 2 starts at 2^31, where 32 bits would turn negative."""
    values, weight, targets = problem(3, 40, 64, HALF)
    logits = (values @ weight.T).contiguous()
    for tile in (SMALL, SMALL._replace(tma=True)):
        near = linear_logp_triton.store_free(values, weight[:3], targets % 3, None, 1.0, 0.0, True, tile)
        far = linear_logp_triton.store_free(values, far_apart(weight[:3]), targets % 3, None, 1.0, 0.0, True, tile)
        assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
    strided = far_apart(logits)
    near = gather_logp_triton.statistics(logits, targets, None, 1.0, 0.0, True)
    far = gather_logp_triton.statistics(strided, targets, None, 1.0, 0.0, True)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
    near_out, far_out = torch.empty_like(logits), far_apart(logits)
    ones = torch.ones(3, device=DEVICE)
    gather_logp_triton.gradient_into(near_out, ones, logits, targets, None, *near[:3], 1.0, 0.0)
    gather_logp_triton.gradient_into(far_out, ones, strided, targets, None, *near[:3], 1.0, 0.0)
    assert torch.equal(near_out, far_out)


def test_columns_far_apart():
    logits = far_apart(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)).T
    targets = torch.arange(40, device=DEVICE) % 3
    near = gather_logp_triton.statistics(logits.contiguous(), targets, None, 1.0, 0.0, False)
    far = gather_logp_triton.statistics(logits, targets, None, 1.0, 0.0, False)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_margins_far_apart():
    margin = far_apart(torch.tensor([[-1.0], [0.5], [2.0]], device=DEVICE))[:, 0]
    near = weighted_dpo_triton.loss_and_slope(margin.contiguous(), torch.full((3,), 0.7, device=DEVICE))
    far = weighted_dpo_triton.loss_and_slope(margin, torch.full((3,), 0.7, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_sequences_beyond_two_billion_rows():
    """A pair of 3 + 3 rows that starts at 2^31 + 5."""
    start = 2**31 + 5
    row_logp, row_grad = (torch.empty(start + 6, dtype=torch.float16, device=DEVICE) for _ in range(2))
    row_logp[start:] = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.25, -4.0])
    cu_seqlens = torch.tensor([start, start + 3, start + 6], device=DEVICE)
    loss, logp = torch.empty(1, device=DEVICE), torch.empty(2, device=DEVICE)
    weighted_dpo_triton.pairs_kernel[(1,)](
        row_logp=row_logp,
        cu_seqlens=cu_seqlens,
        reference_logp=torch.zeros(2, device=DEVICE),
        agreement=torch.ones(1, device=DEVICE),
        loss=loss,
        logp=logp,
        row_grad=row_grad,
        first_pair=0,
        reference_stride=1,
        agreement_stride=1,
        beta=1.0,
        BLOCK=16,
    )
    assert logp.tolist() == [-6.0, -4.75]
    slope = -1 / (1 + math.exp(-1.25))
    expected = torch.tensor([slope] * 3 + [-slope] * 3).half().to(DEVICE)
    torch.testing.assert_close(row_grad[start:], expected, rtol=2e-3, atol=0)


def test_partials_beyond_two_billion():
    """Three tiles' partials of 2^30 rows: the third starts at 2^31."""
    N = 2**30
    maxima, sums = (torch.empty(2 * N + 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    for tile in range(3):
        maxima[tile * N : tile * N + 16] = float(tile)
        sums[tile * N : tile * N + 16] = 1.0
    # Only the first 16 rows are given out to a program.
    outputs = [torch.empty(16, device=DEVICE) for _ in range(3)]
    linear_logp_triton.combine_kernel[(1,)](
        maxima=maxima,
        sums=sums,
        moments=maxima,
        target_logit=torch.zeros(16, device=DEVICE),
        order=torch.arange(16, device=DEVICE),
        counted=torch.tensor(16, device=DEVICE),
        logp=outputs[0],
        maximum=outputs[1],
        others=outputs[2],
        entropy=outputs[0],
        N=N,
        T=3,
        ENTROPY=False,
        BLOCK_N=16,
        BLOCK_T=2,
    )
    expected = -math.log(1 + sum(math.exp(tile) for tile in range(3)))
    torch.testing.assert_close(outputs[0], torch.full((16,), expected, device=DEVICE))


@on_a_gpu
def test_more_logits_than_two_billion():
    """16,800 rows of 128,256."""
    logits = torch.randn(16800, 128256, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.randint(128256, (16800,), device=DEVICE)
    logp = gather_logp(logits, targets)
    for row in (0, 16743, 16744, 16799):
        exact = torch.log_softmax(logits[row].double(), 0)[targets[row]]
        torch.testing.assert_close(logp[row].double(), exact, rtol=1e-6, atol=1e-6)


# Real tiles and shapes, on a card


@on_a_gpu
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("V", [32000, 49152, 128256, 152064])
@pytest.mark.parametrize("D", [576, 2048, 4096])
@pytest.mark.parametrize("N", [1, 2, 127, 129, 1000])
def test_real_shapes(monkeypatch, N, V, D, frozen):
    monkeypatch.undo()  # the tiles and chunks that ship
    hidden, weight, targets = problem(N, V, D, HALF)
    targets[1::7] = IGNORE
    compare(hidden, weight, targets, frozen=frozen)
    ours, plain = (f(hidden, weight, targets) for f in (linear_logp, reference.linear_logp))
    assert_no_worse([ours], [plain], [reference.linear_logp(hidden.double(), weight.double(), targets)])
