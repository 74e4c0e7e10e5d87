"""The protocol of every benchmark: the machine's facts, a check, turns that interleave, peaks, limits, rows.

A benchmark makes cases, one problem and several ways to solve it, and hands them to `run`. N tokens, D, V as elsewhere.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from bench import options

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
CPUINFO = Path("/proc/cpuinfo")
SLOW = 5  # times as slow as the first, cream, and over a tenth of the budget: one timed call has to do
WRITTEN = ("bench/results", "bench/plots", "README.md")  # by benchmarks and bench.report: of no matter to what is timed
FLUSH_BYTES = 2**28  # more than the L2 cache of any card
FEWEST_REPEATS = 5

PROTOCOL = """\
Protocol. Every implementation gets the same inputs and is first checked against float64: for every output (results and
gradients) the relative error ||out - truth|| / ||truth|| may be at most twice that of plain torch in the same dtype
(plus 1e-6), or it gives no row. That call compiles and warms up, and one more turn goes uncounted, except for what is
over 5 times as slow as cream and takes long: that turn is its time. The others take turns in one process, so that what
else the machine does falls on all: median (p20 to p80; least and most below five turns).
On a GPU each call starts with a cold L2 (256 MB are written before) and is timed by events. Limits are measured in the
same run: the bare matrix products of the operation by torch (no smaller number of floating-point operations is known;
of float32 copies where a CPU multiplies no half precision), and the bytes that must move at the speed of a large copy;
"of limit" is the larger of the two over the time, above 1 where an implementation multiplies faster than torch. Memory
is the peak during one call beyond what was there before it, results and gradients included; "extra" is without the
weight's own gradient. On a GPU it is the allocator's peak. On a CPU each implementation runs in a fresh process, where
every block of a MiB comes from the system and goes back to it: inputs made, one call of full size (so that libraries
are loaded and code is compiled), freed memory returned to the system, the process's high-water mark put back, then that
mark after one more call less that before it (VmHWM, so Linux only)."""


@dataclass
class Case:
    """One problem and the ways to solve it; each gives its outputs by name."""

    key: dict  # model, shape, dtype, mode: what rows are compared by
    run: dict[str, Callable[[], dict[str, Tensor]]]
    absent: dict[str, str]  # name -> why it is not in `run`
    truth: Callable[[str], dict[str, Tensor]]  # an implementation's name -> its outputs in float64
    yardstick: str | None = "eager"  # plain torch, whose error twice over the others may have; None: they may have none
    bare: dict[str, Callable[[], object]] = field(default_factory=dict)  # timed beside the others: what bounds them
    limits_ms: dict[str, float] = field(default_factory=dict)  # bounds that are arithmetic
    rounding: dict[str, float] = field(default_factory=dict)  # output -> what its own dtype may add to the error
    weight_gradient_bytes: int = 0
    scale: dict[str, float] = field(default_factory=dict)  # name -> its problem is this many times smaller
    versions: dict[str, str] = field(default_factory=dict)


def device_name(device: str) -> str:
    """The card's name, or the processor's with family and model: a virtual machine's name says little."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    first = CPUINFO.read_text().split("\n\n")[0] if CPUINFO.exists() else ""
    known = dict(re.findall(r"^(.+?)\s*: (.+)", first, re.M))
    if "model name" not in known:
        return platform.machine()
    number = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
    return known["model name"] + number


