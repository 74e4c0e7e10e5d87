"""linear_weighted_dpo against float64, pair by pair."""

import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cream_kernels import IGNORE, linear_logp, linear_weighted_dpo, products, reference, weighted_dpo
from tests.test_weighted_dpo import Operators

module = sys.modules["cream_kernels.linear_weighted_dpo"]  # the package's attribute of that name is the function
SEVERAL = 40  # chunk_tokens that make several chunks of the problem's pairs, all of which are one chunk otherwise


LENGTHS = [3, 4, 1, 9, 0, 6, 30, 25, 2, 2]  # of 10 sequences, one of them empty: 5 pairs
AGREEMENT = torch.tensor([1.0, 0.0, 0.5, 0.731, 0.2], dtype=torch.float64)
UPSTREAM = {
    "mean": torch.full((5,), 0.2),
    "per pair": torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0]),
    "one pair": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]),
}
BETA = 0.7


def problem(dtype=torch.float32, V=2300, D=24, lengths=LENGTHS, seed=0):
    """The arguments up to agreement. reference_logp is near the policy's, so that no pair is settled."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    N = int(cu_seqlens[-1])
    hidden = (torch.randn(N, D, generator=generator) * 0.7).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[:2] = targets[-1] = targets[20] = IGNORE
    agreement = AGREEMENT[: len(lengths) // 2]
    about = torch.zeros(len(lengths))
    _, logp = reference.linear_weighted_dpo(
        hidden.double(), weight.double(), targets, cu_seqlens, about, agreement, beta=1
    )
    return hidden, weight, targets, cu_seqlens, logp + torch.randn(len(lengths), generator=generator), agreement


def run(function, hidden, weight, *rest, upstream, frozen=False, retains=False, **settings):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(not frozen)
    loss, logp = function(hidden, weight, *rest, beta=BETA, **settings)
    wanted = (hidden,) if frozen else (hidden, weight)
    return [
        loss.detach(),
        logp.detach(),
        *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype), retain_graph=retains),
    ]


def assert_no_worse(ours, plain, truth):
    """L2 error at most 1.25 times, largest error at most 2 times plain torch's, but for float32 rounding."""
    for name, a, b, exact in zip(("loss", "logp", "dhidden", "dweight"), ours, plain, truth, strict=False):
        assert a.shape == exact.shape and (name == "loss" or a.dtype == b.dtype), name
        a, b = (a.double() - exact).abs(), (b.double() - exact).abs()
        # the loss rests on differences of sums of log-probs, and the gradients on the loss
        floor = torch.finfo(torch.float32).eps * truth[1].abs().max().clamp(min=1)
        assert a.norm() <= 1.25 * b.norm() + floor * exact.norm(), name
        assert a.max() <= 2 * b.max() + floor * exact.abs().max(), name


class Large(TorchDispatchMode):
    """The storages of so many bytes and more that any operation returned, but for those known before."""

    def __init__(self, least, *known):
        super().__init__()
        self.least, self.known, self.storages = least, [t.untyped_storage().data_ptr() for t in known], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.least and storage.data_ptr() not in self.known:
                self.storages[storage.data_ptr()] = storage  # kept, so that no address comes twice
        return result

    def bytes(self):
        return [storage.nbytes() for storage in self.storages.values()]


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """Both ways of treating IGNORE rows: left out where looking is free, masked where it is not."""
    monkeypatch.setattr(module, "reading_is_free", lambda tensor: request.param == "cpu")


