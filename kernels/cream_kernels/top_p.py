"""Nucleus (top-p) sampling from rows of logits, given the uniform numbers to sample with.

Letters: N rows, V vocabulary, K tokens looked at first.

The caller brings the randomness, one number in [0, 1) a row, so the same number draws the same token whatever
the batch, the machine or the path below: without a sort in C++ on the CPU (kernels/csrc/top_p.cpp) and in Triton on
CUDA (top_p_triton.py), torch elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import native
from .linear_logp import triton_serves

TOP_K = 512  # tokens that the torch path looks at before it sorts a row; a language model's nucleus is rarely larger


@torch.no_grad()
def top_p_sample(
    logits: Tensor,  # (N, V) float32, bfloat16 or float16; -inf bans a token
    uniform: Tensor,  # (N,) float64 in [0, 1), on the logits' device
    *,
    temperature: float,
    top_p: float,
) -> Tensor:  # (N,) int64
    """One token a row from the nucleus of softmax(logits / temperature).

    The nucleus is the smallest set of most probable tokens whose mass reaches top_p: never empty, equal logits
    counted from the lower id up, all of them at top_p 1 (Holtzman et al., arXiv 1904.09751). The token is where the
    cumulative mass of the nucleus, taken in id order, first exceeds uniform * its total. Temperature 0 takes the
    largest logit, of equal ones the lowest id. Defined by top_p_sample_reference; other tokens than its come out only
    where a cumulative mass lies within float32 rounding (1e-6) of top_p or of the uniform number.

    Raises ValueError for wrong shapes, types or ranges, and for a row that has no distribution (a NaN, a +inf, or
    nothing but -inf), naming the row. Costs one pass over DRAM on the CPU and on CUDA, no sort, and no memory to speak
    of; on other devices a top-k and a sort of just the rows whose nucleus is larger than that. Off the CPU the host
    waits once, for what there is to refuse.
    """
    _check(logits, uniform, temperature, top_p)
    N, V = logits.shape
    if N == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    if logits.device.type == "cuda" and triton_serves(logits):
        return top_p_sample_triton(logits, uniform, temperature, top_p)
    library = native.load()
    if library is None or logits.device.type != "cpu":
        return top_p_sample_torch(logits, uniform, temperature, top_p)
    return top_p_sample_native(library, logits, uniform, temperature, top_p, isa=library.cream_top_p_isa())


def top_p_sample_reference(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """What top_p_sample means: float64, a full sort, row by row. (N, V), (N,) -> (N,) int64."""
    tokens = []
    for row, u in zip(logits.double(), uniform.tolist(), strict=True):
        if temperature == 0:
            tokens.append(int(row.eq(row.max()).nonzero()[0]))
            continue
        weight = ((row - row.max()) / temperature).exp()
        order = row.argsort(descending=True, stable=True)
        mass = weight[order].cumsum(0)
        size = int((mass < top_p * mass[-1]).sum()) + 1 if top_p < 1 else len(row)
        nucleus = order[:size].sort().values
        mass = weight[nucleus].cumsum(0)
        tokens.append(int(nucleus[(mass <= u * mass[-1]).sum()]))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def top_p_sample_native(library, logits: Tensor, uniform: Tensor, temperature: float, top_p: float, isa: int) -> Tensor:
    """The C++ path; isa 0, 1, 2 is the plain, AVX2, AVX-512 body, all of the same meaning."""
    if logits.dtype == torch.float16:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    uniform = uniform.contiguous()
    if not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise _bad_uniform(uniform)
    N, V = logits.shape
    tokens = torch.empty(N, dtype=torch.int64)
    done = library.cream_top_p_sample(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        N,
        V,
        logits.stride(0),
        uniform.data_ptr(),
        temperature,
        top_p,
        tokens.data_ptr(),
        min(N, torch.get_num_threads()),
        isa,
    )
    if done == -1:
        raise ValueError(f"this processor has no body {isa} of the native sampler")
    if done == -2:
        raise MemoryError(f"no memory for the native sampler's work space, about {20 * V >> 20} MiB a thread")
    if done < N:
        raise _no_distribution(logits, done)
    return tokens


def top_p_sample_triton(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The CUDA path, for all three dtypes. Columns that are not dense are copied."""
    from . import top_p_triton

    if logits.stride(1) != 1:
        logits = logits.contiguous()
    with torch.cuda.device_of(logits):
        tokens = top_p_triton.sample(logits, uniform, _scale(temperature) if temperature else 0.0, top_p)
    lowest = int(tokens.min())  # the one synchronisation
    if lowest < 0:
        _refuse(logits, uniform, [True, lowest == top_p_triton.BAD_UNIFORM], tokens < 0)
    return tokens


