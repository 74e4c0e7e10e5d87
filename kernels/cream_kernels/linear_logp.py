"""log softmax(hidden @ weight.T) at the targets, never holding the (N, V) logits.

N tokens (rows), D hidden size, V vocabulary, all row-major. Here is the public function, its operators and their
derivative; the bodies are linear_logp_torch.py (2-D tiles; CPUs and whatever else) and linear_logp_triton.py (CUDA).

The algebra, per row with target y and z = squash(hidden @ weight.T + bias). The target is kept out of the sum:

    maximum = max over v != y of z_v             others = sum over v != y of exp(z_v - maximum)
    logp    = z_y - logsumexp(z) = log sigmoid((z_y - maximum) - log others)
    dlogp/dz_y = 1 - p_y = -expm1(logp)          dlogp/dz_v = -p_v = -exp(z_v - maximum) (1 - p_y) / others

so that a token the model is sure of (p_y near 1) keeps all its digits, where z_y - logsumexp(z) and 1 - p_y would each
cancel. logsumexp itself is never formed: at logits of 1e4 it would be off by 1e-3 in float32, and every p_v with it.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from . import linear_logp_torch, tiles
from .linear_logp_torch import Squash, rows_that_count, scatter_rows
from .products import wide_dtype
from .reference import IGNORE

# One namespace per package, so that a vendored copy of this folder and an installed one can be loaded together.
NAMESPACE = __package__.replace(".", "_")
# Of operators that may wait for the device or copy from memory that is not pinned: kept out of CUDA graphs.
WAITS = (torch.Tag.cudagraph_unsafe,)


def linear_logp(
    hidden: Tensor,  # (N, D) last hidden states, float32, bfloat16, float16 (not on CPU) or float64
    weight: Tensor,  # (V, D) LM head, same dtype
    targets: Tensor,  # (N,) int64 in [0, V), IGNORE where a row counts for nothing
    *,
    bias: Tensor | None = None,  # (V,) same dtype
    temperature: float = 1.0,  # > 0, divides the logits
    scale: float = 1.0,  # multiplies the products: Cohere's logit_scale, 1 / Granite's logits_scaling
    softcap: float = 0.0,  # Gemma's final_logit_softcapping; 0 for none
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (N,) float32 (float64 for float64 inputs), nats; with return_entropy two of them
    """log softmax(z)[n, targets[n]] of z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature.

    Without a softcap z = scale * (hidden @ weight.T + bias) / temperature. Defined by reference.linear_logp.

    Rows whose target is IGNORE give 0, pass no gradient and cost nothing; all of them may be. Differentiable in hidden,
    weight and bias under any upstream gradient, which is applied row by row. Backward recomputes the logits: 2NDV
    floating-point operations forward, 6NDV backward. With a frozen head (weight and bias need no gradient) the forward
    keeps (N, D) float32 gradient directions instead: 4NDV forward and one row scaling backward. With return_entropy the
    entropies of softmax(z) come along, (N,) nats, 0 where IGNORE, for metrics: no gradient passes through them.

    Beyond inputs and outputs, memory is one tile of logits on a CPU (and for half precision a float32 copy of hidden);
    on CUDA, for half precision, a copy of hidden and 8 bytes for every 128 or 256 logits, and for gradients (in float32
    always) a chunk of float32 logits: 256 MiB of them, or those of 2,048 rows and a float32 sum of dweight where the
    head is trained. Logits are float32 for half-precision inputs as well: bfloat16 logits would be wrong by 1e-2 nats a
    token.

    On CUDA the forward alone waits for nothing in half precision; in float32, and with gradients, it and backward find
    the rows that count, which waits once each. Raises ValueError for shapes, dtypes or devices that do not fit, for
    float16 on a CPU, and for a target outside [0, V) on a CPU; on other devices, where looking would mean waiting, such
    a row is nan.
    """
    settings = {"bias": bias, "temperature": temperature, "scale": scale, "softcap": softcap}
    logp, _, entropy = linear_logp_statistics(hidden, weight, targets, **settings, want_entropy=return_entropy)
    return (logp, entropy) if return_entropy else logp


def linear_logp_statistics(
    hidden: Tensor,  # (N, D), as linear_logp's
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # logp (N,); others (N,), see above, 0 where IGNORE; entropy (N,) or (0,)
    """linear_logp, and what its one pass over the logits knows besides; only logp has a gradient.

    A target is the most probable token where logp >= -log(1 + others).
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_linear(hidden, weight, targets)
    if bias is not None:
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(f"bias must be ({weight.shape[0]},) {weight.dtype}, not {tuple(bias.shape)} {bias.dtype}")
        check_device(hidden, bias=bias)
    squash = squash_of(temperature, scale, softcap)
    head_needs_gradient = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not head_needs_gradient
    logp, _, others, _, entropy = _linear_logp(hidden, weight, targets, bias, *squash, frozen, want_entropy)
    return logp, others, entropy


