"""A run: one directory, one ledger, one lock. Stages are done once, again where out of date, and go on after a kill.

    config.yaml          the configuration of the last start
    ledger.jsonl         a row for each time a stage was completed: what it read and wrote, by hash
    .cream.lock          locked by the process that runs; marks the directory as a run
    .work/STAGE/         a stage in progress: key.json (what it is made from), out/, done/, parts/, keep/
    everything else      the outputs of stages, and what the entries add (metrics.jsonl, report.html)

A stage's outputs are written under out/, fsynced and hashed; the row that the ledger shall have is stored beside them
(row.json), they are renamed into place, and only then does the ledger get the row. So a row in the ledger means whole
outputs, and a stage that was killed among its renames finishes them.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cream import dist
from cream.checkpoint import (
    disk_errors,
    fsync,
    fsync_tree,
    hash_files,
    hash_names,
    hash_tree,
    make_directory,
    recover,
    remove,
    replace_path,
    write_atomic,
)
from cream.log import UserError, say
from cream.work import Work, checked, line_of

CONFIG, LEDGER, LOCK, WORK, ROW = "config.yaml", "ledger.jsonl", ".cream.lock", ".work", "row.json"
RESERVED = {CONFIG, LEDGER, "metrics.jsonl"}


class Run:
    """One directory, one ledger, one lock, held until `close`, the end of a `with`, or of the process, also by kill -9.

    UserError, with nothing touched: a directory that holds a run, without `resume`; one that holds other things; one
    that another process uses. With `resume` the new configuration takes the old one's place: a stage whose inputs and
    settings are the same is not done again, so a change redoes what depends on it and nothing else.
    """

    def __init__(self, directory: Path | str, config_yaml: str, *, resume: bool) -> None:
        self.directory = Path(directory)
        self._fresh = _check_directory(self.directory, resume)
        self._lock: int | None = None
        with disk_errors(self.directory):
            make_directory(self.directory)
            self._lock = _take_lock(self.directory / LOCK)
        try:
            with disk_errors(self.directory / LEDGER):
                self._rows = _read_ledger(self.directory / LEDGER)
            path, text = self.directory / CONFIG, config_yaml.encode()
            remove(path.with_name(f".{CONFIG}.tmp"))  # of a process that was killed while it wrote it
            previous = path.read_bytes() if path.exists() else None
            if previous != text:
                if previous is not None:
                    say(f"{path}: changed; stages whose inputs and settings are the same are not done again")
                write_atomic(path, text)
        except BaseException:
            self.close()
            raise
        dist.tell("open")

    def close(self) -> None:
        """Let the next process have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def withdraw(self) -> None:
        """Take back the opening of a run of which nothing is stored yet, so that a mistake that is found in its first
        moments leaves no directory behind. Does nothing where a stage, a part or a step checkpoint is complete."""
        work = self.directory / WORK
        stored = any(path.is_file() and {"parts", "keep", "done"} & set(path.parts) for path in work.rglob("*"))
        if self._rows or stored or not self._fresh:
            return
        for name in (WORK, CONFIG, LEDGER, LOCK):
            remove(self.directory / name)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is UserError:
            self.withdraw()
        self.close()

    def stage(
        self,
        name: str,
        body: Callable[[Work], object],  # must write every output to work.path(output)
        *,
        inputs: Mapping[str, Path | str],  # a Path counts by its contents, a str by its text (a hash, a hub revision)
        outputs: Sequence[str],  # files or directories, relative to the run directory
        settings: Mapping[str, Any],  # all else that the outputs depend on: JSON values, dataclasses, paths
    ) -> list[Path]:
        """The paths of the outputs, after running `body` unless a row of the ledger vouches for them as they are.

        A body that is killed finds its parts and keeps again at the next start, if inputs and settings are the same.
        UserError, nothing marked complete: an input that is missing or changes while the body runs; a full disk; a
        file of someone else's in an output directory that is intact otherwise: doing the stage again would delete it.
        ValueError: a name that could leave the directory; an output that the body did not write.
        """
        if self._lock is None:
            raise ValueError("the run is closed")
        finals = [self._inside(output) for output in outputs]
        directory = self.directory / WORK / checked(name).replace("/", "+")  # "+" is in no name, so no two stages meet
        key = {"inputs": _hash_inputs(name, inputs), "settings_sha256": _hash_settings(settings)}
        work = Work(directory, outputs)
        with disk_errors(self.directory):
            for final in finals:
                recover(final)
            row = self._rows.get(name)
            stale = self._why_again(row, key, outputs) if row else "not done yet"
            if stale is None:
                remove(directory)
                dist.tell("done")
                return finals
            resumed, row = _prepare(directory, key, outputs)
            if name in self._rows and not resumed:
                say(f"{name}: {stale}; doing it again")
        killed_late = row is not None  # the body had ended: only names and the ledger's row were missing
        if row is None:
            row = self._make(name, body, work, inputs, key, resumed)
            write_atomic(directory / ROW, line_of(row))

        for output, final in zip(outputs, finals, strict=True):
            written = work.written(output)
            if written.exists():
                with disk_errors(final):
                    make_directory(final.parent)
                replace_path(written, final)
        if killed_late and (damage := self._damage(row, outputs)):
            say(f"{damage}; doing {name} again")
            remove(directory)
            return self.stage(name, body, inputs=inputs, outputs=outputs, settings=settings)
        with disk_errors(self.directory / LEDGER):
            _append(self.directory / LEDGER, line_of(row))
            self._rows[name] = row
            remove(directory)
        dist.tell("done")
        return finals

    def _make(
        self, name: str, body: Callable[[Work], object], work: Work, inputs: Mapping, key: dict, resumed: bool
    ) -> dict:
        """Run the body, make what it wrote durable, and return the row that the ledger shall have."""
        start = time.perf_counter()
        dist.tell("body")
        with disk_errors(work.directory):
            body(work)
        facts = {"seconds": round(time.perf_counter() - start, 3), **({"resumed": True} if resumed else {})}
        if (now := _hash_inputs(name, inputs)) != key["inputs"]:
            changed = _listed(n for n in now if now[n] != key["inputs"][n])
            raise UserError(f"{name}: input {changed} changed while the stage ran; start again with --resume")
        files: dict[str, str] = {}
        hashes: dict[str, str] = {}
        with disk_errors(work.directory):
            for output in work.outputs:
                written = work.written(output)
                if not written.exists():
                    raise ValueError(f"stage {name} did not write its output {output}")
                fsync_tree(written)
                inner = hash_files(written) if written.is_dir() else {}
                files |= {f"{output}/{file}": digest for file, digest in inner.items()}
                hashes[output] = hash_names(inner) if written.is_dir() else hash_tree(written)
        return {"stage": name, "time": _now(), **key, "outputs": hashes, "files": files, "facts": facts | work.recorded}

    def finished(self, name: str, outputs: Sequence[str]) -> list[Path]:
        """The paths of a completed stage's outputs, intact, whatever its inputs and settings were.

        UserError where it was never completed, or an output is not as it was written.
        """
        row = self._rows.get(name)
        if row is None or not row["outputs"].keys() >= set(outputs):
            raise UserError(f"{self.directory}: stage {name} was not completed; run it first")
        finals = [self._inside(output) for output in outputs]
        with disk_errors(self.directory):
            for final in finals:
                recover(final)
        if damage := self._damage(row, outputs):
            raise UserError(f"{damage}; run stage {name} again")
        dist.tell("done")
        return finals

    def _inside(self, output: str) -> Path:
        path = self.directory / checked(output)
        if output in RESERVED:
            raise ValueError(f"{output!r} is the run's own file")
        if not path.parent.resolve().is_relative_to(self.directory.resolve()):
            raise UserError(f"{path}: a link leads out of the run directory; remove the link")
        return path

    def _why_again(self, row: dict, key: dict, outputs: Sequence[str]) -> str | None:
        """Why a completed stage must be done again, naming what differs, or None."""
        if row["inputs"] != key["inputs"]:
            names = row["inputs"].keys() | key["inputs"].keys()
            return f"changed input {_listed(n for n in names if row['inputs'].get(n) != key['inputs'].get(n))}"
        if row["settings_sha256"] != key["settings_sha256"]:
            return "changed settings"
        if row["outputs"].keys() != set(outputs):
            return "its list of outputs changed"
        return self._damage(row, outputs)

    def _damage(self, row: dict, outputs: Sequence[str]) -> str | None:
        """Which file is not as the row says, or None. UserError for a file too many in an output directory."""
        for output in outputs:
            path = self.directory / output
            if not path.exists():
                return f"{path} is missing"
            now = hash_files(path) if path.is_dir() else {}
            if row["outputs"][output] == (hash_names(now) if path.is_dir() else hash_tree(path)):
                continue
            then = {n[len(output) + 1 :]: digest for n, digest in row["files"].items() if n.startswith(f"{output}/")}
            for file in sorted(then):
                if now.get(file) != then[file]:
                    return f"{path / file} is {'not as it was written' if file in now else 'missing'}"
            for file in sorted(now.keys() - then.keys()):
                if then:
                    raise UserError(f"{path / file}: not a file of this run; move it out of {path}")
            return f"{path} is not as it was written"
        return None


