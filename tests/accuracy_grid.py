"""linear_logp's error beside plain torch's over the shapes of real models, by hand: python tests/accuracy_grid.py

On the CPU, or on the GPU where there is one. Both are held to float64 of the same inputs: log-probs, dhidden and
dweight under a random upstream of each row, trained and frozen head. Relative L2 error at most 1.25 times and largest
error at most 2 times plain torch's in the same dtype, but for float32 rounding. The suite does the same on smaller
shapes (test_linear_logp.py); this takes half an hour on two cores and 12 GB at the largest shape.

N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from torch import Tensor

from cream_kernels import IGNORE, linear_logp, reference

FLOOR = torch.finfo(torch.float32).eps
TILE = 8192  # rows of weight that float64 takes at once


def problem(N: int, V: int, D: int, device: str) -> tuple[Tensor, ...]:
    """hidden, weight, targets of which some are IGNORE and some are near certain, and the upstream.

    The numbers are those that bfloat16 has, so that every dtype solves the same problem and float64 solves it once.
    """
    dtype = torch.bfloat16
    g = torch.Generator().manual_seed(N + V + D)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * 3 * D**-0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=g)
    for row in range(0, N, 5):  # a logit of about 40 among some of 10: p > 0.999
        hidden[row] = (weight[targets[row]].double() * 40 / weight[targets[row]].double().square().sum()).to(dtype)
    targets[3::7] = IGNORE
    upstream = torch.randn(N, generator=g, dtype=torch.float64)
    return tuple(tensor.to(device) for tensor in (hidden, weight, targets, upstream))


class Exact:
    """float64 of the same inputs; the head is widened a tile of the vocabulary at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor):
        self.hidden, self.weight, self.targets = hidden.double(), weight, targets
        counts = targets != IGNORE
        own = weight[targets.clamp(min=0)].double()
        target_logit = (self.hidden * own).sum(1)
        z = torch.cat([self.hidden @ weight[tile].double().T for tile in self.tiles()], 1)
        z[torch.arange(len(targets), device=z.device), targets.clamp(min=0)] = -torch.inf
        lse = z.logsumexp(1)  # of the other tokens
        self.logp = torch.nn.functional.logsigmoid(target_logit - lse).masked_fill(~counts, 0)
        share = -torch.expm1(self.logp)  # 1 - p of the target, which the others divide up
        self.upstream = upstream.masked_fill(~counts, 0)
        self.p = z.sub_(lse[:, None]).exp_().mul_(share[:, None])  # (N, V), 0 at the target
        self.dhidden = share[:, None] * own
        for tile in self.tiles():
            self.dhidden -= self.p[:, tile] @ weight[tile].double()
        self.dhidden *= self.upstream[:, None]
        self.at_target = share * self.upstream

    def tiles(self) -> list[slice]:
        V = self.weight.shape[0]
        return [slice(first, min(first + TILE, V)) for first in range(0, V, TILE)]

    def dweight(self, tile: slice) -> Tensor:
        d = -self.p[:, tile] * self.upstream[:, None]
        here = ((self.targets >= tile.start) & (self.targets < tile.stop)).nonzero()[:, 0]
        d[here, self.targets[here] - tile.start] = self.at_target[here]
        return d.T @ self.hidden


def run(function, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, frozen: bool) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    logp = function(hidden, weight, targets)
    wanted = (hidden,) if frozen else (hidden, weight)
    return [logp.detach(), *torch.autograd.grad(logp, wanted, upstream.to(logp.dtype))]


class Error:
    """Sums over pieces: squared and largest error, squared and largest value."""

    def __init__(self) -> None:
        self.square = self.most = self.norm = self.largest = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        if found.numel():
            error = found.double() - exact
            self.square += error.square().sum().item()
            self.norm += exact.square().sum().item()
            self.most = max(self.most, error.abs().max().item())
            self.largest = max(self.largest, exact.abs().max().item())

    def no_worse_than(self, plain: Error) -> bool:
        l2 = self.square**0.5 <= 1.25 * plain.square**0.5 + FLOOR * self.norm**0.5
        return l2 and self.most <= 2 * plain.most + FLOOR * self.largest

    def relative(self) -> float:
        return (self.square / self.norm) ** 0.5 if self.norm else 0.0


def compare(exact: Exact, dtype: torch.dtype, given: tuple[Tensor, ...]) -> tuple[bool, str]:
    """Whether ours is no worse in anything, and a line of relative L2 errors, ours / plain."""
    given = (given[0].to(dtype), given[1].to(dtype), *given[2:])
    with torch.no_grad():
        scored = linear_logp(*given[:3])
    _, frozen = run(linear_logp, *given, frozen=True)
    ours = run(linear_logp, *given, frozen=False)
    plain = run(reference.linear_logp, *given, frozen=False)  # the same logp and dhidden with a frozen head
    found = {
        "scored": (scored, plain[0], exact.logp),
        "logp": (ours[0], plain[0], exact.logp),
        "dhidden": (ours[1], plain[1], exact.dhidden),
        "frozen dhidden": (frozen, plain[1], exact.dhidden),
    }
    errors = {name: (Error(), Error()) for name in (*found, "dweight")}
    for name, (*sides, truth) in found.items():
        for error, side in zip(errors[name], sides, strict=True):
            error.add(side, truth)
    for tile in exact.tiles():
        truth = exact.dweight(tile)
        for error, side in zip(errors["dweight"], (ours[2], plain[2]), strict=True):
            error.add(side[tile], truth)
    worse = [name for name, (of_ours, of_plain) in errors.items() if not of_ours.no_worse_than(of_plain)]
    line = "  ".join(f"{name} {o.relative():.1e}/{p.relative():.1e}" for name, (o, p) in errors.items())
    return not worse, line + (f"  WORSE: {', '.join(worse)}" if worse else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-N", type=int, nargs="+", default=[0, 1, 2, 127, 129, 1000])
    parser.add_argument("-V", type=int, nargs="+", default=[32000, 49152, 128256, 152064])
    parser.add_argument("-D", type=int, nargs="+", default=[576, 2048, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bad = 0
    for V, D, N in itertools.product(args.V, args.D, args.N):
        given = problem(N, V, D, device)
        exact = Exact(*given)
        for dtype in args.dtype:
            good, line = compare(exact, getattr(torch, dtype), given)
            bad += not good
            print(f"V {V} D {D} N {N} {dtype}: {line}", flush=True)
    print(f"{bad} shapes worse than plain torch" if bad else "no shape worse than plain torch")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
