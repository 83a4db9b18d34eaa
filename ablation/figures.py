"""Draw the figures of a report. The title of each states its point; `drawing.py` has what they share, and renders them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

from ablation.drawing import (
    FAINT,
    INK,
    POINTS,
    STYLE,
    ReportFigure,
    colour_of,
    draw_legend,
    draw_line,
    make_panels,
    zoom,
)
from ablation.efficiency import LossCurve, align, curve
from ablation.multipliers import compute_of, fit, multipliers, series
from ablation.rank_agreement import rank_agreement
from ablation.results import Results
from ablation.statistics import Verdict

_VERDICT_COLOURS = {
    Verdict.BETTER: "#009e73",
    Verdict.WORSE: "#d55e00",
    Verdict.EQUIVALENT: "#0072b2",
    Verdict.UNDECIDED: "#8c8f9c",
    Verdict.BLOCKED: "#8c8f9c",
}
_BARS = "dots: seeds; bars: 95% intervals,\nthin for all arms at once;\nband: differences smaller than asked for"
# Evaluations within a run mostly use a part of the held-out text, the final one all of it.
_LOSS_AXIS = "evaluations, nats per token"


def draw(results: Results) -> list[ReportFigure]:
    """Return every figure for which there are data."""
    makers: list[Callable[[Results], ReportFigure | None]] = [
        verdicts, scaling, curves, differences, costs, rates, sizes,
    ]  # fmt: skip
    with matplotlib.rc_context(STYLE):
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
    figure, panels = make_panels(len(by_size), height=1.5 + 0.3 * rows, legend=False)
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
    by_size = {size: by_arm for size, by_arm in by_size.items() if any(len(c.tokens) > 1 for c in by_arm.values())}
    if not by_size:
        return None
    figure, panels = make_panels(len(by_size))
    for axes, (size, by_arm) in zip(panels, by_size.items(), strict=True):
        for arm, c in by_arm.items():
            draw_line(axes, results, arm, c.tokens / 1e6, c.losses)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(_LOSS_AXIS)
        axes.set_title(size)
        zoom(axes, [c.mean for c in by_arm.values()])
    draw_legend(figure, panels)
    parts = []
    for size, by_arm in by_size.items():
        last = {arm: c.mean[-1] for arm, c in by_arm.items()}
        low, high = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
        spread = np.median([np.ptp(c.losses[:, -1]) for c in by_arm.values()])
        ends = f"means end between {last[low]:.3f} ({low}) and {last[high]:.3f} ({high})"
        parts.append(f"{size}: {ends}, seeds of one arm {spread:.3f} apart")
    return ReportFigure("curves", "; ".join(parts), figure)


def _curves(results: Results) -> dict[str, dict[str, LossCurve]]:
    by_size = {}
    for size in results.sizes:
        by_arm = {arm: c for arm in results.arms(size) if (c := curve(results, size, arm)) is not None}
        if by_arm:
            by_size[size] = by_arm
    return by_size


def differences(results: Results) -> ReportFigure | None:
    """Draw the difference to the baseline over tokens, seed by seed."""
    by_size = {size: by_arm for size in results.sizes if (by_arm := _differences(results, size))}
    if not by_size:
        return None
    figure, panels = make_panels(len(by_size))
    parts = []
    for axes, (size, by_arm) in zip(panels, by_size.items(), strict=True):
        for arm, (tokens, values) in by_arm.items():
            draw_line(axes, results, arm, tokens / 1e6, values)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(f"nats per token relative to {results.baseline}")
        axes.set_title(size)
        means = [values.mean(0) for _, values in by_arm.values()]
        zoom(axes, means, include=0.0)
        kept = sum(np.sign(mean[len(mean) // 2]) == np.sign(mean[-1]) for mean in means)
        parts.append(
            f"{size}: {kept} of {len(by_arm)} arms end on the side of {results.baseline} they were on half-way"
        )
    draw_legend(figure, panels)
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
    figure, panels = make_panels(2 * len(by_size))
    for i, (size, by_arm) in enumerate(by_size.items()):
        over_flops, over_seconds = panels[2 * i : 2 * i + 2]
        for arm, c in by_arm.items():
            flops = c.tokens * results.manifest.cost[size][arm]["flops_per_token"]
            draw_line(over_flops, results, arm, flops, c.losses)
            draw_line(over_seconds, results, arm, c.seconds, c.losses)
        over_flops.set_xlabel("FLOPs")
        over_seconds.set_xlabel("seconds of training, at the median speed")
        for axes in (over_flops, over_seconds):
            axes.set_ylabel(_LOSS_AXIS)
            axes.set_title(size)
            zoom(axes, [c.mean for c in by_arm.values()])
    draw_legend(figure, panels)
    return ReportFigure("costs", "Held-out loss within runs, against compute and time", figure)


def scaling(results: Results) -> ReportFigure | None:
    """Draw final losses over compute, of runs planned to end there: a dot per seed, and the power law through the means."""
    of_plan = [of for of in series(results) if len(of.arms) > 1 and results.baseline in of.arms]
    if not of_plan:
        return None
    figure, panels = make_panels(len(of_plan))
    parts = []
    for axes, of in zip(panels, of_plan, strict=True):
        for arm in of.arms:
            colour, dashes = colour_of(results, arm)
            for of_seed in of.losses[arm].values():
                axes.plot(of.compute[arm], of_seed, ".", color=colour, markersize=3, alpha=0.6)
            compute = np.geomspace(of.compute[arm][0], of.compute[arm][-1], POINTS)
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
    draw_legend(figure, panels)
    return ReportFigure("scaling", "; ".join(parts) or "Final losses over compute", figure)


def rates(results: Results) -> ReportFigure | None:
    """Draw the final loss over the learning rate: the mean over the sweep's seeds, their range, and where the seeds run."""
    swept = {size: {arm: results.sweep_losses(size, arm) for arm in results.arms(size)} for size in results.sizes}
    several = {
        size: {arm: of for arm, of in s.items() if len(of) > 1 and _common_seeds(of)} for size, s in swept.items()
    }
    by_size = {size: by_arm for size, by_arm in several.items() if by_arm}
    if not by_size:
        return None
    figure, panels = make_panels(len(by_size))
    edges = []
    for axes, (size, by_arm) in zip(panels, by_size.items(), strict=True):
        for arm, losses in by_arm.items():
            tried = sorted(losses)
            by_seed = np.array([[losses[lr][seed] for lr in tried] for seed in _common_seeds(losses)])
            draw_line(axes, results, arm, np.array(tried), by_seed, "o")
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
    draw_legend(figure, panels)
    title = "The best learning rate of every arm (x) lies inside the range that was tried"
    if edges:
        title = f"The best learning rate is at the edge for {', '.join(edges)}"
    return ReportFigure("learning_rates", title, figure)


