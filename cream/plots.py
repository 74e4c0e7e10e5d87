"""The report's plots: plain numbers in, one SVG element out as text, for putting into a page as it is.

The same numbers give the same bytes (fixed hash salt, no date). Text stays text, escaped by matplotlib; ink takes the
page's own colour, so that one drawing serves light, dark and paper. No window system and no pyplot state is touched.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence

INK = "#0a0b0c"  # stands for the page's text colour: replaced by currentColor
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3987d6", "#d97706", "#2f9e62", "#9b6dd0", "#d8504d", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)  # each readable on white and on near-black
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cream",
    "text.parse_math": False,  # a task may be called anything, "$" included
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def _panels(count: int, *, height: float = 2.6, draw) -> str:
    """One row of `count` panels, each drawn by draw(axes, index); returns the SVG element."""
    import matplotlib
    from matplotlib.figure import Figure

    # The style must hold while the figure is made, drawn and saved: rcParams are read at each of these.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 3.4 * count), height), layout="constrained")
        figure.patch.set_alpha(0)
        for index, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
            axes.patch.set_alpha(0)
            draw(axes, index)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]  # an element inside a page has no XML declaration and no doctype
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # groups' ids repeat from figure to figure, and nothing refers to them
    return svg.replace(INK, "currentColor").strip()


def _finite(values: Sequence[float | None]) -> list[float]:
    """None and infinities become NaN, which matplotlib leaves out of a line."""
    return [v if v is not None and math.isfinite(v) else math.nan for v in values]


def tau_histograms(
    rounds: Sequence[tuple[int, Sequence[float]]],  # (iteration, tau of each prompt in [-1, 1])
    responses: int,  # R
) -> str:
    """One histogram an iteration; without ties tau takes R (R - 1) / 2 + 1 values, and a bar stands for one of them."""
    steps = min(max(responses * (responses - 1) // 2, 1), 20)
    edges = [-1 + (2 * i - 1) / steps for i in range(steps + 2)]

    def draw(axes, index: int) -> None:
        iteration, taus = rounds[index]
        axes.hist(taus, bins=edges, color=BLUE, rwidth=0.9)
        mean = sum(taus) / len(taus)
        axes.axvline(mean, color=ORANGE)
        axes.set(title=f"iteration {iteration}, mean {mean:.2f}", xlabel="tau", ylabel="prompts", xlim=(-1.15, 1.15))
        axes.yaxis.get_major_locator().set_params(integer=True)

    return _panels(len(rounds), draw=draw)


def agreement(
    rounds: Sequence[tuple[int, float, float]],  # (iteration, mean tau, mean agreement used in the loss)
) -> str:
    """Mean tau and mean agreement per iteration, with the line at 1/2 below which a pair's preference is reversed."""

    def draw(axes, _: int) -> None:
        iterations = [t for t, _, _ in rounds]
        axes.plot(iterations, _finite([c for _, _, c in rounds]), "o-", color=BLUE, label="agreement")
        axes.plot(iterations, _finite([tau for _, tau, _ in rounds]), "s--", color=ORANGE, label="tau")
        axes.axhline(0.5, color=GREY, linestyle=":", label="agreement 1/2: no preference")
        axes.set(xlabel="iteration", xticks=iterations, ylim=(-1.05, 1.05))
        axes.set_xlim(min(iterations) - 0.5, max(iterations) + 0.5)
        _legend_beside(axes)

    return _panels(1, draw=draw)


