"""Draw the figures of a report. The title of each states its point. A figure is drawn once and rendered for the page, as SVG
and as PNG.

On the page, the colours of text and lines are replaced by the page's CSS variables, so that a figure is light or dark with it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

from ablation.efficiency import LossCurve, align, curve
from ablation.multipliers import compute_of, fit, multipliers, series
from ablation.ranks import rank_agreement
from ablation.results import Results
from ablation.statistics import Verdict
from kernels.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, FAINT = "#1a1b22", "#c9cad4"
_CSS_VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)"}
# Okabe and Ito 2008, distinguishable with every colour vision, and more that are distinguishable on white and on black.
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
_VERDICT_COLOURS = {
    Verdict.BETTER: "#009e73",
    Verdict.WORSE: "#d55e00",
    Verdict.EQUIVALENT: "#0072b2",
    Verdict.UNDECIDED: "#8c8f9c",
    Verdict.BLOCKED: "#8c8f9c",
}
_PIXELS_PER_INCH = 160  # of PNG files
_BARS = "dots: seeds; bars: 95% intervals, thin for all arms at once;\nband: differences smaller than asked for"
_POINTS = 60  # of a curve: the resolution of a figure this wide
_LETTERS_PER_INCH = 11  # of a title
# Evaluations within a run mostly use a part of the held-out text, the final one all of it.
_LOSS_AXIS = "evaluations, nats per token"
_STYLE: dict[RcKeyType, Any] = {
    "axes.edgecolor": FAINT, "axes.facecolor": "none", "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9, "font.family": "sans-serif",
    "font.size": 9, "grid.color": FAINT, "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.4, "path.simplify": True, "svg.fonttype": "none", "svg.hashsalt": "ablation",
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A figure of the report."""

    name: str  # of its files
    title: str  # its point, in one sentence
    figure: Figure

    def on_page(self) -> Markup:
        """Return SVG for the page: without a fixed size, with identifiers unique on the page and the page's colours."""
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", self._svg(), count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", svg)
        for colour, variable in _CSS_VARIABLES.items():
            svg = svg.replace(colour, variable)
        width = f"{self.figure.get_figwidth() * 6:.0f}rem"  # letters have the same size in every figure
        opening = Markup('<svg role="img" style="max-width: {}" aria-label="{}"').format(width, self.title)
        return Markup(svg.replace("<svg", opening, 1))

    def save(self, folder: Path) -> None:
        """Write the figure as SVG and as PNG, on white and below its title: a file has no heading beside it."""
        with self._titled():
            svg, png = self._svg(), self._png()
        start = svg.index(">") + 1
        with atomic_write(folder / f"{self.name}.svg") as file:
            file.write('<?xml version="1.0" encoding="utf-8"?>\n' + svg[:start])
            file.write('<rect width="100%" height="100%" fill="white"/>' + svg[start:])
        with atomic_write(folder / f"{self.name}.png", "wb") as file:
            file.write(png)

    def _svg(self) -> str:
        """Lay the figure out, and return it as SVG without a background."""
        file = io.StringIO()
        self.figure.set_facecolor("none")
        with matplotlib.rc_context(_STYLE):  # not `savefig`, which draws a figure twice
            FigureCanvasSVG(self.figure).print_svg(file, metadata={"Date": None, "Creator": None})
        document = file.getvalue()
        return re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.S)

    def _png(self) -> bytes:
        """Return the figure as PNG, as it was laid out last."""
        file, engine = io.BytesIO(), self.figure.get_layout_engine()
        self.figure.set_facecolor("white")
        self.figure.set_layout_engine("none")
        self.figure.set_dpi(_PIXELS_PER_INCH)
        with matplotlib.rc_context(_STYLE):
            FigureCanvasAgg(self.figure).print_png(file, metadata={"Software": None})
        self.figure.set_layout_engine(engine)
        return file.getvalue()

    @contextlib.contextmanager
    def _titled(self) -> Iterator[None]:
        lines = textwrap.wrap(self.title, int(_LETTERS_PER_INCH * self.figure.get_figwidth()))
        title = self.figure.suptitle("\n".join(lines), x=0.005, ha="left", fontsize=10, fontweight="bold", color=INK)
        try:
            yield
        finally:
            title.set(visible=False, in_layout=False)


