"""Time tiles for the store-free forward on the card at hand, and keep the fastest: python -m bench.tune [--write]

Every candidate is checked against float64 and timed as the protocol says, at each depth D of the heads in shapes.py,
the most likely ones first; --minutes ends each depth in time. The fastest become rows of MEASURED in
kernels/cream_kernels/tiles.py: printed, and put there with --write as soon as a depth is done. Without a CUDA device it
prints the candidates and exits with 2.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench import harness, linear_logp, peers
from bench.shapes import HEADS

TILES = Path(__file__).parents[1] / "kernels/cream_kernels/tiles.py"
SHARED_BYTES = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "sm120": 101_376}  # of a program, at most
Candidate = dict[str, int | bool]  # fields of tiles.Tile


def candidates(arch: str) -> list[Candidate]:
    """Tiles whose stages fit shared memory and whose sums fit registers: the vendor's product, then what goes by
    descriptors and large tiles first."""
    found: list[Candidate] = []
    for n, v, d, warps, stages in itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (3, 4)):
        if 2 * stages * (n + v) * d > SHARED_BYTES[arch] or n * v > 128 * 32 * warps:
            continue
        tile = {"block_n": n, "block_v": v, "block_d": d, "num_warps": warps, "num_stages": stages}
        found.append(tile)
        if arch in ("sm90", "sm100"):
            found.append({**tile, "tma": True})
            if warps == 4 and (n, v) != (64, 256):  # on Hopper it takes effect with four; Triton 3.6 fails on that tile
                found.append({**tile, "tma": True, "warp_specialize": True})
    found.sort(
        key=lambda tile: (-tile.get("tma", 0) - tile.get("warp_specialize", 0), -tile["block_n"] * tile["block_v"])
    )
    return [{**found[0], "vendor_gemm": True}, *found]


def render(rows: Mapping[tuple[str, str, int], Candidate]) -> str:
    """The table as Python: {("sm90", torch.bfloat16, 4096): Tile(block_n=128, ...), ...}."""
    lines = []
    for (arch, dtype, D), tile in sorted(rows.items()):
        fields = ", ".join(f"{name}={value}" for name, value in tile.items())
        lines.append(f'    ("{arch}", torch.{dtype}, {D}): Tile({fields}),\n')
    return "{\n" + "".join(lines) + "}" if lines else "{}"


def merged(source: str, rows: Mapping[tuple[str, str, int], Candidate]) -> str:
    """The source of tiles.py with these rows in MEASURED, in place of rows for the same arch, dtype and D."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MEASURED":
            break
    else:
        raise ValueError("tiles.py has no annotated MEASURED")
    old = {}
    for key, value in zip(node.value.keys, node.value.values, strict=True):
        arch, dtype, D = key.elts
        tile = {keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords}
        old[(arch.value, dtype.attr, D.value)] = tile
    lines = source.splitlines(keepends=True)
    first, last = node.value.lineno - 1, node.value.end_lineno - 1
    before = lines[first][: node.value.col_offset]
    after = lines[last][node.value.end_col_offset :]
    return "".join([*lines[:first], before, render({**old, **rows}), after, *lines[last + 1 :]])


def fastest(arch: str, dtype: str, model: str, N: int, repeats: int, until: float) -> Candidate:
    """The candidate with the least median time whose log-probs are right, of those that begin in time."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from cream_kernels import linear_logp as ours
    from cream_kernels import tiles

    tensors = linear_logp.problem(model, N, dtype, "cuda")
    D, truth = HEADS[model].hidden, linear_logp.exact("forward", *tensors)
    plain = harness.relative_errors(linear_logp.outputs(peers.eager_linear_logp(), "forward", *tensors), truth)
    known, measured = dict(tiles.MEASURED), {}
    try:
        for done, tile in enumerate(offered := candidates(arch)):
            if time.monotonic() > until and measured:
                print(f"  out of time: {len(offered) - done} candidates left out")
                break
            tiles.MEASURED.clear()
            tiles.MEASURED[(arch, getattr(torch, dtype), D)] = tiles.Tile(**tile)
            try:
                errors = harness.relative_errors(linear_logp.outputs(ours, "forward", *tensors), truth)
            except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
                print(f"  {tile}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
                continue
            if not harness.excess(errors, plain, {}) <= 1:
                print(f"  {tile}: wrong, {errors} where plain torch has {plain}")
                continue
            run = {"tile": lambda: linear_logp.outputs(ours, "forward", *tensors)}
            ms = harness.spread(harness.interleave(run, repeats, "cuda")["tile"])["ms"]
            measured[ms] = tile
            print(f"  {model} {dtype} {tile}: {ms} ms", flush=True)
    finally:
        tiles.MEASURED.clear()
        tiles.MEASURED.update(known)
    if not measured:
        raise SystemExit(f"bench.tune: no candidate was right for {model} in {dtype}")
    return measured[min(measured)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the fastest into tiles.py")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16"))
    parser.add_argument("--models", nargs="+", choices=[name for name in HEADS if name != "tiny"], help="default: all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all depths together")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        for tile in candidates("sm90"):
            print(", ".join(f"{name}={value}" for name, value in tile.items()))
        print("bench.tune: needs a CUDA device", file=sys.stderr)
        raise SystemExit(2)
    from cream_kernels import tiles

    arch = tiles.architecture(torch.device("cuda"))
    models = args.models or [name for name in HEADS if name != "tiny"]
    depths = {HEADS[model].hidden: model for model in models}  # one head for each D
    problems = [(dtype, D, model) for dtype in args.dtypes for D, model in sorted(depths.items(), reverse=True)]
    start, rows = time.monotonic(), {}
    for done, (dtype, D, model) in enumerate(problems, 1):
        until = start + 60 * args.minutes * done / len(problems)
        rows[(arch, dtype, D)] = fastest(arch, dtype, model, args.tokens, args.repeats, until)
        if args.write:
            TILES.write_text(merged(TILES.read_text("utf-8"), rows), "utf-8")
    print(render(rows))


if __name__ == "__main__":
    main()