class Follower:
    """What a rank other than 0 has for a Run: it takes part in the bodies that rank 0's Run runs, and keeps no books.

    The run's directory must be on a disk that all ranks see.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        dist.hear()  # until rank 0 has the directory

    def stage(self, name: str, body: Callable[[Work], object], *, outputs: Sequence[str], **_: object) -> list[Path]:
        """As Run.stage, whose outputs are there when this returns."""
        while dist.hear() == "body":
            body(Work(self.directory / WORK / name.replace("/", "+"), outputs))
        return [self.directory / output for output in outputs]

    def finished(self, name: str, outputs: Sequence[str]) -> list[Path]:
        """As Run.finished."""
        dist.hear()
        return [self.directory / output for output in outputs]

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _check_directory(directory: Path, resume: bool) -> bool:
    """Refuse what must not be written over; True where nothing is there yet."""
    with disk_errors(directory):
        for folder in (directory, *directory.parents):
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(f"{folder}: not a directory; name another --run.dir")
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if not names - {LOCK, f".{CONFIG}.tmp"}:  # empty, or killed before its first stage
        return True
    if LOCK not in names and not {CONFIG, LEDGER} <= names:
        raise UserError(f"{directory}: not empty and not a run of cream; name another --run.dir")
    if not resume:
        raise UserError(f"{directory}: holds a run already; go on with it by --resume, or name another --run.dir")
    return False


def _take_lock(path: Path) -> int:
    """Lock the file and return its descriptor. The system undoes the lock when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            owner = owner or "another process"
            raise UserError(f"{path.parent}: in use by {owner}; wait for it, or name another --run.dir") from error
        raise UserError(f"{path}: cannot be locked ({error.strerror}); name a --run.dir on another disk") from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _hash_inputs(stage: str, inputs: Mapping[str, Path | str]) -> dict[str, str]:
    hashes = {}
    for name, source in inputs.items():
        if isinstance(source, Path) and not source.exists():
            raise UserError(f"{source}: missing, and {stage} needs it (input {name})")
        hashes[name] = hash_tree(source) if isinstance(source, Path) else hashlib.sha256(source.encode()).hexdigest()
    return hashes


