"""Runs: kill -9 anywhere and go on, damage noticed and named, a full disk at every call, one process at a time.

Run as a program, this file is a server that forks a process for each run of a small chain of stages: `die` in its
orders is the number of the durable call (fsync, rename, write) at which that process kills itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cream import checkpoint, work
from cream.checkpoint import load_latest, save_step
from cream.log import UserError
from cream.run import Run
from cream.work import Work, read_rows

UNITS, STEPS = 3, 3
OWN = {"config.yaml", "ledger.jsonl", ".cream.lock"}


def digest(*values: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:4], "big")


def chain(directory: Path, source: Path, config: dict, *, resume: bool, pause: float = 0.0) -> list[str]:
    """Three stages of the shape of the real ones: parts, step checkpoints and a model directory, two files. Returns
    the names of the stages whose body ran."""
    ran: list[str] = []

    def sample(work: Work) -> None:
        ran.append("iter1/sample")
        text = source.read_text()
        for unit in work.parts("responses", UNITS):
            pause and time.sleep(pause)
            work.put("responses", unit, [{"unit": unit, "row": r, "drawn": digest(text, unit, r)} for r in range(3)])
        rows = (row for unit in range(UNITS) for row in work.get("responses", unit))
        work.write_rows("iter1/responses.jsonl", rows)

    def train(work: Work) -> None:
        ran.append("iter1/train")
        start, tensors, _ = load_latest(work.keep("steps")) or (0, {"weight": torch.zeros(7)}, {})
        weight, rows = tensors["weight"], read_rows(directory / "iter1/responses.jsonl")
        for step in range(start, STEPS):
            pause and time.sleep(pause)
            weight = weight * 0.5 + config["lr"] * (rows[step]["drawn"] % 1000)
            if step + 1 == STEPS // 2:
                save_file({"weight": weight.clone()}, work.path("iter1/half.safetensors"))
                work.finish("iter1/half.safetensors")
            save_step(work.keep("steps"), step + 1, {"weight": weight}, {"stage": "train"})
        model = work.path("iter1/model")
        model.mkdir()
        save_file({"weight": weight}, model / "model.safetensors")
        (model / "config.json").write_text(json.dumps(config))
        work.facts(steps=STEPS)

    def evaluate(work: Work) -> None:
        ran.append("eval")
        text = (directory / "iter1/model/config.json").read_text()
        work.path("eval.json").write_text(text)
        work.write_rows("eval.jsonl", [{"sum": config["scale"] * digest(text)}])

    with Run(directory, json.dumps(config), resume=resume) as job:
        seed, lr, scale = ({name: config[name]} for name in ("seed", "lr", "scale"))
        [rows] = job.stage(
            "iter1/sample", sample, inputs={"prompts": source}, outputs=["iter1/responses.jsonl"], settings=seed
        )
        model, _ = job.stage(
            "iter1/train", train, inputs={"rows": rows}, outputs=["iter1/model", "iter1/half.safetensors"], settings=lr
        )
        job.stage("eval", evaluate, inputs={"model": model}, outputs=["eval.json", "eval.jsonl"], settings=scale)
    return ran


CONFIG = {"seed": 0, "lr": 0.25, "scale": 2}


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a run but the run's own, by name."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name not in OWN)
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "1 + 1?"}\n')
    return path


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where there is a /dev/shm: thousands of files and directories come and go here."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            yield Path(directory)
    else:
        yield tmp_path


@pytest.fixture(autouse=True)
def no_wait(monkeypatch) -> None:
    """fsync is only counted: no test here pulls the plug, and thousands of real ones take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Killed


CALLS = ("fsync", "replace", "write", "mkdir", "rmdir", "unlink", "ftruncate")


def serve() -> None:
    os.fsync = lambda descriptor: None  # kill -9 leaves what the system has been given
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if order["die"]:
                    count = [0]

                    def deadly(call, count=count, last=order["die"]):
                        def wrapped(*arguments, **keywords):
                            count[0] += 1
                            if count[0] == last:
                                os.kill(os.getpid(), signal.SIGKILL)
                            return call(*arguments, **keywords)

                        return wrapped

                    for name in CALLS:
                        setattr(os, name, deadly(getattr(os, name)))
                chain(
                    Path(order["directory"]), Path(order["source"]), order["config"], resume=True, pause=order["pause"]
                )
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()  # until then an ended child is a zombie, and its id nobody else's
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )

    def start(directory: Path, source: Path, config: dict = CONFIG, *, die: int = 0, pause: float = 0.0) -> int:
        """Start the chain in a process of its own; its process id."""
        order = {"directory": str(directory), "source": str(source), "config": config, "die": die, "pause": pause}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    def end() -> int:
        """Its exit status, -9 where it was killed."""
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    start.end = end
    yield start
    process.stdin.close()
    process.wait()


