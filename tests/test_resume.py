"""kill -9 at random moments of a whole run: it goes on, and ends in the very weights of a run that was left alone.

One helper process imports everything once and forks a child for each start, so that kills fall into stages and not into
imports. It uses one thread and no OpenMP region before forking.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.test_tiny import LOOP, arguments, rows, same, stages

KILLS = 10
ROOT = Path(__file__).resolve().parents[1]

FORKS = """
import os, sys, json
import torch
torch.set_num_threads(1)
from cream import report, train  # noqa: everything that a run imports late is imported here, once
import datasets, matplotlib.figure, numba, pyarrow.parquet, transformers.models.llama.modeling_llama, jinja2, tabulate
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main(json.loads(line))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(helper, argv: list[str]) -> int:
    import json

    helper.stdin.write(json.dumps(argv) + "\n")
    helper.stdin.flush()
    return int(helper.stdout.readline())


def outcome(helper) -> int:
    return int(helper.stdout.readline())


def in_hand(directory: Path) -> str:
    """The stage that was being made, from its work directory; "between" where none was."""
    work = directory / ".work"
    return next((p.name.replace("+", "/") for p in work.iterdir()), "between") if work.is_dir() else "between"


def ledger(directory: Path) -> str:
    path = directory / "ledger.jsonl"
    return path.read_text() if path.exists() else ""


def test_ten_kills_change_nothing(tiny, tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    helper = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    try:
        assert helper.stdout.readline().strip() == "ready"
        start(helper, arguments(tiny, tmp_path / "whole"))
        assert outcome(helper) == 0
        seconds = {row["stage"]: row["facts"]["seconds"] for row in rows(tmp_path / "whole/ledger.jsonl")}

        broken, rng, killed_in = tmp_path / "broken", random.Random(0), []
        for target in sorted(rng.sample(LOOP, KILLS), key=LOOP.index):
            child = start(helper, arguments(tiny, broken, "--resume"))
            while in_hand(broken) != target and f'"{target}"' not in ledger(broken):
                time.sleep(0.0005)
            time.sleep(rng.random() * seconds[target])
            killed_in.append(in_hand(broken))
            os.kill(child, signal.SIGKILL)
            assert outcome(helper) == -signal.SIGKILL
        start(helper, arguments(tiny, broken, "--resume"))
        assert outcome(helper) == 0
    finally:
        helper.stdin.close()
        helper.kill()
        helper.wait()
    assert len(set(killed_in)) >= 6, killed_in  # the quickest stages may be over before the kill arrives
    assert sorted(set(stages(broken))) == sorted(LOOP)
    for model in ("sft/model", "iter1/model", "iter2/model"):
        assert same(tmp_path / "whole" / model, broken / model), model
    for artifact in ("iter1/responses.jsonl", "iter1/scores.parquet", "iter2/pairs.jsonl", "eval/m3.jsonl"):
        assert (tmp_path / "whole" / artifact).read_bytes() == (broken / artifact).read_bytes(), artifact

    def steps(directory: Path) -> list[tuple]:
        return [(r["stage"], r["step"], r["loss"]) for r in rows(directory / "metrics.jsonl")]

    assert steps(broken) == steps(tmp_path / "whole")