@cache
def commit() -> str | None:
    """The commit that is measured, with "+" where files differ from it that could matter; None outside a checkout."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        differs = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
        return git("rev-parse", "--short", "HEAD") + "+" * bool(differs)
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def facts(device: str) -> dict:
    """What a row needs to be believed: when, which code, on what, with which versions."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
    }


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _milliseconds(function: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    _flush_buffer().zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def interleave(
    run: Mapping[str, Callable[[], object]], repeats: int, device: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each, in turns, so that whatever else the machine does falls on all of them.

    `warm_up` more turns go first and are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in run}
    for repeat in range(-warm_up, repeats):
        for name, function in run.items():
            ms = _milliseconds(function, device)
            if repeat >= 0:
                times[name].append(ms)
    return times


def spread(ms: list[float]) -> dict[str, float]:
    """Median, p20 and p80; least, median and most below five repeats."""
    if len(ms) < 5:
        low, middle, high = min(ms), statistics.median(ms), max(ms)
    else:
        low, middle, high = (statistics.quantiles(ms, n=10)[i] for i in (1, 4, 7))
    return {"ms": round(middle, 4), "p20": round(low, 4), "p80": round(high, 4)}


def relative_errors(outputs: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """||out - truth|| / ||truth|| of every output that the truth has; the norm itself where the truth is zero."""
    errors = {}
    for name, exact in truth.items():
        scale = exact.norm().item()
        # in place, in a copy: of a weight's gradient there are gigabytes
        errors[name] = outputs[name].to(torch.float64, copy=True).sub_(exact).norm().item() / (scale or 1.0)
    return errors


def excess(errors: Mapping[str, float], plain: Mapping[str, float], rounding: Mapping[str, float]) -> float:
    """The worst error as a multiple of what is allowed, twice plain torch's and 1e-6; above 1 or nan is wrong."""
    ratios = [error / (2 * plain[name] + 1e-6 + rounding.get(name, 0.0)) for name, error in errors.items()]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


@cache
def copy_bytes_per_ms(device: str) -> float:
    """How fast a large copy moves bytes, reads and writes both counted."""
    source = torch.ones(2**28 if device == "cuda" else 2**26)
    source = source.to(device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def peak_mib(function: Callable[[], object], device: str) -> float:
    """MiB that one call of a warm function holds at most, beyond what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from bench.peak import resident_peak_mib

    return resident_peak_mib(function)


def child_peaks(module: str, name: str, specs: Sequence[dict]) -> list[float | None]:
    """MiB of that implementation in each case, in a process of its own; None where it is not there or cannot."""
    command = [sys.executable, "-m", "bench.peak", module, name, json.dumps(list(specs))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  memory of {name}: the process ended with {done.returncode}: {reason}")
        return [None] * len(specs)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, args: Namespace, memory: Mapping[str, float | None]) -> list[dict]:
    """Check, time and weigh one case; the rows of what was right, with what was wrong or absent printed."""
    device, label = args.device, ", ".join(str(v) for v in case.key.values())
    for name, reason in case.absent.items():
        print(f"  {label}: no {name}: {reason}")
    errors, excesses, right = {}, {}, {}
    for name in sorted(case.run, key=lambda name: name != case.yardstick):
        try:
            outputs = case.run[name]()
        except Exception as error:  # of a peer's code, which may raise anything; ours may not
            if name in ("cream", case.yardstick):
                raise
            print(f"  {label}: no {name}: it raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            continue
        errors[name] = relative_errors(outputs, case.truth(name))
        del outputs
        plain = errors[case.yardstick] if case.yardstick else dict.fromkeys(errors[name], 0.0)
        excesses[name] = excess(errors[name], plain, case.rounding)
        if excesses[name] <= 1:
            right[name] = case.run[name]
        else:
            print(f"  {label}: {name} is wrong, so it gives no row: {errors[name]}, allowed is twice {plain}")
    shown = [name for name in case.run if name in right and (args.peers is None or name in ["cream", *args.peers])]
    if not shown:
        return []
    turns = {name: right[name] for name in shown} | {f"bare {name}": f for name, f in case.bare.items()}
    once = interleave(turns, 1, device, warm_up=0)
    slow = {name for name, (ms,) in once.items() if ms > SLOW * once[shown[0]][0] and ms > 1e3 * args.budget / 10}
    a_turn = sum(ms for name, (ms,) in once.items() if name not in slow)
    repeats = max(FEWEST_REPEATS, min(args.repeats, int(1e3 * args.budget / a_turn)))
    times = interleave({name: turns[name] for name in turns if name not in slow}, repeats, device, warm_up=0)
    times |= {name: once[name] for name in slow}
    limits = case.limits_ms | {name: statistics.median(times[f"bare {name}"]) for name in case.bare}
    known, rows = facts(device) | case.key, []
    for name in shown:
        row = known | {"impl": name}
        row |= {"version": case.versions[name]} if name in case.versions else {}
        factor = case.scale.get(name, 1.0)
        row |= spread([factor * ms for ms in times[name]]) | {"repeats": len(times[name])}
        row |= {"scaled_by": factor} if factor != 1 else {}
        mib = memory[name] if name in memory else peak_mib(right[name], device) if device == "cuda" else None
        if mib is not None:
            row |= {"mib": round(mib, 1), "extra_mib": round(mib - case.weight_gradient_bytes / 2**20, 1)}
        if limits:
            row["limits_ms"] = {limit: round(ms, 4) for limit, ms in limits.items()}
            row["of_limit"] = round(max(limits.values()) / row["ms"], 4)
        row |= {"error": float(f"{max(errors[name].values()):.3g}"), "excess": float(f"{excesses[name]:.3g}")}
        rows.append(row)
    return rows


def run(
    name: str,
    make: Callable[..., Case],  # make(**spec, device=..., names=...); names None means all that are there
    specs: Sequence[dict],
    args: Namespace,
    names: Sequence[str],  # every implementation that can run here in some case
) -> list[dict]:
    """Measure every case, record its rows at once, then show protocol, table and plot."""
    from bench import tables

    peaks: list[dict[str, float | None]] = [{} for _ in specs]
    if args.memory and args.device == "cpu":
        # where a whole run should take minutes, one dtype's peaks beside plain torch's tell enough
        small = args.size == "small"
        wanted = [i for i, spec in enumerate(specs) if not small or spec["dtype"] == "float32"]
        for impl in [name for name in names if not small or name in ("cream", "eager")]:
            found = child_peaks(f"bench.{name}", impl, [specs[i] for i in wanted])
            for i, mib in zip(wanted, found, strict=True):
                peaks[i][impl] = mib
            print(f"  memory of {impl}: {', '.join('-' if mib is None else f'{mib:.0f}' for mib in found)} MiB")
    rows = []
    for done, (spec, memory) in enumerate(zip(specs, peaks, strict=True)):
        if done and options.is_over(args, len(specs) - done):
            break
        asked = None if args.peers is None else [*dict.fromkeys(["cream", *args.peers, "eager"])]
        found = measure(make(**spec, device=args.device, names=asked), args, memory)
        record(name, found, args.results)
        for row in found:
            print(f"  {tables.line(row)}", flush=True)
        rows += found
    tables.show(name, rows, args.results, f"{sys.modules[make.__module__].__doc__.strip()}\n\n{PROTOCOL}")
    return rows


def record(name: str, rows: list[dict], results: Path | None = None) -> None:
    """Append rows to bench/results/NAME.jsonl (or another folder's); refuses a row whose check is red."""
    for row in rows:
        if "excess" in row and not row["excess"] <= 1:
            raise ValueError(f"{row['impl']} is wrong by {row['excess']} times what is allowed: no row")
    folder = RESULTS if results is None else results
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def read(name: str, results: Path | None = None) -> list[dict]:
    """The rows of bench/results/NAME.jsonl, oldest first; none where there is no such file."""
    path = (RESULTS if results is None else results) / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