def draw(results: Results) -> list[ReportFigure]:
    """Return every figure for which there are data."""
    makers: list[Callable[[Results], ReportFigure | None]] = [
        verdicts, scaling, curves, differences, costs, rates, sizes,
    ]  # fmt: skip
    with matplotlib.rc_context(_STYLE):
        figures = [make(results) for make in makers]
        figures += [_phenomenon(results, phenomenon) for phenomenon in PHENOMENA]
    return [figure for figure in figures if figure is not None]


# -------------------------------------------------------------------------------------------------------------- losses

# The others are of PHENOMENA.
LOSS_FIGURES = ("verdicts", "scaling", "differences", "curves", "costs", "learning_rates", "sizes")


def verdicts(results: Results) -> ReportFigure | None:
    """Draw every arm's difference to the baseline with its interval."""
    finite = {size: [c for c in results.comparisons(size) if math.isfinite(c.difference)] for size in results.sizes}
    by_size = {size: comparisons for size, comparisons in finite.items() if comparisons}
    if not by_size:
        return None
    rows = max(len(comparisons) for comparisons in by_size.values())
    figure, panels = _panels(len(by_size), height=1.5 + 0.3 * rows, legend=False)
    parts = []
    for axes, (size, comparisons) in zip(panels, by_size.items(), strict=True):
        comparisons = sorted(comparisons, key=lambda c: -c.difference)
        for y, c in enumerate(comparisons):
            colour = _VERDICT_COLOURS[c.verdict]
            for interval, width in ((c.adjusted, 1.0), (c.interval, 2.5)):
                low, high = interval if math.isfinite(interval[0]) else (c.difference, c.difference)
                axes.plot([low, high], [y, y], color=colour, linewidth=width, solid_capstyle="round")
            dots = _by_seed(results, size, c.arm)
            axes.plot(dots, [y + 0.22] * len(dots), ".", color=colour, markersize=3, alpha=0.6)
            axes.plot([c.difference], [y], "o", color=colour, markersize=5)
        effect = results.manifest.plan.smallest_effect
        axes.axvspan(-effect, effect, color=FAINT, alpha=0.5, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(comparisons)), [f"{c.arm}: {c.verdict.value}" for c in comparisons])
        axes.set_ylim(-0.6, len(comparisons) - 0.4)
        side = "right" if results.metric.higher_is_better else "left"
        axes.set_xlabel(f"{results.metric.unit} relative to {results.baseline}; {side} is better\n{_BARS}")
        axes.set_title(size)
        better = sum(c.verdict is Verdict.BETTER for c in comparisons)
        parts.append(f"{size}: {better} of {len(comparisons)} arms shown to be better than {results.baseline}")
    return ReportFigure("verdicts", "; ".join(parts), figure)


def _by_seed(results: Results, size: str, arm: str) -> list[float]:
    """Return the differences of an arm to the baseline, seed by seed, of runs that did not diverge."""
    values = results.values(size)
    own, base = values[arm], values[results.baseline]
    return [d for seed in own.keys() & base.keys() if math.isfinite(d := own[seed] - base[seed])]


def curves(results: Results) -> ReportFigure | None:
    """Draw the held-out loss over tokens: the mean over seeds, and the range of the seeds as a band."""
    by_size = _curves(results)
    if not by_size:
        return None
    figure, panels = _panels(len(by_size))
    for axes, (size, by_arm) in zip(panels, by_size.items(), strict=True):
        for arm, c in by_arm.items():
            _line(axes, results, arm, c.tokens / 1e6, c.losses)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(_LOSS_AXIS)
        axes.set_title(size)
        _zoom(axes, [c.mean for c in by_arm.values()])
    _legend(figure, panels)
    parts = []
    for size, by_arm in by_size.items():
        last = {arm: c.mean[-1] for arm, c in by_arm.items()}
        low, high = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
        spread = np.median([np.ptp(c.losses[:, -1]) for c in by_arm.values()])
        ends = f"means end between {last[low]:.3f} ({low}) and {last[high]:.3f} ({high})"
        parts.append(f"{size}: {ends}, seeds of one arm {spread:.3f} apart")
    return ReportFigure("curves", "; ".join(parts), figure)


