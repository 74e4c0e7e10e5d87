"""Time Kendall's tau of many rankings, on the CPU: python -m bench.kendall

P prompts, R responses. Slow peers are timed on some of the rows and scaled up, and their rows say so. The limit is the
comparisons: 4 for each pair of columns (greater and less, in x and in y), or those of two sorts, 2 R log2 R, where
these are fewer, at the rate at which this CPU's vector units compare and count, measured in the same run, on all
threads.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bench import harness, options, peers
from bench.shapes import RANKING_SIZES

MOST_ELEMENTS = 40_000  # of the slow peers' part of a problem
SLOW_ROWS = 200  # and at most as many rows of it


def compares_per_ms() -> float:
    """Comparisons of float64 numbers in the first-level cache that one thread makes and counts in a millisecond."""
    from numba import njit

    @njit
    def count(values, thresholds):
        total = 0
        for t in range(thresholds.shape[0]):
            threshold = thresholds[t]
            for i in range(values.shape[0]):  # by index, or it is not vectorised
                total += values[i] > threshold
        return total

    rng = np.random.default_rng(0)
    values, thresholds = rng.random(2048), rng.random(20000)
    times = harness.interleave({"count": lambda: count(values, thresholds)}, 5, "cpu")["count"]
    return values.size * thresholds.size / statistics.median(times)


def rewards(P: int, R: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, R) float64 each: two rankings that agree in part, with a tie here and there."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((P, R))
    y = 0.6 * x + 0.8 * rng.standard_normal((P, R))
    x[::10, 0] = x[::10, 1]
    return x, y


def case(P: int, R: int, device: str, names: Sequence[str] | None, weigh: bool = False) -> harness.Case:
    x, y = rewards(P, R)
    there, absent, versions = peers.split(peers.KENDALL, device, names)
    part = max(1, min(P, SLOW_ROWS, MOST_ELEMENTS // R))
    if "torchmetrics" in there and R > 8192:
        absent["torchmetrics"] = f"compares all pairs, {R**2 / 1e9:.0f}e9 of them a row: minutes"
        del there["torchmetrics"]

    def tensors(function: Callable, rows: int) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's, of rows that are all tied
            return {"tau": torch.from_numpy(np.asarray(function(x[:rows], y[:rows])))}

    counts = {name: P if name == "cream" else part for name in there}
    run = {name: lambda name=name: tensors(there[name], counts[name]) for name in there}
    pairs = P * R * (R - 1) / 2
    compares = min(4 * pairs, 2 * P * R * math.log2(R))
    truth: list[Tensor] = []

    def make_truth(name: str) -> dict[str, Tensor]:
        if not truth:
            truth.append(exact(x, y))
        return {"tau": truth[0][: counts[name]]}

    found = harness.Case({"shape": [P, R], "dtype": "float64"}, run, absent, make_truth, yardstick=None)
    found.versions = versions
    found.scale = {name: P / rows for name, rows in counts.items() if rows < P}
    if not weigh:
        found.limits_ms["compares"] = compares / (compares_per_ms() * torch.get_num_threads())
    return found


def exact(x: np.ndarray, y: np.ndarray) -> Tensor:  # (P,) float64
    """tau-b by insertion: in the order of x, each y is compared with those before it, which are kept sorted."""
    taus = []
    for a, b in zip(x, y, strict=True):
        score, seen = 0, []
        order = np.lexsort((b, a))
        bounds = [0, *(np.diff(a[order]).nonzero()[0] + 1).tolist(), len(a)]
        ranked = b[order].tolist()
        for start, end in itertools.pairwise(bounds):  # values tied in x are no pair
            group = ranked[start:end]
            score += sum(bisect.bisect_left(seen, v) - len(seen) + bisect.bisect_right(seen, v) for v in group)
            for value in group:
                bisect.insort(seen, value)
        untied = [_untied_pairs(a), _untied_pairs(b)]
        taus.append(score / math.sqrt(untied[0] * untied[1]))
    return torch.tensor(taus, dtype=torch.float64)


def _untied_pairs(values: np.ndarray) -> int:
    counts = np.unique(values, return_counts=True)[1].tolist()
    return math.comb(len(values), 2) - sum(math.comb(count, 2) for count in counts)


def main(argv: Sequence[str] | None = None) -> None:
    args = options.parse(__doc__, argv)
    args.device, args.memory = "cpu", False
    specs = [{"P": P, "R": R} for P, R in RANKING_SIZES[args.size]]
    harness.run("kendall", case, specs, args, peers.there({"tau": peers.KENDALL}, ["tau"], args))


if __name__ == "__main__":
    main()
