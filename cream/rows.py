"""Reads rows of JSONL and Parquet files and of hub data sets, and says exactly where one cannot be read.

Data is not trusted: a line has a length limit before it is held, and what JSON lets through but no data means (a key
twice, NaN, a number too large for a float) is refused. Every error is a UserError 'path:line: reason'; in a Parquet
file or a hub data set the line is the number of the row, from 1.
"""

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cream.log import UserError

MAX_LINE_BYTES = 10_000_000
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
PARQUET_REVISION = "refs/convert/parquet"  # the hub's own conversion of data sets that are defined by a script

Row = dict[str, Any]


def is_file_name(source: str) -> bool:
    """Does source name a file that read_file reads (whether or not it exists)?"""
    return source.lower().endswith(SUFFIXES)


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a JSONL (.jsonl, .json, either with .gz) or Parquet file, as ('path:line', row), from line 1.

    Blank lines are passed over, a byte order mark at the start too. Raises UserError at the first row that cannot be
    read, and for a file that does not exist or holds no row.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder; name its files' if path.is_dir() else 'no such file'}")
    empty = True
    for place, row in _parquet_rows(path) if path.name.lower().endswith(".parquet") else _json_rows(path):
        empty = False
        yield place, row
    if empty:
        raise UserError(f"{path}:1: the file holds no row")


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    packed = path.name.lower().endswith(".gz")
    number = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, line in _lines(file, str(path)):
                row = _parse(line, f"{path}:{number}")
                if row is not None:
                    yield f"{path}:{number}", row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(file: BinaryIO | io.BufferedIOBase, path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parse(line: bytes, place: str) -> Row | None:
    """The row of one line, or None for a blank line."""
    if b"\0" in line:
        raise UserError(f"{place}: a NUL byte; the file is damaged or no text")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    if not text.strip():
        return None
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            raise UserError(f"{place}: the last line is cut short ({error.msg}); is the file complete?") from None
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply") from None
    except ValueError as error:  # from the hooks, and Python's refusal of whole numbers of more than 4,300 digits
        raise UserError(f"{place}: {str(error).partition(';')[0]}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; a file holds one object a line")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key '{twice[:80]}' stands twice in one object")
    return row


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise UserError(f"{path}:1: a column name stands twice: {', '.join(names)}")
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}:{number + 1}: not a whole Parquet file: {reason}") from None


def read_hub(name: str, config: str | None, split: str, place: str) -> Iterator[tuple[str, Row]]:
    """Each row of a split of a hub data set, as ('place:row', row). Needs the network, or the data set in the cache.

    A data set that its owner defines by a script (allenai/social_i_qa) is read from the hub's Parquet conversion,
    since `datasets` runs no scripts. Raises UserError where it cannot be had.
    """
    import datasets

    def load(revision: str | None) -> Any:
        return datasets.load_dataset(name, config, split=split, revision=revision)

    try:
        try:
            rows = load(None)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            rows = load(PARQUET_REVISION)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{place}: cannot be loaded from the hub: {reason}") from None
    if len(rows) == 0:
        raise UserError(f"{place}:1: the data set holds no row")
    for number, row in enumerate(rows, 1):
        yield f"{place}:{number}", row
