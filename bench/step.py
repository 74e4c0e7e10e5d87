"""Time one optimizer step of weighted DPO against TRL's DPOTrainer: python -m bench.step

The same model, the same pairs, cached reference log-probs and AdamW (fused) on both sides; TRL with its defaults (8
pairs a micro-batch, gradient checkpointing) and with checkpointing off. Ours trains as a run does, by its own defaults,
on a CPU with batches of 2,048 tokens. In bfloat16 TRL keeps float32 weights under autocast, its default, and ours
bfloat16 weights with float32 masters. Agreement is 1 throughout, since TRL has no weight for a pair. Correctness first:
the mean loss of four pairs, against float64.

Each implementation lives in a process of its own and they take turns, after a step that does not count, of one of TRL's
micro-batches or of half the pairs. A pair counts once however it is padded. Memory is the peak of the first counted
step with weights, optimizer and all, beyond what the process held before the model came.
On a CPU answers are as long as GSM8K's. On a GPU they are as long as UltraFeedback's, and the model is as wide as
LLaMA-2-7B, with 8 of its 32 layers and random weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from bench import harness, options, peak, peers, tables
from bench.models import LAYERS, directory_of
from bench.score import padded_full_logits

SIZES = {"tiny": ("tiny", 8), "small": ("SmolLM2-135M", 2), "cpu": ("SmolLM2-135M", 64)}
SIZES["full"] = (f"LLaMA-2-7B, {LAYERS} layers", 64)
CPU_BATCH_TOKENS = 2048
CHECKED = 4  # pairs
TRL_PAIRS = 8  # its per_device_train_batch_size


class Lengths(NamedTuple):
    """Medians in tokens, log-normal around them; equal where the spreads are 0."""

    prompt: int = 95  # with its template
    answer: int = 120
    longest_prompt: int = 250
    longest_answer: int = 320
    prompt_spread: float = 0.35
    answer_spread: float = 0.4


SHORT = Lengths()
LENGTHS = {size: SHORT for size in SIZES} | {"full": Lengths(200, 400, 400, 624)}


def make_pairs(count: int, directory: Path, lengths: Lengths = SHORT) -> list[dict]:
    """Rows of pairs.jsonl, of running text."""
    from transformers import AutoTokenizer

    from cream.data import load_prompts

    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    text = " ".join(example.messages[0]["content"] for example in load_prompts(["builtin:arithmetic:200"]))
    ids = [token % vocabulary for token in AutoTokenizer.from_pretrained(directory)(text)["input_ids"]]
    rng = np.random.default_rng(0)

    def piece(median: float, spread: float, most: int) -> list[int]:
        length = int(np.clip(median * np.exp(spread * rng.standard_normal()), 40, most))
        start = int(rng.integers(0, len(ids) - length))
        return ids[start : start + length]

    pairs = []
    for p in range(count):
        prompt = piece(lengths.prompt, lengths.prompt_spread, lengths.longest_prompt)
        row = {"prompt_id": str(p), "prompt_ids": prompt, "agreement": 1.0}
        for side in ("chosen", "rejected"):
            row[f"{side}_ids"] = piece(lengths.answer, lengths.answer_spread, lengths.longest_answer)
            row[f"logp_{side}"] = float(-2.5 * len(row[f"{side}_ids"]) + 5 * rng.standard_normal())
        pairs.append(row)
    return pairs


def make_cream(directory: Path, pairs: list[dict], dtype: str) -> tuple[Callable[[int], float], Callable[[], float]]:
    """A step of the first pairs, so many, giving its milliseconds, and the mean loss of CHECKED of them: all that is
    known here of the trainer."""
    from cream.config import ModelConfig, TrainConfig
    from cream.dpo import loss_of, train
    from cream.log import Metrics
    from cream.model import Resident
    from cream.work import Work

    model = Resident(directory, ModelConfig(path=str(directory), dtype=dtype)).at(directory, gradients=True)
    config = TrainConfig(beta=peers.BETA, warmup=0.0)  # whose first step would have the rate 0
    if not torch.cuda.is_available():
        config = replace(config, batch_tokens=CPU_BATCH_TOKENS)

    def step(count: int) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            work, metrics = Work(Path(scratch), ()), Metrics(Path(scratch, "metrics.jsonl"))
            start = time.perf_counter()
            train(model, pairs[:count], replace(config, batch_size=count), work, metrics, stage="bench", seed=0)
            return 1e3 * (time.perf_counter() - start)

    @torch.no_grad()
    def loss() -> float:
        return loss_of(model, pairs[:CHECKED], peers.BETA)[0].mean().item()

    return step, loss


def make_trl(
    directory: Path, pairs: list[dict], dtype: str, checkpointing: bool
) -> tuple[Callable[[int], float], Callable[[], float]]:
    """The same of TRL: from the beginning of a step to its end, as its callbacks are told."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    columns = {name: [pair[name] for pair in pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    columns |= {f"ref_{side}_logps": [pair[f"logp_{side}"] for pair in pairs] for side in ("chosen", "rejected")}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ms = 1e3 * (time.perf_counter() - self.start)

    class Cached(DPOTrainer):  # with tokens and reference log-probs that are there
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset

    scratch, clock = tempfile.mkdtemp(), Clock()
    micro = min(TRL_PAIRS, len(pairs))
    config = DPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(pairs) // micro,
        max_steps=1,
        learning_rate=1e-6,
        beta=peers.BETA,
        precompute_ref_log_probs=True,
        gradient_checkpointing=checkpointing,
        bf16=dtype == "bfloat16",
        optim="adamw_torch_fused",
        max_length=2048,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Cached(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[clock],
    )

    dataset = trainer.train_dataset

    def step(count: int) -> float:
        trainer.train_dataset = dataset.select(range(count))
        trainer.train()
        return clock.ms

    @torch.no_grad()
    def loss() -> float:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(CHECKED, len(pairs)))])
        batch = {name: value.to(trainer.model.device) for name, value in batch.items()}
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, batch).item()

    return step, loss


