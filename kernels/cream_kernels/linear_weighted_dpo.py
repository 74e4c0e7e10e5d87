"""linear_weighted_dpo: from hidden states to the loss of each pair and its gradients, in one pass over whole pairs.

P pairs, N tokens (rows) of 2P sequences in the order chosen, rejected, chosen, ...; D hidden size, V vocabulary. Here
are the public function and its operators; linear_weighted_dpo_torch.py has the body for CPUs, weighted_dpo_triton.py
that for CUDA. The loss is that of weighted_dpo.py, the log-probs are those of linear_logp.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from . import tiles
from .linear_logp import (
    NAMESPACE,
    WAITS,
    _linear_logp_backward,
    cast_for_autocast,
    check_linear,
    linear_logp,
    triton_serves,
)
from .linear_logp_torch import rows_that_count, scatter_rows, tile_shape
from .linear_weighted_dpo_torch import PLAIN, Blocks, forward, margin_of, multiply_out, pair_chunks, sum_sequences
from .products import transposed_room, wide_dtype
from .reference import IGNORE
from .weighted_dpo import constant, weighted_dpo

CHUNK_ROWS = 1024  # at least, of a CPU's chunks


def linear_weighted_dpo(
    hidden: Tensor,  # (N, D) last hidden states, float32, bfloat16, float16 (not on CPU) or float64
    weight: Tensor,  # (V, D) LM head, same dtype
    targets: Tensor,  # (N,) int64 in [0, V), IGNORE where a row counts for nothing
    cu_seqlens: Tensor,  # (2P + 1,) int32 or int64: 0, then where each sequence ends; on the CPU for preference
    reference_logp: Tensor,  # (2P,) nats, the reference model's log-prob of each sequence
    agreement: Tensor | float,  # (P,) or () in [0, 1]
    *,
    beta: float,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:  # loss (P,), logp (2P,) nats, float32 (float64 for float64 inputs)
    """weighted_dpo of the sequences' log-probs, straight from hidden states.

    Defined by reference.linear_weighted_dpo. Differentiable in hidden and weight through loss, under any upstream
    gradient; logp is for metrics and carries none.

    Works on whole pairs, up to chunk_tokens rows at a time (2,048 on CUDA, on a CPU the larger of 1,024 and D, in half
    precision all rows up to 2 D more; a longer pair is a chunk of its own): logits, sums, loss, and, as each pair's
    coefficient is then known, the gradient over the logits and its two products: 6NDV floating-point operations where
    recomputing takes 8NDV. Logits are plain products: for a head with bias, scale or softcap take linear_logp +
    weighted_dpo.

    Memory is the two gradients and a chunk's logits: in float32 on CUDA, with a copy of hidden, on a CPU in the dtype
    of the inputs, and in dweight's own memory where one chunk of at most D rows is all. During the forward half
    precision also needs a float32 sum of dweight, on a CPU only over several chunks. A backward that retains its graph
    makes dweight anew.

    On a CPU where one chunk is all, the two products wait for backward: any upstream is exact, and multiplied in before
    anything is rounded. Elsewhere those gradients are for an upstream of 1. dhidden takes any upstream exactly, a
    pair's rows times its own. dweight has summed over pairs, so one factor for all pairs (loss.sum(), loss.mean(),
    divided by anything) scales it, but different ones do not: then, and only then, dweight is made again from
    recomputed logits, exactly, for 4NDV more. What differs by pair and is known beforehand belongs in agreement or in
    linear_logp + weighted_dpo.

    With a frozen head (weight needs no gradient) this is linear_logp + weighted_dpo: 4NDV, exact for every upstream.

    So is float16: gradients for an upstream of 1 would be rounded before a loss scaler's factor keeps them from 0.

    On a GPU nothing is read back if cu_seqlens is on the CPU, where packing made it, and the upstream is one number
    expanded (loss.sum() times anything); otherwise the sizes are read once and backward reads one bool. (Where it is
    linear_logp + weighted_dpo, that finds the rows that count and waits.) IGNORE rows are skipped on a CPU; elsewhere
    finding them would mean waiting, so they cost as much as others: leave prompts out.

    Raises ValueError as linear_logp does, for cu_seqlens that do not divide the N rows, and for a reference_logp or
    agreement that asks for a gradient.
    """
    hidden, weight, _ = cast_for_autocast(hidden, weight)
    check_linear(hidden, weight, targets)
    num_sequences = cu_seqlens.shape[0] - 1 if cu_seqlens.dim() == 1 else -1
    if num_sequences < 0 or num_sequences % 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (2P + 1,) integers, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if reference_logp.shape != (num_sequences,):
        shape = tuple(reference_logp.shape)
        raise ValueError(f"reference_logp must be ({num_sequences},), one a sequence, not {shape}")
    dtype = wide_dtype(hidden)
    agreement = constant(agreement, dtype, hidden.device)
    if agreement.dim() > 0 and agreement.shape != (num_sequences // 2,):
        raise ValueError(f"agreement must be () or ({num_sequences // 2},), one a pair, not {tuple(agreement.shape)}")
    if torch.is_grad_enabled() and (reference_logp.requires_grad or agreement.requires_grad):
        raise ValueError("reference_logp and agreement are constants of the loss: detach them")
    if chunk_tokens is None:
        chunk_tokens = tiles.CHUNK_ROWS if hidden.is_cuda else _chunk_on_a_cpu(hidden)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    agreement = agreement.expand(num_sequences // 2)
    reference_logp = reference_logp.to(hidden.device, dtype)
    if torch.is_grad_enabled() and weight.requires_grad and not _loses_small_gradients(hidden.dtype):
        loss, logp, *_ = _linear_weighted_dpo(
            hidden,
            weight,
            targets,
            cu_seqlens,
            reference_logp,
            agreement,
            float(beta),
            chunk_tokens,
            hidden.requires_grad,
        )
        return loss, logp
    rows = linear_logp(hidden, weight, targets)
    logp = sum_sequences(rows, _sequence_of_row(cu_seqlens, rows), num_sequences)
    return weighted_dpo(margin_of(logp, reference_logp, beta), agreement), logp.detach()


def _loses_small_gradients(dtype: torch.dtype) -> bool:
    """Whether dtype has nothing for what a loss scaler is there to keep: below 6e-8, float16."""
    return dtype == torch.float16


def _chunk_on_a_cpu(hidden: Tensor) -> int:  # (N, D)
    """Of one chunk, D rows need no room of their own, and a dweight in half precision no float32 sum, in whose place
    are 2 D more rows of logits."""
    num_rows, D = hidden.shape
    rows = max(CHUNK_ROWS, D)
    return num_rows if hidden.dtype.itemsize == 2 and rows < num_rows <= rows + 2 * D else rows


def _checked_bounds(cu_seqlens: Tensor, num_rows: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {num_rows} rows of hidden, not {bounds}")
    return bounds


@torch.library.custom_op(
    f"{NAMESPACE}::sequence_of_row", mutates_args=(), schema="(Tensor cu_seqlens, Tensor rows) -> Tensor", tags=WAITS
)
def _sequence_of_row(cu_seqlens, rows):
    """(S + 1,), (N, ...) -> (N,) int64 on the device of rows. An operator, since it looks at values and may refuse."""
    lengths = torch.tensor(_checked_bounds(cu_seqlens, rows.shape[0])).diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(rows.device, non_blocking=True)


@_sequence_of_row.register_fake
def _(cu_seqlens, rows):
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


def reading_is_free(tensor: Tensor) -> bool:
    """Whether Python may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def _room(hidden: Tensor) -> int:  # (N, D)
    """Rows of logits that what is held for backward has room for: where D do, it is dweight's own memory."""
    return max(hidden.shape)


