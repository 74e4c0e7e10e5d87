"""What every benchmark shares: the machine's facts, turns that interleave, rows as JSON lines.

Nothing is timed before its result was checked; that is each benchmark's own `check`.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return models[0] if models else platform.machine()


def commit() -> str | None:
    """The commit that is measured, with "+" where files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


def facts(device: str) -> dict:
    """What a row needs to be believed: when, which code, on what, with which versions."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def interleave(run: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each, in turns, so that whatever else the machine does falls on all of them.

    One more turn goes first and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in run}
    for repeat in range(repeats + 1):
        for name, function in run.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(ms: list[float]) -> dict[str, float]:
    """Median, p20 and p80; least, median and most below five repeats."""
    if len(ms) < 5:
        low, middle, high = min(ms), statistics.median(ms), max(ms)
    else:
        low, middle, high = (statistics.quantiles(ms, n=10)[i] for i in (1, 4, 7))
    return {"ms": round(middle, 4), "p20": round(low, 4), "p80": round(high, 4)}


def record(name: str, rows: list[dict]) -> None:
    """Append rows to bench/results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
