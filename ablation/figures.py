"""The figures of a report. Each says its point in its title, and is drawn once: for the page, as SVG and as PNG.

Colours of text and lines are placeholders on the page, which stand for its own variables: a figure is light or dark with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

from ablation.efficiency import aligned, curve, efficiency
from ablation.results import Results
from ablation.statistics import Verdict, rank_stability
from kernels.common.files import atomic_write

INK, FAINT = "#1a1b22", "#c9cad4"
_ON_PAGE = {INK: "var(--ink)", FAINT: "var(--line)"}
# Okabe and Ito 2008, for all kinds of colour vision, and more that are told apart on white and on black.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a5af0",
    "#8a8d00",
    "#b04a4a",
    "#4a8f8f",
)
_DASHES = ("-", "--", ":", "-.")
_OF_VERDICT = {
    Verdict.BETTER: "#009e73",
    Verdict.WORSE: "#d55e00",
    Verdict.NO_DIFFERENCE: "#0072b2",
    Verdict.UNDERPOWERED: "#8c8f9c",
    Verdict.BLOCKED: "#8c8f9c",
}
_POINTS = 60  # of a curve: what a figure this wide can show
_LETTERS_AN_INCH = 11  # of a title
# Within runs they are mostly on a part of the held-out text; the final one is on all.
_AXIS = "evaluations, nats a token"
_STYLE = {
    "axes.edgecolor": FAINT, "axes.facecolor": "none", "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9, "font.family": "sans-serif",
    "font.size": 9, "grid.color": FAINT, "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.4, "path.simplify": True, "svg.fonttype": "none", "svg.hashsalt": "ablation",
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
}  # fmt: skip


OF_LOSSES = ("verdicts", "differences", "curves", "costs", "learning_rates", "sizes")  # names; others are of PHENOMENA


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure."""

    name: str  # of its files
    title: str  # its point, in a sentence
    figure: Figure

    def on_page(self) -> str:
        """Return it as SVG for a page: no fixed size, no identifier that another figure has, the page's colours."""
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", self._svg(), count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", text)
        for colour, variable in _ON_PAGE.items():
            text = text.replace(colour, variable)
        width = f"max-width: {self.figure.get_figwidth() * 6:.0f}rem"  # a letter as large in every figure
        return text.replace("<svg", f'<svg role="img" style="{width}" aria-label="{escape(self.title)}"', 1)

    def save(self, folder: Path) -> None:
        """Write it as SVG and as PNG, on white, below its title: a page says it beside the figure, a file must itself."""
        with self._titled():
            svg = self._svg()
            png = self._rendered(format="png", dpi=160, facecolor="white", metadata={"Software": None})
        begins = svg.index(">") + 1
        with atomic_write(folder / f"{self.name}.svg") as file:
            file.write('<?xml version="1.0" encoding="utf-8"?>\n' + svg[:begins])
            file.write('<rect width="100%" height="100%" fill="white"/>' + svg[begins:])
        with atomic_write(folder / f"{self.name}.png", "wb") as file:
            file.write(png)

    def _svg(self) -> str:
        """Return it without a background."""
        whole = self._rendered(format="svg", facecolor="none", metadata={"Date": None, "Creator": None}).decode()
        return re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.S)

    def _rendered(self, **options: Any) -> bytes:
        file = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(file, **options)
        return file.getvalue()

    @contextlib.contextmanager
    def _titled(self) -> Iterator[None]:
        lines = textwrap.wrap(self.title, int(_LETTERS_AN_INCH * self.figure.get_figwidth()))
        title = self.figure.suptitle("\n".join(lines), x=0.005, ha="left", fontsize=10, fontweight="bold", color=INK)
        try:
            yield
        finally:
            title.set(visible=False, in_layout=False)


def draw(results: Results) -> list[Drawn]:
    """Return every figure for which there is something to show."""
    with matplotlib.rc_context(_STYLE):
        makers: list[Callable[[Results], Drawn | None]] = [verdicts, curves, differences, costs, rates, sizes]
        made = [make(results) for make in makers]
        made += [_phenomenon(results, *phenomenon) for phenomenon in PHENOMENA]
    return [drawn for drawn in made if drawn is not None]


# -------------------------------------------------------------------------------------------------------------- losses


