"""Time the nucleus sampler of the decode loop against transformers' warpers: python -m bench.top_p

Correctness first: nothing is timed before the paths agree with the reference and draw from the peer's nucleus. The
implementations take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from cream_kernels import native
from cream_kernels.top_p import top_p_sample_native, top_p_sample_reference, top_p_sample_torch

RESULTS = Path(__file__).parent / "results" / "top_p.jsonl"
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


def measure(run: dict, repeats: int, device: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in run}
    for repeat in range(repeats + 1):
        for name, function in run.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return models[0] if models else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 160])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as out:
        for N in args.rows:
            for dtype in (torch.float32, torch.bfloat16):
                logits, uniform = like_a_language_model(N, args.vocabulary, dtype, args.device)
                run = implementations(logits, uniform)
                check(logits, uniform, run)
                for name, ms in measure(run, args.repeats, args.device).items():
                    p20, p50, p80 = (statistics.quantiles(ms, n=10)[i] for i in (1, 4, 7))
                    row = {"shape": [N, args.vocabulary], "dtype": str(dtype).removeprefix("torch."), "impl": name}
                    row |= {"ms": round(p50, 4), "p20": round(p20, 4), "p80": round(p80, 4)}
                    out.write(json.dumps(facts | row) + "\n")
                    shape = f"{N:4} x {args.vocabulary} {row['dtype']:9}"
                    print(f"{shape} {name:13} {p50:9.3f} ms  ({p20:.3f} to {p80:.3f})")


if __name__ == "__main__":
    main()
