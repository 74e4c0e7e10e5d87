"""AdamW's arithmetic on compact state: 2 + 2 bytes of weight, 1 + 1 of moments, where float32 takes 16 in all.

A bfloat16 weight and 16 low bits are a whole float32 master between them, so nothing of a step is lost and the model
reads the half that it computes with. The moments are 8-bit codes with a float32 scale for each BLOCK elements: 6.03
bytes a parameter. `update_` decodes, takes torch.optim.AdamW's step in float32 and encodes again, in one pass where it
is compiled. B blocks; tensors are (B, BLOCK), or of any one shape where the moments are float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cream.upload import send

BLOCK = 256  # elements that share a scale
EPS = 1e-8
LEVELS_M, LEVELS_V = 127, 255


def split(master: Tensor) -> tuple[Tensor, Tensor]:  # float32 -> bfloat16, int16
    """The bfloat16 nearest to the master, and what is left of its bits; join(*split(x)) is x, bit for bit.

    float32 bits are ordered as magnitudes, exponents included, so "nearest" is integer arithmetic, and a carry out of
    the mantissa is the next exponent. Ties go away from zero. To even, as tensor.bfloat16() has it, 65,537 floats would
    round to each even bfloat16, one more than 16 bits can tell apart; so one master in 131,072 differs from it, and is
    as near.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:  # bfloat16, int16 in [-0x8000, 0x7FFF] -> float32
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def dithered(
    weight: Tensor,
    seed: int,  # another for each tensor and each training, or the same elements are near an edge in all of them
    whole: torch.Size | None = None,  # the shape of what weight is rows of, where it is not all
    rows: slice | None = None,  # which
) -> Tensor:  # int16 of weight's shape
    """Low bits that put a float32 master somewhere in the interval that rounds to the bfloat16 weight, drawn evenly,
    the same each time from the same seed.

    A master equal to the weight would have to move by half a bfloat16 step, 0.2 to 0.4% of the weight, before the model
    saw anything, and a short training at a small rate would be rounded away whole. From here a move by a fraction f of
    a step changes that fraction of the weights: what the model sees is the masters' move, in the mean.
    """
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"masters are for bfloat16 weights, not {weight.dtype}")
    generator = torch.Generator(weight.device).manual_seed(seed)
    shape = whole or weight.shape
    low = torch.randint(-0x7FFF, 0x8000, shape, generator=generator, device=weight.device, dtype=torch.int16)
    low = low if rows is None else low[rows].clone()
    # Zero and subnormals have no room below: left alone.
    return low.masked_fill_(weight.abs() < torch.finfo(torch.bfloat16).tiny * 2, 0)


@functools.lru_cache(maxsize=4)  # a step asks for each of a model's tensors
def thresholds(draw: int, device: torch.device) -> Tensor:  # (BLOCK,) float32 in [0, 1)
    """Where each element of a block rounds up at its draw-th rounding: a value's fraction above it does.

    A golden-ratio sequence in the draw, so that over n of them a fraction f is rounded up f n times to within a few,
    where random draws miss by sqrt(n); and a function of `draw` alone, so that a resumed run rounds as it would have.
    """
    place = torch.arange(BLOCK, dtype=torch.float64) * 0.7548776662466927 + draw * 0.6180339887498949
    return send(place.remainder(1.0).float().clamp_(max=1 - 2**-24), device)


def encode_m(m: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:  # (B, BLOCK) float32 -> int8, (B, 1) float32
    """First moments as sign(c) (c / 127)^2 of the block's largest: steps of 1.6% there, 16,129 times smaller at most.

    Rounded up or down so that the decoded value is the given one in the mean.
    """
    scale = m.abs().amax(1, keepdim=True)
    y = m.abs() * (LEVELS_M**2 / scale.clamp(min=1e-38))
    below = y.sqrt().floor().clamp(max=LEVELS_M - 1)
    code = below + ((y - below * below) > threshold * (2 * below + 1)).float()
    return (code * m.sign()).to(torch.int8), scale


def decode_m(code: Tensor, scale: Tensor) -> Tensor:
    c = code.float()
    return c * c.abs() * (scale * LEVELS_M**-2)


def encode_v(v: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:  # (B, BLOCK) float32 -> uint8, (B, 1) float32
    """Second moments as (c / 255)^4 of the block's largest, so that their roots keep the first moments' resolution.

    Right in the mean, like encode_m: beta2 moves a moment by a thousandth a step, which nearest rounding would never
    let through. What is not 0 stays above 0, since it divides: the smallest steps come out smaller, never larger.
    """
    scale = v.amax(1, keepdim=True)
    y = v * (LEVELS_V**4 / scale.clamp(min=1e-38))
    below = y.sqrt().sqrt().floor().clamp(max=LEVELS_V - 1)
    square, next_square = below * below, (below + 1) * (below + 1)
    up = (y - square * square) > threshold * ((next_square - square) * (next_square + square))
    code = (below + up.float()).maximum((v > 0).float())
    return code.to(torch.uint8), scale


def decode_v(code: Tensor, scale: Tensor) -> Tensor:
    square = code.float().square()
    return square * square * (scale * LEVELS_V**-4)


def update_(
    weight: Tensor,  # bfloat16, or float32 where low is None
    low: Tensor | None,  # int16
    m: Tensor,  # int8, or float32 where the scales are None
    m_scale: Tensor | None,  # (B, 1) float32
    v: Tensor,  # uint8, or float32
    v_scale: Tensor | None,  # (B, 1) float32
    grad: Tensor,  # bfloat16 or float32
    factor: Tensor,  # () float32, what clipping leaves of the gradient
    numbers: Tensor,  # (3,) float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - lr * decay
    threshold: Tensor,  # (BLOCK,) float32
    betas: tuple[float, float],
) -> None:
    """One step of torch.optim.AdamW, in place."""
    grad = grad.float() * factor
    mean = m if m_scale is None else decode_m(m, m_scale)
    square = v if v_scale is None else decode_v(v, v_scale)
    mean = mean + (grad - mean) * (1 - betas[0])
    square = square * betas[1] + grad * grad * (1 - betas[1])
    master = weight if low is None else join(weight, low)
    master = master * numbers[2] - numbers[0] * mean / (square.sqrt() * numbers[1] + EPS)
    if m_scale is not None:
        code, scale = encode_m(mean, threshold)
        m.copy_(code), m_scale.copy_(scale)
        code, scale = encode_v(square, threshold)
        v.copy_(code), v_scale.copy_(scale)
    else:
        m.copy_(mean), v.copy_(square)
    if low is None:
        weight.copy_(master)
    else:
        upper, lower = split(master)
        weight.copy_(upper), low.copy_(lower)


def add_(
    total: Tensor,  # (B, BLOCK) bfloat16
    grad: Tensor,  # (B, BLOCK)
    threshold: Tensor,  # (BLOCK,) float32
) -> None:
    """total += grad, rounded to bfloat16 so that it is right in the mean."""
    bits = (total.float() + grad.float()).view(torch.int32) + ((1 - threshold) * 0x10000).to(torch.int32)
    total.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
