"""Kendall's rank correlation of many short rankings at once.

P prompts (rows), R responses a prompt. There are three ways to the same three integers a row (pairs ranked alike less
pairs ranked oppositely, pairs untied in x, pairs untied in y), so that which was taken does not change a bit:

    NumPy           one vectorised comparison for each column but the first; for little work, where loading numba would
                    take longer than the answer, and where numba is not installed
    pair counting   Numba, every pair of columns, 32 rows side by side in vector registers: O(R^2), for R <= 512
    merge counting  Numba, W. R. Knight 1966 (doi 10.1080/01621459.1966.10480879): O(R log R), for longer rankings

Numba's own parallel loops are not used: its OpenMP layer kills a child forked after a parallel call, and its workqueue
layer aborts when two threads call at once. The compiled loops here are serial and release the GIL; each call starts its
own few threads over blocks of rows and joins them. So it may be called from any number of threads and after a fork.
"""

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# Importing numba and loading the cached loops takes about as long as NumPy needs for this many comparisons.
_NUMPY_COMPARISONS = 2**27
_NUMPY_COMPARISONS_WITH_NUMBA_LOADED = 2**10
_done_by_numpy = 0  # comparisons, as long as numba is not loaded
_LONGEST_PAIR_COUNTED = 512
_LANES = 32


def kendall_tau(
    x: np.ndarray | Tensor,  # (P, R) real numbers: rewards, say
    y: np.ndarray | Tensor,  # (P, R)
    *,
    variant: str = "b",
) -> np.ndarray | Tensor:  # (P,) float64 in [-1, 1] or nan; a tensor, on its device, where x or y is one
    """Kendall's tau of each row of x with the same row of y. Defined by reference.kendall_tau; "b" is SciPy's default.

    Variant "b" divides by sqrt(pairs untied in x * pairs untied in y); it is nan where all of x or all of y is tied.
    Variant "a" divides by R (R - 1) / 2, so a tie counts as half agreement; all tied is 0. Both are nan for R < 2 and
    for a row that holds a nan. Infinities are ordered and tie with themselves; -0.0 ties with 0.0.

    Numba is imported on the first call that is worth it (about 0.3 s, and 2 s more where its cache is empty), and does
    20,000 x 5 in under a millisecond then. Uses as many threads as torch.get_num_threads() says. Values on a GPU are
    brought to the CPU. Raises ValueError for shapes, dtypes and variants that are not as above.
    """
    if variant not in ("a", "b"):
        raise ValueError(f"variant must be 'a' or 'b', not {variant!r}")
    device = next((v.device for v in (x, y) if isinstance(v, Tensor)), None)
    x, y = _as_array(x, "x"), _as_array(y, "y")
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must both be (P, R), not {x.shape} and {y.shape}")
    score, untied_x, untied_y = _count(x, y).T
    pairs = x.shape[1] * (x.shape[1] - 1) // 2
    # sqrt(n * n) is n to the last bit, so equal rankings give exactly 1
    scale = np.full(len(x), float(pairs)) if variant == "a" else np.sqrt(untied_x.astype(np.float64) * untied_y)
    undefined = (scale == 0) | (x != x).any(axis=1) | (y != y).any(axis=1)
    tau = np.where(undefined, np.nan, score / np.where(undefined, 1.0, scale))
    return tau if device is None else torch.from_numpy(tau).to(device)


