"""Scoring: the log-probability of every answer under policy, previous and reference, and the implicit reward.

P prompts, R responses a prompt, S = P * R sequences, T tokens, D hidden size, V vocabulary. logp in nats, float32 sums.

CREAM's reward of an answer is DPO's: log pi(answer | prompt) - log pi_ref(answer | prompt), summed over the answer's
tokens, pi_ref the initial model in every round (arXiv 2410.12735, section 3; `beta` changes no ranking and is left
out). The previous model's reward is the same with theta_(t-1) in pi's place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cream.attention import KeyValues
from cream.config import ScoreConfig
from cream.log import UserError, progress
from cream.model import Resident, context_length, head, hidden_states
from cream.run import Work
from cream.sample import left_pad
from cream_kernels import IGNORE, linear_logp

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # one prompt and its R responses, token ids


def batches(groups: Sequence[Group], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of groups of like length, so that prompts plus responses, padding counted, stay within `batch_tokens`.

    A group that is larger than that by itself is a batch of its own.
    """
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i][0]), max(map(len, groups[i][1])), i))
    batch, width, longest, rows = [], 0, 0, 0
    for i in order:
        prompt, responses = groups[i]
        w, n, r = max(width, len(prompt)), max(longest, *map(len, responses)), rows + len(responses)
        if batch and (len(batch) + 1) * w + r * n > batch_tokens:
            yield batch
            batch, w, n, r = [], len(prompt), max(map(len, responses)), len(responses)
        batch.append(i)
        width, longest, rows = w, n, r
    if batch:
        yield batch


@torch.no_grad()
def score(
    model: nn.Module,
    groups: Sequence[Group],
    batch_tokens: int,
    tick: Callable[[int], None] = lambda groups: None,  # told how many groups have just been scored
) -> list[list[float]]:  # per group, R sums of log-probs, nats
    """log pi(response | prompt) of every response, each prompt computed once for all its responses.

    Raises ValueError for an empty prompt or response.
    """
    weight = head(model)
    device = weight.device
    totals: list[list[float]] = [[] for _ in groups]
    for batch in batches(groups, batch_tokens):
        if any(not groups[i][0] or not all(groups[i][1]) for i in batch):
            raise ValueError("a prompt or a response without tokens has no log-probability")
        ids, positions, first = left_pad([groups[i][0] for i in batch], device)
        counts = [len(groups[i][1]) for i in batch]
        responses = [r for i in batch for r in groups[i][1]]
        longest = max(map(len, responses))
        targets = torch.full((len(responses), longest), IGNORE, dtype=torch.int64)
        for row, response in zip(targets, responses, strict=True):
            row[: len(response)] = torch.tensor(response)
        targets = targets.to(device)

        kv = KeyValues(first, ids.shape[1])
        rows = torch.arange(len(batch), device=device).repeat_interleave(torch.tensor(counts, device=device))
        hidden = hidden_states(model, ids, positions, kv)[rows, -1:]  # (S, 1, D): it predicts the first answer token
        if longest > 1:
            kv = kv.select(rows, kv.length + longest - 1)
            after = positions[rows, -1:] + 1 + torch.arange(longest - 1, device=device)
            hidden = torch.cat([hidden, hidden_states(model, targets[:, :-1].clamp(min=0), after, kv)], dim=1)
        logp = linear_logp(hidden.flatten(0, 1), weight, targets.flatten())
        sums = logp.view(len(responses), longest).sum(1).split(counts)
        for i, values in zip(batch, sums, strict=True):
            totals[i] = values.tolist()
        tick(len(batch))
    return totals


def rewards(
    logp: np.ndarray,  # (P, R) nats, of the model that is asked
    logp_reference: np.ndarray,  # (P, R) nats, of M0
    num_tokens: np.ndarray,  # (P, R)
    *,
    kind: str,  # "dpo" or "likelihood"
    length_normalize: bool,
) -> np.ndarray:  # (P, R) nats (a token, if normalised)
    """ "dpo": logp - logp_reference; "likelihood": logp alone; either divided by the answer's length where asked."""
    value = logp - logp_reference if kind == "dpo" else logp
    return value / num_tokens if length_normalize else value


