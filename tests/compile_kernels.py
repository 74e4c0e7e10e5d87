"""Compile every Triton kernel as its launcher launches it, for cards that are not here, and read what came out.

    python tests/compile_kernels.py                   for sm_80, sm_90, sm_100 and gfx942; tests/test_triton.py does it
    python tests/compile_kernels.py sm120             for GeForce Blackwell, whose tiles are those of sm_80
    PYTHONPATH=DIR python tests/compile_kernels.py    after pip install --no-deps --target DIR triton==3.6.0

The launchers run on small CPU tensors with a driver that only names a target, so signatures, constants and divisibility
are those of real calls: with other ones a different kernel would be tested. Nothing is launched. Of each kernel: no
register spilled to local memory or, but for SET_ASIDE, to the stack, shared memory within the card's, and where there
is a product the matrix instructions of the architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cream_kernels import IGNORE, gather_logp_triton, linear_logp_triton, tiles, top_p_triton, weighted_dpo_triton

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx9": GPUTarget("hip", "gfx942", 64),
    "sm120": GPUTarget("cuda", 120, 32),
}
ALWAYS = ("sm80", "sm90", "sm100", "gfx9")
SHARED_BYTES = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "sm120": 101376, "gfx9": 65536}
# Bytes of stack a thread that ptxas may use so that one more program fits on a multiprocessor. The sampler's, 8 on sm80
# with Triton 3.7.1 (64 registers) and 16 on sm120 with 3.9.0 (128), are written and read outside its loops (SASS).
SET_ASIDE = {"sample_kernel": 16}
# What a product must be made of, and what it must not fall back on.
PRODUCT = {
    "sm80": ("ptx", "mma.sync", None),
    "sm90": ("ptx", "wgmma.mma_async", "mma.sync"),
    "sm100": ("ptx", "tcgen05.mma", "mma.sync"),
    "sm120": ("ptx", "mma.sync", None),
    "gfx9": ("amdgcn", "v_mfma", None),
}


class NamesATarget:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)  # what a kernel was compiled for is remembered by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def launch_everything(arch: str) -> None:
    """Every launcher of the Triton bodies, with every dtype and setting that changes a kernel."""
    N, V, D = 256, 1024, 128
    targets = torch.arange(N)
    targets[::7] = IGNORE
    uniform = torch.zeros(2, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hidden, weight = torch.zeros(N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
        logits, rows = torch.zeros(N, V, dtype=dtype), torch.zeros(N)
        bias = torch.zeros(V, dtype=dtype)
        for settings in ((None, 1.0, 0.0), (bias, 0.5, 0.0), (bias, 0.5, 30.0)):
            for want_entropy in (False, True):
                linear_logp_triton.forward(hidden, weight, targets, *settings, False, want_entropy)
                linear_logp_triton.forward(hidden, weight, targets, *settings, True, want_entropy)
            needs = True, True, settings[0] is not None
            linear_logp_triton.gradients(
                rows, hidden, weight, targets, settings[0], rows, rows, rows, *settings[1:], *needs
            )
        tile = tiles.linear_logp(arch, dtype, D)
        if tile.tma:  # rows that are no multiple of 16 bytes go through pointers
            narrow = torch.zeros(N, D + 1, dtype=dtype)[:, :D], torch.zeros(V, D + 1, dtype=dtype)[:, :D]
            linear_logp_triton.store_free(*narrow, targets, None, 1.0, 0.0, False, tile)
        gather_logp_triton.statistics(logits, targets, None, 1.0, 0.0, False)
        gather_logp_triton.gradient_into(logits, rows, logits, targets, None, rows, rows, rows, 1.0, 0.0)
        strided = logits[::2, ::2]
        gather_logp_triton.statistics(strided, targets[::2], None, 1.0, 0.0, False)
        gather_logp_triton.gradient_into(strided, rows[::2], strided, targets[::2], None, rows, rows, rows, 1.0, 0.0)
        top_p_triton.sample(torch.zeros(2, 2 * tiles.ROW_BLOCK, dtype=dtype), uniform, 1.0, 0.9)
        chunks = [(0, 2, slice(0, N))]
        weighted_dpo_triton.forward(
            hidden, weight, targets, torch.tensor([0, 64, 128, 192, N]), chunks, rows[:4], rows[:2], 0.1, True
        )
    weighted_dpo_triton.loss_and_slope(rows, torch.zeros(()).expand(N))
    weighted_dpo_triton.loss_and_slope(rows, rows)
    top_p_triton.sample(torch.zeros(2, 2 * tiles.ROW_BLOCK + 1), uniform, 1.0, 0.9)  # rows at odd addresses


def compiled_for(arch: str) -> dict:
    """(kernel's name, hash) -> what Triton made of it."""
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[self.fn.__name__, kernel.hash] = kernel
        return kernel

    JITFunction.run, architecture = compile_only, tiles.architecture
    tiles.architecture = lambda device: arch
    driver.set_active(NamesATarget(TARGETS[arch]))
    try:
        launch_everything(arch)
    finally:
        JITFunction.run, tiles.architecture = run, architecture
    return kernels


def faults(arch: str, name: str, kernel) -> list[str]:
    """What is wrong with it, in words."""
    found = []
    if kernel.metadata.shared > SHARED_BYTES[arch]:
        found.append(f"{kernel.metadata.shared} bytes of shared memory, {SHARED_BYTES[arch]} are there")
    if arch == "gfx9":
        # scalar registers spill into lanes of vector registers, which costs no memory
        counts = re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
        usage = "" if len(counts) == 2 and all(count == "0" for _, count in counts) else f"spilled: {counts}"
    else:
        usage = resource_usage(kernel.asm["cubin"])
        stack = int(re.search(r"\bSTACK:(\d+)", usage)[1])
        usage = "" if stack <= SET_ASIDE.get(name, 0) and re.search(r"\bLOCAL:0\b", usage) else usage
    if usage:
        found.append(usage)
    if name == "partials_kernel":
        language, wanted, unwanted = PRODUCT[arch]
        text = kernel.asm[language]
        if wanted not in text:
            found.append(f"no {wanted}")
        if unwanted and unwanted in text:
            found.append(f"{unwanted} where {wanted} should be")
    return found


def resource_usage(cubin: bytes) -> str:
    """cuobjdump's line on registers, stack and memory, by the copy that Triton brings."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return next(line.strip() for line in done.stdout.splitlines() if "STACK:" in line)


def main() -> int:
    bad = 0
    for arch in sys.argv[1:] or ALWAYS:
        kernels = compiled_for(arch)
        products = sum(name == "partials_kernel" for name, _ in kernels)
        print(f"{arch}: {len(kernels)} kernels, {products} with a product, triton {triton.__version__}")
        for (name, _), kernel in kernels.items():
            for fault in faults(arch, name, kernel):
                bad += 1
                print(f"{arch} {name}: {fault}")
        bad += not products
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
