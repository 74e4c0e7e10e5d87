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
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from cream import dist, dpo, optim, shards, train
from cream.config import ModelConfig, OptimConfig, TrainConfig
from cream.log import Metrics, UserError, say
from cream.model import Resident, load, load_tokenizer
from cream.packing import batches
from cream.work import Work
from tests.conftest import write_model
from tests.test_dpo import pairs_of
from tests.test_tiny import arguments, rows, stages

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 2.0  # seconds; what a user has 60 of
PATIENCE = 20.0  # where no rank is to end, on a busy machine


# What a rank does, by name


def run_train(*argv: str) -> None:
    train.main(argv)


@contextlib.contextmanager
def ranks(timeout: float = PATIENCE):
    with dist.session():
        dist.connect(timeout)
        yield


def uneven() -> None:
    """Rank 1 takes twice the timeout for its work; nobody minds, and all end together."""
    with ranks(TIMEOUT):
        if dist.rank() == 1:
            time.sleep(2 * TIMEOUT)
        assert dist.gather(dist.rank()) == list(range(dist.size()))
        assert dist.agree("rank 0's" if dist.is_main() else None) == "rank 0's"
        assert dist.total(torch.ones(2)).tolist() == [dist.size()] * 2
        assert sum(dist.gather(len(dist.share(range(7))))) == 7


def ends(how: str, in_what: str) -> None:
    """Rank 1 ends in one way or another, while the others are in something that would not end by itself."""
    with ranks(TIMEOUT):
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


def descend(directory: str, model: str, pairs: str, options: str) -> None:
    """DPO on the pairs, into `directory`. Every state that is saved or loaded is written down whole, and for every
    pair that it was trained on; with `stop` this ends as soon as the state of a step is saved."""
    place, options, record = Path(directory), json.loads(options), []
    with ranks():
        settings = ModelConfig(dtype=options["dtype"], gradient_checkpointing=options.get("recompute", "none"))
        module = Resident(Path(model), settings).at(Path(model), gradients=True)
        assert dist.size() == 1 or all(shards.local(p).numel() < p.numel() for p in module.parameters())
        save, resume, step, loss_of = optim._save, optim._resume, optim.AdamW.step, dpo.loss_of

        def write_down(optimizer, name):
            whole = {}
            for key, tensor in optimizer.parts().items():
                plain = tensor.float().full_tensor() if isinstance(tensor, DTensor) else tensor  # gloo has no int16
                whole[key] = plain.to(tensor.dtype).clone()
            if dist.is_main():
                save_file(whole, place / f"{name}.safetensors")

        def saving(optimizer, keep, done, meta):
            save(optimizer, keep, done, meta)
            write_down(optimizer, "saved")
            if done == options.get("stop"):
                finish()
                raise SystemExit(3)

        def resuming(optimizer, keep):
            start = resume(optimizer, keep)
            write_down(optimizer, f"loaded-on-{dist.size()}")
            return start

        def stepping(optimizer):
            assert dist.size() == 1 or set(optimizer.sums.values()) == {1}  # one reduction, however many micro-batches
            return step(optimizer)

        def recording(module, pairs, beta):
            record.extend(pair["prompt_id"] for pair in pairs)
            return loss_of(module, pairs, beta)

        def finish():
            used = [name for of_rank in dist.gather(record) for name in of_rank]
            if dist.is_main():
                with open(place / "used", "a") as file:
                    file.writelines(f"{name}\n" for name in used)
            dist.gather(None)

        optim._save, optim._resume, optim.AdamW.step, dpo.loss_of = saving, resuming, stepping, recording
        config, compact = TrainConfig(**options["train"]), OptimConfig(**options.get("optim", {}))
        metrics = Metrics(place / "metrics.jsonl", writes=dist.is_main())
        rows, work = json.loads(Path(pairs).read_text()), Work(place / "work", ())
        dpo.train(module, rows, config, work, metrics, stage="iter1/train", seed=0, optim=compact)
        finish()


