"""decode_attention: every path attends as the reference does, over just the columns in use, and writes the new one."""

from __future__ import annotations

import math

import pytest
import torch

from cream_kernels import native, reference
from cream_kernels.decode_attention import (
    decode_attention,
    decode_attention_native,
    decode_attention_torch,
    visible_columns,
)

ISA = {"plain": 0, "avx2": 1, "avx512": 2}
PATHS = ["torch", *ISA]


def attend(path, query, key, value, keys, values, rows, scale):
    if path == "torch":
        return decode_attention_torch(query, key, value, keys, values, rows[0], visible_columns(rows, len(keys)), scale)
    library = native.load()
    if library is None:
        pytest.skip(f"no native library: {native.why_not()}")
    if ISA[path] > library.cream_top_p_isa():
        pytest.skip(f"this processor has no {path}")
    return decode_attention_native(library, query, key, value, keys, values, rows, scale, ISA[path])


def problem(A, S, H, K, U, E, dtype=torch.float32, seed=0):
    """Rows in slots of their own, in no order, the odd ones sharing columns with the row before; garbage beyond."""
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(A, heads, E, generator=g).to(dtype) for heads in (H, K, K))
    keys, values = (torch.randn(S, K, U, E, generator=g).to(dtype) for _ in range(2))
    slot = torch.randperm(S, generator=g)[:A]
    length = torch.randint(1, U + 1, (A,), generator=g)
    source, shared = slot.clone(), torch.zeros(A, dtype=torch.int64)
    for a in range(1, A, 2):
        source[a] = slot[a - 1]
        shared[a] = min(length[a - 1], length[a]) - 1
        for cache in (keys, values):
            cache[slot[a], :, : shared[a]] = cache[source[a], :, : shared[a]]
    return query, key, value, keys, values, torch.stack([slot, source, shared, length])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "A, S, H, K, U, E", [(1, 1, 1, 1, 1, 8), (5, 9, 6, 2, 41, 20), (12, 12, 9, 3, 100, 64), (4, 6, 4, 4, 70, 128)]
)
def test_no_worse_than_torch(path, dtype, A, S, H, K, U, E):
    inputs = problem(A, S, H, K, U, E, dtype)
    *tensors, rows = inputs
    wide = [x.double() for x in tensors]
    truth = reference.decode_attention(*wide, rows, scale=E**-0.5)
    plain = reference.decode_attention(*(x.clone() for x in tensors), rows, scale=E**-0.5)
    keys, values = tensors[3].clone(), tensors[4].clone()
    ours = attend(path, *tensors[:3], keys, values, rows, E**-0.5)
    assert ours.dtype == dtype and ours.shape == (A, H, E)
    rounding = truth.to(dtype).double() - truth  # what the output's own dtype costs
    allowed = 1.25 * (plain - truth).norm() + rounding.norm() + 1e-6
    assert (ours - truth).norm() <= allowed
    assert keys.double().equal(wide[3]) and values.double().equal(wide[4])  # the new column and nothing else


@pytest.mark.parametrize("path", PATHS)
def test_columns_beyond_the_length_are_not_seen(path):
    *tensors, rows = problem(6, 8, 4, 2, 50, 16)
    rows[3].clamp_(max=30)
    rows[2] = torch.minimum(rows[2], rows[3] - 1)
    wanted = attend(path, *(x.clone() for x in tensors), rows, 0.3)
    used = torch.zeros(8, 50, dtype=torch.bool)
    for slot, _, _, length in rows.T.tolist():
        used[slot, :length] = True
    for cache in tensors[3:]:
        cache.masked_fill_(~used[:, None, :, None], 1e4)
    assert attend(path, *tensors, rows, 0.3).equal(wanted)


@pytest.mark.parametrize("path", list(ISA))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(path, dtype):
    *tensors, rows = problem(20, 20, 6, 2, 60, 64, dtype)
    together = attend(path, *(x.clone() for x in tensors), rows, 0.125)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert attend(path, *(x.clone() for x in tensors), rows, 0.125).equal(together)
    finally:
        torch.set_num_threads(before)
    for a in (0, 7, 19):
        query, key, value = (x[a : a + 1] for x in tensors[:3])
        alone = attend(path, query, key, value, *(x.clone() for x in tensors[3:]), rows[:, a : a + 1], 0.125)
        assert alone[0].equal(together[a])


def test_shared_columns_are_read_where_they_are_said_to_be():
    *tensors, rows = problem(2, 2, 2, 1, 40, 64)
    rows[:, 1] = torch.tensor([rows[0, 1], rows[0, 0], 10, 20])
    library = native.load()
    if library is None:
        pytest.skip(f"no native library: {native.why_not()}")
    slot, source = rows[0, 1], rows[1, 1]
    tensors[3][slot, :, :10] = tensors[3][source, :, :10]
    tensors[4][slot, :, :10] = tensors[4][source, :, :10]
    wanted = decode_attention(*(x.clone() for x in tensors), rows, scale=0.1)
    for cache in tensors[3:]:
        cache[slot, :, :10] = math.nan
    assert decode_attention(*tensors, rows, scale=0.1).equal(wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0.0, 1e3, 1e15])
def test_scores_of_any_size(path, size):
    *tensors, rows = problem(4, 4, 2, 1, 30, 64)
    tensors[0] *= size
    truth = reference.decode_attention(*(x.double() for x in tensors), rows, scale=0.125)
    assert torch.allclose(attend(path, *tensors, rows, 0.125).double(), truth, atol=1e-3 if size else 1e-6)


def test_float16_and_no_rows():
    *tensors, rows = problem(3, 4, 2, 1, 20, 8, torch.float16)
    truth = reference.decode_attention(*(x.double() for x in tensors), rows, scale=0.3)
    assert torch.allclose(decode_attention(*tensors, rows, scale=0.3).double(), truth, atol=4e-3)
    assert decode_attention(*(x[:0] for x in tensors[:3]), *tensors[3:], rows[:, :0], scale=0.3).shape == (0, 2, 8)


def test_refuses_what_does_not_fit():
    *tensors, rows = problem(3, 4, 2, 1, 20, 8)
    with pytest.raises(ValueError, match="do not fit together"):
        decode_attention(tensors[0], tensors[1][:, :, :4], *tensors[2:], rows, scale=1.0)
    for change in (torch.Tensor.bfloat16, lambda x: x.to("meta")):
        for i in range(5):
            with pytest.raises(ValueError, match="must share a dtype and a device, not .*float32 on cpu"):
                decode_attention(*tensors[:i], change(tensors[i]), *tensors[i + 1 :], rows, scale=1.0)
    with pytest.raises(ValueError, match="rows must be"):
        decode_attention(*tensors, rows[:3], scale=1.0)
    if native.load() is None:
        pytest.skip(f"no native library: {native.why_not()}")
    for row, bad in ((0, 4), (1, -1), (2, 20), (3, 21), (3, 0)):
        wrong = rows.clone()
        wrong[row, 1] = bad
        with pytest.raises(ValueError, match="slots beyond 4, columns beyond 20"):
            decode_attention(*tensors, wrong, scale=1.0)
