"""Every benchmark that has peers, each in a process of its own: python -m bench [--small | --full] [options of all]

--small takes 5 minutes and --full 8: a case that would begin too late is left out and counted. --until takes another
end, inf for none. At the end stand one table and one plot: how many times as fast as its peers ours is in each case.
bench.native, bench.ladder and bench.tune are for those who work on the code and are not among them.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from datetime import datetime, timezone

from bench import harness, options, tables

MINUTES = {"small": 5, "full": 8}
# In this order. Where the time is limited, a benchmark of kernels begins no case after that share of what is left when
# it starts. None: a whole model, which takes what it takes; on a GPU it begins if there is a minute for it.
ORDER = {
    "small": {"score": None, "sample": None, "step": None}
    | {"kendall": 0.12, "top_p": 0.1, "gather_logp": 0.18, "linear_logp": 0.25, "weighted_dpo": 0.3},
    "full": {"step": None, "linear_logp": 0.45, "weighted_dpo": 0.55, "gather_logp": 0.3}
    | {"score": None, "sample": None, "top_p": 0.5, "kendall": 0.9},
}
A_MODEL = 60  # seconds
OF_ONE = ("peers", "modes", "models", "tokens")  # options whose values differ from one benchmark to the next


def passes(name: str, *arguments: str) -> bool:
    print(f"== bench.{name}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments]).returncode
    print(f"== bench.{name} took {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


def show(args, since: str) -> None:
    """The table and the plots of what was measured since then."""
    folder, plots = args.results or harness.RESULTS, args.results or tables.PLOTS
    rows_of = {name: harness.read(name, folder) for name in tables.COMPARED}
    recent = {name: [row for row in rows if row["date"] >= since] for name, rows in rows_of.items()}
    print(f"\n{tables.overview(tables.verdicts(recent))}")
    devices = {row["device"] for rows in recent.values() for row in rows}
    for file, cases in tables.overviews(rows_of).items():
        if cases[0].device in devices:
            tables.plot_overview(plots / file, cases)
            print(f"rows in {folder}, plot in {plots / file}")
    if args.results is None:
        print("python -m bench.report puts them into the README and bench/results/README.md")


def main() -> None:
    given = sys.argv[1:]
    parser = options.parser(__doc__)
    if {"-h", "--help"} & set(given):
        parser.print_help()
        return
    args, others = parser.parse_known_args(given)
    if wrong := [*others, *(f"--{name}" for name in OF_ONE if getattr(args, name) is not None)]:
        print(f"bench: {wrong[0]} is for one benchmark: python -m bench.NAME {wrong[0]} ...", file=sys.stderr)
        sys.exit(2)
    options.resolve(args)
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    end = args.until if args.until is not None else time.time() + 60 * MINUTES.get(args.size, math.inf)
    failed = []
    for name, share in ORDER.get(args.size, ORDER["small"]).items():
        now = time.time()
        if share is None and args.size == "full" and now + A_MODEL > end:
            print(f"== bench.{name} left out: less than a minute is left (--until inf measures all)")
        elif not passes(name, *given, *(() if share is None else ("--until", f"{now + share * (end - now):.0f}"))):
            failed.append(name)
    show(args, since)
    if failed:
        sys.exit(f"bench: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