@pytest.mark.parametrize("chunk_tokens", [1, 40, 1024])
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_no_worse_than_torch(dtype, upstream, chunk_tokens, way):
    given, upstream = problem(dtype), UPSTREAM[upstream]
    ours = run(linear_weighted_dpo, *given, upstream=upstream, chunk_tokens=chunk_tokens)
    plain = run(reference.linear_weighted_dpo, *given, upstream=upstream)
    truth = run(reference.linear_weighted_dpo, given[0].double(), given[1].double(), *given[2:], upstream=upstream)
    if dtype == torch.float64:
        for a, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, exact, rtol=1e-11, atol=1e-12)
    assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("chunk_tokens", [40, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_memory_is_not_read(dtype, chunk_tokens, way, nan_in_fresh_memory):
    given = problem(dtype, V=5001)
    ours = run(linear_weighted_dpo, *given, upstream=UPSTREAM["per pair"], chunk_tokens=chunk_tokens)
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("retains", [False, True])
def test_logits_in_the_memory_of_dweight(dtype, retains, library):
    """One chunk of at most D rows, of three blocks; in bfloat16 of five tiles."""
    V, D = 9000, 96
    given, upstream = problem(dtype, V=V, D=D), UPSTREAM["per pair"]
    given[2][8:14] = 17  # one token several times, in a pair that counts
    hidden, weight, *rest = given
    with Large(weight.nbytes * 78 // D, weight) as seen:  # 78 of the rows count
        loss, _ = linear_weighted_dpo(hidden.requires_grad_(), weight.requires_grad_(), *rest, beta=BETA)
        loss.backward(upstream.to(loss.dtype), retain_graph=retains)
    assert seen.bytes() == [weight.nbytes] * (2 if retains else 1)
    ours = run(linear_weighted_dpo, *given, upstream=upstream, retains=retains)
    assert ours[3].equal(weight.grad)
    plain = run(reference.linear_weighted_dpo, *given, upstream=upstream)
    truth = run(reference.linear_weighted_dpo, given[0].double(), given[1].double(), *given[2:], upstream=upstream)
    assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [40, 1000])
def test_what_targets_add_comes_a_few_rows_at_a_time(dtype, chunk_tokens, library, monkeypatch):
    given, upstream = problem(dtype), UPSTREAM["mean"]
    given[2][30:36] = 17  # one token several times, which is rounded once
    together = run(linear_weighted_dpo, *given, upstream=upstream, chunk_tokens=chunk_tokens)
    monkeypatch.setattr(products, "FEW_ROWS", 3)
    for ours, whole in zip(run(linear_weighted_dpo, *given, upstream=upstream, chunk_tokens=chunk_tokens), together,
                           strict=True):  # fmt: skip
        assert ours.equal(whole)


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_frozen_head(upstream):
    given, upstream = problem(), UPSTREAM[upstream]
    ours = run(linear_weighted_dpo, *given, upstream=upstream, frozen=True)
    plain = run(reference.linear_weighted_dpo, *given, upstream=upstream, frozen=True)
    truth = run(
        reference.linear_weighted_dpo,
        given[0].double(),
        given[1].double(),
        *given[2:],
        upstream=upstream,
        frozen=True,
    )
    assert_no_worse(ours, plain, truth)


def test_is_the_pair_of_functions():
    hidden, weight, targets, cu_seqlens, reference_logp, agreement = problem(torch.float64)
    loss, logp = linear_weighted_dpo(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta=BETA)
    rows = linear_logp(hidden, weight, targets)
    sums = torch.stack([part.sum() for part in rows.split(LENGTHS)])
    ratio = sums - reference_logp
    torch.testing.assert_close(logp, sums)
    torch.testing.assert_close(loss, weighted_dpo(BETA * (ratio[::2] - ratio[1::2]), agreement))


def test_policy_equal_to_reference_starts_at_log_2():
    hidden, weight, targets, cu_seqlens, _, agreement = problem()
    with torch.no_grad():
        _, logp = linear_weighted_dpo(hidden, weight, targets, cu_seqlens, torch.zeros(10), agreement, beta=BETA)
    loss, _ = linear_weighted_dpo(hidden, weight.requires_grad_(), targets, cu_seqlens, logp, agreement, beta=BETA)
    assert (loss - math.log(2)).abs().max() < 1e-5 and loss.dtype == torch.float32


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, lambda loss: (loss * UPSTREAM["per pair"]).sum()])
@pytest.mark.parametrize("chunk_tokens", [SEVERAL, None])
def test_reductions_and_a_retained_graph(reduce, chunk_tokens):
    hidden, weight, *rest = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    total = reduce(linear_weighted_dpo(hidden, weight, *rest, beta=BETA, chunk_tokens=chunk_tokens)[0])
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(total, (hidden, weight))
    truth = torch.autograd.grad(
        reduce(reference.linear_weighted_dpo(hidden, weight, *rest, beta=BETA)[0].float()), (hidden, weight)
    )
    for a, b, exact in zip(first, again, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("retains", [False, True])
def test_gradients_become_the_results_where_the_graph_ends(retains):
    hidden, weight, *rest = problem(lengths=[3, 4, 1, 9, 0, 6, 3, 5, 4, 9])
    with Large(weight.nbytes, weight) as seen:
        loss, _ = linear_weighted_dpo(
            hidden.requires_grad_(), weight.requires_grad_(), *rest, beta=BETA, chunk_tokens=20
        )
        loss.mean().backward(retain_graph=retains)
    assert seen.bytes() == [weight.nbytes] * (2 if retains else 1)  # dweight as saved, and times 1 / 5


@pytest.mark.parametrize("chunk_tokens", [SEVERAL, None])
def test_only_an_uneven_upstream_of_several_chunks_is_paid_for(chunk_tokens, monkeypatch):
    calls, backward = [], module._linear_logp_backward
    monkeypatch.setattr(module, "_linear_logp_backward", lambda *given: calls.append(1) or backward(*given))
    uneven = 1 if chunk_tokens else 0
    for upstream, expected in ((UPSTREAM["mean"], 0), (torch.ones(()).expand(5), 0), (UPSTREAM["per pair"], uneven)):
        calls.clear()
        run(linear_weighted_dpo, *problem(), upstream=upstream, chunk_tokens=chunk_tokens)
        assert len(calls) == expected


@pytest.mark.parametrize("chunk_tokens", [SEVERAL, None])
@pytest.mark.parametrize("retains", [False, True])
def test_upstream_is_not_rounded_to_the_dtype_of_the_head(retains, chunk_tokens):
    """0.3 in bfloat16 is off by 2.6e-3, the same way in every entry; roundings of entries average out."""
    given, settings = problem(torch.bfloat16), dict(chunk_tokens=chunk_tokens)
    *_, one = run(linear_weighted_dpo, *given, upstream=torch.ones(5), **settings)
    *_, scaled = run(linear_weighted_dpo, *given, upstream=torch.full((5,), 0.3), retains=retains, **settings)
    factor = (one.double() * scaled.double()).sum() / one.double().square().sum()
    assert abs(factor / 0.3 - 1) < 1e-3


def test_dweight_is_summed_in_float32():
    """Three chunks that push by 2048, 1 and -2048: bfloat16 has no 2049."""
    hidden, weight = torch.ones(3, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1, 1, 2, 2, 3, 3])  # every rejected sequence is empty
    reference_logp = torch.tensor([-math.log(2), 0.0] * 3)
    agreement = 0.5 - torch.tensor([4096.0, 2.0, -4096.0]) / BETA
    given = hidden, weight, torch.zeros(3, dtype=torch.int64), cu_seqlens, reference_logp, agreement
    *_, dweight = run(linear_weighted_dpo, *given, upstream=torch.ones(3), chunk_tokens=1)
    torch.testing.assert_close(dweight.float(), torch.tensor([[1.0], [-1.0]]), rtol=0, atol=0.01)


