"""RMSNorm, SwiGLU and the rotary embedding as a kernel each, by torch.compile; products and attention stay as they are.

D width of a norm, F of a SwiGLU.

As transformers writes them they are six, two and some ten passes over the activations, which on a GPU is what they
cost, and autograd keeps what lies between the passes. Compiled they are one, a norm keeps its input where it kept that
in float32 and normalised too, and SwiGLU keeps gate and up but not silu(gate). Intermediates are float32 in registers,
so less is rounded, and the bits differ from transformers'.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

from cream.log import UserError

BACKEND = "inductor"


def check(name: str) -> None:
    """Raise UserError where torch.compile was asked for by name and there is no C++ compiler, which it needs."""
    compiler = os.environ.get("CXX", "g++")
    if name == "compile" and shutil.which(compiler) is None:
        raise UserError(
            f"model.fuse: compile needs a C++ compiler, and there is no {compiler}: install it, or set none"
        )


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
) -> Tensor:  # (..., D)
    """weight * x / sqrt(mean(x^2) + eps), as Llama has it: normalised in float32, then rounded (arXiv 1910.07467)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # (..., F) each
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


def fuse(model: nn.Module) -> int:
    """Have the model's norms, SwiGLUs and rotations computed by compiled functions; returns how many modules changed.

    A module is changed only where the function above, not compiled, gives what its own forward does. What the modules
    of one class share, the rotation, is changed for the process.
    """
    changed, same = 0, {}
    for module in model.modules():
        plain = _norm if _looks_like_norm(module) else _mlp if _looks_like_swiglu(module) else None
        if plain is None:
            continue
        if type(module) not in same:
            same[type(module)] = _agrees(module, functools.partial(plain, module, lambda function: function))
        if same[type(module)]:
            module.forward = functools.partial(plain, module, lambda function: compiled(function))
            changed += 1
    for home in {sys.modules[type(module).__module__] for module in model.modules() if hasattr(module, "q_proj")}:
        rotate = getattr(home, "apply_rotary_pos_emb", None)
        if rotate is not None and getattr(rotate, "func", None) is not _rotate:
            home.apply_rotary_pos_emb = functools.partial(_rotate, rotate)
    return changed


def _norm(module: nn.Module, through: Callable[[Callable], Callable], x: Tensor) -> Tensor:
    return through(rms_norm)(_rows(x), module.weight, module.variance_epsilon).view_as(x)


def _mlp(module: nn.Module, through: Callable[[Callable], Callable], x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(through(swiglu)(_rows(gate), _rows(up)).view_as(gate))


def _rows(x: Tensor) -> Tensor:  # (..., D) -> (T, D), to be compiled once for any T above 1
    rows = x.flatten(0, -2)
    maybe_mark_dynamic(rows, 0)
    return rows


def _looks_like_norm(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return names == {"weight"} and module.weight.ndim == 1 and isinstance(getattr(module, "variance_epsilon", 0), float)


def _looks_like_swiglu(module: nn.Module) -> bool:
    if not {name for name, _ in module.named_children()} >= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    x = torch.linspace(-8, 8, 99)
    return torch.equal(module.act_fn(x), F.silu(x))


@torch.no_grad()
def _agrees(module: nn.Module, function: Callable[[Tensor], Tensor]) -> bool:
    first = next(module.parameters())
    width = first.shape[-1]  # of a norm, or of what gate_proj takes
    x = torch.linspace(-3, 3, 2 * width, dtype=first.dtype, device=first.device).sin().view(1, 2, width)
    own = module(x)
    return bool((function(x) - own).norm() <= 4 * torch.finfo(own.dtype).eps * own.norm())


def _rotate(
    function: Callable,
    q: Tensor,  # (S, H, T, E)
    k: Tensor,  # (S, K, T, E)
    *tables: Tensor,  # cos and sin, (S, T, E)
    **options,
) -> tuple[Tensor, Tensor]:
    for x, sequences, tokens in ((q, 0, 2), (k, 0, 2), *((table, 0, 1) for table in tables)):
        maybe_mark_dynamic(x, sequences)
        maybe_mark_dynamic(x, tokens)
    return compiled(function)(q, k, *tables, **options)


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, backend=BACKEND)
