"""Other implementations behind our own signatures, each called as its authors would.

A Peer says which package it is in and whether it needs a GPU; `make()` imports it and gives the function. N tokens, D
hidden size, V vocabulary, P prompts or pairs, R responses a prompt.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.harness import version
from bench.options import chosen

BETA = 0.1


class Peer(NamedTuple):
    make: Callable[[], Callable]
    module: str  # what to import to see whether it is there
    package: str  # its distribution
    cuda_only: bool = False
    compiles: bool = False  # calls torch.compile, which needs a C++ compiler on a CPU
    lacks: Callable[[], str | None] = lambda: None  # what this version of the package has not


def why_not(peer: Peer, device: str) -> str | None:
    """Why the peer cannot run on that device, or None."""
    if peer.cuda_only and device != "cuda":
        return "needs a CUDA device"
    if peer.compiles and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    try:
        importlib.import_module(peer.module)
    except ImportError as error:
        if version(peer.package) is None:
            return f"{peer.package} is not installed: pip install .[bench{'-gpu' if peer.cuda_only else ''}]"
        return f"{peer.package} {version(peer.package)} does not import: {error}"
    return peer.lacks()


def split(
    table: Mapping[str, Peer], device: str, names: Sequence[str] | None
) -> tuple[dict[str, Callable], dict[str, str], dict[str, str]]:
    """What of the table can run, as functions; why the others cannot; which versions they are of.

    `names` None means all. A name that is not in the table is absent too: it has no such mode.
    """
    reasons = {name: why_not(table[name], device) for name in table if names is None or name in names}
    reasons |= {name: "has nothing for this mode" for name in names or [] if name not in table}
    absent = {name: reason for name, reason in reasons.items() if reason}
    there = [name for name in table if name in reasons and name not in absent]
    versions = {name: f"{table[name].package} {version(table[name].package)}" for name in there}
    return {name: table[name].make() for name in there}, absent, versions


def there(tables: Mapping[str, Mapping[str, Peer]], modes: Iterable[str], args: Namespace) -> list[str]:
    """Every name that was asked for and can run in one of the modes; SystemExit for one that no mode's table has."""
    known = list(dict.fromkeys(name for table in tables.values() for name in table))
    asked = chosen(None if args.peers is None else [*args.peers, "cream"], known, "peer")
    used = [tables[mode] for mode in dict.fromkeys(modes)]
    return [name for name in asked if any(name in t and why_not(t[name], args.device) is None for t in used)]


# Log-probs from hidden states: (hidden (N, D), weight (V, D), targets (N,)) -> (N,) float32, nats


def cream_linear_logp() -> Callable:
    from cream_kernels import linear_logp

    return linear_logp


def eager_linear_logp() -> Callable:
    def linear_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logp = torch.log_softmax(functional.linear(hidden, weight).float(), dim=-1)
        return logp.gather(1, targets[:, None])[:, 0]

    return linear_logp


def compiled(make: Callable[[], Callable]) -> Callable[[], Callable]:
    """torch.compile of what `make` gives, anew for each case, so that none gets code for shapes that vary."""

    def make_compiled() -> Callable:
        torch._dynamo.reset()
        return torch.compile(make(), dynamic=False)

    return make_compiled


def torch_linear_logp() -> Callable:
    options = torch.nn.LinearCrossEntropyOptions()

    def linear_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return linear_logp


def torch_lacks() -> str | None:
    if hasattr(functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy: 2.13 has"


def trl_linear_logp(outputs: tuple[str, ...] = ("log_probs",)) -> Callable:
    from trl.kernels import ChunkedLogProbFunction

    def linear_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)[0]

    return linear_logp


def trl_default_linear_logp() -> Callable:
    """With the metrics that DPOTrainer always asks for."""
    return trl_linear_logp(("log_probs", "entropy", "mean_logits", "is_top1"))


