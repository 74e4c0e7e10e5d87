"""Scoring: the log-probability of every answer under policy, previous and reference, and the implicit reward.

P prompts, R responses a prompt. logp in nats, sums in float64.

CREAM's reward of an answer is DPO's: log pi(answer | prompt) - log pi_ref(answer | prompt), summed over the answer's
tokens, pi_ref the initial model in every round (arXiv 2410.12735, section 3; `beta` changes no ranking and is left
out). The previous model's reward is the same with theta_(t-1) in pi's place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cream import dist
from cream.config import ScoreConfig
from cream.log import UserError, progress, say
from cream.meter import forward_flops, memory_gb, utilization
from cream.model import Resident, context_length, head
from cream.packing import Group, batches, group_tokens, pack, read
from cream.work import Work
from cream_kernels import linear_logp


@dataclass
class Done:
    """What scoring has computed."""

    tokens: int = 0
    flops: float = 0.0


@torch.no_grad()
def score(
    model: nn.Module,
    groups: Sequence[Group],
    batch_tokens: int,
    tick: Callable[[int], None] = lambda groups: None,  # told how many groups have just been scored
    done: Done | None = None,  # added to
    tokens: dict[tuple[int, tuple[int, ...]], Tensor | None] | None = None,  # (group, response) -> (n,) nats a token,
    # filled in for the keys that are there
) -> list[list[float]]:  # per group, R sums of log-probs, nats
    """log pi(response | prompt) of every response, each prompt computed once for all its responses.

    So is a response that stands there several times, whose scores are then equal to the last bit: a tie in the ranking.
    Raises ValueError for an empty prompt or response.
    """
    weight, done = head(model), done or Done()
    once = [(prompt, once_each(responses)) for prompt, responses in groups]
    order, sums = [], []
    for batch in batches([group_tokens(group) for group in once], batch_tokens):
        packed = pack([once[i] for i in batch], weight.device)
        logp = linear_logp(read(model, packed), weight, packed.targets)
        order += batch
        if tokens:
            keys = [(i, response) for i in batch for response in once[i][1]]
            pieces = zip(keys, logp.split(packed.cu_seqlens.diff().tolist()), strict=True)
            tokens |= {key: piece for key, piece in pieces if key in tokens}
        lengths = packed.cu_seqlens.diff().to(weight.device, non_blocking=True)
        # In float64: what ranks is a difference of such sums.
        sums.append(torch.segment_reduce(logp.double(), "sum", lengths=lengths, unsafe=True))
        done.tokens += packed.tokens
        done.flops += forward_flops(model, packed)
        tick(len(batch))
    values = iter(torch.cat(sums).tolist() if sums else [])  # the one wait
    found = {i: {response: next(values) for response in once[i][1]} for i in order}
    return [[found[i][tuple(response)] for response in responses] for i, (_, responses) in enumerate(groups)]


def engine_gap(
    told: dict[tuple[int, tuple[int, ...]], list[float]],  # (group, response) -> nats a token, by the engine that drew
    scored: dict[tuple[int, tuple[int, ...]], Tensor | None],  # the same keys -> (n,) nats a token, by the trainer
) -> list[float]:  # summed and largest absolute difference, nats; tokens compared
    gaps = [np.abs(np.array(told[key]) - scored[key].double().cpu().numpy()) for key in told]
    return [float(sum(g.sum() for g in gaps)), float(max((g.max() for g in gaps), default=0)), sum(map(len, gaps))]


def once_each(responses: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The responses without repetitions, in order."""
    return list(dict.fromkeys(map(tuple, responses)))


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
):  # pyarrow.Table, one row a response: logps of the three and both rewards, nats; None on ranks other than 0
    """Score every response under the three checkpoints, which take turns in the one resident module.

    A checkpoint that stands for two (in round 1 the previous model is the reference) is scored once.
    """
    import pyarrow

    by_prompt: dict[str, list[dict]] = {}
    for row in responses:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    ordered = list(by_prompt.values())
    groups = [(rows[0]["prompt_ids"], [r["ids"] for r in rows]) for rows in ordered]
    limit = min(config.max_length, context_length(resident.model))
    for prompt_id, (prompt, answers) in zip(by_prompt, groups, strict=True):
        if len(prompt) + max(map(len, answers)) > limit:
            raise UserError(
                f"score: prompt {prompt_id} with its longest answer is {len(prompt) + max(map(len, answers))} tokens; "
                f"score.max_length and the model's context allow {limit}"
            )
    units = [range(i, min(i + config.chunk_size, len(groups))) for i in range(0, len(groups), config.chunk_size)]
    distinct = {name: min(n for n in checkpoints if checkpoints[n] == path) for name, path in checkpoints.items()}
    todo = {name: work.parts(name, len(units)) for name in sorted(set(distinct.values()))}
    left = sum(len(units[unit]) for pending in todo.values() for unit in pending)
    whole = len(groups) * len(todo) if dist.size() == 1 else left
    done, seconds = Done(), 0.0
    with progress(whole, f"iter{iteration}/score", "prompts", done=whole - left) as bar:
        for name, pending in todo.items():
            for unit in pending:
                model = resident.at(checkpoints[name])
                start = time.perf_counter()
                chunk = [groups[i] for i in units[unit]]
                told = {}
                if name == distinct["policy"]:
                    told = {
                        (n, tuple(row["ids"])): row["engine_logp"]
                        for n, i in enumerate(units[unit])
                        for row in ordered[i]
                        if row.get("engine_logp")
                    }
                tokens = dict.fromkeys(told)
                found = score(model, chunk, config.batch_tokens, tick=bar.update, done=done, tokens=tokens)
                forwards = [len(once_each(answers)) for _, answers in chunk]
                rows = [{"logp": values, "forwards": n} for values, n in zip(found, forwards, strict=True)]
                rows[0]["gap"] = engine_gap(told, tokens)
                work.put(name, unit, rows)
                seconds += time.perf_counter() - start
    facts = dist.gather((done.tokens, done.flops, seconds))  # and now all parts are there
    if not dist.is_main():
        return None
    tokens, flops, seconds = sum(f[0] for f in facts), sum(f[1] for f in facts), max(f[2] for f in facts)
    work.facts(
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else None,
        mfu=utilization(resident.model, flops / dist.size(), seconds),
        memory_gb=memory_gb(resident.model),
        # Counted from what was written: R, less repetitions, for each distinct checkpoint is the least there can be.
        sequence_forwards_per_prompt=sum(
            row["forwards"] for name in todo for unit in range(len(units)) for row in work.get(name, unit)
        )
        / len(groups),
    )

    gaps = [work.get(distinct["policy"], unit)[0]["gap"] for unit in range(len(units))]
    if compared := sum(count for *_, count in gaps):
        mean, most = sum(gap[0] for gap in gaps) / compared, max(gap[1] for gap in gaps)
        work.facts(engine_gap_mean=mean, engine_gap_max=most, engine_gap_tokens=compared)
        say(
            f"iter{iteration}: log-probs of engine and trainer differ by {mean:.2g} nats a token in the mean, "
            f"{most:.2g} at most ({compared} tokens compared)"
        )

    def column(name: str) -> np.ndarray:
        rows = (row for unit in range(len(units)) for row in work.get(distinct[name], unit))
        return np.array([value for row in rows for value in row["logp"]], dtype=np.float64)

    policy, previous, reference = column("policy"), column("previous"), column("reference")
    rows = [row for of in ordered for row in of]
    num_tokens = np.array([len(row["ids"]) for row in rows])
    past = previous_rewards(previous, reference, num_tokens, config, first=iteration == 1)
    return pyarrow.table(
        {
            "prompt_id": [row["prompt_id"] for row in rows],
            "index": [row["index"] for row in rows],
            "num_tokens": num_tokens,
            "logp_policy": policy,
            "logp_previous": previous,
            "logp_reference": reference,
            "reward": rewards(
                policy, reference, num_tokens, kind=config.reward, length_normalize=config.length_normalize
            ),
            "previous_reward": np.full(len(rows), np.nan) if past is None else past,
        }
    )
