"""The report of a run: terminal tables and one self-contained HTML page.

P prompts, R responses a prompt. Rewards in nats, tau in [-1, 1], agreement and accuracy in [0, 1].

`python -m cream.report RUN_DIR` writes RUN_DIR/report.html and prints the tables. A run that is unfinished gives a
report of what is there. Generated text is not to be trusted: the page escapes all of it and allows no scripts at all,
the tables pass it through `printable`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from cream import plots
from cream.checkpoint import write_atomic
from cream.log import entry, printable, say
from cream.summary import Round, Summary, collect, finite, mean_of, percent


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def _number(value: object, digits: int) -> str:
    return "-" if finite(value) is None else f"{value:,.{digits}f}"


def _cell(value: object) -> str:
    """One line of text that no terminal obeys."""
    return printable(" ".join(str(value).split()))


def tables(summary: Summary) -> list[Table]:
    """What a terminal and the page both show."""
    found = [_accuracy_table(summary), _rounds_table(summary), _stages_table(summary)]
    return [
        Table(t.title, t.note, [_cell(h) for h in t.header], [[_cell(c) for c in row] for row in t.rows])
        for t in found
        if t.rows
    ]


def _accuracy_table(summary: Summary) -> Table:
    rows = []
    for task in dict.fromkeys(s.task for s in summary.scores):
        for s in summary.scores:
            if s.task == task:
                change = "" if s.model == summary.models[0] else f"+{s.gained} -{s.lost}"
                interval = f"{100 * s.low:.1f} - {100 * s.high:.1f}"
                more = (percent(value) for value in (s.answered, s.acc, s.acc_norm))
                rows.append([task, s.model, str(s.n), percent(s.accuracy), interval, change, *more])
    if len({s.task for s in summary.scores}) > 1:
        rows += [["mean of tasks", model, "", percent(mean), *[""] * 5] for model, mean in summary.means.items()]
    first = summary.models[0] if summary.models else "M0"
    return Table(
        "Accuracy",
        f"correct: generated answers, greedy, exact match, with Wilson's 95% interval; vs {first}: questions won and "
        "lost against it; answered: an answer could be read; acc, acc_norm: by option likelihood, as lm-eval has them",
        ["task", "model", "n", "correct", "95% interval", f"vs {first}", "answered", "acc", "acc_norm"],
        rows,
    )


def _rounds_table(summary: Summary) -> Table:
    def row(label: str, value: Callable[[Round], str]) -> list[str]:
        return [label, *(value(r) for r in summary.rounds)]

    def fact(key: str, digits: int) -> Callable[[Round], str]:
        return lambda r: _number(r.facts.get(key), digits)

    def dropped(reason: str) -> Callable[[Round], str]:
        return lambda r: _number(r.facts.get("dropped", {}).get(reason), 0)

    def length(column: str) -> Callable[[Round], str]:
        return lambda r: _number(mean_of(getattr(r, column)), 1) if getattr(r, column) else "-"

    def too_long(r: Round) -> str:
        return _number(_facts(summary, f"iter{r.iteration}/train").get("too_long"), 0)

    choices = ("level", "method", "map")
    rows = [
        row("prompts", lambda r: _number(r.prompts, 0)),
        row("responses a prompt", lambda r: _number(r.responses, 0)),
        row("tau, mean", fact("tau_mean", 3)),
        row("tau, standard deviation", fact("tau_std", 3)),
        row("agreement, mean of kept pairs", fact("agreement_mean", 3)),
        row("agreement level, method, map", lambda r: ", ".join(str(r.facts.get(key, "-")) for key in choices)),
        row("rankings without a tau (all tied or undefined)", fact("tied_rankings", 0)),
        row("pairs kept", fact("kept", 0)),
        row("dropped: best and worst tied", dropped("tied")),
        row("dropped: best and worst identical", dropped("identical")),
        row("dropped: rewards not finite", dropped("nan")),
        row("left out: too long for training", too_long),
        row("reward margin best - worst, nats", fact("reward_margin", 2)),
        row("response length, mean tokens", length("lengths")),
        row("chosen length, mean tokens", length("chosen_lengths")),
        row("rejected length, mean tokens", length("rejected_lengths")),
        row("responses that ended by themselves", lambda r: percent(r.stopped)),
    ]
    header = ["", *(f"iteration {r.iteration}" for r in summary.rounds)]
    return Table("Iterations", "", header, rows if summary.rounds else [])


def _facts(summary: Summary, stage: str) -> dict:
    """What the ledger says of a stage; empty where it has not finished."""
    return next((s.get("facts") or {} for s in summary.stages if s["stage"] == stage), {})


def _stages_table(summary: Summary) -> Table:
    rows = []
    for stage in summary.stages:
        facts = _facts(summary, stage["stage"])
        numbers = [_number(facts.get(key), d) for key, d in (("seconds", 1), ("tokens", 0), ("tokens_per_second", 0))]
        numbers.append(percent(finite(facts.get("mfu"))))
        numbers += [_number(facts.get(key), d) for key, d in (("memory_gb", 2), ("sequence_forwards_per_prompt", 2))]
        rows.append([stage["stage"], *numbers, str(stage.get("time", "-"))[:19]])
    total = sum(finite(_facts(summary, s["stage"]).get("seconds")) or 0 for s in summary.stages)
    if rows:
        rows.append(["all", _number(total, 1), *[""] * 6])
    note = (
        "tokens: computed, prompts once for all their answers; MFU: of the device's peak in the model's dtype (a data "
        "sheet's for bfloat16 on a known GPU, else a large product's), nothing counted that is computed again; GB: the "
        "most held; forwards: of a prompt with one answer, a prompt"
    )
    return Table(
        "Stages", note, ["stage", "seconds", "tokens", "tokens/s", "MFU", "GB", "forwards a prompt", "finished"], rows
    )


def lineage(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Of every model: (directory, stage that made it, that stage's inputs with their hashes, the model's own hash)."""
    found = []
    for stage in summary.stages:
        inputs = ", ".join(f"{name} {str(digest)[:12]}" for name, digest in (stage.get("inputs") or {}).items())
        for path, digest in (stage.get("outputs") or {}).items():
            if Path(path).name in ("model", "merged", "m0"):
                found.append(tuple(map(_cell, (path, stage["stage"], inputs, str(digest)[:12]))))
    return found


