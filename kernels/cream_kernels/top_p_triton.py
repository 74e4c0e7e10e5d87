"""top_p_sample on CUDA: one program a row, no sort.

N rows, V vocabulary, W thresholds tried at once (WAYS). Logits are compared as integers of the same order (keys), so
that the nucleus ends at an exact logit and equal logits stay equal. A weight is exp((logit - maximum) / temperature).

    1  the largest key and the lowest one that is not banned, and whether the row has a distribution
    2  mass(t) = sum of the weights whose key is at least t, for W thresholds across what is left of the keys, until
       the largest key is known whose mass reaches top_p of all. The first thresholds divide weights, the others the
       keys between two of those: most often 3 passes for half precision and 8 for float32, 12 at worst. A block that
       holds no key as large as the lowest threshold is not summed: from the second pass on that is most of them.
    3  the masses of the nucleus' blocks in id order until they exceed uniform * its mass; one scan of that block

Passes after the first find their row in L2, where the rows at work fit into it. The sum of a block's weights in step 2
is float32, a tree of at most 15 roundings (9e-7); blocks are added in float64, and so is everything in step 3. mass(t)
is always summed the same way, so it never rises with t, and two thresholds without a key between them have the same
mass to the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .gather_logp_triton import row_block

NO_DISTRIBUTION, BAD_UNIFORM = -1, -2  # in place of a token
_NO_DISTRIBUTION, _BAD_UNIFORM = tl.constexpr(NO_DISTRIBUTION), tl.constexpr(BAD_UNIFORM)
SIGN_OUT = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)
SPREAD = tl.constexpr(20.0)  # the first thresholds divide weights from 1 to exp(-20), 2e-9
NEVER = tl.constexpr(1e-300)  # above 0, and reached by any weight: top_p 0 takes the largest logit

# Low bits of a float32 that came from a narrower type say nothing: its keys are that much fewer.
EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """int32 that compare as the float32 do, one for both zeros; NaNs lie beyond the infinities, by their sign."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & SIGN_OUT)) >> SHIFT


@triton.jit
def logit_of(key, SHIFT: tl.constexpr):
    """The float32 that key_of made this key of."""
    ordered = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (ordered ^ ((ordered >> 31) & SIGN_OUT)).to(tl.float32, bitcast=True)


@triton.jit
def read(logits, start, V, BLOCK: tl.constexpr):
    """Columns of one row and their logits, -inf beyond the last."""
    columns = start + tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
    return columns, x.to(tl.float32)


