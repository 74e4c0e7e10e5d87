"""Time the whole weighted DPO loss, from hidden states and LM head to both gradients: python -m bench.weighted_dpo

Modes: `weighted` has an agreement and cached reference log-probs of its own for each pair; `plain` has agreement 1 and
a reference of 0, which is what Liger's fused loss can do; `reference` is plain with the reference's log-probs made in
the call from its hidden states and head, and padded batches for Liger, half prompt.

Sequences are of one length, which suits those that pad; prompts are left out except where Liger's padding holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import harness, linear_logp, options, peers
from bench.shapes import HEAD_SIZES, HEADS
from cream_kernels import reference

TABLES = {"weighted": peers.WEIGHTED_DPO, "plain": peers.PLAIN_DPO, "reference": peers.DPO_WITH_REFERENCE}
MODES = {"tiny": [*TABLES], "small": ["weighted"], "cpu": ["weighted", "plain"]}
MODES["full"] = ["weighted", "reference", "plain"]  # the time may end before the last


def pairs_of(N: int) -> int:
    """Pairs of two answers: of 64 tokens in 512, of 128 in 2048, of 512 in 8192."""
    return 8 if N >= 2048 else 4


def extras(mode: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple:
    """What the loss takes beside hidden, weight and targets."""
    num_pairs, device = pairs_of(len(targets)), hidden.device
    g = torch.Generator(device).manual_seed(1)
    if mode == "reference":  # a model that is near the policy
        ref_hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=g, device=device).to(hidden.dtype)
        return ref_hidden, weight.detach().clone(), num_pairs
    if mode == "plain":
        return torch.zeros(2 * num_pairs, device=device), torch.ones(num_pairs, device=device)
    reference_logp = 5 * torch.randn(2 * num_pairs, generator=g, device=device)
    return reference_logp, torch.rand(num_pairs, generator=g, device=device)


def outputs(loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *others) -> dict[str, Tensor]:
    """The sum of the losses (all that Liger gives) and both gradients of their mean."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_of(hidden, weight, *others).sum()
    (loss / pairs_of(len(hidden))).backward()
    return {"loss": loss.detach(), "dhidden": hidden.grad, "dweight": weight.grad}


def exact(mode: str, hidden: Tensor, weight: Tensor, targets: Tensor, *others) -> dict[str, Tensor]:
    """The same in float64, a pair at a time."""
    num_pairs = pairs_of(len(targets))
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    length = len(targets) // (2 * num_pairs)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for p in range(num_pairs):
        rows = slice(2 * p * length, 2 * (p + 1) * length)
        if mode == "reference":
            ref_rows = reference.linear_logp(others[0][rows].double(), others[1].double(), targets[rows])
            reference_logp, agreement = ref_rows.view(2, -1).sum(1), torch.ones((), device=hidden.device)
        else:
            reference_logp, agreement = others[0][2 * p : 2 * p + 2].double(), others[1][p].double()
        cu_seqlens = torch.tensor([0, length, 2 * length])
        value, _ = reference.linear_weighted_dpo(
            hidden[rows], weight, targets[rows], cu_seqlens, reference_logp, agreement, beta=peers.BETA
        )
        (value.sum() / num_pairs).backward()
        loss += value.detach().sum()
    return {"loss": loss, "dhidden": hidden.grad, "dweight": weight.grad}


def case(
    model: str, N: int, dtype: str, mode: str, device: str, names: Sequence[str] | None, weigh: bool = False
) -> harness.Case:
    tensors = linear_logp.problem(model, N, dtype, device)
    tensors = (*tensors, *extras(mode, *tensors))
    there, absent, versions = peers.split(TABLES[mode], device, names)
    truth: dict[str, Tensor] = {}

    def make_truth(name: str) -> dict[str, Tensor]:
        if not truth:
            truth.update(exact(mode, *tensors))
        return truth

    key = {"model": model, "shape": [N, *HEADS[model]], "dtype": dtype, "mode": mode}
    run = {name: lambda function=function: outputs(function, *tensors) for name, function in there.items()}
    found = harness.Case(key, run, absent, make_truth, versions=versions)
    found.weight_gradient_bytes = tensors[1].nbytes
    # One number, from sums of thousands of log-probs: beside what each of those is off by, chance decides its error.
    found.rounding["loss"] = max(1e-5, torch.finfo(tensors[0].dtype).eps)
    if not weigh:
        found.bare["products"] = linear_logp.bare_products("trained", *tensors[:2])
        found.limits_ms["bytes"] = linear_logp.bytes_ms("trained", *tensors[:3])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = options.parse(__doc__, argv)
    specs = [
        {"model": model, "N": N, "dtype": dtype, "mode": mode}
        for model, N in options.heads(args, HEAD_SIZES)
        for dtype in args.dtypes
        for mode in options.chosen(args.modes, [*TABLES], "mode", default=MODES[args.size])
    ]
    harness.run("weighted_dpo", case, specs, args, peers.there(TABLES, (spec["mode"] for spec in specs), args))


if __name__ == "__main__":
    main()