def accuracy(
    models: Sequence[str],
    tasks: Mapping[str, Sequence[tuple[float, float, float] | None]],  # task -> per model (value, low, high) in [0, 1]
) -> str:
    """Accuracy of each model per task with its interval; tasks stand side by side over a model."""

    def draw(axes, _: int) -> None:
        for n, (task, scores) in enumerate(tasks.items()):
            shift = (n - (len(tasks) - 1) / 2) * 0.6 / max(len(tasks), 1)
            points = [(i + shift, score) for i, score in enumerate(scores) if score is not None]
            x = [place for place, _ in points]
            y = [100 * score[0] for _, score in points]
            below = [100 * (score[0] - score[1]) for _, score in points]
            above = [100 * (score[2] - score[0]) for _, score in points]
            colour = COLOURS[n % len(COLOURS)]
            axes.errorbar(x, y, yerr=(below, above), fmt="o-", color=colour, capsize=3, linewidth=1, label=task)
        axes.set(ylabel="correct answers, %", xticks=range(len(models)), xticklabels=models)
        axes.set_ylim(bottom=0)
        _legend_beside(axes)

    return _panels(1, height=3.2, draw=draw)


def rewards(
    rounds: Sequence[tuple[str, Sequence[Mapping[str, float]]]],  # (stage, its rows of metrics.jsonl)
) -> str:
    """Chosen and rejected reward and their margin over the optimizer's steps, one panel a training stage."""
    lines = (("chosen", GREEN), ("rejected", RED), ("margins", BLUE))

    def draw(axes, index: int) -> None:
        stage, rows = rounds[index]
        for name, colour in lines:
            values = _finite([r.get(f"rewards/{name}") for r in rows])
            axes.plot([r["step"] for r in rows], values, color=colour, label=name, marker=_dot(rows))
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set(title=stage, xlabel="step", ylabel="beta * nats")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if index == len(rounds) - 1:
            _legend_beside(axes)

    return _panels(len(rounds), draw=draw)


def losses(
    stages: Sequence[tuple[str, Sequence[Mapping[str, float]]]],  # (stage, its rows of metrics.jsonl)
) -> str:
    """The loss over the optimizer's steps, one panel a stage."""

    def draw(axes, index: int) -> None:
        stage, rows = stages[index]
        axes.plot([r["step"] for r in rows], _finite([r.get("loss") for r in rows]), color=BLUE, marker=_dot(rows))
        if stage.endswith("train"):
            axes.axhline(math.log(2), color=GREY, linestyle=":", label="ln 2: no preference learned")
            axes.legend()
        axes.set(title=stage, xlabel="step", ylabel="loss, nats")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _panels(len(stages), draw=draw)


def _legend_beside(axes) -> None:
    """A legend that covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _dot(rows: Sequence[object]) -> str:
    """A curve of a few steps shows its points; one of many would be all points."""
    return "." if len(rows) <= 30 else ""


def lengths(
    rounds: Sequence[tuple[int, Sequence[int]]],  # (iteration, tokens of each response)
    pairs: Sequence[tuple[int, Sequence[int], Sequence[int]]],  # (iteration, tokens of the chosen, of the rejected)
) -> str:
    """Left: how long the responses of each iteration are. Right: chosen against rejected, mean tokens (length bias)."""

    def draw(axes, index: int) -> None:
        if index == 0:
            axes.boxplot(
                [list(values) for _, values in rounds],
                showfliers=False,
                showmeans=True,
                **{f"{part}props": {"color": BLUE} for part in ("box", "whisker", "cap")},
                medianprops={"color": ORANGE},
                meanprops={"marker": "D", "markerfacecolor": GREEN, "markeredgecolor": GREEN, "markersize": 4},
            )
            axes.set_xticks(range(1, len(rounds) + 1), [str(t) for t, _ in rounds])
            axes.set(title="responses (diamond: mean)", xlabel="iteration", ylabel="tokens")
            axes.set_ylim(bottom=0)
            return
        for label, colour, shift, column in (("chosen", GREEN, -0.18, 1), ("rejected", RED, 0.18, 2)):
            means = [sum(pair[column]) / len(pair[column]) for pair in pairs]
            axes.bar([i + shift for i in range(len(pairs))], means, width=0.34, color=colour, label=label)
        axes.set(title="chosen and rejected", xlabel="iteration", ylabel="mean tokens")
        axes.set_xticks(range(len(pairs)), [str(pair[0]) for pair in pairs])
        _legend_beside(axes)

    return _panels(2 if pairs else 1, draw=draw)