def saves(directory: str, model: str) -> None:
    """A sharded model whose weights were trained to be 1 is saved, as halfway through SFT, and then taken up."""
    place, settings = Path(directory), ModelConfig(dtype="float32", gradient_checkpointing="none")
    with ranks():
        resident = Resident(Path(model), settings)
        module = resident.at(Path(model), gradients=True)
        with torch.no_grad():
            for parameter in module.parameters():
                shards.local(parameter).fill_(1.0)
        for name in ("half", "whole"):
            resident.save(place / name, load_tokenizer(Path(model)), "M1", "M0", {})
            assert resident._model is None  # neither the trained one nor the one that was filled to be written
        assert all((parameter == 1).all() for parameter in resident.at(place / "whole").parameters())


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
    [("is killed", "computes"), ("is killed", "reduces"), ("fails", "reduces"), ("stops", "waits")],
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
    for size in (3,):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.max_prompt_tokens": "5"}, "no prompt is within data.max_prompt_tokens=5"),
        ({"lora.r": "4"}, "lora.r: adapters are trained by one process"),
    ],
)
def test_a_mistake_is_one_line_from_all_and_leaves_nothing(start, tiny, tmp_path, change, message):
    job = start(2, "run_train", *arguments(tiny, tmp_path / "run", **change))
    assert job.end() == [2, 2] and not (tmp_path / "run").exists()
    [error] = [line for line in job.said() if "error" in line]
    assert message in error


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(pairs_of(load(tiny, ModelConfig(dtype="float32")), agreement=0.9)))
    return path


def descent(start, directory: Path, size: int, model: Path, pairs: Path, code: int = 0, **options) -> list[dict]:
    directory.mkdir(exist_ok=True)
    job = start(size, "descend", *map(str, (directory, model, pairs)), json.dumps(options))
    assert job.end() == [code] * size, "\n".join(job.said())
    return rows(directory / "metrics.jsonl")


def test_losses_do_not_depend_on_the_number_of_ranks(start, tiny, pairs, tmp_path):
    """21 steps of 5 and 4 pairs in micro-batches of one to three: some of four ranks have none to do."""
    settings = {"lr": 3e-4, "epochs": 7, "batch_size": 5, "batch_tokens": 80, "beta": 1.0}
    options = {"dtype": "float32", "train": settings}
    alone = descent(start, tmp_path / "1", 1, tiny, pairs, **options)
    assert len(alone) == 21 and alone[-1]["loss"] < alone[0]["loss"] - 0.05
    for size, more in ((2, {}), (4, {"recompute": "full"})):
        found = descent(start, tmp_path / str(size), size, tiny, pairs, **options | more)
        for a, b in zip(alone, found, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5) and a["tokens"] == b["tokens"]
            for key in ("grad_norm", "rewards/margins", "sequence_forwards_per_prompt"):
                assert b[key] == pytest.approx(a[key], abs=1e-4), key


@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 4), (1, 2)])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(start, wide, pairs, tmp_path, first, then):
    """bfloat16 weights with their low bits and 8-bit moments: loaded as they were saved, and every pair used once."""
    train = {"lr": 1e-4, "epochs": 1, "batch_size": 5, "batch_tokens": 1, "checkpoint_every": 1}
    options = {"dtype": "bfloat16", "optim": {"moments": "int8"}, "train": train | {"batch_tokens": 200}}
    descent(start, tmp_path, first, wide, pairs, code=3, stop=2, **options)
    saved = load_file(tmp_path / "saved.safetensors")
    assert len(rows(tmp_path / "metrics.jsonl")) == 2 and any(t.dtype == torch.int8 for t in saved.values())
    found = descent(start, tmp_path, then, wide, pairs, **options)
    loaded = load_file(tmp_path / f"loaded-on-{then}.safetensors")
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert [row["step"] for row in found] == [1, 2, 3]
    used = (tmp_path / "used").read_text().split()
    assert len(set(used)) == 13 and (len(used) == 13 or then == 4)


