"""weighted_dpo against the identities of the method."""

import math
import sys

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cream_kernels import reference, weighted_dpo


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def margins(dtype=torch.float32):
    return torch.cat((torch.linspace(-40, 40, 161), torch.tensor([-1e4, -100.0, 100.0, 1e4]))).to(dtype)


def slope(margin, agreement):
    margin = margin.detach().requires_grad_()
    return torch.autograd.grad(weighted_dpo(margin, agreement).sum(), margin)[0]


def test_agreement_1_is_dpo_to_the_last_bit():
    assert torch.equal(weighted_dpo(margins(), 1.0), -functional.logsigmoid(margins()))
    assert torch.equal(weighted_dpo(margins(), torch.ones(165)), -functional.logsigmoid(margins()))


def test_agreement_0_is_dpo_with_the_pair_swapped():
    assert torch.equal(weighted_dpo(margins(), 0.0), weighted_dpo(-margins(), 1.0))


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.5, 0.731, 1.0])
def test_is_dpo_with_label_smoothing(agreement):
    """Mitchell's conservative DPO: -(1 - e) log sigmoid(m) - e log sigmoid(-m) at e = 1 - agreement, and its slope."""
    m, e = margins(torch.float64), 1 - agreement
    expected = -(1 - e) * functional.logsigmoid(m) - e * functional.logsigmoid(-m)
    torch.testing.assert_close(weighted_dpo(m, agreement), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(slope(m, agreement), m.sigmoid() - agreement, rtol=0, atol=1e-15)


@pytest.mark.parametrize("agreement", [0.1, 0.46, 0.73, 0.92])
def test_least_at_logit_of_agreement(agreement):
    best = torch.tensor([math.log(agreement / (1 - agreement))], dtype=torch.float64)
    assert slope(best, agreement).abs() < 1e-15
    around = best + torch.tensor([-1e-3, 0, 1e-3], dtype=torch.float64)
    assert weighted_dpo(around, agreement).argmin() == 1


def test_agreement_one_half_at_margin_zero_moves_nothing():
    assert slope(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_slope_keeps_its_digits_where_the_pair_is_settled():
    """sigmoid(m) - agreement would be 0 or off by 1e-8 in float32."""
    for sign, agreement in ((1, 1.0), (-1, 0.0)):
        m = sign * torch.linspace(5, 60, 12)
        exact = -sign * (-m.abs().double()).sigmoid()
        assert ((slope(m, agreement) - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.3, 2.0])
def test_regularised_loss_is_the_soft_loss_scaled(strength):
    """DPO + l (-log sigmoid(m) - log sigmoid(-m)) = (1 + 2 l) weighted_dpo(m, (1 + l) / (1 + 2 l)), l the strength."""
    m = margins(torch.float64)
    ranked, reverse = -functional.logsigmoid(m), -functional.logsigmoid(-m)
    regularised = ranked + strength * (ranked + reverse)
    soft = (1 + 2 * strength) * weighted_dpo(m, (1 + strength) / (1 + 2 * strength))
    torch.testing.assert_close(regularised, soft, rtol=1e-14, atol=1e-14)


def test_regulariser_is_twice_the_divergence_from_uniform():
    """-log sigmoid(m) - log sigmoid(-m) = 2 KL(u || P) + 2 log 2, u uniform on the two orders."""
    m = torch.linspace(-8, 8, 33, dtype=torch.float64)
    p = torch.stack((m.sigmoid(), (-m).sigmoid()))
    divergence = (0.5 * (0.5 / p).log()).sum(0)
    torch.testing.assert_close(2 * weighted_dpo(m, 0.5), 2 * divergence + 2 * math.log(2), rtol=1e-13, atol=0)


def test_mean_agreement_is_one_less_disagreements():
    """E tau = 1 - 2 P(two rewards order a pair differently), so (tau + 1) / 2 is the chance of agreeing."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(400, 5, generator=generator)
    x, y = (true + torch.randn(400, 5, generator=generator) for _ in range(2))
    tau = torch.tensor(reference.kendall_tau(x, y, variant="a"), dtype=torch.float64)
    i, j = torch.triu_indices(5, 5, 1)
    agree = ((x[:, i] > x[:, j]) == (y[:, i] > y[:, j])).double().mean()
    assert abs((tau.mean() + 1) / 2 - agree) < 1e-12


def test_every_pair_its_own_upstream_in_margin_and_agreement():
    """dloss/dagreement = -log sigmoid(m) + log sigmoid(-m) = -m."""
    m, upstream = margins(torch.float64), torch.linspace(-2, 3, 165, dtype=torch.float64)
    c = torch.linspace(0, 1, 165, dtype=torch.float64)
    leaves = m.clone().requires_grad_(), c.clone().requires_grad_()
    dmargin, dagreement = torch.autograd.grad(weighted_dpo(*leaves), leaves, upstream)
    torch.testing.assert_close(dmargin, upstream * (m.sigmoid() - c), rtol=0, atol=1e-14)
    torch.testing.assert_close(dagreement, -upstream * m)


def test_half_precision_margins_are_widened():
    m = margins().bfloat16()
    assert weighted_dpo(m, 0.3).dtype == torch.float32
    assert torch.equal(weighted_dpo(m, 0.3), weighted_dpo(m.float(), 0.3))


def test_opcheck():
    module = sys.modules["cream_kernels.weighted_dpo"]  # the package's attribute of that name is the function
    margin, agreement = (torch.linspace(-2, 2, 5).requires_grad_(), torch.full((5,), 0.3).requires_grad_())
    torch.library.opcheck(module._weighted_dpo, (margin, agreement))


def test_differentiable_in_agreement():
    """dloss/dagreement = log sigmoid(-m) - log sigmoid(m) = -m."""
    m, agreement = margins(torch.float64), torch.full((165,), 0.3, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(weighted_dpo(m, agreement).sum(), agreement)
    torch.testing.assert_close(ours, -m, rtol=1e-14, atol=1e-14)
    scalar = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (of_all,) = torch.autograd.grad(weighted_dpo(m, scalar).sum(), scalar)
    torch.testing.assert_close(of_all, -m.sum(), rtol=1e-13, atol=1e-10)


def test_second_derivative_is_refused():
    m = margins().requires_grad_()
    with pytest.raises(RuntimeError, match="weighted_dpo has no second derivative"):
        torch.autograd.grad(weighted_dpo(m, 0.7).sum(), m, create_graph=True)


def test_a_number_is_written_on_the_device_and_not_copied_to_it():
    with torch.device("meta"):
        m, c = torch.zeros(5), torch.zeros(5)
    for agreement, wanted in ((0.3, 1), (c, 0)):
        with Operators() as seen:
            weighted_dpo(m, agreement)
        assert seen.names.count("full") == wanted and not {"_to_copy", "copy_"} & set(seen.names)


def test_agreement_must_fit_margin():
    with pytest.raises(ValueError, match="agreement must be"):
        weighted_dpo(torch.zeros(3), torch.zeros(2))


def test_weighted_dpo_compiles():
    compiled = torch.compile(lambda m, c: weighted_dpo(m, c).mean(), fullgraph=True, backend="aot_eager")
    m = margins().requires_grad_()
    compiled(m, torch.full((165,), 0.7)).backward()
    torch.testing.assert_close(m.grad, slope(m, 0.7) / 165)
