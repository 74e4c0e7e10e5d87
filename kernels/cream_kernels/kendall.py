"""Kendall's rank correlation of many short rankings at once.

P prompts (rows), R responses a prompt. There are three ways to the same three integers a row (pairs ranked alike less
pairs ranked oppositely, pairs untied in x, pairs untied in y), so that which was taken does not change a bit:

    NumPy           one vectorised comparison for each column but the first; for little work, where loading numba would
                    take longer than the answer, and where numba is not installed
    pair counting   Numba, every pair of columns, 32 rows side by side in vector registers: O(R^2), for R <= 256 or,
                    both in float32, 512
    sorting         Numba, O(R log R), for longer rankings: W. R. Knight 1966 (doi 10.1080/01621459.1966.10480879) with
                    radix sorts for his merging, since no comparison is there for a processor to guess wrong

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
_LONGEST_PAIR_COUNTED = 2**11  # bytes: the same registers compare twice as many numbers of half the size
_LANES = 32
_NEAR = 16  # distance up to which comparing all pairs in vector registers beats moving them


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
    sorting = length > _LONGEST_PAIR_COUNTED // max(x.itemsize, y.itemsize)
    try:
        count = _compiled(_count_sorting if sorting else _count_pairs)
    except ModuleNotFoundError as missing:
        if missing.name != "numba":
            raise
        warnings.warn("numba is not installed: kendall_tau falls back on NumPy, which is slower", stacklevel=3)
        return _count_numpy(x, y)
    counts = np.empty((num_rows, 3), dtype=np.int64)

    def work(rows: slice) -> None:
        numbers = (_ordered(x[rows]), _ordered(y[rows])) if sorting else (x[rows], y[rows])
        count(*numbers, counts[rows])

    work(slice(0, 0))  # compiles, once, before the threads would wait for it
    num_threads = max(1, min(torch.get_num_threads(), comparisons // 2**20, num_rows))
    # What _ordered makes of a block is to stay in a core's cache.
    num_blocks = max(num_threads, min(num_rows, x.size // 2**15)) if sorting else num_threads
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    blocks = [slice(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if num_threads == 1:
        list(map(work, blocks))
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


def _ordered(values: np.ndarray) -> np.ndarray:  # (P, R) uint64
    """Whole numbers ordered and tied as values are (nan anywhere)."""
    values = np.ascontiguousarray(values)
    if values.dtype == np.uint64:
        return values
    if values.dtype == np.int64:
        return values.view(np.uint64) ^ np.uint64(2**63)
    # A float's bits without the sign rise with its size. Their negative where the sign is set, and not their
    # complement, makes one 0 of both zeros and leaves the lowest bits alike, which are 0 in what was float32.
    bits = values.astype(np.float64, copy=False).view(np.int64)
    sign, keys = bits >> 63, bits & np.int64(2**63 - 1)
    keys ^= sign  # in place: fresh memory costs more than the arithmetic
    keys -= sign
    keys ^= np.int64(-(2**63))
    return keys.view(np.uint64)


def _count_sorting(x, y, counts):  # (P, R) and (P, R) from _ordered, (P, 3); compiled by numba
    num_rows, length = x.shape
    pairs = length * (length - 1) // 2
    keys, spare_keys = np.empty(length, np.uint64), np.empty(length, np.uint64)
    tags, spare_tags = np.empty(length, np.uint32), np.empty(length, np.uint32)
    free, ends = np.empty(length, np.uint32), np.empty(256, np.uint32)

    def sort(keys, tags, spare_keys, spare_tags):
        """By keys, 8 bits at a time from the lowest; stable. Bits alike in all keys are passed over."""
        differing, shift = np.uint64(0), np.uint64(0)
        for i in range(length):
            differing |= keys[i] ^ keys[0]
        while shift < 64 and differing >> shift != 0:
            if (differing >> shift) & np.uint64(1) == 0:
                shift += np.uint64(1)
                continue
            ends[:] = 0
            for i in range(length):
                ends[(keys[i] >> shift) & np.uint64(255)] += np.uint32(1)
            total = np.uint32(0)
            for digit in range(256):
                total, ends[digit] = np.uint32(total + ends[digit]), total
            for i in range(length):
                byte = (keys[i] >> shift) & np.uint64(255)
                out = ends[byte]
                ends[byte] = out + np.uint32(1)
                spare_keys[out], spare_tags[out] = keys[i], tags[i]
            keys, tags, spare_keys, spare_tags = spare_keys, spare_tags, keys, tags
            shift += np.uint64(8)
        return keys, tags, spare_keys, spare_tags

    for row in range(num_rows):
        for i in range(length):
            keys[i], tags[i] = y[row, i], i
        keys, tags, spare_keys, spare_tags = sort(keys, tags, spare_keys, spare_tags)
        # From here on a tag is the place in y's order, of tied ones that of the first. Sorting by x what stands in that
        # order leaves those tied in x sorted by y.
        tied_x, tied_y, tied_both = 0, 0, 0
        place, previous = 0, np.uint64(0)
        for i in range(length):
            if keys[i] != previous:
                place, previous = i, keys[i]
            tied_y += i - place
            keys[i], tags[i], free[i] = x[row, tags[i]], place, i
        keys, tags, spare_keys, spare_tags = sort(keys, tags, spare_keys, spare_tags)
        # Each one's place in x's order is written at its place in y's, tied ones as they come. So those tied in x or y
        # are in order there, and the pairs out of order are those ranked oppositely.
        source, target = spare_tags, tags
        run_x, run_both = 0, 0  # how many before this one are tied with it
        for i in range(length):
            tied = i > 0 and keys[i] == keys[i - 1]
            run_x = run_x + 1 if tied else 0
            run_both = run_both + 1 if tied and tags[i] == tags[i - 1] else 0
            tied_x += run_x
            tied_both += run_both
            source[free[tags[i]]] = i
            free[tags[i]] += np.uint32(1)
        # Of these numbers, 0 to R - 1, from the highest bit down, those of a block that have the bit move behind those
        # that have not, which jump over them. Unsigned indices spare numba's look for negative ones: 1.5 times as fast.
        opposite, width = 0, 1
        while 2 * width < length:
            width *= 2
        while width >= _NEAR:
            for low in range(0, length, 2 * width):
                middle, jumped, over = np.uint64(low + width), np.uint64(0), np.uint64(0)
                for i in range(low, min(low + 2 * width, length)):
                    high = np.uint64((source[i] & np.uint32(width)) != 0)
                    target[middle + jumped if high else np.uint64(i) - jumped] = source[i]
                    over += np.uint64(0) if high else jumped
                    jumped += high
                opposite += np.int64(over)
            source, target = target, source
            width //= 2
        # Now each is in its own block of _NEAR, and those still out of order are nearer than that.
        for distance in range(1, _NEAR):
            later = source[distance:]
            for i in range(len(later)):
                opposite += source[i] > later[i]
        counts[row, 0] = pairs - tied_x - tied_y + tied_both - 2 * opposite
        counts[row, 1] = pairs - tied_x
        counts[row, 2] = pairs - tied_y
