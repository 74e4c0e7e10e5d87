"""The command line that every benchmark shares."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.shapes import HEADS
from cream_kernels.products import multiplies_halves

QUICK = Path(__file__).parent / ".quick"  # where the rows of a quick look go; not committed

# Seconds of timed turns a case, some turns at least
BUDGET = {"tiny": 0.0, "small": 3.0, "cpu": 30.0, "full": 2.0}
REPEATS = {"tiny": 3, "small": 5, "cpu": 15, "full": 50}


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = p.add_mutually_exclusive_group()
    for name, text in {
        "tiny": "shapes of no model: does it run?",
        "small": "one real head, few tokens: all benchmarks in minutes on 2 cores",
        "full": "what a GPU can show; the default where there is one",
    }.items():
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=text)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--peers", type=words, help="names with commas; default: all that are installed and can run")
    p.add_argument("--models", type=words, help="only these of the size's models")
    p.add_argument("--tokens", type=lambda text: [int(word) for word in words(text)], help="only these token counts")
    p.add_argument(
        "--dtypes",
        type=words,
        help="float32, bfloat16; default: both, in --small those that a CPU multiplies, bfloat16 in --full",
    )
    p.add_argument("--modes", type=words, help="only these of the benchmark's modes")
    p.add_argument("--repeats", type=int, help="turns at most")
    p.add_argument("--budget", type=float, help="seconds of turns a case, five turns at least")
    p.add_argument("--no-memory", dest="memory", action="store_false", help="no peaks (on a CPU they need processes)")
    p.add_argument("--until", type=float, help="seconds since 1970 after which no case begins, or inf")
    p.add_argument(
        "--results", type=Path, help="folder for the rows; default: bench/results, for --tiny and --small bench/.quick"
    )
    return p


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device and the size."""
    args.size = args.size or ("full" if args.device == "cuda" else "cpu")
    if args.results is None and args.size in ("tiny", "small"):
        args.results = QUICK
    args.budget = BUDGET[args.size] if args.budget is None else args.budget
    args.repeats = args.repeats or REPEATS[args.size]
    if args.dtypes is None:
        slow = args.size == "small" and not multiplies_halves(torch.device(args.device))  # peers would take minutes
        args.dtypes = ["bfloat16"] if args.size == "full" else ["float32", "bfloat16"][: 1 if slow else 2]
    return args


def resolve_models(args: argparse.Namespace, dtypes: Sequence[str]) -> argparse.Namespace:
    """The same for whole models, of which a turn takes seconds to minutes: few turns; `dtypes` on a CPU, the first
    where it should be quick."""
    if args.device == "cpu" and torch.cuda.is_available():  # which the trainer would take all the same
        print("bench: for whole models on the CPU hide the GPU: CUDA_VISIBLE_DEVICES= python -m ...", file=sys.stderr)
        raise SystemExit(2)
    turns, asked = args.repeats, args.dtypes
    resolve(args)
    quick = args.size in ("tiny", "small")
    args.repeats = turns or (1 if quick else 3)
    args.dtypes = asked or (["bfloat16"] if args.size == "full" else [*dtypes][: 1 if quick else None])
    return args


def is_over(args: argparse.Namespace, left: int) -> bool:
    """Whether no case should begin any more; says how many are left out then."""
    over = args.until is not None and time.time() > args.until
    if over:
        print(f"  out of time: {left} case{'' if left == 1 else 's'} left out (--until inf measures all)", flush=True)
    return over


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    return resolve(parser(description).parse_args(argv))


def chosen(asked: list | None, offered: Sequence, what: str, default: list | None = None) -> list:
    """The offered ones that were asked for, `default` or all if nothing was; exits with 2 for what is not offered."""
    unknown = [name for name in asked or [] if name not in offered]
    if unknown:
        print(f"bench: no {what} {unknown[0]!r} here; there are {', '.join(map(str, offered))}", file=sys.stderr)
        raise SystemExit(2)
    if asked is None:
        return list(offered if default is None else default)
    return [name for name in offered if name in asked]


def heads(args: argparse.Namespace, sizes: dict[str, list[tuple[str, int]]]) -> list[tuple[str, int]]:
    """(model, tokens) of the size; models and token counts that are named replace the size's own."""
    pairs = sizes[args.size]
    if not args.models and not args.tokens:
        return pairs
    models = chosen(args.models, [*HEADS], "model") if args.models else list(dict.fromkeys(m for m, _ in pairs))
    return [
        (model, N)
        for model in models
        for N in args.tokens or sorted({n for m, n in pairs if m == model} or {n for _, n in pairs})
    ]