@triton.jit
def extremes(logits, V, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Keys: the lowest above -inf, the largest; and whether there is a distribution."""
    infinite: tl.constexpr = INFINITY_BITS >> SHIFT
    banned: tl.constexpr = -1 - infinite  # key of -inf
    bottom = tl.full((BLOCK,), infinite, tl.int32)
    lowest = tl.full((BLOCK,), infinite, tl.int32)
    highest = tl.full((BLOCK,), banned, tl.int32)
    for start in range(0, V, BLOCK):
        _, x = read(logits, start, V, BLOCK)
        key = key_of(x, SHIFT)
        bottom = tl.minimum(bottom, key)
        lowest = tl.minimum(lowest, tl.where(key > banned, key, infinite))
        highest = tl.maximum(highest, key)
    most = tl.max(highest, 0)
    return tl.min(lowest, 0), most, (tl.min(bottom, 0) >= banned) & (most > banned) & (most < infinite)


@triton.jit
def first_column(logits, key, V, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest id that has this key."""
    first = tl.full((BLOCK,), V, tl.int64)
    for start in range(0, V, BLOCK):
        columns, x = read(logits, start, V, BLOCK)
        first = tl.minimum(first, tl.where(key_of(x, SHIFT) == key, columns, V))
    return tl.min(first, 0)


@triton.jit
def masses(
    logits,  # one row
    thresholds,  # (W,) int32 keys, the lowest first
    least,  # the first of them
    V,
    maximum,
    scale,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # (W,) float64
    total = tl.zeros(thresholds.shape, tl.float64)
    for start in range(0, V, BLOCK):
        _, x = read(logits, start, V, BLOCK)
        key = key_of(x, SHIFT)
        if tl.max(key, 0) >= least:
            weight = tl.exp((x - maximum) * scale)
            inside = tl.where(key[None, :] >= thresholds[:, None], weight[None, :], 0.0)
            total += tl.sum(inside, 1).to(tl.float64)
    return total


@triton.jit
def nucleus(
    logits,  # one row
    lowest,
    highest,
    top_p,
    V,
    maximum,
    scale,
    SHIFT: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # edge key, how many of the logits with that key belong to the nucleus, its mass in float64
    """The largest key with mass(key) >= top_p * mass(lowest), by a search in WAYS parts."""
    ways = tl.arange(0, WAYS)
    low, high = lowest.to(tl.int64), highest.to(tl.int64) + 1  # mass(low) reaches the target, mass(high) does not
    reached = tl.full((), 0.0, tl.float64)  # mass(low)
    above = tl.full((), 0.0, tl.float64)  # mass(high)
    target = tl.full((), 0.0, tl.float64)
    while (high - low > 1) | (target == 0.0):
        step = (high - low + WAYS - 1) // WAYS
        thresholds = tl.minimum(low + step * ways, high)
        if target == 0.0:  # as yet: the first ones divide weights, not keys
            spread = key_of(maximum - (WAYS - ways) * (SPREAD / WAYS / scale), SHIFT).to(tl.int64)
            thresholds = tl.where(ways == 0, low, tl.minimum(tl.maximum(spread, low), high))
        mass = masses(logits, thresholds.to(tl.int32), low.to(tl.int32), V, maximum, scale, SHIFT, BLOCK)
        reached = tl.max(mass, 0)
        if target == 0.0:
            target = tl.maximum(top_p * reached, NEVER)
        enough = (mass >= target) & (thresholds < high)
        reached = tl.min(tl.where(enough, mass, reached), 0)
        above = tl.maximum(above, tl.max(tl.where(enough, 0.0, mass), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, thresholds, low), 0))
        high = tl.min(tl.where(enough, high, thresholds), 0)
    edge = low.to(tl.int32)
    weight = tl.exp((logit_of(edge, SHIFT) - maximum) * scale).to(tl.float64)
    ties = tl.maximum(tl.ceil((target - above) / tl.maximum(weight, NEVER)), 1.0)
    mass = tl.minimum(above + ties * weight, reached)
    return edge, tl.minimum(ties, V).to(tl.int64), mass


@triton.jit
def draw(
    logits,  # one row
    edge,
    ties,
    wanted,  # float64
    V,
    maximum,
    scale,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # int64
    """The first id at which the nucleus' mass, in id order, exceeds `wanted`; the last one where rounding keeps it."""
    edge_weight = tl.exp((logit_of(edge, SHIFT) - maximum) * scale).to(tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    left = ties
    start = tl.full((), 0, tl.int64)
    # of the last block with any mass: where it starts, the mass before it, and the ties that are left for it
    found, before, ties_there = start, mass, ties
    while (mass <= wanted) & (start < V):
        _, x = read(logits, start, V, BLOCK)
        key = key_of(x, SHIFT)
        taken = tl.minimum(tl.sum((key == edge).to(tl.int32), 0).to(tl.int64), left)
        weight = tl.where(key > edge, tl.exp((x - maximum) * scale), 0.0).to(tl.float64)
        here = tl.sum(weight, 0) + taken.to(tl.float64) * edge_weight
        if here > 0.0:
            found, before, ties_there = start, mass, left
        mass += here
        left -= taken
        start += BLOCK
    columns, x = read(logits, found, V, BLOCK)
    key = key_of(x, SHIFT)
    tied = key == edge
    inside = (key > edge) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties_there))
    weight = tl.where(inside, tl.exp((x - maximum) * scale), 0.0).to(tl.float64)
    heavy = weight > 0.0
    token = tl.min(tl.where(heavy & (before + tl.cumsum(weight, 0) > wanted), columns, V), 0)
    return tl.where(token < V, token, tl.max(tl.where(heavy, columns, 0), 0))


@triton.jit
def sample_kernel(
    logits,  # (N, V)
    uniform,  # (N,) float64
    tokens,  # (N,) int64 out
    V,
    row_stride,
    uniform_stride,
    scale,  # 1 / temperature, or 0 for the largest logit alone
    top_p: tl.float64,
    SHIFT: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    u = tl.load(uniform + row * uniform_stride)
    lowest, highest, sound = extremes(logits, V, SHIFT, WIDE)
    if not ((u >= 0.0) & (u < 1.0)):
        tl.store(tokens + row, _BAD_UNIFORM)
    elif not sound:
        tl.store(tokens + row, _NO_DISTRIBUTION)
    elif scale == 0.0:
        tl.store(tokens + row, first_column(logits, highest, V, SHIFT, WIDE))
    else:
        maximum = logit_of(highest, SHIFT)
        if top_p >= 1.0:
            edge, ties = lowest, tl.full((), 0, tl.int64) + V
            all_of_it = tl.zeros((1,), tl.int32) + lowest
            mass = tl.max(masses(logits, all_of_it, lowest, V, maximum, scale, SHIFT, BLOCK), 0)
        else:
            edge, ties, mass = nucleus(logits, lowest, highest, top_p, V, maximum, scale, SHIFT, WAYS, BLOCK)
        token = draw(logits, edge, ties, u * mass, V, maximum, scale, SHIFT, BLOCK)
        tl.store(tokens + row, token)


def sample(
    logits: Tensor,  # (N, V) float32, bfloat16 or float16, dense columns
    uniform: Tensor,  # (N,) float64
    scale: float,  # 1 / temperature within float32's range, or 0 for the largest logit alone
    top_p: float,
) -> Tensor:  # (N,) int64; NO_DISTRIBUTION or, before it, BAD_UNIFORM where a row has no token
    N, V = logits.shape
    tokens = torch.empty(N, dtype=torch.int64, device=logits.device)
    sample_kernel[(N,)](
        logits=logits,
        uniform=uniform,
        tokens=tokens,
        V=V,
        row_stride=logits.stride(0),
        uniform_stride=uniform.stride(0),
        scale=scale,
        top_p=top_p,
        SHIFT=EMPTY_BITS[logits.dtype],
        WAYS=tiles.SAMPLE_WAYS,
        BLOCK=min(tiles.SAMPLE_BLOCK, row_block(V)),
        WIDE=row_block(V),
        num_warps=tiles.ROW_WARPS,
        **tiles.OPTIONS,
    )
    return tokens
