"""Attention backends: one table, fastest first, the choice made once and said aloud.

S sequences, T packed tokens, C segments, U tokens whose keys and values they read, H query heads, K kv heads, E head
size.

Scoring and training pack sequences side by side without padding, and a prompt's answers share its keys and values:
`Segments` says which token sees which, and one varlen call serves a whole batch (q = [prompt + answer 1 | answer 2 |
...], k, v = [prompt + answer 1 | prompt + answer 2 | ...], causal from the bottom right). The chosen function is
registered with transformers' AttentionInterface under the backend's name; transformers builds no mask for names it has
no mask function for, and hands unknown forward keyword arguments on to us, which is how `segments` and the sampler's
cache (`kv`) get here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cream.log import UserError, say
from cream.upload import upload


@dataclass(frozen=True)
class Segments:
    """Which of T packed tokens sees which.

    The tokens stand in C segments side by side. Each token sees the first `shared` tokens of the segment `owner`, which
    stands before its own, and then those of its own up to itself. A segment that shares nothing has 0 and itself there.
    """

    lengths: tuple[int, ...]  # (C,) tokens of each segment, at least 1, T in all
    owner: tuple[int, ...]  # (C,)
    shared: tuple[int, ...]  # (C,) tokens
    cu_seqlens_q: Tensor  # (C + 1,) int32
    cu_seqlens_k: Tensor  # (C + 1,) int32
    kv_index: Tensor | None  # (U,) int64 in [0, T), the tokens that each segment reads; None where those are its own

    @classmethod
    def of(cls, lengths: Sequence[int], owner: Sequence[int], shared: Sequence[int], device: torch.device) -> Segments:
        starts, ends_k, index = [0], [0], []
        for c, n in enumerate(lengths):
            if n < 1 or not (owner[c] < c and 0 < shared[c] <= lengths[owner[c]] or (owner[c], shared[c]) == (c, 0)):
                raise ValueError(f"segment {c} of {n} tokens cannot share {shared[c]} tokens of segment {owner[c]}")
            index += range(starts[owner[c]], starts[owner[c]] + shared[c])
            index += range(starts[c], starts[c] + n)
            starts.append(starts[c] + n)
            ends_k.append(len(index))
        q, k, kv = upload(device, starts, ends_k, index)
        return cls(tuple(lengths), tuple(owner), tuple(shared), q.int(), k.int(), kv if any(shared) else None)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.lengths)

    @property
    def max_seqlen_k(self) -> int:
        return max(n + shared for n, shared in zip(self.lengths, self.shared, strict=True))

    @property
    def seen(self) -> int:
        """Pairs of a token and a token that it sees: what attention costs."""
        return sum(n * shared + n * (n + 1) // 2 for n, shared in zip(self.lengths, self.shared, strict=True))

    def gather(self, x: Tensor) -> Tensor:  # keys or values (T, K, E) -> (U, K, E)
        # Backward adds the copies of a prompt's gradients up with atomics on a GPU; the sum of two, as in training, is
        # the same in either order.
        return x if self.kv_index is None else x.index_select(0, self.kv_index)

    @functools.cached_property
    def masks(self) -> list[Tensor | None]:  # (length, shared + length) bool of each segment that shares
        """What SDPA needs said; made once, used by every layer."""
        device = self.cu_seqlens_q.device
        return [
            torch.ones(n, shared + n, dtype=torch.bool, device=device).tril(shared) if shared else None
            for n, shared in zip(self.lengths, self.shared, strict=True)
        ]

    @functools.cached_property
    def bias(self):
        """The same for xFormers."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

        k = [n + shared for n, shared in zip(self.lengths, self.shared, strict=True)]
        return BlockDiagonalCausalFromBottomRightMask.from_seqlens(self.lengths, k).to(self.cu_seqlens_q.device)


@functools.lru_cache(maxsize=8)
def side_by_side(sequences: int, tokens: int, device: torch.device) -> Segments:
    """A rectangular batch, (S, T) tokens, as segments."""
    return Segments.of([tokens] * sequences, range(sequences), [0] * sequences, device)


@dataclass(frozen=True)
class Backend:
    name: str
    why_not: Callable[[], str | None]  # None where it can run here, else the reason
    # q (T, H, E), k and v (T, K, E), not gathered, segments, scale -> (T, H, E)
    run: Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]

    @property
    def transformers_name(self) -> str:
        """Without "flash" in it: a name with that transformers looks for as a package or a kernel on the hub."""
        return f"cream_{self.name.replace('flash-attn-', 'fa').replace('-', '_')}"


def _needs_cuda(module: str, function: str, *, least: int, most: int = 99) -> Callable[[], str | None]:
    """Why `from module import function` cannot serve, or None; `least` and `most` are CUDA's major capabilities.

    It is tried, not looked up: a folder left by another package fools find_spec, and even a bare import.
    """

    def why_not() -> str | None:
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if not least <= major <= most:
            return f"is not for compute capability {major}.{minor}"
        try:
            found = hasattr(importlib.import_module(module), function)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"{module} cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        return None if found else f"{module} cannot be imported (no {function} in it)"

    return why_not


