"""Time log-probs from logits that exist: python -m bench.gather_logp

Modes: `forward` scores, `both` adds the gradient of the logits. The limit is the bytes: the logits are read once, in
`both` a second time, and their gradient is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import harness, options, peers
from bench.shapes import HEAD_SIZES, HEADS
from cream_kernels import reference

TABLES = {"forward": peers.GATHER_LOGP, "both": peers.GATHER_LOGP}
CHUNK = 256  # rows of float64 at a time


def problem(model: str, N: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """logits (N, V) of a spread of 2.5 with targets (N,) from surprising to certain, in numbers that bfloat16 has."""
    V = HEADS[model].vocabulary
    g = torch.Generator(device).manual_seed(0)
    logits = 2.5 * torch.randn(N, V, generator=g, device=device)
    targets = torch.randint(V, (N,), generator=g, device=device)
    logits[torch.arange(N, device=device), targets] += 28 * torch.rand(N, generator=g, device=device)
    return logits.bfloat16().to(getattr(torch, dtype)), targets


def outputs(
    gather_logp: Callable[[Tensor, Tensor], Tensor], mode: str, logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    if mode == "forward":
        with torch.no_grad():
            return {"logp": gather_logp(logits, targets)}
    logits = logits.detach().requires_grad_()
    logp = gather_logp(logits, targets)
    logp.backward(torch.linspace(-1, 1, len(targets), device=logits.device, dtype=logp.dtype))
    return {"logp": logp.detach(), "dlogits": logits.grad}


def exact(mode: str, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The same in float64, some rows at a time."""
    upstream = torch.linspace(-1, 1, len(targets), device=logits.device, dtype=torch.float64)
    parts: dict[str, list[Tensor]] = {"logp": [], "dlogits": []}
    for rows in torch.arange(len(targets), device=logits.device).split(CHUNK):
        block = logits[rows].double().requires_grad_(mode == "both")
        logp = reference.gather_logp(block, targets[rows])
        parts["logp"].append(logp.detach())
        if mode == "both":
            logp.backward(upstream[rows])
            parts["dlogits"].append(block.grad)
    return {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}


def case(
    model: str, N: int, dtype: str, mode: str, device: str, names: Sequence[str] | None, weigh: bool = False
) -> harness.Case:
    logits, targets = problem(model, N, dtype, device)
    there, absent, versions = peers.split(TABLES[mode], device, names)
    truth: dict[str, Tensor] = {}

    def make_truth(name: str) -> dict[str, Tensor]:
        if not truth:
            truth.update(exact(mode, logits, targets))
        return truth

    key = {"model": model, "shape": [N, HEADS[model].vocabulary], "dtype": dtype, "mode": mode}
    run = {name: lambda function=function: outputs(function, mode, logits, targets) for name, function in there.items()}
    found = harness.Case(key, run, absent, make_truth, versions=versions)
    if not weigh:
        passes = 1 if mode == "forward" else 3
        found.limits_ms["bytes"] = passes * logits.nbytes / harness.copy_bytes_per_ms(device)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = options.parse(__doc__, argv)
    args.memory &= args.size != "small"
    specs = [
        {"model": model, "N": N, "dtype": dtype, "mode": mode}
        for model, N in options.heads(args, HEAD_SIZES)
        for dtype in args.dtypes
        for mode in options.chosen(args.modes, [*TABLES], "mode")
    ]
    harness.run("gather_logp", case, specs, args, peers.there(TABLES, TABLES, args))


if __name__ == "__main__":
    main()