def _common_seeds(losses: Mapping[float, Mapping[int, float]]) -> list[int]:
    """Return the seeds that ended at every learning rate: none while a sweep is young."""
    return sorted(set.intersection(*map(set, losses.values())))


def sizes(results: Results) -> ReportFigure | None:
    """Draw the mean final difference to the baseline from size to size."""
    means: dict[str, dict[str, float]] = {}
    for size in results.sizes:
        losses = {arm: [v for v in of_arm.values() if math.isfinite(v)] for arm, of_arm in results.losses(size).items()}
        means[size] = {arm: float(np.mean(values)) for arm, values in losses.items() if values}
    drawn = [size for size in results.sizes if results.baseline in means[size] and len(means[size]) > 1]
    if len(drawn) < 2:
        return None
    figure, (axes,) = make_panels(1)
    drawn.sort(key=lambda size: compute_of(results, size, results.baseline))
    compute = np.array([compute_of(results, size, results.baseline) for size in drawn])
    for arm in results.arms(drawn[0]):
        values = [means[size].get(arm, math.nan) - means[size][results.baseline] for size in drawn]
        draw_line(axes, results, arm, compute, np.array([values]), marker="o")
    axes.set_xscale("log")
    axes.set_xticks(compute, drawn)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("FLOPs of a run")
    axes.set_ylabel(f"nats per token relative to {results.baseline}")
    draw_legend(figure, [axes])
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
    figure, panels = make_panels(2 * len(by_size))
    parts = []
    for i, (size, by_arm) in enumerate(by_size.items()):
        over_time, by_layer = panels[2 * i : 2 * i + 2]
        for arm, (tokens, values) in by_arm.items():
            draw_line(over_time, results, arm, tokens / 1e6, values.mean(1)[None])
            draw_line(by_layer, results, arm, np.arange(1, values.shape[1] + 1), values[-1][None], marker="o")
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
    draw_legend(figure, panels)
    title = f"{what.label}: at the end the {what.axis} is {'; '.join(parts)}, averaged over layers"
    return ReportFigure(what.name, title, figure)
