"""cream.log: what reaches a person's terminal, and the metrics file."""

import fcntl
import json
import os
import re
import select
import struct
import sys
import termios
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cream import log
from cream.log import Metrics, UserError, entry, printable, progress, say


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


# printable and say


@pytest.mark.parametrize(
    "text, safe",
    [
        ("plain, naïve, 数学, 👩‍🔬", "plain, naïve, 数学, 👩‍🔬"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b]0;title\x07red\x1b[31m", "\\x1b]0;title\\x07red\\x1b[31m"),
        ("over\rwritten\b\x7f", "over\\rwritten\\x08\\x7f"),
        ("C1 \x9b31m", "C1 \\x9b31m"),
        ("\u202eesrever", "\\u202eesrever"),
        ("a\udc80b", "a\\udc80b"),
    ],
)
def test_printable(text, safe):
    assert printable(text) == safe


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_printable_can_be_written_and_does_not_change_twice(text):
    safe = printable(text)
    safe.encode("utf-8")
    assert printable(safe) == safe
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in safe)


def test_say_goes_to_stderr_only(capsys):
    say("a \x1b[2J b")
    assert capsys.readouterr() == ("", "a \\x1b[2J b\n")


# entry


def test_entry_makes_one_line_of_a_users_mistake(capsys):
    @entry
    def main(path):
        raise UserError(f"{path}: no such\nfile \x1b[31m")

    with pytest.raises(SystemExit) as stopped:
        main("a.jsonl")
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "error: a.jsonl: no such file \\x1b[31m\n")


def test_entry_makes_one_line_of_an_interruption(capsys):
    @entry
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_entry_leaves_the_rest_alone():
    @entry
    def main(value):
        """Doubles."""
        return 2 / value

    assert main(1) == 2 and main.__doc__ == "Doubles."
    with pytest.raises(ZeroDivisionError):
        main(0)
    with pytest.raises(SystemExit) as stopped:
        entry(sys.exit)(7)
    assert stopped.value.code == 7


# progress


def test_plain_progress_is_a_line_each_ten_seconds_and_one_at_the_end(capsys, clock):
    with progress(40, "iter1/sample", "prompts") as bar:
        for _ in range(40):
            clock(1)
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "iter1/sample: 10/40 prompts, 1.00 prompts/s, 00:10 so far, 00:30 left",
        "iter1/sample: 20/40 prompts, 1.00 prompts/s, 00:20 so far, 00:20 left",
        "iter1/sample: 30/40 prompts, 1.00 prompts/s, 00:30 so far, 00:10 left",
        "iter1/sample: 40/40 prompts, 1.00 prompts/s, 00:40 so far, 00:00 left",
    ]


def test_plain_progress_without_a_total_and_with_large_counts(capsys, clock):
    with progress(None, "sft", "tokens") as bar:
        clock(2)
        bar.update(50_000)
    with progress(2_000_000, "score", "tokens") as bar:
        clock(4)
        bar.update(500_000)
    assert capsys.readouterr().err.splitlines() == [
        "sft: 50.0k tokens, 25.0k tokens/s, 00:02 so far",
        "score: 500k/2.00M tokens, 125k tokens/s, 00:04 so far, 00:12 left",
    ]


def test_units_done_before_a_resume_do_not_count_in_the_rate(capsys, clock):
    with progress(32, "sample", "prompts", done=16) as bar:
        clock(8)
        bar.update(8)
    assert capsys.readouterr().err == "sample: 24/32 prompts, 1.00 prompts/s, 00:08 so far, 00:08 left\n"


