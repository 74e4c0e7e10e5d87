"""The fused heads' error beside plain torch's over the shapes of real models, by hand: python tests/accuracy_grid.py

On the CPU, or on the GPU where there is one. All are held to float64 of the same inputs: linear_logp's log-probs,
dhidden and dweight under a random upstream of each row, trained and frozen head; linear_weighted_dpo's loss, log-probs,
dhidden and dweight. Relative L2 error at most 1.25 times and largest error at most 2 times plain torch's in the same
dtype, but for float32 rounding. The suite does the same on smaller shapes (test_linear_logp.py,
test_linear_weighted_dpo.py); this takes an hour on two cores and 12 GB at the largest shape.

N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from torch import Tensor

from cream_kernels import IGNORE, linear_logp, linear_weighted_dpo, reference

BETA = 0.1
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

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor):
        self.hidden, self.weight, self.targets = hidden.double(), weight, targets
        counts = targets != IGNORE
        own = weight[targets.clamp(min=0)].double()
        target_logit = (self.hidden * own).sum(1)
        z = torch.cat([self.hidden @ weight[tile].double().T for tile in self.tiles()], 1)
        z[torch.arange(len(targets), device=z.device), targets.clamp(min=0)] = -torch.inf
        lse = z.logsumexp(1)  # of the other tokens
        self.logp = torch.nn.functional.logsigmoid(target_logit - lse).masked_fill(~counts, 0)
        self.share = -torch.expm1(self.logp)  # 1 - p of the target, which the others divide up
        self.p = z.sub_(lse[:, None]).exp_().mul_(self.share[:, None])  # (N, V), 0 at the target
        self.direction = self.share[:, None] * own  # dlogp/dhidden
        for tile in self.tiles():
            self.direction -= self.p[:, tile] @ weight[tile].double()
        self.counts = counts

    def tiles(self) -> list[slice]:
        V = self.weight.shape[0]
        return [slice(first, min(first + TILE, V)) for first in range(0, V, TILE)]

    def dhidden(self, upstream: Tensor) -> Tensor:
        return self.direction * upstream.masked_fill(~self.counts, 0)[:, None]

    def dweight(self, upstream: Tensor, tile: slice) -> Tensor:
        upstream = upstream.masked_fill(~self.counts, 0)
        d = -self.p[:, tile] * upstream[:, None]
        here = ((self.targets >= tile.start) & (self.targets < tile.stop)).nonzero()[:, 0]
        d[here, self.targets[here] - tile.start] = (self.share * upstream)[here]
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


class Pairs:
    """Four pairs of sequences that divide the rows up unevenly, and what float64 makes of their loss."""

    def __init__(self, exact: Exact):
        N, device = len(exact.logp), exact.logp.device
        self.cu_seqlens = torch.tensor([0, 1, 2, 5, 6, 8, 11, 13, 16]) * N // 16
        lengths = self.cu_seqlens.diff()
        self.logp = torch.stack([rows.sum() for rows in exact.logp.split(lengths.tolist())])
        noise = torch.randn(8, generator=torch.Generator().manual_seed(N), dtype=torch.float64).to(device)
        self.reference_logp = (self.logp + noise).float()  # near the policy's, so that no pair is settled
        self.agreement = torch.tensor([1.0, 0.5, 0.0, 0.8], device=device)
        ratio = self.logp - self.reference_logp.double()
        margin = (BETA * (ratio[::2] - ratio[1::2])).requires_grad_()
        self.loss = reference.weighted_dpo(margin, self.agreement.double())
        (slope,) = torch.autograd.grad(self.loss.sum(), margin)
        by_sequence = BETA * torch.stack((slope, -slope), 1).flatten()
        self.upstream = by_sequence.repeat_interleave(lengths.to(device))

    def run(self, function, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        constants = self.cu_seqlens, self.reference_logp, self.agreement
        loss, logp = function(hidden, weight, targets, *constants, beta=BETA)
        return [loss.detach(), logp.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))]


def compare(exact: Exact, pairs: Pairs, dtype: torch.dtype, given: tuple[Tensor, ...]) -> tuple[bool, str]:
    """Whether ours are no worse in anything, and a line of relative L2 errors, ours / plain."""
    given = (given[0].to(dtype), given[1].to(dtype), *given[2:])
    good, line = compare_logp(exact, given)
    good_too, more = compare_dpo(exact, pairs, given[:3])
    return good and good_too, f"{line}  {more}"


def compare_dpo(exact: Exact, pairs: Pairs, given: tuple[Tensor, ...]) -> tuple[bool, str]:
    ours, plain = pairs.run(linear_weighted_dpo, *given), pairs.run(reference.linear_weighted_dpo, *given)
    truths = pairs.loss, pairs.logp, exact.dhidden(pairs.upstream)
    found = dict(zip(("loss", "sums", "dpo dhidden"), zip(ours, plain, truths, strict=False), strict=True))
    return judge(exact, pairs.upstream, found, "dpo dweight", (ours[3], plain[3]))


def compare_logp(exact: Exact, given: tuple[Tensor, ...]) -> tuple[bool, str]:
    with torch.no_grad():
        scored = linear_logp(*given[:3])
    _, frozen = run(linear_logp, *given, frozen=True)
    ours = run(linear_logp, *given, frozen=False)
    plain = run(reference.linear_logp, *given, frozen=False)  # the same logp and dhidden with a frozen head
    dhidden = exact.dhidden(given[3])
    found = {
        "scored": (scored, plain[0], exact.logp),
        "logp": (ours[0], plain[0], exact.logp),
        "dhidden": (ours[1], plain[1], dhidden),
        "frozen dhidden": (frozen, plain[1], dhidden),
    }
    return judge(exact, given[3], found, "dweight", (ours[2], plain[2]))


def judge(
    exact: Exact,
    upstream: Tensor,
    found: dict[str, tuple[Tensor, Tensor, Tensor]],  # ours, plain, exact
    dweight: str,
    dweights: tuple[Tensor, Tensor],  # ours, plain
) -> tuple[bool, str]:
    errors = {name: (Error(), Error()) for name in (*found, dweight)}
    for name, (*sides, truth) in found.items():
        for error, side in zip(errors[name], sides, strict=True):
            error.add(side, truth)
    for tile in exact.tiles():
        truth = exact.dweight(upstream, tile)
        for error, side in zip(errors[dweight], dweights, strict=True):
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
        exact = Exact(*given[:3])
        pairs = Pairs(exact)
        for dtype in args.dtype:
            good, line = compare(exact, pairs, getattr(torch, dtype), given)
            bad += not good
            print(f"V {V} D {D} N {N} {dtype}: {line}", flush=True)
    print(f"{bad} shapes worse than plain torch" if bad else "no shape worse than plain torch")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
