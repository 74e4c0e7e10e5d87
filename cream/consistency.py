"""Consistency: how far this round's ranking agrees with the last one's, and the pairs it is to weigh.

P prompts, R responses a prompt. tau in [-1, 1] is a raw rank correlation, consistency in [0, 1] its rescaling,
agreement in [0, 1] what the loss uses (the paper's C).

Everything is joined by prompt id: a prompt that is dropped takes its own consistency with it and no other's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cream.config import ConsistencyConfig
from cream.data import Example
from cream_kernels import kendall_tau


def spearman_rho(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row, (P, R) x (P, R) -> (P,) in [-1, 1]; ties share their mean rank.

    NaN where a row has a NaN or is all tied.
    """

    def centred_ranks(v: np.ndarray) -> np.ndarray:
        return np.sign(v[:, :, None] - v[:, None, :]).sum(-1) / 2  # mean rank less its mean (R - 1) / 2

    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = centred_ranks(_as_ranks(x)), centred_ranks(_as_ranks(y))
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _as_ranks(v: np.ndarray) -> np.ndarray:
    """The same order without infinities, whose differences would be NaN; NaN rows stay NaN."""
    ranks = np.stack([np.unique(row, return_inverse=True)[1].reshape(-1) for row in v]).astype(np.float64)
    ranks[np.isnan(v).any(1)] = np.nan
    return ranks


def top_order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 where both rankings name the same best and the same worst response, else 0; (P, R) x (P, R) -> (P,).

    This is TopOrder as the paper means it; the released code compares the first and the last response instead. Where
    several share the best or worst value, one in common is enough. NaN where a row has a NaN or is all tied.
    """
    best = (x == x.max(1, keepdims=True)) & (y == y.max(1, keepdims=True))
    worst = (x == x.min(1, keepdims=True)) & (y == y.min(1, keepdims=True))
    same = (best.any(1) & worst.any(1)).astype(np.float64)
    undefined = np.isnan(x).any(1) | np.isnan(y).any(1) | (np.ptp(x, 1) == 0) | (np.ptp(y, 1) == 0)
    return np.where(undefined, np.nan, same)


def correlation(
    current: np.ndarray,  # (P, R) rewards of this round's model
    previous: np.ndarray,  # (P, R) rewards of the last round's
    method: str,  # "kendall", "spearman" or "toporder"
) -> tuple[np.ndarray, np.ndarray]:  # tau (P,) in [-1, 1], consistency (P,) in [0, 1]; NaN where undefined
    """The rank correlation of each prompt and its rescaling to [0, 1]; TopOrder is 0 or 1 by itself."""
    if method == "toporder":
        same = top_order(current, previous)
        return 2 * same - 1, same
    tau = np.asarray(kendall_tau(current, previous) if method == "kendall" else spearman_rho(current, previous))
    return tau, (tau + 1) / 2


def agreement_of(
    consistency: np.ndarray | float,  # in [0, 1]
    map: str,  # "linear", "exact" or "clamp"
) -> np.ndarray | float:  # in [0, 1]
    """C from the consistency rate. With l = 1 - consistency = (1 - tau) / 2, the regulariser's weight (Lemma 3.4):

    "linear" C = 1 - l, as released: the first-order form, which reverses preferences below 1/2;
    "exact"  C = (1 + l) / (1 + 2 l), Theorem 3.3 itself, never below 2/3;
    "clamp"  C = max(1 - l, 1/2).
    """
    if map == "exact":
        return (2 - consistency) / (3 - 2 * consistency)
    return np.maximum(consistency, 0.5) if map == "clamp" else consistency


@dataclass(frozen=True)
class Ranking:
    """What one prompt's rewards say; a row of ranking.jsonl."""

    prompt_id: str
    task: str
    rewards: list[float]  # R, nats
    previous_rewards: list[float]  # R
    tau: float | None  # None where undefined: a ranking all tied, a NaN, or no previous ranking this round
    consistency: float | None
    agreement: float | None  # what the loss would use; None where the pair is dropped
    chosen: int | None  # index of the best response
    rejected: int | None
    dropped: str | None  # "tied": best and worst reward equal; "identical": the same tokens; "nan": fewer than 2 finite


def pick(rewards: np.ndarray, ids: Sequence[Sequence[int]]) -> tuple[int | None, int | None, str | None]:
    """Best and worst of R responses by reward (nats), and why they make no pair where they do not.

    Not-finite rewards are never chosen; of equal ones the first is.
    """
    finite = np.flatnonzero(np.isfinite(rewards))
    if len(finite) < 2:
        return None, None, "nan"
    best, worst = int(finite[rewards[finite].argmax()]), int(finite[rewards[finite].argmin()])
    if rewards[best] == rewards[worst]:
        return None, None, "tied"
    if list(ids[best]) == list(ids[worst]):
        return None, None, "identical"
    return best, worst, None