def squash_of(temperature: float, scale: float = 1.0, softcap: float = 0.0) -> Squash:
    """The settings as one function of a product; ValueError that names the one that cannot be."""
    for name, value, fits in (
        ("temperature", temperature, temperature > 0),
        ("scale", scale, scale > 0),
        ("softcap", softcap, softcap >= 0),
    ):
        if not (fits and math.isfinite(value)):
            raise ValueError(f"{name} must be {'0 or more' if name == 'softcap' else 'above 0'}, not {value}")
    return Squash.of(float(scale), float(softcap), float(temperature))


def cast_for_autocast(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch.autocast would do to the arguments of a linear layer."""
    device = hidden.device.type
    # Not torch.amp.is_autocast_available, which torch.compile of torch 2.11 cannot trace.
    if hidden.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
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
    check_device(hidden, weight=weight, targets=targets)
    if hidden.dtype == torch.float16 and hidden.device.type == "cpu":
        raise ValueError("float16 products are emulated on CPU and very slow: pass bfloat16 or float32")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row: the vocabulary is empty")
    check_targets(targets, hidden.shape[0])


def check_device(tensor: Tensor, **others: Tensor) -> None:
    """ValueError that names the argument which is not where the tensor is: a kernel would say less, or nothing."""
    for name, other in others.items():
        if other.device != tensor.device:
            raise ValueError(f"{name} must be on {tensor.device}, as the rest is, not on {other.device}")


def check_targets(targets: Tensor, num_rows: int) -> None:
    """ValueError unless targets is (num_rows,) int64."""
    if targets.dim() != 1 or targets.shape[0] != num_rows or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({num_rows},) int64, not {tuple(targets.shape)} {targets.dtype}")


def triton_serves(tensor: Tensor) -> bool:
    """Whether the Triton bodies take this CUDA tensor; where they cannot run at all, one warning says why.

    Triton launches on the current device whatever its arguments are on, so bodies run under torch.cuda.device_of.
    """
    return tensor.dtype != torch.float64 and _triton_runs(tensor.device)


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    reason = tiles.why_not(device)
    if reason:
        warnings.warn(f"cream_kernels uses its torch bodies on {device}, which are slower: {reason}", stacklevel=5)
    return reason is None


def _forward(hidden, weight, targets, bias, factor, ceiling, keep_direction, want_entropy):
    kept = rows_that_count(targets, weight.shape[0])
    num_rows, dtype = hidden.shape[0], wide_dtype(hidden)
    if kept is not None:
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    with torch.autocast(hidden.device.type, enabled=False):
        *statistics, direction, entropy = linear_logp_torch.forward(
            hidden, weight, targets, bias, Squash(factor, ceiling), keep_direction, want_entropy
        )
    statistics = [scatter_rows(rows, kept, num_rows, dtype) for rows in statistics]
    return (
        *statistics,
        hidden.new_empty((0, hidden.shape[1]), dtype=dtype)
        if direction is None
        else scatter_rows(direction, kept, num_rows, dtype),
        statistics[0].new_empty(0) if entropy is None else scatter_rows(entropy, kept, num_rows, dtype),
    )


_linear_logp = torch.library.custom_op(
    f"{NAMESPACE}::linear_logp",
    _forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float factor, float ceiling,"
    " bool keep_direction, bool want_entropy)"
    " -> (Tensor logp, Tensor maximum, Tensor others, Tensor direction, Tensor entropy)",
    tags=WAITS,
)


@_linear_logp.register_kernel("cuda")
def _forward_on_cuda(hidden, weight, targets, bias, factor, ceiling, keep_direction, want_entropy):
    if not triton_serves(hidden):
        return _forward(hidden, weight, targets, bias, factor, ceiling, keep_direction, want_entropy)
    from . import linear_logp_triton

    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        return linear_logp_triton.forward(hidden, weight, targets, bias, factor, ceiling, keep_direction, want_entropy)


@_linear_logp.register_fake
def _(hidden, weight, targets, bias, factor, ceiling, keep_direction, want_entropy):
    dtype = wide_dtype(hidden)
    num_rows = hidden.shape[0]
    return (
        *(torch.empty_like(targets, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(3)),
        hidden.new_empty((num_rows if keep_direction else 0, hidden.shape[1]), dtype=dtype),
        hidden.new_empty(num_rows if want_entropy else 0, dtype=dtype),
    )


def _gradients(grad, hidden, weight, targets, bias, logp, maximum, others, factor, ceiling, *needs):
    kept = rows_that_count(targets, weight.shape[0])
    num_rows = hidden.shape[0]
    rows = [grad, hidden, targets, logp, maximum, others]
    if kept is not None:
        rows = [row.index_select(0, kept) for row in rows]
    grad, hidden, targets, *statistics = rows
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden, dweight, dbias = linear_logp_torch.gradients(
            grad, hidden, weight, targets, bias, *statistics, Squash(factor, ceiling), *needs
        )
    if dhidden is not None:
        dhidden = scatter_rows(dhidden, kept, num_rows, hidden.dtype)
    return tuple(hidden.new_empty(0) if wanted is None else wanted for wanted in (dhidden, dweight, dbias))


_linear_logp_backward = torch.library.custom_op(
    f"{NAMESPACE}::linear_logp_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor logp, Tensor maximum,"
    " Tensor others, float factor, float ceiling, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=WAITS,
)


@_linear_logp_backward.register_kernel("cuda")
def _gradients_on_cuda(grad, hidden, weight, targets, bias, logp, maximum, others, factor, ceiling, *needs):
    if not triton_serves(hidden):
        return _gradients(grad, hidden, weight, targets, bias, logp, maximum, others, factor, ceiling, *needs)
    from . import linear_logp_triton

    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        wanted = linear_logp_triton.gradients(
            grad, hidden, weight, targets, bias, logp, maximum, others, factor, ceiling, *needs
        )
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in wanted)


@_linear_logp_backward.register_fake
def _(grad, hidden, weight, targets, bias, logp, maximum, others, factor, ceiling, *needs):
    need_hidden, need_weight, need_bias = needs
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.factor, ctx.ceiling, ctx.frozen, _ = inputs
    logp, maximum, others, direction, entropy = output
    ctx.mark_non_differentiable(maximum, others, direction, entropy)
    if ctx.frozen:
        ctx.save_for_backward(targets, direction)
        ctx.dtype = hidden.dtype
    else:
        ctx.save_for_backward(hidden, weight, targets, bias, logp, maximum, others)


def _backward(ctx, grad, *_):
    nothing = (None,) * 4
    if ctx.frozen:
        if torch.is_grad_enabled():  # the direction is a constant here, so autograd would leave its derivative out
            raise RuntimeError("linear_logp has no second derivative: call backward without create_graph")
        targets, direction = ctx.saved_tensors
        # masked, since an upstream nan in an IGNORE row times 0 would be nan
        grad = grad.masked_fill(targets == IGNORE, 0.0)
        return (grad[:, None] * direction).to(ctx.dtype), None, None, None, *nothing
    need_hidden, need_weight, _, need_bias, *_ = needs = ctx.needs_input_grad
    needs = need_hidden, need_weight, need_bias
    gradients = _linear_logp_backward(grad, *ctx.saved_tensors, ctx.factor, ctx.ceiling, *needs)
    dhidden, dweight, dbias = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return dhidden, dweight, None, dbias, *nothing


_linear_logp.register_autograd(_backward, setup_context=_setup_context)
