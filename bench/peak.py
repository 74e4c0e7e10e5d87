"""The peak memory of one implementation on a CPU, in a process of its own: python -m bench.peak MODULE NAME SPECS

Prints a JSON list: MiB for each of the cases that MODULE makes of SPECS, null where NAME is not there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD, LARGE = -3, 2**20  # of mallopt; bytes


def highest_mib() -> float:
    """The most that this process has held in memory since it started, or since reset().

    Not getrusage's ru_maxrss: a process inherits in it what its parent held when it started the process.
    """
    return int(re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.M)[1]) / 2**10


def map_large_blocks() -> None:
    """Have the C library ask the system for every block of a MiB, and give it back when it is freed.

    Otherwise what it keeps in its heap for the next one, and between blocks, counts as held, more or less of it each
    time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def reset() -> bool:
    """Give freed memory back to the system and put the high-water mark where memory is now; False where it is not
    Linux."""
    if not CLEAR.exists():
        return False
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    CLEAR.write_text("5")
    return True


def resident_peak_mib(function: Callable[[], object]) -> float | None:
    """What one call adds at most to what is held before it, or None where that cannot be told; the function should
    have run before."""
    if not reset():
        return None
    before = highest_mib()
    function()
    return highest_mib() - before


def main() -> None:
    module, name, specs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    map_large_blocks()
    make = importlib.import_module(module).case
    found = []
    for spec in specs:
        run = make(**spec, device="cpu", names=[name], weigh=True).run.get(name)
        if run is not None:
            run()
        found.append(None if run is None else resident_peak_mib(run))
        del run
    print(json.dumps(found))


if __name__ == "__main__":
    main()
