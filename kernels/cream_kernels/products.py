"""Matrix products as this device does them best, and their operands.

n rows and c columns of a tile of logits, D hidden size. Wide is float32, or float64 for float64. A CPU that does not
multiply bfloat16 takes C++ that widens what comes next or, where that is not there, float32 copies.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import linear_logp_native as in_cpp

FEW_ROWS = 128  # of D numbers, that a CPU widens at once
IN_HARDWARE = ("avx512_bf16", "amx_bf16", "bf16")  # the last is ARM's


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def multiplies_halves(device: torch.device) -> bool:
    """Whether products of half precision are fast there. A CPU without instructions for them takes 5 to 400 times as
    long as for float32 copies."""
    return device.type != "cpu" or _cpu_multiplies_bfloat16()


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in IN_HARDWARE)


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """What operands of products with this one are best made in: its own dtype where that is multiplied, else wide."""
    return tensor.dtype if multiplies_halves(tensor.device) else wide_dtype(tensor)


def tile_in(room: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """(n, c) at the beginning of room. Dense: oneDNN's AMX product of bfloat16 takes in what lies between rows, and
    turns a nan there into nan results."""
    return room[: num_rows * num_columns].view(num_rows, num_columns)


def shrink_rows_(rows: Tensor, shrink: Tensor) -> None:
    """rows (n, D) times shrink (n,), most of which is 1: maxima seldom move. A CPU leaves those rows alone."""
    if rows.device.type != "cpu":
        rows.mul_(shrink[:, None])
        return
    moved = (shrink != 1).nonzero()[:, 0]
    if moved.numel() == shrink.numel():
        rows.mul_(shrink[:, None])
    elif moved.numel():
        rows.index_copy_(0, moved, rows.index_select(0, moved).mul_(shrink[moved, None]))


def rows_at_once(rows: Tensor) -> int:
    """Of (n, D), where a wide copy of all would be needless memory."""
    return FEW_ROWS if rows.device.type == "cpu" else max(len(rows), 1)


def put_product(
    out: Tensor,  # (n, d), wide or in half precision
    left: Tensor,  # (n, c), each wide or in half precision
    right: Tensor,  # (c, d)
) -> None:
    """out = left @ right, rounded once."""
    if in_cpp.why_not_multiply_bf16(left, right) is None:
        in_cpp.multiply_bf16(left, right, out)
        return
    if in_cpp.why_not_multiply(left, right) is None:
        wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        in_cpp.multiply(left, right, wide)
        if wide is not out:
            out.copy_(wide)
        return
    left, right = _in_one_dtype(left, right)
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right))


def add_product_(
    total: Tensor,  # (n, d) wide, updated
    left: Tensor,  # (n, c), each wide or in half precision
    right: Tensor,  # (c, d)
    shrink: Tensor | None = None,  # (n,) wide, what the rows of total are multiplied by first
) -> None:
    """total * shrink + left @ right: within the product where it is wide, else in one pass in C++ or, since torch adds
    other dtypes on a CPU through a copy, a few rows at a time."""
    if in_cpp.why_not_multiply_bf16(left, right) is None:
        in_cpp.multiply_bf16(left, right, total, adds=True, shrink=shrink)
        return
    in_float32 = in_cpp.why_not_multiply(left, right) is None
    if not in_float32:
        left, right = _in_one_dtype(left, right)
    within = in_float32 or total.dtype == left.dtype
    product = None if within else torch.mm(left, right)
    if product is not None and in_cpp.why_not_scale(product) is None:
        in_cpp.add_rows_(total, product, shrink)
        return
    if shrink is not None:
        shrink_rows_(total, shrink)
    if in_float32:
        in_cpp.multiply(left, right, total, adds=True)
    elif product is None:
        total.addmm_(left, right)
    else:
        few_rows = rows_at_once(total)
        for some, added in zip(total.split(few_rows), product.split(few_rows), strict=True):
            some += added


def _in_one_dtype(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both as torch had better multiply them here."""
    dtype = torch.promote_types(operand_dtype(left), operand_dtype(right))
    return left.to(dtype), right.to(dtype)


def transposed_room(coefficients: Tensor, num_elements: int) -> Tensor:  # flat
    """What `transposed` needs for matrices of so many elements that are like these coefficients."""
    return coefficients.new_empty(num_elements if in_cpp.why_not(coefficients, coefficients) is None else 0)


def transposed(
    coefficients: Tensor,  # (n, c)
    room: Tensor,
) -> Tensor:  # (c, n)
    """A product's left operand: dense where it is bfloat16, as multiply_bf16 reads it; oneDNN takes twice as long of
    one that is not."""
    if room.numel() == 0:
        return coefficients.T
    return in_cpp.transpose(coefficients, tile_in(room, *coefficients.shape[::-1]))