def rank(
    prompt_ids: Sequence[str],  # P
    tasks: Sequence[str],  # P
    rewards: np.ndarray,  # (P, R) of the policy, nats
    previous: np.ndarray,  # (P, R) of theta_(t-1); all NaN where this round has no previous ranking
    responses: Sequence[Sequence[Sequence[int]]],  # P x R token ids
    config: ConsistencyConfig,
    *,
    trust: bool = False,  # a first round without a previous ranking: agreement 1
) -> list[Ranking]:
    """Rank, correlate and pair. Level "avg": one agreement for the round, from the mean consistency over the prompts
    where it is defined (arXiv 2410.12735, Algorithm 1); "dyn": each prompt its own; "constant": config.constant.

    A prompt whose rankings cannot be compared says nothing either way: it is left out of the mean, and gets agreement
    1/2 (tau 0, through the map) under "dyn".
    """
    tau, consistency = correlation(rewards, previous, config.method)
    defined = np.isfinite(consistency)
    if trust:
        agreement = np.ones(len(prompt_ids))
    elif config.level == "constant":
        agreement = np.full(len(prompt_ids), config.constant)
    elif config.level == "avg":
        mean = consistency[defined].mean() if defined.any() else 0.5
        agreement = np.full(len(prompt_ids), agreement_of(mean, config.map))
    else:
        agreement = agreement_of(np.where(defined, consistency, 0.5), config.map)
    rankings = []
    for p, prompt_id in enumerate(prompt_ids):
        chosen, rejected, dropped = pick(rewards[p], responses[p])
        rankings.append(
            Ranking(
                prompt_id=prompt_id,
                task=tasks[p],
                rewards=rewards[p].tolist(),
                previous_rewards=previous[p].tolist(),
                tau=float(tau[p]) if defined[p] else None,
                consistency=float(consistency[p]) if defined[p] else None,
                agreement=None if dropped else float(agreement[p]),
                chosen=chosen,
                rejected=rejected,
                dropped=dropped,
            )
        )
    return rankings


def rank_round(
    scores: Path,  # scores.parquet
    responses: Sequence[dict],  # rows of responses.jsonl
    examples: Sequence[Example],  # the round's prompts
    config: ConsistencyConfig,
) -> tuple[list[dict], list[Ranking], dict]:  # rows of pairs.jsonl, rankings, ranking.json
    """Rank every prompt's answers and pair them up. Scores, answers and prompts meet by prompt id and index."""
    import pyarrow.parquet

    answers: dict[str, dict[int, dict]] = {}
    for row in responses:
        answers.setdefault(row["prompt_id"], {})[row["index"]] = row
    scored: dict[str, dict[int, dict]] = {}
    for row in pyarrow.parquet.read_table(scores).to_pylist():
        scored.setdefault(row["prompt_id"], {})[row["index"]] = row
    texts = {e.id: e.messages[-1]["content"] for e in examples}
    names = list(answers)
    R = len(answers[names[0]])

    def column(key: str) -> np.ndarray:
        return np.array([[scored[name][r][key] for r in range(R)] for name in names], dtype=np.float64)

    current, previous, logp = column("reward"), column("previous_reward"), column("logp_policy")
    rankings = rank(
        names,
        [answers[name][0]["task"] for name in names],
        current,
        previous,
        [[answers[name][r]["ids"] for r in range(R)] for name in names],
        config,
        trust=bool(np.isnan(previous).all()),
    )
    pairs = []
    for p, ranking in enumerate(rankings):
        if ranking.dropped:
            continue
        chosen, rejected = (answers[ranking.prompt_id][r] for r in (ranking.chosen, ranking.rejected))
        pairs.append(
            {
                "prompt_id": ranking.prompt_id,
                "agreement": ranking.agreement,
                "prompt_ids": chosen["prompt_ids"],
                "chosen_ids": chosen["ids"],
                "rejected_ids": rejected["ids"],
                "logp_chosen": float(
                    logp[p, ranking.chosen]
                ),  # theta_t's own: the loss's reference, as it is theta_t now
                "logp_rejected": float(logp[p, ranking.rejected]),
                "reward_chosen": ranking.rewards[ranking.chosen],
                "reward_rejected": ranking.rewards[ranking.rejected],
                "prompt": texts[ranking.prompt_id],
                "chosen": chosen["text"],
                "rejected": rejected["text"],
            }
        )
    return pairs, rankings, summarize(rankings, responses, config)


def summarize(rankings: Sequence[Ranking], answers: Sequence[dict], config: ConsistencyConfig) -> dict:
    """The round in numbers; ranking.json. Means are over the prompts where the number is defined, else None."""

    def mean(values) -> float | None:
        values = [v for v in values if v is not None]
        return float(np.mean(values)) if values else None

    taus = [r.tau for r in rankings if r.tau is not None]
    kept = [r for r in rankings if not r.dropped]
    dropped = Counter(r.dropped for r in rankings if r.dropped)
    return {
        "prompts": len(rankings),
        "tau_mean": mean(taus),
        "tau_std": float(np.std(taus)) if taus else None,
        "consistency_mean": mean(r.consistency for r in rankings),
        "agreement_mean": mean(r.agreement for r in kept),
        "kept": len(kept),
        "dropped": {reason: dropped.get(reason, 0) for reason in ("tied", "identical", "nan")},
        "tied_rankings": sum(r.tau is None for r in rankings),
        "reward_margin": mean(r.rewards[r.chosen] - r.rewards[r.rejected] for r in kept),
        "mean_response_tokens": mean(len(row["ids"]) for row in answers),
        "stopped": mean(float(row["finish"] == "stop") for row in answers),
        **{key: value for key, value in asdict(config).items() if key in ("level", "method", "map")},
    }
