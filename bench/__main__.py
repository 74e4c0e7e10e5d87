"""Every benchmark, each in a process of its own: python -m bench [--small | --full] [options of all]"""

from __future__ import annotations

import subprocess
import sys
import time

ALL = ("kendall", "top_p", "gather_logp", "linear_logp", "weighted_dpo", "score", "sample", "step")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\nIn this order: {', '.join(ALL)}. For the options: python -m bench.linear_logp --help")
        return
    failed = []
    for name in ALL:
        print(f"== bench.{name}", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *sys.argv[1:]]).returncode:
            failed.append(name)
        print(f"== bench.{name} took {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"bench: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
