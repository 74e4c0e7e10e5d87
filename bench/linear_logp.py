"""Time log-probs from hidden states and LM head: python -m bench.linear_logp

Modes: `forward` scores; `frozen` adds the gradient of the hidden states, `trained` the head's too, both under an
upstream gradient of its own for each token; `unit` is trained under an upstream of 1, for peers that give only the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import harness, options, peers
from bench.shapes import HEAD_SIZES, HEADS
from cream_kernels import reference
from cream_kernels.products import multiplies_halves

TABLES = {
    "forward": peers.LINEAR_LOGP,
    "frozen": peers.LINEAR_LOGP,
    "trained": peers.LINEAR_LOGP,
    "unit": peers.LINEAR_SUM,
}
MODES = {"tiny": [*TABLES], "small": ["frozen"], "cpu": ["forward", "frozen"]}
MODES["full"] = ["trained", "forward", "unit", "frozen"]  # the time may end before the last
CHUNK = 256  # rows of float64 logits at a time


def problem(model: str, N: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), targets (N,): logits of a spread of 2.5, targets from surprising to certain.

    The numbers are those that bfloat16 has, so that every dtype solves the same problem.
    """
    D, V = HEADS[model]
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(V, D, generator=g, device=device) / D**0.5  # rows of norm 1
    targets = torch.randint(V, (N,), generator=g, device=device)
    certainty = 28 * torch.rand(N, 1, generator=g, device=device)  # nats above the mean logit; the rest sum to about 14
    hidden = 2.5 * torch.randn(N, D, generator=g, device=device) + certainty * weight[targets]
    return *(x.bfloat16().to(getattr(torch, dtype)) for x in (hidden, weight)), targets


def outputs(
    linear_logp: Callable[[Tensor, Tensor, Tensor], Tensor], mode: str, hidden: Tensor, weight: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """logp and the gradients that the mode asks for."""
    if mode == "forward":
        with torch.no_grad():
            return {"logp": linear_logp(hidden, weight, targets)}
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(mode != "frozen")
    logp = linear_logp(hidden, weight, targets)
    logp.backward(torch.ones_like(logp) if mode == "unit" else upstream(targets).to(logp.dtype))
    found = {"sum" if mode == "unit" else "logp": logp.detach(), "dhidden": hidden.grad}
    return found if mode == "frozen" else found | {"dweight": weight.grad}


def upstream(targets: Tensor) -> Tensor:  # (N,) in [-1, 1], never the same for two tokens of a sequence
    return torch.linspace(-1, 1, len(targets), device=targets.device)


def exact(mode: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The same in float64, some rows at a time."""
    trained = mode in ("trained", "unit")
    hidden, weight = hidden.double().requires_grad_(mode != "forward"), weight.double().requires_grad_(trained)
    grad = torch.ones(len(targets), device=hidden.device) if mode == "unit" else upstream(targets)
    parts = []
    for rows in torch.arange(len(targets), device=hidden.device).split(CHUNK):
        logp = reference.linear_logp(hidden[rows], weight, targets[rows])
        if mode != "forward":
            logp.backward(grad[rows].double())
        parts.append(logp.detach())
    logp = torch.cat(parts)
    found = {"sum": logp.sum()} if mode == "unit" else {"logp": logp}
    found |= {"dhidden": hidden.grad, "dweight": weight.grad}
    return {name: value for name, value in found.items() if value is not None}


def bare_products(mode: str, hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """The matrix products of the mode and nothing else, each from operands as they lie best, into memory that is there;
    in float32 where a CPU multiplies no half precision."""
    if not multiplies_halves(hidden.device):
        hidden, weight = hidden.float(), weight.float()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    across = torch.randn_like(logits).view(logits.shape[::-1]) if mode in ("trained", "unit") else None

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if mode != "forward":
            torch.mm(logits, weight, out=dhidden)
        if across is not None:
            torch.mm(across, hidden, out=dweight)

    return products


def bytes_ms(mode: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """What it takes to read the inputs and write the results, once."""
    inputs, results = hidden.nbytes + weight.nbytes + targets.nbytes, 4 * len(targets)
    results += hidden.nbytes if mode != "forward" else 0
    results += weight.nbytes if mode not in ("forward", "frozen") else 0
    return (inputs + results) / harness.copy_bytes_per_ms(hidden.device.type)


def case(
    model: str, N: int, dtype: str, mode: str, device: str, names: Sequence[str] | None, weigh: bool = False
) -> harness.Case:
    tensors = problem(model, N, dtype, device)
    there, absent, versions = peers.split(TABLES[mode], device, names)
    truth: dict[str, Tensor] = {}

    def make_truth(name: str) -> dict[str, Tensor]:
        if not truth:
            truth.update(exact(mode, *tensors))
        return truth

    key = {"model": model, "shape": [N, *HEADS[model]], "dtype": dtype, "mode": mode}
    run = {name: lambda function=function: outputs(function, mode, *tensors) for name, function in there.items()}
    found = harness.Case(key, run, absent, make_truth, versions=versions)
    if mode not in ("forward", "frozen"):
        found.weight_gradient_bytes = tensors[1].nbytes
        found.rounding["sum"] = torch.finfo(tensors[0].dtype).eps  # torch gives the sum in the inputs' dtype
    if not weigh:
        found.bare["products"] = bare_products(mode, *tensors[:2])
        found.limits_ms["bytes"] = bytes_ms(mode, *tensors)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = options.parse(__doc__, argv)
    args.memory &= args.size != "small"
    specs = [
        {"model": model, "N": N, "dtype": dtype, "mode": mode}
        for model, N in options.heads(args, HEAD_SIZES)
        for dtype in args.dtypes
        for mode in options.chosen(args.modes, [*TABLES], "mode", default=MODES[args.size])
    ]
    harness.run("linear_logp", case, specs, args, peers.there(TABLES, (spec["mode"] for spec in specs), args))


if __name__ == "__main__":
    main()
