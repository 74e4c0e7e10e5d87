"""Sampling: R answers to each prompt from the policy, token by token, each from a random stream of its own.

P prompts, R responses a prompt, S = P * R sequences (prompt-major), A of them decoded at once, D hidden size, V
vocabulary; T tokens of a prompt, K kv heads, E head size.

The token that response (prompt, index) draws at step n depends on the seed, the iteration, the prompt's id, the index
and n, on nothing else: not on the order of prompts, on the batch that they are in or on a restart. (Logits themselves
can differ in their last bit between batch shapes; so batches follow from the input, not from what is left to do.)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cream import dist, vllm
from cream.attention import Segments
from cream.cache import KeyValues
from cream.config import SampleConfig
from cream.data import Example, encode_prompt
from cream.decode import Decoder, capturable
from cream.log import UserError, progress
from cream.model import context_length, head, hidden_states, stop_ids
from cream.upload import send, upload
from cream.work import Work
from cream_kernels import gather_logp, linear_logp_native, top_p_sample

SPARE = 16  # prompts are computed when one slot of so many is free: a few together, and few slots idle meanwhile
RECORDED = 16  # of so many responses, one has its log-probs kept: a pass over its logits, 3% of a step if all had it


@dataclass(frozen=True)
class Response:
    ids: list[int]  # the sampled tokens, the end-of-text token included where there is one
    finish: str  # "stop": ended by itself; "length": cut off
    logp: list[float] | None = None  # nats a token before temperature and top-p, where the engine said them


def stream(seed: int, iteration: int, prompt_id: str, index: int, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) for one response: Philox, a counter-based generator, keyed by a hash of the names."""
    name = f"{seed}/{iteration}/{prompt_id}/{index}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


@dataclass(frozen=True)
class Prefilled:
    """A prompt that was computed."""

    hidden: Tensor  # (1, D) at its last token
    kept: dict[int, tuple[Tensor, Tensor]]  # layer -> keys (T, K, E), values (T, K, E)


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Prefilled]:
    """Compute prompts side by side, without padding."""
    device = head(model).device
    lengths = [len(prompt) for prompt in prompts]
    segments = Segments.of(lengths, range(len(prompts)), [0] * len(prompts), device)
    ids, positions = upload(device, *([t for row in rows for t in row] for rows in (prompts, map(range, lengths))))
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    hidden = hidden_states(model, ids[None], positions[None], segments=segments, kept=kept)[0]
    ends = np.cumsum(lengths).tolist()
    return [
        Prefilled(
            hidden[end - 1 : end], {layer: (k[end - n : end], v[end - n : end]) for layer, (k, v) in kept.items()}
        )
        for n, end in zip(lengths, ends, strict=True)
    ]


def logits_of(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
) -> Tensor:  # (A, V) float32 or the weight's dtype
    """hidden @ weight.T, of bfloat16 in float32 where that costs no more, as scoring has it."""
    if linear_logp_native.why_not(hidden, weight) is not None:
        return hidden @ weight.T
    logits = torch.empty(len(hidden), len(weight))
    linear_logp_native.multiply_bf16(hidden, weight.T, logits)
    return logits