def _hash_settings(settings: Mapping[str, Any]) -> str:
    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"a setting is a JSON value, a dataclass or a path, not {type(value).__name__}")

    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=plain).encode()).hexdigest()


def _prepare(directory: Path, key: dict, outputs: Sequence[str]) -> tuple[bool, dict | None]:
    """Make a stage's work directory ready.

    Returns whether work on the same inputs and settings is in it, and the row where even the body had ended.
    """
    path, text = directory / "key.json", json.dumps({**key, "outputs": list(outputs)}, sort_keys=True).encode()
    row = _parse_row((directory / ROW).read_bytes()) if (directory / ROW).exists() else None
    if not path.exists() or path.read_bytes() != text or (row is None and (directory / ROW).exists()):
        remove(directory)
        make_directory(directory)
        write_atomic(path, text)
        return False, None
    if row is None:
        remove(directory / "out")
    return any((directory / name).exists() for name in ("parts", "keep", "done", ROW)), row


def _read_ledger(path: Path) -> dict[str, dict]:
    """{stage: its last row}. A last line that was cut off is dropped, a damaged one passed over; both are said."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    if lines[-1]:
        say(f"{path}:{len(lines)}: the last line was cut off; it is dropped")
        with open(path, "r+b") as file:
            file.truncate(len(data) - len(lines[-1]))
        fsync(path)
    rows: dict[str, dict] = {}
    for number, line in enumerate(lines[:-1], 1):
        row = _parse_row(line)
        if row is None:
            say(f"{path}:{number}: damaged; the stage that it vouched for is done again")
        else:
            rows[row["stage"]] = row
    return rows


def _parse_row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    kinds = {"stage": str, "settings_sha256": str, "inputs": dict, "outputs": dict, "files": dict}
    return row if isinstance(row, dict) and all(isinstance(row.get(n), kind) for n, kind in kinds.items()) else None


def _append(path: Path, line: bytes) -> None:
    """Append a line durably, or leave the file as it was."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            rest = memoryview(line)
            while rest:  # a disk that fills up writes less than it was given first
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if size == 0:
        fsync(path.parent)