def test_plain_progress_is_closed_by_an_exception(capsys, clock):
    with pytest.raises(ValueError), progress(4, "score", "chunks") as bar:
        clock(1)
        bar.update(1)
        raise ValueError
    assert capsys.readouterr().err == "score: 1/4 chunks, 1.00 chunks/s, 00:01 so far, 00:03 left\n"


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns, lines) makes stderr a terminal of that size; .read() is what was written so far.

    To be called in the test itself: pytest sets its own stderr after set-up.
    """
    ours, theirs = os.openpty()
    stderr = os.fdopen(theirs, "w", encoding="utf-8")

    def make(columns, lines):
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        monkeypatch.setattr(sys, "stderr", stderr)
        return make

    def read():
        stderr.flush()
        written = b""
        while select.select([ours], [], [], 0.3)[0]:  # the kernel hands it over in pieces, a little later
            written += os.read(ours, 4096)
        return written.decode()

    make.read = read
    yield make
    stderr.close()
    os.close(ours)


def test_live_bars_nest_let_text_pass_and_close(terminal):
    screen, threads = terminal(90, 30), threading.active_count()
    with pytest.raises(ValueError), progress(2, "outer\x1b", "steps") as outer:
        with progress(3, "inner", "prompts") as inner:
            inner.update(3)
            say("said between")
        outer.update(1)
        raise ValueError
    written = screen.read()
    assert "outer\\x1b  50%|" in written and "\n\rinner" in written and " left" in written
    assert "said between\r\n" in written
    assert written.endswith("\n")  # what is printed next starts at the left margin
    assert max(map(len, re.split("[\r\n]|\x1b\\[A", written))) <= 90
    assert not log._Bar._instances and threading.active_count() == threads


def test_a_terminal_without_size_gets_lines(terminal, clock):
    screen = terminal(90, 0)
    with progress(2, "sample", "prompts") as bar:
        clock(1)
        bar.update(2)
    assert screen.read() == "sample: 2/2 prompts, 2.00 prompts/s, 00:01 so far, 00:00 left\r\n"


# Metrics


def test_rows_come_back_in_order_with_what_json_lacks_as_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(stage="sft", step=1, loss=1.5, lr=np.float32(0.5), curve=[1.0, float("nan")])
    metrics.write(stage="iter1/train", step=1, **{"rewards/chosen": float("inf"), "note": "naïve\n\ud800"})
    first, second = metrics.rows()
    assert first.pop("time") <= second.pop("time")
    assert first == {"stage": "sft", "step": 1, "loss": 1.5, "lr": 0.5, "curve": [1.0, None]}
    assert second == {"stage": "iter1/train", "step": 1, "rewards/chosen": None, "note": "naïve\n\ud800"}
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_scalars_of_torch_are_fetched(tmp_path):
    torch = pytest.importorskip("torch")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(stage="sft", step=1, loss=torch.tensor(0.25), grad_norm=torch.tensor(float("nan")))
    assert (metrics.rows()[0]["loss"], metrics.rows()[0]["grad_norm"]) == (0.25, None)


def test_opening_again_appends_after_cutting_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Metrics(path).write(stage="sft", step=1, loss=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": "2026-')
    metrics = Metrics(path)
    assert path.read_bytes() == whole
    metrics.write(stage="sft", step=2, loss=0.5)
    assert [row["step"] for row in metrics.rows()] == [1, 2]


def test_rewind_drops_only_that_stage_after_that_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.rewind("sft", 0)  # nothing there yet
    assert metrics.rows() == []
    for stage, step in [("sft", 1), ("sft", 2), ("iter1/train", 1), ("iter1/train", 2), ("sft", 3)]:
        metrics.write(stage=stage, step=step)
    metrics.rewind("sft", 1)
    assert [(r["stage"], r["step"]) for r in metrics.rows()] == [("sft", 1), ("iter1/train", 1), ("iter1/train", 2)]
    metrics.write(stage="sft", step=2)
    assert metrics.rows()[-1]["stage"] == "sft"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("bad", ["{", "[1]", json.dumps({"stage": "sft"})])
def test_a_damaged_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n' + bad + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        Metrics(path).rewind("sft", 0)
    assert path.read_bytes() == before