def versions() -> list[tuple[str, str]]:
    """The packages that this report was written with."""
    found = []
    for package in ("cream-trainer", "torch", "transformers", "matplotlib"):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found


def figures(summary: Summary) -> list[tuple[str, str]]:
    """(caption, SVG element) of every plot for which there are numbers."""
    found = []
    if summary.scores:
        by_task: dict[str, dict[str, tuple[float, float, float]]] = {}
        for s in summary.scores:
            by_task.setdefault(_label(s.task), {})[s.model] = (s.accuracy, s.low, s.high)
        lines = {task: [scores.get(model) for model in summary.models] for task, scores in by_task.items()}
        svg = plots.accuracy([_label(model) for model in summary.models], lines)
        found.append(("Accuracy of generated answers per model, with 95% intervals", svg))
    if ranked := [r for r in summary.rounds if r.taus]:
        svg = plots.tau_histograms([(r.iteration, r.taus) for r in ranked], max(r.responses for r in ranked))
        found.append(("How far each prompt's ranking agrees with the previous model's", svg))
        points = [(r.iteration, r.facts.get("tau_mean"), r.facts.get("agreement_mean")) for r in ranked]
        found.append(("Mean tau and agreement per iteration", plots.agreement(points)))
    if trained := [(_label(s), rows) for s, rows in summary.curves.items() if any("rewards/chosen" in r for r in rows)]:
        found.append(("Rewards of chosen and rejected answers while training", plots.rewards(trained)))
    if descended := [(_label(s), rows) for s, rows in summary.curves.items() if any("loss" in r for r in rows)]:
        found.append(("Losses", plots.losses(descended)))
    if sampled := [r for r in summary.rounds if r.lengths]:
        pairs = [(r.iteration, r.chosen_lengths, r.rejected_lengths) for r in sampled if r.chosen_lengths]
        svg = plots.lengths([(r.iteration, r.lengths) for r in sampled], pairs)
        found.append(("Response length, and chosen against rejected answers (length bias)", svg))
    return found


def _label(value: object) -> str:
    """A name short enough for a plot."""
    return _cell(value)[:40]


def table(run_dir: Path) -> str:
    """The tables and warnings as plain text for a terminal, nothing in it that a terminal obeys."""
    return _as_text(collect(run_dir))


def _as_text(summary: Summary) -> str:
    from tabulate import tabulate

    blocks = []
    for t in tables(summary):
        align = ["left"] + ["right"] * (len(t.header) - 1)
        lines = tabulate(t.rows, t.header, tablefmt="simple", disable_numparse=True, colalign=align)
        blocks.append("\n\n".join(filter(None, (t.title, lines, textwrap.fill(t.note, 110)))))
    blocks += [f"warning: {_cell(w)}" for w in summary.warnings]
    return "\n\n".join(blocks) or "nothing has finished yet"


def write(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html, a single file that loads nothing and runs nothing; returns its path."""
    summary = collect(run_dir)
    path = Path(run_dir) / "report.html"
    write_atomic(path, _as_html(summary).encode("utf-8"))
    return path


def _as_html(summary: Summary) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files("cream").joinpath("report_template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    model, last = summary.config.get("model") or {}, summary.stages[-1] if summary.stages else {}
    return environment.from_string(source).render(
        name=printable(summary.name),
        base=_cell(f"{model.get('path', '-')}" + (f" at {model['revision']}" if model.get("revision") else "")),
        trained=sum(f"iter{r.iteration}/train" in {s["stage"] for s in summary.stages} for r in summary.rounds),
        iterations=_cell((summary.config.get("run") or {}).get("iterations", "?")),
        last_stage=_cell(last.get("stage", "none")),
        last_time=_cell(last.get("time", ""))[:19],
        config_text=printable(summary.config_text),
        warnings=[printable(w) for w in summary.warnings],
        lineage=lineage(summary),
        versions=versions(),
        tables=tables(summary),
        figures=[(caption, Markup(svg)) for caption, svg in figures(summary)],  # the one thing that is not escaped here
        rounds=summary.rounds,
        number=_number,
    )


@entry
def main(argv: Sequence[str] | None = None) -> None:
    from jsonargparse import ArgumentParser

    about = "Write RUN_DIR/report.html from what the run has finished, and print its tables."
    parser = ArgumentParser(prog="python -m cream.report", description=about)
    parser.add_argument("run_dir", type=str, metavar="RUN_DIR", help="directory of a run, finished or not")
    run_dir = Path(parser.parse_args(argv).run_dir)
    path = write(run_dir)
    print(table(run_dir))
    say(f"report: {path}")


if __name__ == "__main__":
    main()
