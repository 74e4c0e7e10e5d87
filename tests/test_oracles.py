"""Our operators against what other projects have published for the same, each from its own package where installed.

SciPy's kendalltau stands beside kendall_tau in test_kendall.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cream_kernels import IGNORE, linear_logp, linear_weighted_dpo, weighted_dpo

BETA = 0.3


def problem(N=70, V=1100, D=24, seed=0):
    """hidden, weight, bias, targets, and for each row a factor of either sign, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight, bias = torch.randn(V, D, generator=generator) * D**-0.5, torch.randn(V, generator=generator)
    upstream = torch.randn(N, generator=generator)
    upstream[2::7] = 0
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator), upstream


def value_and_gradients(function, *inputs, upstream):
    """What function gives for fresh leaves of the same values, and d(upstream . it) in each."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def agree(ours, theirs, limit=2e-6):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= limit * b.norm(), float((a - b).norm() / b.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trls_chunked_log_probs(temperature):
    trl = pytest.importorskip("trl.kernels.chunked_logprob", reason="trl is not installed")
    hidden, weight, bias, targets, upstream = problem()

    def theirs(h, w, b):
        return trl.ChunkedLogProbFunction.apply(h, w, b, targets, temperature, 512, None, 1.0, ("log_probs",))[0]

    def ours(h, w, b):
        return linear_logp(h, w, targets, bias=b, temperature=temperature)

    inputs = (hidden, weight, bias)
    agree(*(value_and_gradients(function, *inputs, upstream=upstream) for function in (ours, theirs)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ligers_scaled_cross_entropy(temperature):
    """Its fallback for processors without its kernels, with ignored rows."""
    pytest.importorskip("triton", reason="liger-kernel needs triton")
    liger = pytest.importorskip(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", reason="liger-kernel is not installed"
    )
    hidden, weight, _, targets, upstream = problem()
    targets[3::5] = IGNORE

    def theirs(h, w):
        return -liger.LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, targets, temperature, IGNORE)

    def ours(h, w):
        return linear_logp(h, w, targets, temperature=temperature)

    agree(*(value_and_gradients(function, hidden, weight, upstream=upstream) for function in (ours, theirs)))


def pairs():
    """Three pairs of padded sequences (chosen first, then rejected): hidden, the reference's, and targets."""
    generator = torch.Generator().manual_seed(3)
    hidden, reference_hidden = torch.randn(2, 6, 12, 16, generator=generator)
    weight, reference_weight = torch.randn(2, 90, 16, generator=generator) / 2
    targets = torch.randint(90, (6, 12), generator=generator)
    for row, (prompt, end) in enumerate([(3, 12), (1, 7), (5, 9), (3, 8), (1, 12), (5, 6)]):
        targets[row, :prompt] = targets[row, end:] = IGNORE
    return hidden, weight, reference_hidden, reference_weight, targets


def test_ligers_dpo_at_agreement_1():
    """Liger takes the mean over pairs and sums over a sequence's tokens; its reference is another head."""
    pytest.importorskip("triton", reason="liger-kernel needs triton")
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    hidden, weight, reference_hidden, reference_weight, targets = pairs()
    loss = liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False)
    order = torch.tensor([0, 3, 1, 4, 2, 5])  # chosen, rejected, chosen, ...

    def theirs(h, w):
        return loss(w, h, targets, None, reference_hidden, reference_weight)[0]

    def ours(h, w):
        rows = targets[order].flatten()
        flat = reference_hidden[order].flatten(0, 1)
        reference = linear_logp(flat, reference_weight, rows).view(6, 12).sum(1)
        bounds = torch.arange(0, 73, 12)
        losses, _ = linear_weighted_dpo(h[order].flatten(0, 1), w, rows, bounds, reference, 1.0, beta=BETA)
        return losses.mean()

    upstream = torch.tensor(1.0)
    agree(*(value_and_gradients(function, hidden, weight, upstream=upstream) for function in (ours, theirs)))


def conservative_dpo(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing):
    """Equation 3 of https://ericmitchell.ai/cdpo.pdf in the arguments of those who train with it.

    preference_loss of eric-mitchell/direct-preference-optimization returns these losses; the DPOLoss of OpenRLHF
    (both Apache-2.0) has label_smoothing as an attribute and returns their mean. Written from the equation.
    """
    h = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return (1 - label_smoothing) * -functional.logsigmoid(h) + label_smoothing * -functional.logsigmoid(-h)


def test_label_smoothing_by_sample_is_agreement():
    """CREAM's loss comes out of theirs by label_smoothing = 1 - agreement, a tensor: no code changes."""
    generator = torch.Generator().manual_seed(5)
    logps = [40 * torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(4)]
    agreement = torch.rand(64, generator=generator, dtype=torch.float64)
    agreement[:3] = torch.tensor([0.0, 0.5, 1.0])
    upstream = torch.ones(64, dtype=torch.float64)

    def theirs(chosen, rejected):
        return conservative_dpo(chosen, rejected, *logps[2:], BETA, 1 - agreement)

    def ours(chosen, rejected):
        return weighted_dpo(BETA * ((chosen - logps[2]) - (rejected - logps[3])), agreement)

    agree(*(value_and_gradients(function, *logps[:2], upstream=upstream) for function in (ours, theirs)), limit=1e-14)
    assert torch.equal(theirs(*logps[:2])[2:3], conservative_dpo(*(x[2:3] for x in logps), BETA, 0.0))


def test_from_hidden_states_too():
    """linear_weighted_dpo beside that formula over log_softmax of full logits."""
    hidden, weight, _, _, targets = pairs()
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    agreement, reference = torch.tensor([0.9, 0.2, 0.55]), torch.linspace(-40, -20, 6)

    def theirs(h, w):
        logp = (h @ w.T).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        chosen, rejected = (logp * (targets != IGNORE)).sum(1).chunk(2)
        return conservative_dpo(chosen, rejected, *reference.chunk(2), BETA, 1 - agreement).mean()

    def ours(h, w):
        rows, bounds = targets[order].flatten(), torch.arange(0, 73, 12)
        flat = h[order].flatten(0, 1)
        return linear_weighted_dpo(flat, w, rows, bounds, reference[order], agreement, beta=BETA)[0].mean()

    upstream = torch.tensor(1.0)
    agree(*(value_and_gradients(function, hidden, weight, upstream=upstream) for function in (ours, theirs)))
