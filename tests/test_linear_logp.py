"""linear_logp against float64 and against what plain torch makes of the same inputs in the same dtype."""

import sys

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cream_kernels import IGNORE, linear_logp, products, reference
from cream_kernels import linear_logp_torch as torch_body

module = sys.modules["cream_kernels.linear_logp"]  # the package's attribute of that name is the function

PLAIN = torch_body.Squash(1.0, 0.0)

# One row, one class, one tile, several tiles each way, of the 6 rows in 7 that count; never a multiple of a tile (2,048
# rows x 1,008 columns, in bfloat16 2,016).
SHAPES = [(1, 1, 3), (2, 64, 32), (37, 257, 48), (129, 2500, 24), (2500, 2100, 16)]


def problem(N, V, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * 3 * D**-0.5).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def upstream(N, seed=1):
    """Every row its own factor, of both signs, some zero."""
    grad = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad[3::5] = 0
    return grad


def run(function, hidden, weight, targets, grad, *, frozen=False, bias=None, **settings):
    """Value and gradients in hidden and, unless frozen, in weight and bias."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(not frozen)
    bias = None if bias is None else bias.detach().clone().requires_grad_(not frozen)
    logp = function(hidden, weight, targets, bias=bias, **settings)
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    return [logp.detach(), *torch.autograd.grad(logp, wanted, grad.to(logp.dtype))]


def assert_no_worse(ours, plain, truth):
    """L2 error at most 1.25 times, largest error at most 2 times plain torch's, but for float32 rounding."""
    for name, a, b, exact in zip(("logp", "dhidden", "dweight", "dbias"), ours, plain, truth, strict=False):
        assert a.dtype == b.dtype and a.shape == exact.shape, name
        a, b = (a.double() - exact).abs(), (b.double() - exact).abs()
        floor = torch.finfo(torch.float32).eps
        assert a.norm() <= 1.25 * b.norm() + floor * exact.norm(), name
        assert a.max() <= 2 * b.max() + floor * exact.abs().max(), name


