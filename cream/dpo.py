"""Training: one pass of consistency-weighted DPO over a round's pairs, theta_t to theta_(t+1).

P pairs, S = 2 P sequences (chosen, rejected, chosen, ...), T tokens, N response tokens, D hidden size, V vocabulary.

The loss is agreement * L(chosen > rejected) + (1 - agreement) * L(rejected > chosen) with L = -log sigmoid of DPO's
margin against theta_t (arXiv 2410.12735, Algorithm 1), whose log-probs were written down when theta_t scored the
answers. So no reference model is in memory, and the first step's loss is ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cream.config import OptimConfig, TrainConfig
from cream.log import Metrics, UserError, say
from cream.model import head, hidden_states
from cream.optim import Schedule, descend
from cream.run import Work
from cream.score import sequence_rows
from cream_kernels import linear_weighted_dpo


def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of range(count), a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=seed, counter=epoch)).permutation(count)


def windows(count: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The examples of every optimizer step; the last window of an epoch holds what is left."""
    return [
        epoch_order(count, epoch, seed)[i : i + batch_size]
        for epoch in range(epochs)
        for i in range(0, count, batch_size)
    ]


def loss_of(
    model: nn.Module,
    pairs: Sequence[dict],  # P rows of pairs.jsonl
    beta: float,
) -> tuple[Tensor, Tensor, int]:  # loss (P,), logp (2P,) nats, tokens computed
    """The weighted DPO loss of each pair and the policy's log-prob of each of its answers."""
    weight = head(model)
    sequences = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    ids, rows, targets, cu_seqlens = sequence_rows(sequences, weight.device)
    hidden = hidden_states(model, ids).flatten(0, 1)[rows]  # (N, D)
    reference = [pair[side] for pair in pairs for side in ("logp_chosen", "logp_rejected")]
    loss, logp = linear_weighted_dpo(
        hidden,
        weight,
        targets,
        cu_seqlens,
        torch.tensor(reference, dtype=torch.float32, device=weight.device),
        torch.tensor([pair["agreement"] for pair in pairs], dtype=torch.float32, device=weight.device),
        beta=beta,
    )
    return loss, logp, sum(len(p) + len(r) for p, r in sequences)


def measures(pairs: Sequence[dict], logp: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's metrics, summed over the pairs; logp is (2P,), nats."""
    chosen, rejected = logp.detach().view(-1, 2).unbind(1)
    r_chosen = beta * (chosen - torch.tensor([p["logp_chosen"] for p in pairs], device=logp.device))
    r_rejected = beta * (rejected - torch.tensor([p["logp_rejected"] for p in pairs], device=logp.device))
    return {
        "rewards/chosen": r_chosen.sum(),
        "rewards/rejected": r_rejected.sum(),
        "rewards/accuracies": (r_chosen > r_rejected).float().sum(),
        "rewards/margins": (r_chosen - r_rejected).sum(),
        "logps/chosen": chosen.sum(),
        "logps/rejected": rejected.sum(),
    }


def train(
    model: nn.Module,
    pairs: Sequence[dict],
    config: TrainConfig,
    work: Work,
    metrics: Metrics,
    *,
    stage: str,
    seed: int,
    optim: OptimConfig | None = None,
) -> None:
    """Take the policy from theta_t to theta_(t+1), in place. Pairs beyond `max_length` tokens are left out."""
    fitting = [
        p
        for p in pairs
        if len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) <= config.max_length
    ]
    if len(fitting) < len(pairs):
        left_out = len(pairs) - len(fitting)
        say(f"{stage}: {left_out} of {len(pairs)} pairs are longer than train.max_length={config.max_length}: left out")
    if not fitting:
        raise UserError(f"{stage}: no pair fits train.max_length={config.max_length}")
    steps = windows(len(fitting), config.batch_size, config.epochs, seed)

    def micro_losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor], int]]:
        window = [fitting[i] for i in steps[step]]
        # Like lengths side by side, so that little of a micro-batch is padding; the sum over the window is the same.
        window.sort(
            key=lambda p: (len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])), p["prompt_id"])
        )
        for i in range(0, len(window), config.micro_batch_size):
            micro = window[i : i + config.micro_batch_size]
            loss, logp, tokens = loss_of(model, micro, config.beta)
            shares = {key: value / len(window) for key, value in measures(micro, logp, config.beta).items()}
            yield loss.sum() / len(window), shares, tokens

    schedule = Schedule(len(steps), config.lr, config.warmup, config.weight_decay, config.clip, config.checkpoint_every)
    facts = descend(
        model,
        micro_losses,
        schedule,
        stage=stage,
        keep=work.keep("steps"),
        metrics=metrics,
        optim=optim,
        micro_batches=lambda step: math.ceil(len(steps[step]) / config.micro_batch_size),
    )
    work.facts(pairs=len(fitting), too_long=len(pairs) - len(fitting), **facts)
