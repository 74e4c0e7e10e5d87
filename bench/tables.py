"""Rows as a table for the terminal, as Markdown (all of them, or ours beside the fastest peer), and as a plot; and how
many times as fast as its peers ours is, of all benchmarks in one table and one plot."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from bench import harness

PLOTS = Path(__file__).parent / "plots"
COMPARED = ("linear_logp", "weighted_dpo", "gather_logp", "kendall", "top_p", "step", "score", "sample")  # with peers
RUN = timedelta(minutes=1)  # within which the rows of one run of a case are written
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


def of_another_run(row: Mapping, members: Iterable[Mapping]) -> bool:
    """Whether the newest row of ours among the members was not measured beside this one."""
    ours = [member["date"] for member in members if is_ours(member)]
    return bool(ours) and abs(datetime.fromisoformat(row["date"]) - datetime.fromisoformat(max(ours))) > RUN


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


def cell(row: Mapping | None, another_run: bool = False) -> str:
    """ms, how much of the limit that is, and the extra memory."""
    if row is None:
        return ""
    parts = [f"{number(row['ms'])} ms{'*' if 'scaled_by' in row else ''}{'†' if another_run else ''}"]
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
        case = {column: [row for row in members if column_of(row) == column] for column in columns}
        cells = {
            (row["impl"], column): cell(row, of_another_run(row, case[column]))
            for column in columns
            for row in case[column]
        }
        names = list(dict.fromkeys(row["impl"] for row in members))
        body = [[name, *(cells.get((name, column), "") for column in columns)] for name in names]
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
    fastest = [f"{row['impl']}: {brief(row, of_another_run(row, rows))}" for row in peers[:1] if ours]
    return "; ".join([*map(brief, ours[:1]), *fastest])


def is_ours(row: Mapping) -> bool:
    return row["impl"].startswith("cream")


def brief(row: Mapping, another_run: bool = False) -> str:
    """The rate, or ms where there is none, and the extra memory."""
    times = [f"{number(row[rate])} {unit}" for rate, unit in RATES.items() if rate in row]
    times = times or [f"{number(row['ms'])} ms{'*' if 'scaled_by' in row else ''}"]
    times[-1] += "†" if another_run else ""
    return ", ".join(times + ([f"{number(row['extra_mib'])} MiB"] if "extra_mib" in row else []))


def annotated(parts: Sequence[str]) -> str:
    text = "\n\n".join(parts)
    notes = {" ms*": "\\* timed on a part of the rows and scaled up.", "†": "† in another run than the newest of ours."}
    return "\n\n".join([text, *(note for mark, note in notes.items() if mark in text)])


class Verdict(NamedTuple):
    """One case that ours and peers were measured in."""

    device: str
    threads: int
    name: str  # of the benchmark
    common: str  # dtype and mode
    column: str  # model and shape
    ours: dict
    peers: dict[str, float]  # implementation -> how many times as fast ours is
    memory: float | None  # ours beyond inputs and the weight's own gradient as a share of eager's

    @property
    def fastest(self) -> str:
        return min(self.peers, key=self.peers.get)

    @property
    def times(self) -> float:
        return self.peers[self.fastest]

    @property
    def case(self) -> str:
        return " ".join([self.name, self.common, self.column])


def verdicts(rows_of: Mapping[str, Sequence[dict]]) -> list[Verdict]:  # benchmark -> its rows
    found = []
    for name in [name for name in COMPARED if name in rows_of]:
        for (device, threads, common), members in groups(newest(rows_of[name])).items():
            for column in columns_of(members):
                case = [row for row in members if column_of(row) == column]
                ours = [row for row in case if is_ours(row)][:1]
                peers = {row["impl"]: speed(ours[0]) / speed(row) for row in case if ours and not is_ours(row)}
                if peers:
                    memory = {row["impl"]: row["extra_mib"] for row in case if row.get("extra_mib", 0) > 0}
                    both = "eager" in memory and ours[0]["impl"] in memory
                    share = memory[ours[0]["impl"]] / memory["eager"] if both else None
                    found.append(Verdict(device, threads, name, common, column, ours[0], peers, share))
    return found


def speed(row: Mapping) -> float:
    return next((row[rate] for rate in RATES if rate in row), 1 / row["ms"])


def overview(cases: Sequence[Verdict]) -> str:
    """One line a case, for the terminal."""
    header = ["benchmark", "dtype, mode", "case", "ours", "fastest peer", "times as fast", "memory of eager's"]
    body = [
        [
            c.name,
            c.common,
            c.column,
            brief(c.ours),
            c.fastest,
            f"{c.times:.2f}",
            "" if c.memory is None else f"{c.memory:.0%}",
        ]
        for c in cases
    ]
    return tabulate(body, header, disable_numparse=True)


def glance(cases: Sequence[Verdict]) -> str:
    """One line a benchmark, dtype and mode, a column a device: how many times as fast as the fastest peer, from the
    shape with the least to that with the most."""
    devices = list(dict.fromkeys(c.device for c in cases))
    usual = statistics.mode(c.threads for c in cases)
    found: dict[str, dict[str, list[float]]] = {}
    for c in sorted(cases, key=lambda c: COMPARED.index(c.name)):
        line = ", ".join([c.name, c.common] + ([] if c.threads == usual else [counted(c.threads)]))
        found.setdefault(line, {}).setdefault(c.device, []).append(c.times)
    body = [[line, *(between(times.get(device, [])) for device in devices)] for line, times in found.items()]
    title = f"times as fast as the fastest peer, {counted(usual)}"
    return tabulate(body, [title, *devices], tablefmt="github", disable_numparse=True)


def between(values: Sequence[float]) -> str:
    ends = [f"{value:.2f}" if value < 10 else number(value) for value in sorted({*values})]
    return " to ".join(dict.fromkeys(ends[:1] + ends[-1:]))


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


def overviews(rows_of: Mapping[str, Sequence[dict]]) -> dict[str, list[Verdict]]:
    """What there is to plot of all benchmarks: file name -> the cases of one device."""
    found: dict[str, list[Verdict]] = {}
    for case in verdicts(rows_of):
        found.setdefault(f"all-{slug(case.device)}.svg", []).append(case)
    return found


def overview_digest(cases: Sequence[Verdict]) -> str:
    shown = [[c.case, c.threads, c.peers] for c in cases]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def plot_overview(path: Path, cases: Sequence[Verdict]) -> None:
    """How many times as fast as each peer, a line a case; right of 1 ours is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    impls = list(dict.fromkeys(impl for case in cases for impl in case.peers))
    with matplotlib.rc_context({"svg.hashsalt": "cream", "svg.fonttype": "none", "font.size": 8}):
        figure, axis = pyplot.subplots(figsize=(9, 1 + 0.16 * len(cases)), layout="constrained")
        for i, impl in enumerate(impls):
            places = [y for y, case in enumerate(cases) if impl in case.peers]
            marker = "os^vD"[i // 10 % 5]
            times = [cases[y].peers[impl] for y in places]
            axis.plot(times, places, marker, markersize=4, color=f"C{i % 10}", label=impl)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(cases)), [case.case for case in cases])
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.set_xlabel("times as fast as the peer")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.set_title(cases[0].device)
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": overview_digest(cases)})
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
