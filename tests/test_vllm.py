"""The vLLM engine against a server on this machine's loopback that speaks vLLM's protocol."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cream import vllm
from cream.config import ModelConfig, SampleConfig
from cream.log import UserError
from cream.model import load
from cream.sample import generate, stream
from cream.train import main
from tests.test_tiny import arguments, rows, stages

END = 2  # a stop token


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(vllm, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def serving(root, answer, *, card=None):
    """A server for one model: `answer(body)` gives a choice, or (status, text) to say instead. Yields url, bodies."""
    bodies, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v1/models"
            self.reply(
                200, {"object": "list", "data": [{"id": str(root), "root": str(root)} if card is None else card]}
            )

        def do_POST(self):
            assert self.path == "/v1/completions" and self.headers["Content-Type"] == "application/json"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                bodies.append(body)
                found = answer(body)
            if isinstance(found, tuple):
                return self.reply(*found)
            self.reply(200, {"object": "text_completion", "model": body["model"], "choices": [found]})

        def reply(self, status, content):
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def choice(body, ids=None, **changes):
    """An answer that depends on prompt and seed, ended by END where it is not cut."""
    length = body["seed"] % body["max_tokens"] + 1
    ids = [*((body["seed"] + n) % 50 + 10 for n in range(length - 1)), END] if ids is None else ids
    return {
        "index": 0,
        "text": "",
        "token_ids": ids,
        "prompt_token_ids": body["prompt"],
        "logprobs": {"token_logprobs": [-0.5 * n for n in range(len(ids))], "tokens": [], "top_logprobs": []},
        "finish_reason": "stop" if ids and ids[-1] == END else "length",
        "stop_reason": None,
    } | changes


def ask(url, prompts=((5, 6, 7),), seeds=(1, 2), limits=(9,), **changes):
    config = SampleConfig(responses=2, **changes)
    return vllm.complete(url, "m", prompts, seeds, config, limits=limits, stop=[END])


def test_token_ids_go_in_and_come_out_in_order_each_with_its_seed():
    prompts, seeds, ticks = [[5, 6, 7], [8], [9, 9]], [11, 12, 21, 22, 31, 2**62], []
    with serving("m", choice) as (url, bodies):
        config = SampleConfig(responses=2, temperature=0.7, top_p=0.9)
        found = vllm.complete(
            url + "/v1/", "m", prompts, seeds, config, limits=[9, 5, 30], stop=[END, 3], tick=ticks.append
        )
    assert sum(ticks) == 6 and sorted(body["seed"] for body in bodies) == seeds
    for n, (ids, finish, logp) in enumerate(found):
        body = next(body for body in bodies if body["seed"] == seeds[n])
        assert ids == choice(body)["token_ids"] and finish == "stop" and logp == [-0.5 * i for i in range(len(ids))]
        assert body["prompt"] == prompts[n // 2] and body["max_tokens"] == [9, 5, 30][n // 2] and body["model"] == "m"
        assert (body["temperature"], body["top_p"], body["top_k"], body["n"]) == (0.7, 0.9, 0, 1)
        assert body["return_token_ids"] is True and body["logprobs"] == 1 and body["stop_token_ids"] == [END, 3]


def test_seeds_are_of_the_response_alone():
    seeds = [vllm.seed_of(0, 1, "a", 0), vllm.seed_of(1, 1, "a", 0), vllm.seed_of(0, 2, "a", 0)]
    seeds += [vllm.seed_of(0, 1, "b", 0), vllm.seed_of(0, 1, "a", 1)]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == vllm.seed_of(0, 1, "a", 0)


def test_a_server_of_another_model_is_refused(tmp_path):
    here, link = tmp_path / "m2", tmp_path / "link"
    here.mkdir()
    link.symlink_to(here)
    for card in ({"id": "policy", "root": str(here)}, {"id": str(link)}, {"id": "policy", "root": str(link)}):
        with serving(None, choice, card=card) as (url, _):
            assert vllm.check(url, here) == card["id"]
    with serving("/models/m1", choice) as (url, _), pytest.raises(UserError) as refused:
        vllm.check(url, here)
    assert f"serves /models/m1, but this iteration samples from {here}; restart it with `vllm serve {here}`" in str(
        refused.value
    )
    with serving(None, choice, card={"name": "x"}) as (url, _), pytest.raises(UserError, match="as vLLM does"):
        vllm.check(url, here)


def test_a_busy_server_is_asked_again(capsys):
    said = iter([(503, "loading"), (429, ""), (500, "oops")])
    with serving("m", lambda body: next(said, None) or choice(body)) as (url, bodies):
        assert len(ask(url)) == 2
    assert len(bodies) == 5 and "HTTP 503, loading; attempt 2 of 4" in capsys.readouterr().err


def test_no_server_is_one_line():
    with serving("m", choice) as (url, _):
        pass
    with pytest.raises(UserError, match=r"refused \(tried 4 times\); is `vllm serve` running there\?$"):
        ask(url)


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            lambda body: (400, '{"error": "max_tokens\n is too large"}'),
            r'HTTP 400, {"error": "max_tokens is too large"}',
        ),
        (lambda body: (200, "<html>"), "no JSON"),
        (lambda body: (200, "[]"), "without token ids and log-probs"),
        (lambda body: choice(body, token_ids=None), "return_token_ids since"),
        (lambda body: choice(body, logprobs=None), "without token ids and log-probs"),
        (lambda body: choice(body, [4] * 10), "finish_reason 'length', 10 tokens"),
        (lambda body: choice(body, []), "0 tokens"),
        (lambda body: choice(body, [-1]), "1 tokens"),
        (lambda body: choice(body, [4, END], finish_reason="abort"), "finish_reason 'abort'"),
        (lambda body: choice(body, [4, 5], finish_reason="stop"), "ends an answer by stop with token 5"),
        (lambda body: choice(body, [END, 5]), "ends an answer by length with token 5"),
        (lambda body: choice(body, [4, 5], logprobs={"token_logprobs": [0.0]}), "2 tokens, 1 log-probs"),
        (lambda body: choice(body, [4], logprobs={"token_logprobs": [float("nan")]}), "finish_reason 'length'"),
        (lambda body: choice(body, prompt_token_ids=[6, 7]), "is its prompt truncated"),
    ],
)
def test_what_is_no_answer_is_refused_in_one_line(answer, message):
    with serving("m", answer) as (url, _), pytest.raises(UserError) as refused:
        ask(url)
    assert message in str(refused.value) and "\n" not in str(refused.value) and url in str(refused.value)


def test_adapters_and_odd_addresses_are_refused_before_anything_is_opened(tiny, tmp_path, capsys):
    for changes, message in (
        ({"lora.r": "4"}, "sample.engine vllm needs lora.r 0"),
        ({"sample.url": "localhost:8000"}, "must be an address that begins with http:// or https://"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments(tiny, tmp_path / "run", **{"sample.engine": "vllm"} | changes))
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_round_by_vllm(tiny, tmp_path, capsys):
    """The server computes with the model that it says it serves, so engine and trainer agree."""
    run, loaded = tmp_path / "run", {}
    policy = run / "sft/model"

    def answer(body):
        if "model" not in loaded:
            loaded["model"] = load(Path(body["model"]), ModelConfig(path=body["model"], dtype="float32"))
        uniform = stream(body["seed"], 0, "", 0, body["max_tokens"])[None]
        [found] = generate(
            loaded["model"],
            [body["prompt"]],
            uniform,
            max_new_tokens=body["max_tokens"],
            stop=body["stop_token_ids"],
            record=True,
        )
        return choice(body, found.ids, logprobs={"token_logprobs": found.logp}, finish_reason=found.finish)

    def start(*more, until, url="http://127.0.0.1:9"):
        options = {"sample.engine": "vllm", "sample.url": url, "evaluate.enabled": "false"}
        main(arguments(tiny, run, *more, **options), until=until)

    with serving(tiny, answer) as (url, bodies), pytest.raises(SystemExit) as stop:
        start(until="iter1/sample", url=url)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and not bodies
    assert f"serves {tiny}, but this iteration samples from {policy.resolve()}; restart it" in error
    with serving(policy, answer) as (url, bodies):
        start("--resume", until="iter1/sample", url=url)
    answers = rows(run / "iter1/responses.jsonl")
    assert len(bodies) == len(answers) and all(len(row["ids"]) == len(row["engine_logp"]) for row in answers)
    assert len({tuple(row["ids"]) for row in answers}) > len(answers) // 2
    start("--resume", until="iter1/score")  # the server is gone, its address another: sampling is done all the same
    tokens = sum(len(row["ids"]) for row in answers)
    facts = {row["stage"]: row["facts"] for row in rows(run / "ledger.jsonl")}["iter1/score"]
    assert facts["engine_gap_tokens"] == tokens and facts["engine_gap_mean"] <= facts["engine_gap_max"] < 1e-5
    assert f"at most ({tokens} tokens compared)" in capsys.readouterr().err
    assert stages(run) == ["prompts", "sft", "iter1/sample", "iter1/score"]
