"""The sampler's cache: what a row attends to is its prompt and its answer, whatever its slot held before."""

import pytest
import torch

from cream.cache import GROWTH, KeyValues
from cream_kernels import native

H, K, E, LAYERS = 4, 2, 8, 2


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip(f"no native library: {native.why_not()}")
    return request.param


def made(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(tokens, seed):
    seeds = {layer: 100 * seed + layer for layer in range(LAYERS)}
    return {layer: (made(tokens, K, E, seed=n), made(tokens, K, E, seed=n + 50)) for layer, n in seeds.items()}


class Row:
    """One answer and, beside the cache, all that it ought to see."""

    def __init__(self, slot, before, seed):
        self.slot, self.seed, self.prompt = slot, seed, len(before[0][0])
        self.seen = {layer: list(pair) for layer, pair in before.items()}

    @property
    def length(self):
        return len(self.seen[0][0])


def step(cache, rows, source=None):
    """One token for each row through every layer, held to plain attention over what the row has seen."""
    slots = [row.slot for row in rows]
    shared = [row.prompt if source else 0 for row in rows]
    cache.begin(slots, source or slots, shared, [row.length + 1 for row in rows])
    for layer in range(LAYERS):
        seed = [1000 * row.seed + 10 * row.length + layer for row in rows]
        query = torch.stack([made(H, 1, E, seed=n) for n in seed])
        key, value = (torch.stack([made(K, 1, E, seed=n + d) for n in seed]) for d in (3, 6))
        out = cache.attend(layer, query, key, value, 0.3)
        assert out.shape == (len(rows), 1, H, E)
        for n, row in enumerate(rows):
            old = zip(row.seen[layer], (key, value), strict=True)
            row.seen[layer] = [torch.cat([x, new[n].transpose(0, 1)]) for x, new in old]
            k, v = (x.repeat_interleave(H // K, 1).transpose(0, 1) for x in row.seen[layer])
            wanted = torch.softmax(0.3 * query[n] @ k.mT, -1) @ v
            torch.testing.assert_close(out[n, 0], wanted[:, 0], rtol=0, atol=1e-6)


def test_rows_of_any_length_join_and_leave(path):
    cache = KeyValues(4, 200, torch.device("cpu"))
    short, long = prompt(3, 1), prompt(11, 2)
    cache.fill([0, 2], short)
    cache.fill([3], long)
    a, b, c = Row(0, short, 1), Row(2, short, 2), Row(3, long, 3)
    step(cache, [a, b, c], source=[0, 0, 3])
    step(cache, [c, b])  # in any order, not all
    cache.fill([0], long)  # where a longer answer was, and one that is shorter than it after
    d = Row(0, long, 4)
    for _ in range(GROWTH + 5):  # beyond what was held at first
        step(cache, [d, c, b], source=[0, 0, 2])
    cache.fill([2], short)
    step(cache, [c, Row(2, short, 5)])


def test_a_smaller_cache_goes_on(path):
    cache = KeyValues(5, 50, torch.device("cpu"))
    before = prompt(4, 1)
    cache.fill(range(5), before)
    rows = [Row(slot, before, slot) for slot in range(5)]
    step(cache, rows)
    assert cache.idles == (path == "torch")
    cache.shrink([3, 1])
    rows[3].slot, rows[1].slot = 0, 1
    step(cache, [rows[1], rows[3]], source=[1, 1])
    assert cache.slots == 2


def test_a_full_cache_is_refused():
    cache = KeyValues(1, 2, torch.device("cpu"))
    cache.fill([0], prompt(2, 1))
    with pytest.raises(ValueError, match="2 columns cannot hold 3"):
        cache.begin([0], [0], [0], [3])
