"""DPO weighted by consistency (CREAM, arXiv 2410.12735), on margins.

P pairs.

    margin = beta * ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected))
    loss   = -agreement * log sigmoid(margin) - (1 - agreement) * log sigmoid(-margin)
    dloss/dmargin = (1 - agreement) * sigmoid(margin) - agreement * sigmoid(-margin)

The derivative is sigmoid(margin) - agreement, written so that nothing cancels at agreement 0 or 1; it is zero at margin
= logit(agreement). This is DPO with a label smoothing of its own, 1 - agreement, for each pair.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .linear_logp import NAMESPACE, triton_serves
from .products import wide_dtype


def weighted_dpo(
    margin: Tensor,  # (P,) beta * (chosen - rejected) log-ratio of policy to reference
    agreement: Tensor | float,  # (P,) or () in [0, 1]
) -> Tensor:  # (P,) float32 (float64 for float64 margins)
    """agreement * L(chosen > rejected) + (1 - agreement) * L(rejected > chosen), L(margin) = -log sigmoid(margin).

    agreement 1 is plain DPO, on a CPU to the last bit, 0 is DPO with the pair swapped, 1/2 pulls the margin to zero. It
    may leave [0, 1]: robust DPO at flip rate e is agreement (1 - e) / (1 - 2e). Differentiable in both, once. Defined
    by reference.weighted_dpo. One pass over margins; loss and slope come from the same exponential.

    Raises ValueError where agreement is neither a number nor of margin's shape.
    """
    dtype = wide_dtype(margin)
    agreement = constant(agreement, dtype, margin.device)
    if agreement.dim() > 0 and agreement.shape != margin.shape:
        raise ValueError(f"agreement must be () or {tuple(margin.shape)} as margin, not {tuple(agreement.shape)}")
    return _weighted_dpo(margin.to(dtype), agreement.expand(margin.shape))[0]


def constant(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number is written on the device, where a copy of it would be waited for."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def loss_and_slope(margin: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
    """loss and dloss/dmargin, of margin's shape."""
    # Two terms rather than softplus(-margin) + (1 - agreement) * margin, which cancels at agreement 0.
    loss = -(agreement * functional.logsigmoid(margin) + (1 - agreement) * functional.logsigmoid(-margin))
    return loss, (1 - agreement) * margin.sigmoid() - agreement * (-margin).sigmoid()


_weighted_dpo = torch.library.custom_op(
    f"{NAMESPACE}::weighted_dpo",
    loss_and_slope,
    mutates_args=(),
    schema="(Tensor margin, Tensor agreement) -> (Tensor loss, Tensor slope)",
)


@_weighted_dpo.register_kernel("cuda")
def _loss_and_slope_on_cuda(margin, agreement):
    if not triton_serves(margin):
        return loss_and_slope(margin, agreement)
    from . import weighted_dpo_triton

    with torch.cuda.device_of(margin):
        return weighted_dpo_triton.loss_and_slope(margin, agreement)


@_weighted_dpo.register_fake
def _(margin, agreement):
    return torch.empty_like(margin), torch.empty_like(margin)


def _setup_context(ctx, inputs, output):
    margin, _ = inputs
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.save_for_backward(margin, slope)


def _backward(ctx, grad, *_):
    if torch.is_grad_enabled():  # the slope is a constant here, so autograd would leave its derivative out
        raise RuntimeError("weighted_dpo has no second derivative: call backward without create_graph")
    margin, slope = ctx.saved_tensors
    dmargin, dagreement = ctx.needs_input_grad
    return grad * slope if dmargin else None, -grad * margin if dagreement else None


_weighted_dpo.register_autograd(_backward, setup_context=_setup_context)
