"""Every benchmark, each in a process of its own: python -m bench [--small | --full] [options of all]

--small takes 5 minutes and --full 8: whole models come first, kernels have what is left of the time, and a case that
would begin too late for it is left out and counted. --until takes another end, inf for none.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time

from bench import options

MINUTES = {"small": 5, "full": 8}
MODELS = ("score", "sample", "step")
# Where in the time that they leave a benchmark of kernels stops beginning cases.
KERNELS = {"kendall": 0.12, "top_p": 0.2, "gather_logp": 0.35, "linear_logp": 0.5, "weighted_dpo": 0.65}


def passes(name: str, *arguments: str) -> bool:
    print(f"== bench.{name}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments]).returncode
    print(f"== bench.{name} took {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


def main() -> None:
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        order = ", ".join((*MODELS, *KERNELS))
        print(f"{__doc__}\nIn this order: {order}. For the options: python -m bench.linear_logp --help")
        return
    args, _ = options.parser(__doc__).parse_known_args(given)
    end = time.time() + 60 * MINUTES.get(options.resolve(args).size, math.inf)
    failed = [name for name in MODELS if not passes(name, *given)]
    now = time.time()
    for name, share in KERNELS.items():
        if not passes(name, "--until", f"{now + share * (end - now):.0f}", *given):
            failed.append(name)
    if failed:
        sys.exit(f"bench: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
