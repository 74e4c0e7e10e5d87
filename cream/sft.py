"""Supervised fine-tuning: M0 to M1 on conversations, the loss on the assistant's tokens only.

S sequences, T tokens, N label tokens, D hidden size, V vocabulary.

`python -m cream.sft` takes the arguments of `python -m cream.train` and stops after this stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cream.config import OptimConfig, SFTConfig
from cream.data import Conversation, encode_conversation
from cream.dpo import windows
from cream.log import Metrics, UserError, say
from cream.model import head, hidden_states
from cream.optim import Schedule, descend
from cream.run import Work
from cream_kernels import IGNORE, linear_logp


def loss_of(
    model: nn.Module,
    sequences: Sequence[tuple[list[int], list[int]]],  # S of (ids, labels), labels IGNORE where nothing is learnt
) -> Tensor:  # (), nats: the sum of -log p over label tokens
    """Summed cross-entropy of the label tokens; padding is no label, so no end-of-text is learnt from it."""
    weight = head(model)
    longest = max(len(ids) for ids, _ in sequences)
    batch = torch.zeros(len(sequences), longest, dtype=torch.int64)
    targets = torch.full((len(sequences), longest), IGNORE, dtype=torch.int64)
    for s, (ids, labels) in enumerate(sequences):
        batch[s, : len(ids)] = torch.tensor(ids)
        targets[s, : len(ids) - 1] = torch.tensor(labels[1:])
    targets = targets.flatten().to(weight.device)
    hidden = hidden_states(model, batch.to(weight.device)).flatten(0, 1)
    learnt = (targets != IGNORE).nonzero().flatten()
    return -linear_logp(hidden[learnt], weight, targets[learnt]).sum()


def train(
    model: nn.Module,
    tokenizer,
    conversations: Sequence[Conversation],
    config: SFTConfig,
    work: Work,
    metrics: Metrics,
    *,
    seed: int,
    optim: OptimConfig | None = None,
    halfway: Callable[[], None] | None = None,  # called when half of the steps are done
) -> None:
    """Fine-tune in place. Conversations longer than `max_length` tokens are left out and counted."""
    encoded = [encode_conversation(tokenizer, c.messages) for c in conversations]
    fitting = [(ids, labels) for ids, labels in encoded if len(ids) <= config.max_length]
    if len(fitting) < len(encoded):
        left_out = len(encoded) - len(fitting)
        say(f"sft: {left_out} of {len(encoded)} conversations exceed sft.max_length={config.max_length}: left out")
    if not fitting:
        raise UserError("data.sft: no conversation fits sft.max_length")
    steps = windows(len(fitting), config.batch_size, config.epochs, seed)
    middle = math.ceil(len(steps) / 2)

    def micro_losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor], int]]:
        window = sorted((fitting[i] for i in steps[step]), key=lambda s: len(s[0]))
        labels = sum(label != IGNORE for _, row in window for label in row[1:])
        for i in range(0, len(window), config.micro_batch_size):
            micro = window[i : i + config.micro_batch_size]
            yield loss_of(model, micro) / labels, {}, sum(len(ids) for ids, _ in micro)

    def after(step: int) -> None:
        if halfway is not None and step == middle:
            halfway()

    schedule = Schedule(len(steps), config.lr, config.warmup, config.weight_decay, config.clip, config.checkpoint_every)
    facts = descend(
        model,
        micro_losses,
        schedule,
        stage="sft",
        keep=work.keep("steps"),
        metrics=metrics,
        optim=optim,
        micro_batches=lambda step: math.ceil(len(steps[step]) / config.micro_batch_size),
        after=after,
    )
    work.facts(conversations=len(fitting), too_long=len(encoded) - len(fitting), **facts)


if __name__ == "__main__":
    from cream.train import main

    main(until="sft")
