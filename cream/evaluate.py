"""Evaluation: a model's accuracy on held-out questions, by the answers that it writes and by option likelihood.

`accuracy` is the paper's protocol: the question with an instruction suffix, greedy decoding, the answer extracted from
the text. `acc` and `acc_norm` are lm-eval's: the option of the highest log-probability after the bare question, as it
stands or divided by the option's length in characters. `python -m cream.evaluate --model.path DIR` evaluates one model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import nn

from cream import dist
from cream.config import EvaluateConfig
from cream.data import Example, encode_prompt
from cream.log import progress
from cream.model import stop_ids
from cream.sample import generate
from cream.score import score
from cream.tasks.answers import continuations, is_correct
from cream.work import Work


def answer(
    model: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    config: EvaluateConfig,
    work: Work,
    stage: str,
    *,
    cuda_graphs: bool = True,
) -> list[dict]:
    """Greedy answers, one row an example in the order given, batch by batch. [] on ranks other than 0."""
    prompts = [encode_prompt(tokenizer, e.messages, suffix=config.suffix) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (len(prompts[i]), examples[i].id))
    units = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    stop = stop_ids(model, tokenizer)
    todo = work.parts("answers", len(units))
    mine = sum(len(units[unit]) for unit in todo)
    whole = len(examples) if dist.size() == 1 else mine
    written, started = 0, time.perf_counter()
    with progress(whole, stage, "questions", done=whole - mine) as bar:
        for unit in todo:
            members = units[unit]
            replies = generate(
                model,
                [prompts[i] for i in members],
                None,
                max_new_tokens=config.max_new_tokens,
                stop=stop,
                cuda_graphs=cuda_graphs,
                tick=bar.update,
            )
            rows = []
            for i, reply in zip(members, replies, strict=True):
                text = tokenizer.decode(reply.ids, skip_special_tokens=True)
                extracted, correct = is_correct(examples[i], text)
                rows.append(
                    {
                        "prompt_id": examples[i].id,
                        "task": examples[i].task,
                        "text": text,
                        "finish": reply.finish,
                        "extracted": extracted,
                        "answer": examples[i].answer,
                        "correct": correct,
                    }
                )
            work.put("answers", unit, rows)
            written += sum(len(reply.ids) for reply in replies)
    facts = dist.gather((written, time.perf_counter() - started, len(todo)))  # and now all parts are there
    if not dist.is_main():
        return []
    if any(count for _, _, count in facts):
        written, seconds = sum(tokens for tokens, _, _ in facts), max(seconds for _, seconds, _ in facts)
        work.facts(tokens=written, tokens_per_second=written / seconds)
    place = {e.id: n for n, e in enumerate(examples)}
    return sorted(
        (r for unit in range(len(units)) for r in work.get("answers", unit)), key=lambda r: place[r["prompt_id"]]
    )


def likelihood(
    model: nn.Module, tokenizer, examples: Sequence[Example], config: EvaluateConfig, work: Work, stage: str
) -> dict[str, tuple[bool, bool]]:
    """(acc, acc_norm) of each multiple-choice example by id: is the gold option the likeliest, alone and a character?

    Context and option are encoded together and split where the context's own encoding ends, as lm-eval does. {} on
    ranks other than 0.
    """
    asked, groups = [], []
    for example in examples:
        if (found := continuations(example)) is None or example.answer is None:
            continue
        context, options = found
        prefix = tokenizer(context)["input_ids"]
        groups.append((prefix, [tokenizer(context + option)["input_ids"][len(prefix) :] for option in options]))
        asked.append(example)
    units = [range(i, min(i + config.batch_size, len(asked))) for i in range(0, len(asked), config.batch_size)]
    todo = work.parts("likelihood", len(units))
    mine = sum(len(units[unit]) for unit in todo)
    whole = len(asked) if dist.size() == 1 else mine
    with progress(whole, f"{stage} likelihood", "questions", done=whole - mine) as bar:
        for unit in todo:
            chunk = [groups[i] for i in units[unit]]
            found = score(model, chunk, config.batch_tokens, tick=bar.update)
            work.put("likelihood", unit, [{"logp": values} for values in found])
    dist.gather(None)  # and now all parts are there
    if not dist.is_main():
        return {}
    scored = (row["logp"] for unit in range(len(units)) for row in work.get("likelihood", unit))
    verdicts = {}
    for example, logp in zip(asked, scored, strict=True):
        gold = ord(example.answer) - ord("A")
        a_character = [value / len(option) for value, option in zip(logp, example.choices, strict=True)]
        verdicts[example.id] = (logp.index(max(logp)) == gold, a_character.index(max(a_character)) == gold)
    return verdicts


def evaluate(
    model: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    config: EvaluateConfig,
    work: Work,
    *,
    name: str,  # "M0", "M1", ...
    stage: str,
    cuda_graphs: bool = True,  # sample.cuda_graphs
) -> tuple[dict, list[dict]]:  # what eval/m<t>.json holds, and the rows of eval/m<t>.jsonl, one a question
    """Answer, extract, compare. Accuracies are fractions in [0, 1], None where not asked. Ranks other than 0 help, and
    have no result."""
    rows = answer(model, tokenizer, examples, config, work, stage, cuda_graphs=cuda_graphs)
    verdicts = likelihood(model, tokenizer, examples, config, work, stage) if config.likelihood else {}
    if not dist.is_main():
        return {}, []
    for row in rows:
        row["acc"], row["acc_norm"] = verdicts.get(row["prompt_id"], (None, None))

    def share(of: list[dict], key: str) -> float | None:
        asked = [row[key] for row in of if row[key] is not None]
        return sum(asked) / len(asked) if asked else None

    tasks = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task]
        tasks[task] = {
            "n": len(of),
            "accuracy": share(of, "correct"),
            "answered": sum(row["extracted"] is not None for row in of) / len(of),
            "acc": share(of, "acc"),
            "acc_norm": share(of, "acc_norm"),
        }
    result = {"model": name, "tasks": tasks, "mean_accuracy": sum(t["accuracy"] for t in tasks.values()) / len(tasks)}
    return result, rows


if __name__ == "__main__":
    from cream.train import main

    main(until="eval/m0")
