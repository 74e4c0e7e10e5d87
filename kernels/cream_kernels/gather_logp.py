"""log softmax at the targets, from logits that already exist.

N tokens (rows), V vocabulary. Both bodies read the logits once in float32 and keep three numbers a row; backward reads
the logits once more and writes their gradient. The torch body goes a few rows at a time, gather_logp_triton.py has one
program a row; on CPUs linear_logp_native.py's read_rows and write_gradient take the place of torch's passes where they
can. The algebra is that of linear_logp.py: the target stays out of the sum, so that a token the model is sure of keeps
all its digits.
"""

import torch
from torch import Tensor

from . import linear_logp_native as in_cpp
from .linear_logp import NAMESPACE, check_device, check_targets, squash_of, triton_serves
from .linear_logp_torch import (
    Statistics,
    fold_tile_,
    rows_that_count,
    scatter_rows,
    share_of_others,
    take_targets_,
)
from .products import wide_dtype
from .reference import IGNORE


def gather_logp(
    logits: Tensor,  # (N, V) any floating dtype, any strides
    targets: Tensor,  # (N,) int64 in [0, V), IGNORE where a row counts for nothing
    *,
    temperature: float = 1.0,  # > 0, divides the logits
    inplace_backward: bool = False,  # write the gradient over the logits
) -> Tensor:  # (N,) float32 (float64 for float64 inputs), nats
    """log softmax(logits / temperature)[n, targets[n]]. Defined by reference.gather_logp.

    Rows whose target is IGNORE give 0, pass no gradient and are not read; all of them may be. Differentiable in logits
    under any upstream gradient, which is applied row by row. Where hidden states and head are at hand, linear_logp does
    without the (N, V) logits and their gradient.

    inplace_backward saves backward's (N, V) of memory: after it the logits hold their gradient. It is for logits that
    nothing else reads again, and allows one backward; a second one over a retained graph is an error of autograd's.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a target outside [0, V) on a CPU; on other
    devices, where looking would mean waiting, such a row is nan.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be (N, V > 0) and floating, not {tuple(logits.shape)} {logits.dtype}")
    check_targets(targets, logits.shape[0])
    check_device(logits, targets=targets)
    squash = squash_of(temperature)
    return _gather_logp(logits, targets, squash.factor, inplace_backward)[0]


def _row_blocks(num_rows: int, num_classes: int, device: torch.device) -> list[slice]:
    """Blocks of whole rows: about 2 MB of float32 on a CPU, which stay in cache; 256 MB elsewhere."""
    size = max(1, (2**19 if device.type == "cpu" else 2**26) // num_classes)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _read(logits: Tensor, kept: Tensor | None, rows: slice, factor: float) -> Tensor:
    """A fresh wide copy of these rows (counted among the kept ones) times the factor."""
    block = logits[rows] if kept is None else logits.index_select(0, kept[rows])
    block = block.to(wide_dtype(logits), copy=True, memory_format=torch.contiguous_format)
    return block if factor == 1.0 else block.mul_(factor)


def _forward(logits, targets, factor, inplace_backward):
    kept = rows_that_count(targets, logits.shape[1])
    columns = targets if kept is None else targets.index_select(0, kept)
    if in_cpp.why_not_read(logits) is None:
        statistics = Statistics(*in_cpp.read_rows(logits, kept, columns, factor), None)
    else:
        statistics = Statistics.empty(columns.shape[0], logits)
        for rows in _row_blocks(columns.shape[0], logits.shape[1], logits.device):
            fold_tile_(_read(logits, kept, rows, factor), columns[rows], statistics.of(rows))
    logp, _ = statistics.finish()
    found = logp, statistics.maximum, statistics.others
    return tuple(scatter_rows(values, kept, logits.shape[0], values.dtype) for values in found)


_gather_logp = torch.library.custom_op(
    f"{NAMESPACE}::gather_logp",
    _forward,
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, float factor, bool inplace_backward)"
    " -> (Tensor logp, Tensor maximum, Tensor others)",
)


@_gather_logp.register_kernel("cuda")
def _forward_on_cuda(logits, targets, factor, inplace_backward):
    if not triton_serves(logits):
        return _forward(logits, targets, factor, inplace_backward)
    from . import gather_logp_triton

    with torch.cuda.device_of(logits):
        return gather_logp_triton.statistics(logits, targets, None, factor, 0.0, want_entropy=False)[:3]


@_gather_logp.register_fake
def _(logits, targets, factor, inplace_backward):
    return tuple(
        torch.empty_like(targets, dtype=wide_dtype(logits), memory_format=torch.contiguous_format) for _ in range(3)
    )


def _write_gradient(out, grad, logits, targets, logp, maximum, others, factor):
    """dlogits into out (N, V), which may be logits."""
    kept = rows_that_count(targets, logits.shape[1])
    values = [targets, grad * factor, logp, maximum, others]
    if kept is not None:
        values = [value.index_select(0, kept) for value in values]
        out.index_fill_(0, (targets == IGNORE).nonzero()[:, 0], 0.0)
    columns, grad, logp, maximum, others = values
    at_others, at_target = -grad * share_of_others(logp, others), -grad * torch.expm1(logp)
    if in_cpp.why_not_read(logits) is None:
        return in_cpp.write_gradient(logits, kept, columns, factor, maximum, at_others, at_target, out)
    for rows in _row_blocks(columns.shape[0], logits.shape[1], logits.device):
        block = _read(logits, kept, rows, factor)
        take_targets_(block, columns[rows])
        block.sub_(maximum[rows, None]).exp_().mul_(at_others[rows, None])
        block.scatter_(1, columns[rows, None].clamp(0, block.shape[1] - 1), at_target[rows, None])
        out[rows if kept is None else kept[rows]] = block.to(logits.dtype)


def _backward_inplace(grad, logits, targets, logp, maximum, others, factor):
    _write_gradient(logits, grad, logits, targets, logp, maximum, others, factor)


def _backward_afresh(grad, logits, targets, logp, maximum, others, factor):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(out, grad, logits, targets, logp, maximum, others, factor)
    return out


_BACKWARD = "(Tensor grad, {} logits, Tensor targets, Tensor logp, Tensor maximum, Tensor others, float factor) -> {}"
_gather_logp_backward = torch.library.custom_op(
    f"{NAMESPACE}::gather_logp_backward",
    _backward_afresh,
    mutates_args=(),
    schema=_BACKWARD.format("Tensor", "Tensor"),
)
_gather_logp_backward_ = torch.library.custom_op(
    f"{NAMESPACE}::gather_logp_backward_",
    _backward_inplace,
    mutates_args=("logits",),
    schema=_BACKWARD.format("Tensor(a!)", "()"),
)


@_gather_logp_backward.register_kernel("cuda")
def _backward_on_cuda(grad, logits, targets, logp, maximum, others, factor):
    if not triton_serves(logits):
        return _backward_afresh(grad, logits, targets, logp, maximum, others, factor)
    from . import gather_logp_triton

    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(logits):
        gather_logp_triton.gradient_into(out, grad, logits, targets, None, logp, maximum, others, factor, 0.0)
    return out


@_gather_logp_backward_.register_kernel("cuda")
def _backward_inplace_on_cuda(grad, logits, targets, logp, maximum, others, factor):
    if not triton_serves(logits):
        return _backward_inplace(grad, logits, targets, logp, maximum, others, factor)
    from . import gather_logp_triton

    with torch.cuda.device_of(logits):
        gather_logp_triton.gradient_into(logits, grad, logits, targets, None, logp, maximum, others, factor, 0.0)


@_gather_logp_backward.register_fake
def _(grad, logits, targets, logp, maximum, others, factor):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_gather_logp_backward_.register_fake
def _(grad, logits, targets, logp, maximum, others, factor):
    return None


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.factor, ctx.inplace = inputs
    logp, maximum, others = output
    ctx.mark_non_differentiable(maximum, others)
    ctx.save_for_backward(logits, targets, logp, maximum, others)


def _backward(ctx, grad, *_):
    logits, *rest = ctx.saved_tensors
    if not ctx.inplace:
        return _gather_logp_backward(grad, logits, *rest, ctx.factor), None, None, None
    if torch.is_grad_enabled():  # what comes out is a constant, so autograd would leave its derivative out
        raise RuntimeError("gather_logp has no second derivative: call backward without create_graph")
    with torch.no_grad():
        _gather_logp_backward_(grad, logits, *rest, ctx.factor)
    return logits.detach(), None, None, None


_gather_logp.register_autograd(_backward, setup_context=_setup_context)
