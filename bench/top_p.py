"""Time the nucleus sampler of the decode loop against transformers' warpers: python -m bench.top_p

Correctness first: nothing is timed before the paths agree with the reference and draw from the peer's nucleus. The
implementations take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from bench import harness, options, tables
from cream_kernels import native, top_p_sample
from cream_kernels.top_p import top_p_sample_native, top_p_sample_reference, top_p_sample_torch

TEMPERATURE, TOP_P = 0.8, 0.95


def like_a_language_model(N: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A broad bell with 40 peaks a row, (N, V), and uniform numbers (N,): nuclei of one to some hundred tokens."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=g) * 2.5
    logits.scatter_add_(1, torch.randint(V, (N, 40), generator=g), torch.rand(N, 40, generator=g) * 14)
    return logits.to(device, dtype), torch.rand(N, generator=g, dtype=torch.float64).to(device)


def warp(logits: Tensor) -> Tensor:
    """Transformers' view of the nucleus: (N, V), -inf outside it."""
    return LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])(None, logits)


def draw_warped(logits: Tensor) -> Tensor:
    """What generate() does from float32 logits on: warp, softmax, multinomial."""
    return torch.multinomial(warp(logits.float()).softmax(1), 1)[:, 0]


def implementations(logits: Tensor, uniform: Tensor) -> dict:
    found = {
        "cream torch": partial(top_p_sample_torch, logits, uniform, TEMPERATURE, TOP_P),
        "transformers": partial(draw_warped, logits),
    }
    if logits.device.type == "cuda":
        return {"cream": partial(top_p_sample, logits, uniform, temperature=TEMPERATURE, top_p=TOP_P), **found}
    library = native.load()
    if library is None:
        print(f"no native library: {native.why_not()}")
    else:
        ours = partial(top_p_sample_native, library, logits, uniform, TEMPERATURE, TOP_P, library.cream_top_p_isa())
        found = {"cream native": ours, **found}
    return found


def check(logits: Tensor, uniform: Tensor, run: dict) -> None:
    wanted = top_p_sample_reference(logits, uniform, temperature=TEMPERATURE, top_p=TOP_P)
    inside = warp(logits.float()).isfinite()
    for name in run.keys() - {"transformers"}:
        tokens = run[name]()
        # a row may fall within rounding of a boundary, once in some hundred thousand
        assert (tokens != wanted).sum() <= 1, f"{name} differs from the reference"
        assert inside.gather(1, tokens[:, None]).sum() >= len(tokens) - 1, f"{name} leaves transformers' nucleus"


SIZES = {"tiny": ([3], 512), "small": ([1, 32], 49152), "cpu": ([1, 160], 49152), "full": ([1, 160, 1280], 128256)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--vocabulary", type=int)
    args = parser.parse_args(argv)
    turns = args.repeats or 15
    options.resolve(args)
    counts, V = args.rows or SIZES[args.size][0], args.vocabulary or SIZES[args.size][1]
    rows, cases = [], list(itertools.product(counts, args.dtypes))
    for done, (N, dtype) in enumerate(cases):
        if done and options.is_over(args, len(cases) - done):
            break
        logits, uniform = like_a_language_model(N, V, getattr(torch, dtype), args.device)
        run = implementations(logits, uniform)
        check(logits, uniform, run)
        for name, ms in harness.interleave(run, turns, args.device).items():
            row = harness.facts(args.device) | {"shape": [N, V], "dtype": dtype, "impl": name}
            rows.append(row | harness.spread(ms) | {"repeats": turns})
            print(f"  {tables.line(rows[-1])}")
    harness.record("top_p", rows, args.results)
    tables.show("top_p", rows, args.results, __doc__)


if __name__ == "__main__":
    main()
