"""Training: one pass of consistency-weighted DPO over a round's pairs, theta_t to theta_(t+1).

P pairs, S = 2 P sequences (chosen, rejected, chosen, ...).

The loss is agreement * L(chosen > rejected) + (1 - agreement) * L(rejected > chosen) with L = -log sigmoid of DPO's
margin against theta_t (arXiv 2410.12735, Algorithm 1), whose log-probs were written down when theta_t scored the
answers. So no reference model is in memory, and the first step's loss is ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from cream import dist, shards
from cream.config import OptimConfig, TrainConfig
from cream.log import Metrics, UserError, say
from cream.meter import training_flops
from cream.model import head
from cream.optim import Schedule, descend
from cream.packing import Group, Packed, batches, group_tokens, pack, read
from cream.upload import numbers
from cream.work import Work
from cream_kernels import linear_weighted_dpo


def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of range(count), a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=seed, counter=epoch)).permutation(count)


def windows(count: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The examples of every optimizer step: as few steps as `batch_size` allows, and of even sizes, so that none is of
    a few examples left over (33 in batches of 32 are 17 and 16, not 32 and 1)."""
    steps = math.ceil(count / batch_size)
    return [window for epoch in range(epochs) for window in np.array_split(epoch_order(count, epoch, seed), steps)]


def loss_of(
    model: nn.Module,
    pairs: Sequence[dict],  # P rows of pairs.jsonl
    beta: float,
) -> tuple[Tensor, Tensor, Packed]:  # loss (P,), logp (2P,) nats, what was computed
    """The weighted DPO loss of each pair and the policy's log-prob of its answers; each prompt is computed once."""
    weight = head(model)
    packed = pack([group_of(pair) for pair in pairs], weight.device)
    reference = [pair[side] for pair in pairs for side in ("logp_chosen", "logp_rejected")]
    loss, logp = linear_weighted_dpo(
        read(model, packed),
        weight,
        packed.targets,
        packed.cu_seqlens,
        numbers(reference, weight.device),
        numbers([pair["agreement"] for pair in pairs], weight.device),
        beta=beta,
    )
    return loss, logp, packed


def group_of(pair: dict) -> Group:
    return pair["prompt_ids"], (pair["chosen_ids"], pair["rejected_ids"])


def measures(pairs: Sequence[dict], logp: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's metrics, summed over the pairs; logp is (2P,), nats."""
    chosen, rejected = logp.detach().view(-1, 2).unbind(1)
    r_chosen = beta * (chosen - numbers([p["logp_chosen"] for p in pairs], logp.device))
    r_rejected = beta * (rejected - numbers([p["logp_rejected"] for p in pairs], logp.device))
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

    def micro_batches(step: int) -> list[list[dict]]:
        """This rank's; as many as any other rank has, of which the last may be empty."""
        window = [fitting[i] for i in steps[step]]
        made = batches([group_tokens(group_of(pair)) for pair in window], config.batch_tokens, dist.size())
        return [[window[i] for i in batch] for batch in dist.share(made)]

    def micro_losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor | float], int]]:
        window = steps[step]
        for micro in micro_batches(step):
            # A rank that has none computes with the others, and counts for nothing.
            pairs = micro or [fitting[window[0]]]
            loss, logp, packed = shards.within(model, loss_of, pairs, config.beta)
            shares = {key: value / len(window) for key, value in measures(pairs, logp, config.beta).items()}
            # The policy's own; the reference's are theta_t's scores, which are there.
            shares["sequence_forwards_per_prompt"] = packed.sequences / len(window)
            shares["flops"] = training_flops(model, packed)
            if not micro:
                yield loss.sum() * 0, {key: value * 0 for key, value in shares.items()}, 0
            else:
                yield loss.sum() / len(window), shares, packed.tokens

    schedule = Schedule(len(steps), config.lr, config.warmup, config.weight_decay, config.clip, config.checkpoint_every)
    facts = descend(
        model,
        micro_losses,
        schedule,
        stage=stage,
        keep=work.keep("steps"),
        metrics=metrics,
        optim=optim,
        seed=seed,
        micro_batches=lambda step: len(micro_batches(step)),
    )
    work.facts(pairs=len(fitting), too_long=len(pairs) - len(fitting), **facts)
