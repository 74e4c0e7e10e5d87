"""linear_logp on CUDA: a store-free forward, and chunks of the vendor's product with the row kernels over them.

N tokens (rows), D hidden size, V vocabulary. The store-free forward cuts the logits into tiles of rows x vocabulary and
gives them out to as many programs as the card runs at once. A tile leaves three numbers a row (its maximum, the sum of
its exponentials and, where it is here, the target's logit), so what is written is 8 bytes for every block_v logits, and
a small kernel combines them. It never waits for the host: rows to ignore go to the end, and the programs read on the
device how many come before.

Where a gradient is wanted the logits must exist for the products that follow: float32 chunks of whole rows, made by
the vendor's product from half-precision inputs without rounding, overwritten in place by their gradient.
"""

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .gather_logp_triton import LOWEST, finish, finish_entropy, gradient_into, over, squash, statistics
from .linear_logp_torch import rows_that_count, scatter_rows
from .reference import IGNORE


@triton.jit
def partials_kernel(
    hidden,  # (N, D)
    weight,  # (V, D)
    targets,  # (N,) int64
    counted,  # () int64: rows from here on are to be ignored
    bias,  # (V,) or unused
    maxima,  # (tiles of V, N) float32 out: of each tile and row, the target left out
    sums,  # (tiles of V, N) float32 out: of exp(z - maximum)
    moments,  # (tiles of V, N) float32 out: of exp(z - maximum) * (z - maximum); or unused
    target_logit,  # (N,) float32 out, where the target is in the vocabulary
    N,
    V,
    D,
    hidden_row_stride,
    hidden_column_stride,
    weight_row_stride,
    weight_column_stride,
    factor,
    ceiling,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    MOMENT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    # Descriptors made here and not by the host: Triton 3.9 cannot split a host's between two consumer warp groups.
    if TMA:
        hidden_tiles = tl.make_tensor_descriptor(hidden, [N, D], [hidden_row_stride, 1], [BLOCK_N, BLOCK_D])
        weight_tiles = tl.make_tensor_descriptor(weight, [V, D], [weight_row_stride, 1], [BLOCK_V, BLOCK_D])
    num_rows = tl.load(counted).to(tl.int32)
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    vocabulary_blocks = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(
        tl.program_id(0), row_blocks * vocabulary_blocks, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        # Rows go by fastest, GROUP blocks of them, so that programs at work together share panels of the head in L2.
        group = tile // (GROUP * vocabulary_blocks)
        in_group = tl.minimum(GROUP, row_blocks - group * GROUP)
        within = tile - group * GROUP * vocabulary_blocks
        first_row = (group * GROUP + within % in_group) * BLOCK_N
        block = within // in_group
        first_column = block * BLOCK_V
        rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_N)
        lanes = tl.arange(0, BLOCK_V)
        row_mask = rows < num_rows
        lane_mask = lanes < V - first_column

        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            if TMA:
                a = hidden_tiles.load([first_row, d])
                b = weight_tiles.load([first_column, d])
            else:
                depth = d + tl.arange(0, BLOCK_D).to(tl.int64)
                a = tl.load(
                    hidden + rows[:, None] * hidden_row_stride + depth[None, :] * hidden_column_stride,
                    mask=row_mask[:, None] & (depth < D)[None, :],
                    other=0.0,
                )
                columns = first_column + lanes.to(tl.int64)
                b = tl.load(
                    weight + columns[:, None] * weight_row_stride + depth[None, :] * weight_column_stride,
                    mask=lane_mask[:, None] & (depth < D)[None, :],
                    other=0.0,
                )
            z = tl.dot(a, tl.trans(b), z, input_precision="ieee")

        if BIAS:
            z += tl.load(bias + first_column + lanes, mask=lane_mask, other=0.0).to(tl.float32)[None, :]
        z = squash(z, factor, ceiling, CAPPED)
        target = tl.load(targets + rows, mask=row_mask, other=-1)
        own = lanes[None, :] == (target - first_column).to(tl.int32)[:, None]
        here = (target >= first_column) & (target < first_column + BLOCK_V) & (target < V)
        tl.store(target_logit + rows, tl.sum(tl.where(own, z, 0.0), 1), mask=row_mask & here)
        z = tl.where(own | (lanes >= V - first_column)[None, :], float("-inf"), z)
        highest = tl.maximum(tl.max(z, 1), LOWEST)
        e = tl.exp(z - highest[:, None])
        place = block.to(tl.int64) * N + rows
        tl.store(maxima + place, highest, mask=row_mask)
        tl.store(sums + place, tl.sum(e, 1), mask=row_mask)
        if MOMENT:
            moment = tl.sum(tl.where(e == 0.0, 0.0, e * (z - highest[:, None])), 1)
            tl.store(moments + place, moment, mask=row_mask)


@triton.jit
def combine_kernel(
    maxima,  # (T, N) float32, T tiles
    sums,
    moments,  # or unused
    target_logit,  # (N,) float32
    order,  # (N,) int64: where each row came from
    counted,  # () int64
    logp,  # (N,) float32 out, as the next three, in the callers' order
    maximum,
    others,
    entropy,  # or unused
    N,
    T,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    counts = rows < tl.load(counted)
    highest = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, T, BLOCK_T):
        part = first + tl.arange(0, BLOCK_T).to(tl.int64)
        place = part[:, None] * N + rows[None, :]
        inside = (part < T)[:, None] & (mask & counts)[None, :]
        m = tl.load(maxima + place, mask=inside, other=LOWEST)
        s = tl.load(sums + place, mask=inside, other=0.0)
        before = highest
        highest = tl.maximum(before, tl.max(m, 0))
        weight = tl.exp(m - highest[None, :])
        shrink = tl.exp(before - highest)
        if ENTROPY:
            local = tl.load(moments + place, mask=inside, other=0.0)
            moment = shrink * (moment + total * (before - highest))
            moment += tl.sum(weight * (local + s * (m - highest[None, :])), 0)
        total = total * shrink + tl.sum(s * weight, 0)
    target = tl.load(target_logit + rows, mask=mask & counts, other=0.0)
    row_logp = finish(highest, total, target)
    place = tl.load(order + rows, mask=mask, other=0)
    tl.store(logp + place, tl.where(counts, row_logp, 0.0), mask=mask)
    tl.store(maximum + place, tl.where(counts, highest, 0.0), mask=mask)
    tl.store(others + place, tl.where(counts, total, 0.0), mask=mask)
    if ENTROPY:
        row_entropy = finish_entropy(row_logp, total, target - highest, moment)
        tl.store(entropy + place, tl.where(counts, row_entropy, 0.0), mask=mask)


def forward(
    hidden: Tensor,  # (N, D) float32, bfloat16 or float16
    weight: Tensor,  # (V, D) same dtype
    targets: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    factor: float,
    ceiling: float,
    keep_direction: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, maximum, others (N,), direction (N, D) and entropy (N,), each of the last two empty unless wanted."""
    if not keep_direction:
        tile = tiles.linear_logp(tiles.architecture(hidden.device), hidden.dtype, hidden.shape[1])
        if not tile.vendor_gemm:
            logp, maximum, others, entropy = store_free(
                hidden, weight, targets, bias, factor, ceiling, want_entropy, tile
            )
            return logp, maximum, others, hidden.new_empty((0, hidden.shape[1]), dtype=torch.float32), entropy
    return chunked(hidden, weight, targets, bias, factor, ceiling, keep_direction, want_entropy)


def store_free(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,
    factor: float,
    ceiling: float,
    want_entropy: bool,
    tile: tiles.Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, maximum, others (N,), entropy (N,) or (0,)
    (N, D), V = hidden.shape, weight.shape[0]
    if tile.tma and not (fits_a_descriptor(weight) and hidden.shape[1] * hidden.element_size() % 16 == 0):
        tile = tiles.without_tma(tile)
    counts = targets != IGNORE
    counted = counts.sum()
    order = torch.argsort(counts, descending=True, stable=True)
    hidden, targets = hidden.index_select(0, order), targets.index_select(0, order)
    parts = triton.cdiv(V, tile.block_v)
    maxima, sums = hidden.new_empty((2, parts, N), dtype=torch.float32).unbind(0)
    moments = torch.empty_like(maxima) if want_entropy else maxima
    target_logit = torch.full((N,), torch.nan, dtype=torch.float32, device=hidden.device)
    logp, maximum, others = (torch.empty_like(target_logit) for _ in range(3))
    entropy = target_logit.new_empty(N if want_entropy else 0)
    if N:
        launch = partials_kernel[(min(triton.cdiv(N, tile.block_n) * parts, num_programs(hidden.device, tile)),)]
        contextvars.copy_context().run(
            with_scratch,
            launch,
            hidden=hidden,
            weight=weight,
            targets=targets,
            counted=counted,
            bias=hidden if bias is None else bias.contiguous(),
            maxima=maxima,
            sums=sums,
            moments=moments,
            target_logit=target_logit,
            N=N,
            V=V,
            D=D,
            hidden_row_stride=hidden.stride(0),
            hidden_column_stride=hidden.stride(1),
            weight_row_stride=weight.stride(0),
            weight_column_stride=weight.stride(1),
            factor=factor,
            ceiling=ceiling,
            BIAS=bias is not None,
            CAPPED=ceiling > 0,
            MOMENT=want_entropy,
            TMA=tile.tma,
            BLOCK_N=tile.block_n,
            BLOCK_V=tile.block_v,
            BLOCK_D=tile.block_d,
            GROUP=16,
            WARP_SPECIALIZE=tile.warp_specialize,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **tiles.OPTIONS,
        )
        combine_kernel[(triton.cdiv(N, tiles.COMBINE_ROWS),)](
            maxima=maxima,
            sums=sums,
            moments=moments,
            target_logit=target_logit,
            order=order,
            counted=counted,
            logp=logp,
            maximum=maximum,
            others=others,
            entropy=entropy if want_entropy else logp,
            N=N,
            T=parts,
            ENTROPY=want_entropy,
            BLOCK_N=tiles.COMBINE_ROWS,
            BLOCK_T=tiles.COMBINE_TILES,
            num_warps=4,
            **tiles.OPTIONS,
        )
    return logp, maximum, others, entropy


def fits_a_descriptor(matrix: Tensor) -> bool:
    """Whether the bulk copy engine can read it: dense rows that start at multiples of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0


def with_scratch(launch, **given) -> None:
    """Launch what makes descriptors on the device, which takes 256 bytes a program of torch's memory.

    Triton keeps its allocator in a context variable: run this in a copy of the context, and the caller's is untouched.
    """
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=given["hidden"].device)
    )
    launch(**given)


