"""log softmax(hidden @ weight.T) at the targets, never holding the (N, V) logits.

N tokens (rows), D hidden size, V vocabulary, all row-major. The torch body walks 2-D tiles (rows x vocabulary) with an
online logsumexp; only a tile of logits exists at a time, in float32 also for bfloat16 inputs.

The algebra, per row with target y and z = (hidden @ weight.T + bias) / temperature. The target is kept out of the sum:

    maximum = max over v != y of z_v             others = sum over v != y of exp(z_v - maximum)
    logp    = z_y - logsumexp(z) = log sigmoid((z_y - maximum) - log others)
    log_total = logsumexp(z) - maximum = logaddexp(log others, z_y - maximum)
    dlogp/dz_v = -exp(z_v - maximum - log_total) for v != y,       dlogp/dz_y = 1 - p_y = -expm1(logp)

so that a token the model is sure of (p_y near 1) keeps all its digits, where z_y - logsumexp(z) and 1 - p_y would each
cancel. logsumexp is kept as its two terms, since at logits of 1e4 their float32 sum is off by 1e-3.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .reference import IGNORE

# One namespace per package, so that a vendored copy of this folder and an installed one can be loaded together.
NAMESPACE = __package__.replace(".", "_")


def linear_logp(
    hidden: Tensor,  # (N, D) last hidden states, float32, bfloat16, float16 (not on CPU) or float64
    weight: Tensor,  # (V, D) LM head, same dtype
    targets: Tensor,  # (N,) int64 in [0, V), IGNORE where a row counts for nothing
    *,
    bias: Tensor | None = None,  # (V,) same dtype
    temperature: float = 1.0,  # > 0, divides the logits
) -> Tensor:  # (N,) float32 (float64 for float64 inputs), nats
    """log softmax((hidden @ weight.T + bias) / temperature)[n, targets[n]]. Defined by reference.linear_logp.

    Rows whose target is IGNORE give 0, pass no gradient and cost nothing; all of them may be. Differentiable in hidden,
    weight and bias under any upstream gradient, which is applied row by row. Backward recomputes the logits: 2NDV
    floating-point operations forward, 6NDV backward. With a frozen head (weight and bias need no gradient) the forward
    keeps (N, D) gradient directions instead: 4NDV forward and one row scaling backward.

    Beyond inputs and outputs, memory is one tile of logits, and for half precision a float32 copy of hidden. Logits
    are float32 products for bfloat16 inputs as well: bfloat16 logits would be wrong by 1e-2 nats a token.

    Raises ValueError for shapes or dtypes that do not fit, for float16 on a CPU, and for a target outside [0, V) on a
    CPU; on other devices, where looking would mean waiting, such a row is nan.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_linear(hidden, weight, targets)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be ({weight.shape[0]},) {weight.dtype}, not {tuple(bias.shape)} {bias.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    head_needs_gradient = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not head_needs_gradient
    return _linear_logp(hidden, weight, targets, bias, float(temperature), frozen)[0]


def cast_for_autocast(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch.autocast would do to the arguments of a linear layer."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def check_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """ValueError that names the argument, unless hidden (N, D), weight (V, D) and targets (N,) fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (N, D) and weight (V, D), not {shapes}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating dtype, not {hidden.dtype} and {weight.dtype}")
    if hidden.dtype == torch.float16 and hidden.device.type == "cpu":
        raise ValueError("float16 products are emulated on CPU and very slow: pass bfloat16 or float32")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row: the vocabulary is empty")
    check_targets(targets, hidden.shape[0])


def check_targets(targets: Tensor, num_rows: int) -> None:
    """ValueError unless targets is (num_rows,) int64."""
    if targets.dim() != 1 or targets.shape[0] != num_rows or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({num_rows},) int64, not {tuple(targets.shape)} {targets.dtype}")


def rows_that_count(targets: Tensor, num_classes: int) -> Tensor | None:
    """Indices (K,) of the rows whose target is not IGNORE, or None where that is all of them.

    Looks at the values, and so waits for a GPU once. On a CPU, where looking is free, also checks the range.
    """
    counts = targets != IGNORE
    if targets.device.type == "cpu":
        wrong = counts & ((targets < 0) | (targets >= num_classes))
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}: must be in [0, {num_classes}) or {IGNORE}")
    kept = counts.nonzero()[:, 0]
    return None if kept.numel() == targets.numel() else kept


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tile_shape(device: torch.device) -> tuple[int, int]:
    """(rows, vocabulary) of a tile. On a CPU 2 MB of float32 stay in cache; elsewhere launches are what costs."""
    return (512, 1024) if device.type == "cpu" else (4096, 16384)


def logits_tile(
    hidden: Tensor,  # (n, D) wide
    weight: Tensor,  # (c, D) wide
    bias: Tensor | None,  # (c,)
    temperature: float,
    out: Tensor | None = None,  # (n, c) wide
) -> Tensor:  # (n, c) wide
    tile = torch.mm(hidden, weight.T, out=out)
    if bias is not None:
        tile += bias
    return tile if temperature == 1.0 else tile.div_(temperature)


def take_targets_(
    tile: Tensor,  # (n, c) logits; the targets' entries become -inf
    columns: Tensor,  # (n,) int64, target less the tile's first column; outside [0, c) for most rows
) -> tuple[Tensor, Tensor]:  # (n,) bool: the target is in this tile; (n,) its logit, where so
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1)[:, None]
    picked = tile.gather(1, columns)
    tile.scatter_(1, columns, picked.masked_fill(inside[:, None], -torch.inf))
    return inside, picked[:, 0]


