"""vLLM as the engine that samples: its OpenAI-compatible server over HTTP, token ids in and out.

P prompts, R responses a prompt.

The server is the user's and serves one checkpoint, the path that it was started with: `vllm serve DIRECTORY`. Before
sampling, GET /v1/models must name the checkpoint that this iteration samples from (as `root` or `id`); otherwise the
run stops and says what to start. vLLM's weights are not changed over HTTP: its endpoints for that exist in its
development mode alone, and after them /v1/models still names the old path.

Responses are seeded, each by its own names, but which tokens come out depends on vLLM's version, hardware and batches.
Log-probs are the model's own, before temperature, unless the server was started with another --logprobs-mode.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cream.config import SampleConfig
from cream.log import UserError, say

TIMEOUT = 600  # seconds that one prompt's responses may take
ATTEMPTS = 4  # of a request that the server did not answer, or answered with 429 or 5xx
PAUSE = 1.0  # seconds before the second attempt; twice as many before each further one
SHOWN = 200  # characters of what the server said


def check(url: str, checkpoint: Path) -> str:
    """The name by which the server at `url` calls `checkpoint`. Raises UserError where it serves another model."""
    found = _request(url, "/v1/models", None)
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise UserError(f"sample.url: {url} does not answer /v1/models as vLLM does")
    wanted = os.path.realpath(checkpoint)
    for card in cards:
        if wanted in (os.path.realpath(str(card[key])) for key in ("root", "id") if card.get(key)):
            return str(card["id"])
    served = ", ".join(str(card.get("root") or card["id"]) for card in cards) or "nothing"
    raise UserError(
        f"sample.url: {url} serves {served}, but this iteration samples from {wanted}; restart it with "
        f"`vllm serve {wanted}`, then start again with --resume"
    )


def seed_of(seed: int, iteration: int, prompt_id: str, index: int) -> int:
    """A seed below 2^63 for one response: a hash of its names."""
    name = f"{seed}/{iteration}/{prompt_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def complete(
    url: str,
    model: str,  # what `check` returned
    prompts: Sequence[Sequence[int]],  # P prompts, token ids
    seeds: Sequence[int],  # P * R, prompt-major
    config: SampleConfig,
    *,
    limits: Sequence[int],  # P, tokens that an answer may have
    stop: Sequence[int],  # token ids that end an answer
    tick: Callable[[int], None] = lambda finished: None,
) -> list[tuple[list[int], str, list[float]]]:  # P * R of (token ids, "stop" or "length", nats a token)
    """R continuations of each prompt, a request each so that each has its seed; vLLM computes a prompt once for them.

    Raises UserError in one line where the server cannot be reached, refuses, or answers with something else.
    """
    requests = [
        {
            "model": model,
            "prompt": list(prompts[n // config.responses]),
            "n": 1,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": 0,  # these four would otherwise be the server's, from the model's generation_config.json
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": limits[n // config.responses],
            "seed": seed,
            "stop_token_ids": list(stop),
            "logprobs": 1,
            "return_token_ids": True,
        }
        for n, seed in enumerate(seeds)
    ]
    answers = []
    with ThreadPoolExecutor(max(1, min(len(requests), config.batch_size * config.responses))) as pool:
        pending = [pool.submit(_request, url, "/v1/completions", body) for body in requests]
        try:
            for body, future in zip(requests, pending, strict=True):
                answers.append(_answer(url, future.result(), body))
                tick(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers


def _answer(url: str, found: object, body: dict) -> tuple[list[int], str, list[float]]:
    """The one choice of a response, looked at closely: what is learnt from must be what was asked for."""
    try:
        [choice] = found["choices"]
        ids, finish, logp = choice["token_ids"], choice["finish_reason"], choice["logprobs"]["token_logprobs"]
        whole = all(type(token) is int and token >= 0 for token in ids) and 0 < len(ids) <= body["max_tokens"]
        sound = whole and len(logp) == len(ids) and all(math.isfinite(x) and x <= 1e-3 for x in logp)
        echoed = choice.get("prompt_token_ids")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"sample.url: {url} answers without token ids and log-probs ({type(error).__name__}: {error}); "
            "vLLM knows return_token_ids since 0.10.2"
        ) from None
    if finish not in ("stop", "length") or not sound:
        raise UserError(
            f"sample.url: {url} answers with finish_reason {finish!r}, {len(ids)} tokens, {len(logp)} log-probs"
        )
    if echoed is not None and echoed != body["prompt"]:
        raise UserError(f"sample.url: {url} answers another prompt than it was asked: is its prompt truncated?")
    ended = ids[-1] in body["stop_token_ids"]
    if ended != (finish == "stop") or any(token in body["stop_token_ids"] for token in ids[:-1]):
        raise UserError(
            f"sample.url: {url} ends an answer by {finish} with token {ids[-1]}: another end-of-text token?"
        )
    return ids, finish, logp


def _request(url: str, path: str, body: dict | None) -> object:
    """What the server answers, as JSON. A request is made again where another attempt may help."""
    address, reason = url.rstrip("/").removesuffix("/v1") + path, ""
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
            say(f"{address}: {reason}; attempt {attempt + 1} of {ATTEMPTS}")
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())[:SHOWN]
            reason = f"HTTP {error.code}" + (f", {said}" if said else "")
            if error.code != 429 and error.code < 500:
                raise UserError(f"sample.url: {address}: {reason}") from None
        except ValueError as error:
            raise UserError(f"sample.url: {address} answers with what is no JSON ({error})") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off in the middle
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
    raise UserError(f"sample.url: {address}: {reason} (tried {ATTEMPTS} times); is `vllm serve` running there?")