def _defers(hidden: Tensor, num_pairs: int, chunk_tokens: int) -> bool:
    """Whether backward multiplies out: on a CPU, where all rows are one chunk."""
    num_rows = hidden.shape[0]
    return reading_is_free(hidden) and 0 < num_rows and (num_rows <= chunk_tokens or num_pairs == 1)


def _num_tiles(weight: Tensor, num_rows: int) -> int:
    return -(-weight.shape[0] // tile_shape(weight.device, weight.dtype, num_rows)[1])


def _run(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden):
    num_rows, dtype, model_dtype = hidden.shape[0], wide_dtype(hidden), hidden.dtype
    bounds, sequence = cu_seqlens.tolist(), _sequence_of_row(cu_seqlens, hidden)
    held = None
    if _defers(hidden, agreement.shape[0], chunk_tokens):
        held = weight.new_empty(weight.shape[0], _room(hidden))
    kept = ignored = None
    if reading_is_free(targets):
        kept = rows_that_count(targets, weight.shape[0])
        if kept is not None:
            before = functional.pad((targets != IGNORE).cumsum(0), (1, 0))  # rows that count, before each row
            bounds = before[bounds].tolist()
            hidden, targets, sequence = (rows.index_select(0, kept) for rows in (hidden, targets, sequence))
    else:
        ignored = targets == IGNORE
        # Zeroed, so that they add nothing to dweight, nan or not; backward masks their dhidden.
        hidden, targets = hidden.masked_fill(ignored[:, None], 0.0), targets.masked_fill(ignored, 0)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, logp, dhidden, dweight, highest, row_values = forward(
            hidden,
            weight,
            Blocks.of(weight, num_rows),
            targets,
            ignored,
            bounds,
            sequence,
            reference_logp,
            agreement,
            beta,
            chunk_tokens,
            need_hidden,
            held,
        )
    dhidden = hidden.new_empty(0) if dhidden is None else scatter_rows(dhidden, kept, num_rows, model_dtype)
    row_values = [scatter_rows(values, kept, num_rows, dtype) for values in (highest, *row_values)]
    return loss, logp, dhidden, held if dweight is None else dweight.to(model_dtype), *row_values


_linear_weighted_dpo = torch.library.custom_op(
    f"{NAMESPACE}::linear_weighted_dpo",
    _run,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor cu_seqlens, Tensor reference_logp, Tensor agreement,"
    " float beta, int chunk_tokens, bool need_hidden) -> (Tensor loss, Tensor logp, Tensor dhidden, Tensor dweight,"
    " Tensor highest, Tensor row_grad, Tensor row_logp, Tensor row_maximum, Tensor row_others)",
    tags=WAITS,
)


@_linear_weighted_dpo.register_kernel("cuda")
def _run_on_cuda(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden):
    if not triton_serves(hidden):
        return _run(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden)
    from . import weighted_dpo_triton

    bounds = _checked_bounds(cu_seqlens, hidden.shape[0])
    # Ignored rows are zeroed, nan or not: their coefficients are 0, and 0 * nan would reach dweight.
    hidden = hidden.masked_fill((targets == IGNORE)[:, None], 0.0)
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        loss, logp, dhidden, dweight, row_values = weighted_dpo_triton.forward(
            hidden,
            weight,
            targets,
            torch.tensor(bounds).to(hidden.device, non_blocking=True),
            pair_chunks(bounds, chunk_tokens),
            reference_logp,
            agreement,
            beta,
            need_hidden,
        )
    highest = row_values[0].new_empty(hidden.shape[0], 0)
    dhidden = hidden.new_empty(0) if dhidden is None else dhidden
    return loss, logp, dhidden, dweight.to(weight.dtype), highest, *row_values


@_linear_weighted_dpo.register_fake
def _(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden):
    defers, num_rows = _defers(hidden, agreement.shape[0], chunk_tokens), hidden.shape[0]
    wide = functools.partial(hidden.new_empty, dtype=wide_dtype(hidden))
    return (
        torch.empty_like(agreement, memory_format=torch.contiguous_format),
        torch.empty_like(reference_logp, memory_format=torch.contiguous_format),
        hidden.new_empty(hidden.shape if need_hidden and not defers else 0),
        weight.new_empty(weight.shape[0], _room(hidden) if defers else weight.shape[1]),
        wide(num_rows, _num_tiles(weight, num_rows) if defers else 0),
        *(wide(num_rows) for _ in range(4)),
    )


def _one_factor(grad: Tensor) -> Tensor:
    """What all of grad is, wide as it is, also beside a half-precision operand.

    There a tensor without dimensions is rounded to that operand's dtype first, except on a CPU, where one with
    dimensions takes 15 times as long.
    """
    factor = grad[:1].sum()  # 0 of no pairs
    return factor if factor.device.type == "cpu" else factor.reshape(1)


def _is_one_number(grad: Tensor, may_wait: bool) -> bool:
    return grad.shape[0] < 2 or grad.stride(0) == 0 or (may_wait and bool((grad == grad[0]).all()))


def _multiply_later(
    grad: Tensor,  # (P,) wide, upstream of loss
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    held: Tensor,  # (V, room), as _run left it, as the next five
    highest: Tensor,  # (N, tiles)
    row_grad: Tensor,  # (N,)
    row_logp: Tensor,
    row_maximum: Tensor,
    row_others: Tensor,
    need_hidden: bool,
    ends: bool,  # whether held is of no more use, so that it may become dweight
) -> tuple[Tensor, Tensor]:  # dhidden (N, D) or, where not needed, (0,); dweight (V, D)
    (num_rows, D), V = hidden.shape, weight.shape[0]
    rows = grad[_sequence_of_row(cu_seqlens, hidden) // 2] * row_grad, row_logp, row_maximum, row_others
    kept, model_dtype = rows_that_count(targets, V), hidden.dtype
    if kept is not None:
        hidden, targets, highest, *rows = (x.index_select(0, kept) for x in (hidden, targets, highest, *rows))
    blocks, inside = Blocks.of(weight, num_rows), held.shape[1] == D
    of_a_block = len(targets) * blocks.most_columns
    across = transposed_room(weight, of_a_block)
    logits = places = blocks.within(held, len(targets))
    if not ends or (inside and across.numel() == 0):
        places = blocks.in_turn(weight.new_empty(of_a_block), len(targets))
    dweight = held if ends and inside else weight.new_empty(weight.shape)
    dhidden = hidden.new_zeros(hidden.shape, dtype=wide_dtype(hidden)) if need_hidden else None
    operands = hidden, weight, targets, *rows, dhidden, dweight
    with torch.autocast(hidden.device.type, enabled=False):
        multiply_out(logits, places, across, highest.unbind(1), blocks, *operands, adds=False)
    return hidden.new_empty(0) if dhidden is None else scatter_rows(dhidden, kept, num_rows, model_dtype), dweight


def _gradients(
    grad, hidden, weight, targets, cu_seqlens, dhidden, dweight, highest, row_grad, row_logp, row_maximum, row_others,
    need_hidden,
):  # fmt: skip
    """The gradients for another upstream than 1, in memory of their own."""
    row_values = row_grad, row_logp, row_maximum, row_others
    given = hidden, weight, targets, cu_seqlens
    if highest.shape[1] > 0:
        return _multiply_later(grad, *given, dweight, highest, *row_values, need_hidden, ends=False)
    of_row = grad[_sequence_of_row(cu_seqlens, hidden) // 2]
    if need_hidden:
        dhidden = (dhidden * of_row[:, None]).to(dhidden.dtype).masked_fill_((targets == IGNORE)[:, None], 0.0)
    else:
        dhidden = dhidden.clone()
    if _is_one_number(grad, may_wait=True):
        return dhidden, torch.mul(dweight, _one_factor(grad), out=torch.empty_like(dweight))
    needs = False, True, False
    _, dweight, _ = _linear_logp_backward(
        of_row * row_grad, hidden, weight, targets, None, *row_values[1:], *PLAIN, *needs
    )
    return dhidden, dweight


_linear_weighted_dpo_backward = torch.library.custom_op(
    f"{NAMESPACE}::linear_weighted_dpo_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor cu_seqlens, Tensor dhidden,"
    " Tensor dweight, Tensor highest, Tensor row_grad, Tensor row_logp, Tensor row_maximum, Tensor row_others,"
    " bool need_hidden) -> (Tensor dhidden, Tensor dweight)",
    tags=WAITS,
)


@_linear_weighted_dpo_backward.register_fake
def _(grad, hidden, weight, *rest):
    *_, need_hidden = rest
    return hidden.new_empty(hidden.shape if need_hidden else 0), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, cu_seqlens, *_, ctx.need_hidden = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # zeros for dweight are as large as itself
    ctx.save_for_backward(hidden, weight, targets, cu_seqlens, *rest[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: under activation checkpointing, looking computes them
    _, _, targets, _, dhidden, dweight, highest, *_ = saved
    # Where nobody will ask for the saved tensors again, they become the results, without a second (V, D).
    ends = type(dweight) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()  # and is not traced
    if ends and highest.shape[1] > 0:
        dhidden, dweight = _multiply_later(grad, *saved[:4], *saved[5:], ctx.need_hidden, ends=True)
    elif ends and _is_one_number(grad, may_wait=reading_is_free(grad)):
        dweight.mul_(_one_factor(grad))
        if ctx.need_hidden:
            dhidden.mul_(_one_factor(grad)).masked_fill_((targets == IGNORE)[:, None], 0.0)
    else:
        dhidden, dweight = _linear_weighted_dpo_backward(grad, *saved, ctx.need_hidden)
    return dhidden if ctx.need_hidden else None, dweight, None, None, None, None, None, None, None


_linear_weighted_dpo.register_autograd(_backward, setup_context=_setup_context)