def _as_array(values: np.ndarray | Tensor, name: str) -> np.ndarray:
    """float32, float64, int64 or uint64, holding exactly the numbers given."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    values = np.asarray(values)
    if values.dtype in (np.float32, np.float64, np.int64, np.uint64):
        return values
    if values.dtype == np.float16:
        return values.astype(np.float32)
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    raise ValueError(f"{name} must hold real numbers of at most 64 bits, not {values.dtype}")


def _count(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # (P, 3) int64
    """Of each row: pairs ranked alike less oppositely, untied in x, untied in y. Any numbers, where there is a nan."""
    num_rows, length = x.shape
    comparisons = num_rows * length * (length - 1) // 2
    if _numpy_does(comparisons):
        return _count_numpy(x, y)
    try:
        count = _compiled(_count_pairs if length <= _LONGEST_PAIR_COUNTED else _count_merging)
    except ModuleNotFoundError as missing:
        if missing.name != "numba":
            raise
        warnings.warn("numba is not installed: kendall_tau falls back on NumPy, which is slower", stacklevel=3)
        return _count_numpy(x, y)
    counts = np.empty((num_rows, 3), dtype=np.int64)
    if length > _LONGEST_PAIR_COUNTED:

        def work(rows: slice) -> None:
            count(_sorted_keys(x[rows], y[rows]), counts[rows])
    else:

        def work(rows: slice) -> None:
            count(x[rows], y[rows], counts[rows])

    work(slice(0, 0))  # compiles, once, before the threads would wait for it
    num_threads = max(1, min(torch.get_num_threads(), comparisons // 2**20, num_rows))
    bounds = [num_rows * i // num_threads for i in range(num_threads + 1)]
    blocks = [slice(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if num_threads == 1:
        work(blocks[0])
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, blocks))
    return counts


def _numpy_does(comparisons: int) -> bool:
    """Whether NumPy is to answer. Before numba is loaded, what NumPy has done so far counts too, so that a program of
    many small calls loads it once that would have paid, and loses at most as much again."""
    global _done_by_numpy
    if _compiled.cache_info().currsize:
        return comparisons <= _NUMPY_COMPARISONS_WITH_NUMBA_LOADED
    _done_by_numpy += comparisons
    return _done_by_numpy <= _NUMPY_COMPARISONS


def _count_numpy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    counts = np.zeros((len(x), 3), dtype=np.int64)
    for start in range(0, len(x), 4096):
        rows = slice(start, start + 4096)
        columns_x, columns_y = np.ascontiguousarray(x[rows].T), np.ascontiguousarray(y[rows].T)
        for i in range(1, len(columns_x)):
            sign_x = (columns_x[i] > columns_x[:i]).view(np.int8) - (columns_x[i] < columns_x[:i]).view(np.int8)
            sign_y = (columns_y[i] > columns_y[:i]).view(np.int8) - (columns_y[i] < columns_y[:i]).view(np.int8)
            counts[rows, 0] += (sign_x * sign_y).sum(axis=0, dtype=np.int64)
            counts[rows, 1] += np.count_nonzero(sign_x, axis=0)
            counts[rows, 2] += np.count_nonzero(sign_y, axis=0)
    return counts


@functools.cache
def _compiled(loop: Callable) -> Callable:
    """loop as machine code, made for each dtype on its first use and kept on disk where there is a place for it."""
    import numba  # here, since importing it takes 0.3 s that most callers never need

    try:
        return numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # "cannot cache function": neither the package's nor the user's cache folder can be written
        return numba.njit(nogil=True)(loop)


def _count_pairs(x, y, counts):  # (P, R), (P, R), (P, 3); compiled by numba
    num_rows, length = x.shape
    lanes_x, lanes_y = np.empty((length, _LANES), x.dtype), np.empty((length, _LANES), y.dtype)
    for start in range(0, num_rows, _LANES):
        for lane in range(_LANES):
            row = min(start + lane, num_rows - 1)
            for i in range(length):
                lanes_x[i, lane] = x[row, i]
                lanes_y[i, lane] = y[row, i]
        score, untied_x, untied_y = np.zeros(_LANES, np.int32), np.zeros(_LANES, np.int32), np.zeros(_LANES, np.int32)
        for i in range(length):
            for j in range(i):
                for lane in range(_LANES):
                    a, b = lanes_x[i, lane], lanes_x[j, lane]
                    c, d = lanes_y[i, lane], lanes_y[j, lane]
                    sign_x = np.int32(a > b) - np.int32(a < b)
                    sign_y = np.int32(c > d) - np.int32(c < d)
                    score[lane] += sign_x * sign_y
                    untied_x[lane] += sign_x * sign_x
                    untied_y[lane] += sign_y * sign_y
        for lane in range(min(_LANES, num_rows - start)):
            counts[start + lane, 0] = score[lane]
            counts[start + lane, 1] = untied_x[lane]
            counts[start + lane, 2] = untied_y[lane]


def _sorted_keys(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # (P, R) uint64
    """Each row ordered by x, then by y: the place of x in the upper 32 bits of a key, that of y in the lower."""
    keys = (_places(x).astype(np.uint64) << np.uint64(32)) | _places(y)
    keys.sort(axis=1)
    return keys


def _places(values: np.ndarray) -> np.ndarray:  # (P, R) uint32
    """Numbers ordered and tied as each row's values are (nan anywhere)."""
    if values.dtype == np.float32:
        bits = (values + np.float32(0.0)).view(np.uint32)  # + 0.0 makes 0.0 of -0.0
        return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(2**31))
    places = np.empty(values.shape, dtype=np.uint32)
    for row, place in zip(values, places, strict=True):
        place[:] = np.unique(row, return_inverse=True)[1]
    return places


def _count_merging(keys, counts):  # (P, R) from _sorted_keys, (P, 3); compiled by numba
    num_rows, length = keys.shape
    pairs = length * (length - 1) // 2
    source, target = np.empty(length, np.uint32), np.empty(length, np.uint32)
    for row in range(num_rows):
        tied_x, tied_y, tied_both = 0, 0, 0
        run_x, run_both = 0, 0  # how many before this one are tied with it
        for i in range(length):
            key = keys[row, i]
            source[i] = np.uint32(key & np.uint64(0xFFFFFFFF))
            if i > 0:
                run_x = run_x + 1 if (key >> np.uint64(32)) == (keys[row, i - 1] >> np.uint64(32)) else 0
                run_both = run_both + 1 if key == keys[row, i - 1] else 0
            tied_x += run_x
            tied_both += run_both
        # Sorting by y from the bottom up; whatever a value jumps over was ranked oppositely.
        opposite = 0
        width = 1
        while width < length:
            for low in range(0, length, 2 * width):
                middle, high = min(low + width, length), min(low + 2 * width, length)
                left, right = low, middle
                for out in range(low, high):
                    if right >= high or (left < middle and source[left] <= source[right]):
                        target[out] = source[left]
                        left += 1
                    else:
                        target[out] = source[right]
                        right += 1
                        opposite += middle - left
            source, target = target, source
            width *= 2
        run_y = 0
        for i in range(1, length):
            run_y = run_y + 1 if source[i] == source[i - 1] else 0
            tied_y += run_y
        counts[row, 0] = pairs - tied_x - tied_y + tied_both - 2 * opposite
        counts[row, 1] = pairs - tied_x
        counts[row, 2] = pairs - tied_y