@pytest.fixture(scope="module")
def wide(tokenizer, tmp_path_factory) -> Path:
    """A model whose rows are whole blocks of the optimizer's moments, and no number of ranks divides its vocabulary."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": len(tokenizer) + 4}
    return write_model(tmp_path_factory.mktemp("wide"), tokenizer, seed=0, **shape)


def test_the_state_before_the_first_step_is_one_processes(start, wide, pairs, tmp_path):
    train = {"lr": 1e-4, "batch_size": 13, "batch_tokens": 4000, "warmup": 0.0}
    for size in (1, 4):
        options = {"dtype": "bfloat16", "optim": {"moments": "int8"}, "train": train}
        descent(start, tmp_path, size, wide, pairs, **options)
    one, four = (load_file(tmp_path / f"loaded-on-{size}.safetensors") for size in (1, 4))
    assert one.keys() == four.keys() and all(torch.equal(one[name], four[name]) for name in one)
    assert any(name.startswith("low/") and tensor.any() for name, tensor in one.items())


def test_no_whole_copy_is_left_when_a_sharded_model_is_saved(start, tiny, tmp_path):
    job = start(2, "saves", str(tmp_path), str(tiny))
    assert job.end() == [0, 0], "\n".join(job.said())
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert all((tensor == 1).all() for tensors in (half, whole) for tensor in tensors.values())


def test_ranks_have_as_many_micro_batches_and_every_pair_once():
    for count, budget, size in ((13, 30, 1), (13, 30, 2), (13, 30, 4), (1, 30, 4), (7, 3, 3), (16, 1000, 8)):
        made = batches([1 + 7 * i % 11 for i in range(count)], budget, size)
        assert len(made) % size == 0 and sorted(i for batch in made for i in batch) == list(range(count))
        assert made == batches([1 + 7 * i % 11 for i in range(count)], budget) or size > 1


def test_blocks_that_ranks_would_cut_are_refused(start, tiny, pairs, tmp_path):
    options = {"dtype": "bfloat16", "optim": {"moments": "int8"}, "train": {"batch_size": 13, "warmup": 0.0}}
    job = start(2, "descend", *map(str, (tmp_path, tiny, pairs)), json.dumps(options))
    assert job.end() == [2, 2]
    [error] = [line for line in job.said() if "error" in line]
    assert "optim.moments int8: model.embed_tokens.weight, 264 x 32, does not divide into blocks of 256" in error


@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's ranks in /proc")
def test_a_killed_rank_of_torchrun_ends_the_run_which_goes_on(start, tiny, tmp_path):
    """Killed twice: torchrun was told to restart the ranks once, and does; then it ends, and one process goes on."""
    changes = {"run.iterations": "1", "train.epochs": "20", "evaluate.enabled": "false"}
    command = arguments(tiny, tmp_path / "run", "--resume", **changes)
    launcher = (
        "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --max-restarts 1 --nproc-per-node 2".split()
    )
    torchrun = subprocess.Popen(
        [sys.executable, *launcher, "-m", "cream.train", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd=ROOT,
    )
    keep = tmp_path / "run/.work/iter1+train/keep/steps"

    def step() -> int:
        return max((int(path.name[5:]) for path in keep.glob("step-??????")), default=0)

    try:
        reached = 0
        for _ in range(2):
            while step() <= reached:
                assert torchrun.poll() is None
                time.sleep(0.01)
            workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(workers[1]), signal.SIGKILL)
            time.sleep(0.5)  # what rank 0 had in hand
            reached = step()
        killed = time.monotonic()
        torchrun.wait(timeout=60)
        assert torchrun.returncode != 0 and time.monotonic() - killed < 60
    finally:
        torchrun.kill()
        torchrun.wait()
    assert "iter1/train" not in stages(tmp_path / "run")
    steps = len(rows(tmp_path / "run/metrics.jsonl"))
    job = start(1, "run_train", *command)
    assert job.end() == [0], "\n".join(job.said())
    found = [r["step"] for r in rows(tmp_path / "run/metrics.jsonl") if r["stage"] == "iter1/train"]
    assert found == list(range(1, len(found) + 1)) and len(found) > steps
    assert stages(tmp_path / "run") == ["prompts", "sft", "iter1/sample", "iter1/score", "iter1/rank", "iter1/train"]


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "_ranks", types.SimpleNamespace(timeout=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="local rank 1 has no GPU of 1 here: --nproc-per-node 1 at most"):
        dist.connect(1.0)


if __name__ == "__main__":
    serve()