def differences(results: Results) -> ReportFigure | None:
    """Draw the difference to the baseline over tokens, seed by seed."""
    by_size = {size: by_arm for size in results.sizes if (by_arm := _differences(results, size))}
    if not by_size:
        return None
    figure, panels = _panels(len(by_size))
    parts = []
    for axes, (size, by_arm) in zip(panels, by_size.items(), strict=True):
        for arm, (tokens, values) in by_arm.items():
            _line(axes, results, arm, tokens / 1e6, values)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(f"nats per token relative to {results.baseline}")
        axes.set_title(size)
        means = [values.mean(0) for _, values in by_arm.values()]
        _zoom(axes, means, include=0.0)
        kept = sum(np.sign(mean[len(mean) // 2]) == np.sign(mean[-1]) for mean in means)
        parts.append(
            f"{size}: {kept} of {len(by_arm)} arms end on the side of {results.baseline} they were on half-way"
        )
    _legend(figure, panels)
    return ReportFigure("differences", "; ".join(parts), figure)


def _differences(results: Results, size: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, for every arm with at least two points, tokens (points,) and losses minus the baseline's (seeds, points)."""
    base = {run.planned.seed: run.curve() for run in results.final_runs(size, results.baseline)}
    by_arm = {}
    for arm in results.arms(size):
        runs = [r for r in results.final_runs(size, arm) if r.planned.seed in base and math.isfinite(r.outcome.loss)]
        pairs = [(run.curve(), base[run.planned.seed]) for run in runs if arm != results.baseline]
        tokens, values = align([{at: own[at] - other[at] for at in own.keys() & other.keys()} for own, other in pairs])
        if len(tokens) > 1:
            by_arm[arm] = tokens, values
    return by_arm


def costs(results: Results) -> ReportFigure | None:
    """Draw the held-out loss over FLOPs, and over seconds."""
    by_size = _curves(results)
    if not by_size:
        return None
    figure, panels = _panels(2 * len(by_size))
    for i, (size, by_arm) in enumerate(by_size.items()):
        over_flops, over_seconds = panels[2 * i : 2 * i + 2]
        for arm, c in by_arm.items():
            flops = c.tokens * results.manifest.cost[size][arm]["flops_per_token"]
            _line(over_flops, results, arm, flops, c.losses)
            _line(over_seconds, results, arm, c.seconds, c.losses)
        over_flops.set_xlabel("FLOPs")
        over_seconds.set_xlabel("seconds of training, at the median speed")
        for axes in (over_flops, over_seconds):
            axes.set_ylabel(_LOSS_AXIS)
            axes.set_title(size)
            _zoom(axes, [c.mean for c in by_arm.values()])
    _legend(figure, panels)
    return ReportFigure("costs", "Held-out loss within runs, against compute and time", figure)


def scaling(results: Results) -> ReportFigure | None:
    """Draw final losses over compute, of runs planned to end there: a dot per seed, and the power law through the means."""
    of_plan = [of for of in series(results) if len(of.arms) > 1 and results.baseline in of.arms]
    if not of_plan:
        return None
    figure, panels = _panels(len(of_plan))
    parts = []
    for axes, of in zip(panels, of_plan, strict=True):
        for arm in of.arms:
            colour, dashes = colour_of(results, arm)
            for of_seed in of.losses[arm].values():
                axes.plot(of.compute[arm], of_seed, ".", color=colour, markersize=3, alpha=0.6)
            compute = np.geomspace(of.compute[arm][0], of.compute[arm][-1], _POINTS)
            law = fit(np.log(of.compute[arm]), of.mean(arm))
            axes.plot(compute, law.losses(np.log(compute)), color=colour, linestyle=dashes, label=arm)
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs of a run")
        axes.set_ylabel("final loss, nats per token")
        axes.set_title(of.name)
        found = {arm: fixed for arm, (fixed, _) in multipliers(results, of).items() if math.isfinite(fixed.factor)}
        if found:
            most = max(found, key=lambda arm: found[arm].factor)
            low, high = found[most].interval
            parts.append(
                f"{of.name}: {results.baseline} needs {found[most].factor:.2f} times {most}'s compute ({low:.2f} to {high:.2f})"
            )
    _legend(figure, panels)
    return ReportFigure("scaling", "; ".join(parts) or "Final losses over compute", figure)


def rates(results: Results) -> ReportFigure | None:
    """Draw the final loss over the learning rate: the mean over the sweep's seeds, their range, and where the seeds run."""
    swept = {size: {arm: results.sweep_losses(size, arm) for arm in results.arms(size)} for size in results.sizes}
    several = {size: {arm: losses for arm, losses in s.items() if len(losses) > 1} for size, s in swept.items()}
    by_size = {size: by_arm for size, by_arm in several.items() if by_arm}
    if not by_size:
        return None
    figure, panels = _panels(len(by_size))
    edges = []
    for axes, (size, by_arm) in zip(panels, by_size.items(), strict=True):
        for arm, losses in by_arm.items():
            tried = sorted(losses)
            seeds = sorted(set.intersection(*(set(of_seeds) for of_seeds in losses.values())))
            _line(axes, results, arm, np.array(tried), np.array([[losses[lr][s] for lr in tried] for s in seeds]), "o")
            sweep = results.sweep(size, arm)
            if sweep is None or sweep.edge:
                edges.append(f"{arm} at {size}")
            else:
                axes.plot([sweep.best_lr], [sweep.loss], "x", color=colour_of(results, arm)[0], markersize=6)
        axes.set_xscale("log", base=2)
        ticks = sorted({lr for losses in by_arm.values() for lr in losses})
        axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("final held-out loss of the sweep")
        axes.set_title(size)
    _legend(figure, panels)
    title = "The best learning rate of every arm (x) lies inside the range that was tried"
    if edges:
        title = f"The best learning rate is at the edge for {', '.join(edges)}"
    return ReportFigure("learning_rates", title, figure)


def sizes(results: Results) -> ReportFigure | None:
    """Draw the mean final difference to the baseline from size to size."""
    means: dict[str, dict[str, float]] = {}
    for size in results.sizes:
        losses = {arm: [v for v in of_arm.values() if math.isfinite(v)] for arm, of_arm in results.losses(size).items()}
        means[size] = {arm: float(np.mean(values)) for arm, values in losses.items() if values}
    drawn = [size for size in results.sizes if results.baseline in means[size] and len(means[size]) > 1]
    if len(drawn) < 2:
        return None
    figure, (axes,) = _panels(1)
    drawn.sort(key=lambda size: compute_of(results, size, results.baseline))
    compute = np.array([compute_of(results, size, results.baseline) for size in drawn])
    for arm in results.arms(drawn[0]):
        values = [means[size].get(arm, math.nan) - means[size][results.baseline] for size in drawn]
        _line(axes, results, arm, compute, np.array([values]), marker="o")
    axes.set_xscale("log")
    axes.set_xticks(compute, drawn)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("FLOPs of a run")
    axes.set_ylabel(f"nats per token relative to {results.baseline}")
    _legend(figure, [axes])
    one, other = drawn[0], drawn[-1]
    agreement = rank_agreement(results.losses(one), results.losses(other), one, other)
    low, high = agreement.interval
    title = (
        f"From {one} to {other}, {len(agreement.swapped)} pair(s) of arms change their order"
        f" (Kendall's tau {agreement.tau:.2f}, {low:.2f} to {high:.2f})"
    )
    return ReportFigure("sizes", title, figure)


# ----------------------------------------------------------------------------------------------------------- telemetry


@dataclasses.dataclass(frozen=True)
class Phenomenon:
    """What a figure of telemetry shows."""

    name: str  # of the figure
    label: str
    metric: str  # key of the telemetry lines
    axis: str
    logarithmic: bool = False


PHENOMENA = (
    Phenomenon("dead", "Dying units", "dead", "fraction of inactive units"),
    Phenomenon("saturated", "Saturation", "saturated", "fraction of slopes below 0.01"),
    Phenomenon("zeros", "Sparsity", "zeros", "fraction of exact zeros"),
    Phenomenon("zigzag", "Zigzag", "sign_agreement", "sign agreement of a unit's gradients"),
    Phenomenon("gradients", "Gradient flow", "gradient_norm", "gradient norm of a layer", logarithmic=True),
    Phenomenon("outliers", "Outliers", "max", "largest |h|", logarithmic=True),
    Phenomenon("kurtosis", "Tails", "kurtosis", "kurtosis of h", logarithmic=True),
    Phenomenon("gates", "Gates", "gate_saturated", "fraction of saturated gates"),
    Phenomenon("gate_and_up", "Gate and up", "gate_up_correlation", "correlation of gate and up"),
)


def telemetry(results: Results, size: str, arm: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return tokens (points,) and a telemetry metric (points, layers), averaged over seeds; None where no run has it."""
    by_layers = collections.defaultdict(list)  # a run whose lines were damaged may have another number of layers
    for run in results.final_runs(size, arm):
        lines = [line for line in run.lines_of("telemetry") if isinstance(line.get(metric), list) and line[metric]]
        lines = [
            line for line in lines if line.get("tokens") is not None and len(line[metric]) == len(lines[-1][metric])
        ]
        layers = {line["tokens"]: [math.nan if v is None else v for v in line[metric]] for line in lines}
        if any(math.isfinite(v) for values in layers.values() for v in values):
            by_layers[len(lines[-1][metric])].append(layers)
    tokens, values = align(max(by_layers.values(), key=len, default=[]))
    return (tokens, values.mean(0)) if len(tokens) else None


def _phenomenon(results: Results, what: Phenomenon) -> ReportFigure | None:
    """Draw a telemetry metric over time, averaged over layers, and at the end by layer."""
    by_size = {}
    for size in results.sizes:
        by_arm = {a: t for a in results.arms(size) if (t := telemetry(results, size, a, what.metric)) is not None}
        if by_arm:
            by_size[size] = by_arm
    if not by_size:
        return None
    figure, panels = _panels(2 * len(by_size))
    parts = []
    for i, (size, by_arm) in enumerate(by_size.items()):
        over_time, by_layer = panels[2 * i : 2 * i + 2]
        for arm, (tokens, values) in by_arm.items():
            _line(over_time, results, arm, tokens / 1e6, values.mean(1)[None])
            _line(by_layer, results, arm, np.arange(1, values.shape[1] + 1), values[-1][None], marker="o")
        over_time.set_xlabel("million tokens")
        by_layer.set_xlabel("layer, at the end")
        layers = max(values.shape[1] for _, values in by_arm.values())
        by_layer.set_xticks(range(1, layers + 1) if layers <= 12 else np.linspace(1, layers, 6).round())
        for axes in (over_time, by_layer):
            axes.set_ylabel(what.axis)
            axes.set_title(size)
            if what.logarithmic and all((values > 0).all() for _, values in by_arm.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        last = {arm: float(values[-1].mean()) for arm, (_, values) in by_arm.items()}
        most, least = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
        lowest = f" and {last[least]:.3g} in {least}" if least != most else ""
        parts.append(f"{last[most]:.3g} in {most}{lowest} at {size}")
    _legend(figure, panels)
    title = f"{what.label}: at the end the {what.axis} is {'; '.join(parts)}, averaged over layers"
    return ReportFigure(what.name, title, figure)


# ------------------------------------------------------------------------------------------------------------- drawing


def colour_of(results: Results, arm: str) -> tuple[str, str]:
    """Return the colour and dashes of an arm, the same in every figure; the baseline has the colour of text."""
    if arm == results.baseline:
        return INK, "-"
    arms = [a for a in results.manifest.arms[results.sizes[0]] if a != results.baseline]
    i = arms.index(arm) if arm in arms else 0
    return _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _curves(results: Results) -> dict[str, dict[str, LossCurve]]:
    by_size = {}
    for size in results.sizes:
        by_arm = {arm: c for arm in results.arms(size) if (c := curve(results, size, arm)) is not None}
        if by_arm:
            by_size[size] = by_arm
    return by_size


def _panels(count: int, height: float = 3.1, legend: bool = True) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns + (1.1 if legend else 0.0), height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)[:count]


def _line(axes: Axes, results: Results, arm: str, x: np.ndarray, rows: np.ndarray, marker: str = "") -> None:
    """Draw the mean of rows (seeds, points) as a line, and their range as a band."""
    colour, dashes = colour_of(results, arm)
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    x, rows = x[keep], rows[:, keep]
    marker = marker or ("o" if len(x) == 1 else "")  # a single point makes no line
    axes.plot(x, rows.mean(0), color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=arm)
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)


def _zoom(axes: Axes, means: Sequence[np.ndarray], include: float | None = None) -> None:
    """Limit the axes to the later half of the curves: before it, all arms fall steeply and close together."""
    later = [value for mean in means for value in mean[len(mean) // 2 :] if math.isfinite(value)]
    if max(map(len, means), default=0) < 2 or len(later) < 2:
        return
    if include is not None:
        later.append(include)
    low, high = min(later), max(later)
    margin = 0.08 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    starts = [
        x[len(x) // 2 - 1] for line in axes.get_lines() if len(x := np.asarray(line.get_xdata())) == len(means[0])
    ]
    axes.set_xlim(left=min(starts, default=None))


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
