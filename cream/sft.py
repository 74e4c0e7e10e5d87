"""Supervised fine-tuning: M0 to M1 on conversations, the loss on the assistant's tokens only.

`python -m cream.sft` takes the arguments of `python -m cream.train` and stops after this stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from cream import dist, shards
from cream.config import OptimConfig, SFTConfig
from cream.data import Conversation, encode_conversation
from cream.dpo import windows
from cream.log import Metrics, UserError, say
from cream.meter import training_flops
from cream.model import head
from cream.optim import Schedule, descend
from cream.packing import Labelled, Packed, batches, labelled_tokens, pack_labelled, read
from cream.work import Work
from cream_kernels import IGNORE, linear_logp


def loss_of(
    model: nn.Module,
    conversations: Sequence[Labelled],
) -> tuple[Tensor, Packed]:  # (), nats: the sum of -log p over label tokens; what was computed
    """Summed cross-entropy of the label tokens."""
    weight = head(model)
    packed = pack_labelled(conversations, weight.device)
    return -linear_logp(read(model, packed), weight, packed.targets).sum(), packed


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

    def micro_batches(step: int) -> list[list[Labelled]]:
        """This rank's; as many as any other rank has, of which the last may be empty."""
        window = [fitting[i] for i in steps[step]]
        made = batches([labelled_tokens(conversation) for conversation in window], config.batch_tokens, dist.size())
        return [[window[i] for i in batch] for batch in dist.share(made)]

    def micro_losses(step: int) -> Iterator[tuple[Tensor, dict[str, float], int]]:
        window = steps[step]
        labels = sum(label != IGNORE for i in window for label in fitting[i][1][1:])
        for micro in micro_batches(step):
            # A rank that has none computes with the others, and counts for nothing.
            loss, packed = shards.within(model, loss_of, micro or [fitting[window[0]]])
            shares = {
                "sequence_forwards_per_prompt": packed.sequences / len(window),
                "flops": training_flops(model, packed),
            }
            if not micro:
                yield loss * 0, dict.fromkeys(shares, 0.0), 0
            else:
                yield loss / labels, shares, packed.tokens

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
        seed=seed,
        micro_batches=lambda step: len(micro_batches(step)),
        after=after,
    )
    work.facts(conversations=len(fitting), too_long=len(encoded) - len(fitting), **facts)


if __name__ == "__main__":
    from cream.train import main

    main(until="sft")
