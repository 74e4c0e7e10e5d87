"""Time sampling against transformers' generate on the same work: python -m bench.sample

P prompts x R responses x T tokens each, none of which ends early, so that both compute the same number of tokens.
Correctness first: greedy, both must write the same tokens.
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
from cream.sample import generate, left_pad, stream

TEMPERATURE, TOP_P = 0.8, 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    P, R, T = args.prompts, args.responses, args.tokens
    directory = smollm2(args.dtype)
    ours = load(directory, ModelConfig(dtype=args.dtype))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, args.dtype)).to(ours.device).eval()
    device = ours.device.type
    tokenizer = load_tokenizer(directory)
    examples = load_prompts([f"builtin:arithmetic:{P}"])
    prompts = sorted((encode_prompt(tokenizer, e.messages) for e in examples), key=len)
    ids, positions, first = left_pad(prompts, ours.device)
    mask = (torch.arange(ids.shape[1], device=ours.device) >= first[:, None]).long()
    uniform = np.stack([stream(0, 1, str(p), r, T) for p in range(P) for r in range(R)])

    def transformers_generate(count: int, **kwargs) -> torch.Tensor:
        out = theirs.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, pad_token_id=0, **kwargs
        )
        return out[:, ids.shape[1] :]

    def cream(count: int, uniform: np.ndarray | None, responses: int) -> list[list[int]]:
        found = generate(
            ours,
            prompts,
            uniform,
            responses=responses,
            max_new_tokens=count,
            stop=[],
            temperature=TEMPERATURE,
            top_p=TOP_P,
        )
        return [answer.ids for answer in found]

    # min_new_tokens bans the end token, which greedy cream does not: compare up to where it would have come.
    greedy = transformers_generate(8, do_sample=False).tolist()
    end = tokenizer.eos_token_id
    same = [a == b or end in b for a, b in zip(greedy, cream(8, None, 1), strict=True)]
    wanted = 1.0 if args.dtype == "float32" else 0.75  # bfloat16 logits tie and round differently in other shapes
    assert sum(same) >= wanted * P, f"greedy answers differ for {P - sum(same)} of {P} prompts"

    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, "num_return_sequences": R}
    run = {
        "cream": lambda: cream(T, uniform, R),
        "transformers generate": lambda: transformers_generate(T, **sampling),
    }
    known, rows = harness.facts(device), []
    for name, ms in harness.interleave(run, args.repeats, device).items():
        row = {"shape": [P, R, T], "model": "SmolLM2-135M", "dtype": args.dtype, "impl": name} | harness.spread(ms)
        row["tokens_per_second"] = round(P * R * T / row["ms"] * 1e3, 1)
        rows.append(known | row)
        print(f"{P} x {R} x {T} {args.dtype} {name:22} {row['ms']:9.0f} ms {row['tokens_per_second']:8.0f} tokens/s")
    harness.record("sample", rows)


if __name__ == "__main__":
    main()
