"""linear_weighted_dpo as torch operations, chunk by chunk: the body for CPUs, and for what Triton does not serve.

P pairs, N tokens (rows) of 2P sequences, D hidden size, V vocabulary; n rows of a chunk, which is of whole pairs, c
columns of a block. Wide is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .linear_logp_torch import (
    Products,
    Squash,
    Statistics,
    add_target_weights_,
    fold_tile_,
    scale_rows,
    share_of_others,
    tile_shape,
)
from .products import (
    add_product_,
    operand_dtype,
    put_product,
    rows_at_once,
    tile_in,
    transposed,
    transposed_room,
    wide_dtype,
)
from .weighted_dpo import loss_and_slope

PLAIN = Squash(1.0, 0.0)
BLOCK = 4032  # vocabulary at least that is multiplied out at once: some of a CPU's tiles


def margin_of(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    ratio = logp - reference_logp
    return beta * (ratio[0::2] - ratio[1::2])


def sum_sequences(
    rows: Tensor,  # (N,)
    sequence: Tensor,  # (N,) int64, the sequence of each row
    num_sequences: int,
) -> Tensor:  # (S,) in the dtype of rows, summed in float64: what ranks responses is a difference of such sums
    sums = rows.new_zeros(num_sequences, dtype=torch.float64)
    return sums.index_add(0, sequence, rows.double()).to(rows.dtype)


def pair_chunks(bounds: list[int], chunk_tokens: int) -> list[tuple[int, int, slice]]:
    """First pair, end and rows of runs of consecutive pairs with at most chunk_tokens rows together, or of one pair."""
    chunks, first, num_pairs = [], 0, len(bounds) // 2
    for pair in range(1, num_pairs + 1):
        if pair == num_pairs or bounds[2 * pair + 2] - bounds[2 * first] > chunk_tokens:
            chunks.append((first, pair, slice(bounds[2 * first], bounds[2 * pair])))
            first = pair
    return chunks


class Blocks(NamedTuple):
    """How the vocabulary is cut: blocks, each of whole tiles, that are multiplied out at once."""

    columns: list[slice]
    num_columns: int  # of each tile but the last

    @classmethod
    def of(cls, weight: Tensor, num_rows: int) -> Blocks:
        """For that many rows in all."""
        num_columns, V = tile_shape(weight.device, weight.dtype, num_rows)[1], weight.shape[0]
        # Wide copies of what is multiplied out had better be small.
        size = max(BLOCK, num_columns) if operand_dtype(weight) == weight.dtype else num_columns
        return cls([slice(first, min(first + size, V)) for first in range(0, V, size)], num_columns)

    @property
    def most_columns(self) -> int:
        return self.columns[0].stop

    def within(self, memory: Tensor, num_rows: int) -> list[Tensor]:
        """Of each block (num_rows, c), at the beginning of its rows of memory (V, at least num_rows)."""
        return [tile_in(memory[c].view(-1), num_rows, c.stop - c.start) for c in self.columns]

    def in_turn(self, room: Tensor, num_rows: int) -> list[Tensor]:
        """The same, each in the place of the one before."""
        return [tile_in(room, num_rows, c.stop - c.start) for c in self.columns]


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    blocks: Blocks,
    targets: Tensor,  # (N,) in [0, V)
    ignored: Tensor | None,  # (N,) bool, rows to count as 0; None where values may be looked at, and none is left
    bounds: list[int],  # 2P + 1, where each sequence starts, and N
    sequence: Tensor,  # (N,) int64, the sequence of each row
    reference_logp: Tensor,  # (2P,) wide
    agreement: Tensor,  # (P,) wide
    beta: float,
    chunk_tokens: int,
    need_hidden: bool,
    held: Tensor | None,  # (V, room), where all rows are one chunk whose logits shall be left there for multiply_out
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, tuple[Tensor, ...]]:
    """loss (P,), logp (2P,) wide; dhidden (N, D) wide and dweight (V, D) as it was summed, neither where held is given;
    there the maximum so far at each tile (N, tiles), else (N, 0); and of each row (N,), wide: dloss/dlogp, logp,
    maximum and others.
    """
    V, dtype = weight.shape[0], wide_dtype(hidden)
    most_rows = tile_shape(hidden.device, hidden.dtype)[0]
    products, wide = Products.of(hidden, weight, None, PLAIN), functools.partial(hidden.new_empty, dtype=dtype)
    chunks = pair_chunks(bounds, chunk_tokens)
    longest = max((rows.stop - rows.start for *_, rows in chunks), default=0)
    wide_tile = wide(0 if weight.dtype == dtype else min(longest, most_rows) * blocks.num_columns)
    loss, logp = wide(len(bounds) // 2), wide(len(bounds) - 1)
    row_values = tuple(wide(hidden.shape[0]) for _ in range(4))
    highest, dhidden, dweight = wide(hidden.shape[0], 0), None, None
    if held is None:
        # Of one chunk, products are rounded once either way, so there is no need of a wide sum.
        summed = weight.dtype if len(chunks) == 1 and ignored is None else dtype
        dweight = weight.new_empty(weight.shape, dtype=summed) if chunks else weight.new_zeros(weight.shape)
        dhidden = wide(hidden.shape).zero_() if need_hidden else None
        logits, across = weight.new_empty(V, longest), transposed_room(weight, longest * blocks.most_columns)
    for first_pair, end_pair, rows in chunks:
        pairs, sequences = slice(first_pair, end_pair), slice(2 * first_pair, 2 * end_pair)
        num_rows, own = rows.stop - rows.start, targets[rows]

        # Up: logits, each tile kept as exp(z - highest so far), as in linear_logp.
        kept = blocks.within(logits if held is None else held, num_rows)
        statistics, tops = Statistics.empty(num_rows, hidden), []
        for columns, block in zip(blocks.columns, kept, strict=True):
            for i, tile in enumerate(block.split(blocks.num_columns, 1)):
                first = columns.start + i * blocks.num_columns
                _fold_products_(tile, wide_tile, products, rows, first, own - first, statistics)
                tops.append(statistics.maximum.clone())
        row_logp, _ = statistics.finish()

        # The turn: every sequence of the chunk is complete, so each row's factor is known.
        if ignored is not None:
            row_logp = row_logp.masked_fill(ignored[rows], 0.0)
        within = sequence[rows] - sequences.start
        logp[sequences] = sum_sequences(row_logp, within, 2 * (end_pair - first_pair))
        margin = margin_of(logp[sequences], reference_logp[sequences], beta)
        loss[pairs], slope = loss_and_slope(margin, agreement[pairs])
        row_grad = beta * torch.stack((slope, -slope), dim=1).flatten()[within]  # chosen, rejected, ...
        found = row_grad, row_logp, statistics.maximum, statistics.others
        for stored, value in zip(row_values, found, strict=True):
            stored[rows] = value

        # Down, or later. The first chunk writes dweight, the others add.
        if held is not None:
            highest = torch.stack(tops, 1)
        else:
            some = None if dhidden is None else dhidden[rows]
            operands = hidden[rows], weight, own, *found
            multiply_out(kept, kept, across, tops, blocks, *operands, some, dweight, adds=first_pair > 0)
    return loss, logp, dhidden, dweight, highest, row_values


def multiply_out(
    kept: list[Tensor],  # of each block (n, c): exp(logit - highest so far), 0 at the targets
    places: list[Tensor],  # the same, for coefficients: may be kept, may be one memory
    across: Tensor,  # transposed_room of a block
    tops: Iterable[Tensor],  # of each tile (n,): the maximum so far
    blocks: Blocks,
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
    row_grad: Tensor,  # (n,) dloss/dlogp, wide, as the next three
    row_logp: Tensor,
    maximum: Tensor,
    others: Tensor,
    dhidden: Tensor | None,  # (n, D) wide, added to
    dweight: Tensor,  # (V, D), written, or added to
    adds: bool,
) -> None:
    """Down: each tile becomes dloss/dlogits but for the targets, whose part is added in a wide dtype, and each block is
    multiplied out. A block's place may lie within its rows of dweight where across has room: else it is an operand of
    the product that is written there.
    """
    share = share_of_others(row_logp, others)
    scales = iter([-row_grad * share * (before - maximum).exp_() for before in tops])
    for columns, block, place in zip(blocks.columns, kept, places, strict=True):
        for tile, out in zip(block.split(blocks.num_columns, 1), place.split(blocks.num_columns, 1), strict=True):
            scale_rows(tile, next(scales), out)
        if dhidden is not None:
            add_product_(dhidden, place, weight[columns])
        (add_product_ if adds else put_product)(dweight[columns], transposed(place, across), hidden)
    at_target = -row_grad * torch.expm1(row_logp)
    if dhidden is not None:
        add_target_weights_(dhidden, at_target, weight, targets)
    _add_rows_(dweight, targets.clamp(0, weight.shape[0] - 1), at_target[:, None], hidden)


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