def test_kill_at_random_moments(server, source, tmp_path):
    chain(tmp_path / "undisturbed", source, CONFIG, resume=False)
    random.seed(1)
    kills, runs = 0, 0
    while kills < 15:
        directory = tmp_path / f"killed{runs}"
        runs += 1
        while True:
            process = server(directory, source, pause=0.01)
            time.sleep(random.uniform(0, 0.07))
            os.kill(process, signal.SIGKILL)
            status = server.end()
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            kills += 1
        assert tree(directory) == tree(tmp_path / "undisturbed")


def test_kill_at_every_durable_call(server, source, tmp_path):
    """At each third call of a fresh run, from its first mkdir to its last removal: what is left can be gone on with."""
    chain(tmp_path / "undisturbed", source, CONFIG, resume=False)
    wanted = tree(tmp_path / "undisturbed")
    directory, call, status = tmp_path / "run", 0, -signal.SIGKILL
    while status != 0:
        call += 3
        shutil.rmtree(directory, ignore_errors=True)
        server(directory, source, die=call)
        status = server.end()
        if status != 0:
            chain(directory, source, CONFIG, resume=True)
        assert tree(directory) == wanted, call
    assert call > 60


def test_kill_while_a_model_directory_is_replaced(server, source, tmp_path):
    old, new, config = tmp_path / "old", tmp_path / "new", CONFIG | {"lr": 0.5}
    chain(old, source, CONFIG, resume=False)
    chain(new, source, config, resume=False)
    directory, call, status, seen = tmp_path / "run", 0, -signal.SIGKILL, set()
    while status != 0:
        call += 1
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(old, directory)
        server(directory, source, config, die=call)
        status = server.end()
        if status != 0:
            seen.add((directory / "iter1/model").exists())
        if call % 2 and status != 0:  # on with the new configuration, or back to the old one
            chain(directory, source, config, resume=True)
            assert tree(directory) == tree(new), call
        elif status != 0:
            chain(directory, source, CONFIG, resume=True)
            assert tree(directory) == tree(old), call
    assert seen == {True, False}  # the moment between the two renames was among them


def test_parts_and_steps_are_not_done_twice(source, tmp_path):
    drawn: list[int] = []

    def body(work: Work) -> None:
        for unit in work.parts("a", 4):
            if len(drawn) == 2:
                drawn.append(-1)
                raise KeyboardInterrupt
            drawn.append(unit)
            work.put("a", unit, [{"unit": unit}])
        work.write_rows("out.jsonl", [row for unit in range(4) for row in work.get("a", unit)])

    arguments = {"inputs": {"prompts": source}, "outputs": ["out.jsonl"], "settings": {}}
    with Run(tmp_path / "run", "a", resume=False) as job, pytest.raises(KeyboardInterrupt):
        job.stage("s", body, **arguments)
    assert not (tmp_path / "run/out.jsonl").exists()
    with Run(tmp_path / "run", "a", resume=True) as job:
        job.stage("s", body, **arguments)
    assert drawn == [0, 1, -1, 2, 3]
    assert [row["unit"] for row in read_rows(tmp_path / "run/out.jsonl")] == [0, 1, 2, 3]
    assert read_rows(tmp_path / "run/ledger.jsonl")[0]["facts"]["resumed"] is True
    assert not (tmp_path / "run/.work/s").exists()