def top_p_sample_torch(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The torch path, any device."""
    V = logits.shape[1]
    largest = logits.amax(1, keepdim=True).float()  # (N, 1); NaN where the row has one
    bad = ~largest[:, 0].isfinite()
    bad_uniform = ~((uniform >= 0) & (uniform < 1))
    if temperature == 0:
        tokens = logits.argmax(1)
        _refuse(logits, uniform, torch.stack([bad.any(), bad_uniform.any()]).tolist(), bad)
        return tokens

    scale = _scale(temperature)
    if top_p >= 1:
        _refuse(logits, uniform, torch.stack([bad.any(), bad_uniform.any()]).tolist(), bad)
        return _draw(_weights(logits, largest, scale), uniform)

    total = _weights(logits, largest, scale).sum(1, dtype=torch.float64)  # (N,)
    K = min(TOP_K, V)
    values, ids = logits.topk(K, dim=1)  # falling; equal logits in no particular order
    mass = _weights(values, largest, scale).double().cumsum(1)
    size = (mass < top_p * total[:, None]).sum(1, keepdim=True) + 1  # of the nucleus, where it fits into the K
    last = values.gather(1, size.clamp(max=K) - 1)  # (N, 1) the logit that the nucleus ends with
    # Beyond the K there may be more tokens with the K-th logit: then topk's choice among them decides nothing here.
    fits = ((size[:, 0] <= K) & (last[:, 0] > values[:, -1])) | (K == V)
    checks = torch.stack([bad.any(), bad_uniform.any(), ~fits.all()]).tolist()  # the one synchronisation
    _refuse(logits, uniform, checks[:2], bad)

    size = size.clamp(max=K)
    inside = (values > last).sum(1, keepdim=True)
    ids, by_id = ids.sort(dim=1)
    values = values.gather(1, by_id)
    tied = values == last
    keep = (values > last) | (tied & (tied.cumsum(1) <= size - inside))
    weight = _weights(values, largest, scale).double().where(keep, 0.0)
    tokens = ids.gather(1, _draw(weight, uniform)[:, None])[:, 0]
    if checks[2]:
        rows = (~fits).nonzero()[:, 0]
        tokens[rows] = _sample_sorted(logits[rows], largest[rows], uniform[rows], total[rows], scale, top_p)
    return tokens


def _sample_sorted(
    logits: Tensor,  # (N, V)
    largest: Tensor,  # (N, 1) float32
    uniform: Tensor,  # (N,)
    total: Tensor,  # (N,) float64 sum of all weights
    scale: float,
    top_p: float,
) -> Tensor:  # (N,)
    """Nuclei of any size, by a stable sort of the whole row."""
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    weight = _weights(values, largest, scale).double()
    mass = weight.cumsum(1)
    keep = (mass - weight) < top_p * total[:, None]
    keep[:, 0] = True
    return _draw(torch.zeros_like(weight).scatter_(1, ids, weight.where(keep, 0.0)), uniform)


def _scale(temperature: float) -> float:
    """1 / temperature within float32: the largest logit gives 0 * scale = 0, a banned one -inf * scale = -inf."""
    return min(max(1 / temperature, torch.finfo(torch.float32).tiny), 1e38)


def _weights(logits: Tensor, largest: Tensor, scale: float) -> Tensor:
    return ((logits.float() - largest) * scale).exp()  # (N, ...) float32, 1 for the most probable token


def _draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """The first column whose cumulative weight exceeds uniform * the row's: (N, K), (N,) -> (N,)."""
    mass = weight.cumsum(1, dtype=torch.float64)
    column = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp(max=weight.shape[1] - 1)
    # A parallel scan's rounding can make mass rise where weight is 0; such a column must never come out.
    return column.where(weight.gather(1, column) > 0, weight.argmax(1, keepdim=True))[:, 0]


def _check(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (N, V) with V > 0, not {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, not {logits.dtype}")
    if uniform.shape != logits.shape[:1]:
        raise ValueError(f"uniform must be ({logits.shape[0]},), one number a row, not {tuple(uniform.shape)}")
    if uniform.dtype != torch.float64:
        raise ValueError(f"uniform must be float64, not {uniform.dtype}: float32 rounds numbers up to 1")
    if uniform.device != logits.device:
        raise ValueError(f"uniform is on {uniform.device}, logits on {logits.device}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, not {temperature}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be in [0, 1], not {top_p}")


def _refuse(logits: Tensor, uniform: Tensor, found: list[bool], bad: Tensor) -> None:
    if found[1]:
        raise _bad_uniform(uniform)
    if found[0]:
        raise _no_distribution(logits, int(bad.nonzero()[0]))


def _bad_uniform(uniform: Tensor) -> ValueError:
    row = int((~((uniform >= 0) & (uniform < 1))).nonzero()[0])
    return ValueError(f"uniform must be in [0, 1), but row {row} has {uniform[row].item()}")


def _no_distribution(logits: Tensor, row: int) -> ValueError:
    x = logits[row]
    what = "a NaN" if x.isnan().any() else "+inf" if (x == math.inf).any() else "nothing but -inf"
    return ValueError(f"row {row} of the logits has {what}: no distribution to sample from")
