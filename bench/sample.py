"""Time sampling against transformers on the same work: python -m bench.sample

P prompts x R responses of up to T tokens each, which end where they end. Peers are transformers' generate with
num_return_sequences, all rows in one padded batch, and its continuous batching, generate_batch (not in --small), on a
CPU with an eighth of the prompts where they are eight or more: its time is then given eightfold, and with it the
seconds that a call takes to set up. Rates are of the tokens in the answers, the end token included: the random numbers
differ, and with them the answers' lengths a little. Correctness first: greedy, ours must write the tokens that generate
writes, and a peer that does not, or raises, or leaves answers out, gives no row; then turns in one process.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from bench import harness, options, tables
from bench.models import smollm2, untouched
from cream.config import ModelConfig
from cream.data import encode_prompt, load_prompts
from cream.model import load, load_tokenizer, stop_ids
from cream.sample import generate, stream

TEMPERATURE, TOP_P = 0.8, 0.95
SIZES = {"tiny": (4, 2, 8), "small": (4, 5, 8), "cpu": (64, 5, 128), "full": (64, 5, 128)}
PEERS = ("transformers generate", "transformers generate_batch")
GREEDY, ALIKE = 8, 2  # tokens compared, and of how many prompts with generate_batch


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--responses", type=int)
    args = parser.parse_args(argv)
    options.resolve_models(args, ["float32", "bfloat16"])
    rows = []
    for dtype in args.dtypes:
        found = measure(args, dtype)
        harness.record("sample", found, args.results)
        rows += found
    tables.show("sample", rows, args.results, __doc__)


def left_pad(prompts: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """ids and mask, (P, longest) int64, prompts flush right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def measure(args: Namespace, dtype: str) -> list[dict]:
    P, R, T = SIZES[args.size]
    P, R, T = args.prompts or P, args.responses or R, args.tokens[0] if args.tokens else T
    directory = smollm2(dtype)
    ours = load(directory, ModelConfig(dtype=dtype))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(ours.device).eval()
    device = ours.device.type
    tokenizer = load_tokenizer(directory)
    stop = stop_ids(ours, tokenizer)
    examples = load_prompts([f"builtin:arithmetic:{P}"])
    prompts = sorted((encode_prompt(tokenizer, e.messages) for e in examples), key=len)
    ids, mask = left_pad(prompts, device)
    uniform = np.stack([stream(0, 1, str(p), r, T) for p in range(P) for r in range(R)])
    tokens: dict[str, int] = {}  # in the last answers of each

    def up_to_the_end(row: list[int]) -> list[int]:
        ends = [n for n, token in enumerate(row) if token in stop]
        return row[: ends[0] + 1] if ends else row

    @untouched(theirs)
    def transformers_generate(count: int, **kwargs) -> list[list[int]]:
        torch.manual_seed(0)
        out = theirs.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, eos_token_id=stop, pad_token_id=stop[0], **kwargs
        )
        return [up_to_the_end(row) for row in out[:, ids.shape[1] :].tolist()]

    @untouched(theirs)
    def transformers_generate_batch(prompts: Sequence[Sequence[int]], count: int, **kwargs) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=count, eos_token_id=stop, pad_token_id=stop[0], **kwargs)
        keep = device == "cuda" and kwargs["do_sample"]  # its CUDA graphs, from turn to turn
        out = theirs.generate_batch(prompts, generation_config=config, progress_bar=False, persistent_manager=keep)
        if len(out) != len(prompts) * kwargs.get("num_return_sequences", 1):
            raise RuntimeError(f"{len(out)} answers to {len(prompts)} prompts")  # errors are logged there, not raised
        return [up_to_the_end(answer.generated_tokens) for answer in out.values()]

    def cream(count: int, uniform: np.ndarray | None, responses: int, graphs: bool = True) -> list[list[int]]:
        found = generate(
            ours,
            prompts,
            uniform,
            responses=responses,
            max_new_tokens=count,
            stop=stop,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            cuda_graphs=graphs,
            record=uniform is not None,  # as a run has it
        )
        return [answer.ids for answer in found]

    wanted = 1.0 if dtype == "float32" else 0.75  # bfloat16 logits tie and round differently in other shapes
    greedy = transformers_generate(GREEDY, do_sample=False)

    def differ(found: list[list[int]], wanted_tokens: list[list[int]]) -> str | None:
        other = sum(a != b for a, b in zip(found, wanted_tokens, strict=True))
        return f"greedy answers differ for {other} of {len(found)}" if other > (1 - wanted) * len(found) else None

    wrong = differ(cream(GREEDY, None, 1), greedy)
    assert wrong is None, wrong
    absent: dict[str, str | None] = {}  # why a peer gives no row

    def attempt(name: str, call: Callable[[], str | None]) -> None:
        try:
            absent[name] = call()
        except Exception as error:  # of a peer's code, which may raise anything
            absent[name] = f"it raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}"

    asked = options.chosen(args.peers or ([PEERS[0]] if args.size == "small" else None), PEERS, "peer")
    if PEERS[1] in asked:
        some = prompts[:ALIKE]
        attempt(PEERS[1], lambda: differ(transformers_generate_batch(some, GREEDY, do_sample=False), greedy[:ALIKE]))

    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, "num_return_sequences": R}
    part = 8 if device == "cpu" and P >= 8 else 1
    some = prompts[part // 2 :: part]  # of all lengths
    work = {
        "cream": lambda: cream(T, uniform, R),
        PEERS[0]: lambda: transformers_generate(T, **sampling),
        PEERS[1]: lambda: transformers_generate_batch(some, T, **sampling),
    }
    if device == "cuda":
        work["cream, no CUDA graphs"] = lambda: cream(T, uniform, R, graphs=False)
    shown = [*(name for name in work if name not in PEERS), *(name for name in asked if not absent.get(name))]

    def counted(name: str) -> None:
        tokens[name] = sum(map(len, work[name]()))

    def timed(name: str) -> None:
        if name not in PEERS:
            counted(name)
        elif not absent.get(name):
            attempt(name, lambda: counted(name))

    rows = []
    run = {name: partial(timed, name) for name in shown}
    times = harness.interleave(run, args.repeats, device, warm_up=args.size == "full")
    for name in asked:
        if absent.get(name):
            print(f"  no {name}: {absent[name]}")
    for name, ms in times.items():
        if absent.get(name):
            continue
        scale = P / len(some) if name == PEERS[1] else 1.0
        row = harness.facts(device) | {"shape": [P, R, T], "model": "SmolLM2-135M", "dtype": dtype, "impl": name}
        row |= harness.spread([scale * one for one in ms]) | {"repeats": args.repeats}
        row |= {"scaled_by": scale} if scale != 1 else {}
        row |= {"answered": round(scale * tokens[name])}
        row["tokens_per_second"] = round(row["answered"] / row["ms"] * 1e3, 1)
        rows.append(row)
        print(f"  {tables.line(row)}, {row['tokens_per_second']} tokens/s")
    return rows


if __name__ == "__main__":
    main()
