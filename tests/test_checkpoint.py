"""Durable files: whole or not there, damage found and named, bits kept, the order of calls, a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cream import checkpoint
from cream.checkpoint import (
    fsync_tree,
    hash_file,
    hash_files,
    hash_tree,
    load_latest,
    recover,
    replace_path,
    save_step,
    write_atomic,
)
from cream.log import UserError


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(5.0) + step, "moment": torch.full((2, 3), 0.1 * step, dtype=torch.bfloat16)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all bits are, those of NaNs as well."""

    def described(tensor: torch.Tensor) -> tuple:
        return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(described(a[name]) == described(b[name]) for name in a)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Step checkpoints


def test_every_bit_and_the_meta_come_back(tmp_path):
    tied = torch.randn(4, 3)
    tensors = {
        "float32": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45]),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float64": torch.randn(2, dtype=torch.float64),
        "rng": torch.get_rng_state(),
        "count": torch.tensor(2**60),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 4).t(),
        "tied": tied,
        "tied too": tied,
        "a view of tied": tied[1:3],
        "gradient": torch.randn(3, requires_grad=True),
    }
    meta = {"lr": 0.1 + 0.2, "stage": "iter1/train", "order": [3, 1, 2], "text": "\u2028\ud800"}
    assert save_step(tmp_path / "steps", 12, tensors, meta) == tmp_path / "steps/step-000012"
    step, loaded, back = load_latest(tmp_path / "steps")
    assert step == 12 and back == meta
    assert same(loaded, {name: tensor.detach() for name, tensor in tensors.items()})
    assert loaded["tied"] is loaded["tied too"]
    size = (tmp_path / "steps/step-000012/tensors.safetensors").stat().st_size
    save_step(tmp_path / "untied", 12, {**tensors, "tied too": tied.clone()}, meta)
    assert size < (tmp_path / "untied/step-000012/tensors.safetensors").stat().st_size


def test_two_are_kept_and_none_is_nothing(tmp_path):
    assert load_latest(tmp_path / "none") is None
    (tmp_path / "steps").mkdir()
    assert load_latest(tmp_path / "steps") is None
    for step in (2, 9, 10, 1_000_000):
        save_step(tmp_path / "steps", step, state(step), {})
        assert load_latest(tmp_path / "steps")[0] == step
    assert names(tmp_path / "steps") == ["step-000010", "step-1000000"]


def test_going_back_leaves_no_later_step(tmp_path):
    """Steps 8 and 12 damaged, so the run went on from 4: what it saves then must win over what lay there."""
    for step in (4, 8):
        save_step(tmp_path, step, state(step), {})
    shutil.copytree(tmp_path / "step-000008", tmp_path / "step-000012")  # a copy: its manifest says 8
    (tmp_path / "step-000008/meta.json").write_text("{}")
    assert load_latest(tmp_path)[0] == 4
    save_step(tmp_path, 6, state(6), {})
    assert names(tmp_path) == ["step-000004", "step-000006"]
    save_step(tmp_path, 6, state(60), {})  # the same step again
    assert same(load_latest(tmp_path)[1], state(60))


def test_left_overs_are_cleared(tmp_path):
    save_step(tmp_path, 1, state(1), {})
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000002.tmp")
    os.replace(tmp_path / "step-000001", tmp_path / ".step-000001.old")  # killed between the renames of a second save
    assert load_latest(tmp_path)[0] == 1
    save_step(tmp_path, 3, state(3), {})
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_each_flipped_bit_and_each_cut_is_found_and_named(tmp_path, capsys):
    save_step(tmp_path, 1, state(1), {"n": 1})
    save_step(tmp_path, 2, state(2), {"n": 2})
    random.seed(0)
    tried = 0
    for file in ("tensors.safetensors", "meta.json", "manifest.json"):
        path = tmp_path / "step-000002" / file
        whole = path.read_bytes()
        damaged = [
            whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
            for i in range(len(whole))
            for bit in random.sample(range(8), 2)
        ]
        damaged += [whole[:i] for i in range(0, len(whole), 3)] + [whole + b"\n", b""]
        for data in damaged:
            path.write_bytes(data)
            capsys.readouterr()
            step, tensors, meta = load_latest(tmp_path)
            assert (step, meta) == (1, {"n": 1}) and same(tensors, state(1))
            line = capsys.readouterr().err
            assert line.count("\n") == 1 and "step-000002" in line and "passed over" in line
            # a flip in the manifest may change what it says of another file: that one is then named
            assert file in line or file == "manifest.json"
        path.unlink()
        assert load_latest(tmp_path)[0] == 1
        assert f"{path}: No such file" in capsys.readouterr().err
        path.write_bytes(whole)
        assert load_latest(tmp_path)[0] == 2
        tried += len(damaged)
    assert tried > 1000
    for step in (1, 2):
        (tmp_path / f"step-00000{step}/meta.json").unlink()
    assert load_latest(tmp_path) is None


