"""Triton kernels over rows of logits that exist: statistics in one read, gradients in one read and one write.

N rows, V vocabulary. One program a row. gather_logp uses them as they are, linear_logp and linear_weighted_dpo as the
epilogues of the vendor's matrix product. The algebra is that of linear_logp.py: the target stays out of the sum, and
three numbers a row (logp, maximum, others) are all that the gradient needs.

Every index is int64 before it meets a stride: N x V passes 2^31 at 16,744 rows of 128,256.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .reference import IGNORE

_IGNORE = tl.constexpr(IGNORE)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # where a maximum starts: -inf - -inf would be nan


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to float32 rounding: tl.log(1 + x) alone loses what 1 + x rounds away (Kahan's trick)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 to float32 rounding: by the same trick near 0, where exp(x) - 1 alone would cancel."""
    u = tl.exp(x)
    near = (x > -0.7) & (u != 1.0)
    ratio = x / tl.log(tl.where(near, u, 0.5))
    return tl.where(u == 1.0, x, tl.where(near, (u - 1.0) * ratio, u - 1.0))


@triton.jit
def tanh(x):
    """To float32 rounding, by its series near 0, where (1 - t) / (1 + t) would cancel."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    s = x * x
    near = x * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


@triton.jit
def squash(x, factor, ceiling, CAPPED: tl.constexpr):
    """The logit z of a product x: factor * x, or ceiling * tanh(factor * x)."""
    if CAPPED:
        return ceiling * tanh(factor * x)
    else:
        return factor * x


@triton.jit
def squash_slope(z, factor, ceiling, CAPPED: tl.constexpr):
    """dz/dx, from z."""
    if CAPPED:
        return factor * (ceiling - z * z / ceiling)
    else:
        return factor


@triton.jit
def finish(maximum, others, target_logit):
    """logp: log sigmoid of the target against the others, which does not cancel."""
    d = (target_logit - maximum) - tl.log(others)
    return tl.minimum(d, 0.0) - log1p(tl.exp(-tl.abs(d)))


@triton.jit
def share_of_others(logp, others):
    """p_v / exp(z_v - maximum) for v != target, and 0 where there are no others."""
    return tl.where(others == 0.0, 0.0, -expm1(logp) / others)


@triton.jit
def finish_entropy(logp, others, above, moment):
    """-sum p log p, the target's part as -logp + (1 - p_y) above; where p_y is 0, above is -inf."""
    of_target = tl.where(above == float("-inf"), tl.log(others), -logp - expm1(logp) * above)
    return of_target - moment * share_of_others(logp, others)


@triton.jit
def statistics_kernel(
    logits,  # (N, V)
    targets,  # (N,) int64
    bias,  # (V,) or unused
    logp,  # (N,) float32 out, as the next three
    maximum,
    others,
    entropy,  # or unused
    V,
    row_stride,
    column_stride,
    target_stride,
    factor,
    ceiling,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row * target_stride)
    if target == _IGNORE:
        tl.store(logp + row, 0.0)
        tl.store(maximum + row, 0.0)
        tl.store(others + row, 0.0)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
    else:
        highest = LOWEST
        total = 0.0
        moment = 0.0
        target_logit = float("nan")  # stays so where no column is the target
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK).to(tl.int64)
            x = tl.load(logits + row * row_stride + columns * column_stride, mask=columns < V, other=0.0).to(tl.float32)
            if BIAS:
                x += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
            z = squash(x, factor, ceiling, CAPPED)
            own = columns == target
            if (target >= start) & (target < start + BLOCK) & (target < V):
                target_logit = tl.sum(tl.where(own, z, 0.0), 0)
            z = tl.where(own | (columns >= V), float("-inf"), z)
            before = highest
            highest = tl.maximum(before, tl.max(z, 0))
            shrink = tl.exp(before - highest)
            e = tl.exp(z - highest)
            if ENTROPY:
                moment = shrink * (moment + total * (before - highest))
                moment += tl.sum(tl.where(e == 0.0, 0.0, e * (z - highest)), 0)
            total = total * shrink + tl.sum(e, 0)
        row_logp = finish(highest, total, target_logit)
        tl.store(logp + row, row_logp)
        tl.store(maximum + row, highest)
        tl.store(others + row, total)
        if ENTROPY:
            tl.store(entropy + row, finish_entropy(row_logp, total, target_logit - highest, moment))


