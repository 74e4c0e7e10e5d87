"""Time scoring R answers to each prompt against padded batches with full logits: python -m bench.score

The peer is what rewarding code commonly does, the released CREAM code included: every answer with its own copy of the
prompt, padded to the longest of the batch, (S, T, V) logits, log-softmax, gather. Correctness first: both within their
dtype's rounding of float64.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench import harness
from bench.models import smollm2
from cream.config import ModelConfig
from cream.data import encode_prompt, load_prompts
from cream.model import load, load_tokenizer
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
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[:, :, 0]
        sums += (logp * answer[:, 1:]).sum(1).tolist()
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="sequences a forward of the peer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    directory = smollm2(args.dtype)
    ours = load(directory, ModelConfig(dtype=args.dtype))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, args.dtype)).to(ours.device).eval()
    device, tokenizer, rng = ours.device.type, load_tokenizer(directory), np.random.default_rng(0)
    # Prompts of word problems, answers of 10 to 64 tokens of one of them: lengths as the smoke recipe meets them.
    prompts = [encode_prompt(tokenizer, e.messages) for e in load_prompts([f"builtin:arithmetic:{args.prompts}"])]
    text = tokenizer(" ".join(e.messages[0]["content"] for e in load_prompts(["builtin:arithmetic:200"])))["input_ids"]
    groups = []
    for prompt in prompts:
        starts = rng.integers(0, len(text) - 64, args.responses)
        groups.append(
            (prompt, [text[s : s + n] for s, n in zip(starts, rng.integers(10, 65, args.responses), strict=True)])
        )
    run = {
        "cream": lambda: score(ours, groups, batch_tokens=4096),
        "padded, full logits": lambda: padded_full_logits(theirs, groups, args.batch),
    }
    few = groups[:4]
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    truth = np.array(padded_full_logits(exact, few, 1))
    del exact
    errors = {
        "cream": np.abs(np.concatenate(score(ours, few, batch_tokens=4096)) - truth).max(),
        "padded, full logits": np.abs(np.array(padded_full_logits(theirs, few, args.batch)) - truth).max(),
    }
    assert errors["cream"] <= 2 * errors["padded, full logits"] + 1e-3, errors
    tokens = sum(len(p) + sum(map(len, responses)) for p, responses in groups)
    known, rows = harness.facts(device), []
    for name, ms in harness.interleave(run, args.repeats, device).items():
        row = {"shape": [args.prompts, args.responses], "model": "SmolLM2-135M", "dtype": args.dtype, "impl": name}
        row |= harness.spread(ms) | {"max_error_nats": round(float(errors[name]), 6), "distinct_tokens": tokens}
        row["sequences_per_second"] = round(args.prompts * args.responses / row["ms"] * 1e3, 2)
        rows.append(known | row)
        print(
            f"{args.prompts} x {args.responses} {args.dtype} {name:20} {row['ms']:8.0f} ms "
            f"{row['sequences_per_second']:7.1f} sequences/s, error {row['max_error_nats']:.2g} nats"
        )
    harness.record("score", rows)


if __name__ == "__main__":
    main()
