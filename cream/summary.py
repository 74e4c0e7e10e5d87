"""A run in numbers, read from its directory: what the report shows.

P prompts, R responses a prompt. Rewards in nats, tau in [-1, 1], agreement, accuracy and fractions in [0, 1].

Only the artifacts are read, nothing is computed again. A stage that has not finished leaves its part empty.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cream.log import UserError, printable

SHOWN_PROMPTS = 100  # of each iteration in the report, evenly spread over its prompts
SHOWN_CHARACTERS = 8000  # of a prompt or response
Z = statistics.NormalDist().inv_cdf(0.975)  # two-sided 95%


@dataclass(frozen=True)
class Score:
    """One model on one task."""

    model: str
    task: str
    n: int
    accuracy: float  # of generated answers
    low: float  # its 95% interval
    high: float
    answered: float | None  # fraction of answers from which an option or a number could be read
    acc: float | None  # lm-eval's option likelihood
    acc_norm: float | None  # and divided by the option's length
    gained: int  # prompts that the first model had wrong and this one has right
    lost: int  # and the other way round


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str
    tokens: int
    reward: float | None  # nats, under the current model
    previous_reward: float | None
    mark: str  # "best", "worst" or ""


@dataclass(frozen=True)
class Ranked:
    """One prompt with its responses, best first."""

    id: str
    task: str
    messages: tuple[tuple[str, str], ...]  # (role, text)
    tau: float | None
    agreement: float | None
    dropped: str | None
    answers: tuple[Answer, ...]


@dataclass
class Round:
    """What an iteration left behind. Empty where its stages have not run."""

    iteration: int
    facts: dict = field(default_factory=dict)  # ranking.json
    prompts: int = 0
    taus: list[float] = field(default_factory=list)
    responses: int = 0  # R
    lengths: list[int] = field(default_factory=list)  # tokens of every response
    stopped: float | None = None  # fraction that ended by themselves
    chosen_lengths: list[int] = field(default_factory=list)  # tokens, one a kept pair
    rejected_lengths: list[int] = field(default_factory=list)
    shown: list[Ranked] = field(default_factory=list)


@dataclass
class Summary:
    name: str
    config: dict
    config_text: str
    stages: list[dict]  # the ledger's newest row of each stage, in the order they finished
    models: list[str]  # evaluated ones, in order
    scores: list[Score]
    means: dict[str, float | None]  # model -> mean accuracy over its tasks
    rounds: list[Round]
    curves: dict[str, list[dict]]  # stage -> its rows of metrics.jsonl
    warnings: list[str] = field(default_factory=list)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a proportion right / n (Wilson 1927, J. Am. Stat. Assoc. 22:209); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre, spread = right / n + Z**2 / (2 * n), Z * math.sqrt(right / n * (1 - right / n) / n + Z**2 / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + Z**2 / n)), min(1.0, (centre + spread) / (1 + Z**2 / n))


def collect(run_dir: Path) -> Summary:
    """Read a run directory. Raises UserError where it is none, or names the file and line of a row that is damaged."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: no config.yaml in it, so it is not the directory of a run")
    text = _text(run_dir / "config.yaml")
    newest = {row["stage"]: row for row in _rows(run_dir / "ledger.jsonl", "stage")}
    curves: dict[str, list[dict]] = {}
    for row in _rows(run_dir / "metrics.jsonl", "stage", "step"):
        curves.setdefault(row["stage"], []).append(row)
    models, scores, means = _evaluations(run_dir / "eval")
    iterations = sorted(int(p.name[4:]) for p in run_dir.glob("iter*") if p.is_dir() and p.name[4:].isdecimal())
    summary = Summary(
        name=run_dir.resolve().name,
        config=_config(text, run_dir / "config.yaml"),
        config_text=text,
        stages=sorted(newest.values(), key=lambda row: str(row.get("time", ""))),
        models=models,
        scores=scores,
        means=means,
        rounds=[r for r in (_round(run_dir, t) for t in iterations) if r.lengths or r.facts],
        curves=curves,
    )
    summary.warnings = warnings(summary)
    return summary


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _config(text: str, path: Path) -> dict:
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return config if isinstance(config, dict) else {}