def test_all_ignored_and_nothing_at_all(way):
    hidden, weight, targets, cu_seqlens, reference_logp, agreement = problem()
    targets[:] = IGNORE
    hidden[:] = torch.nan
    loss, logp, dhidden, dweight = run(
        linear_weighted_dpo, hidden, weight, targets, cu_seqlens, reference_logp * 0, agreement, upstream=torch.ones(5)
    )
    assert (logp == 0).all() and (dhidden == 0).all() and (dweight == 0).all()
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    empty = hidden[:0], weight, targets[:0], cu_seqlens[:1], reference_logp[:0], agreement[:0]
    for frozen in (False, True):
        loss, logp, dhidden, *dweight = run(linear_weighted_dpo, *empty, upstream=torch.ones(0), frozen=frozen)
        assert loss.shape == logp.shape == (0,) and dhidden.shape == (0, 24)
        assert frozen or (dweight[0] == 0).all()


def test_nan_pair_touches_no_other(way):
    given = problem()
    clean = run(linear_weighted_dpo, *given, upstream=UPSTREAM["mean"], chunk_tokens=40)
    given[0][8] = torch.nan  # in pair 1, rows 7 to 16
    given[2][9] = IGNORE
    loss, _, dhidden, _ = run(linear_weighted_dpo, *given, upstream=UPSTREAM["mean"], chunk_tokens=40)
    assert torch.isnan(loss).tolist() == [False, True, False, False, False]
    assert dhidden[8].isnan().all() and (dhidden[9] == 0).all()
    others = [row for row in range(len(dhidden)) if row not in range(7, 17)]
    torch.testing.assert_close(dhidden[others], clean[2][others])


def test_memory_is_a_chunk_of_whole_pairs():
    bounds = [0, 3, 7, 8, 17, 17, 23, 53, 78, 80, 82]

    def chunks(tokens):
        found = module.pair_chunks(bounds, tokens)
        assert all(rows == slice(bounds[2 * first], bounds[2 * end]) for first, end, rows in found)
        return [(first, end) for first, end, _ in found]

    assert chunks(1) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert chunks(17) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert chunks(82) == [(0, 5)]


@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 1024), (torch.float64, 1024), (torch.bfloat16, 1024 + 2 * 576)], ids=str
)
def test_one_chunk_where_it_takes_no_more_memory(dtype, most):
    for rows in (0, 1, 1024, 1025, most, most + 1):
        found = module._chunk_on_a_cpu(torch.empty(rows, 576, dtype=dtype, device="meta"))
        assert (found >= rows) == (rows <= most) and found >= 1024
    assert module.pair_chunks([0], 5) == []


