"""log softmax at the targets, from logits that already exist.

N tokens (rows), V vocabulary. The torch body reads the logits a few rows at a time, in float32, and keeps three numbers
a row; backward reads the logits once more and writes their gradient. The algebra is that of linear_logp.py: the target
stays out of the sum, so that a token the model is sure of keeps all its digits.
"""

import torch
from torch import Tensor

from .linear_logp import (
    NAMESPACE,
    check_targets,
    finish_statistics,
    rows_that_count,
    take_targets_,
    wide_dtype,
)
from .reference import IGNORE


def gather_logp(
    logits: Tensor,  # (N, V) any floating dtype, any strides
    targets: Tensor,  # (N,) int64 in [0, V), IGNORE where a row counts for nothing
    *,
    temperature: float = 1.0,  # > 0, divides the logits
) -> Tensor:  # (N,) float32 (float64 for float64 inputs), nats
    """log softmax(logits / temperature)[n, targets[n]]. Defined by reference.gather_logp.

    Rows whose target is IGNORE give 0, pass no gradient and are not read; all of them may be. Differentiable in logits
    under any upstream gradient, which is applied row by row. Where hidden states and head are at hand, linear_logp does
    without the (N, V) logits and their gradient.

    Raises ValueError for shapes or dtypes that do not fit, and for a target outside [0, V) on a CPU; on other devices,
    where looking would mean waiting, such a row is nan.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be (N, V > 0) and floating, not {tuple(logits.shape)} {logits.dtype}")
    check_targets(targets, logits.shape[0])
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return _gather_logp(logits, targets, float(temperature))[0]


def _row_blocks(num_rows: int, num_classes: int, device: torch.device) -> list[slice]:
    """Blocks of whole rows: about 2 MB of float32 on a CPU, which stay in cache; 256 MB elsewhere."""
    size = max(1, (2**19 if device.type == "cpu" else 2**26) // num_classes)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _read(logits: Tensor, kept: Tensor | None, rows: slice, temperature: float) -> Tensor:
    """A fresh wide copy of these rows (counted among the kept ones) over the temperature."""
    block = logits[rows] if kept is None else logits.index_select(0, kept[rows])
    block = block.to(wide_dtype(logits), copy=True, memory_format=torch.contiguous_format)
    return block if temperature == 1.0 else block.div_(temperature)


@torch.library.custom_op(
    f"{NAMESPACE}::gather_logp",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, float temperature) -> (Tensor logp, Tensor maximum, Tensor log_total)",
)
def _gather_logp(logits, targets, temperature):
    kept = rows_that_count(targets, logits.shape[1])
    columns = targets if kept is None else targets.index_select(0, kept)
    results = logits.new_zeros((3, logits.shape[0]), dtype=wide_dtype(logits)).unbind(0)
    for rows in _row_blocks(columns.shape[0], logits.shape[1], logits.device):
        block = _read(logits, kept, rows, temperature)
        inside, target_logit = take_targets_(block, columns[rows])
        target_logit = target_logit.masked_fill(~inside, torch.nan)
        # the lowest finite number where the target is the only token that is not -inf
        maximum = block.amax(1).clamp_(min=torch.finfo(block.dtype).min)
        others = block.sub_(maximum[:, None]).exp_().sum(1)
        logp, log_total = finish_statistics(maximum, others, target_logit)
        for result, values in zip(results, (logp, maximum, log_total), strict=True):
            result[rows if kept is None else kept[rows]] = values
    return tuple(result.clone() for result in results)


@_gather_logp.register_fake
def _(logits, targets, temperature):
    return tuple(torch.empty_like(targets, dtype=wide_dtype(logits)) for _ in range(3))


@torch.library.custom_op(
    f"{NAMESPACE}::gather_logp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor targets, Tensor logp, Tensor maximum, Tensor log_total,"
    " float temperature) -> Tensor dlogits",
)
def _gather_logp_backward(grad, logits, targets, logp, maximum, log_total, temperature):
    kept = rows_that_count(targets, logits.shape[1])
    values = [targets, grad / temperature, logp, maximum, log_total]
    if kept is not None:
        values = [value.index_select(0, kept) for value in values]
    columns, grad, logp, maximum, log_total = values
    at_others, at_target = -grad * (-log_total).exp_(), -grad * torch.expm1(logp)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if kept is not None:
        dlogits.index_fill_(0, (targets == IGNORE).nonzero()[:, 0], 0.0)
    for rows in _row_blocks(columns.shape[0], logits.shape[1], logits.device):
        block = _read(logits, kept, rows, temperature)
        take_targets_(block, columns[rows])
        block.sub_(maximum[rows, None]).exp_().mul_(at_others[rows, None])
        block.scatter_(1, columns[rows, None].clamp(0, block.shape[1] - 1), at_target[rows, None])
        dlogits[rows if kept is None else kept[rows]] = block.to(logits.dtype)
    return dlogits


@_gather_logp_backward.register_fake
def _(grad, logits, targets, logp, maximum, log_total, temperature):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.temperature = inputs
    logp, maximum, log_total = output
    ctx.mark_non_differentiable(maximum, log_total)
    ctx.save_for_backward(logits, targets, logp, maximum, log_total)


def _backward(ctx, grad, *_):
    return _gather_logp_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None


_gather_logp.register_autograd(_backward, setup_context=_setup_context)
