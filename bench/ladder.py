"""Time a training step of ours with its options put in one by one: python -m bench.ladder

From the plainest step that the trainer takes to the one that a run takes; each rung changes one thing and keeps what
those before it changed. `gain` is the time of the rung before over this one's, `predicted` the same of floating-point
operations, recomputed ones included: where a rung saves no arithmetic (packing, another attention) that is 1, and the
gain is what it is for. MFU counts useful operations only. Correctness first: the mean loss of four pairs, against
float64; then turns in one process. Pairs as in bench.step, or of the one length that --lengths names: what a prompt
computed once brings depends on it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from bench import harness, options, peak, peers, tables
from bench.models import directory_of
from bench.step import CHECKED, CPU_BATCH_TOKENS, LENGTHS, SIZES, Lengths, checked_loss, make_pairs
from cream import attention
from cream.config import ModelConfig, TrainConfig
from cream.dpo import group_of, loss_of, train
from cream.log import Metrics
from cream.meter import forward_flops, training_flops, utilization
from cream.model import Resident, head, recompute
from cream.packing import Group, batches, group_tokens, pack
from cream.work import Work

PAIRS = {"tiny": 4, "small": 8, "cpu": 8, "full": 64}


@dataclass(frozen=True)
class Rung:
    name: str
    shared: bool = False  # whether a pair's prompt is computed once
    batch_tokens: int = 1  # a pair at a time
    recomputed: str = "full"
    attention: str = "sdpa"
    compiled: bool = False  # norms, SwiGLU and rotations; else they are computed as transformers does


def rungs(batch_tokens: int, fastest: str) -> list[Rung]:
    found = [Rung("pair by pair, layers recomputed")]
    for name, change in {
        "prompts shared": {"shared": True},
        f"{batch_tokens} tokens at once": {"batch_tokens": batch_tokens},
        "selective recomputation": {"recomputed": "selective"},
        "no recomputation": {"recomputed": "none"},
        f"attention by {fastest}": {"attention": fastest},
        "norms, SwiGLU and rotations compiled": {"compiled": True},
    }.items():
        if (rung := replace(found[-1], **change)) != found[-1]:
            found.append(replace(rung, name=name))
    return found


def split(groups: Sequence[Group]) -> list[Group]:
    """Each answer with a prompt of its own."""
    return [(prompt, (response,)) for prompt, responses in groups for response in responses]


@contextlib.contextmanager
def on(rung: Rung, model: torch.nn.Module) -> Iterator[None]:
    """The trainer as it is on that rung."""
    recompute(model, rung.recomputed)
    model.config._attn_implementation = attention.register(attention.choose(rung.attention, head(model).dtype))
    unshared = mock.patch("cream.dpo.pack", lambda groups, device: pack(split(groups), device))
    uncompiled = mock.patch("cream.fuse.compiled", lambda function: function)
    with contextlib.ExitStack() as changes:
        for change in [*([] if rung.shared else [unshared]), *([] if rung.compiled else [uncompiled])]:
            changes.enter_context(change)
        yield


def operations(model: torch.nn.Module, pairs: Sequence[dict], rung: Rung) -> tuple[float, float]:
    """Floating-point operations of a step: useful ones, and all that are made."""
    groups, useful, again = [group_of(pair) for pair in pairs], 0.0, 0.0
    for batch in batches([group_tokens(group) for group in groups], rung.batch_tokens):
        members = [groups[i] for i in batch]
        packed = pack(members if rung.shared else split(members), head(model).device)
        useful += training_flops(model, packed)
        if rung.recomputed == "full":  # all but the head
            again += forward_flops(model, packed) - 2 * packed.targets.shape[0] * head(model).numel()
    return useful, useful + again


def measure(model_name: str, pairs: Sequence[dict], dtype: str, args: argparse.Namespace) -> list[dict]:
    directory, kind = directory_of(model_name, dtype), getattr(torch, dtype)
    exact, plain = (
        torch.tensor(checked_loss(directory, pairs, checked, args.device), dtype=torch.float64)
        for checked in (torch.float64, kind)
    )
    allowed = harness.relative_errors({"loss": plain}, {"loss": exact})
    on_gpu = args.device == "cuda"
    before = peak.highest_mib() if not on_gpu and peak.reset() else None
    config = TrainConfig(batch_size=len(pairs), beta=peers.BETA, warmup=0.0)
    batch_tokens = config.batch_tokens if on_gpu else CPU_BATCH_TOKENS
    settings = ModelConfig(path=str(directory), dtype=dtype, fuse="compile")
    model = Resident(directory, settings).at(directory, gradients=True)
    right, errors = [], {}
    for rung in rungs(batch_tokens, attention.choose("auto", kind).name):
        with on(rung, model), torch.no_grad():
            loss = loss_of(model, pairs[:CHECKED], peers.BETA)[0].double().mean().cpu()
        errors[rung] = harness.relative_errors({"loss": loss}, {"loss": exact})
        if harness.excess(errors[rung], allowed, {"loss": max(1e-5, torch.finfo(kind).eps)}) <= 1:
            right.append(rung)
        else:
            print(f"  {rung.name} is wrong, so it gives no row: {errors[rung]}, plain torch {allowed}")

    def step(rung: Rung) -> tuple[float, float | None]:  # ms, MiB at most
        with on(rung, model), tempfile.TemporaryDirectory() as scratch:
            work, metrics = Work(Path(scratch), ()), Metrics(Path(scratch, "metrics.jsonl"))
            asked = replace(config, batch_tokens=rung.batch_tokens)
            gc.collect()
            peak.reset()
            start = time.perf_counter()
            train(model, pairs, asked, work, metrics, stage="bench", seed=0)  # its end waits for the device
            ms = 1e3 * (time.perf_counter() - start)
        if on_gpu:
            return ms, torch.cuda.max_memory_allocated() / 2**20
        return ms, None if before is None else peak.highest_mib() - before

    turns: dict[Rung, list[tuple[float, float | None]]] = {rung: [] for rung in right}
    for _ in range(1 + args.repeats):
        for rung, found in turns.items():
            found.append(step(rung))
    rows: list[dict] = []
    done_before = 0.0
    for rung, found in turns.items():
        useful, done = operations(model, pairs, rung)
        key = {"model": model_name, "shape": [len(pairs)], "dtype": dtype, "mode": "step", "impl": rung.name}
        row = harness.facts(args.device) | key | harness.spread([ms for ms, _ in found[1:]])
        row |= {"repeats": args.repeats, "mfu": round(utilization(model, useful, row["ms"] / 1e3), 4)}
        row |= {"mib": round(found[1][1], 1)} if found[1][1] is not None else {}
        if rows:
            row |= {"gain": round(rows[-1]["ms"] / row["ms"], 3), "predicted": round(done_before / done, 3)}
        rows.append(row | {"error": float(f"{errors[rung]['loss']:.3g}")})
        done_before = done
        print(f"  {tables.line(row)}, MFU {row['mfu']:.1%}, {row.get('mib')} MiB", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--pairs", type=int, help="a step's")
    parser.add_argument("--lengths", type=int, nargs=2, metavar=("PROMPT", "ANSWER"), help="tokens of every pair's")
    args = parser.parse_args(argv)
    options.resolve_models(args, ["float32"])
    model, lengths = SIZES[args.size][0], LENGTHS[args.size]
    if args.lengths:
        prompt, answer = args.lengths
        lengths = Lengths(prompt, answer, prompt, answer, 0.0, 0.0)
    rows = []
    for dtype in args.dtypes:
        pairs = make_pairs(args.pairs or PAIRS[args.size], directory_of(model, dtype), lengths)
        found = measure(model, pairs, dtype, args)
        harness.record("ladder", found, args.results)
        rows += found
    tables.show("ladder", rows, args.results, __doc__)


if __name__ == "__main__":
    main()