@pytest.mark.parametrize("change", ["input", "settings"])
def test_parts_of_other_inputs_are_not_used(change, source, tmp_path):
    made: list[int] = []

    def body(work: Work) -> None:
        for unit in work.parts("a", 2):
            made.append(unit)
            work.put("a", unit, [{"from": source.read_text()}])
            if len(made) == 1:
                raise KeyboardInterrupt
        work.write_rows("out.jsonl", work.get("a", 0) + work.get("a", 1))

    def start(resume: bool, settings: dict) -> None:
        with Run(tmp_path / "run", "a", resume=resume) as job:
            job.stage("s", body, inputs={"prompts": source}, outputs=["out.jsonl"], settings=settings)

    with pytest.raises(KeyboardInterrupt):
        start(False, {"lr": 1})
    if change == "input":
        source.write_text("other")
    start(True, {"lr": 1 if change == "input" else 2})
    assert made == [0, 0, 1]
    assert {row["from"] for row in read_rows(tmp_path / "run/out.jsonl")} == {source.read_text()}


# Changed


def test_a_change_redoes_what_depends_on_it(source, tmp_path, capsys):
    directory = tmp_path / "run"
    assert chain(directory, source, CONFIG, resume=False) == ["iter1/sample", "iter1/train", "eval"]
    assert chain(directory, source, CONFIG, resume=True) == []
    assert "config.yaml" not in capsys.readouterr().err
    assert chain(directory, source, CONFIG | {"scale": 3}, resume=True) == ["eval"]
    assert "config.yaml: changed" in capsys.readouterr().err
    assert json.loads((directory / "config.yaml").read_text())["scale"] == 3
    assert chain(directory, source, CONFIG | {"scale": 3, "lr": 0.5}, resume=True) == ["iter1/train", "eval"]
    assert "iter1/train: changed settings" in capsys.readouterr().err
    # the seed is in the settings of sampling, yet its rows come out the same: what follows stands
    assert chain(directory, source, CONFIG | {"scale": 3, "lr": 0.5, "seed": 9}, resume=True) == ["iter1/sample"]
    source.write_text("other prompts")
    assert chain(directory, source, CONFIG, resume=True) == ["iter1/sample", "iter1/train", "eval"]
    assert "iter1/sample: changed input prompts" in capsys.readouterr().err
    chain(tmp_path / "fresh", source, CONFIG, resume=False)
    assert tree(directory) == tree(tmp_path / "fresh")


def test_settings_may_be_dataclasses_and_inputs_directories(tmp_path):
    import dataclasses

    @dataclasses.dataclass
    class Settings:
        lr: float
        files: tuple[str, ...]

    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub/a").write_text("a")
    ran: list[int] = []

    def body(work: Work) -> None:
        ran.append(1)
        work.path("out").write_text("x")

    def start(settings: Settings, revision: str = "main") -> int:
        with Run(tmp_path / "run", "", resume=True) as job:
            job.stage(
                "s", body, inputs={"model": model, "revision": revision}, outputs=["out"], settings={"all": settings}
            )
        return len(ran)

    assert start(Settings(1.0, ("x",))) == 1
    assert start(Settings(1.0, ("x",))) == 1
    assert start(Settings(1.0, ("y",))) == 2
    assert start(Settings(1.0, ("y",)), "other") == 3
    (model / "sub/a").rename(model / "sub/b")  # the same bytes under another name
    assert start(Settings(1.0, ("y",)), "other") == 4
    with Run(tmp_path / "run", "", resume=True) as job, pytest.raises(TypeError, match="not object"):
        job.stage("s", body, inputs={}, outputs=["out"], settings={"x": object()})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "name, redone",
    [
        ("iter1/responses.jsonl", ["iter1/sample"]),
        ("iter1/model/model.safetensors", ["iter1/train"]),
        ("iter1/model/config.json", ["iter1/train"]),
        ("eval.jsonl", ["eval"]),
    ],
)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_is_named_and_mended(name, redone, damage, source, tmp_path, capsys):
    directory = tmp_path / "run"
    chain(directory, source, CONFIG, resume=False)
    before = tree(directory)
    damage(directory / name)
    with Run(directory, json.dumps(CONFIG), resume=True) as job, pytest.raises(UserError, match=name) as error:
        job.finished(redone[0], [name.removesuffix("/model.safetensors").removesuffix("/config.json")])
    one_line(error)
    capsys.readouterr()
    assert chain(directory, source, CONFIG, resume=True) == redone
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{redone[0]}: {directory / name} is" in lines[0]
    assert tree(directory) == before


