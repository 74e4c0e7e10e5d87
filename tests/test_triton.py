"""The Triton kernels without a GPU: run by the interpreter, compiled for four cards, and their addresses read."""

import ast
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import cream_kernels
from cream_kernels import tiles

TESTS = Path(__file__).parent
INTERPRETED = [str(TESTS / name) for name in ("triton_bodies.py", "triton_top_p.py")]
SOURCES = sorted(Path(cream_kernels.__file__).parent.glob("*_triton.py"))


def start(log, *command, **environment):
    """A process of its own: TRITON_INTERPRET is read when a kernel is decorated."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known |= {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"} | environment
    out = log.open("w")
    return subprocess.Popen(
        [sys.executable, *command], env=known, cwd=TESTS.parent, stdout=out, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Interpreting and compiling, side by side: name -> (process, what it says)."""
    pytest.importorskip("triton")
    directory = tmp_path_factory.mktemp("triton")
    commands = {
        "interpreter": ("-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED),
        "compiler": (str(TESTS / "compile_kernels.py"),),
    }
    logs = {name: directory / f"{name}.txt" for name in commands}
    started = {
        name: start(logs[name], *command, **({"TRITON_INTERPRET": "1"} if name == "interpreter" else {}))
        for name, command in commands.items()
    }
    yield {name: (process, logs[name]) for name, process in started.items()}
    for process in started.values():
        process.kill()


@pytest.mark.first
def test_both_start(processes):
    assert all(process.poll() in (None, 0) for process, _ in processes.values())


def test_kernels_under_the_interpreter(processes):
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs an older NumPy: pip install 'numpy<2.4'")
    process, log = processes["interpreter"]
    assert process.wait(timeout=900) == 0, log.read_text()[-8000:]
    assert " passed" in log.read_text().splitlines()[-1]


def test_kernels_compile_without_a_spill(processes):
    process, log = processes["compiler"]
    assert process.wait(timeout=900) == 0, log.read_text()[-8000:]
    said = [line.split(":")[0] for line in log.read_text().splitlines() if " kernels, " in line]
    assert said == ["sm80", "sm90", "sm100", "gfx9"], log.read_text()


@pytest.mark.parametrize("version, specialised", [("3.6.0", False), ("3.9.0", True), ("3.10.0+git1", True)])
def test_blackwell_specialises_warps_where_triton_can(version, specialised, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert tiles.linear_logp("sm100", torch.bfloat16, 4096).warp_specialize == specialised
    assert tiles.linear_logp("sm90", torch.bfloat16, 4096).warp_specialize


@pytest.mark.parametrize(
    "capability, arch", [((8, 6), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((10, 3), "sm100"), ((12, 0), "sm120")]
)
def test_cards_have_tiles(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.architecture(torch.device("cuda")) == arch and arch in tiles.DEFAULTS


@pytest.mark.parametrize("arch", tiles.DEFAULTS)
def test_programs_fill_a_multiprocessor(arch, monkeypatch):
    pytest.importorskip("triton")
    from cream_kernels import linear_logp_triton

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(multi_processor_count=7))
    tile = tiles.DEFAULTS[arch]
    assert linear_logp_triton.num_programs(torch.device("cuda"), tile) == 7
    assert linear_logp_triton.num_programs(torch.device("cuda"), tiles.without_tma(tile)) == 14


# Addresses


def kernels():
    for source in SOURCES:
        for node in ast.parse(source.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield pytest.param(node, id=f"{source.stem}.{node.name}")


def narrow_addresses(function: ast.FunctionDef) -> list[str]:
    """Products of a stride, or of a number of rows, with something that is not known to be 64 bits wide.

    Wide is what `.to(tl.int64)` was applied to or what a tl.load brought (targets and bounds are int64), and what is
    computed from something wide.
    """
    wide = set()

    def is_wide(node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".to"):
            return ast.unparse(node.args[0]) == "tl.int64"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            return True
        if isinstance(node, ast.Name):
            return node.id in wide
        if isinstance(node, ast.BinOp):
            return is_wide(node.left) or is_wide(node.right)
        return isinstance(node, ast.Subscript) and is_wide(node.value)

    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_wide(node.value):
            wide |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for size, index in ((node.left, node.right), (node.right, node.left)):
                name = ast.unparse(size)
                if (name.endswith("_stride") or name == "N") and not is_wide(index):
                    found.append(ast.unparse(node))
    return found


def unwidened_programs(function: ast.FunctionDef) -> list[str]:
    """Uses of tl.program_id that are neither widened at once nor the start of a loop over tiles."""
    text = ast.unparse(function)
    allowed = text.count(".program_id(0).to(tl.int64)") + text.count("tl.range(tl.program_id(0)")
    return [function.name] if text.count("program_id(") != allowed else []


@pytest.mark.parametrize("function", list(kernels()))
def test_addresses_are_64_bits_wide(function):
    assert narrow_addresses(function) == []
    assert unwidened_programs(function) == []


def test_the_reader_of_addresses_sees_narrow_ones():
    source = """
def kernel(x, row_stride, N):
    row = tl.program_id(0)
    safe = tl.program_id(0).to(tl.int64)
    tl.load(x + row * row_stride)
    tl.load(x + safe * row_stride + tl.arange(0, 16)[:, None] * N)
"""
    function = ast.parse(source).body[0]
    assert narrow_addresses(function) == ["row * row_stride", "tl.arange(0, 16)[:, None] * N"]
    assert unwidened_programs(function) == ["kernel"]


def test_every_kernel_has_been_read():
    names = {param.id for param in kernels()}
    assert {
        "gather_logp_triton.statistics_kernel",
        "gather_logp_triton.gradient_kernel",
        "linear_logp_triton.partials_kernel",
        "linear_logp_triton.combine_kernel",
        "top_p_triton.sample_kernel",
        "weighted_dpo_triton.pairs_kernel",
        "weighted_dpo_triton.weighted_dpo_kernel",
    } <= names
