"""linear_weighted_dpo: from hidden states to the loss of each pair and its gradients, in one pass over whole pairs.

P pairs, N tokens (rows) of 2P sequences in the order chosen, rejected, chosen, ...; D hidden size, V vocabulary. Here
are the public function, its operators and the torch body; weighted_dpo_triton.py has the body for CUDA. The loss is
that of weighted_dpo.py, the log-probs are those of linear_logp.py.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from . import tiles
from .linear_logp import (
    NAMESPACE,
    _linear_logp_backward,
    cast_for_autocast,
    check_linear,
    linear_logp,
    triton_serves,
)
from .linear_logp_torch import (
    Products,
    Squash,
    Statistics,
    add_product_,
    add_target_weights_,
    fold_tile_,
    rows_at_once,
    rows_that_count,
    scale_rows,
    scatter_rows,
    share_of_others,
    tile_in,
    tile_shape,
    wide_dtype,
)
from .reference import IGNORE
from .weighted_dpo import loss_and_slope, weighted_dpo

_PLAIN = Squash(1.0, 0.0)
BLOCK = 4032  # vocabulary at least that the torch body multiplies out at once: some of a CPU's tiles
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

    Memory is the two gradients and a chunk's logits: in float32 on CUDA, on a CPU in the dtype of the inputs, and in
    dweight's own memory where one chunk of at most D rows is all. During the forward half precision also needs a
    float32 sum of dweight, on a CPU only over several chunks. A backward that retains its graph makes dweight anew.

    Those gradients are for an upstream of 1. dhidden takes any upstream exactly, a pair's rows times its own. dweight
    has summed over pairs, so one factor for all pairs (loss.sum(), loss.mean(), divided by anything) scales it, but
    different ones do not: then, and only then, dweight is made again from recomputed logits, exactly, for 4NDV more.
    What differs by pair and is known beforehand belongs in agreement or in linear_logp + weighted_dpo.

    With a frozen head (weight needs no gradient) this is linear_logp + weighted_dpo: 4NDV, exact for every upstream.

    On a GPU nothing is read back if cu_seqlens is on the CPU, where packing made it, and the upstream is one number
    expanded (loss.sum() times anything); otherwise the sizes are read once and backward reads one bool. IGNORE rows are
    skipped on a CPU; elsewhere finding them would mean waiting, so they cost as much as others: leave prompts out.

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
    agreement = torch.as_tensor(agreement, dtype=dtype, device=hidden.device)
    if agreement.dim() > 0 and agreement.shape != (num_sequences // 2,):
        raise ValueError(f"agreement must be () or ({num_sequences // 2},), one a pair, not {tuple(agreement.shape)}")
    if torch.is_grad_enabled() and (reference_logp.requires_grad or agreement.requires_grad):
        raise ValueError("reference_logp and agreement are constants of the loss: detach them")
    if chunk_tokens is None:
        chunk_tokens = tiles.CHUNK_ROWS if hidden.is_cuda else _chunk_on_a_cpu(hidden)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    agreement = agreement.expand(num_sequences // 2)
    reference_logp = reference_logp.to(dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
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
    logp = _sum_sequences(rows, _sequence_of_row(cu_seqlens, rows), num_sequences)
    return weighted_dpo(_margin(logp, reference_logp, beta), agreement), logp.detach()


def _chunk_on_a_cpu(hidden: Tensor) -> int:  # (N, D)
    """Of one chunk, D rows need no room of their own, and a dweight in half precision no float32 sum, in whose place
    are 2 D more rows of logits."""
    num_rows, D = hidden.shape
    rows = max(CHUNK_ROWS, D)
    return num_rows if hidden.dtype.itemsize == 2 and rows < num_rows <= rows + 2 * D else rows


def _margin(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    ratio = logp - reference_logp
    return beta * (ratio[0::2] - ratio[1::2])


def _sum_sequences(
    rows: Tensor,  # (N,)
    sequence: Tensor,  # (N,) int64, the sequence of each row
    num_sequences: int,
) -> Tensor:  # (S,) in the dtype of rows, summed in float64: what ranks responses is a difference of such sums
    sums = rows.new_zeros(num_sequences, dtype=torch.float64)
    return sums.index_add(0, sequence, rows.double()).to(rows.dtype)


def _checked_bounds(cu_seqlens: Tensor, num_rows: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {num_rows} rows of hidden, not {bounds}")
    return bounds


@torch.library.custom_op(
    f"{NAMESPACE}::sequence_of_row", mutates_args=(), schema="(Tensor cu_seqlens, Tensor rows) -> Tensor"
)
def _sequence_of_row(cu_seqlens, rows):
    """(S + 1,), (N, ...) -> (N,) int64 on the device of rows. An operator, since it looks at values and may refuse."""
    lengths = torch.tensor(_checked_bounds(cu_seqlens, rows.shape[0])).diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(rows.device, non_blocking=True)


@_sequence_of_row.register_fake
def _(cu_seqlens, rows):
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


def _pair_chunks(bounds: list[int], chunk_tokens: int) -> list[tuple[int, int, slice]]:
    """First pair, end and rows of runs of consecutive pairs with at most chunk_tokens rows together, or of one pair."""
    chunks, first, num_pairs = [], 0, len(bounds) // 2
    for pair in range(1, num_pairs + 1):
        if pair == num_pairs or bounds[2 * pair + 2] - bounds[2 * first] > chunk_tokens:
            chunks.append((first, pair, slice(bounds[2 * first], bounds[2 * pair])))
            first = pair
    return chunks


def reading_is_free(tensor: Tensor) -> bool:
    """Whether Python may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def _forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) in [0, V)
    ignored: Tensor | None,  # (N,) bool, rows to count as 0
    bounds: list[int],  # 2P + 1, where each sequence starts, and N
    sequence: Tensor,  # (N,) int64, the sequence of each row
    reference_logp: Tensor,  # (2P,) wide
    agreement: Tensor,  # (P,) wide
    beta: float,
    chunk_tokens: int,
    need_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[Tensor, ...]]:
    """loss (P,), logp (2P,), dhidden (N, D), all wide; dweight (V, D) as it was summed; and of each row (N,), wide:
    dloss/dlogp, logp, maximum and others.
    """
    (V, D), dtype = weight.shape, wide_dtype(hidden)
    most_rows, num_columns = tile_shape(hidden.device, hidden.dtype)
    block_columns = max(BLOCK, num_columns)
    products, wide = Products.of(hidden, weight, None, _PLAIN), functools.partial(hidden.new_empty, dtype=dtype)
    chunks = _pair_chunks(bounds, chunk_tokens)
    longest = max((rows.stop - rows.start for *_, rows in chunks), default=0)
    blocks = [slice(first, min(first + block_columns, V)) for first in range(0, V, block_columns)]
    # Of one chunk, products are rounded once either way, so there is no need of a wide sum.
    summed = weight.dtype if len(chunks) == 1 and reading_is_free(targets) else dtype
    dweight = weight.new_empty(weight.shape, dtype=summed) if chunks else weight.new_zeros(weight.shape)
    # A block of logits becomes a block of dweight. Where there is one chunk, of at most D rows, that is where it lies,
    # until its product is due, which takes it from space.
    inside = len(chunks) == 1 and longest <= D and summed == weight.dtype
    logits = dweight.view(-1) if inside else weight.new_empty(longest * V)
    space = weight.new_empty(longest * block_columns if inside else 0)
    wide_tile = wide(0 if weight.dtype == dtype else min(longest, most_rows) * num_columns)
    dhidden = wide(hidden.shape).zero_() if need_hidden else None
    loss, logp = wide(len(bounds) // 2), wide(len(bounds) - 1)
    row_values = tuple(wide(hidden.shape[0]) for _ in range(4))
    for first_pair, end_pair, rows in chunks:
        pairs, sequences = slice(first_pair, end_pair), slice(2 * first_pair, 2 * end_pair)
        num_rows = rows.stop - rows.start

        # Up: logits, each tile kept as exp(z - highest so far), as in linear_logp.
        statistics, kept, highest = Statistics.empty(num_rows, hidden), [], []
        for columns in blocks:
            start, width = columns.start * (D if inside else num_rows), columns.stop - columns.start
            kept.append(logits[start : start + num_rows * width].view(num_rows, width))
            for first in range(columns.start, columns.stop, num_columns):
                tile = kept[-1][:, first - columns.start :][:, :num_columns]
                _fold_products_(tile, wide_tile, products, rows, first, targets[rows] - first, statistics)
                highest.append(statistics.maximum.clone())
        row_logp, _ = statistics.finish()
        share = share_of_others(row_logp, statistics.others)

        # The turn: every sequence of the chunk is complete, so each row's factor is known.
        if ignored is not None:
            row_logp = row_logp.masked_fill(ignored[rows], 0.0)
        within = sequence[rows] - sequences.start
        logp[sequences] = _sum_sequences(row_logp, within, 2 * (end_pair - first_pair))
        margin = _margin(logp[sequences], reference_logp[sequences], beta)
        loss[pairs], slope = loss_and_slope(margin, agreement[pairs])
        row_grad = beta * torch.stack((slope, -slope), dim=1).flatten()[within]  # chosen, rejected, ...
        for stored, value in zip(row_values, (row_grad, row_logp, statistics.maximum, statistics.others), strict=True):
            stored[rows] = value

        # Down: each tile becomes dloss/dlogits but for the targets, whose part is added in a wide dtype, and each block
        # is multiplied out. The first chunk writes dweight, the others add.
        scales = iter([-row_grad * share * (before - statistics.maximum).exp_() for before in highest])
        for columns, block in zip(blocks, kept, strict=True):
            coefficients = space[: block.numel()].view(block.shape) if inside else block
            for tile, out in zip(block.split(num_columns, 1), coefficients.split(num_columns, 1), strict=True):
                scale_rows(tile, next(scales), out)
            if dhidden is not None:
                add_product_(dhidden[rows], coefficients, weight[columns])
            if first_pair == 0 and summed == weight.dtype:
                torch.mm(coefficients.T, hidden[rows], out=dweight[columns])
            elif first_pair == 0:
                dweight[columns] = torch.mm(coefficients.T, hidden[rows])
            else:
                add_product_(dweight[columns], coefficients.T, hidden[rows])
        at_target = -row_grad * torch.expm1(row_logp)
        if dhidden is not None:
            add_target_weights_(dhidden[rows], at_target, weight, targets[rows])
        _add_rows_(dweight, targets[rows].clamp(0, V - 1), at_target[:, None], hidden[rows])
    return loss, logp, dhidden, dweight, row_values


def _fold_products_(
    kept: Tensor,  # (n, c) becomes exp(logit - highest so far), 0 at the targets
    wide_tile: Tensor,  # room for a tile, or none where kept is wide
    products: Products,
    rows: slice,  # n of the hidden states
    first: int,  # of c columns of the vocabulary
    own: Tensor,  # (n,) target less the first column
    statistics: Statistics,  # of these rows, updated
) -> None:
    """Some rows at a time: in place where kept is wide, else through a tile that is, rounding once."""
    rounds = kept.dtype != wide_tile.dtype
    step, columns = tile_shape(kept.device, kept.dtype)[0], slice(first, first + kept.shape[1])
    for start in range(0, len(own), step):
        part = slice(start, min(start + step, len(own)))
        tile = tile_in(wide_tile, *kept[part].shape) if rounds else kept[part]
        products.into(tile, slice(rows.start + part.start, rows.start + part.stop), columns)
        fold_tile_(tile, own[part], statistics.of(part), kept[part] if rounds else None)


def _add_rows_(
    matrix: Tensor,  # (V, D), updated
    at: Tensor,  # (n,) int64, may repeat
    scale: Tensor,  # (n, 1) wide
    rows: Tensor,  # (n, D)
) -> None:
    """matrix.index_add_(0, at, scale * rows), but rounded once where matrix is in half precision."""
    few_rows = rows_at_once(rows)
    if matrix.dtype == scale.dtype:
        for few, by, some in zip(at.split(few_rows), scale.split(few_rows), rows.split(few_rows), strict=True):
            matrix.index_add_(0, few, by * some)
        return
    which, back = at.unique(return_inverse=True)
    for start in range(0, len(which), few_rows):
        place = which[start : start + few_rows]
        part = ((back >= start) & (back < start + few_rows)).nonzero()[:, 0]
        sums = matrix[place].to(scale.dtype).index_add_(0, back[part] - start, scale[part] * rows[part])
        matrix[place] = sums.to(matrix.dtype)


def _run(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden):
    num_rows, dtype, model_dtype = hidden.shape[0], wide_dtype(hidden), hidden.dtype
    bounds, sequence = cu_seqlens.tolist(), _sequence_of_row(cu_seqlens, hidden)
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
        loss, logp, dhidden, dweight, row_values = _forward(
            hidden,
            weight,
            targets,
            ignored,
            bounds,
            sequence,
            reference_logp,
            agreement,
            beta,
            chunk_tokens,
            need_hidden,
        )
    dhidden = hidden.new_empty(0) if dhidden is None else scatter_rows(dhidden, kept, num_rows, model_dtype)
    row_values = [scatter_rows(values, kept, num_rows, dtype) for values in row_values]
    return loss, logp, dhidden, dweight.to(model_dtype), *row_values


_linear_weighted_dpo = torch.library.custom_op(
    f"{NAMESPACE}::linear_weighted_dpo",
    _run,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor cu_seqlens, Tensor reference_logp, Tensor agreement,"
    " float beta, int chunk_tokens, bool need_hidden) -> (Tensor loss, Tensor logp, Tensor dhidden, Tensor dweight,"
    " Tensor row_grad, Tensor row_logp, Tensor row_maximum, Tensor row_others)",
)


@_linear_weighted_dpo.register_kernel("cuda")
def _run_on_cuda(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden):
    if not triton_serves(hidden):
        return _run(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden)
    from . import weighted_dpo_triton

    bounds = _checked_bounds(cu_seqlens, hidden.shape[0])
    # Ignored rows are zeroed, nan or not: their coefficients are 0, and 0 * nan would reach dweight.
    hidden = hidden.masked_fill((targets == IGNORE)[:, None], 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, logp, dhidden, dweight, row_values = weighted_dpo_triton.forward(
            hidden,
            weight,
            targets,
            torch.tensor(bounds).to(hidden.device, non_blocking=True),
            _pair_chunks(bounds, chunk_tokens),
            reference_logp,
            agreement,
            beta,
            need_hidden,
        )
    return loss, logp, hidden.new_empty(0) if dhidden is None else dhidden, dweight.to(weight.dtype), *row_values


@_linear_weighted_dpo.register_fake
def _(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta, chunk_tokens, need_hidden):
    return (
        torch.empty_like(agreement, memory_format=torch.contiguous_format),
        torch.empty_like(reference_logp, memory_format=torch.contiguous_format),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape),
        *(hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden)) for _ in range(4)),
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