def limits(prompts: Sequence[Sequence[int]], context: int, most: int) -> list[int]:
    """How many tokens an answer to each prompt may have. Raises UserError for a prompt that fills the context."""
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room for an answer in a context of {context}")
    return [min(most, context - len(prompt)) for prompt in prompts]


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
    slots: int | None = None,  # sequences decoded at once, default all
    cuda_graphs: bool = True,  # whether a GPU decodes by CUDA graphs
    record: bool = False,  # whether every RECORDED-th response tells its log-probs
    tick: Callable[[int], None] = lambda finished: None,  # told how many sequences have just ended
) -> list[Response]:  # S, prompt-major
    """R continuations of each prompt, in order as slots become free: a finished answer leaves the batch at once and its
    slot goes to the next. A prompt is computed once for all its responses.

    Raises UserError for a prompt that fills the model's context.
    """
    weight, R, S = head(model), responses, len(prompts) * responses
    limit = limits(prompts, context_length(model), max_new_tokens)
    slots = min(slots or S, S)
    cache = KeyValues(slots, max(len(p) + n for p, n in zip(prompts, limit, strict=True)), weight.device)
    decoder = Decoder(model, cache, graphs=cuda_graphs and weight.is_cuda and capturable(model))
    stops = set(stop)
    answers: list[list[int]] = [[] for _ in range(S)]
    logp: dict[int, list[float]] = {s: [] for s in range(0, S, RECORDED)} if record else {}
    live: list[int] = []  # the sequences in the batch, row by row
    slot_of: dict[int, int] = {}
    free = list(range(slots))
    ready: dict[int, Prefilled] = {}
    computed = admitted = 0  # prompts, sequences
    hidden = weight.new_empty(0, weight.shape[1])  # (A, D)

    while live or admitted < S:
        if free and computed < len(prompts) and (not live or SPARE * len(free) >= slots):
            wanted = range(computed, min(len(prompts), -(-(admitted + len(free)) // R)))
            if wanted:
                ready |= zip(wanted, prefill(model, [prompts[p] for p in wanted]), strict=True)
                computed = wanted.stop
        new = range(admitted, min(admitted + len(free), computed * R))
        for p, members in groupby(new, lambda s: s // R):
            members = list(members)
            slot_of |= {s: free.pop(0) for s in members}
            cache.fill([slot_of[s] for s in members], ready[p].kept)
            hidden = torch.cat([hidden, ready[p].hidden.expand(len(members), -1)])
            if members[-1] == p * R + R - 1:
                del ready[p]
        live += new
        admitted = new.stop

        step = [len(answers[s]) for s in live]
        draws = np.zeros(len(live)) if uniform is None else uniform[live, step]
        draws = send(torch.from_numpy(draws), weight.device)
        logits = logits_of(hidden, weight)
        token = top_p_sample(
            logits,
            draws,
            temperature=0.0 if uniform is None else temperature,
            top_p=top_p,
        )
        if told := [row for row, s in enumerate(live) if s in logp]:
            [at] = upload(weight.device, told)
            for row, value in zip(told, gather_logp(logits[at], token[at]).tolist(), strict=True):
                logp[live[row]].append(value)
        going = []
        for row, (s, drawn) in enumerate(zip(live, token.tolist(), strict=True)):
            answers[s].append(drawn)
            if drawn in stops or len(answers[s]) == limit[s // R]:
                free.append(slot_of.pop(s))
            else:
                going.append(row)
        tick(len(live) - len(going))
        live = [live[row] for row in going]
        if not live:
            hidden = hidden[:0]
            continue
        if admitted == S and cache.idles and 4 * len(free) >= cache.slots:
            cache.shrink([slot_of[s] for s in live])
            slot_of, free = {s: row for row, s in enumerate(live)}, []
        length = [len(prompts[s // R]) + len(answers[s]) for s in live]
        first: dict[int, int] = {}  # prompt -> the slot that its columns are read from
        source = [first.setdefault(s // R, slot_of[s]) for s in live]
        [rows] = upload(weight.device, going)
        shared = [len(prompts[s // R]) for s in live]
        hidden = decoder.step(token[rows], [slot_of[s] for s in live], source, shared, length)

    return [
        Response(answer, "stop" if answer[-1] in stops else "length", logp.get(s)) for s, answer in enumerate(answers)
    ]


def sample(
    model: nn.Module,  # the policy; with engine vllm its configuration is looked at, not its weights
    tokenizer,
    examples: Sequence[Example],
    config: SampleConfig,
    work: Work,
    *,
    seed: int,
    iteration: int,
    checkpoint: Path | None = None,  # what a server must serve, with engine vllm
) -> list[dict]:  # rows of responses.jsonl, one a response, prompts in the order given; [] on ranks other than 0
    """Draw `config.responses` answers to each example.

    The unit of resume, and of sharing between ranks, is a chunk of `config.chunk_size` prompts of like length, decoded
    `config.batch_size` at once. So the answers depend on neither.
    """
    prompts = [encode_prompt(tokenizer, e.messages) for e in examples]
    stop = stop_ids(model, tokenizer)
    order = sorted(range(len(examples)), key=lambda i: (len(prompts[i]), examples[i].id))
    units = [order[i : i + config.chunk_size] for i in range(0, len(order), config.chunk_size)]
    R, most = config.responses, config.max_new_tokens
    drawn, started = 0, time.perf_counter()
    todo = list(work.parts("responses", len(units)))
    served = vllm.check(config.url, checkpoint) if todo and config.engine == "vllm" else None
    mine = R * sum(len(units[unit]) for unit in todo)
    whole = R * len(examples) if dist.size() == 1 else mine  # of several ranks each shows its own part
    with progress(whole, f"iter{iteration}/sample", "responses", done=whole - mine) as bar:
        for unit in todo:
            members = units[unit]
            asked = [prompts[i] for i in members]
            names = [(seed, iteration, examples[i].id, r) for i in members for r in range(R)]
            if served is not None:
                found = vllm.complete(
                    config.url,
                    served,
                    asked,
                    [vllm.seed_of(*name) for name in names],
                    config,
                    limits=limits(asked, context_length(model), most),
                    stop=stop,
                    tick=bar.update,
                )
                answers = [Response(*answer) for answer in found]
            else:
                answers = generate(
                    model,
                    asked,
                    np.stack([stream(*name, most) for name in names]),
                    responses=R,
                    max_new_tokens=most,
                    stop=stop,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    slots=config.batch_size * R,
                    cuda_graphs=config.cuda_graphs,
                    record=True,
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
                    "engine_logp": answers[n * R + r].logp,
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
