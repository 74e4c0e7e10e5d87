"""Time sampling against transformers' generate on the same work: python -m bench.sample

P prompts x R responses x T tokens each, none of which ends early, so that all compute the same number of tokens. The
peer is transformers' generate; on a GPU also its continuous batching, generate_batch. Correctness first: greedy, ours
and generate must write the same tokens; then turns in one process.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench import harness, options, tables
from bench.models import smollm2
from cream.config import ModelConfig
from cream.data import encode_prompt, load_prompts
from cream.model import load, load_tokenizer
from cream.sample import generate, left_pad, stream

TEMPERATURE, TOP_P = 0.8, 0.95


SIZES = {"tiny": (4, 2, 8), "small": (8, 5, 16), "cpu": (32, 5, 64), "full": (64, 5, 128)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--responses", type=int)
    args = parser.parse_args(argv)
    args.repeats = args.repeats or 3
    options.resolve(args)
    rows = []
    for dtype in args.dtypes:
        found = measure(args, dtype)
        harness.record("sample", found, args.results)
        rows += found
    tables.show("sample", rows, args.results, __doc__)


def measure(args: Namespace, dtype: str) -> list[dict]:
    P, R, T = SIZES[args.size]
    P, R, T = args.prompts or P, args.responses or R, args.tokens[0] if args.tokens else T
    directory = smollm2(dtype)
    ours = load(directory, ModelConfig(dtype=dtype))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(ours.device).eval()
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
    wanted = 1.0 if dtype == "float32" else 0.75  # bfloat16 logits tie and round differently in other shapes
    assert sum(same) >= wanted * P, f"greedy answers differ for {P - sum(same)} of {P} prompts"

    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, "num_return_sequences": R}
    run = {
        "cream": lambda: cream(T, uniform, R),
        "transformers generate": lambda: transformers_generate(T, **sampling),
    }
    if device == "cuda":
        config = GenerationConfig(max_new_tokens=T, eos_token_id=-1, pad_token_id=0, **sampling)
        run["transformers generate_batch"] = lambda: theirs.generate_batch(prompts, generation_config=config)
    else:
        print("  no transformers generate_batch: its paged attention needs a CUDA device")
    rows = []
    for name, ms in harness.interleave(run, args.repeats, device).items():
        row = harness.facts(device) | {"shape": [P, R, T], "model": "SmolLM2-135M", "dtype": dtype, "impl": name}
        row |= harness.spread(ms) | {"repeats": args.repeats}
        row["tokens_per_second"] = round(P * R * T / row["ms"] * 1e3, 1)
        rows.append(row)
        print(f"  {tables.line(row)}, {row['tokens_per_second']} tokens/s")
    return rows


if __name__ == "__main__":
    main()