def num_programs(device: torch.device, tile: tiles.Tile) -> int:
    """One a multiprocessor where a tile's stages fill its shared memory, elsewhere eight warps of programs; on the
    interpreter two, so that programs loop."""
    if device.type != "cuda":
        return 2
    each = 1 if tile.tma else max(1, 8 // tile.num_warps)
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def product(
    a: Tensor,  # (n, k)
    b: Tensor,  # (k, m) same dtype
    *,
    out: Tensor,  # (n, m) float32, or the dtype of a and b
    add: bool = False,  # to what out holds, in out's dtype
) -> Tensor:  # out
    """a @ b by the vendor's library, with float32 sums that are not rounded on the way to a float32 `out`."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if a.device.type != "cuda" or torch.version.hip:  # no such product on ROCm; nor for the interpreter, in tests
        a, b = a.to(out.dtype), b.to(out.dtype)
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def row_chunks(num_rows: int, V: int, sums_dweight: bool) -> list[slice]:
    size = tiles.chunk_rows(V, sums_dweight)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def chunked(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,
    factor: float,
    ceiling: float,
    keep_direction: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """forward by the vendor's product; the direction is dlogp/dhidden = (onehot - p) . weight, a chunk at a time."""
    num_rows, V = hidden.shape[0], weight.shape[0]
    kept = rows_that_count(targets, V)
    if kept is not None:
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    results = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4 if want_entropy else 3)]
    direction = hidden.new_empty(hidden.shape, dtype=torch.float32) if keep_direction else None
    chunks = row_chunks(hidden.shape[0], V, sums_dweight=False)
    buffer = hidden.new_empty((chunks[0].stop if chunks else 0, V), dtype=torch.float32)
    for rows in chunks:
        logits = product(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
        stats = statistics(logits, targets[rows], bias, factor, ceiling, want_entropy)
        for result, values in zip(results, stats, strict=False):
            result[rows] = values
        if direction is not None:
            ones = logits.new_ones(()).expand(logits.shape[0])
            coefficients = over(logits, hidden.dtype)
            gradient_into(coefficients, ones, logits, targets[rows], bias, *stats[:3], factor, ceiling)
            product(coefficients, weight, out=direction[rows])
    logp, maximum, others, *entropy = (scatter_rows(values, kept, num_rows, torch.float32) for values in results)
    if direction is None:
        direction = hidden.new_empty((0, hidden.shape[1]), dtype=torch.float32)
    else:
        direction = scatter_rows(direction, kept, num_rows, torch.float32)
    return logp, maximum, others, direction, entropy[0] if entropy else logp.new_empty(0)


def gradients(
    grad: Tensor,  # (N,) float32, upstream of logp
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    logp: Tensor,  # (N,) float32, as the next two
    maximum: Tensor,
    others: Tensor,
    factor: float,
    ceiling: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dhidden (N, D), dweight (V, D), dbias (V,), as the inputs
    """Recompute the logits a chunk of rows at a time; dweight is summed over chunks in float32 and rounded once."""
    num_rows, V = hidden.shape[0], weight.shape[0]
    kept = rows_that_count(targets, V)
    rows_of = [grad, hidden, targets, logp, maximum, others]
    if kept is not None:
        rows_of = [values.index_select(0, kept) for values in rows_of]
    grad, hidden, targets, logp, maximum, others = rows_of
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
    dbias = dweight.new_zeros(V) if need_weight and need_bias else hidden.new_zeros(V, dtype=torch.float32)
    chunks = row_chunks(hidden.shape[0], V, sums_dweight=need_weight)
    buffer = hidden.new_empty((chunks[0].stop if chunks else 0, V), dtype=torch.float32)
    for rows in chunks:
        logits = product(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
        coefficients = over(logits, hidden.dtype)
        statistics_of_rows = logp[rows], maximum[rows], others[rows]
        gradient_into(coefficients, grad[rows], logits, targets[rows], bias, *statistics_of_rows, factor, ceiling)
        if dhidden is not None:
            product(coefficients, weight, out=dhidden[rows])
        if dweight is not None:
            product(coefficients.T, hidden[rows], out=dweight, add=True)
        if need_bias:
            dbias += coefficients.sum(0, dtype=torch.float32)
    return (
        None if dhidden is None else scatter_rows(dhidden, kept, num_rows, hidden.dtype),
        None if dweight is None else dweight.to(weight.dtype),
        dbias.to(weight.dtype) if need_bias else None,
    )