def verdicts(results: Results) -> Drawn | None:
    """Draw every arm's difference to the baseline with its interval."""
    of_size = {size: results.comparisons(size) for size in results.sizes}
    of_size = {size: [c for c in found if math.isfinite(c.difference)] for size, found in of_size.items()}
    of_size = {size: found for size, found in of_size.items() if found}
    if not of_size:
        return None
    rows = max(len(found) for found in of_size.values())
    figure, panels = _panels(len(of_size), height=0.9 + 0.3 * rows, legend=False)
    for axes, (size, found) in zip(panels, of_size.items(), strict=True):
        found = sorted(found, key=lambda c: -c.difference)
        for y, c in enumerate(found):
            colour = _OF_VERDICT[c.verdict]
            low, high = c.interval if math.isfinite(c.interval[0]) else (c.difference, c.difference)
            axes.plot([low, high], [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot([c.difference], [y], "o", color=colour, markersize=5)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(found)), [f"{c.arm}: {c.verdict.value}" for c in found])
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_xlabel(f"nats a token less {results.baseline}'s; left is better")
        axes.set_title(size)
    better = {size: [c.arm for c in found if c.verdict is Verdict.BETTER] for size, found in of_size.items()}
    parts = [
        f"{size}: {len(arms)} of {len(of_size[size])} arms shown better than {results.baseline}"
        for size, arms in better.items()
    ]
    return Drawn("verdicts", "; ".join(parts) + " (bars: 95% intervals over seeds)", figure)


def curves(results: Results) -> Drawn | None:
    """Draw the held-out loss over tokens: the mean of the seeds, and the band that they fill."""
    of_size = _curves(results)
    if not of_size:
        return None
    figure, panels = _panels(len(of_size))
    for axes, (size, found) in zip(panels, of_size.items(), strict=True):
        for arm, c in found.items():
            _line(axes, results, arm, c.tokens / 1e6, c.losses)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(_AXIS)
        axes.set_title(size)
        _zoom(axes, [c.mean for c in found.values()])
    _legend(figure, panels)
    parts = []
    for size, found in of_size.items():
        last = {arm: c.mean[-1] for arm, c in found.items()}
        low, high = min(last, key=last.get), max(last, key=last.get)  # type: ignore[arg-type]
        spread = np.median([np.ptp(c.losses[:, -1]) for c in found.values()])
        ends = f"means end between {last[low]:.3f} ({low}) and {last[high]:.3f} ({high})"
        parts.append(f"{size}: {ends}, seeds of one arm {spread:.3f} apart")
    return Drawn("curves", "; ".join(parts), figure)


