"""Write the README's tables and the plots from bench/results: python -m bench.report [--check]

A block between `<!-- bench:NAME -->` and `<!-- /bench -->` holds the newest row of each implementation in each case of
bench/results/NAME.jsonl; it is empty where there is no such file. --check changes nothing and exits with 1 where README
or plots differ from the rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import harness, tables

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.S)


def rewrite(text: str, results: Path) -> str:
    """The README's text with every block as the rows have it."""

    def block(match: re.Match) -> str:
        opening, name, closing = match.groups()
        rows = harness.read(name, results)
        if not rows:
            return opening + closing
        drawings = tables.drawings(name, rows)
        images = "\n".join(f"![{name} on {d[0]['device']}](bench/plots/{file})" for file, d in drawings.items())
        dates = sorted(row["date"][:10] for row in tables.newest(rows))
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        return f"{opening}\n{tables.markdown(rows)}\n\n`python -m bench.{name}`, {span}\n\n{images}\n\n{closing}"

    return BLOCK.sub(block, text)


def drawings(results: Path) -> dict[str, tuple[str, list[dict]]]:
    """Every plot that there should be: file name -> benchmark and rows."""
    return {
        file: (path.stem, rows)
        for path in sorted(results.glob("*.jsonl"))
        for file, rows in tables.drawings(path.stem, harness.read(path.stem, results)).items()
    }


def differences(readme: Path, results: Path, plots: Path) -> list[str]:
    """What is not as the rows have it, a sentence each."""
    wanted = drawings(results)
    found = [f"{file} is missing" for file in wanted if not (plots / file).exists()]
    for path in sorted(plots.glob("*.svg")):
        if path.name not in wanted:
            found.append(f"{path.name} has no rows")
        elif tables.digest(wanted[path.name][1]) not in path.read_text("utf-8"):
            found.append(f"{path.name} differs from the rows")
    text = readme.read_text("utf-8")
    return found if rewrite(text, results) == text else [*found, f"{readme.name} differs from the rows"]


def write(readme: Path, results: Path, plots: Path) -> None:
    wanted = drawings(results)
    for file, (name, rows) in wanted.items():
        tables.plot(plots / file, name, rows)
    for path in plots.glob("*.svg"):
        if path.name not in wanted:
            path.unlink()
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