@pytest.mark.parametrize("lengths", [[12, 12], [6, 6, 3, 9]], ids=["one chunk", "two"])
def test_opcheck(lengths):
    hidden, weight, targets, cu_seqlens, reference_logp, agreement = problem(V=40, D=6, lengths=lengths)
    given = hidden.requires_grad_(), weight.requires_grad_(), targets, cu_seqlens, reference_logp.float()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The last one compares all outputs after backward: what one chunk held has become dweight by then, untraced.
    checks = checks[: 3 if len(lengths) == 2 else 4]
    torch.library.opcheck(module._linear_weighted_dpo, (*given, agreement.float(), BETA, 16, True), test_utils=checks)


def test_compiles_without_a_graph_break():
    given = problem(V=60, D=8)
    compiled = torch.compile(linear_weighted_dpo, fullgraph=True, backend="aot_eager")
    for chunk_tokens in (SEVERAL, 1024):
        for upstream in UPSTREAM.values():
            ours = run(compiled, *given, upstream=upstream, chunk_tokens=chunk_tokens)
            plain = run(linear_weighted_dpo, *given, upstream=upstream, chunk_tokens=chunk_tokens)
            for a, b in zip(ours, plain, strict=True):
                assert torch.equal(a, b)


def test_autocast_computes_as_a_linear_layer_would():
    hidden, weight, *rest = problem(V=60, D=8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(linear_weighted_dpo, hidden, weight, *rest, upstream=UPSTREAM["mean"])
    assert ours[0].dtype == ours[2].dtype == ours[3].dtype == torch.float32
    rounded = run(linear_weighted_dpo, hidden.bfloat16(), weight.bfloat16(), *rest, upstream=UPSTREAM["mean"])
    for a, b in zip(ours, rounded, strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_under_activation_checkpointing(frozen):
    def checkpointed(hidden, weight, *rest, beta):
        def loss(h, w):
            return linear_weighted_dpo(h * 2, w, *rest, beta=beta)

        return torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)

    def direct(hidden, weight, *rest, beta):
        return linear_weighted_dpo(hidden * 2, weight, *rest, beta=beta)

    given = problem(V=60, D=8)
    ours, plain = (run(f, *given, upstream=UPSTREAM["per pair"], frozen=frozen) for f in (checkpointed, direct))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


def test_float16_is_left_to_what_takes_a_scaled_upstream():
    """Gradients for an upstream of 1 are rounded before a loss scaler's factor: 6e-8 would be the least of float16."""
    _, _, targets, cu_seqlens, near, agreement = problem()
    for dtype, ways in ((torch.bfloat16, (1, 0)), (torch.float16, (0, 1))):
        hidden = torch.zeros(len(targets), 4, dtype=dtype, device="meta", requires_grad=True)
        weight = torch.zeros(9, 4, dtype=dtype, device="meta", requires_grad=True)
        on_meta = (x.to("meta") for x in (targets, cu_seqlens, near, agreement))
        with Operators() as seen:
            loss, _ = linear_weighted_dpo(hidden, weight, *on_meta, beta=BETA)
        assert loss.requires_grad
        assert tuple(seen.names.count(name) for name in ("linear_weighted_dpo", "linear_logp")) == ways


def test_logp_is_for_metrics():
    hidden, weight, *rest = problem()
    for frozen in (False, True):
        loss, logp = linear_weighted_dpo(
            hidden.requires_grad_(), weight.detach().requires_grad_(not frozen), *rest, beta=BETA
        )
        assert loss.requires_grad and not logp.requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cu_seqlens=torch.tensor([0, 3, 6, 6])), r"cu_seqlens must be \(2P \+ 1,\)"),
        (dict(cu_seqlens=torch.tensor([0.0, 3.0, 6.0])), r"cu_seqlens must be \(2P \+ 1,\)"),
        (dict(cu_seqlens=torch.tensor([0, 3, 5])), "rise from 0 to the 6 rows"),
        (dict(cu_seqlens=torch.tensor([1, 3, 6])), "rise from 0 to the 6 rows"),
        (dict(cu_seqlens=torch.tensor([0, 7, 6])), "rise from 0 to the 6 rows"),
        (dict(reference_logp=torch.zeros(1)), "reference_logp must be"),
        (dict(reference_logp=torch.zeros(2, requires_grad=True)), "detach them"),
        (dict(agreement=torch.zeros(2)), "agreement must be"),
        (dict(targets=torch.tensor([0, 0, 0, 5, 0, 0])), r"targets\[3\] is 5"),
        (dict(chunk_tokens=0), "chunk_tokens"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_says_what_does_not_fit(change, message, frozen):
    good = dict(
        hidden=torch.zeros(6, 4, requires_grad=True),
        weight=torch.zeros(5, 4, requires_grad=not frozen),
        targets=torch.zeros(6, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 6]),
        reference_logp=torch.zeros(2),
        agreement=torch.ones(1),
    )
    with pytest.raises(ValueError, match=message):
        linear_weighted_dpo(**(good | change), beta=BETA)