MAKERS = {
    "cream": make_cream,
    "trl": lambda *args: make_trl(*args, checkpointing=True),
    "trl, no checkpointing": lambda *args: make_trl(*args, checkpointing=False),
}


def worker(name: str, model: str, count: int, dtype: str, size: str) -> None:
    """The process of one implementation: the loss of the first pairs, then for every line a step of so many."""
    # Imported first, so that what that takes is not counted as the model's memory.
    importlib.import_module("cream.dpo" if name == "cream" else "trl.trainer.dpo_trainer")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    before = peak.highest_mib() if peak.reset() else None
    pairs = make_pairs(count, directory_of(model, dtype), LENGTHS[size])
    step, loss = MAKERS[name](directory_of(model, dtype), pairs, dtype)
    print("WORKER", json.dumps({"loss": loss()}), flush=True)
    for line in sys.stdin:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        peak.reset()
        ms = step(int(line))
        mib = None if before is None else peak.highest_mib() - before
        if torch.cuda.is_available():
            mib = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.empty_cache()
        peak.reset()  # as empty_cache: what is free goes back, since the others live on this machine too
        print("WORKER", json.dumps({"ms": ms, "mib": mib}), flush=True)


class Worker:
    """The parent's end of it."""

    def __init__(self, name: str, *spec: object):
        command = [sys.executable, "-W", "ignore", "-m", "bench.step", "--worker", name, *map(str, spec)]
        self.name, self.stderr = name, tempfile.TemporaryFile()  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True
        )
        self.loss = (self.answer() or {"loss": math.nan})["loss"]

    def answer(self) -> dict | None:
        """What the process says next; None, with the reason printed, where it has ended."""
        for line in self.process.stdout:
            if line.startswith("WORKER "):
                return json.loads(line.removeprefix("WORKER "))
        code = self.process.wait()
        reason = "killed, as happens where memory runs out" if code == -9 else self.errors()
        print(f"  no {self.name}: its process ended with {code}: {reason}")
        return None

    def errors(self) -> str:
        self.stderr.seek(0)
        return (self.stderr.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]

    def step(self, count: int) -> dict | None:
        if self.process.poll() is None:
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def checked_loss(directory: Path, pairs: Sequence[dict], dtype: torch.dtype, device: str) -> float:
    """The mean loss of the first pairs by transformers: padded batches, full logits, log-softmax, gather."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    groups = [(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]]) for pair in pairs[:CHECKED]]
    logp = torch.tensor(padded_full_logits(model, groups, 2), dtype=torch.float64).view(-1, 2)
    reference = torch.tensor([[pair["logp_chosen"], pair["logp_rejected"]] for pair in pairs[:CHECKED]]).double()
    ratio = logp - reference
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that follow
    return -functional.logsigmoid(peers.BETA * (ratio[:, 0] - ratio[:, 1])).mean().item()


def measure(model: str, count: int, dtype: str, names: Sequence[str], args: argparse.Namespace) -> list[dict]:
    directory = directory_of(model, dtype)
    pairs = make_pairs(count, directory, LENGTHS[args.size])
    exact, plain = (
        torch.tensor(checked_loss(directory, pairs, kind, args.device), dtype=torch.float64)
        for kind in (torch.float64, getattr(torch, dtype))
    )
    allowed = harness.relative_errors({"loss": plain}, {"loss": exact})
    rounding = {"loss": max(1e-5, torch.finfo(getattr(torch, dtype)).eps)}  # one number, whose error chance decides
    workers, errors, excesses = [], {}, {}
    for name in names:
        found = Worker(name, model, count, dtype, args.size)
        errors[name] = harness.relative_errors({"loss": torch.tensor(found.loss).double()}, {"loss": exact})
        excesses[name] = harness.excess(errors[name], allowed, rounding)
        if excesses[name] <= 1:
            workers.append(found)
        else:
            print(f"  {name} is wrong or gone, so it gives no row: {errors[name]}, plain torch {allowed}")
            found.end()
    answers: dict[str, list[dict]] = {found.name: [] for found in workers}
    for turn in range(1 + args.repeats):
        for found in list(workers):
            answer = found.step(count if turn else min(TRL_PAIRS, -(-count // 2)))
            if answer is None:
                workers.remove(found)
            elif turn:
                answers[found.name].append(answer)
    rows = []
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    for found in workers:
        found.end()
        key = {"model": model, "shape": [count], "dtype": dtype, "mode": "step", "impl": found.name}
        row = harness.facts(args.device) | key | harness.spread([answer["ms"] for answer in answers[found.name]])
        row |= {"repeats": args.repeats, "pairs_per_second": round(1e3 * count / row["ms"], 3), "pair_tokens": tokens}
        mib = answers[found.name][0]["mib"]
        row |= {"mib": round(mib, 1)} if mib is not None else {}
        row |= {"error": float(f"{errors[found.name]['loss']:.3g}"), "excess": float(f"{excesses[found.name]:.3g}")}
        row |= {"version": f"trl {harness.version('trl')}"} if found.name != "cream" else {}
        rows.append(row)
        print(f"  {tables.line(row)}, {row['pairs_per_second']} pairs/s, {mib} MiB", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--pairs", type=int, help="a step's; default: 64, 2 where it should be quick")
    parser.add_argument(
        "--worker", nargs=5, metavar=("NAME", "MODEL", "PAIRS", "DTYPE", "SIZE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args(argv)
    if args.worker:
        name, model, count, dtype, size = args.worker
        return worker(name, model, int(count), dtype, size)
    options.resolve_models(args, ["float32"])  # as a run would choose by itself
    model, count = SIZES[args.size]
    offered = [name for name in MAKERS if name != "cream"]
    names = ["cream", *options.chosen(args.peers or (["trl"] if args.size == "small" else None), offered, "peer")]
    reason = peers.why_not(peers.Peer(lambda: None, "trl", "trl"), args.device)
    if reason and len(names) > 1:
        print(f"  no trl: {reason}")
        names = ["cream"]
    rows = []
    for dtype in args.dtypes:
        found = measure(model, args.pairs or count, dtype, names, args)
        harness.record("step", found, args.results)
        rows += found
    tables.show("step", rows, args.results, __doc__)


if __name__ == "__main__":
    main()
