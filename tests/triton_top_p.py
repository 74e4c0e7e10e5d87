"""The sampler's Triton body against top_p_sample_reference. Run as triton_bodies.py is, and with it by test_triton.py.

    TRITON_INTERPRET=1 python -m pytest tests/triton_top_p.py      without a GPU
    python -m pytest tests/triton_top_p.py                         on one, through the public function as well

The interpreter sums a block's weights in an order of its own, so float32 sums are held to their 1e-6 (`agree`) here for
what they mean, and by test_real_shapes for what a card makes of them.
"""

import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from cream_kernels import tiles, top_p_sample, top_p_triton
from cream_kernels.top_p import top_p_sample_triton
from tests.test_top_p import agree, problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALMOST_1 = math.nextafter(1, 0)
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a row, wide ones among them."""
    monkeypatch.setattr(tiles, "SAMPLE_BLOCK", 64)
    monkeypatch.setattr(tiles, "ROW_BLOCK", 128)


def sample(logits, uniform, temperature=1.0, top_p=1.0):
    uniform = torch.as_tensor(uniform, dtype=torch.float64)
    return top_p_sample_triton(logits.to(DEVICE), uniform.to(DEVICE), temperature, top_p).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, V", [(1, 1), (1, 64), (2, 150)])
def test_draws_what_the_reference_draws(small_blocks, dtype, N, V):
    logits, uniform = problem(N, V, dtype, seed=V)
    for temperature, top_p in ((0.8, 0.95), (1.3, 0.999), (1, 1), (1, 0), (0, 0.9)):
        tokens = sample(logits, uniform, temperature, top_p)
        assert tokens.dtype == torch.int64 and tokens.shape == (N,)
        agree(tokens, logits, uniform, temperature, top_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_ship(dtype):
    logits, uniform = problem(3, 5000, dtype)
    for temperature, top_p in ((0.8, 0.95), (1, 1)):
        agree(sample(logits, uniform, temperature, top_p), logits, uniform, temperature, top_p)


def test_every_token_has_its_share(small_blocks):
    """Uniform numbers just inside both ends of what each token of the nucleus has."""
    logits = torch.tensor([2.0, -1.0, 0.5, -math.inf, 1.0, 0.5, -2.0, 1.5, -6.0, 0.0])
    mass = (logits.double() / 0.9).exp()
    mass[[1, 3, 5, 6, 8, 9]] = 0  # at top_p 0.85 the nucleus ends with the first of two equal logits
    ends = mass.cumsum(0) / mass.sum()
    kept = mass.nonzero()[:, 0]
    uniform = torch.stack([ends[kept] - mass[kept] / mass.sum() + 1e-6, ends[kept] - 1e-6], 1).flatten()
    tokens = sample(logits.expand(len(uniform), -1), uniform, 0.9, 0.85)
    assert tokens.tolist() == kept.repeat_interleave(2).tolist()


def test_equal_logits_are_counted_from_the_lower_id_up(small_blocks):
    logits = torch.zeros(5, 130)  # 65 of them are the nucleus, which ends with the first one of a block
    uniform = [0.0, 63.5 / 65, 63.999 / 65, 64.001 / 65, ALMOST_1]
    assert sample(logits, uniform, 1.0, 0.5).tolist() == [0, 63, 63, 64, 64]
    assert sample(logits[:2], [64.5 / 130, 100.5 / 130]).tolist() == [64, 100]
    logits[:, 1::2] = -0.0  # the same logit
    assert sample(logits, uniform, 1.0, 0.5).tolist() == [0, 63, 63, 64, 64]
    logits[:, 129] = 1e-3  # the most probable one comes first in the nucleus, and last in id order
    tokens = sample(logits, [0.0, 62.5 / 65, 63.5 / 65, 64.5 / 65, ALMOST_1], 1.0, 0.5)
    assert tokens.tolist() == [0, 62, 63, 129, 129]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_negative_logits_at_the_edge(small_blocks, dtype):
    """Their weight is that of the logit that was searched for, to the last of its bits."""
    logits = torch.full((1, 150), -8.0, dtype=dtype)
    logits[0, 0] = -1
    weight = math.exp(-7)
    assert sample(logits, [ALMOST_1], 1.0, (1 + 99.5 * weight) / (1 + 149 * weight)).tolist() == [100]


def test_levels_and_bans(small_blocks):
    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor([-math.inf, -3.0, -0.0, 0.0, 1.0, 1.0078125])
    logits = levels[torch.randint(6, (4, 140), generator=generator)].half()
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    for temperature, top_p in ((0.5, 0.3), (50.0, 0.8)):
        tokens = sample(logits, uniform, temperature, top_p)
        assert (logits.gather(1, tokens[:, None]) > -math.inf).all()
        agree(tokens, logits, uniform, temperature, top_p)


def test_order_is_by_logit_where_the_weights_round_to_the_same(small_blocks):
    logits = torch.arange(100.0).repeat(3, 1) / 100
    tokens = sample(logits, [0.0, 0.5, ALMOST_1], 1e9, 0.5)  # every weight is 1 in float32
    assert tokens.tolist() == [50, 75, 99]
    assert sample(logits, [0.0, 0.5, ALMOST_1], 1e-30, 0.5).tolist() == [99] * 3


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_a_boundary_belongs_to_the_next_token(top_p):
    uniform = [0.0, 0.25, 0.5, 0.75, math.nextafter(0.75, 0)]
    assert sample(torch.zeros(5, 4), uniform, 1.0, top_p).tolist() == [0, 1, 2, 3, 2]


def test_top_p_is_not_rounded_to_float32(small_blocks):
    """0.3 of 10 equal tokens are 3; float32(0.3) is above 0.3 and would take a fourth."""
    assert sample(torch.zeros(1, 10), [ALMOST_1], 1.0, 0.3).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0, 1e300])
@pytest.mark.parametrize("top_p", [0.0, 0.9, 1.0])
def test_banned_tokens_are_never_drawn(small_blocks, temperature, top_p):
    logits = torch.full((3, 150), -math.inf)
    logits[:, 137] = torch.tensor([-3e38, 0.0, 3e38])
    assert sample(logits, [0.0, 0.5, ALMOST_1], temperature, top_p).tolist() == [137] * 3


def test_layouts(small_blocks):
    logits, uniform = problem(2, 150, torch.float16)
    wanted = sample(logits, uniform, 0.8, 0.95)
    assert sample(logits.T.contiguous().T, uniform, 0.8, 0.95).equal(wanted)
    wide = torch.full((2, 300), math.nan, dtype=torch.float16)
    wide[:, 100:250] = logits
    assert sample(wide.to(DEVICE)[:, 100:250], uniform, 0.8, 0.95).equal(wanted)
    strided = torch.stack([uniform, uniform + 7], 1).to(DEVICE)[:, 0]
    assert sample(logits, strided, 0.8, 0.95).equal(wanted)


def test_rows_and_uniforms_far_apart():
    """3 rows of 40 at a stride of 2^30: row 2 starts at 2^31, where 32 bits would turn negative."""
    logits, uniform = problem(3, 40, torch.float16)
    far = torch.empty(2**31 + 40, dtype=torch.float16, device=DEVICE).as_strided((3, 40), (2**30, 1))
    far.copy_(logits)
    far_uniform = torch.empty(2**31 + 1, dtype=torch.float64, device=DEVICE).as_strided((3,), (2**30,))
    far_uniform.copy_(uniform)
    assert sample(far, far_uniform, 0.8, 0.95).equal(sample(logits, uniform, 0.8, 0.95))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 0.9), (1.0, 1.0), (1.0, 0.9)])
@pytest.mark.parametrize(
    "value, what",
    [(math.nan, "a NaN"), (-math.nan, "a NaN"), (math.inf, "[+]inf"), (None, "nothing but -inf")],
)
def test_a_row_without_a_distribution_is_named(small_blocks, temperature, top_p, value, what):
    logits, uniform = problem(3, 150, torch.float16)
    logits[2] = math.nan  # the first one is named
    if value is None:
        logits[1] = -math.inf
    else:
        logits[1, 140] = value
    with pytest.raises(ValueError, match=f"row 1 .* {what}"):
        sample(logits, uniform, temperature, top_p)


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_uniform_out_of_range_is_named(value):
    logits, uniform = problem(3, 50)
    uniform[2] = value
    logits[0] = math.nan  # said after
    with pytest.raises(ValueError, match="row 2 has"):
        sample(logits, uniform, 1.0, 0.9)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        self.count += function.overloadpacket.__name__ in waits
        return function(*args, **(kwargs or {}))


def test_the_host_waits_once():
    logits, uniform = problem(1, 20, torch.float16)
    with Reads() as reads:
        top_p_sample_triton(logits.to(DEVICE), uniform.to(DEVICE), 0.8, 0.95)
    assert reads.count == 1


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, V", [(1, 32000), (64, 49152), (160, 128256), (3, 152064), (5, 50257)])
def test_real_shapes(monkeypatch, dtype, N, V):
    """Through the public function, and so that it must be this body."""
    calls = []
    launch = top_p_triton.sample
    monkeypatch.setattr(top_p_triton, "sample", lambda *given: calls.append(1) or launch(*given))
    logits, uniform = (tensor.to(DEVICE) for tensor in problem(N, V, dtype))
    for temperature, top_p in ((0.8, 0.95), (1.3, 0.999), (1, 1), (0, 0.9), (5, 0.9)):
        agree(top_p_sample(logits, uniform, temperature=temperature, top_p=top_p), logits, uniform, temperature, top_p)
    assert len(calls) == 5


@on_a_gpu
def test_more_logits_than_two_billion():
    logits = torch.randn(16800, 128256, dtype=torch.bfloat16, device=DEVICE)
    uniform = torch.rand(16800, dtype=torch.float64, device=DEVICE)
    tokens = top_p_sample(logits, uniform, temperature=0.8, top_p=0.95)
    for row in (0, 16743, 16744, 16799):
        at = slice(row, row + 1)
        agree(tokens[at], logits[at], uniform[at], 0.8, 0.95)