def target_weights(
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
) -> Tensor:  # (n, D) wide
    return weight.index_select(0, targets.clamp(0, weight.shape[0] - 1)).to(wide_dtype(weight))


def gradient_product(
    coefficients: Tensor,  # (n, k) wide: derivatives of the logits, formed in float32
    matrix: Tensor,  # (k, m) in the model's dtype
) -> Tensor:  # (n, m) in the model's dtype or wide; add it up in wide
    """coefficients @ matrix in the model's dtype, as autograd of a linear layer would do it.

    The targets' own coefficients are left out of it: they are most of a gradient, and are multiplied out in float32.
    In bfloat16 that spares dhidden and dweight two of three roundings for a few vector operations a row.
    """
    return torch.mm(coefficients.to(matrix.dtype), matrix)


def empty_statistics(num_rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """maximum, others and target logit before the first tile.

    maximum starts at the lowest finite number: from -inf, a tile of nothing but -inf (the target alone in its tile, a
    bias that forbids tokens) would make -inf - -inf. A target that no tile holds leaves its row nan.
    """
    dtype = wide_dtype(like)
    maximum = like.new_full((num_rows,), torch.finfo(dtype).min, dtype=dtype)
    return maximum, torch.zeros_like(maximum), torch.full_like(maximum, torch.nan)


def finish_statistics(maximum: Tensor, others: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
    """logp and log_total from what the tiles left, all (n,)."""
    log_others, above = others.log(), target_logit - maximum
    return functional.logsigmoid(above - log_others), torch.logaddexp(log_others, above)


def _forward(
    hidden: Tensor,  # (n, D), rows that count
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
    bias: Tensor | None,
    temperature: float,
    keep_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # logp, maximum, log_total (n,) wide; dlogp/dhidden (n, D) wide
    dtype = wide_dtype(hidden)
    num_rows, num_columns = tile_shape(hidden.device)
    wide_hidden = hidden.to(dtype)
    maximum, others, target_logit = empty_statistics(hidden.shape[0], hidden)
    # sum over v != y of exp(z_v - maximum) weight[v], rescaled whenever the maximum moves
    pull = wide_hidden.new_zeros(hidden.shape) if keep_direction else None
    for first in range(0, weight.shape[0], num_columns):
        columns = slice(first, first + num_columns)
        wide_weight = weight[columns].to(dtype)
        wide_bias = None if bias is None else bias[columns].to(dtype)
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            tile = logits_tile(wide_hidden[rows], wide_weight, wide_bias, temperature)
            inside, picked = take_targets_(tile, targets[rows] - first)
            target_logit[rows] = torch.where(inside, picked, target_logit[rows])
            highest = torch.maximum(maximum[rows], tile.amax(1))
            shrink = (maximum[rows] - highest).exp_()
            tile.sub_(highest[:, None]).exp_()
            others[rows] = others[rows] * shrink + tile.sum(1)
            maximum[rows] = highest
            if pull is not None:
                pull[rows].mul_(shrink[:, None]).add_(gradient_product(tile, weight[columns]))
    logp, log_total = finish_statistics(maximum, others, target_logit)
    if pull is None:
        return logp, maximum, log_total, None
    # (1 - p_y) weight[y] - sum over v != y of p_v weight[v]: p_y itself is never formed, so nothing cancels
    push = target_weights(weight, targets)
    direction = push.mul_(-torch.expm1(logp)[:, None]).sub_(pull.mul_((-log_total).exp_()[:, None]))
    return logp, maximum, log_total, direction.div_(temperature)


def gradients(
    grad: Tensor,  # (n,) wide, upstream of logp
    hidden: Tensor,  # (n, D), rows that count
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
    bias: Tensor | None,  # (V,)
    logp: Tensor,  # (n,) wide, as maximum and log_total
    maximum: Tensor,
    log_total: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dhidden (n, D) wide, dweight (V, D), dbias (V,)
    """Recompute the logits tile by tile and multiply their derivatives out."""
    dtype = wide_dtype(hidden)
    num_rows, num_columns = tile_shape(hidden.device)
    wide_hidden = hidden.to(dtype)
    grad = grad / temperature
    at_others, at_target = -grad * (-log_total).exp_(), -grad * torch.expm1(logp)
    dhidden = at_target[:, None] * target_weights(weight, targets) if need_hidden else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    dbias = weight.new_empty(weight.shape[0]) if need_bias else None
    # Vocabulary outside, rows inside: a tile of dweight is summed over all rows in float32 and rounded once.
    for first in range(0, weight.shape[0], num_columns):
        columns = slice(first, first + num_columns)
        wide_weight = weight[columns].to(dtype)
        wide_bias = None if bias is None else bias[columns].to(dtype)
        dweight_tile = torch.zeros_like(wide_weight) if need_weight else None
        dbias_tile = wide_weight.new_zeros(wide_weight.shape[0]) if need_bias else None
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            tile = logits_tile(wide_hidden[rows], wide_weight, wide_bias, temperature)
            inside, _ = take_targets_(tile, targets[rows] - first)
            tile.sub_(maximum[rows, None]).exp_().mul_(at_others[rows, None])
            own = (targets[rows] - first).clamp(0, tile.shape[1] - 1)
            at_own = torch.where(inside, at_target[rows], 0.0)
            if dhidden is not None:
                dhidden[rows] += gradient_product(tile, weight[columns])
            if dweight_tile is not None:
                dweight_tile += gradient_product(tile.T, hidden[rows])
                dweight_tile.index_add_(0, own, at_own[:, None] * wide_hidden[rows])
            if dbias_tile is not None:
                dbias_tile += tile.sum(0)
                dbias_tile.index_add_(0, own, at_own)
        if dweight is not None:
            dweight[columns] = dweight_tile
        if dbias is not None:
            dbias[columns] = dbias_tile
    return dhidden, dweight, dbias


def scatter_rows(rows: Tensor, kept: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Put rows (K, ...) back at kept in (num_rows, ...), 0 elsewhere."""
    if kept is None:
        return rows.to(dtype)
    return rows.new_zeros((num_rows, *rows.shape[1:]), dtype=dtype).index_copy_(0, kept, rows.to(dtype))


@torch.library.custom_op(
    f"{NAMESPACE}::linear_logp",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, bool keep_direction)"
    " -> (Tensor logp, Tensor maximum, Tensor log_total, Tensor direction)",
)
def _linear_logp(hidden, weight, targets, bias, temperature, keep_direction):
    kept = rows_that_count(targets, weight.shape[0])
    num_rows, dtype = hidden.shape[0], wide_dtype(hidden)
    if kept is not None:
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    with torch.autocast(hidden.device.type, enabled=False):
        *statistics, direction = _forward(hidden, weight, targets, bias, temperature, keep_direction)
    statistics = [scatter_rows(rows, kept, num_rows, dtype) for rows in statistics]
    if direction is None:
        return *statistics, hidden.new_empty((0, hidden.shape[1]))
    return *statistics, scatter_rows(direction, kept, num_rows, hidden.dtype)


@_linear_logp.register_fake
def _(hidden, weight, targets, bias, temperature, keep_direction):
    dtype = wide_dtype(hidden)
    statistics = (torch.empty_like(targets, dtype=dtype) for _ in range(3))
    return *statistics, hidden.new_empty((hidden.shape[0] if keep_direction else 0, hidden.shape[1]))


@torch.library.custom_op(
    f"{NAMESPACE}::linear_logp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor logp, Tensor maximum,"
    " Tensor log_total, float temperature, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
def _linear_logp_backward(
    grad,
    hidden,
    weight,
    targets,
    bias,
    logp,
    maximum,
    log_total,
    temperature,
    need_hidden,
    need_weight,
    need_bias,
):
    kept = rows_that_count(targets, weight.shape[0])
    num_rows = hidden.shape[0]
    rows = [grad, hidden, targets, logp, maximum, log_total]
    if kept is not None:
        rows = [row.index_select(0, kept) for row in rows]
    grad, hidden, targets, logp, maximum, log_total = rows
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden, dweight, dbias = gradients(
            grad,
            hidden,
            weight,
            targets,
            bias,
            logp,
            maximum,
            log_total,
            temperature,
            need_hidden,
            need_weight,
            need_bias,
        )
    return (
        hidden.new_empty(0) if dhidden is None else scatter_rows(dhidden, kept, num_rows, hidden.dtype),
        hidden.new_empty(0) if dweight is None else dweight,
        hidden.new_empty(0) if dbias is None else dbias,
    )


@_linear_logp_backward.register_fake
def _(
    grad,
    hidden,
    weight,
    targets,
    bias,
    logp,
    maximum,
    log_total,
    temperature,
    need_hidden,
    need_weight,
    need_bias,
):
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.temperature, ctx.frozen = inputs
    logp, maximum, log_total, direction = output
    ctx.mark_non_differentiable(maximum, log_total, direction)
    if ctx.frozen:
        ctx.save_for_backward(targets, direction)
    else:
        ctx.save_for_backward(hidden, weight, targets, bias, logp, maximum, log_total)


def _backward(ctx, grad, *_):
    if ctx.frozen:
        if torch.is_grad_enabled():  # the direction is a constant here, so autograd would leave its derivative out
            raise RuntimeError("linear_logp has no second derivative: call backward without create_graph")
        targets, direction = ctx.saved_tensors
        # masked, since an upstream nan in an IGNORE row times 0 would be nan
        grad = grad.masked_fill(targets == IGNORE, 0.0)
        return (grad[:, None] * direction).to(direction.dtype), None, None, None, None, None
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    hidden, weight, targets, bias, logp, maximum, log_total = ctx.saved_tensors
    dhidden, dweight, dbias = _linear_logp_backward(
        grad,
        hidden,
        weight,
        targets,
        bias,
        logp,
        maximum,
        log_total,
        ctx.temperature,
        need_hidden,
        need_weight,
        need_bias,
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        None,
        None,
    )


_linear_logp.register_autograd(_backward, setup_context=_setup_context)
