"""Which blocks, warps and stages the Triton kernels take, by architecture; and whether they can run at all.

D hidden size, V vocabulary. `linear_logp` is for the store-free forward of linear_logp_triton.py, `ROW_BLOCK` and the
like for kernels that walk rows of logits. `python -m bench.tune` times the candidates on the card at hand and prints
rows for MEASURED. The defaults were chosen without a card, as the largest tiles that compile for the architecture
without a register spilled (tests/compile_kernels.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One tile of the logits, rows x vocabulary, and how its product is made."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool = False  # tensor descriptors: Hopper and later
    warp_specialize: bool = False
    vendor_gemm: bool = False  # measured faster here: the vendor's product into chunks, and the row kernel over them


DEFAULTS = {
    "sm80": Tile(128, 128, 32, num_warps=8, num_stages=3),
    "sm90": Tile(128, 128, 64, num_warps=4, num_stages=4, tma=True, warp_specialize=True),
    "sm100": Tile(128, 128, 64, num_warps=8, num_stages=3, tma=True, warp_specialize=True),
    # GeForce Blackwell and its kin multiply as Ampere does, from 99 KiB of shared memory.
    "sm120": Tile(128, 128, 32, num_warps=8, num_stages=3),
    "gfx9": Tile(128, 128, 32, num_warps=8, num_stages=2),
}

# (architecture, dtype, D up to) -> Tile, the smallest D that fits first. Rows come from bench.tune.
MEASURED: dict[tuple[str, torch.dtype, int], Tile] = {}

# For every launch: Triton 3.10 stops contracting a * b + c by default, as 3.6 to 3.9 do.
OPTIONS = {"enable_fp_fusion": True}

ROW_BLOCK = 4096  # columns of a row of logits that a program reads at once
ROW_WARPS = 8
COMBINE_ROWS, COMBINE_TILES = 32, 32  # of the partial sums, a program's rows and how many tiles it reads at once
PAIR_BLOCK = 1024  # rows of a sequence read at once
SAMPLE_BLOCK, SAMPLE_WAYS = 2048, 8  # columns that the sampler sums at once, and for how many thresholds

# Rows of logits held at a time where the vendor's product makes them. A chunk also reads and writes the (V, D) float32
# sum of dweight once, so it needs rows enough to be worth it; where there is no such sum, memory decides.
CHUNK_ROWS = 2048
CHUNK_BYTES = 2**28


def architecture(device: torch.device) -> str:
    """A key of DEFAULTS, or what stands in for it: the newest one that is not newer than the card."""
    if torch.version.hip:
        return "gfx9"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm80" if major < 9 else "sm90" if major == 9 else "sm100" if major < 12 else "sm120"


def linear_logp(arch: str, dtype: torch.dtype, D: int) -> Tile:
    """The tile for a product of this dtype and depth. float32 goes to the vendor: Triton has no fast exact product."""
    for (known, of, most), tile in MEASURED.items():
        if known == arch and of == dtype and most >= D:
            return tile
    if dtype == torch.float32:
        return DEFAULTS[arch]._replace(block_d=32, tma=False, warp_specialize=False, vendor_gemm=True)
    if arch == "sm100" and _triton_version() < (3, 9):  # 3.6 fails to compile a specialised outer loop there
        return DEFAULTS[arch]._replace(warp_specialize=False)
    return DEFAULTS[arch]


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def without_tma(tile: Tile) -> Tile:
    """For matrices that the bulk copy engine cannot read: unaligned loads through pointers take more registers."""
    return Tile(64, 128, 32, num_warps=4, num_stages=2, vendor_gemm=tile.vendor_gemm)


def chunk_rows(V: int, sums_dweight: bool) -> int:
    """Rows of float32 logits to hold at a time, a multiple of 128 where there are as many."""
    if sums_dweight:
        return CHUNK_ROWS
    rows = max(1, CHUNK_BYTES // (4 * V))
    return rows if rows < 128 else rows // 128 * 128


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device, as a sentence without a full stop; None where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
