"""Sampling: R answers to each prompt from the policy, token by token, each from a random stream of its own.

P prompts, R responses a prompt, S = P * R sequences (prompt-major), T tokens, D hidden size, V vocabulary.

The token that response (prompt, index) draws at step n depends on the seed, the iteration, the prompt's id, the index
and n, on nothing else: not on the order of prompts, on the batch that they are in or on a restart. (Logits themselves
can differ in their last bit between batch shapes; so batches follow from the input, not from what is left to do.)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cream import dist
from cream.attention import KeyValues
from cream.config import SampleConfig
from cream.data import Example, encode_prompt
from cream.log import UserError, progress
from cream.model import context_length, head, hidden_states, stop_ids
from cream.run import Work
from cream_kernels import top_p_sample

GROWTH = 64  # cache columns added at a time
TIDY = 8  # steps between looks at whether a quarter of the sequences is finished and may leave the batch


@dataclass(frozen=True)
class Response:
    ids: list[int]  # the sampled tokens, the end-of-text token included where there is one
    finish: str  # "stop": ended by itself; "length": cut off


def stream(seed: int, iteration: int, prompt_id: str, index: int, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) for one response: Philox, a counter-based generator, keyed by a hash of the names."""
    name = f"{seed}/{iteration}/{prompt_id}/{index}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def left_pad(prompts: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor, Tensor]:
    """ids (P, T), positions (P, T) and the first column of each prompt (P,), all int64, prompts flush right."""
    width = max(map(len, prompts))
    first = torch.tensor([width - len(p) for p in prompts])
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    positions = (torch.arange(width) - first[:, None]).clamp(min=0)
    return ids.to(device), positions.to(device), first.to(device)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],  # P prompts, token ids
    uniform: np.ndarray | None,  # (S, max_new_tokens) in [0, 1), or None for greedy decoding
    *,
    responses: int = 1,  # R
    max_new_tokens: int,
    stop: Sequence[int],  # token ids that end an answer
    temperature: float = 1.0,
    top_p: float = 1.0,
    tick: Callable[[int], None] = lambda finished: None,  # told how many sequences have just ended
) -> list[Response]:  # S, prompt-major
    """R continuations of each prompt; the prompt is computed once and its keys and values are handed to its responses.

    Raises UserError for a prompt that fills the model's context.
    """
    context = context_length(model)
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room for an answer in a context of {context}")
    weight = head(model)
    device = weight.device
    ids, positions, first = left_pad(prompts, device)
    kv = KeyValues(first, ids.shape[1])
    hidden = hidden_states(model, ids, positions, kv=kv)[:, -1]  # (P, D)

    rows = torch.arange(len(prompts), device=device).repeat_interleave(responses)
    S = len(rows)
    hidden, kv = hidden[rows], kv.select(rows, kv.length + min(GROWTH, max_new_tokens))
    limit = torch.tensor([min(max_new_tokens, context - len(p)) for p in prompts], device=device)[rows]
    position = positions[rows, -1]
    live = torch.arange(S, device=device)  # the sequences that the batch holds; `done` ones wait for the next tidy-up
    done = torch.zeros(S, dtype=torch.bool, device=device)
    stop_tokens = torch.tensor(list(stop), device=device)
    tokens = torch.zeros(S, max_new_tokens, dtype=torch.int64, device=device)
    counts = torch.zeros(S, dtype=torch.int64, device=device)
    ended = 0  # of those in the batch
    draws = torch.zeros(S, max_new_tokens, dtype=torch.float64) if uniform is None else torch.from_numpy(uniform)
    draws = draws.to(device)

    for step in range(max_new_tokens):
        token = top_p_sample(
            hidden @ weight.T, draws[live, step], temperature=0.0 if uniform is None else temperature, top_p=top_p
        )
        tokens[live, step] = token
        counts[live] += ~done
        done = done | torch.isin(token, stop_tokens) | (limit[live] <= step + 1)
        ended, before = int(done.sum()), ended
        tick(ended - before)
        if ended == len(done):
            break
        full = kv.length == kv.capacity
        if full or (step % TIDY == TIDY - 1 and 4 * ended >= len(done)):
            keep, ended = (~done).nonzero().flatten(), 0
            kv = kv.select(keep, kv.length + GROWTH if full else kv.capacity)
            live, token, position, done = live[keep], token[keep], position[keep], done[keep]
        if step + 1 < max_new_tokens:
            position = (position + 1).clamp(max=context - 1)  # finished rows idle at the last position
            hidden = hidden_states(model, token[:, None], position[:, None], kv=kv)[:, -1]

    counts, tokens, stops = counts.tolist(), tokens.tolist(), set(stop)
    answers = (row[:n] for row, n in zip(tokens, counts, strict=True))
    return [Response(answer, "stop" if answer[-1] in stops else "length") for answer in answers]


def sample(
    model: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    config: SampleConfig,
    work: Work,
    *,
    seed: int,
    iteration: int,
) -> list[dict]:  # rows of responses.jsonl, one a response, prompts in the order given; [] on ranks other than 0
    """Draw `config.responses` answers to each example.

    The unit of resume, and of sharing between ranks, is a batch of `config.batch_size` prompts of like length. So the
    answers depend on neither.
    """
    prompts = [encode_prompt(tokenizer, e.messages) for e in examples]
    stop = stop_ids(model, tokenizer)
    order = sorted(range(len(examples)), key=lambda i: (len(prompts[i]), examples[i].id))
    units = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    R = config.responses
    drawn, started = 0, time.perf_counter()
    todo = work.parts("responses", len(units))
    mine = R * sum(len(units[unit]) for unit in todo)
    whole = R * len(examples) if dist.size() == 1 else mine  # of several ranks each shows its own part
    with progress(whole, f"iter{iteration}/sample", "responses", done=whole - mine) as bar:
        for unit in todo:
            members = units[unit]
            n = config.max_new_tokens
            uniform = np.stack([stream(seed, iteration, examples[i].id, r, n) for i in members for r in range(R)])
            answers = generate(
                model,
                [prompts[i] for i in members],
                uniform,
                responses=R,
                max_new_tokens=config.max_new_tokens,
                stop=stop,
                temperature=config.temperature,
                top_p=config.top_p,
                tick=bar.update,
            )
            drawn += sum(len(a.ids) for a in answers)
            rows = [
                {
                    "prompt_id": examples[i].id,
                    "task": examples[i].task,
                    "index": r,
                    "prompt_ids": prompts[i],
                    "ids": answers[n * R + r].ids,
                    "text": tokenizer.decode(answers[n * R + r].ids, skip_special_tokens=True),
                    "finish": answers[n * R + r].finish,
                }
                for n, i in enumerate(members)
                for r in range(R)
            ]
            work.put("responses", unit, rows)
    facts = dist.gather((drawn, time.perf_counter() - started, len(todo)))  # and now all parts are there
    if any(count for _, _, count in facts):
        drawn, seconds = sum(tokens for tokens, _, _ in facts), max(seconds for _, seconds, _ in facts)
        work.facts(tokens=drawn, tokens_per_second=drawn / seconds)
    if not dist.is_main():
        return []
    place = {e.id: n for n, e in enumerate(examples)}
    rows = [row for unit in range(len(units)) for row in work.get("responses", unit)]
    return sorted(rows, key=lambda row: (place[row["prompt_id"]], row["index"]))