def liger_linear_logp() -> Callable:
    """The CuTe kernel on Hopper, which needs liger-kernel[cutedsl], chunks of 512 tokens in torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function

    return lambda hidden, weight, targets: -_first(function.apply(hidden, weight, targets))


def liger_flce_linear_logp() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, targets: -loss(weight, hidden, targets)


def cce_linear_logp(**options) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def linear_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        impl = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl, **options)

    return linear_logp


def cce_exact_linear_logp() -> Callable:
    return cce_linear_logp(filter_eps=None)


def _first(result):
    return result[0] if isinstance(result, tuple) else result


LINEAR_LOGP = {
    "cream": Peer(cream_linear_logp, "cream_kernels", "cream-trainer"),
    "eager": Peer(eager_linear_logp, "torch", "torch"),
    "compile": Peer(compiled(eager_linear_logp), "torch", "torch", compiles=True),
    "torch": Peer(torch_linear_logp, "torch", "torch", lacks=torch_lacks),
    "trl": Peer(trl_linear_logp, "trl.kernels", "trl"),
    "trl-default": Peer(trl_default_linear_logp, "trl.kernels", "trl", cuda_only=True),
    "liger": Peer(liger_linear_logp, "liger_kernel.ops", "liger-kernel"),
    "liger-flce": Peer(liger_flce_linear_logp, "liger_kernel.transformers", "liger-kernel", cuda_only=True),
    "cce": Peer(cce_linear_logp, "cut_cross_entropy", "cut-cross-entropy", compiles=True),
    "cce-exact": Peer(cce_exact_linear_logp, "cut_cross_entropy", "cut-cross-entropy", cuda_only=True),
}


# The sum of all log-probs, for those that give no other: (hidden, weight, targets) -> ()


def summed(make: Callable[[], Callable]) -> Callable[[], Callable]:
    def make_summed() -> Callable:
        linear_logp = make()
        return lambda hidden, weight, targets: linear_logp(hidden, weight, targets).sum()

    return make_summed


def torch_linear_sum() -> Callable:
    options = torch.nn.LinearCrossEntropyOptions()

    def linear_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)

    return linear_sum


def liger_flce_linear_sum() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: -loss(weight, hidden, targets)


def quack_linear_sum() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def linear_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -chunked_linear_cross_entropy(hidden, weight, targets, chunk_size=4096, reduction="sum")

    return linear_sum


LINEAR_SUM = {
    "cream": Peer(summed(cream_linear_logp), "cream_kernels", "cream-trainer"),
    "eager": Peer(summed(eager_linear_logp), "torch", "torch"),
    "torch": Peer(torch_linear_sum, "torch", "torch", lacks=torch_lacks),
    "liger-flce": Peer(liger_flce_linear_sum, "liger_kernel.transformers", "liger-kernel", cuda_only=True),
    "quack": Peer(quack_linear_sum, "quack.linear_cross_entropy", "quack-kernels", cuda_only=True),
}


# Log-probs from logits that exist: (logits (N, V), targets (N,)) -> (N,) float32, nats


def cream_gather_logp() -> Callable:
    from cream_kernels import gather_logp

    return gather_logp


def eager_gather_logp() -> Callable:
    return lambda logits, targets: torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def torch_gather_logp() -> Callable:
    return lambda logits, targets: -functional.cross_entropy(logits.float(), targets, reduction="none")


def trl_gather_logp() -> Callable:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def liger_gather_logp() -> Callable:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda logits, targets: -loss(logits, targets)


GATHER_LOGP = {
    "cream": Peer(cream_gather_logp, "cream_kernels", "cream-trainer"),
    "eager": Peer(eager_gather_logp, "torch", "torch"),
    "compile": Peer(compiled(eager_gather_logp), "torch", "torch", compiles=True),
    "torch": Peer(torch_gather_logp, "torch", "torch"),
    "trl": Peer(trl_gather_logp, "trl.trainer.utils", "trl"),
    "liger": Peer(liger_gather_logp, "liger_kernel.transformers", "liger-kernel", cuda_only=True),
}


# The whole loss: (hidden, weight, targets, reference_logp (2P,), agreement (P,)) -> (P,); sequences of equal length,
# chosen, rejected, chosen, ...


def cream_loss() -> Callable:
    from cream_kernels import linear_weighted_dpo

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, reference_logp: Tensor, agreement: Tensor) -> Tensor:
        num_sequences = len(reference_logp)
        cu_seqlens = torch.arange(num_sequences + 1) * (len(targets) // num_sequences)
        return linear_weighted_dpo(hidden, weight, targets, cu_seqlens, reference_logp, agreement, beta=BETA)[0]

    return loss


def composed(make: Callable[[], Callable]) -> Callable[[], Callable]:
    """The loss in torch on top of log-probs that `make` gives."""

    def make_composed() -> Callable:
        linear_logp = make()

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, reference_logp: Tensor, agreement: Tensor) -> Tensor:
            logp = linear_logp(hidden, weight, targets).view(len(reference_logp), -1).sum(1)
            chosen, rejected = (logp - reference_logp).view(-1, 2).unbind(1)
            margin = BETA * (chosen - rejected)
            return -agreement * functional.logsigmoid(margin) - (1 - agreement) * functional.logsigmoid(-margin)

        return loss

    return make_composed


def liger_loss() -> Callable:
    """Liger's DPO: the mean over pairs, agreement 1 and a reference of 0; stacked chosen, then rejected."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(beta=BETA, compiled=torch.cuda.is_available(), use_ref_model=False)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, reference_logp: Tensor, agreement: Tensor) -> Tensor:
        num_pairs = len(agreement)
        by_side = hidden.view(num_pairs, 2, -1, hidden.shape[1]).transpose(0, 1).flatten(0, 1)
        mean = dpo(weight, by_side, targets.view(num_pairs, 2, -1).transpose(0, 1).flatten(0, 1))[0]
        return (mean * num_pairs)[None]

    return loss


