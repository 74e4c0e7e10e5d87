"""Triton kernels of weighted_dpo and linear_weighted_dpo, and the latter's body on CUDA.

P pairs, N tokens (rows) of 2P sequences in the order chosen, rejected, chosen, ...; D hidden size, V vocabulary.
Nothing here waits for the host: what Python needs to know are the bounds of the sequences, which packing made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .gather_logp_triton import gradient_into, log1p, over, statistics
from .linear_logp_triton import product


@triton.jit
def pair_loss(margin, agreement):
    """loss and dloss/dmargin of weighted_dpo.py, from one exponential."""
    e = tl.exp(-tl.abs(margin))
    tail = log1p(e)
    loss = agreement * (tl.maximum(-margin, 0.0) + tail) + (1.0 - agreement) * (tl.maximum(margin, 0.0) + tail)
    more, less = 1.0 / (1.0 + e), e / (1.0 + e)
    up = tl.where(margin >= 0.0, more, less)  # sigmoid(margin)
    down = tl.where(margin >= 0.0, less, more)  # sigmoid(-margin)
    return loss, (1.0 - agreement) * up - agreement * down


@triton.jit
def weighted_dpo_kernel(
    margin,  # (P,) float32
    agreement,  # (P,) float32
    loss,  # (P,) float32 out
    slope,  # (P,) float32 out
    P,
    margin_stride,
    agreement_stride,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < P
    m = tl.load(margin + pair * margin_stride, mask=mask, other=0.0)
    c = tl.load(agreement + pair * agreement_stride, mask=mask, other=0.0)
    pair_value, pair_slope = pair_loss(m, c)
    tl.store(loss + pair, pair_value, mask=mask)
    tl.store(slope + pair, pair_slope, mask=mask)


@triton.jit
def sum_rows(values, start, end, BLOCK: tl.constexpr):
    """In float64: what ranks responses is a difference of such sums."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(values + rows, mask=rows < end, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def fill_rows(values, start, end, number, BLOCK: tl.constexpr):
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(values + rows, tl.zeros((BLOCK,), tl.float32) + number, mask=rows < end)


@triton.jit
def pairs_kernel(
    row_logp,  # (N,) float32
    cu_seqlens,  # (2P + 1,) int64
    reference_logp,  # (2P,) float32
    agreement,  # (P,) float32
    loss,  # (P,) float32 out
    logp,  # (2P,) float32 out
    row_grad,  # (N,) float32 out: dloss/dlogp of each row
    first_pair,
    reference_stride,
    agreement_stride,
    beta,
    BLOCK: tl.constexpr,
):
    pair = first_pair + tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + 2 * pair)
    middle = tl.load(cu_seqlens + 2 * pair + 1)
    end = tl.load(cu_seqlens + 2 * pair + 2)
    chosen = sum_rows(row_logp, start, middle, BLOCK).to(tl.float32)
    rejected = sum_rows(row_logp, middle, end, BLOCK).to(tl.float32)
    chosen_ratio = chosen - tl.load(reference_logp + 2 * pair * reference_stride)
    rejected_ratio = rejected - tl.load(reference_logp + (2 * pair + 1) * reference_stride)
    pair_value, slope = pair_loss(beta * (chosen_ratio - rejected_ratio), tl.load(agreement + pair * agreement_stride))
    tl.store(loss + pair, pair_value)
    tl.store(logp + 2 * pair, chosen)
    tl.store(logp + 2 * pair + 1, rejected)
    fill_rows(row_grad, start, middle, beta * slope, BLOCK)
    fill_rows(row_grad, middle, end, -beta * slope, BLOCK)


def loss_and_slope(margin: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:  # (P,) float32 each
    """weighted_dpo.loss_and_slope in one launch."""
    flat, c = margin.reshape(-1), agreement.reshape(-1)
    loss, slope = (torch.empty_like(margin, memory_format=torch.contiguous_format) for _ in range(2))
    if flat.numel():
        weighted_dpo_kernel[(triton.cdiv(flat.numel(), tiles.PAIR_BLOCK),)](
            margin=flat,
            agreement=c,
            loss=loss,
            slope=slope,
            P=flat.numel(),
            margin_stride=flat.stride(0),
            agreement_stride=c.stride(0),
            BLOCK=tiles.PAIR_BLOCK,
            num_warps=4,
            **tiles.OPTIONS,
        )
    return loss, slope


def forward(
    hidden: Tensor,  # (N, D), ignored rows zeroed
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64, IGNORE where a row counts for nothing
    cu_seqlens: Tensor,  # (2P + 1,) int64, on hidden's device
    chunks: list[tuple[int, int, slice]],  # first pair, end, and rows of each chunk
    reference_logp: Tensor,  # (2P,) float32
    agreement: Tensor,  # (P,) float32
    beta: float,
    need_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[Tensor, ...]]:
    """loss (P,), logp (2P,), dhidden (N, D), dweight (V, D); of each row (N,) dloss/dlogp, logp, maximum, others."""
    num_rows, V = hidden.shape[0], weight.shape[0]
    longest = max((rows.stop - rows.start for *_, rows in chunks), default=0)
    buffer = hidden.new_empty((longest, V), dtype=torch.float32)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    loss, logp = agreement.new_empty(agreement.shape[0]), reference_logp.new_empty(reference_logp.shape[0])
    row_grad, row_logp, maximum, others = row_values = tuple(loss.new_empty(num_rows) for _ in range(4))
    for first_pair, end_pair, rows in chunks:
        # Up: the chunk's logits and what is left of each row.
        logits = product(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
        chunk_statistics = statistics(logits, targets[rows], None, 1.0, 0.0, want_entropy=False)[:3]
        for values, of_chunk in zip(row_values[1:], chunk_statistics, strict=True):
            values[rows] = of_chunk
        # The turn: every sequence of the chunk is complete, so each row's factor is known.
        pairs_kernel[(end_pair - first_pair,)](
            row_logp=row_logp,
            cu_seqlens=cu_seqlens,
            reference_logp=reference_logp,
            agreement=agreement,
            loss=loss,
            logp=logp,
            row_grad=row_grad,
            first_pair=first_pair,
            reference_stride=reference_logp.stride(0),
            agreement_stride=agreement.stride(0),
            beta=beta,
            BLOCK=tiles.PAIR_BLOCK,
            num_warps=4,
            **tiles.OPTIONS,
        )
        # Down: the logits become dloss/dlogits in place and are multiplied out.
        coefficients = over(logits, hidden.dtype)
        gradient_into(coefficients, row_grad[rows], logits, targets[rows], None, *chunk_statistics, 1.0, 0.0)
        if dhidden is not None:
            product(coefficients, weight, out=dhidden[rows])
        product(coefficients.T, hidden[rows], out=dweight, add=True)
    return loss, logp, dhidden, dweight, row_values
