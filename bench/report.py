"""Write the README's tables, bench/results/README.md and the plots from bench/results: python -m bench.report [--check]

Of each case of bench/results/NAME.jsonl the newest row of each implementation counts. In the README a block between
`<!-- bench:NAME -->` and `<!-- /bench -->` holds ours beside the fastest peer, or every row where none is ours, and the
plot, of the device that was measured last; it is empty where there is no such file. The block of bench:all has how many
times as fast as the fastest peer ours is, of all benchmarks on all devices. bench/results/README.md has every row and
plot. --check changes nothing and exits with 1 where something differs from the rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench import harness, tables

README = Path(__file__).parents[1] / "README.md"
PAGE = """\
# Every row

Written by `python -m bench.report` from the files in this folder: of each implementation in each case the newest row. A
cell is the median time; where it was measured, the share of the limit (bare matrix products, or the bytes that must
move) and the memory at the peak beyond inputs and the weight's own gradient.
"""
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.S)


def rewrite(text: str, results: Path) -> str:
    """The README's text with every block as the rows have it."""

    def block(match: re.Match) -> str:
        opening, name, closing = match.groups()
        if name == "all":
            drawn = tables.overviews(everything(results))
            if not drawn:
                return opening + closing
            last = max(drawn, key=lambda file: max(case.ours["date"] for case in drawn[file]))
            image = f"![all on {drawn[last][0].device}](bench/plots/{last})"
            cases = [case for of_a_device in drawn.values() for case in of_a_device]
            return f"{opening}\n{tables.glance(cases)}\n\n{image}\n\n{closing}"
        rows = harness.read(name, results)
        if not rows:
            return opening + closing
        drawings = tables.drawings(name, rows)
        last = max(drawings, key=lambda file: max(row["date"] for row in drawings[file]))
        rows = drawings[last]
        shown = tables.summary(rows) if any(map(tables.is_ours, rows)) else tables.markdown(rows)
        images = pictures(name, {last: rows}, "bench/plots")
        return f"{opening}\n{shown}\n\n{source(name, rows)}\n\n{images}\n\n{closing}"

    return BLOCK.sub(block, text)


def page(results: Path) -> str:
    """The text of bench/results/README.md."""
    parts = [PAGE]
    for file, cases in tables.overviews(everything(results)).items():
        parts.append(f"![all on {cases[0].device}](../plots/{file})\n")
    for path in sorted(results.glob("*.jsonl")):
        rows = harness.read(path.stem, results)
        images = pictures(path.stem, tables.drawings(path.stem, rows), "../plots")
        parts.append(f"## {path.stem}\n\n{tables.markdown(rows)}\n\n{source(path.stem, rows)}\n\n{images}\n")
    return "\n".join(parts)


def source(name: str, rows: Sequence[dict]) -> str:
    dates = sorted(row["date"][:10] for row in tables.newest(rows))
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"`python -m bench.{name}`, {span}"


def pictures(name: str, drawings: dict[str, list[dict]], plots: str) -> str:
    return "\n".join(f"![{name} on {rows[0]['device']}]({plots}/{file})" for file, rows in drawings.items())


def everything(results: Path) -> dict[str, list[dict]]:
    return {path.stem: harness.read(path.stem, results) for path in sorted(results.glob("*.jsonl"))}


def drawings(results: Path) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Every plot that there should be: file name -> its digest and what draws it."""
    rows_of = everything(results)
    found = {
        file: (tables.overview_digest(cases), partial(tables.plot_overview, cases=cases))
        for file, cases in tables.overviews(rows_of).items()
    }
    for name, rows in rows_of.items():
        for file, members in tables.drawings(name, rows).items():
            found[file] = tables.digest(members), partial(tables.plot, name=name, rows=members)
    return found


def differences(readme: Path, results: Path, plots: Path) -> list[str]:
    """What is not as the rows have it, a sentence each."""
    wanted = drawings(results)
    found = [f"{file} is missing" for file in wanted if not (plots / file).exists()]
    for path in sorted(plots.glob("*.svg")):
        if path.name not in wanted:
            found.append(f"{path.name} has no rows")
        elif wanted[path.name][0] not in path.read_text("utf-8"):
            found.append(f"{path.name} differs from the rows")
    rows = results / "README.md"
    if not rows.exists() or rows.read_text("utf-8") != page(results):
        found.append(f"{results.name}/{rows.name} differs from the rows")
    text = readme.read_text("utf-8")
    return found if rewrite(text, results) == text else [*found, f"{readme.name} differs from the rows"]


def write(readme: Path, results: Path, plots: Path) -> None:
    wanted = drawings(results)
    for file, (_, draw) in wanted.items():
        draw(plots / file)
    for path in plots.glob("*.svg"):
        if path.name not in wanted:
            path.unlink()
    (results / "README.md").write_text(page(results), "utf-8")
    readme.write_text(rewrite(readme.read_text("utf-8"), results), "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something differs")
    args = parser.parse_args(argv)
    if args.check:
        found = differences(README, harness.RESULTS, tables.PLOTS)
        if found:
            sys.exit("\n".join([*found, "run: python -m bench.report"]))
    else:
        write(README, harness.RESULTS, tables.PLOTS)


if __name__ == "__main__":
    main()