def test_an_unknown_format_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMATS", {"whole": 3})
    save_step(tmp_path, 1, state(1), {})
    monkeypatch.undo()
    assert load_latest(tmp_path) is None
    assert "format 3 is not known here" in capsys.readouterr().err


def recorded(monkeypatch, root: Path) -> list[tuple[str, str]]:
    """What is opened for writing, fsynced and renamed below root, in order, by name."""
    events: list[tuple[str, str]] = []
    fsync, replace, save_file = os.fsync, os.replace, checkpoint.save_file

    def note(kind: str, path) -> None:
        events.append((kind, os.path.relpath(path, root)))

    def opened(path, mode="r", **keywords):
        if "w" in mode:
            note("write", path)
        return open(path, mode, **keywords)

    monkeypatch.setattr(os, "fsync", lambda d: (note("fsync", os.readlink(f"/proc/self/fd/{d}")), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (note("rename to", b), replace(a, b))[1])
    monkeypatch.setattr(checkpoint, "save_file", lambda t, path: (note("write", path), save_file(t, path))[1])
    monkeypatch.setattr(checkpoint, "open", opened, raising=False)
    return events


def test_order_of_save_step(tmp_path, monkeypatch):
    for step in (1, 2):
        save_step(tmp_path, step, state(step), {})
    events = recorded(monkeypatch, tmp_path)
    save_step(tmp_path, 3, state(3), {})
    new = "step-000003.tmp"
    assert events == [
        ("write", f"{new}/tensors.safetensors"),
        ("fsync", f"{new}/tensors.safetensors"),
        ("write", f"{new}/meta.json"),
        ("fsync", f"{new}/meta.json"),
        ("write", f"{new}/manifest.json"),
        ("fsync", f"{new}/manifest.json"),
        ("fsync", new),
        ("rename to", "step-000003"),
        ("fsync", "."),
        ("rename to", "step-000001.tmp"),  # the oldest goes when the newest is safe
    ]


# Files and trees


def test_order_of_write_atomic_and_replace(tmp_path, monkeypatch):
    for name in ("new", "final"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/file").write_text(name)
    events = recorded(monkeypatch, tmp_path)
    write_atomic(tmp_path / "file", b"bytes")
    assert events == [("write", ".file.tmp"), ("fsync", ".file.tmp"), ("rename to", "file"), ("fsync", ".")]
    events.clear()
    fsync_tree(tmp_path / "new")
    replace_path(tmp_path / "new", tmp_path / "final")
    assert events == [
        ("fsync", "new/sub/file"),
        ("fsync", "new/sub"),
        ("fsync", "new"),
        ("rename to", ".final.old"),
        ("rename to", "final"),
        ("fsync", "."),
    ]
    assert names(tmp_path) == ["file", "final"] and (tmp_path / "final/sub/file").read_text() == "new"


def test_write_atomic_takes_bytes_or_a_function(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    write_atomic(str(path), lambda beside: beside.write_text("two"))
    assert path.read_text() == "two"

    def failing(beside: Path) -> None:
        beside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, failing)
    assert path.read_text() == "two" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("old", ["file", "directory", "link", None])
@pytest.mark.parametrize("new", ["file", "directory"])
def test_replace_path(old, new, tmp_path):
    outside, final = tmp_path / "outside", tmp_path / "final"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for kind, path in ((old, final), (new, tmp_path / "new")):
        if kind == "file":
            path.write_text(path.name)
        elif kind == "directory":
            path.mkdir()
            (path / path.name).write_text(path.name)
        elif kind == "link":
            path.symlink_to(outside)
    replace_path(tmp_path / "new", final)
    assert (final if new == "file" else final / "new").read_text() == "new"
    assert names(tmp_path) == ["final", "outside"] and not final.is_symlink()
    assert (outside / "kept").read_text() == "kept"


def test_recover(tmp_path):
    final, old = tmp_path / "model", tmp_path / ".model.old"
    old.mkdir()
    (old / "weights").write_text("previous")
    recover(final)  # killed after the first rename
    assert (final / "weights").read_text() == "previous" and names(tmp_path) == ["model"]
    old.mkdir()
    (old / "rest").write_text("half deleted")
    recover(final)  # killed while the previous one was deleted
    assert (final / "weights").read_text() == "previous" and names(tmp_path) == ["model"]
    recover(final)
    recover(tmp_path / "nothing")
    assert names(tmp_path) == ["model"]


# Hashes


def test_hash_of_a_file_is_sha256sum(tmp_path):
    data = random.Random(0).randbytes(3 * checkpoint.BLOCK + 17)
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file") == hash_tree(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_rewrite_in_the_same_clock_tick_is_seen(tmp_path):
    path = tmp_path / "file"
    for text in ("aaaa", "bbbb", "cccc"):
        path.write_text(text)
        os.utime(
            path, ns=(0, os.stat(path).st_mtime_ns // 10**9 * 10**9)
        )  # as on a disk whose clock ticks once a second
        assert hash_file(path) == hashlib.sha256(text.encode()).hexdigest()


def test_a_settled_file_is_read_once(tmp_path, monkeypatch):
    path, reads = tmp_path / "file", []
    path.write_text("text")
    os.utime(path, (1, 1))
    sha256 = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda p: (reads.append(p), sha256(p))[1])
    first = hash_file(path)
    os.replace(path, tmp_path / "renamed")  # as a stage renames what it has just hashed
    assert hash_file(tmp_path / "renamed") == first and len(reads) == 1
    os.utime(tmp_path / "renamed", (2, 2))
    assert hash_file(tmp_path / "renamed") == first and len(reads) == 2
    (tmp_path / "renamed").write_text("texts")
    assert hash_file(tmp_path / "renamed") != first


def test_hash_of_a_tree(tmp_path):
    def tree(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return hash_tree(tmp_path / name)

    hashes = [
        tree("a", {"x": "1", "sub/y": "2"}),
        tree("b", {"x": "2", "sub/y": "1"}),
        tree("c", {"x": "1", "sub-y": "2"}),
        tree("d", {"x": "1"}),
        tree("e", {"x": "1", "sub/y": "2", "z": ""}),
        tree("f", {"x": "12"}),
    ]
    assert len(set(hashes)) == len(hashes)
    assert tree("g", {"sub/y": "2", "x": "1"}) == hashes[0]  # the order of writing is nothing
    assert list(hash_files(tmp_path / "a")) == ["sub/y", "x"]
    os.chmod(tmp_path / "a/x", 0o600)
    assert hash_tree(tmp_path / "a") == hashes[0]


def test_links_and_pipes(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "1").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../blobs/1")  # as the hub's cache lays a model out
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/model.safetensors").write_text("weights")
    assert hash_tree(snapshot) == hash_tree(tmp_path / "plain")
    for name, make in (
        ("link", lambda p: p.symlink_to(blobs)),
        ("pipe", os.mkfifo),
        ("dangling", lambda p: p.symlink_to("nowhere")),
    ):
        make(snapshot / name)
        with pytest.raises(UserError, match=f"{name}: ") as error:
            hash_tree(snapshot)
        assert "\n" not in str(error.value)
        (snapshot / name).unlink()


# A full disk


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def save_over(directory: Path) -> None:
    save_step(directory / "steps", 3, state(3), {"n": 3})


def write_over(directory: Path) -> None:
    write_atomic(directory / "file", b"new")


def replace_over(directory: Path) -> None:
    replace_path(directory / "new", directory / "model")


@pytest.mark.parametrize("act", [save_over, write_over, replace_over])
def test_each_call_that_fails_leaves_the_old_or_the_new(act, tmp_path, monkeypatch):
    old = tmp_path / "old"
    for step in (1, 2):
        save_step(old / "steps", step, state(step), {"n": step})
    (old / "file").write_text("old")
    for name in ("new", "model"):
        (old / name).mkdir()
        (old / name / "weights").write_text(name)
    fsync, replace, mkdir, save_file = os.fsync, os.replace, os.mkdir, checkpoint.save_file
    left, failed = [0], []

    def faulty(call, error):
        def wrapped(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                raise error
            return call(*arguments, **keywords)

        return wrapped

    def opened(path, mode="r", **keywords):
        file = open(path, mode, **keywords)
        if "w" in mode:
            left[0] -= 1
            if left[0] == 0:
                file.write(b"ha")
                file.close()
                raise full
        return file

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for at in range(1, 100):
        directory = tmp_path / f"at{at}"
        shutil.copytree(old, directory)
        left[0] = at
        for name, call in (("fsync", fsync), ("replace", replace), ("mkdir", mkdir)):
            monkeypatch.setattr(os, name, faulty(call, full))
        rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(checkpoint, "save_file", faulty(save_file, rust))
        monkeypatch.setattr(checkpoint, "open", opened, raising=False)
        try:
            act(directory)
        except UserError as error:
            failed.append(str(error))
        else:
            break
        finally:
            monkeypatch.undo()
        assert (
            failed[-1].startswith(str(directory)) and "No space left on device" in failed[-1] and "\n" not in failed[-1]
        )
        recover(directory / "model")
        assert (directory / "model/weights").read_text() in ("model", "new")
        assert (directory / "file").read_text() in ("old", "new")
        step, tensors, meta = load_latest(directory / "steps")
        assert step in (2, 3) and same(tensors, state(step)) and meta == {"n": step}
        assert tree(directory / "steps/step-000002") == tree(old / "steps/step-000002")
        if act is not replace_over or (directory / "new").exists():
            act(directory)
        assert load_latest(directory / "steps")[0] == (3 if act is save_over else 2)
        assert (directory / "file").read_text() == ("new" if act is write_over else "old")
        assert not list(directory.rglob("*.tmp")) and not list(directory.rglob("*.old"))
    assert len(failed) >= {save_over: 11, write_over: 4, replace_over: 3}[act]


def test_other_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none/file", b"")
    with pytest.raises(TypeError):
        save_step(tmp_path, 1, {}, {"not JSON": object()})
    assert names(tmp_path) == []


FULL = """
import sys, torch
from cream.checkpoint import load_latest, save_step, write_atomic
from cream.log import UserError
step, messages = 0, []
for size in (20_000, 50_000, 60_000, 80_000, 100_000, 400_000):  # floats; the disk has 1 MiB
    try:
        save_step("disk/steps", step + 1, {"weight": torch.full((size,), step + 1.0)}, {})
        step += 1
    except UserError as error:
        messages.append(str(error))
    found, tensors, _ = load_latest("disk/steps")
    assert found == step and (tensors["weight"] == step).all()
write_atomic("disk/file", b"small")
try:
    write_atomic("disk/file", bytes(2_000_000))
except UserError as error:
    messages.append(str(error))
assert open("disk/file", "rb").read() == b"small"
print(step, *messages, sep="\\n")
"""


def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none disk && exec "$0" "$@"']
    if (
        shutil.which("unshare") is None
        or subprocess.run([*mount, "true"], cwd=tmp_path, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a small disk here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*mount, sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    steps, *messages = run.stdout.splitlines()
    assert int(steps) >= 3 and len(messages) == 7 - int(steps)
    assert messages[0].startswith("disk/steps/step-00000") and messages[-1].startswith("disk/file: ")
    assert all("No space left on device" in message for message in messages)
