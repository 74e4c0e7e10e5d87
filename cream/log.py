"""What a run tells its user: errors of one line, progress with rate and time left, and a JSON line a step.

Everything for people goes to stderr through `say`, so that stdout stays free for results. Generated text is not to be
trusted with a terminal (an escape sequence can retitle, recolour or rewrite it), so `say` makes it `printable`.
"""

import functools
import json
import math
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_SECONDS = 10.0  # the least time between two progress lines where there is no terminal

# Unicode's embeddings, overrides and isolates: they reorder the text around them (CVE-2021-42574).
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_LIVE = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
_LIVE_ENDLESS = "{desc} {n_fmt}{unit}, {rate_noinv_fmt}, {elapsed} so far"
_PLAIN = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {elapsed} so far, {remaining} left"
_PLAIN_ENDLESS = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}, {elapsed} so far"


class UserError(Exception):
    """A mistake of the user's: one line with the place, what is wrong and what to do. Entries exit with code 2."""


def printable(text: str) -> str:
    """`text` with nothing in it that a terminal obeys: control, surrogate and reordering characters become \\x1b and
    the like. Newline and tab stay."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character in _BIDI or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")
        else character
        for character in text
    )


_name: str | None = None  # of a process that leaves talking to another, None for one that talks


def only_main(name: str | None) -> None:
    """Silence progress, and `say` but for errors, in a process that is one of several, and is called `name`; with None
    let them be heard again."""
    global _name
    _name = name


def say(text: str, *, from_all: bool = False) -> None:
    """Print `text` and a newline on stderr, made `printable`, above whatever bars are live.

    A process that `only_main` silenced prints only what is `from_all`, with its name before it.
    """
    if _name is None or from_all:
        _Bar.write(printable(text if _name is None else f"{_name}: {text}"), file=sys.stderr)
        sys.stderr.flush()


def entry(main: Callable) -> Callable:
    """Wrap a program's main: UserError becomes one `error: ...` line and exit code 2, Ctrl-C one line and 130.

    Any other exception is a bug of ours and keeps its traceback. SystemExit passes through.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, KeyboardInterrupt) as error:
            text, code = explained(error)
            say(text)
            raise SystemExit(code) from None

    return wrapper


def explained(error: BaseException) -> tuple[str, int] | None:
    """The line that tells the user of a UserError or Ctrl-C, and the exit code; None for what is a bug of ours."""
    if isinstance(error, UserError):
        return "error: " + " ".join(str(error).splitlines()), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (a run goes on with --resume)", 130
    return None


class _Bar(tqdm):
    """tqdm without its monitor thread, which a forked worker would inherit in an unknown state."""

    monitor_interval = 0
    _lock = threading.RLock()  # tqdm's own would be a semaphore shared between processes


class _Lines:
    """Progress where stderr is a file or a pipe: a line at most every PLAIN_SECONDS, and one at the end."""

    def __init__(self, total: int | None, stage: str, unit: str, done: int):
        self.total, self.stage, self.unit, self.n, self.initial = total, stage, unit, done, done
        self.start = self.last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.last >= PLAIN_SECONDS and self.n != self.total:  # close() prints the full count
            self.last = time.monotonic()
            self._print()

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        line = tqdm.format_meter(
            self.n,
            self.total,
            time.monotonic() - self.start,
            prefix=self.stage,
            unit=f" {self.unit}",
            unit_scale=_scaled(self.total),
            bar_format=_PLAIN_ENDLESS if self.total is None else _PLAIN,
            initial=self.initial,
        )
        say(" ".join(line.split()))  # tqdm pads the rate to five columns


def _has_a_screen(file: TextIO) -> bool:
    """Whether a bar can be drawn: a terminal, but not one of 0 lines, as containers and `script` make."""
    return file.isatty() and min(os.get_terminal_size(file.fileno())) > 0


def _scaled(total: int | None) -> bool:
    """Whether counts read better as 12.3k; below that, 7/32 beats 7.00/32.0."""
    return total is None or total >= 10_000


@contextmanager
def progress(
    total: int | None,  # units in all, None where unknown
    stage: str,
    unit: str,  # plural: "prompts", "tokens", "steps"
    *,
    done: int = 0,  # units that a resumed stage finds finished; they do not count in the rate
) -> Iterator:
    """Show how far `stage` is; yields an object with `.update(n)`, n in units.

    On a terminal a live bar with rate and time left, one under another when nested; elsewhere a line at most every
    PLAIN_SECONDS and one at the end. Closed on exceptions too, so the next line starts at the left margin.
    """
    stage = printable(stage)
    if _name is not None:
        bar = tqdm(disable=True)
    elif _has_a_screen(sys.stderr):
        bar = _Bar(
            total=total,
            initial=done,
            desc=stage,
            unit=f" {unit}",
            unit_scale=_scaled(total),
            bar_format=_LIVE_ENDLESS if total is None else _LIVE,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=None,  # the outermost bar stays on the screen, the nested ones go
        )
    else:
        bar = _Lines(total, stage, unit, done)
    try:
        yield bar
    finally:
        bar.close()


class Metrics:
    """A file of one JSON object a line, in the order written: {"time", "stage", "step", ...values}.

    Only ever appended to, so a reader may follow it; a half line that a killed process left is cut off on opening.
    NaN and infinity, which JSON lacks, are written as null. Numbers on a device are fetched here, not before.
    Of several processes one writes; in the others, where `writes` is false, nothing comes of writing.
    """

    def __init__(self, path: str | os.PathLike, *, writes: bool = True):
        self.path, self.writes = Path(path), writes
        if writes and self.path.exists():
            with self.path.open("r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Append one row. `values` are JSON values, or scalars with .item() such as a 0-d tensor."""
        if not self.writes:
            return
        time_utc = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        row = {"time": time_utc, "stage": stage, "step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(row), allow_nan=False) + "\n")

    def rows(self) -> list[dict]:
        """All rows. UserError names the line that is not one."""
        if not self.path.exists():
            return []
        return [row for _, row in self._lines()]

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` after `step`: training resumes from that step's checkpoint and writes them anew."""
        if not self.writes or not self.path.exists():
            return
        kept = [line for line, row in self._lines() if not (row["stage"] == stage and row["step"] > step)]
        beside = self.path.with_name(self.path.name + ".tmp")
        with beside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def _lines(self) -> list[tuple[bytes, dict]]:
        """Each whole line with the row in it."""
        found = []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{self.path}:{number}: not a JSON row ({error}); delete that line") from None
            if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
                raise UserError(f"{self.path}:{number}: not a row with a stage and a step; delete that line")
            found.append((line, row))
        return found


def _plain(value: Any) -> Any:
    """`value` as JSON has it: scalars off the device, NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