WEIGHTED_DPO = {
    name: peer._replace(make=cream_loss if name == "cream" else composed(peer.make))
    for name, peer in LINEAR_LOGP.items()
} | {"compile": Peer(compiled(composed(eager_linear_logp)), "torch", "torch", compiles=True)}
PLAIN_DPO = {name: WEIGHTED_DPO[name] for name in ("cream", "eager")} | {
    "liger-dpo": Peer(liger_loss, "liger_kernel.chunked_loss", "liger-kernel")
}


# The same with the reference's log-probs made in the call, from its hidden states and head, at agreement 1; half of
# each sequence is prompt: (hidden (N, D), weight, targets (N,), ref_hidden, ref_weight, num_pairs) -> (P,) or (1,) sum


def with_reference(make_loss: Callable[[], Callable], make_logp: Callable[[], Callable]) -> Callable[[], Callable]:
    def make() -> Callable:
        loss, linear_logp = make_loss(), make_logp()

        def loss_with_reference(hidden, weight, targets, ref_hidden, ref_weight, num_pairs):
            with torch.no_grad():
                reference_logp = linear_logp(ref_hidden, ref_weight, targets).view(2 * num_pairs, -1).sum(1)
            return loss(hidden, weight, targets, reference_logp, torch.ones_like(reference_logp[::2]))

        return loss_with_reference

    return make


def liger_loss_with_reference() -> Callable:
    """As padded batches come: prompts are rows too, whose targets are ignored."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(beta=BETA, compiled=torch.cuda.is_available())

    def padded(rows: Tensor, num_pairs: int, prompt: float) -> Tensor:
        by_side = rows.view(num_pairs, 2, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
        return torch.cat([torch.full_like(by_side, prompt), by_side], dim=1)

    def loss(hidden, weight, targets, ref_hidden, ref_weight, num_pairs):
        rows, ref_rows = padded(hidden, num_pairs, 0), padded(ref_hidden, num_pairs, 0)
        labels = padded(targets, num_pairs, -100)
        return (dpo(weight, rows, labels, None, ref_rows, ref_weight)[0] * num_pairs)[None]

    return loss


DPO_WITH_REFERENCE = {
    "cream": Peer(with_reference(cream_loss, cream_linear_logp), "cream_kernels", "cream-trainer"),
    "eager": Peer(with_reference(composed(eager_linear_logp), eager_linear_logp), "torch", "torch"),
    "liger-dpo": Peer(liger_loss_with_reference, "liger_kernel.chunked_loss", "liger-kernel"),
}


# Kendall's tau-b of rows: (x (P, R), y (P, R)) -> (P,) float64


def cream_kendall() -> Callable:
    """As it is once numba is loaded, which the first large call does; SciPy and the others have been imported too."""
    from cream_kernels import kendall_tau

    kendall_tau(np.zeros((20000, 128)), np.zeros((20000, 128)))
    return kendall_tau


def scipy_loop() -> Callable:
    from scipy.stats import kendalltau

    return lambda x, y: np.array([kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)])


def scipy_axis() -> Callable:
    from scipy.stats import kendalltau

    return lambda x, y: kendalltau(x, y, axis=1).statistic


def scipy_lacks() -> str | None:
    from scipy.stats import kendalltau

    if "axis" in inspect.signature(kendalltau).parameters:
        return None
    return f"SciPy {version('scipy')} has no vectorised kendalltau"


def torchmetrics_kendall() -> Callable:
    from torchmetrics.functional import kendall_rank_corrcoef

    return lambda x, y: kendall_rank_corrcoef(torch.from_numpy(x.T), torch.from_numpy(y.T)).numpy()


def hyper_corr_loop() -> Callable:
    from hyper_corr import kendalltau

    return lambda x, y: np.array([kendalltau(a, b, pvals=False)[0] for a, b in zip(x, y, strict=True)])


KENDALL = {
    "cream": Peer(cream_kendall, "cream_kernels", "cream-trainer"),
    "scipy loop": Peer(scipy_loop, "scipy.stats", "scipy"),
    "scipy axis": Peer(scipy_axis, "scipy.stats", "scipy", lacks=scipy_lacks),
    "torchmetrics": Peer(torchmetrics_kendall, "torchmetrics.functional", "torchmetrics"),
    "hyper-corr loop": Peer(hyper_corr_loop, "hyper_corr", "hyper-corr"),
}