def test_a_stranger_in_an_output_directory_is_not_deleted(source, tmp_path):
    directory = tmp_path / "run"
    chain(directory, source, CONFIG, resume=False)
    (directory / "iter1/model/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt: not a file of this run") as error:
        chain(directory, source, CONFIG, resume=True)
    one_line(error)
    assert (directory / "iter1/model/notes.txt").read_text() == "mine"


def test_a_damaged_part_is_made_again(tmp_path, capsys):
    work = Work(tmp_path / "work", ["out"])
    for index in range(3):
        work.put("a", index, [{"n": index, "text": "line\u2028break \ud800", "nan": float("nan")}])
    path = tmp_path / "work/parts/a/000001.jsonl"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert list(work.parts("a", 4)) == [1, 3]
        path.write_bytes(whole[:position])
        assert list(work.parts("a", 4)) == [1, 3]
    assert "000001.jsonl: not as it was written" in capsys.readouterr().err
    with pytest.raises(UserError, match="000001.jsonl") as error:
        work.get("a", 1)
    one_line(error)
    [row] = work.get("a", 2)
    assert row["n"] == 2 and row["text"] == "line\u2028break \ud800" and row["nan"] != row["nan"]
    with pytest.raises(UserError, match="000003.jsonl"):
        work.get("a", 3)


def test_a_torn_or_damaged_ledger(source, tmp_path, capsys):
    directory = tmp_path / "run"
    chain(directory, source, CONFIG, resume=False)
    ledger, before = directory / "ledger.jsonl", tree(directory)
    whole = ledger.read_bytes()
    last = whole[: whole.rindex(b"\n", 0, -1) + 1]
    for length in range(len(last) + 1, len(whole), 41):  # any cut within the last row
        ledger.write_bytes(whole[:length])
        capsys.readouterr()
        assert chain(directory, source, CONFIG, resume=True) == ["eval"]
        assert f"{ledger}:3: the last line was cut off" in capsys.readouterr().err
        assert len(read_rows(ledger)) == 3
    for position in range(0, whole.index(b"\n"), 17):  # any byte of the first row: redone, or of no consequence
        ledger.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert chain(directory, source, CONFIG, resume=True) in (["iter1/sample"], [])
        assert tree(directory) == before
    ledger.write_bytes(b"\xff\x00\n" + whole)
    capsys.readouterr()
    assert chain(directory, source, CONFIG, resume=True) == []
    assert f"{ledger}:1: damaged" in capsys.readouterr().err


def test_an_input_that_changes_under_the_stage_is_refused(source, tmp_path):
    def body(work: Work) -> None:
        work.path("out").write_text(source.read_text())
        source.write_text("1 + 2?\n" * 3)

    with (
        Run(tmp_path / "run", "", resume=False) as job,
        pytest.raises(UserError, match="input prompts changed") as error,
    ):
        job.stage("s", body, inputs={"prompts": source}, outputs=["out"], settings={})
    one_line(error)
    assert not (tmp_path / "run/out").exists()


# A full disk


