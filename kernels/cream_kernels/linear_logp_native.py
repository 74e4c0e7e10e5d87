"""linear_logp's pieces in C++ for CPUs: products that keep float32, and the passes over logits in one.

N tokens (rows), D hidden size, V vocabulary; n rows and c columns of a tile. The algebra stands at the head of
linear_logp.py; the logit of a product x is factor * x or, where ceiling > 0, ceiling * tanh(factor * x).

Callers ask why_not (AVX512-BF16 or AMX: statistics, multiply_bf16 of a transposed right operand, transpose),
why_not_multiply_bf16 (Zen 5: of any), why_not_multiply (AVX2 without AVX-512, or Zen 5: multiply), why_not_fold,
why_not_read or why_not_scale (AVX2: fold_tile_, read_rows and write_gradient, scale_rows and add_rows_) first. No
result depends on the number of threads, which is torch's. Sources: bf16_product, bf16_multiply, linear_logp, multiply,
fold, transpose.cpp.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

FEW_ROWS = 32  # of a left operand, below which a BLAS is more exact than multiply
SHORT_SUM = 256  # below which oneDNN is faster than multiply_bf16


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Why these two cannot go to statistics or multiply_bf16, without a full stop; None where they can."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"the native products are of bfloat16 on a CPU, not {hidden.dtype} on {hidden.device.type}"
    if hidden.shape[1] == 0:
        return "hidden has no columns"
    library = native.load()
    if library is None:
        return native.why_not()
    return None if library.cream_bf16_isa() else "this processor has no AVX512-BF16, or the compiler had none"


def why_not_multiply_bf16(left: Tensor, right: Tensor) -> str | None:
    """The same for multiply_bf16 of a right operand whose rows are dense; where it can and something else is faster,
    that is a reason too."""
    if reason := why_not(left, right):
        return reason
    if left.shape[1] < SHORT_SUM:
        return f"sums of {left.shape[1]} are short"
    return None if native.load().cream_bf16_across_serves() else "this processor has a faster product, or none of such"


def why_not_multiply(left: Tensor, right: Tensor) -> str | None:
    """The same for multiply; where it can and something else is faster, that is a reason too."""
    for operand in (left, right):
        if operand.device.type != "cpu" or operand.dtype not in (torch.float32, torch.bfloat16):
            return f"the native products are of float32 and bfloat16 on a CPU, not {operand.dtype} on {operand.device}"
    if left.shape[0] < FEW_ROWS:
        return f"{left.shape[0]} rows are few"
    library = native.load()
    if library is None:
        return native.why_not()
    return None if _multiply_isa(library, left, right) else "this processor has a faster product, or no AVX2"


def _multiply_isa(library: ctypes.CDLL, left: Tensor, right: Tensor) -> int:
    return library.cream_multiply_isa(torch.bfloat16 in (left.dtype, right.dtype))


def why_not_fold(tile: Tensor) -> str | None:
    """The same for fold_tile_."""
    return _why_no_passes(tile, torch.float32)


def why_not_read(logits: Tensor) -> str | None:
    """The same for read_rows and write_gradient."""
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        return "the columns are not dense"
    return _why_no_passes(logits, torch.float32 if logits.dtype == torch.float32 else torch.bfloat16)


def why_not_scale(tile: Tensor) -> str | None:
    """The same for scale_rows and add_rows_, of the bfloat16 operand."""
    return _why_no_passes(tile, torch.bfloat16)


def _why_no_passes(tile: Tensor, dtype: torch.dtype) -> str | None:
    if tile.device.type != "cpu" or tile.dtype != dtype:
        return f"this native pass is of {dtype} on a CPU, not {tile.dtype} on {tile.device.type}"
    library = native.load()
    if library is None:
        return native.why_not()
    return None if library.cream_top_p_isa() else "this processor has no AVX2, without which torch is faster"


def statistics(
    hidden: Tensor,  # (N, D) bfloat16, any strides
    weight: Tensor,  # (V, D) bfloat16
    targets: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,) any floating dtype
    factor: float = 1.0,
    ceiling: float = 0.0,  # 0: none
    want_moment: bool = False,
    isa: int | None = None,  # 1 AVX512-BF16, 2 AMX; None: the best that is there
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # maximum, others, target_logit, moment, all (N,) float32
    """What linear_logp keeps of the logits, which are float32 sums and never stored.

    maximum and others leave the target out, as linear_logp.py has it, and maximum is the lowest finite number where
    nothing but the target is above -inf. moment = sum over v != y of exp(z_v - maximum) * (z_v - maximum), for the
    entropy. A target outside [0, V) leaves target_logit nan and takes nothing out of the sum. A row with a nan among
    its other logits gets nan, and no other row does.

    2NDV floating-point operations; memory is 64 rows of weight a thread, 12 bytes a row for every 512 tokens of the
    vocabulary and, for AMX, a packed copy of hidden.
    """
    hidden, weight = _dense_rows(hidden), _dense_rows(weight)
    targets = targets.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    results = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4 if want_moment else 3)]
    library = native.load()
    done = library.cream_linear_logp_statistics(
        hidden.data_ptr(),
        *hidden.shape,
        hidden.stride(0),
        weight.data_ptr(),
        weight.shape[0],
        weight.stride(0),
        targets.data_ptr(),
        None if bias is None else bias.data_ptr(),
        factor,
        ceiling,
        *(result.data_ptr() for result in results),
        *([] if want_moment else [None]),
        torch.get_num_threads(),
        library.cream_bf16_isa() if isa is None else isa,
    )
    _check(done)
    return tuple(results) if want_moment else (*results, None)


def multiply_bf16(
    left: Tensor,  # (n, m) bfloat16, any strides
    right: Tensor,  # (m, c) bfloat16, any strides; AMX takes a copy unless the columns are dense
    out: Tensor,  # (n, c) float32 or bfloat16, columns dense
    adds: bool = False,
    shrink: Tensor | None = None,  # (n,) float32, what the rows of out are multiplied by first, where adds
    isa: int | None = None,  # as in statistics
) -> Tensor:  # out
    """left @ right, or out * shrink + left @ right where adds, with float32 sums that are rounded once or kept."""
    assert out.stride(1) == 1 or out.shape[1] == 1
    assert out.dtype == torch.float32 or (out.dtype == torch.bfloat16 and not adds)
    assert out.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
    library, left = native.load(), _dense_rows(left)
    isa = library.cream_bf16_isa() if isa is None else isa
    if right.stride(0) != 1 and (isa == 2 or right.stride(1) != 1):
        right = right.T.contiguous().T
    shrink = None if shrink is None else shrink.contiguous()
    done = library.cream_bf16_multiply(
        left.data_ptr(),
        left.stride(0),
        right.data_ptr(),
        *right.stride(),
        *left.shape,
        right.shape[1],
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        out.stride(0),
        adds,
        None if shrink is None else shrink.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    _check(done)
    return out


def multiply(
    left: Tensor,  # (n, m) float32 or bfloat16, any strides
    right: Tensor,  # (m, c) float32 or bfloat16, any strides
    out: Tensor,  # (n, c) float32, columns dense
    adds: bool = False,
    isa: int | None = None,  # 1 AVX2, 2 AVX-512; None: the one that is fastest here
) -> Tensor:  # out
    """left @ right, or out + left @ right where adds; sums in float32. Only what is multiplied next of either
    operand is copied."""
    assert out.dtype == torch.float32 and (out.stride(1) == 1 or out.shape[1] == 1)
    assert out.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
    library = native.load()
    _check(
        library.cream_multiply(
            left.data_ptr(),
            left.dtype == torch.bfloat16,
            *left.stride(),
            right.data_ptr(),
            right.dtype == torch.bfloat16,
            *right.stride(),
            *left.shape,
            right.shape[1],
            out.data_ptr(),
            out.stride(0),
            adds,
            torch.get_num_threads(),
            _multiply_isa(library, left, right) if isa is None else isa,
        )
    )
    return out


def fold_tile_(
    tile: Tensor,  # (n, c) float32 logits, columns dense; becomes exp(logit - the new maximum), 0 at the target
    columns: Tensor,  # (n,) int64, target less the tile's first column; outside [0, c) for most rows
    maximum: Tensor,  # (n,) float32, as the next three: updated in place
    others: Tensor,  # (n,)
    target_logit: Tensor,  # (n,)
    moment: Tensor | None = None,  # (n,), see statistics
    rounded: Tensor | None = None,  # (n, c) bfloat16, columns dense: becomes the exponentials too
) -> Tensor:  # (n,) float32: exp(old maximum - new maximum), what sums over earlier tiles shrink by
    """One step of the online logsumexp: take the target out, find the maximum, exponentials and their sum.

    Exponentials below 1e-38 are 0. One pass over the tile, a row at a time, where torch takes six.
    """
    assert tile.stride(1) == 1 or tile.shape[1] == 1
    columns = columns.contiguous()
    kept = [maximum, others, target_logit, *([] if moment is None else [moment])]
    assert all(values.is_contiguous() and values.dtype == torch.float32 for values in kept)
    assert rounded is None or (rounded.dtype == torch.bfloat16 and rounded.shape == tile.shape)
    shrink = torch.empty_like(maximum)
    library = native.load()
    done = library.cream_fold_tile(
        tile.data_ptr(),
        *tile.shape,
        tile.stride(0),
        columns.data_ptr(),
        *(values.data_ptr() for values in kept),
        *([None] if moment is None else []),
        shrink.data_ptr(),
        *((None, 0) if rounded is None else (rounded.data_ptr(), rounded.stride(0))),
        torch.get_num_threads(),
        library.cream_top_p_isa(),
    )
    _check(done)
    return shrink


def read_rows(
    logits: Tensor,  # (N, V) float32 or bfloat16, columns dense
    rows: Tensor | None,  # (n,) int64, which of them; None: all
    targets: Tensor,  # (n,) int64
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # maximum, others, target_logit, all (n,) float32
    """What statistics gives, of rows of factor * logits that are there: one pass over them that writes nothing.

    Exponentials below 1e-38 are 0.
    """
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    targets, library = targets.contiguous(), native.load()
    rows = None if rows is None else rows.contiguous()
    maximum = logits.new_full((len(targets),), torch.finfo(torch.float32).min, dtype=torch.float32)
    others, target_logit = torch.zeros_like(maximum), torch.full_like(maximum, torch.nan)
    done = library.cream_read_rows(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        logits.shape[1],
        logits.stride(0),
        None if rows is None else rows.data_ptr(),
        len(targets),
        targets.data_ptr(),
        factor,
        maximum.data_ptr(),
        others.data_ptr(),
        target_logit.data_ptr(),
        torch.get_num_threads(),
        library.cream_top_p_isa(),
    )
    _check(done)
    return maximum, others, target_logit


def write_gradient(
    logits: Tensor,  # (N, V) float32 or bfloat16, columns dense
    rows: Tensor | None,  # (n,) int64, which of them; None: all
    targets: Tensor,  # (n,) int64
    factor: float,
    maximum: Tensor,  # (n,) float32, as the next two; what read_rows gave
    at_others: Tensor,  # (n,) gradient of a token over its exp(factor * logit - maximum)
    at_target: Tensor,  # (n,) gradient of the target
    out: Tensor,  # (N, V) of the logits' dtype, columns dense, may be logits: these rows are written, rounded once
) -> None:
    """The gradient of rows of logits in one pass over them. Exponentials below 1e-38 are 0."""
    assert all(x.stride(1) == 1 or x.shape[1] == 1 for x in (logits, out))
    assert out.dtype == logits.dtype and out.shape == logits.shape
    targets, rows = targets.contiguous(), None if rows is None else rows.contiguous()
    kept = [values.contiguous() for values in (maximum, at_others, at_target)]
    assert all(values.dtype == torch.float32 for values in kept)
    library = native.load()
    done = library.cream_write_gradient(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        logits.shape[1],
        logits.stride(0),
        None if rows is None else rows.data_ptr(),
        len(targets),
        targets.data_ptr(),
        factor,
        *(values.data_ptr() for values in kept),
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
        library.cream_top_p_isa(),
    )
    _check(done)


def scale_rows(
    tile: Tensor,  # (n, c) bfloat16, columns dense
    scale: Tensor,  # (n,) float32
    out: Tensor,  # (n, c) bfloat16, columns dense, may be tile: each row times its scale, rounded once
) -> None:
    assert all(x.stride(1) == 1 or x.shape[1] == 1 for x in (tile, out))
    scale, library = scale.contiguous(), native.load()
    assert scale.dtype == torch.float32 and out.dtype == torch.bfloat16 and out.shape == tile.shape
    done = library.cream_scale_rows(
        tile.data_ptr(),
        *tile.shape,
        tile.stride(0),
        scale.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
        library.cream_top_p_isa(),
    )
    _check(done)


def add_rows_(
    total: Tensor,  # (n, c) float32, columns dense, updated
    rows: Tensor,  # (n, c) bfloat16, columns dense
    shrink: Tensor | None = None,  # (n,) float32, what the rows of total are multiplied by first
) -> None:
    """total * shrink + rows in one pass, where torch takes one through a float32 copy of the rows."""
    assert all(x.stride(1) == 1 or x.shape[1] == 1 for x in (total, rows)) and total.shape == rows.shape
    assert total.dtype == torch.float32 and (shrink is None or shrink.dtype == torch.float32)
    shrink, library = None if shrink is None else shrink.contiguous(), native.load()
    done = library.cream_add_rows(
        total.data_ptr(),
        *total.shape,
        total.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        None if shrink is None else shrink.data_ptr(),
        torch.get_num_threads(),
        library.cream_top_p_isa(),
    )
    _check(done)


def transpose(
    matrix: Tensor,  # (n, c) bfloat16, columns dense
    out: Tensor,  # (c, n) bfloat16, columns dense: becomes matrix.T
) -> Tensor:  # out
    """Four to five times as fast as torch's copy, for products that are slow of a transposed left operand."""
    assert all(x.dtype == torch.bfloat16 and (x.stride(1) == 1 or x.shape[1] == 1) for x in (matrix, out))
    assert out.shape == matrix.shape[::-1]
    _check(
        native.load().cream_transpose(
            matrix.data_ptr(),
            *matrix.shape,
            matrix.stride(0),
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )
    )
    return out


def _dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check(done: int) -> None:
    assert done != -1, "the native kernel is not there: ask why_not first"
    if done == -2:
        raise MemoryError("no memory for the native kernels' packed operands")
