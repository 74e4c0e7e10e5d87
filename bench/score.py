"""Time scoring R answers to each prompt against padded batches with full logits: python -m bench.score

The peer is what rewarding code commonly does, the released CREAM code's rewarding.py included: every answer with its
own copy of the prompt, padded to the longest of the batch, (S, T, V) logits, log-softmax, gather. "cream, unshared" is
our own scoring with each answer as a prompt group of its own, so that what sharing brings shows. Correctness first: no
more than twice the padded peer's error against float64, on four prompts; then turns in one process.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import harness, options, tables
from bench.models import LAYERS, directory_of, untouched
from cream.config import ModelConfig
from cream.data import encode_prompt, load_prompts
from cream.model import load
from cream.score import score


def padded_full_logits(model, groups: list, batch_size: int) -> list[float]:
    """Sum of log-probs of every response, in the order of the groups."""
    sequences = [(prompt, response) for prompt, responses in groups for response in responses]
    sums = []
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = max(len(p) + len(r) for p, r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64, device=model.device)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, response) in enumerate(batch):
            end = len(prompt) + len(response)
            ids[row, :end], mask[row, :end] = torch.tensor([*prompt, *response]), 1
            answer[row, len(prompt) : end] = True
        with torch.no_grad(), untouched(model):
            logits = model(input_ids=ids, attention_mask=mask).logits
        wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays so: it is the truth
        logp = torch.log_softmax(wide, -1).gather(2, ids[:, 1:, None])[:, :, 0]
        sums += (logp * answer[:, 1:]).sum(1).tolist()
    return sums


SIZES = {"tiny": ("tiny", 4), "small": ("SmolLM2-135M", 2), "cpu": ("SmolLM2-135M", 32)}
SIZES["full"] = (f"LLaMA-2-7B, {LAYERS} layers", 64)
CHECKED = 4  # prompts


def make_groups(count: int, responses: int, directory: Path) -> list:
    """Prompts of word problems with answers of 10 to 64 tokens of such: lengths as the smoke recipe meets them."""
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer, rng = AutoTokenizer.from_pretrained(directory), np.random.default_rng(0)
    prompts = [encode_prompt(tokenizer, e.messages) for e in load_prompts([f"builtin:arithmetic:{count}"])]
    text = tokenizer(" ".join(e.messages[0]["content"] for e in load_prompts(["builtin:arithmetic:200"])))["input_ids"]
    text = [token % vocabulary for token in text]
    groups = []
    for prompt in prompts:
        starts, lengths = rng.integers(0, len(text) - 64, responses), rng.integers(10, 65, responses)
        answers = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        groups.append(([token % vocabulary for token in prompt], answers))
    return groups


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="sequences a forward of the peer")
    args = parser.parse_args(argv)
    options.resolve_models(args, ["float32", "bfloat16"])
    rows = []
    for dtype in args.dtypes:
        found = measure(args, dtype)
        harness.record("score", found, args.results)
        rows += found
    tables.show("score", rows, args.results, __doc__)


def measure(args: Namespace, dtype: str) -> list[dict]:
    name, count = SIZES[args.size]
    count, directory = args.prompts or count, directory_of(name, dtype)
    ours = load(directory, ModelConfig(dtype=dtype))
    device = ours.device.type
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    groups = make_groups(count, args.responses, directory)

    def unshared(groups: list) -> list[list[float]]:
        alone = [(prompt, [response]) for prompt, responses in groups for response in responses]
        return score(ours, alone, batch_tokens=4096)

    ways = {
        "cream": lambda groups: np.concatenate(score(ours, groups, batch_tokens=4096)),
        "cream, unshared": lambda groups: np.concatenate(unshared(groups)),
        "padded, full logits": lambda groups: np.array(padded_full_logits(theirs, groups, args.batch)),
    }
    few = groups[:CHECKED]
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).to(device)
    truth = torch.tensor(padded_full_logits(exact, few, 1), dtype=torch.float64)
    del exact
    found = {name: torch.from_numpy(way(few)) for name, way in ways.items()}
    errors = {name: harness.relative_errors({"logp": sums}, {"logp": truth}) for name, sums in found.items()}
    nats = {name: (sums - truth).abs().max().item() for name, sums in found.items()}
    excesses = {name: harness.excess(error, errors["padded, full logits"], {}) for name, error in errors.items()}
    for wrong in [name for name in ways if not excesses[name] <= 1]:
        print(f"  {wrong} is wrong, so it gives no row: {errors[wrong]}")
        del ways[wrong]
    tokens = sum(len(p) + sum(map(len, responses)) for p, responses in groups)
    run = {name: lambda way=way: way(groups) for name, way in ways.items()}
    times = harness.interleave(run, args.repeats, device, warm_up=len(groups) > CHECKED)
    rows = []
    for impl, ms in times.items():
        key = {"shape": [count, args.responses], "model": name, "dtype": dtype, "impl": impl}
        row = harness.facts(device) | key | harness.spread(ms) | {"repeats": args.repeats}
        row |= {"max_error_nats": round(nats[impl], 6), "distinct_tokens": tokens}
        row |= {"error": float(f"{errors[impl]['logp']:.3g}"), "excess": float(f"{excesses[impl]:.3g}")}
        row["sequences_per_second"] = round(count * args.responses / row["ms"] * 1e3, 2)
        rows.append(row)
        print(f"  {tables.line(row)}, error {row['max_error_nats']:.2g} nats")
    return rows


if __name__ == "__main__":
    main()
