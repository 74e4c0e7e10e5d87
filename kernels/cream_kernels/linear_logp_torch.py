"""The torch body of linear_logp: 2-D tiles (rows x vocabulary) with an online logsumexp. CPUs, and whatever else.

N tokens (rows), n of them that count, D hidden size, V vocabulary, c columns of a tile. Only a tile of logits exists at
a time, in float32 also for bfloat16 inputs. The algebra is at the head of linear_logp.py. linear_weighted_dpo walks the
same tiles, and holds on to those of a chunk. On CPUs the C++ pieces of linear_logp_native.py take the place of torch's
where they can: the product of a bfloat16 tile, the passes over a tile, and the whole of a forward without a direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import linear_logp_native as in_cpp
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
from .reference import IGNORE


class Squash(NamedTuple):
    """What stands between a product x and its logit z: factor * x, or ceiling * tanh(factor * x) where ceiling > 0."""

    factor: float
    ceiling: float

    @classmethod
    def of(cls, scale: float, softcap: float, temperature: float) -> Squash:
        if softcap > 0:
            return cls(scale / softcap, softcap / temperature)
        return cls(scale / temperature, 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        """z, in place of x."""
        if self.ceiling > 0:
            return x.mul_(self.factor).tanh_().mul_(self.ceiling)
        return x if self.factor == 1.0 else x.mul_(self.factor)

    def bend(self, z: Tensor) -> Tensor | None:
        """dz/dx / factor in z's shape, or None where there is no ceiling and it is 1."""
        return self.ceiling - z * z / self.ceiling if self.ceiling > 0 else None


class Statistics(NamedTuple):
    """What the tiles that went by have left of each row, all (n,) and wide, updated in place.

    maximum starts at the lowest finite number: from -inf, a tile of nothing but -inf (the target alone in its tile, a
    bias that forbids tokens) would make -inf - -inf. A target that no tile holds leaves its row nan.
    """

    maximum: Tensor  # of the logits but the target's
    others: Tensor  # sum over v != target of exp(z_v - maximum)
    target_logit: Tensor
    moment: Tensor | None  # sum over v != target of exp(z_v - maximum) * (z_v - maximum), for the entropy

    @classmethod
    def empty(cls, num_rows: int, like: Tensor, want_moment: bool = False) -> Statistics:
        dtype = wide_dtype(like)
        maximum = like.new_full((num_rows,), torch.finfo(dtype).min, dtype=dtype)
        zeros = torch.zeros_like(maximum)
        return cls(maximum, zeros, torch.full_like(maximum, torch.nan), zeros.clone() if want_moment else None)

    def of(self, rows: slice) -> Statistics:
        return Statistics(*(None if values is None else values[rows] for values in self))

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """logp and, where there is a moment, entropy: (n,) each."""
        log_others, above = self.others.log(), self.target_logit - self.maximum
        logp = functional.logsigmoid(above - log_others)
        if self.moment is None:
            return logp, None
        # -sum p log p with the target's part written as -logp + (1 - p_y) above, which does not cancel; where p_y is 0,
        # above is -inf, and log others is the logsumexp.
        of_target = torch.where(above == -torch.inf, log_others, -logp - torch.expm1(logp) * above)
        return logp, of_target - self.moment * share_of_others(logp, self.others)


def share_of_others(logp: Tensor, others: Tensor) -> Tensor:  # (n,) each
    """p_v / exp(z_v - maximum) for v != target: (1 - p_target) / others, and 0 where there are no others."""
    return torch.where(others == 0, 0.0, -torch.expm1(logp) / others)