def _scale(grad, hidden, weight, targets, cu_seqlens, dhidden, dweight, *row_values):
    """The gradients for another upstream than 1."""
    of_row = grad[_sequence_of_row(cu_seqlens, hidden) // 2]
    of_row = of_row.masked_fill(targets == IGNORE, 0.0)
    dhidden = (dhidden * of_row[:, None]).to(dhidden.dtype) if dhidden.dim() == 2 else dhidden.clone()
    if _is_one_number(grad, may_wait=True):
        return dhidden, torch.mul(dweight, _one_factor(grad), out=torch.empty_like(dweight))
    row_grad, *statistics = row_values
    needs = False, True, False
    _, dweight, _ = _linear_logp_backward(
        of_row * row_grad, hidden, weight, targets, None, *statistics, *_PLAIN, *needs
    )
    return dhidden, dweight


_linear_weighted_dpo_backward = torch.library.custom_op(
    f"{NAMESPACE}::linear_weighted_dpo_backward",
    _scale,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor cu_seqlens, Tensor dhidden,"
    " Tensor dweight, Tensor row_grad, Tensor row_logp, Tensor row_maximum, Tensor row_others)"
    " -> (Tensor dhidden, Tensor dweight)",
)


@_linear_weighted_dpo_backward.register_fake
def _(grad, hidden, weight, targets, cu_seqlens, dhidden, dweight, *row_values):
    return torch.empty_like(dhidden), torch.empty_like(dweight)


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, cu_seqlens, *_, ctx.need_hidden = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # zeros for dweight are as large as itself
    _, dhidden, dweight, *row_values = rest
    ctx.save_for_backward(hidden, weight, targets, cu_seqlens, dhidden, dweight, *row_values)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: under activation checkpointing, looking computes them
    _, _, targets, _, dhidden, dweight, *_ = saved
    # Where nobody will ask for the saved gradients again, they become the results, without a second (V, D).
    ends = type(dweight) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()  # and is not traced
    if ends and _is_one_number(grad, may_wait=reading_is_free(grad)):
        dweight.mul_(_one_factor(grad))
        if ctx.need_hidden:
            dhidden.mul_(_one_factor(grad)).masked_fill_((targets == IGNORE)[:, None], 0.0)
    else:
        dhidden, dweight = _linear_weighted_dpo_backward(grad, *saved)
    return dhidden if ctx.need_hidden else None, dweight, None, None, None, None, None, None, None


_linear_weighted_dpo.register_autograd(_backward, setup_context=_setup_context)
