"""The optional native library: libcream_native.so beside this file, torch-free C++ loaded by ctypes.

`load()` gives the library or None, `why_not()` the reason for None. Both decide once, at the first call, and log
nothing: whoever uses the library says what it found. CREAM_NATIVE=0 in the environment switches it off.

torch is imported before it, so on Linux its OpenMP calls bind to the libgomp that torch's wheel brings: one pool of
threads serves both, and neither spins against the other.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch  # noqa: F401  # for its libgomp, see above

LIBRARY = Path(__file__).with_name("libcream_native.so")
ABI = 9  # raised together with cream_native_abi() in kernels/csrc whenever a signature changes


def load() -> ctypes.CDLL | None:
    """The library with its functions' signatures set, or None where why_not() has a reason."""
    return _decide()[0]


def why_not() -> str | None:
    """Why load() gives None, as a sentence without a full stop; None where the library is loaded."""
    return _decide()[1]


@cache
def _decide() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("CREAM_NATIVE", "1").lower() in ("0", "off", "no", "false"):
        return None, f"switched off by CREAM_NATIVE={os.environ['CREAM_NATIVE']}"
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} was not built: install cmake and a C++ compiler, then this package again"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    try:
        abi = library.cream_native_abi()
    except AttributeError:
        return None, f"{LIBRARY} is not cream's library"
    if abi != ABI:
        return None, f"{LIBRARY.name} was built from other sources (ABI {abi}, not {ABI}): install this package again"
    library.cream_top_p_isa.restype = ctypes.c_int
    library.cream_top_p_sample.restype = ctypes.c_int64
    library.cream_top_p_sample.argtypes = [
        ctypes.c_void_p,  # logits
        ctypes.c_int,  # is_bf16
        ctypes.c_int64,  # N
        ctypes.c_int64,  # V
        ctypes.c_int64,  # row stride, elements
        ctypes.c_void_p,  # uniform
        ctypes.c_double,  # temperature
        ctypes.c_double,  # top_p
        ctypes.c_void_p,  # tokens
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_decode_attention.restype = ctypes.c_int
    library.cream_decode_attention.argtypes = [
        ctypes.c_void_p,  # query
        ctypes.c_void_p,  # key
        ctypes.c_void_p,  # value
        ctypes.c_void_p,  # keys
        ctypes.c_void_p,  # values
        ctypes.c_void_p,  # out
        ctypes.c_void_p,  # rows
        ctypes.c_int,  # is_bf16
        ctypes.c_int64,  # A
        ctypes.c_int64,  # H
        ctypes.c_int64,  # K
        ctypes.c_int64,  # U
        ctypes.c_int64,  # E
        ctypes.c_double,  # scale
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_bf16_isa.restype = ctypes.c_int
    library.cream_linear_logp_statistics.restype = ctypes.c_int
    library.cream_linear_logp_statistics.argtypes = [
        ctypes.c_void_p,  # hidden
        ctypes.c_int64,  # N
        ctypes.c_int64,  # D
        ctypes.c_int64,  # its row stride, elements
        ctypes.c_void_p,  # weight
        ctypes.c_int64,  # V
        ctypes.c_int64,  # its row stride
        ctypes.c_void_p,  # targets
        ctypes.c_void_p,  # bias or None
        ctypes.c_double,  # factor
        ctypes.c_double,  # ceiling
        ctypes.c_void_p,  # maximum
        ctypes.c_void_p,  # others
        ctypes.c_void_p,  # target logit
        ctypes.c_void_p,  # moment or None
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_bf16_across_serves.restype = ctypes.c_int
    library.cream_bf16_multiply.restype = ctypes.c_int
    library.cream_bf16_multiply.argtypes = [
        ctypes.c_void_p,  # left
        ctypes.c_int64,  # its row stride, elements
        ctypes.c_void_p,  # right
        ctypes.c_int64,  # its row stride
        ctypes.c_int64,  # its column stride
        ctypes.c_int64,  # n
        ctypes.c_int64,  # m
        ctypes.c_int64,  # c
        ctypes.c_void_p,  # out
        ctypes.c_int,  # out_is_bf16
        ctypes.c_int64,  # its row stride
        ctypes.c_int,  # adds
        ctypes.c_void_p,  # shrink or None
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_fold_tile.restype = ctypes.c_int
    library.cream_fold_tile.argtypes = [
        ctypes.c_void_p,  # tile
        ctypes.c_int64,  # n
        ctypes.c_int64,  # c
        ctypes.c_int64,  # row stride
        ctypes.c_void_p,  # columns
        ctypes.c_void_p,  # maximum
        ctypes.c_void_p,  # others
        ctypes.c_void_p,  # target logit
        ctypes.c_void_p,  # moment or None
        ctypes.c_void_p,  # shrink
        ctypes.c_void_p,  # rounded or None
        ctypes.c_int64,  # its row stride
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_read_rows.restype = ctypes.c_int
    library.cream_read_rows.argtypes = [
        ctypes.c_void_p,  # logits
        ctypes.c_int,  # is_bf16
        ctypes.c_int64,  # V
        ctypes.c_int64,  # row stride
        ctypes.c_void_p,  # rows or None
        ctypes.c_int64,  # n
        ctypes.c_void_p,  # targets
        ctypes.c_double,  # factor
        ctypes.c_void_p,  # maximum
        ctypes.c_void_p,  # others
        ctypes.c_void_p,  # target logit
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_write_gradient.restype = ctypes.c_int
    library.cream_write_gradient.argtypes = [
        ctypes.c_void_p,  # logits
        ctypes.c_int,  # is_bf16
        ctypes.c_int64,  # V
        ctypes.c_int64,  # row stride
        ctypes.c_void_p,  # rows or None
        ctypes.c_int64,  # n
        ctypes.c_void_p,  # targets
        ctypes.c_double,  # factor
        ctypes.c_void_p,  # maximum
        ctypes.c_void_p,  # at_others
        ctypes.c_void_p,  # at_target
        ctypes.c_void_p,  # out
        ctypes.c_int64,  # its row stride
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_scale_rows.restype = ctypes.c_int
    library.cream_scale_rows.argtypes = [
        ctypes.c_void_p,  # tile
        ctypes.c_int64,  # n
        ctypes.c_int64,  # c
        ctypes.c_int64,  # row stride
        ctypes.c_void_p,  # scale
        ctypes.c_void_p,  # out
        ctypes.c_int64,  # its row stride
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_add_rows.restype = ctypes.c_int
    library.cream_add_rows.argtypes = [
        ctypes.c_void_p,  # total
        ctypes.c_int64,  # n
        ctypes.c_int64,  # c
        ctypes.c_int64,  # row stride
        ctypes.c_void_p,  # x
        ctypes.c_int64,  # its row stride
        ctypes.c_void_p,  # shrink or None
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_multiply_isa.restype = ctypes.c_int
    library.cream_multiply_isa.argtypes = [ctypes.c_int]  # half
    library.cream_multiply.restype = ctypes.c_int
    library.cream_multiply.argtypes = [
        ctypes.c_void_p,  # left
        ctypes.c_int,  # left_is_bf16
        ctypes.c_int64,  # its row stride, elements
        ctypes.c_int64,  # its column stride
        ctypes.c_void_p,  # right
        ctypes.c_int,  # right_is_bf16
        ctypes.c_int64,  # its row stride
        ctypes.c_int64,  # its column stride
        ctypes.c_int64,  # n
        ctypes.c_int64,  # m
        ctypes.c_int64,  # c
        ctypes.c_void_p,  # out
        ctypes.c_int64,  # its row stride
        ctypes.c_int,  # adds
        ctypes.c_int,  # threads
        ctypes.c_int,  # isa
    ]
    library.cream_transpose.restype = ctypes.c_int
    library.cream_transpose.argtypes = [
        ctypes.c_void_p,  # x
        ctypes.c_int64,  # n
        ctypes.c_int64,  # c
        ctypes.c_int64,  # row stride
        ctypes.c_void_p,  # out
        ctypes.c_int64,  # its row stride
        ctypes.c_int,  # threads
    ]
    return library, None
