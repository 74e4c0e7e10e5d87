"""Time the nucleus sampler of the decode loop against transformers' warpers: python -m bench.top_p

Correctness first: nothing is timed before the paths agree with the reference and draw from the peer's nucleus. The
implementations take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from bench import harness
from cream_kernels import native
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
    library = native.load()
    if library is None:
        print(f"no native library: {native.why_not()}")
    elif logits.device.type == "cpu":
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 160])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    known, rows = harness.facts(args.device), []
    for N in args.rows:
        for dtype in (torch.float32, torch.bfloat16):
            logits, uniform = like_a_language_model(N, args.vocabulary, dtype, args.device)
            run = implementations(logits, uniform)
            check(logits, uniform, run)
            for name, ms in harness.interleave(run, args.repeats, args.device).items():
                row = {"shape": [N, args.vocabulary], "dtype": str(dtype).removeprefix("torch."), "impl": name}
                row |= harness.spread(ms)
                rows.append(known | row)
                shape = f"{N:4} x {args.vocabulary} {row['dtype']:9}"
                print(f"{shape} {name:13} {row['ms']:9.3f} ms  ({row['p20']:.3f} to {row['p80']:.3f})")
    harness.record("top_p", rows)


if __name__ == "__main__":
    main()