def previous_rewards(
    logp_previous: np.ndarray,  # (P, R) nats
    logp_reference: np.ndarray,  # (P, R) nats
    num_tokens: np.ndarray,  # (P, R)
    config: ScoreConfig,
    *,
    first: bool,  # the first round, where theta_(t-1) is M0 itself
) -> np.ndarray | None:  # (P, R), or None where this round has no previous ranking
    """What the previous model thinks of the answers.

    In the first round the DPO reward under theta_(t-1) = M0 is identically 0 and ranks nothing. `first_round` says what
    stands in: "mean_logp", M0's mean log-prob a token (the released code's `enable_ref=no`); "one", no ranking at all,
    the round trusts every pair fully; "sft_half", the checkpoint half-way through SFT in theta_(t-1)'s place.
    """
    if first and config.reward == "dpo":
        if config.first_round == "one":
            return None
        if config.first_round == "mean_logp":
            return logp_reference / num_tokens
    return rewards(
        logp_previous, logp_reference, num_tokens, kind=config.reward, length_normalize=config.length_normalize
    )


def score_all(
    resident: Resident,
    checkpoints: dict[str, Path],  # policy, previous, reference -> model directory
    responses: Sequence[dict],  # rows of responses.jsonl
    config: ScoreConfig,
    work: Work,
    *,
    iteration: int,
):  # pyarrow.Table, one row a response: logps of the three and both rewards, nats
    """Score every response under the three checkpoints, which take turns in the one resident module.

    A checkpoint that stands for two (in round 1 the previous model is the reference) is scored once.
    """
    import pyarrow

    by_prompt: dict[str, list[dict]] = {}
    for row in responses:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    groups = [(rows[0]["prompt_ids"], [r["ids"] for r in rows]) for rows in by_prompt.values()]
    limit = min(config.max_length, context_length(resident.model))
    for prompt_id, (prompt, answers) in zip(by_prompt, groups, strict=True):
        if len(prompt) + max(map(len, answers)) > limit:
            raise UserError(
                f"score: prompt {prompt_id} with its longest answer is {len(prompt) + max(map(len, answers))} tokens; "
                f"score.max_length and the model's context allow {limit}"
            )
    units = [range(i, min(i + config.chunk_size, len(groups))) for i in range(0, len(groups), config.chunk_size)]
    distinct = {name: min(n for n in checkpoints if checkpoints[n] == path) for name, path in checkpoints.items()}
    todo = {name: list(work.parts(name, len(units))) for name in sorted(set(distinct.values()))}
    left = sum(len(units[unit]) for pending in todo.values() for unit in pending)
    scored, seconds = 0, 0.0
    with progress(
        len(groups) * len(todo), f"iter{iteration}/score", "prompts", done=len(groups) * len(todo) - left
    ) as bar:
        for name, pending in todo.items():
            for unit in pending:
                model = resident.at(checkpoints[name])
                start = time.perf_counter()
                chunk = [groups[i] for i in units[unit]]
                found = score(model, chunk, config.batch_tokens, tick=bar.update)
                work.put(name, unit, [{"logp": values} for values in found])
                seconds += time.perf_counter() - start
                scored += sum(len(p) + sum(map(len, answers)) for p, answers in chunk)
    work.facts(tokens=scored, tokens_per_second=scored / seconds if seconds else None)

    def column(name: str) -> np.ndarray:
        rows = (row for unit in range(len(units)) for row in work.get(distinct[name], unit))
        return np.array([value for row in rows for value in row["logp"]], dtype=np.float64)

    policy, previous, reference = column("policy"), column("previous"), column("reference")
    ordered = [row for rows in by_prompt.values() for row in rows]
    num_tokens = np.array([len(row["ids"]) for row in ordered])
    past = previous_rewards(previous, reference, num_tokens, config, first=iteration == 1)
    return pyarrow.table(
        {
            "prompt_id": [row["prompt_id"] for row in ordered],
            "index": [row["index"] for row in ordered],
            "num_tokens": num_tokens,
            "logp_policy": policy,
            "logp_previous": previous,
            "logp_reference": reference,
            "reward": rewards(
                policy, reference, num_tokens, kind=config.reward, length_normalize=config.length_normalize
            ),
            "previous_reward": np.full(len(ordered), np.nan) if past is None else past,
        }
    )


def sequence_rows(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],  # S pairs (prompt, response), token ids
    device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right-padded ids (S, T), the flat rows (N,) of [0, S * T) whose hidden states predict a response token, those
    tokens (N,), and cu_seqlens (S + 1,) int64 into them, on the CPU for loss kernels that loop over it."""
    longest = max(len(p) + len(r) for p, r in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    rows, targets, ends = [], [], [0]
    for s, (prompt, response) in enumerate(sequences):
        ids[s, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        begin = s * longest + len(prompt) - 1
        rows.append(torch.arange(begin, begin + len(response)))
        targets.append(torch.tensor(response))
        ends.append(ends[-1] + len(response))
    return ids.to(device), torch.cat(rows).to(device), torch.cat(targets).to(device), torch.tensor(ends)
