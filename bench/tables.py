"""Rows as a table for the terminal, as Markdown (all of them, or ours beside the fastest peer), and as a plot."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from bench import harness

PLOTS = Path(__file__).parent / "plots"
KEY = ("device", "threads", "piece", "model", "shape", "dtype", "mode")
RATES = {"tokens_per_second": "tokens/s", "sequences_per_second": "sequences/s", "pairs_per_second": "pairs/s"}


def newest(rows: Sequence[dict]) -> list[dict]:
    """Of each implementation on each device in each case the newest row, in the order of the first ones."""
    latest: dict[tuple, dict] = {}
    for row in rows:
        key = (*(str(row.get(name)) for name in KEY), row["impl"])
        if key not in latest or row["date"] >= latest[key]["date"]:
            latest[key] = row
    return list(latest.values())


def shape_label(row: Mapping) -> str:
    return " x ".join(map(str, row["shape"])) if isinstance(row["shape"], list) else str(row["shape"])


def number(value: float) -> str:
    """Three digits that count, never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(row: Mapping) -> str:
    """One row for the terminal, as it comes."""
    where = ", ".join(str(row[name]) for name in ("piece", "model", "dtype", "mode") if name in row)
    return f"{where} {shape_label(row)} {row['impl']}: {number(row['ms'])} ms ({row['p20']} to {row['p80']})"


def long_table(rows: Sequence[dict]) -> str:
    """Every row with everything a reader of a terminal wants to see."""
    columns = {
        "piece": "piece",
        "model": "model",
        "shape": "shape",
        "dtype": "dtype",
        "mode": "mode",
        "impl": "impl",
        "ms": "ms",
    }
    columns |= {"p20": "p20", "p80": "p80", "of_limit": "of limit", "mib": "MiB", "extra_mib": "extra MiB"}
    columns |= {"mfu": "MFU", "gain": "gain", "predicted": "predicted"}
    columns |= {"error": "error", "scaled_by": "scaled by", **RATES}
    used = [name for name in columns if any(name in row for row in rows)]
    body = [[shape_label(row) if name == "shape" else row.get(name) for name in used] for row in rows]
    return tabulate(body, [columns[name] for name in used], floatfmt=".4g")


def cell(row: Mapping | None) -> str:
    """ms, how much of the limit that is, and the extra memory."""
    if row is None:
        return ""
    parts = [f"{number(row['ms'])} ms{'*' if 'scaled_by' in row else ''}"]
    parts += [f"{number(row[rate])} {unit}" for rate, unit in RATES.items() if rate in row]
    parts += [f"{row['of_limit']:.0%}"] if "of_limit" in row else []
    parts += [f"{row['gain']:.2f} times ({row['predicted']:.2f} predicted)"] if "gain" in row else []
    parts += [f"{number(row['extra_mib'])} MiB"] if "extra_mib" in row else []
    return ", ".join(parts)