def _rows(path: Path, *fields: str) -> Iterator[dict]:
    """The rows of a JSONL file, none where it does not exist; a last line that a kill cut off does not count."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            missing = [f for f in fields if f not in row] if isinstance(row, dict) else list(fields)
            if missing:
                raise UserError(f"{path}:{number}: no field {missing[0]!r}; this file was not written by cream")
            yield row


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; this file was not written by cream")
    return value


def finite(value: object) -> float | None:
    """A finite number, or None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _evaluations(directory: Path) -> tuple[list[str], list[Score], dict[str, float | None]]:
    files = sorted(directory.glob("m*.json"), key=lambda p: (len(p.name), p.name))  # m2 before m10
    models, scores, means, first = [], [], {}, None
    for file in files:
        evaluation = _json(file)
        model = str(evaluation.get("model", file.stem.upper()))
        answers = _rows(file.with_suffix(".jsonl"), "prompt_id", "task", "correct")
        right = {(row["task"], row["prompt_id"]): bool(row["correct"]) for row in answers}
        first = right if first is None else first
        changed = Counter((key[0], right[key]) for key in right.keys() & first.keys() if right[key] != first[key])
        models.append(model)
        means[model] = finite(evaluation.get("mean_accuracy"))
        for task, values in evaluation.get("tasks", {}).items():
            n, accuracy = finite(values.get("n")), finite(values.get("accuracy"))
            if n is None or accuracy is None:  # no question of this task has an answer
                continue
            low, high = wilson(round(accuracy * n), n)
            more = (finite(values.get(key)) for key in ("answered", "acc", "acc_norm"))
            scores.append(Score(model, task, n, accuracy, low, high, *more, changed[task, True], changed[task, False]))
    return models, scores, means