def _flash(function: Callable, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """The three generations agree on these names, not on their order or on what else comes back."""
    out = function(
        q=q,
        k=segments.gather(k),
        v=segments.gather(v),
        cu_seqlens_q=segments.cu_seqlens_q,
        cu_seqlens_k=segments.cu_seqlens_k,
        max_seqlen_q=segments.max_seqlen_q,
        max_seqlen_k=segments.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from flash_attn.cute.interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, segments, scale)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, segments, scale)


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, segments, scale)


def _as_many_heads(q: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
    """Keys and values once for each query head, for functions that do not share kv heads."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in keys_and_values]


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # It wants as many kv heads as query heads outside its 5-D layout.
    k, v = _as_many_heads(q, segments.gather(k), segments.gather(v))
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=segments.bias, scale=scale)[0]


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v, more = segments.gather(k), segments.gather(v), {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.12; 2.11 has no word for it
            more = {"enable_gqa": True}
        else:
            k, v = _as_many_heads(q, k, v)
    return varlen_attn(
        q,
        k,
        v,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        scale=scale,
        window_size=(-1, 0),  # its word for causal
        **more,
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """A call a segment. On a CPU that costs 5% more than the products in it; one masked call a prompt took 1.6 times as
    long, since it computes what the mask throws away. split and cat, not slices, whose gradients are of full size each.
    """
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    q, k, v = (x.transpose(0, 1)[None].split(segments.lengths, 2) for x in (q, k, v))
    out = []
    for c, (owner, shared) in enumerate(zip(segments.owner, segments.shared, strict=True)):
        if shared:
            keys, values = (torch.cat([x[owner][:, :, :shared], x[c]], 2) for x in (k, v))
            out.append(F.scaled_dot_product_attention(q[c], keys, values, attn_mask=segments.masks[c], **options))
        else:
            out.append(F.scaled_dot_product_attention(q[c], k[c], v[c], is_causal=True, **options))
    return torch.cat(out, 2)[0].transpose(0, 1)


BACKENDS = (
    Backend("flash-attn-4", _needs_cuda("flash_attn.cute.interface", "flash_attn_varlen_func", least=9), _flash_attn_4),
    Backend(
        "flash-attn-3", _needs_cuda("flash_attn_interface", "flash_attn_varlen_func", least=9, most=9), _flash_attn_3
    ),
    Backend("flash-attn-2", _needs_cuda("flash_attn", "flash_attn_varlen_func", least=8), _flash_attn_2),
    Backend("xformers", _needs_cuda("xformers.ops", "memory_efficient_attention", least=8), _xformers),
    Backend("torch-varlen", _needs_cuda("torch.nn.attention.varlen", "varlen_attn", least=8), _varlen),
    Backend("sdpa", lambda: None, _sdpa),
)


def choose(name: str = "auto", dtype: torch.dtype | None = None) -> Backend:
    """The backend of that name, or for "auto" the first that can run; the others' reasons go to the log.

    All but SDPA take float16 and bfloat16 only, so a float32 model gets SDPA.
    Raises UserError where the name is unknown or the named backend cannot run here, with the reason.
    """
    reasons = {b.name: b.why_not() for b in BACKENDS}
    if dtype == torch.float32:
        reasons |= {name: reason or "takes no float32" for name, reason in reasons.items() if name != "sdpa"}
    if name == "auto":
        backend = next(b for b in BACKENDS if reasons[b.name] is None)
        passed = ", ".join(f"{n}: {r}" for n, r in reasons.items() if r is not None)
        _say_once(f"attention: {backend.name}" + (f" (passed over {passed})" if passed else ""))
        return backend
    if name not in reasons:
        raise UserError(f"model.attention: no backend called {name!r}; there are auto, {', '.join(reasons)}")
    if reasons[name] is not None:
        raise UserError(f"model.attention: {name} cannot run here: {reasons[name]}; use --model.attention auto")
    return next(b for b in BACKENDS if b.name == name)


_say_once = functools.cache(say)  # a run loads several models and chooses each time


def register(backend: Backend) -> str:
    """Make the backend known to transformers; returns the name to give as attn_implementation."""
    from transformers import AttentionInterface

    def attend(
        module,
        query: Tensor,  # (S, H, T, E)
        key: Tensor,  # (S, K, T, E)
        value: Tensor,
        attention_mask,
        scaling: float | None = None,
        segments: Segments | None = None,
        kv=None,  # cream.cache.KeyValues: one new token a row, over what it holds
        kept: dict | None = None,  # layer -> keys (T, K, E), values (T, K, E) of the packed tokens, filled in here
        **kwargs,
    ) -> tuple[Tensor, None]:  # (S, T, H, E)
        for option in ("sliding_window", "softcap", "s_aux"):
            if kwargs.get(option) is not None:
                raise UserError(
                    f"{type(module).__name__} wants {option}, which cream's attention does not do; "
                    "it is for LLaMA-class models with plain causal attention"
                )
        if attention_mask is not None:
            raise ValueError("cream's attention takes no mask: give packed or right-padded batches")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if kv is not None:
            return kv.attend(module.layer_idx, query, key, value, scaling), None
        S, _, T, _ = query.shape
        segments = segments or side_by_side(S, T, query.device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        if kept is not None:
            kept[module.layer_idx] = k, v
        return backend.run(q, k, v, segments, scaling).unflatten(0, (S, T)), None

    AttentionInterface.register(backend.transformers_name, attend)
    return backend.transformers_name