def compare(N, V, D, dtype, frozen):
    """Over several draws where rows are few: in float32 one row's error is a matter of luck."""
    results = []
    for seed in range(max(1, 40 // N)):
        hidden, weight, targets = problem(N, V, D, dtype, seed)
        targets[1::7] = IGNORE
        grad = upstream(N)
        ours = run(linear_logp, hidden, weight, targets, grad, frozen=frozen)
        plain = run(reference.linear_logp, hidden, weight, targets, grad, frozen=frozen)
        truth = run(reference.linear_logp, hidden.double(), weight.double(), targets, grad, frozen=frozen)
        results.append((ours, plain, truth))
    assert_no_worse(*([torch.cat(draws) for draws in zip(*side, strict=True)] for side in zip(*results, strict=True)))


@pytest.mark.parametrize("N, V, D", SHAPES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_worse_than_torch(N, V, D, frozen, dtype):
    compare(N, V, D, dtype, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_bias_and_temperature(frozen, temperature):
    hidden, weight, targets = problem(67, 1500, 24)
    bias, grad = torch.randn(1500, generator=torch.Generator().manual_seed(5)), upstream(67)
    settings = dict(frozen=frozen, temperature=temperature)
    ours = run(linear_logp, hidden, weight, targets, grad, bias=bias, **settings)
    plain = run(reference.linear_logp, hidden, weight, targets, grad, bias=bias, **settings)
    wide = hidden.double(), weight.double(), targets
    assert_no_worse(ours, plain, run(reference.linear_logp, *wide, grad, bias=bias.double(), **settings))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softcap_scale_and_entropy(frozen, dtype):
    """Gemma's cap, Cohere's and Granite's scale; targets of every size of logit, so that the cap bends the gradient."""
    hidden, weight, targets = problem(67, 1500, 24, dtype)
    targets[3::9] = IGNORE
    bias, grad = torch.randn(1500, generator=torch.Generator().manual_seed(5)).to(dtype), upstream(67)
    settings = dict(frozen=frozen, temperature=0.8, scale=3.0, softcap=9.0)

    def both(function):
        entropies = []

        def run_it(*given, **kwargs):
            logp, entropy = function(*given, return_entropy=True, **kwargs)
            entropies.append(entropy)
            return logp

        return run_it, entropies

    functions = both(linear_logp), both(reference.linear_logp), both(reference.linear_logp)
    wide = hidden.double(), weight.double(), targets
    ours = run(functions[0][0], hidden, weight, targets, grad, bias=bias, **settings)
    plain = run(functions[1][0], hidden, weight, targets, grad, bias=bias, **settings)
    truth = run(functions[2][0], *wide, grad, bias=bias.double(), **settings)
    assert_no_worse(ours, plain, truth)
    a, b, exact = (entropies[0] for _, entropies in functions)
    assert not a.requires_grad and (a[3::9] == 0).all()
    assert_no_worse([a], [b], [exact])
    if dtype == torch.float64:
        for mine, right in zip((*ours, a), (*truth, exact), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)


def test_entropy_of_the_certain_and_of_the_forbidden():
    """Entropies from 1e-20 to log V, and rows whose target cannot be or is all that can be."""
    weight = torch.eye(4)
    hidden = torch.tensor([[0.0, 0, 0, 0], [50, 0, 0, 0], [1e4, 0, 0, 0], [3, 3, 0, 0], [0, 50, 0, 0]])
    targets = torch.tensor([2, 0, 0, 1, 0])
    _, entropy = linear_logp(hidden, weight, targets, return_entropy=True)
    _, exact = reference.linear_logp(hidden.double(), weight.double(), targets, return_entropy=True)
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=1e-7)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    logp, entropy = linear_logp(hidden[:1], weight, torch.tensor([3]), bias=bias, return_entropy=True)
    assert logp == -torch.inf
    torch.testing.assert_close(entropy, torch.tensor([3.0]).log())


@pytest.mark.parametrize("V", [32000, 49152, 128256, 152064])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_real_vocabularies(V, dtype):
    hidden, weight, targets = problem(3, V, 32, dtype)
    targets[0], targets[1] = V - 1, 0
    grad = upstream(3)
    ours = run(linear_logp, hidden, weight, targets, grad)
    plain = run(reference.linear_logp, hidden, weight, targets, grad)
    assert_no_worse(ours, plain, run(reference.linear_logp, hidden.double(), weight.double(), targets, grad))


def test_targets_at_the_edges_of_tiles():
    hidden, weight, _ = problem(7, 2100, 8, torch.float64)
    targets = torch.tensor([0, 1007, 1008, 1009, 2015, 2016, 2099])
    for frozen in (False, True):
        ours = run(linear_logp, hidden, weight, targets, upstream(7), frozen=frozen)
        truth = run(reference.linear_logp, hidden, weight, targets, upstream(7), frozen=frozen)
        for a, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_any_shape(dtype, frozen, library, monkeypatch):
    """Maxima move in later tiles, of some rows and of none, and rows are widened a few at a time."""
    monkeypatch.setattr(torch_body, "tile_shape", lambda *_: (7, 13))
    monkeypatch.setattr(products, "FEW_ROWS", 3)
    hidden, weight, targets = problem(23, 150, 16, dtype)
    bias = torch.zeros(150, dtype=dtype)
    bias[140:] = 20.0  # the columns of the last tile are far above the others
    targets[::4] = IGNORE
    settings = dict(grad=upstream(23), frozen=frozen, bias=bias)
    ours, plain = (
        run(function, hidden, weight, targets, **settings) for function in (linear_logp, reference.linear_logp)
    )
    settings["bias"] = bias.double()
    truth = run(reference.linear_logp, hidden.double(), weight.double(), targets, **settings)
    if dtype == torch.float64:
        for a, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, exact, rtol=1e-12, atol=1e-13)
    assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_memory_is_not_read(dtype, frozen, nan_in_fresh_memory):
    """oneDNN's AMX product reads beyond rows whose length is no multiple of 32, where they are not dense."""
    hidden, weight, targets = problem(70, 257, 48, dtype)
    targets[1::7] = IGNORE
    assert all(x.isfinite().all() for x in run(linear_logp, hidden, weight, targets, upstream(70), frozen=frozen))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_float64_is_exact(frozen):
    hidden, weight, targets = problem(37, 1300, 20, torch.float64)
    targets[::4] = IGNORE
    bias = torch.randn(1300, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    settings = dict(frozen=frozen, bias=bias, temperature=1.3)
    ours = run(linear_logp, hidden, weight, targets, upstream(37), **settings)
    truth = run(reference.linear_logp, hidden, weight, targets, upstream(37), **settings)
    for a, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    hidden, weight, targets = problem(4, 7, 3, torch.float64)
    targets[2] = IGNORE
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: linear_logp(h, weight, targets), (hidden,))
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logp(h, w, targets, temperature=0.5), (hidden, weight))


@pytest.mark.parametrize("which", ["first", "last", "all", "tile"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_ignored_rows_count_for_nothing(which, frozen):
    hidden, weight, targets = problem(530, 40, 8)
    rows = {"first": [0], "last": [529], "all": list(range(530)), "tile": list(range(512))}[which]
    targets[rows] = IGNORE
    poisoned = hidden.clone()
    poisoned[rows] = torch.nan
    grad = upstream(530)
    grad[rows] = torch.nan
    logp, *grads = run(linear_logp, poisoned, weight, targets, grad, frozen=frozen)
    assert (logp[rows] == 0).all() and (grads[0][rows] == 0).all()
    left = [row for row in range(530) if row not in rows]
    if left:
        truth = run(reference.linear_logp, hidden[left], weight, targets[left], grad[left], frozen=frozen)
        torch.testing.assert_close(logp[left], truth[0])
        torch.testing.assert_close(grads[0][left], truth[1])
    if not frozen:
        expected = truth[2] if left else torch.zeros_like(weight)
        torch.testing.assert_close(grads[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_rows(frozen):
    hidden, weight, targets = problem(0, 9, 4)
    logp, dhidden, *dweight = run(linear_logp, hidden, weight, targets, upstream(0), frozen=frozen)
    assert logp.shape == (0,) and dhidden.shape == (0, 4)
    assert frozen or (dweight[0].shape == (9, 4) and (dweight[0] == 0).all())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_strides(frozen):
    hidden, weight, targets = problem(80, 1200, 48)
    grad = upstream(40)
    hidden, targets, columns = hidden[::2, 1::3], targets[::2], weight[:, 1::3].T.contiguous()
    assert not hidden.is_contiguous() and not columns.T.is_contiguous() and not targets.is_contiguous()
    hidden = hidden.detach().requires_grad_()
    weight = columns.T.detach().requires_grad_(not frozen)
    logp = linear_logp(hidden, weight, targets)
    wanted = (hidden,) if frozen else (hidden, weight)
    ours = torch.autograd.grad(logp, wanted, grad.float())
    truth = run(reference.linear_logp, hidden, weight, targets, grad, frozen=frozen)
    for a, exact in zip((logp.detach(), *ours), truth, strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_nan_row_touches_no_other(frozen):
    hidden, weight, targets = problem(20, 1200, 16)
    clean = run(linear_logp, hidden, weight, targets, upstream(20), frozen=frozen)
    hidden[7, 3] = torch.nan
    broken = run(linear_logp, hidden, weight, targets, upstream(20), frozen=frozen)
    others = [row for row in range(20) if row != 7]
    for a, b in zip(clean[:2], broken[:2], strict=True):
        assert torch.isnan(b[7]).all()
        torch.testing.assert_close(a[others], b[others])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_confident_targets_keep_their_digits(frozen):
    """1 - p_y from 1e-2 to 1e-26: z_y - logsumexp, 1 - p_y and onehot - p would all round to 0 in float32."""
    D = 16
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, D, generator=generator) / 64
    weight[5] = 0
    weight[5, 0] = 1
    hidden = torch.randn(10, D, generator=generator)
    hidden[:, 0] = torch.arange(12, 72, 6)
    targets, grad = torch.full((10,), 5), upstream(10) + 3
    logp, dhidden, *_ = run(linear_logp, hidden, weight, targets, grad, frozen=frozen)
    # Not by log_softmax, which loses them even in float64: logp = log sigmoid(z_y - logsumexp of the others).
    others = torch.cat((weight[:5], weight[6:])).double()
    z = hidden.double() @ others.T
    exact = functional.logsigmoid(hidden.double() @ weight[5].double() - z.logsumexp(1))
    p = (z - z.logsumexp(1, keepdim=True)).exp() * -exact.expm1()[:, None]
    slope = grad[:, None] * (p[:, :, None] * (weight[5] - others)).sum(1)
    assert exact.max() > -1e-20 and exact.min() < -1e-3
    assert ((logp - exact) / exact).abs().max() < 1e-5
    assert ((dhidden - slope).norm(dim=1) / slope.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("target", ["likely", "random"])
def test_logits_of_ten_thousand(frozen, target):
    hidden, weight, targets = problem(40, 1500, 16)
    hidden *= 1e4 / (hidden @ weight.T).abs().max()
    if target == "likely":
        targets = (hidden @ weight.T).topk(2).indices[torch.arange(40), torch.arange(40) % 2]
    ours = run(linear_logp, hidden, weight, targets, upstream(40), frozen=frozen)
    plain = run(reference.linear_logp, hidden, weight, targets, upstream(40), frozen=frozen)
    truth = run(reference.linear_logp, hidden.double(), weight.double(), targets, upstream(40), frozen=frozen)
    assert all(torch.isfinite(tensor).all() for tensor in ours)
    assert_no_worse(ours, plain, truth)


def test_forbidden_tokens():
    """A bias of -inf, over a whole tile of the vocabulary and over the target of row 0."""
    hidden, weight, targets = problem(6, 2300, 8)
    bias = torch.zeros(2300)
    bias[:1008] = bias[2200:] = -torch.inf
    targets[0], targets[1:] = 2250, torch.arange(1100, 1105)
    for frozen in (False, True):
        logp, dhidden, *_ = run(linear_logp, hidden, weight, targets, upstream(6), frozen=frozen, bias=bias)
        truth = run(reference.linear_logp, hidden, weight, targets, upstream(6), frozen=frozen, bias=bias)
        assert logp[0] == -torch.inf
        torch.testing.assert_close(logp, truth[0])
        torch.testing.assert_close(dhidden[1:], truth[1][1:])


def test_dweight_is_summed_in_float32():
    """400 tiles of rows push each entry by 683 or 341: a bfloat16 sum of them stalls at half of the way."""
    N = 400 * 1024
    hidden, weight = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.bfloat16)
    _, _, dweight = run(linear_logp, hidden, weight, torch.zeros(N, dtype=torch.int64), torch.ones(N))
    torch.testing.assert_close(dweight.float()[:, 0], torch.tensor([2.0, -1.0, -1.0]) * N / 3, rtol=1e-2, atol=0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_second_backward_over_a_retained_graph(frozen):
    hidden, weight, targets = problem(9, 50, 6)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    wanted = (hidden,) if frozen else (hidden, weight)
    logp, grad = linear_logp(hidden, weight, targets), upstream(9).float()
    first = torch.autograd.grad(logp, wanted, grad, retain_graph=True)
    twice = torch.autograd.grad(logp, wanted, 2 * grad, retain_graph=True)
    again = torch.autograd.grad(logp, wanted, grad)
    for a, b, c in zip(first, twice, again, strict=True):
        assert torch.equal(a, c) and torch.equal(2 * a, b)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_second_derivative_is_refused(frozen):
    hidden, weight, targets = problem(3, 5, 2)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    with pytest.raises(RuntimeError, match="second derivative|no autograd formula"):
        first = torch.autograd.grad(linear_logp(hidden, weight, targets).sum(), hidden, create_graph=True)
        torch.autograd.grad(first[0].sum(), hidden)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = problem(5, 30, 4)
    assert linear_logp(hidden, weight, targets).requires_grad is False
    weight.requires_grad_()
    linear_logp(hidden, weight, targets).sum().backward()
    truth = run(reference.linear_logp, hidden, weight, targets, torch.ones(5))
    torch.testing.assert_close(weight.grad, truth[2])


class Largest(TorchDispatchMode):
    """Remembers how large the largest tensor was that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


def test_never_holds_the_logits():
    N, V, D = 4200, 2100, 4
    hidden, weight, targets = problem(N, V, D)
    with Largest() as seen:
        logp, maximum, others, _, _ = torch_body.forward(hidden, weight, targets, None, PLAIN, True, True)
        rows = torch.ones(N), hidden, weight, targets, None, logp, maximum, others
        torch_body.gradients(*rows, PLAIN, need_hidden=True, need_weight=True, need_bias=False)
    assert seen.numel <= 2048 * 1008 < N * V / 4


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_opcheck(frozen):
    hidden, weight, targets = problem(5, 30, 4)
    targets[1] = IGNORE
    bias = torch.zeros(30)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    torch.library.opcheck(module._linear_logp, (hidden, weight, targets, bias, 0.5, 2.0, frozen, True))
    torch.library.opcheck(module._linear_logp, (hidden, weight, targets, None, 1.0, 0.0, frozen, False))


def test_opcheck_of_backward():
    hidden, weight, targets = problem(5, 30, 4)
    targets[1] = IGNORE
    logp, maximum, others, *_ = module._linear_logp(hidden, weight, targets, None, 1.0, 0.0, False, False)
    given = torch.ones(5), hidden, weight, targets, None, logp, maximum, others, 1.0, 0.0
    for needs in ((True, True, False), (False, True, False), (True, False, False)):
        torch.library.opcheck(module._linear_logp_backward, (*given, *needs))


def test_what_may_wait_is_kept_out_of_cuda_graphs():
    pairs = sys.modules["cream_kernels.linear_weighted_dpo"]
    operators = module._linear_logp, module._linear_logp_backward, pairs._linear_weighted_dpo
    for operator in (*operators, pairs._linear_weighted_dpo_backward, pairs._sequence_of_row):
        assert torch.Tag.cudagraph_unsafe in operator._opoverload.tags


def test_compiles_without_a_graph_break():
    hidden, weight, targets = problem(11, 60, 8)
    for frozen in (False, True):
        compiled = torch.compile(
            lambda h, w, t: linear_logp(2 * h, w, t, temperature=0.5), fullgraph=True, backend="aot_eager"
        )
        ours = run(lambda h, w, t, bias, f=compiled: f(h, w, t), hidden, weight, targets, upstream(11), frozen=frozen)
        truth = run(
            lambda h, w, t, bias: linear_logp(2 * h, w, t, temperature=0.5),
            hidden,
            weight,
            targets,
            upstream(11),
            frozen=frozen,
        )
        for a, b in zip(ours, truth, strict=True):
            assert torch.equal(a, b)


def test_autocast_computes_as_a_linear_layer_would():
    hidden, weight, targets = problem(13, 90, 16)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logp(hidden, weight, targets)
    logp.sum().backward()
    wide = reference.linear_logp(hidden.bfloat16().double(), weight.detach().bfloat16().double(), targets)
    assert logp.dtype == torch.float32 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(logp.double(), wide, rtol=1e-5, atol=1e-5)


def test_under_activation_checkpointing():
    hidden, weight, targets = problem(13, 90, 16)

    def checkpointed(h, w, t, bias):
        return torch.utils.checkpoint.checkpoint(lambda h, w: linear_logp(h * 2, w, t), h, w, use_reentrant=False)

    ours = run(checkpointed, hidden, weight, targets, upstream(13))
    direct = run(lambda h, w, t, bias: linear_logp(h * 2, w, t), hidden, weight, targets, upstream(13))
    for a, b in zip(ours, direct, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(3, 5)), "hidden must be"),
        (dict(hidden=torch.zeros(3, 1, 4)), "hidden must be"),
        (dict(hidden=torch.zeros(3, 4, dtype=torch.bfloat16)), "share a floating dtype"),
        (dict(hidden=torch.zeros(3, 4).half(), weight=torch.zeros(6, 4).half()), "float16"),
        (dict(weight=torch.zeros(0, 4)), "vocabulary is empty"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "targets must be"),
        (dict(targets=torch.zeros(3, dtype=torch.int32)), "targets must be"),
        (dict(targets=torch.tensor([0, 6, 0])), r"targets\[1\] is 6"),
        (dict(targets=torch.tensor([0, 0, -1])), r"targets\[2\] is -1"),
        (dict(bias=torch.zeros(5)), "bias must be"),
        (dict(bias=torch.zeros(6, device="meta")), "bias must be on cpu, as the rest is, not on meta"),
        (dict(weight=torch.zeros(6, 4, device="meta")), "weight must be on cpu"),
        (dict(targets=torch.zeros(3, dtype=torch.int64, device="meta")), "targets must be on cpu"),
        (dict(temperature=0.0), "temperature must be"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(temperature=float("inf")), "temperature must be"),
        (dict(scale=0.0), "scale must be above 0"),
        (dict(softcap=-1.0), "softcap must be 0 or more"),
    ],
)
def test_says_what_does_not_fit(change, message):
    good = dict(hidden=torch.zeros(3, 4), weight=torch.zeros(6, 4), targets=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        linear_logp(**(good | change))


@pytest.mark.parametrize(
    "found, multiplies", [("avx512_bf16", True), ("amx_bf16", True), ("bf16", True), ("avx2", False)]
)
def test_whether_a_cpu_multiplies_bfloat16(found, multiplies, monkeypatch):
    names = ("avx2", "avx512_bf16", "amx_bf16", "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: name == found for name in names}, raising=False)
    products._cpu_multiplies_bfloat16.cache_clear()
    dtype = products.operand_dtype(torch.empty(1, dtype=torch.bfloat16))
    products._cpu_multiplies_bfloat16.cache_clear()
    assert dtype == (torch.bfloat16 if multiplies else torch.float32)
    assert products.operand_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