def tile_shape(device: torch.device, dtype: torch.dtype, num_rows: int | None = None) -> tuple[int, int]:
    """(rows, vocabulary) of a tile for inputs of dtype; wider where there are no more rows than a small num_rows.

    On a CPU 8 MB of float32 stay in cache. A product packs its part of the weight anew for every tile of rows, so there
    should be few. In bfloat16, where products are short, a tile twice as wide is added into (n, D) less often. Rows a
    power of two apart would share their lines of a cache, so these are multiples of 63 lines. Elsewhere launches are
    what costs.
    """
    if device.type != "cpu":
        return 4096, 16384
    if dtype == torch.bfloat16:
        return 2048, 2016
    rows = next(rows for rows in (512, 1024, 2048) if rows == 2048 or (num_rows is not None and num_rows <= rows))
    return rows, 1008 * (2048 // rows)


def tiles_room(hidden: Tensor, weight: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:  # flat
    """Room for any tile, to be taken once: memory fresh from the system comes page by page."""
    num_rows, num_columns = shape
    return hidden.new_empty(min(hidden.shape[0], num_rows) * min(weight.shape[0], num_columns), dtype=dtype)


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


def scatter_rows(rows: Tensor, kept: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Put rows (K, ...) back at kept in (num_rows, ...), 0 elsewhere."""
    if kept is None:
        return rows.to(dtype)
    return rows.new_zeros((num_rows, *rows.shape[1:]), dtype=dtype).index_copy_(0, kept, rows.to(dtype))


class Products(NamedTuple):
    """The operands of logits tiles, as the product that serves here wants them."""

    hidden: Tensor  # (n, D) wide, or bfloat16 where C++ keeps its products in float32
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    squash: Squash

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, squash: Squash) -> Products:
        served = in_cpp.why_not(hidden, weight) is None or in_cpp.why_not_multiply(hidden, weight) is None
        return cls(hidden if served else hidden.to(wide_dtype(hidden)), weight, bias, squash)

    def tile(self, rows: slice, columns: slice, room: Tensor) -> Tensor:
        """Wide logits (n, c), in room."""
        return self.into(tile_in(room, len(self.hidden[rows]), len(self.weight[columns])), rows, columns)

    def into(self, out: Tensor, rows: slice, columns: slice) -> Tensor:  # (n, c) wide, becomes the logits
        hidden, weight = self.hidden[rows], self.weight[columns]
        if in_cpp.why_not(hidden, weight) is None:
            in_cpp.multiply_bf16(hidden, weight.T, out)
        else:
            put_product(out, hidden, weight.T)
        if self.bias is not None:
            out += self.bias[columns]
        return self.squash(out)


def take_targets_(
    tile: Tensor,  # (n, c) logits; the targets' entries become -inf
    columns: Tensor,  # (n,) int64, target less the tile's first column; outside [0, c) for most rows
) -> tuple[Tensor, Tensor]:  # (n,) bool: the target is in this tile; (n,) its logit, where so
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1)[:, None]
    picked = tile.gather(1, columns)
    tile.scatter_(1, columns, picked.masked_fill(inside[:, None], -torch.inf))
    return inside, picked[:, 0]


def fold_tile_(
    tile: Tensor,  # (n, c) logits; becomes exp(z - highest), 0 at the targets
    columns: Tensor,  # (n,) int64, target less the tile's first column
    so_far: Statistics,  # of the same rows, updated
    rounded: Tensor | None = None,  # (n, c) half precision: becomes what tile becomes, the operand of a product
) -> Tensor:  # (n,) exp(the maximum before - the maximum now)
    if in_cpp.why_not_fold(tile) is None and (rounded is None or rounded.dtype == torch.bfloat16):
        return in_cpp.fold_tile_(tile, columns, *so_far, rounded)
    inside, picked = take_targets_(tile, columns)
    so_far.target_logit.copy_(torch.where(inside, picked, so_far.target_logit))
    highest = torch.maximum(so_far.maximum, tile.amax(1))
    move = so_far.maximum - highest
    shrink = move.exp()
    tile.sub_(highest[:, None])
    if so_far.moment is None:
        tile.exp_()
    else:
        distance = tile.masked_fill(tile == -torch.inf, 0.0)  # exp is 0 there, and 0 * inf would be nan
        local = (tile.exp_() * distance).sum(1)
        so_far.moment.add_(so_far.others * move).mul_(shrink).add_(local)
    so_far.others.mul_(shrink).add_(tile.sum(1))
    so_far.maximum.copy_(highest)
    if rounded is not None:
        rounded.copy_(tile)
    return shrink


def target_weights(
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
) -> Tensor:  # (n, D) wide
    return weight.index_select(0, targets.clamp(0, weight.shape[0] - 1)).to(wide_dtype(weight))


def add_target_weights_(
    total: Tensor,  # (n, D) wide, updated
    scale: Tensor,  # (n,) wide
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
) -> None:
    few_rows = rows_at_once(total)
    for some, at, own in zip(total.split(few_rows), scale.split(few_rows), targets.split(few_rows), strict=True):
        some += target_weights(weight, own).mul_(at[:, None])


def scale_rows(
    tile: Tensor,  # (n, c), wide or in half precision
    scale: Tensor,  # (n,) wide
    out: Tensor,  # like tile, and may be it: each row times its scale, rounded once
) -> None:
    if tile.dtype == scale.dtype:
        torch.mul(tile, scale[:, None], out=out)
    elif in_cpp.why_not_scale(tile) is None:
        in_cpp.scale_rows(tile, scale, out)
    else:
        out.copy_(tile.to(scale.dtype).mul_(scale[:, None]))


def coefficients_(
    tile: Tensor,  # (n, c) wide; may be overwritten
    scale: Tensor,  # (n,) wide
    dtype: torch.dtype,
) -> Tensor:  # (n, c) in dtype
    """Each row of the tile times its scale, rounded once: the operand of gradient products in the model's dtype, as
    autograd of a linear layer would have it.

    The targets' own coefficients are left out of them: they are most of a gradient, and are multiplied out in float32.
    In bfloat16 that spares dhidden and dweight two of three roundings for a few vector operations a row.
    """
    if tile.dtype == dtype:
        return tile.mul_(scale[:, None])
    return torch.mul(tile, scale[:, None], out=torch.empty_like(tile, dtype=dtype))


def forward(
    hidden: Tensor,  # (n, D), rows that count
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
    bias: Tensor | None,  # (V,)
    squash: Squash,
    keep_direction: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """logp, maximum, others (n,); if wanted, direction = dlogp/dhidden (n, D) and entropy (n,). All wide."""
    if not keep_direction and in_cpp.why_not(hidden, weight) is None:
        statistics = Statistics(*in_cpp.statistics(hidden, weight, targets, bias, *squash, want_moment=want_entropy))
        logp, entropy = statistics.finish()
        return logp, statistics.maximum, statistics.others, None, entropy
    dtype = wide_dtype(hidden)
    shape = num_rows, num_columns = tile_shape(hidden.device, hidden.dtype, hidden.shape[0])
    products = Products.of(hidden, weight, bias, squash)
    statistics = Statistics.empty(hidden.shape[0], hidden, want_entropy)
    room = tiles_room(hidden, weight, dtype, shape)
    operands = operand_dtype(weight)
    rounds = keep_direction and squash.ceiling == 0 and operands != dtype
    rounded_room = tiles_room(hidden, weight, operands, shape) if rounds else None
    # sum over v != y of exp(z_v - maximum) dz_v/dx_v / factor weight[v], rescaled whenever the maximum moves
    pull = hidden.new_empty(hidden.shape, dtype=dtype) if keep_direction else None
    for first in range(0, weight.shape[0], num_columns):
        columns = slice(first, first + num_columns)
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            tile = products.tile(rows, columns, room)
            bend = squash.bend(tile) if keep_direction else None
            rounded = tile_in(rounded_room, *tile.shape) if rounds else None
            shrink = fold_tile_(tile, targets[rows] - first, statistics.of(rows), rounded)
            if pull is not None:
                if bend is not None:
                    tile.mul_(bend)
                left = tile.to(operands) if rounded is None else rounded
                if first == 0:
                    put_product(pull[rows], left, weight[columns])
                    continue
                add_product_(pull[rows], left, weight[columns], shrink)
    logp, entropy = statistics.finish()
    maximum, others = statistics.maximum, statistics.others
    if pull is None:
        return logp, maximum, others, None, entropy
    # (1 - p_y) weight[y] - sum over v != y of p_v weight[v]: p_y itself is never formed, so nothing cancels
    at_target, at_others = -torch.expm1(logp) * squash.factor, share_of_others(logp, others) * squash.factor
    bend = squash.bend(statistics.target_logit)
    if bend is not None:
        at_target.mul_(bend)
    add_target_weights_(pull.mul_(-at_others[:, None]), at_target, weight, targets)
    return logp, maximum, others, pull, entropy


def gradients(
    grad: Tensor,  # (n,) wide, upstream of logp
    hidden: Tensor,  # (n, D), rows that count
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
    bias: Tensor | None,  # (V,)
    logp: Tensor,  # (n,) wide, as maximum and others
    maximum: Tensor,
    others: Tensor,
    squash: Squash,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dhidden (n, D) wide, dweight (V, D), dbias (V,)
    """Recompute the logits tile by tile and multiply their derivatives out."""
    dtype = wide_dtype(hidden)
    shape = num_rows, num_columns = tile_shape(hidden.device, hidden.dtype)  # one of dweight is as wide
    products = Products.of(hidden, weight, bias, squash)
    grad = grad * squash.factor
    at_others, at_target = -grad * share_of_others(logp, others), -grad * torch.expm1(logp)
    if squash.ceiling > 0:
        x = (hidden * target_weights(weight, targets)).sum(1)
        at_target *= squash.bend(squash(x if bias is None else x + bias[targets.clamp(0, weight.shape[0] - 1)]))
    dhidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    dbias = weight.new_empty(weight.shape[0]) if need_bias else None
    room = tiles_room(hidden, weight, dtype, shape)
    across, operands = transposed_room(weight, room.numel() if need_weight else 0), operand_dtype(weight)
    # Vocabulary outside, rows inside: a tile of dweight is summed over all rows in float32 and rounded once.
    for first in range(0, weight.shape[0], num_columns):
        columns = slice(first, min(first + num_columns, weight.shape[0]))
        dweight_tile = weight.new_zeros(weight[columns].shape, dtype=dtype) if need_weight else None
        dbias_tile = weight.new_zeros(columns.stop - first, dtype=dtype) if need_bias else None
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            tile = products.tile(rows, columns, room)
            bend = squash.bend(tile)
            inside, _ = take_targets_(tile, targets[rows] - first)
            tile.sub_(maximum[rows, None]).exp_()
            if bend is not None:
                tile.mul_(bend)
            own = (targets[rows] - first).clamp(0, tile.shape[1] - 1)
            at_own = torch.where(inside, at_target[rows], 0.0)
            if dbias_tile is not None:
                dbias_tile += at_others[rows] @ tile
                dbias_tile.index_add_(0, own, at_own)
            coefficients = coefficients_(tile, at_others[rows], operands)
            if dhidden is not None:
                add_product_(dhidden[rows], coefficients, weight[columns])
            if dweight_tile is not None:
                add_product_(dweight_tile, transposed(coefficients, across), hidden[rows])
                here = inside.nonzero()[:, 0] if inside.device.type == "cpu" else slice(None)
                dweight_tile.index_add_(0, own[here], hidden[rows][here] * at_own[here, None])
        if dweight is not None:
            dweight[columns] = dweight_tile
        if dbias is not None:
            dbias[columns] = dbias_tile
    if dhidden is not None:  # last, so that it is not what the many small parts are rounded to
        add_target_weights_(dhidden, at_target, weight, targets)
    return dhidden, dweight, dbias