def differences(results: Results) -> Drawn | None:
    """Draw the difference to the baseline over tokens, seed by seed."""
    of_size = {size: found for size in results.sizes if (found := _gaps(results, size))}
    if not of_size:
        return None
    figure, panels = _panels(len(of_size))
    parts = []
    for axes, (size, found) in zip(panels, of_size.items(), strict=True):
        for arm, (tokens, gaps) in found.items():
            _line(axes, results, arm, tokens / 1e6, gaps)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(f"nats a token less {results.baseline}'s")
        axes.set_title(size)
        means = [gaps.mean(0) for _, gaps in found.values()]
        _zoom(axes, means, above=0.0)
        kept = sum(np.sign(mean[len(mean) // 2]) == np.sign(mean[-1]) for mean in means)
        parts.append(
            f"{size}: {kept} of {len(found)} arms end on the side of {results.baseline} where they were half-way"
        )
    _legend(figure, panels)
    return Drawn("differences", "; ".join(parts), figure)


def _gaps(results: Results, size: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, of every arm with two points or more, (tokens (points,), loss less the baseline's (seeds, points))."""
    base = {run.planned.seed: run.curve() for run in results.finals(size, results.baseline)}
    found = {}
    for arm in results.arms(size):
        runs = [
            run for run in results.finals(size, arm) if run.planned.seed in base and math.isfinite(run.outcome.loss)
        ]
        pairs = [(run.curve(), base[run.planned.seed]) for run in runs if arm != results.baseline]
        tokens, gaps = aligned([{at: own[at] - other[at] for at in own.keys() & other.keys()} for own, other in pairs])
        if len(tokens) > 1:
            found[arm] = tokens, gaps
    return found


def costs(results: Results) -> Drawn | None:
    """Draw the held-out loss over FLOPs, and over seconds."""
    of_size = _curves(results)
    if not of_size:
        return None
    figure, panels = _panels(2 * len(of_size))
    parts = []
    for i, (size, found) in enumerate(of_size.items()):
        for axes, what in zip(panels[2 * i : 2 * i + 2], ("FLOPs", "seconds"), strict=True):
            for arm, c in found.items():
                flops = c.tokens * results.manifest.cost[size][arm]["flops_per_token"]
                _line(axes, results, arm, flops if what == "FLOPs" else c.seconds, c.losses)
            axes.set_xlabel(what + ("" if what == "FLOPs" else " of training, at the median speed"))
            axes.set_ylabel(_AXIS)
            axes.set_title(size)
            _zoom(axes, [c.mean for c in found.values()])
        gains = {
            arm: e.per_flop.factor
            for arm, e in efficiency(results, size).items()
            if arm != results.baseline and math.isfinite(e.per_flop.factor)
        }
        if gains:
            most, least = max(gains, key=gains.get), min(gains, key=gains.get)  # type: ignore[arg-type]
            parts.append(
                f"{size}: {results.baseline} needs {gains[most]:.2f} times the FLOPs for {most}'s loss"
                + (f", {gains[least]:.2f} times for {least}'s" if least != most else "")
            )
    _legend(figure, panels)
    return Drawn("costs", "; ".join(parts) or "Held-out loss against compute and time", figure)


def rates(results: Results) -> Drawn | None:
    """Draw the final loss over the learning rate."""
    of_size = {
        size: {
            arm: results.rate_losses(size, arm) for arm in results.arms(size) if len(results.rate_losses(size, arm)) > 1
        }
        for size in results.sizes
    }
    of_size = {size: found for size, found in of_size.items() if found}
    if not of_size:
        return None
    figure, panels = _panels(len(of_size))
    edges = []
    for axes, (size, found) in zip(panels, of_size.items(), strict=True):
        for arm, losses in found.items():
            tried = sorted(losses)
            _line(axes, results, arm, np.array(tried), np.array([[losses[rate] for rate in tried]]), marker="o")
            swept = results.swept(size, arm)
            if swept is None or swept.edge:
                edges.append(f"{arm} at {size}")
        axes.set_xscale("log", base=2)
        every = sorted({rate for losses in found.values() for rate in losses})
        axes.set_xticks(every, [f"{rate:g}" for rate in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("final held-out loss, one seed")
        axes.set_title(size)
    _legend(figure, panels)
    inside = "Every arm's best learning rate lies inside of what was tried"
    return Drawn(
        "learning_rates", f"The best learning rate is at the edge for {', '.join(edges)}" if edges else inside, figure
    )


def sizes(results: Results) -> Drawn | None:
    """Draw the mean final difference to the baseline from size to size."""
    means: dict[str, dict[str, float]] = {}
    for size in results.sizes:
        losses = {arm: [v for v in of_arm.values() if math.isfinite(v)] for arm, of_arm in results.losses(size).items()}
        means[size] = {arm: float(np.mean(values)) for arm, values in losses.items() if values}
    shown = [size for size in results.sizes if results.baseline in means[size] and len(means[size]) > 1]
    if len(shown) < 2:
        return None
    figure, (axes,) = _panels(1)
    for arm in results.arms(shown[0]):
        values = [means[size].get(arm, math.nan) - means[size][results.baseline] for size in shown]
        _line(axes, results, arm, np.arange(len(shown)), np.array([values]), marker="o")
    axes.set_xticks(range(len(shown)), shown)
    axes.set_ylabel(f"nats a token less {results.baseline}'s")
    _legend(figure, [axes])
    stable = rank_stability(means[shown[0]], means[shown[-1]])
    title = (
        f"From {shown[0]} to {shown[-1]} {len(stable.swapped)} pair(s) of arms change their order"
        f" (Kendall's tau {stable.tau:.2f})"
    )
    return Drawn("sizes", title, figure)


# ----------------------------------------------------------------------------------------------------------- telemetry

# name of the figure, what it shows, its figure in the telemetry, axis, logarithmic
PHENOMENA = (
    ("dead", "Dying units", "dead", "share of units without activity", False),
    ("saturated", "Saturation", "saturated", "share of slopes below 0.01", False),
    ("zeros", "Sparsity", "zeros", "share of exact zeros", False),
    ("zigzag", "Zigzag", "sign_agreement", "sign agreement of a unit's gradients", False),
    ("gradients", "Gradient flow", "gradient_norm", "gradient norm of a layer", True),
    ("outliers", "Outliers", "max", "largest |h|", True),
    ("kurtosis", "Tails", "kurtosis", "kurtosis of h", True),
    ("gates", "Gates", "gate_saturated", "share of flat gates", False),
    ("gate_and_up", "Gate and up", "gate_up_correlation", "correlation of gate and up", False),
)


def telemetry(results: Results, size: str, arm: str, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (tokens, figures (points, layers)) of a telemetry figure, the mean over seeds; None where no run has it."""
    series = []
    for run in results.finals(size, arm):
        lines = [line for line in run.kind("telemetry") if isinstance(line.get(key), list)]
        rows = {line["tokens"]: [math.nan if v is None else v for v in line[key]] for line in lines}
        if any(math.isfinite(v) for row in rows.values() for v in row):
            series.append(rows)
    tokens, values = aligned(series)
    return (tokens, values.mean(0)) if len(tokens) else None


def _phenomenon(results: Results, name: str, what: str, key: str, axis: str, logarithmic: bool) -> Drawn | None:
    found = {
        size: {arm: t for arm in results.arms(size) if (t := telemetry(results, size, arm, key)) is not None}
        for size in results.sizes
    }
    found = {size: of_arm for size, of_arm in found.items() if of_arm}
    if not found:
        return None
    figure, panels = _panels(2 * len(found))
    parts = []
    for i, (size, of_arm) in enumerate(found.items()):
        over_time, by_layer = panels[2 * i : 2 * i + 2]
        for arm, (tokens, values) in of_arm.items():
            _line(over_time, results, arm, tokens / 1e6, values.mean(1)[None])
            _line(by_layer, results, arm, np.arange(1, values.shape[1] + 1), values[-1][None], marker="o")
        over_time.set_xlabel("million tokens")
        by_layer.set_xlabel("layer, at the end")
        layers = max(values.shape[1] for _, values in of_arm.values())
        by_layer.set_xticks(range(1, layers + 1) if layers <= 12 else np.linspace(1, layers, 6).round())
        for axes in (over_time, by_layer):
            axes.set_ylabel(axis)
            axes.set_title(size)
            if logarithmic and all((values > 0).all() for _, values in of_arm.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        last = {arm: float(values[-1].mean()) for arm, (_, values) in of_arm.items()}
        most, least = max(last, key=last.get), min(last, key=last.get)  # type: ignore[arg-type]
        parts.append(
            f"{last[most]:.3g} in {most}"
            + (f" and {last[least]:.3g} in {least}" if least != most else "")
            + f" at {size}"
        )
    _legend(figure, panels)
    return Drawn(name, f"{what}: at the end the {axis} is {'; '.join(parts)}, mean over layers", figure)


# ------------------------------------------------------------------------------------------------------------- drawing


def colour_of(results: Results, arm: str) -> tuple[str, str]:
    """Return the colour and the dashes of an arm, the same in every figure; the baseline has the colour of text."""
    if arm == results.baseline:
        return INK, "-"
    arms = [a for a in results.manifest.arms[results.sizes[0]] if a != results.baseline]
    place = arms.index(arm) if arm in arms else 0
    return _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]


def _curves(results: Results) -> dict[str, dict[str, Any]]:
    found = {
        size: {arm: c for arm in results.arms(size) if (c := curve(results, size, arm)) is not None}
        for size in results.sizes
    }
    return {size: of_arm for size, of_arm in found.items() if of_arm}


def _panels(count: int, height: float = 3.1, legend: bool = True) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns + (1.1 if legend else 0.0), height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)[:count]


def _line(axes: Axes, results: Results, arm: str, x: np.ndarray, rows: np.ndarray, marker: str = "") -> None:
    """Draw the mean of rows (seeds, points), and the band that they fill."""
    colour, dashes = colour_of(results, arm)
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    x, rows = x[keep], rows[:, keep]
    marker = marker or ("o" if len(x) == 1 else "")  # no line goes through one point
    axes.plot(x, rows.mean(0), color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=arm)
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)


def _zoom(axes: Axes, means: Sequence[np.ndarray], above: float | None = None) -> None:
    """Show the later half of the curves: before it all arms fall steeply, and side by side."""
    later = [value for mean in means for value in mean[len(mean) // 2 :] if math.isfinite(value)]
    if max(map(len, means), default=0) < 2 or len(later) < 2:
        return
    low, high = min(later), max(later)
    if above is not None:
        low, high = min(low, above), max(high, above)
    margin = 0.08 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    begins = [
        x[len(x) // 2 - 1] for line in axes.get_lines() if len(x := np.asarray(line.get_xdata())) == len(means[0])
    ]
    axes.set_xlim(left=min(begins, default=None))


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
