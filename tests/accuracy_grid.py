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


def problem(N: int, V: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """hidden, weight, targets of which some are IGNORE and some are near certain, and the upstream."""
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
    """float64 of the same inputs, a tile of the vocabulary at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor):
        self.hidden, self.weight, self.targets = hidden.double(), weight, targets
        self.counts = targets != IGNORE
        own = self.weight[targets.clamp(min=0)].double()
        target_logit = (self.hidden * own).sum(1)
        lse = torch.full_like(target_logit, -torch.inf)  # of the other tokens
        for tile in self.tiles():
            lse = torch.logaddexp(lse, self.logits(tile, -torch.inf).logsumexp(1))
        self.logp = torch.nn.functional.logsigmoid(target_logit - lse).masked_fill(~self.counts, 0)
        self.share = -torch.expm1(self.logp)  # 1 - p of the target, which the others divide up
        self.lse, self.upstream = lse, upstream.masked_fill(~self.counts, 0)
        self.dhidden = self.share[:, None] * own
        for tile in self.tiles():
            self.dhidden -= self.p(tile) @ self.weight[tile].double()
        self.dhidden *= self.upstream[:, None]

    def tiles(self) -> list[slice]:
        V = self.weight.shape[0]
        return [slice(first, min(first + TILE, V)) for first in range(0, V, TILE)]

    def logits(self, tile: slice, at_target: float) -> Tensor:
        z = self.hidden @ self.weight[tile].double().T
        here = ((self.targets >= tile.start) & (self.targets < tile.stop)).nonzero()[:, 0]
        z[here, self.targets[here] - tile.start] = at_target
        return z

    def p(self, tile: slice) -> Tensor:
        """(N, tile) probabilities, 0 at the target."""
        return (self.logits(tile, -torch.inf) - self.lse[:, None]).exp() * self.share[:, None]

    def dweight(self, tile: slice) -> Tensor:
        d = -self.p(tile) * self.upstream[:, None]
        here = ((self.targets >= tile.start) & (self.targets < tile.stop)).nonzero()[:, 0]
        d[here, self.targets[here] - tile.start] = (self.share * self.upstream)[here]
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


def compare(N: int, V: int, D: int, dtype: torch.dtype, device: str) -> tuple[bool, str]:
    """Whether ours is no worse in anything, and a line of relative L2 errors, ours / plain."""
    given = problem(N, V, D, dtype, device)
    exact = Exact(*given)
    with torch.no_grad():
        scored = linear_logp(*given[:3]), reference.linear_logp(*given[:3])
    names = ("scored", "logp", "dhidden", "dweight", "frozen dhidden")
    errors = {name: (Error(), Error()) for name in names}
    dweights = []
    for side, function in enumerate((linear_logp, reference.linear_logp)):
        errors["scored"][side].add(scored[side], exact.logp)
        logp, dhidden, dweight = run(function, *given, frozen=False)
        errors["logp"][side].add(logp, exact.logp)
        errors["dhidden"][side].add(dhidden, exact.dhidden)
        dweights.append(dweight)
        errors["frozen dhidden"][side].add(run(function, *given, frozen=True)[1], exact.dhidden)
    for tile in exact.tiles():
        of_tile = exact.dweight(tile)
        for side, dweight in enumerate(dweights):
            errors["dweight"][side].add(dweight[tile], of_tile)
    worse = [name for name, (ours, plain) in errors.items() if not ours.no_worse_than(plain)]
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
    for V, D, N, dtype in itertools.product(args.V, args.D, args.N, args.dtype):
        good, line = compare(N, V, D, getattr(torch, dtype), device)
        bad += not good
        print(f"V {V} D {D} N {N} {dtype}: {line}", flush=True)
    print(f"{bad} shapes worse than plain torch" if bad else "no shape worse than plain torch")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
