"""Packing: prompts and answers of any lengths side by side in one row, each prompt once, no padding.

P prompts, R responses a prompt, S sequences (a prompt with one response each), T packed tokens, C segments, N rows that
the head reads, D hidden size.

A prompt stands before its first response; its other responses follow, each reading the prompt's keys and values where
they are (`attention.Segments`), at the positions that they would have after the prompt alone. So attention is a
sequence's own, and everything outside attention computes each token once. The last token of a response predicts
nothing and is left out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cream.attention import Segments
from cream.model import hidden_states
from cream.upload import upload
from cream_kernels import IGNORE

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # one prompt and its R responses, token ids
Labelled = tuple[Sequence[int], Sequence[int]]  # token ids and labels, IGNORE where nothing is learnt


@dataclass(frozen=True)
class Packed:
    """One row of tokens and what is to be read from it; on the model's device but for cu_seqlens."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, each token's in its own sequence
    segments: Segments
    rows: Tensor  # (N,) int64 in [0, T): the tokens whose hidden states predict the targets
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S + 1,) int64, where each sequence's rows start, and N; on the CPU for those who loop over it
    prompts: int  # P

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def group_tokens(group: Group) -> int:
    """T of this prompt and its responses alone. Raises ValueError where one of them is empty: it has no log-prob."""
    prompt, responses = group
    if not prompt or not responses or not all(responses):
        raise ValueError("a prompt or a response without tokens has no log-probability")
    return len(prompt) + sum(len(response) - 1 for response in responses)


def labelled_tokens(conversation: Labelled) -> int:
    """T of this conversation alone: up to the token that predicts its last label."""
    learnt = [i for i, label in enumerate(conversation[1]) if i and label != IGNORE]
    if not learnt:
        raise ValueError("a conversation without labels teaches nothing")
    return learnt[-1]


def batches(sizes: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Indices of `sizes` in as few batches as serve, each at most `budget`, of even loads; the largest batch first.

    A size beyond the budget is a batch of its own. The other batches differ by at most the largest size in them, so
    that the last is not small: sizes go from the largest down, each to the batch with the least so far (Graham 1969),
    and again with a batch more where one exceeds the budget. Their number is divisible by `multiple`, as `multiple`
    ranks want it that take turns; the last ones may be empty.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    alone = [[i] for i in order if sizes[i] > budget]
    rest = order[len(alone) :]
    count = math.ceil(sum(sizes[i] for i in rest) / budget)
    count += -(len(alone) + count) % multiple
    while True:
        loads = [(0, b) for b in range(count)]
        made: list[list[int]] = [[] for _ in loads]
        for i in rest:
            load, b = loads[0]
            if load + sizes[i] > budget:
                break
            made[b].append(i)
            heapq.heapreplace(loads, (load + sizes[i], b))
        else:
            made.sort(key=lambda batch: (-sum(sizes[i] for i in batch), batch))
            return alone + [sorted(batch) for batch in made]
        count += multiple


class _Row:
    """A packed row while it grows."""

    def __init__(self):
        self.ids, self.positions, self.rows, self.targets, self.ends = [], [], [], [], [0]
        self.lengths, self.owner, self.shared = [], [], []

    def segment(self, ids: Sequence[int], owner: int, shared: int) -> None:
        """Append tokens that see the first `shared` ones of segment `owner`, then themselves."""
        self.lengths.append(len(ids))
        self.owner.append(owner)
        self.shared.append(shared)
        self.positions += range(shared, shared + len(ids))
        self.ids += ids

    def packed(self, prompts: int, device: torch.device) -> Packed:
        segments = Segments.of(self.lengths, self.owner, self.shared, device)
        ids, positions, rows, targets = upload(device, self.ids, self.positions, self.rows, self.targets)
        return Packed(ids, positions, segments, rows, targets, torch.tensor(self.ends), prompts)


def pack(groups: Sequence[Group], device: torch.device) -> Packed:
    """Prompts and responses in the order given; targets are the responses' tokens. Raises ValueError for empty ones."""
    row = _Row()
    for group in groups:
        tokens, begin, owner = group_tokens(group), len(row.ids), len(row.lengths)
        prompt, (first, *others) = group
        last = begin + len(prompt) - 1  # predicts the first token of every response
        row.segment([*prompt, *first[:-1]], owner, 0)
        row.rows += range(last, last + len(first))
        for response in others:
            row.rows += [last, *range(len(row.ids), len(row.ids) + len(response) - 1)]
            if len(response) > 1:
                row.segment(response[:-1], owner, len(prompt))
        assert len(row.ids) == begin + tokens
        for response in group[1]:
            row.targets += response
            row.ends.append(len(row.targets))
    return row.packed(len(groups), device)


def pack_labelled(conversations: Sequence[Labelled], device: torch.device) -> Packed:
    """Conversations in the order given; targets are the labels that count. Raises ValueError for one without any."""
    row = _Row()
    for conversation in conversations:
        (ids, labels), begin = conversation, len(row.ids)
        tokens = labelled_tokens(conversation)
        predicting = [i for i in range(tokens) if labels[i + 1] != IGNORE]
        row.rows += [begin + i for i in predicting]
        row.targets += [labels[i + 1] for i in predicting]
        row.ends.append(len(row.targets))
        row.segment(ids[:tokens], len(row.lengths), 0)
    return row.packed(len(conversations), device)


def read(model: nn.Module, packed: Packed) -> Tensor:  # (N, D)
    """The last hidden states at the rows that predict a target."""
    hidden = hidden_states(model, packed.ids[None], packed.positions[None], segments=packed.segments)[0]
    return hidden.index_select(0, packed.rows)
