"""Every benchmark, each in a process of its own: python -m bench [--small | --full] [options of all]

--small takes 5 minutes and --full 8: kernels have two thirds of them, and a case that would begin later is left out and
counted; what is timed with whole models has the rest. --until takes another end, inf for none.
"""

from __future__ import annotations

import subprocess
import sys
import time

from bench import options

MINUTES = {"small": 5, "full": 8}
# Where in the time a benchmark of kernels stops beginning cases; what one leaves the next ones have.
SHARE = {"kendall": 0.1, "top_p": 0.15, "gather_logp": 0.25, "linear_logp": 0.45, "weighted_dpo": 0.65}
ALL = ("kendall", "top_p", "gather_logp", "linear_logp", "weighted_dpo", "score", "sample", "step")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\nIn this order: {', '.join(ALL)}. For the options: python -m bench.linear_logp --help")
        return
    failed, given = [], sys.argv[1:]
    args, _ = options.parser(__doc__).parse_known_args(given)
    begin, minutes = time.time(), MINUTES.get(options.resolve(args).size)
    for name in ALL:
        until = []
        if minutes and name in SHARE and "--until" not in given:
            until = ["--until", f"{begin + 60 * minutes * SHARE[name]:.0f}"]
        print(f"== bench.{name}", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *given, *until]).returncode:
            failed.append(name)
        print(f"== bench.{name} took {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"bench: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