def groups(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Rows by device, threads and what is common to them (piece, dtype, mode): what one table or panel shows."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        common = ", ".join(row[name] for name in ("piece", "dtype", "mode") if name in row)
        found.setdefault((row["device"], row["threads"], common), []).append(row)
    return found


def columns_of(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(column_of(row) for row in rows))


def column_of(row: Mapping) -> str:
    return " ".join(filter(None, [row.get("model"), shape_label(row)]))


def markdown(rows: Sequence[dict]) -> str:
    """One small table for each device, dtype and mode; a line an implementation, a column a shape."""
    parts = []
    for (device, threads, common), members in groups(newest(rows)).items():
        columns = columns_of(members)
        by_place = {(row["impl"], column_of(row)): row for row in members}
        names = list(dict.fromkeys(row["impl"] for row in members))
        body = [[name, *(cell(by_place.get((name, column))) for column in columns)] for name in names]
        title = ", ".join(filter(None, [device, counted(threads), common]))
        parts.append(tabulate(body, [title, *columns], tablefmt="github", disable_numparse=True))
    return annotated(parts)


def summary(rows: Sequence[dict]) -> str:
    """One table for each device; a line a dtype and mode, a column a shape, a cell ours and the fastest peer."""
    devices: dict[str, dict[str, list[dict]]] = {}
    for (device, threads, common), members in groups(newest(rows)).items():
        devices.setdefault(f"{device}, {counted(threads)}", {})[common] = members
    parts = []
    for title, lines in devices.items():
        columns = columns_of([row for members in lines.values() for row in members])
        body = [
            [common, *(beside([row for row in members if column_of(row) == column]) for column in columns)]
            for common, members in lines.items()
        ]
        parts.append(tabulate(body, [title, *columns], tablefmt="github", disable_numparse=True))
    return annotated(parts)


def beside(rows: Sequence[dict]) -> str:
    """Of one case ours, the first of them where there are several, and the fastest peer; "" without ours."""
    ours = [row for row in rows if is_ours(row)]
    peers = sorted((row for row in rows if not is_ours(row)), key=lambda row: row["ms"])
    return "; ".join([*map(brief, ours[:1]), *(f"{row['impl']}: {brief(row)}" for row in peers[:1] if ours)])


def is_ours(row: Mapping) -> bool:
    return row["impl"].startswith("cream")


def brief(row: Mapping) -> str:
    """The rate, or ms where there is none, and the extra memory."""
    times = [f"{number(row[rate])} {unit}" for rate, unit in RATES.items() if rate in row]
    parts = times or [f"{number(row['ms'])} ms{'*' if 'scaled_by' in row else ''}"]
    return ", ".join(parts + ([f"{number(row['extra_mib'])} MiB"] if "extra_mib" in row else []))


def annotated(parts: Sequence[str]) -> str:
    text = "\n\n".join(parts)
    return f"{text}\n\n\\* timed on a part of the rows and scaled up." if " ms*" in text else text


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def drawings(name: str, rows: Sequence[dict]) -> dict[str, list[dict]]:
    """What there is to plot: file name -> the newest rows of one device."""
    found: dict[str, list[dict]] = {}
    for row in newest(rows):
        found.setdefault(f"{name}-{slug(row['device'])}.svg", []).append(row)
    return found


def digest(rows: Sequence[dict]) -> str:
    """Changes with what a plot of these rows shows; the plot carries it, so that it can be checked without drawing."""
    shown = [[row.get(name) for name in (*KEY, "impl", "ms", "p20", "p80")] for row in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def plot(path: Path, name: str, rows: Sequence[dict]) -> None:
    """Medians with p20 and p80, a panel for each dtype and mode. The bytes depend on rows and matplotlib's version."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    panels = groups(rows)
    names = list(dict.fromkeys(row["impl"] for row in rows))
    width = max(len(columns_of(members)) for members in panels.values())
    with matplotlib.rc_context({"svg.hashsalt": "cream", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(
            len(panels), 1, figsize=(2 + 2 * width, 2.2 * len(panels)), squeeze=False, layout="constrained"
        )
        for axis, ((_, threads, common), members) in zip(axes[:, 0], panels.items(), strict=True):
            columns = columns_of(members)
            shown = [name for name in names if any(row["impl"] == name for row in members)]
            for i, impl in enumerate(shown):
                mine = {column_of(row): row for row in members if row["impl"] == impl}
                shift = (i - (len(shown) - 1) / 2) * 0.7 / len(shown)
                places = [c + shift for c, column in enumerate(columns) if column in mine]
                found = [mine[column] for column in columns if column in mine]
                ms = [row["ms"] for row in found]
                below, above = [r["ms"] - r["p20"] for r in found], [r["p80"] - r["ms"] for r in found]
                color = f"C{names.index(impl) % 10}"
                axis.errorbar(places, ms, [below, above], fmt="o", markersize=4, color=color, label=impl)
            axis.set_xlim(-0.5, len(columns) - 0.5)
            axis.set_xticks(range(len(columns)), columns)
            axis.set_yscale("log")
            axis.set_ylabel("ms")
            axis.set_title(", ".join(filter(None, [common, counted(threads)])))
            axis.grid(axis="y", alpha=0.3)
            axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(f"{name}: {rows[0]['device']}")
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": digest(rows)})
        pyplot.close(figure)


def counted(threads: int) -> str:
    return f"{threads} thread{'' if threads == 1 else 's'}"


def show(name: str, rows: Sequence[dict], results: Path | None, protocol: str) -> None:
    """What every benchmark ends with: how it was done, one table, and the plot of all rows so far."""
    print(f"\n{protocol.strip()}\n")
    if not rows:
        print(f"{name}: nothing was measured")
        return
    print(long_table(rows))
    folder, plots = results or harness.RESULTS, results or PLOTS
    for file, members in drawings(name, harness.read(name, folder)).items():
        plot(plots / file, name, members)
        print(f"rows in {folder / name}.jsonl, plot in {plots / file}")
