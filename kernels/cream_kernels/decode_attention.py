"""Attention of one new token a row over a key-value cache whose rows have lengths of their own.

Letters: A rows decoded, S slots of the cache (A <= S), U columns of a slot, H query heads, K kv heads, E head size.

Two paths: C++ on the CPU (kernels/csrc/decode_attention.cpp), which reads just the columns in use and those that rows
share once, torch elsewhere. Neither repeats, gathers or copies keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native


@torch.no_grad()
def decode_attention(
    query: Tensor,  # (A, H, E) float32, bfloat16 or float16
    key: Tensor,  # (A, K, E) of the new token, as all below in the query's dtype
    value: Tensor,  # (A, K, E)
    keys: Tensor,  # (S, K, U, E) the cache, written in place
    values: Tensor,  # (S, K, U, E)
    rows: Tensor,  # (4, A) int64 on the CPU: slot, slot of the shared columns, how many those are, columns with the new
    *,
    scale: float,
    slots: Tensor | None = None,  # (A,) rows[0] on the cache's device, where the caller has it there
    visible: Tensor | None = None,  # (S, U') bool, what `visible_columns` makes of rows, the same
) -> Tensor:  # (A, H, E)
    """softmax(scale * query . keys) values over the first rows[3, a] columns of slot rows[0, a].

    The new key and value are written to the last of these columns first. Slots must differ. A row's first rows[2, a]
    columns must be equal to those of slot rows[1, a], which may be read in their place (a prompt's, for its responses).
    Defined by reference.decode_attention. Costs the traffic of the distinct columns in use on the CPU, that of S rows
    of the longest length elsewhere. Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    A, H, E = query.shape
    S, K, U, _ = keys.shape
    if H % K or key.shape != (A, K, E) or value.shape != key.shape or keys.shape[3] != E or values.shape != keys.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value, keys, values))
        raise ValueError(f"query, key, value, keys, values do not fit together: {shapes}")
    kinds = {(x.dtype, x.device) for x in (query, key, value, keys, values)}
    if len(kinds) > 1:  # C++ takes the size of an element from the cache
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"query, key, value, keys, values must share a dtype and a device, not {found}")
    if rows.shape != (4, A) or rows.dtype != torch.int64 or rows.device.type != "cpu" or A > S:
        raise ValueError(f"rows must be (4, {A}) int64 on the CPU with at most {S} rows, not {tuple(rows.shape)}")
    if A == 0:
        return torch.empty_like(query)
    library = native.load() if native_takes(keys) else None
    if library is not None and keys.is_contiguous() and values.is_contiguous():
        return decode_attention_native(
            library, query, key, value, keys, values, rows, scale, isa=library.cream_top_p_isa()
        )
    slots = rows[0].to(keys.device) if slots is None else slots
    visible = visible_columns(rows, S).to(keys.device) if visible is None else visible
    return decode_attention_torch(query, key, value, keys, values, slots, visible, scale)


def native_takes(keys: Tensor) -> bool:
    """Whether the C++ path serves such a cache, where the library is there."""
    return keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.bfloat16)


def visible_columns(rows: Tensor, slots: int) -> Tensor:  # (S, longest) bool on the CPU
    """Which columns the row of each slot sees; the first one for a slot without a row, since a softmax needs one."""
    lengths = torch.ones(slots, dtype=torch.int64)
    lengths[rows[0]] = rows[3]
    return torch.arange(int(lengths.max())) < lengths[:, None]


def decode_attention_native(
    library,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    scale: float,
    isa: int,
) -> Tensor:
    """The C++ path; isa 0, 1, 2 is the plain, AVX2, AVX-512 body, all of the same meaning."""
    A, H, E = query.shape
    S, K, U, _ = keys.shape
    slot, source, shared, length = rows
    inside = ((slot >= 0) & (slot < S) & (source >= 0) & (source < S) & (0 < length) & (length <= U)).all()
    if not bool(inside and ((0 <= shared) & (shared < length)).all()):
        raise ValueError(f"rows name slots beyond {S}, columns beyond {U}, or more shared columns than there are old")
    query, key, value, rows = (x.contiguous() for x in (query, key, value, rows))
    out = torch.empty_like(query)
    done = library.cream_decode_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        rows.data_ptr(),
        keys.dtype == torch.bfloat16,
        A,
        H,
        K,
        U,
        E,
        scale,
        torch.get_num_threads(),
        isa,
    )
    if done == -1:
        raise ValueError(f"this processor has no body {isa} of the native attention")
    if done == -2:
        raise MemoryError("no memory for the native attention's scores")
    return out


def decode_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,  # (A,) on the cache's device
    visible: Tensor,  # (S, U') bool on the cache's device
    scale: float,
) -> Tensor:
    """The torch path, any device: every slot is computed where it lies, and query heads of a kv head are rows of one
    product; with fewer rows than slots the small query is spread over the slots, not the cache gathered."""
    A, H, E = query.shape
    S, K = keys.shape[:2]
    last = visible.sum(1)[slots] - 1
    keys[slots, :, last] = key
    values[slots, :, last] = value
    spread = query.new_zeros(S, H, E).index_copy_(0, slots, query)
    U = visible.shape[1]
    out = F.scaled_dot_product_attention(
        spread.view(S, K, H // K, E), keys[:, :, :U], values[:, :, :U], attn_mask=visible[:, None, None], scale=scale
    )
    return out.reshape(S, H, E).index_select(0, slots)