def _round(run_dir: Path, iteration: int) -> Round:
    directory = run_dir / f"iter{iteration}"
    found = Round(iteration, facts=_json(directory / "ranking.json"))
    rankings = list(_rows(directory / "ranking.jsonl", "prompt_id", "rewards", "tau", "chosen", "rejected"))
    found.taus = [row["tau"] for row in rankings if finite(row["tau"]) is not None]
    names = [row["prompt_id"] for row in rankings]
    if not names:
        names = list(dict.fromkeys(r["prompt_id"] for r in _rows(directory / "responses.jsonl", "prompt_id")))
    found.prompts = len(names)
    keep = {names[i * len(names) // min(len(names), SHOWN_PROMPTS)] for i in range(min(len(names), SHOWN_PROMPTS))}

    tokens: dict[tuple[str, int], int] = {}
    rows: dict[str, list[dict]] = {name: [] for name in names if name in keep}
    stops = 0
    for row in _rows(directory / "responses.jsonl", "prompt_id", "index", "ids", "text", "finish"):
        tokens[row["prompt_id"], row["index"]] = len(row["ids"])
        stops += row["finish"] == "stop"
        if row["prompt_id"] in rows:
            rows[row["prompt_id"]].append(row)
    found.lengths = list(tokens.values())
    found.stopped = stops / len(tokens) if tokens else None
    found.responses = 1 + max((index for _, index in tokens), default=-1)
    for row in rankings:
        pair = [tokens.get((row["prompt_id"], row[side])) for side in ("chosen", "rejected")]
        if None not in pair:
            found.chosen_lengths.append(pair[0])
            found.rejected_lengths.append(pair[1])

    ranking = {row["prompt_id"]: row for row in rankings if row["prompt_id"] in rows}
    prompts = {r["id"]: r for r in _rows(run_dir / "prompts" / f"iter{iteration}.jsonl", "id") if r["id"] in rows}
    found.shown = [_ranked(name, rows[name], ranking.get(name, {}), prompts.get(name, {})) for name in rows]
    return found


def _ranked(name: str, rows: Sequence[dict], ranking: Mapping, prompt: Mapping) -> Ranked:
    def reward(key: str, index: int) -> float | None:
        values = ranking.get(key) or ()
        return finite(values[index]) if index < len(values) else None

    marks = {ranking.get("chosen"): "best", ranking.get("rejected"): "worst"}
    answers = [
        Answer(
            text=_shown(row["text"]),
            finish=printable(str(row["finish"])),
            tokens=len(row["ids"]),
            reward=reward("rewards", row["index"]),
            previous_reward=reward("previous_rewards", row["index"]),
            mark=marks.get(row["index"], ""),
        )
        for row in rows
    ]
    answers.sort(key=lambda a: -math.inf if a.reward is None else a.reward, reverse=True)
    return Ranked(
        id=printable(str(name)),
        task=printable(str(prompt.get("task", rows[0].get("task", "") if rows else ""))),
        messages=tuple((printable(str(m.get("role"))), _shown(m.get("content"))) for m in prompt.get("messages", ())),
        tau=finite(ranking.get("tau")),
        agreement=finite(ranking.get("agreement")),
        dropped=printable(str(ranking["dropped"])) if ranking.get("dropped") else None,
        answers=tuple(answers),
    )


def _shown(text: object) -> str:
    text = str(text)
    more = len(text) - SHOWN_CHARACTERS
    return printable(text[:SHOWN_CHARACTERS]) + (f" [{more} more characters]" if more > 0 else "")


# What a run that goes wrong shows first. Each limit is a choice, made to stay quiet on ordinary noise.
CHOSEN_FALL = 0.5  # beta * nats: at beta 0.1 the chosen answers are exp(5) times less likely than before the training
LENGTH_DRIFT = 1.5  # factor of the mean response length against the first iteration
STOP_DROP = 0.2  # of the fraction of responses that end by themselves
LENGTH_BIAS = 1.25  # factor of chosen over rejected mean length
ACCURACY_DROP = 0.05  # of the mean accuracy against the best model before


def warnings(summary: Summary) -> list[str]:
    """Signs of collapse or of a reward that measures something else, each with its numbers."""
    return [*_fallen_rewards(summary), *_drifted_rounds(summary), *_lost_accuracy(summary)]


def _fallen_rewards(summary: Summary) -> Iterator[str]:
    for stage, rows in summary.curves.items():
        values = [v for v in (finite(row.get("rewards/chosen")) for row in rows) if v is not None]
        last = values[-max(1, len(values) // 4) :]
        if last and mean_of(last) < -CHOSEN_FALL:
            yield (
                f"{stage}: the reward of the chosen answers fell to {mean_of(last):.2f} (mean of the last quarter of "
                "steps): training makes the answers that it prefers less likely"
            )


def _drifted_rounds(summary: Summary) -> Iterator[str]:
    sampled = [r for r in summary.rounds if r.lengths]
    for r in sampled[1:]:
        first, now, then = sampled[0], mean_of(r.lengths), mean_of(sampled[0].lengths)
        if then and not 1 / LENGTH_DRIFT <= now / then <= LENGTH_DRIFT:
            yield (
                f"iteration {r.iteration}: responses have {now:.0f} tokens on average, {now / then:.2f} times the "
                f"{then:.0f} of iteration {first.iteration}"
            )
        if first.stopped - r.stopped > STOP_DROP:
            yield (
                f"iteration {r.iteration}: {percent(r.stopped)} of the responses end by themselves, "
                f"{percent(first.stopped)} in iteration {first.iteration}: the model forgets to stop"
            )
    for r in summary.rounds:
        if r.chosen_lengths and mean_of(r.chosen_lengths) > LENGTH_BIAS * mean_of(r.rejected_lengths):
            yield (
                f"iteration {r.iteration}: chosen answers are {mean_of(r.chosen_lengths):.0f} tokens long, rejected "
                f"ones {mean_of(r.rejected_lengths):.0f}: the reward may measure length"
            )
        agreement = finite(r.facts.get("agreement_mean"))
        if agreement is not None and agreement < 0.5:
            yield (
                f"iteration {r.iteration}: mean agreement {agreement:.2f} is below 1/2: on balance the loss reverses "
                "this ranking's preferences (with consistency.map exact or clamp it never does)"
            )


def _lost_accuracy(summary: Summary) -> Iterator[str]:
    best = None
    for model, mean in summary.means.items():
        if mean is None:
            continue
        if best is not None and mean < best[1] - ACCURACY_DROP:
            yield f"{model}: mean accuracy {percent(mean)}, below {best[0]}'s {percent(best[1])}"
        if best is None or mean > best[1]:
            best = model, mean


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
