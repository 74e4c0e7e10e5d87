"""The native library loads or gives its reason, and the torch path serves without it."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from cream_kernels import native
from cream_kernels.top_p import top_p_sample, top_p_sample_reference


@pytest.fixture
def undecided():
    """native's decision is made once a process; these tests want it made anew."""
    native._decide.cache_clear()
    yield
    native._decide.cache_clear()


def serves() -> bool:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(0, 0.99, 8, dtype=torch.float64)
    wanted = top_p_sample_reference(logits, uniform, temperature=0.8, top_p=0.9)
    return top_p_sample(logits, uniform, temperature=0.8, top_p=0.9).equal(wanted)


def test_loads_or_says_why_not(undecided, monkeypatch):
    monkeypatch.delenv("CREAM_NATIVE", raising=False)
    library, reason = native.load(), native.why_not()
    assert (library is None) == bool(reason)
    if library is not None:
        assert library.cream_native_abi() == native.ABI
        assert library.cream_top_p_isa() in (0, 1, 2)
        assert library.cream_bf16_isa() in (0, 1, 2)
    assert serves()


def test_switched_off(undecided, monkeypatch):
    monkeypatch.setenv("CREAM_NATIVE", "0")
    assert native.load() is None
    assert native.why_not() == "switched off by CREAM_NATIVE=0"
    assert serves()


def test_not_built(undecided, monkeypatch, tmp_path):
    monkeypatch.delenv("CREAM_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libcream_native.so")
    assert native.load() is None
    assert "was not built" in native.why_not()
    assert serves()


def test_damaged(undecided, monkeypatch, tmp_path):
    monkeypatch.delenv("CREAM_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libcream_native.so")
    native.LIBRARY.write_bytes(b"no library")
    assert native.load() is None
    assert "does not load" in native.why_not() and "\n" not in native.why_not()
    assert serves()


@pytest.mark.skipif(sys.platform != "linux", reason="the name of another library is Linux's")
def test_another_library(undecided, monkeypatch):
    monkeypatch.delenv("CREAM_NATIVE", raising=False)

    class Elsewhere:
        name = "libm.so.6"

        def exists(self):
            return True

        def __str__(self):
            return self.name

    monkeypatch.setattr(native, "LIBRARY", Elsewhere())
    assert native.load() is None
    assert native.why_not() == "libm.so.6 is not cream's library"


def test_of_other_sources(undecided, monkeypatch):
    monkeypatch.delenv("CREAM_NATIVE", raising=False)
    if native.load() is None:
        pytest.skip(f"no native library: {native.why_not()}")
    native._decide.cache_clear()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.load() is None
    assert f"ABI {native.ABI - 1}, not {native.ABI}" in native.why_not()
    assert serves()


def test_loading_leaves_small_numbers_alone():
    """A library linked with -ffast-math flushes the whole process' subnormal numbers to zero."""
    native.load()
    smallest = ctypes.c_double(5e-324).value
    assert smallest * 1.0 > 0
    assert torch.tensor([1e-310], dtype=torch.float64).mul(0.5).item() > 0
