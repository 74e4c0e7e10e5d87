"""Time the native pieces against the torch they replace: python -m bench.native

N rows, D hidden size, V vocabulary. Nothing is timed before it was held to float64, and each row says
how far off it was. Where the processor has AMX, AVX512-BF16 is timed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from bench import harness
from cream_kernels import decode_attention, gather_logp, linear_logp, native, reference
from cream_kernels import linear_logp_native as ours
from cream_kernels.decode_attention import decode_attention_torch, visible_columns

MODELS = {"SmolLM2-135M": (576, 49152), "Llama-2-7B": (4096, 32000)}  # D, V
TILE = 512, 1024  # rows, vocabulary
VOCABULARY = 32000  # of logits that are there
SAMPLE = 64  # rows of a whole head that are held to float64
LOGITS_ONLY = "bf16 logits only"
AVX512 = "native AVX512-BF16"


def problem(N: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) and targets (N,), with logits of order 10."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g).bfloat16()
    weight = torch.randn(V, D, generator=g).mul_(3 / D**0.5).bfloat16()
    return hidden, weight, torch.randint(V, (N,), generator=g)


def logp64(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """In float64, of the first SAMPLE rows."""
    logits = [hidden[:SAMPLE].double() @ part.double().T for part in weight.split(4096)]
    return torch.cat(logits, 1).log_softmax(1).gather(1, targets[:SAMPLE, None])[:, 0]


def products(of: Callable[[int | None], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """of(isa) for the best product, and for AVX512-BF16 where that is another one."""
    both = {"native": None} | ({AVX512: 1} if native.load().cream_bf16_isa() > 1 else {})
    return {name: partial(of, isa) for name, isa in both.items()}


def score_native(hidden: Tensor, weight: Tensor, targets: Tensor, isa: int | None) -> Tensor:
    maximum, others, target_logit, _ = ours.statistics(hidden, weight, targets, isa=isa)
    return functional.logsigmoid(target_logit - maximum - others.log())


def without_library() -> mock._patch:
    return mock.patch.object(native, "_decide", lambda: (None, "left out"))


def score_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad(), without_library():
        return linear_logp(hidden, weight, targets)


def score_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None])[:, 0]


def fold_torch_(tile: Tensor, columns: Tensor, maximum: Tensor, others: Tensor, target_logit: Tensor) -> Tensor:
    """What ours.fold_tile_ does, in torch's passes."""
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1)[:, None]
    picked = tile.gather(1, columns)
    tile.scatter_(1, columns, picked.masked_fill(inside[:, None], -torch.inf))
    target_logit.copy_(torch.where(inside, picked[:, 0], target_logit))
    highest = torch.maximum(maximum, tile.amax(1))
    shrink = (maximum - highest).exp_()
    tile.sub_(highest[:, None]).exp_()
    others.mul_(shrink).add_(tile.sum(1))
    maximum.copy_(highest)
    return shrink


def head(N: int, D: int, V: int) -> tuple[Tensor, dict[str, Callable]]:
    """Scoring whole: what float64 makes of the first rows, and the implementations, of which one makes logits only."""
    given = problem(N, D, V)
    hidden, weight, _ = given
    return logp64(*given), products(lambda isa: score_native(*given, isa)[:SAMPLE]) | {
        "cream torch": lambda: score_torch(*given)[:SAMPLE],
        "log_softmax": lambda: score_plain(*given)[:SAMPLE],
        LOGITS_ONLY: lambda: hidden @ weight.T,
    }


def tile_of_logits(n: int, D: int, c: int) -> tuple[Tensor, dict[str, Callable]]:
    hidden, weight, _ = problem(n, D, c)
    wide, out = hidden.float(), torch.empty(n, c)
    of = products(lambda isa: ours.multiply_bf16(hidden, weight.T, out, isa=isa))
    return hidden.double() @ weight.double().T, of | {
        "cream torch": lambda: torch.mm(wide, weight.float().T, out=out),
    }