class Faults:
    """Counts the calls that need room on a disk and lets number `at` fail, as a full disk does."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.at = 0, 0
        for module, name in ((os, "fsync"), (os, "replace"), (os, "write"), (os, "mkdir"), (checkpoint, "save_file")):
            monkeypatch.setattr(module, name, self.faulty(name, getattr(module, name)))
        for module in (checkpoint, work):
            monkeypatch.setattr(module, "open", self.open, raising=False)

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def faulty(self, name, call):
        def wrapped(*arguments, **keywords):
            if name != "mkdir" or not os.path.exists(arguments[0]):  # a full disk, too, says "exists" first
                self.tick()
            return call(*arguments, **keywords)

        return wrapped

    def open(self, path, mode="r", **keywords):
        file = open(path, mode, **keywords)
        if "w" not in mode:
            return file
        faults = self

        class Half:  # writes half of what it is given before the disk is full
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[: len(data) // 2])
                faults.tick()
                file.write(data[len(data) // 2 :])

            def writelines(self, lines):
                self.write(b"".join(lines))

        return Half()


def test_a_full_disk_at_every_call(monkeypatch, source, tmp_path):
    old, new, config = tmp_path / "old", tmp_path / "new", CONFIG | {"lr": 0.5, "seed": 1}
    chain(old, source, CONFIG, resume=False)
    chain(new, source, config, resume=False)
    whole = {"old": tree(old), "new": tree(new)}
    directory, faults, outcome = tmp_path / "run", Faults(monkeypatch), set()
    faults.count = 0
    shutil.copytree(old, tmp_path / "count")
    faults.count = 0
    chain(tmp_path / "count", source, config, resume=True)
    total = faults.count
    assert total > 60
    for at in range(1, total + 1):
        faults.at = 0
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(old, directory)
        faults.count, faults.at = 0, at
        with pytest.raises(UserError, match="No space left on device") as error:
            chain(directory, source, config, resume=True)
        assert str(directory) in one_line(error)
        left = tree(directory)
        for group in (
            ["iter1/responses.jsonl"],
            ["iter1/model/model.safetensors", "iter1/model/config.json"],
            ["eval.json"],
        ):
            same = {age for age in whole if all(left.get(name) == whole[age][name] for name in group)}
            assert same, (at, group)  # whole, whichever it is
            outcome |= same
        if at % 2:
            chain(directory, source, config, resume=True)
            assert tree(directory) == whole["new"], at
        else:
            chain(directory, source, CONFIG, resume=True)
            assert tree(directory) == whole["old"], at
    assert outcome == {"old", "new"}


def test_a_ledger_row_that_does_not_fit_leaves_no_trace(source, monkeypatch, tmp_path):
    directory, write = tmp_path / "run", os.write
    chain(directory, source, CONFIG, resume=False)
    before = (directory / "ledger.jsonl").read_bytes()

    def filling(descriptor: int, data: memoryview) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(UserError, match="ledger.jsonl: No space left on device") as error:
        chain(directory, source, CONFIG | {"scale": 3}, resume=True)
    one_line(error)
    assert (directory / "ledger.jsonl").read_bytes() == before
    monkeypatch.setattr(os, "write", write)
    assert chain(directory, source, CONFIG | {"scale": 3}, resume=True) == []  # the body had ended: its row is stored
    assert (directory / "ledger.jsonl").read_bytes().startswith(before)
    assert read_rows(directory / "ledger.jsonl")[-1]["stage"] == "eval"


def test_a_full_disk_at_the_very_start(monkeypatch, source, tmp_path):
    faults = Faults(monkeypatch)
    for at in range(1, 100):
        directory = tmp_path / f"run{at}"
        faults.count, faults.at = 0, at
        try:
            Run(directory, "config", resume=False).close()
        except UserError as error:
            assert str(directory) in str(error) and "\n" not in str(error)
        else:
            break
        faults.at = 0
        assert not (directory / "config.yaml").exists() or (directory / "config.yaml").read_text() == "config"
        Run(directory, "config", resume=(directory / "config.yaml").exists()).close()
    assert 4 < at < 99


def test_other_errors_of_a_body_are_not_hidden(tmp_path):
    def body(work: Work) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")

    with Run(tmp_path / "run", "", resume=False) as job, pytest.raises(FileNotFoundError):
        job.stage("s", body, inputs={}, outputs=["out"], settings={})


# Directory, lock, names


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [directory, *directory.rglob("*")]}


def test_directories_that_are_refused(source, tmp_path):
    directory = tmp_path / "run"
    chain(directory, source, CONFIG, resume=False)
    before = listing(directory)
    with pytest.raises(UserError, match="--resume") as error:
        Run(directory, "other", resume=False)
    assert str(directory) in one_line(error)
    assert listing(directory) == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("somebody's")
    before = listing(foreign)
    for resume in (False, True):
        with pytest.raises(UserError, match="not a run of cream") as error:
            Run(foreign, "other", resume=resume)
        assert str(foreign) in one_line(error)
    assert listing(foreign) == before

    for path in (source, source / "below"):
        with pytest.raises(UserError, match="not a directory") as error:
            Run(path, "other", resume=True)
        one_line(error)
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "empty", "a", resume=False).close()
    Run(tmp_path / "deep/er/new", "a", resume=True).close()


def test_one_process_at_a_time(server, source, tmp_path):
    directory = tmp_path / "run"
    with Run(directory, "a", resume=False) as job:
        before = listing(directory)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}") as error:
            Run(directory, "b", resume=True)
        one_line(error)
        assert listing(directory) == before
        server(directory, source)
        assert server.end() == 1
        assert (directory / "config.yaml").read_text() == "a"
        job.close()
    process = server(directory, source, pause=30)
    while not (directory / ".work/iter1+sample/key.json").exists():
        time.sleep(0.005)
    with pytest.raises(UserError, match=f"in use by process {process}"):
        Run(directory, "b", resume=True)
    os.kill(process, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    assert chain(directory, source, CONFIG, resume=True) == ["iter1/sample", "iter1/train", "eval"]


@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/out", "a//b", ".hidden", "a/.b", "", "a b", "a\nb", "~", "a/"]
)
def test_names_stay_inside(name, tmp_path):
    def body(work: Work) -> None:
        raise AssertionError("must not run")

    with Run(tmp_path / "run", "", resume=False) as job:
        before = listing(tmp_path)
        for stage, output in (("s", name), (name, "out")):
            with pytest.raises(ValueError, match="cannot name"):
                job.stage(stage, body, inputs={}, outputs=[output], settings={})
        for output in ("config.yaml", "ledger.jsonl", "metrics.jsonl"):
            with pytest.raises(ValueError, match="own file"):
                job.stage("s", body, inputs={}, outputs=[output], settings={})
        assert listing(tmp_path) == before
    work = Work(tmp_path / "work", ["out"])
    for call in (work.path, work.keep, lambda n: work.put(n, 0, []), lambda n: list(work.parts(n, 1))):
        with pytest.raises(ValueError):
            call(name)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with Run(tmp_path / "run", "", resume=False) as job:
        (tmp_path / "run/iter1").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="a link leads out") as error:
            job.stage("s", lambda work: None, inputs={}, outputs=["iter1/out"], settings={})
        one_line(error)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_missing_inputs_and_outputs(tmp_path):
    with Run(tmp_path / "run", "", resume=False) as job:
        with pytest.raises(UserError, match="gone.jsonl: missing, and s needs it") as error:
            job.stage("s", lambda work: None, inputs={"x": tmp_path / "gone.jsonl"}, outputs=["out"], settings={})
        one_line(error)
        with pytest.raises(ValueError, match="did not write its output out"):
            job.stage("s", lambda work: None, inputs={}, outputs=["out"], settings={})
        with pytest.raises(UserError, match="stage s was not completed"):
            job.finished("s", ["out"])
    with pytest.raises(ValueError, match="closed"):
        job.stage("s", lambda work: None, inputs={}, outputs=[], settings={})


def test_read_rows_names_the_line(tmp_path):
    for text in ('{"a": 1}\n{"a"', '{"a": 1}\n[1]\n', '{"a": 1}\n\xff\n'):
        (tmp_path / "x.jsonl").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="x.jsonl:2: not ") as error:
            read_rows(tmp_path / "x.jsonl")
        one_line(error)


def test_order_of_a_stage(monkeypatch, tmp_path):
    """Outputs fsynced, then renamed, then their directory fsynced, and only then the ledger's row."""
    events: list[tuple[str, str]] = []
    fsync, replace, write = os.fsync, os.replace, os.write

    def name(path) -> str:
        return os.path.relpath(path, tmp_path / "run")

    def of(descriptor: int) -> str:
        return name(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda d: (events.append(("fsync", of(d))), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", name(b))), replace(a, b))[1])
    monkeypatch.setattr(os, "write", lambda d, data: (events.append(("write", of(d))), write(d, data))[1])

    def body(work: Work) -> None:
        work.path("iter1/model").mkdir()
        (work.path("iter1/model") / "weights").write_text("w")

    with Run(tmp_path / "run", "", resume=False) as job:
        job.stage("s", body, inputs={}, outputs=["iter1/model"], settings={})
    out = ".work/s/out/iter1/model"
    wanted = [
        ("fsync", f"{out}/weights"),
        ("fsync", out),
        ("rename", ".work/s/row.json"),
        ("fsync", ".work/s"),
        ("fsync", "."),  # iter1 is a new name in the run directory
        ("rename", "iter1/model"),
        ("fsync", "iter1"),
        ("write", "ledger.jsonl"),
        ("fsync", "ledger.jsonl"),
        ("fsync", "."),
    ]
    rest = iter(events)
    assert [event for event in wanted if event not in rest] == []  # in this order


if __name__ == "__main__":
    serve()
