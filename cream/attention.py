"""Attention backends: one table, fastest first, the choice made once and said aloud.

S sequences, T tokens of a sequence, U columns of a key-value cache, H query heads, K kv heads, E head size.

Every batch of this project is right-padded or free of padding, so causal attention alone keeps real tokens from seeing
padding and no mask is ever built. The chosen function is registered with transformers' AttentionInterface under the
backend's name; transformers builds no mask for names it has no mask function for, and hands unknown forward keyword
arguments on to us, which is how the sampler's cache (`kv`) gets here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cream.log import UserError, say


@dataclass(frozen=True)
class Backend:
    name: str
    why_not: Callable[[], str | None]  # None where it can run here, else the reason
    run: Callable[
        [Tensor, Tensor, Tensor, float], Tensor
    ]  # q (S, H, T, E), k and v (S, K, T, E), scale -> (S, T, H, E)

    @property
    def transformers_name(self) -> str:
        return f"cream_{self.name.replace('-', '_')}"


def _needs_cuda(module: str, function: str) -> Callable[[], str | None]:
    """Why `from module import function` cannot serve, or None.

    It is tried, not looked up: a folder left by another package fools find_spec, and even a bare import.
    """

    def why_not() -> str | None:
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        try:
            found = hasattr(importlib.import_module(module), function)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"{module} cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        return None if found else f"{module} cannot be imported (no {function} in it)"

    return why_not


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=True)


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    groups = q.shape[1] // k.shape[1]  # xFormers wants as many kv heads as query heads outside its 5-D layout
    k, v = (x.repeat_interleave(groups, 1).transpose(1, 2) for x in (k, v))
    return memory_efficient_attention(q.transpose(1, 2), k, v, attn_bias=LowerTriangularMask(), scale=scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


BACKENDS = (
    Backend("flash-attn-4", _needs_cuda("flash_attn.cute.interface", "flash_attn_func"), _flash_attn_4),
    Backend("flash-attn-3", _needs_cuda("flash_attn_interface", "flash_attn_func"), _flash_attn_3),
    Backend("flash-attn-2", _needs_cuda("flash_attn", "flash_attn_func"), _flash_attn_2),
    Backend("xformers", _needs_cuda("xformers.ops", "memory_efficient_attention"), _xformers),
    Backend("sdpa", lambda: None, _sdpa),
)


def choose(name: str = "auto", dtype: torch.dtype | None = None) -> Backend:
    """The backend of that name, or for "auto" the first that can run; the others' reasons go to the log.

    The flash-attn and xFormers kernels take float16 and bfloat16 only, so a float32 model gets SDPA.
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

    def attend(module, query, key, value, attention_mask, scaling=None, kv: KeyValues | None = None, **kwargs):
        for option in ("sliding_window", "softcap", "s_aux"):
            if kwargs.get(option) is not None:
                raise UserError(
                    f"{type(module).__name__} wants {option}, which cream's attention does not do; "
                    "it is for LLaMA-class models with plain causal attention"
                )
        if attention_mask is not None:
            raise ValueError("cream's attention takes no mask: give right-padded batches")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if kv is not None:
            return kv.attend(module.layer_idx, query, key, value, scaling), None
        return backend.run(query, key, value, scaling), None

    AttentionInterface.register(backend.transformers_name, attend)
    return backend.transformers_name


@dataclass
class KeyValues:
    """A preallocated key-value cache of S left-padded sequences, written in place, one column a token.

    Query heads that share a kv head become rows of one product, so keys and values are never repeated or copied.
    """

    first: Tensor  # (S,) int64: the first column that holds a token of sequence s
    capacity: int  # columns
    length: int = 0  # columns in use
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> (S, K, capacity, E)
    values: dict[int, Tensor] = field(default_factory=dict)
    _mask: Tensor | None = None  # of the forward in hand; every layer uses the same

    def begin(self, columns: int) -> None:
        """Reserve the next `columns` columns for the forward that follows."""
        self.length += columns
        if self.length > self.capacity:
            raise ValueError(f"cache of {self.capacity} columns cannot hold {self.length}")
        column = torch.arange(self.length, device=self.first.device)
        visible = (column >= self.first[:, None])[:, None, None]  # (S, 1, 1, U)
        if columns > 1:
            query = torch.arange(self.length - columns, self.length, device=self.first.device)
            # A padding query sees itself: a row without any key would be NaN, and NaN * 0 would spread.
            visible = (visible & (column <= query[:, None])) | (column == query[:, None])
        self._mask = None if columns == 1 and not bool(self.first.any()) else visible

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        S, H, T, E = query.shape
        K = key.shape[1]
        if layer not in self.keys:
            self.keys[layer] = key.new_zeros(S, K, self.capacity, E)
            self.values[layer] = value.new_zeros(S, K, self.capacity, E)
        self.keys[layer][:, :, self.length - T : self.length] = key
        self.values[layer][:, :, self.length - T : self.length] = value
        key, value = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        if self._mask is not None and self._mask.shape[2] == T:
            self._mask = self._mask.repeat(1, 1, H // K, 1)
        out = F.scaled_dot_product_attention(
            query.reshape(S, K, H // K * T, E), key, value, attn_mask=self._mask, scale=scale
        )
        return out.view(S, H, T, E).transpose(1, 2)

    def select(self, rows: Tensor, columns: int) -> KeyValues:
        """The cache of those rows (repeats allowed) with room for `columns` columns; this one is emptied on the way.

        Layer by layer, so that what is held at the peak is one cache and a layer, not two caches.
        """
        picked = KeyValues(self.first[rows], columns, self.length)
        for mine, theirs in ((self.keys, picked.keys), (self.values, picked.values)):
            for layer in sorted(mine):
                x = mine.pop(layer)
                new = x.new_zeros(len(rows), x.shape[1], columns, x.shape[3])
                new[:, :, : self.length] = x[rows, :, : self.length]
                theirs[layer] = new
        return picked