@triton.jit
def gradient_kernel(
    logits,  # (N, V)
    gradient,  # (N, V) out; may be the logits' own bytes, row by row
    targets,  # (N,) int64
    bias,  # (V,) or unused
    grad,  # (N,) float32, upstream of logp
    logp,  # (N,) float32, as the next two
    maximum,
    others,
    V,
    row_stride,
    column_stride,
    gradient_row_stride,
    gradient_column_stride,
    target_stride,
    grad_stride,
    factor,
    ceiling,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row * target_stride)
    ignored = target == _IGNORE
    upstream = tl.load(grad + row * grad_stride)
    shift = tl.load(maximum + row)
    row_logp = tl.load(logp + row)
    at_target = -upstream * expm1(row_logp)
    at_others = -upstream * share_of_others(row_logp, tl.load(others + row))
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = columns < V
        x = tl.load(logits + row * row_stride + columns * column_stride, mask=mask & (not ignored), other=0.0)
        x = x.to(tl.float32)
        if BIAS:
            x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        z = squash(x, factor, ceiling, CAPPED)
        # onehot - p, formed in float32 and rounded once, on the way out
        d = tl.where(columns == target, at_target, at_others * tl.exp(z - shift))
        d *= squash_slope(z, factor, ceiling, CAPPED)
        d = tl.where(ignored, 0.0, d)
        # Half-precision gradients over float32 logits: the first block's bytes lie under logits that other threads of
        # this program may still have to read.
        tl.debug_barrier()
        out = gradient + row * gradient_row_stride + columns * gradient_column_stride
        tl.store(out, d.to(gradient.dtype.element_ty), mask=mask)


def statistics(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    factor: float,
    ceiling: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, maximum, others, entropy: (N,) float32; entropy (0,) unless wanted
    N, V = logits.shape
    logp, maximum, others = (logits.new_empty(N, dtype=torch.float32) for _ in range(3))
    entropy = logp.new_empty(N if want_entropy else 0)
    if N:
        statistics_kernel[(N,)](
            logits=logits,
            targets=targets,
            bias=logits if bias is None else bias.contiguous(),
            logp=logp,
            maximum=maximum,
            others=others,
            entropy=entropy if want_entropy else logp,
            V=V,
            row_stride=logits.stride(0),
            column_stride=logits.stride(1),
            target_stride=targets.stride(0),
            factor=factor,
            ceiling=ceiling,
            BIAS=bias is not None,
            CAPPED=ceiling > 0,
            ENTROPY=want_entropy,
            BLOCK=row_block(V),
            num_warps=tiles.ROW_WARPS,
            **tiles.OPTIONS,
        )
    return logp, maximum, others, entropy


def gradient_into(
    gradient: Tensor,  # (N, V) out
    grad: Tensor,  # (N,) float32, upstream of logp
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    logp: Tensor,  # (N,) float32, as the next two
    maximum: Tensor,
    others: Tensor,
    factor: float,
    ceiling: float,
) -> None:
    """Write dlogits. gradient may be logits, or share each row's bytes with it in a narrower dtype (`over`)."""
    N, V = logits.shape
    if N == 0:
        return
    gradient_kernel[(N,)](
        logits=logits,
        gradient=gradient,
        targets=targets,
        bias=logits if bias is None else bias.contiguous(),
        grad=grad,
        logp=logp,
        maximum=maximum,
        others=others,
        V=V,
        row_stride=logits.stride(0),
        column_stride=logits.stride(1),
        gradient_row_stride=gradient.stride(0),
        gradient_column_stride=gradient.stride(1),
        target_stride=targets.stride(0),
        grad_stride=grad.stride(0),
        factor=factor,
        ceiling=ceiling,
        BIAS=bias is not None,
        CAPPED=ceiling > 0,
        BLOCK=row_block(V),
        num_warps=tiles.ROW_WARPS,
        **tiles.OPTIONS,
    )


def over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, V) of dtype in the bytes of contiguous wider logits (N, V): each row in the first part of its own row."""
    return logits.view(dtype)[:, : logits.shape[1]]


def row_block(V: int) -> int:
    return min(tiles.ROW_BLOCK, max(16, triton.next_power_of_2(V)))
