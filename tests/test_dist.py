"""Several ranks: the results of one, the work shared, and a dead, failing or silent rank ends all of them in time.

Run as a program, this file is a server that imports everything once and forks the ranks of each order, which is quicker
than to start them; one test goes through torchrun itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cream import dist, train
from cream.log import UserError, say
from tests.test_tiny import arguments, rows

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 2.0  # seconds; what a user has 60 of


# What a rank does, by name


def run_train(*argv: str) -> None:
    train.main(argv)


@contextlib.contextmanager
def ranks():
    with dist.session():
        dist.connect(TIMEOUT)
        yield


def uneven() -> None:
    """Rank 1 takes twice the timeout for its work; nobody minds, and all end together."""
    with ranks():
        if dist.rank() == 1:
            time.sleep(2 * TIMEOUT)
        assert dist.gather(dist.rank()) == list(range(dist.size()))
        assert dist.agree("rank 0's" if dist.is_main() else None) == "rank 0's"
        assert dist.total(torch.ones(2)).tolist() == [dist.size()] * 2
        assert sum(dist.gather(len(dist.share(range(7))))) == 7


def ends(how: str, in_what: str) -> None:
    """Rank 1 ends in one way or another, while the others are in something that would not end by itself."""
    with ranks():
        dist.total(torch.ones(1))
        if dist.rank() == 1:
            time.sleep(0.5)
            if how == "fails":
                raise UserError("rank 1 found a mistake")
            os.kill(os.getpid(), {"is killed": signal.SIGKILL, "stops": signal.SIGSTOP}[how])
        say("not said by all")
        {"waits": lambda: dist.gather(1), "reduces": lambda: dist.total(torch.ones(1)), "computes": compute}[in_what]()


def compute() -> None:
    while True:
        torch.ones(100, 100) @ torch.ones(100, 100)


# The server


def serve() -> None:
    for name in ("datasets", "jinja2", "matplotlib.figure", "numba", "pyarrow.parquet", "tabulate"):
        importlib.import_module(name)  # all that a run imports late, once
    importlib.import_module("transformers.models.llama.modeling_llama")

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(order["size"]):
            children.append(os.fork())
            if children[-1] == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(order["size"]), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"MASTER_PORT": str(order["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
                os.dup2(os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                globals()[order["do"]](*order["arguments"])
                os._exit(0)
        print(json.dumps(children), flush=True)
        codes = {}
        while len(codes) < len(children):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            print(json.dumps([children.index(child), codes[child]]), flush=True)


class Ranks:
    """The ranks of one order to the server."""

    def __init__(self, server: subprocess.Popen, output: Path, size: int, do: str, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server, self.output = server, output
        order = {"size": size, "do": do, "arguments": arguments, "port": port, "output": str(output)}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        self.processes = json.loads(server.stdout.readline())
        self.codes: dict[int, int] = {}
        self.started = time.monotonic()

    def end(self) -> list[int]:
        """The exit codes, -9 for the killed, once all have ended."""
        while len(self.codes) < len(self.processes):
            rank, code = json.loads(self.server.stdout.readline())
            self.codes[rank] = code
        self.seconds = time.monotonic() - self.started
        return [self.codes[rank] for rank in range(len(self.processes))]

    def end_of(self, rank: int) -> int:
        while rank not in self.codes:
            found, code = json.loads(self.server.stdout.readline())
            self.codes[found] = code
        return self.codes[rank]

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank], signal.SIGKILL)

    def said(self) -> list[str]:
        return [line for line in self.output.read_text().splitlines() if not line.startswith("[W")]


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    own |= {"NUMBA_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    return os.environ | own | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, str(Path(__file__).resolve())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes, text=True, env=environment(), cwd=ROOT)
    assert process.stdout.readline().strip() == "ready"
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def start(server, tmp_path):
    count = iter(range(100))
    return lambda size, do, *arguments: Ranks(server, tmp_path / f"said{next(count)}", size, do, *arguments)


def test_alone_nothing_is_distributed():
    with dist.session():
        dist.connect(60)
        assert not torch.distributed.is_initialized()
        assert (dist.size(), dist.rank(), dist.is_main()) == (1, 0, True)
        assert dist.gather({"a": 1}) == [{"a": 1}] and dist.agree(3) == 3 and dist.share("abc") == list("abc")


def test_unequal_work_is_waited_for(start):
    job = start(3, "uneven")
    assert job.end() == [0, 0, 0] and job.said() == []
    assert job.seconds > 2 * TIMEOUT


@pytest.mark.parametrize(
    ("how", "in_what"),
    [("is killed", "computes"), ("is killed", "reduces"), ("fails", "waits"), ("fails", "reduces"), ("stops", "waits")],
)
def test_a_rank_that_ends_ends_all_in_time(start, how, in_what):
    job = start(3, "ends", how, in_what)
    if how == "stops":
        others = [job.end_of(0), job.end_of(2)]
        job.kill(1)
    codes = job.end()
    errors = [line for line in job.said() if line != "not said by all"]
    assert job.seconds < 4 * TIMEOUT + 2
    if how == "fails":
        assert codes == [2, 2, 2] and errors == ["rank 1: error: rank 1 found a mistake"]
    else:
        assert codes[1] == -signal.SIGKILL and {codes[0], codes[2]} == {1} and len(errors) == 1, (codes, errors)
        assert "start again with --resume" in errors[0]
    if how == "stops":
        assert others == [1, 1]


GIVEN = {"sft.enabled": "false", "run.iterations": "1", "sample.batch_size": "2", "evaluate.batch_size": "2"}
GIVEN |= {"score.chunk_size": "1"}


def test_answers_scores_and_accuracies_are_one_process_to_the_last_bit(start, tiny, other, tmp_path):
    given = GIVEN | {"sft.path": str(other)}
    train.main(arguments(tiny, tmp_path / "1", **given))
    for size in (2, 4):
        job = start(size, "run_train", *arguments(tiny, tmp_path / str(size), **given))
        assert job.end() == [0] * size, job.said()
        for name in ("iter1/responses.jsonl", "iter1/scores.parquet", "iter1/pairs.jsonl", "eval/m0.jsonl"):
            assert (tmp_path / str(size) / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name
        facts = [
            {row["stage"]: row["facts"].get("tokens") for row in rows(tmp_path / n / "ledger.jsonl")}
            for n in ("1", str(size))
        ]
        assert facts[0] == facts[1]
        assert {row["prompt_id"] for row in rows(tmp_path / "1/iter1/responses.jsonl")} == {
            row["id"] for row in rows(tmp_path / "1/prompts/iter1.jsonl")
        }


def test_a_mistake_is_one_line_from_all_and_leaves_nothing(start, tiny, tmp_path):
    job = start(2, "run_train", *arguments(tiny, tmp_path / "run", **{"data.max_prompt_tokens": "5"}))
    assert job.end() == [2, 2] and not (tmp_path / "run").exists()
    [error] = [line for line in job.said() if "error" in line]
    assert "no prompt is within data.max_prompt_tokens=5" in error


if __name__ == "__main__":
    serve()