def product(left: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Callable]]:
    out, truth = torch.empty(left.shape[0], right.shape[1]), left.double() @ right.double()
    if ours.why_not_multiply_bf16(left, right) is None:
        left = left.contiguous()  # products.py transposes it for either
        return truth, {
            "native": lambda: ours.multiply_bf16(left, right, out),
            "cream torch": lambda: out.copy_(torch.mm(left, right)),
        }
    return truth, {
        "native": lambda: ours.multiply(left, right, out),
        "cream torch": lambda: torch.mm(left.float(), right.float(), out=out),
    }


def product_logits(n: int, D: int, c: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    hidden, weight, _ = problem(n, D, c)
    return product(hidden.to(dtype), weight.to(dtype).T)


def product_dhidden(n: int, D: int, c: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    hidden, weight, _ = problem(n, D, c)
    return product((hidden @ weight.T).to(dtype), weight.to(dtype))


def product_dweight(n: int, D: int, c: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    hidden, weight, _ = problem(n, D, c)
    return product((hidden @ weight.T).to(dtype).T, hidden.to(dtype))


PRODUCTS = {"logits": product_logits, "dhidden of a tile": product_dhidden, "dweight of a tile": product_dweight}


def why_not(asked: Callable[[Tensor, Tensor], str | None], dtype: torch.dtype) -> str | None:
    """Of operands as large as a tile."""
    operand = torch.empty(TILE, dtype=dtype)
    return asked(operand, operand)


def fold_of_a_tile(n: int, c: int) -> tuple[Tensor, dict[str, Callable]]:
    """The sum of exponentials. Copying the logits into the tile is timed with it."""
    g = torch.Generator().manual_seed(2)
    logits, columns = torch.randn(n, c, generator=g) * 3, torch.randint(-24 * c, 24 * c, (n,), generator=g)
    tile, state = torch.empty(n, c), torch.empty(3, n)

    def run(fold: Callable) -> Tensor:
        for values, start in zip(state, (torch.finfo(torch.float32).min, 0, torch.nan), strict=True):
            values.fill_(start)
        fold(tile.copy_(logits), columns, *state)
        return state[1]

    rest = logits.double()
    mine = ((columns >= 0) & (columns < c)).nonzero()[:, 0]
    rest[mine, columns[mine]] = -torch.inf
    truth = (rest - rest.amax(1, keepdim=True)).exp().sum(1)
    return truth, {"native": lambda: run(ours.fold_tile_), "cream torch": lambda: run(fold_torch_)}


def scale_of_a_tile(n: int, c: int) -> tuple[Tensor, dict[str, Callable]]:
    """Rows of a bfloat16 tile times a float32 each, rounded once."""
    g = torch.Generator().manual_seed(3)
    tile, scale = torch.rand(n, c, generator=g).bfloat16(), torch.randn(n, generator=g)
    out = torch.empty_like(tile)

    def in_torch() -> Tensor:
        return out.copy_(tile.float().mul_(scale[:, None]))

    def in_cpp() -> Tensor:
        ours.scale_rows(tile, scale, out)
        return out

    return tile.double() * scale.double()[:, None], {"native": in_cpp, "cream torch": in_torch}


def rows_of_logits(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    """gather_logp's two passes: over logits that are only read, then over the same to write their gradient."""
    g = torch.Generator().manual_seed(5)
    logits, targets = (torch.randn(N, V, generator=g) * 3).to(dtype), torch.randint(V, (N,), generator=g)

    def run() -> Tensor:
        given = logits.detach().requires_grad_()
        return torch.autograd.grad(gather_logp(given, targets).sum(), given)[0]

    def in_torch() -> Tensor:
        with without_library():
            return run()

    truth = -logits.double().softmax(1)
    truth[torch.arange(N), targets] += 1
    return truth, {"native": run, "cream torch": in_torch}


def decoding(A: int, U: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Callable]]:
    """One layer's attention of SmolLM2-135M for A new tokens, five answers to a prompt, over U columns in use."""
    H, K, E, R = 9, 3, 64, 5
    g = torch.Generator().manual_seed(4)
    prompt = U // 2
    keys, values = (torch.randn(A // R, K, U, E, generator=g).repeat_interleave(R, 0).to(dtype) for _ in range(2))
    query, key, value = (torch.randn(A, heads, E, generator=g).to(dtype) for heads in (H, K, K))
    slot = torch.arange(A)
    rows = torch.stack([slot, slot // R * R, torch.full_like(slot, prompt), torch.full_like(slot, U)])
    given, scale = (query, key, value, keys, values), E**-0.5
    visible = visible_columns(rows, A)
    truth = reference.decode_attention(*(x.double() for x in given), rows, scale=scale)
    return truth, {
        "native": lambda: decode_attention(*given, rows, scale=scale),
        "cream torch": lambda: decode_attention_torch(*given, slot, visible, scale),
    }


def check(truth: Tensor, run: dict[str, Callable]) -> dict[str, float]:
    """Each implementation's relative error; stops where the native one's is the larger."""
    errors = {}
    for name in run.keys() - {LOGITS_ONLY}:
        errors[name] = float((run[name]() - truth).norm() / truth.norm())
    assert errors["native"] <= 1.25 * errors["cream torch"] + 1e-7, errors
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pieces", nargs="*", help="only those whose name begins so")
    args = parser.parse_args()
    if reason := ours.why_not_fold(torch.empty(1, 2)):
        raise SystemExit(f"nothing to measure: {reason}")
    n, c = TILE
    pieces = [("fold tile", [n, c], partial(fold_of_a_tile, n, c))]
    pieces += [("scale rows of a tile", [n, c], partial(scale_of_a_tile, n, c))]
    for name in ("float32", "bfloat16"):
        of_logits = partial(rows_of_logits, n, VOCABULARY, getattr(torch, name))
        pieces.append((f"gather_logp and gradient, {name}", [n, VOCABULARY], of_logits))
        pieces.append((f"decode attention, {name}", [160, 150], partial(decoding, 160, 150, getattr(torch, name))))
    for model in args.models:
        D, V = MODELS[model]
        if why_not(ours.why_not, torch.bfloat16) is None:
            pieces += [(f"score, {model}", [N, D, V], partial(head, N, D, V)) for N in args.rows]
            pieces += [(f"logits tile, {model}", [n, D, c], partial(tile_of_logits, n, D, c))]
        for dtype in (torch.float32, torch.bfloat16):
            if None in (why_not(ours.why_not_multiply, dtype), why_not(ours.why_not_multiply_bf16, dtype)):
                pieces += [
                    (f"{name}, {str(dtype).removeprefix('torch.')}, {model}", [n, D, c], partial(make, n, D, c, dtype))
                    for name, make in PRODUCTS.items()
                ]
    rows = []
    for piece, shape, prepare in pieces:
        if args.pieces and not piece.startswith(tuple(args.pieces)):
            continue
        truth, run = prepare()
        errors = check(truth, run)
        for threads in args.threads:
            torch.set_num_threads(threads)
            known = harness.facts("cpu") | {"piece": piece, "shape": shape}
            repeats = args.repeats if run.keys() & {LOGITS_ONLY} else 10 * args.repeats  # a tile takes milliseconds
            for name, ms in harness.interleave(run, repeats, "cpu").items():
                row = known | {"impl": name, "error": errors.get(name)} | harness.spread(ms)
                rows.append(row)
                times = f"{row['ms']:9.3f} ms  ({row['p20']:.3f} to {row['p80']:.3f})"
                print(f"{piece:25} {shape!s:18} {threads} threads  {name:16} {times}", flush=True)
    harness.record("native", rows)


if __name__ == "__main__":
    main()
