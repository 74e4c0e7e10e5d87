"""What a stage writes: its outputs, parts that survive a kill, scratch that survives a kill; and rows read again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cream import dist
from cream.checkpoint import disk_errors, fsync_tree, make_directory, replace_path, write_atomic
from cream.log import UserError, say

VISIBLE_SECONDS = 60  # for which NFS may go on saying that a file is not there (acdirmax)
NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")  # none hidden, no "..", not absolute


class Work:
    """What the body of a stage writes to: its outputs, parts that survive a kill, scratch that survives a kill."""

    def __init__(self, directory: Path, outputs: Sequence[str]) -> None:
        self.directory = directory
        self.outputs = tuple(outputs)
        self.recorded: dict[str, Any] = {}

    def path(self, output: str) -> Path:
        """Where to write an output, a file or a directory; it gets its own name when the stage is complete."""
        if output not in self.outputs:
            raise ValueError(f"{output!r} is not among the outputs of this stage: {', '.join(self.outputs)}")
        path = self.directory / "out" / output
        os.makedirs(path.parent, exist_ok=True)
        return path

    def finish(self, output: str) -> None:
        """Make an output that is written durable before the stage is: after a kill it need not be written again."""
        written, done = self.path(output), self.directory / "done" / output
        with disk_errors(done):
            make_directory(done.parent)
            fsync_tree(written)
        replace_path(written, done)

    def write_rows(self, output: str, rows: Iterable[Mapping]) -> Path:
        """Write an output as JSONL, UTF-8, and return `path(output)`."""
        path = self.path(output)
        with open(path, "wb") as file:
            file.writelines(map(line_of, rows))
        return path

    def parts(self, name: str, count: int) -> Sequence[int]:
        """The indices in range(count) whose part is not there yet, or is damaged (said by name): this rank's of them,
        as dealt out over the ranks by rank 0, which has looked."""
        return dist.share(dist.agree(list(self._missing(name, count)) if dist.is_main() else None))

    def _missing(self, name: str, count: int) -> Iterator[int]:
        for index in range(count):
            rows, problem = self._read(name, index)
            if rows is None:
                if self._part(name, index).exists():
                    say(f"{problem}; that part is made again")
                yield index

    def put(self, name: str, index: int, rows: Iterable[Mapping]) -> None:
        """Store one part durably. It stays until the stage is complete, or its inputs or settings change."""
        path = self._part(name, index)
        body = b"".join(map(line_of, rows))
        with disk_errors(path):
            make_directory(path.parent)
        write_atomic(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    def get(self, name: str, index: int) -> list[dict]:
        """The rows of a part that was put. UserError where it is missing or damaged since.

        A part that a rank on another node has just put may take a while to be seen on a network disk.
        """
        rows, problem = self._read(name, index)
        for _ in range(0 if dist.size() == 1 else VISIBLE_SECONDS):
            if rows is not None or self._part(name, index).exists():
                break
            time.sleep(1)
            rows, problem = self._read(name, index)
        if rows is None:
            raise UserError(f"{problem}; start again with --resume and it is made again")
        return rows

    def keep(self, name: str) -> Path:
        """A scratch directory that survives a kill, for step checkpoints; gone when the stage is complete."""
        path = self.directory / "keep" / checked(name)
        with disk_errors(path):
            make_directory(path)
        return path

    def facts(self, **values: Any) -> None:
        """Numbers to record with the stage in the ledger: tokens, tokens_per_second, ...

        `seconds` of the body are recorded anyway, and `resumed: true` where they are only those since the last kill.
        """
        self.recorded.update(values)

    def written(self, output: str) -> Path:
        """Where an output is until the stage is complete: among the finished ones, or not."""
        path = self.directory / "out" / output
        return path if path.exists() else self.directory / "done" / output

    def _part(self, name: str, index: int) -> Path:
        return self.directory / "parts" / checked(name) / f"{index:06d}.jsonl"

    def _read(self, name: str, index: int) -> tuple[list[dict] | None, str]:
        path = self._part(name, index)
        try:
            digest, _, body = path.read_bytes().partition(b"\n")
        except OSError as error:
            return None, f"{path}: {error.strerror}"
        if digest != hashlib.sha256(body).hexdigest().encode():
            return None, f"{path}: not as it was written (its SHA-256 differs)"
        return [json.loads(line) for line in body.split(b"\n")[:-1]], ""


def read_rows(path: Path | str) -> list[dict]:
    """The rows of a JSONL file of a run. UserError, with the line's number, where one is not a JSON object."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); run the stage that wrote it again") from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}:{number}: not a JSON object; run the stage that wrote it again")
    return rows


def checked(name: str) -> str:
    """The name of a stage, an output or a part. Raises ValueError where a file must not be called so."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a stage, an output or a part: letters, digits and _ - . with / between")
    return name


def line_of(row: Mapping) -> bytes:
    """A row of JSONL."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON data may hold: only its escape is valid UTF-8
        return (json.dumps(row) + "\n").encode()
