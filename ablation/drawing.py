"""What the figures of a report share: style, colours, axes and lines, and how a figure is rendered, as SVG and as PNG.

A figure is drawn once (`figures.py`). On the page, the colours of text and lines are replaced by the page's CSS variables, so
that a figure is light or dark with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ablation.results import Results
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
_PIXELS_PER_INCH = 160  # of PNG files
POINTS = 60  # of a curve: the resolution of a figure this wide
_LETTERS_PER_INCH = 11  # of a title
_LEGEND = 1.1  # inches, to the right of the axes
STYLE: dict[RcKeyType, Any] = {
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
        with matplotlib.rc_context(STYLE):  # not `savefig`, which draws a figure twice
            FigureCanvasSVG(self.figure).print_svg(file, metadata={"Date": None, "Creator": None})
        document = file.getvalue()
        return re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.S)

    def _png(self) -> bytes:
        """Return the figure as PNG, as it was laid out last."""
        file, engine = io.BytesIO(), self.figure.get_layout_engine()
        self.figure.set_facecolor("white")
        self.figure.set_layout_engine("none")
        self.figure.set_dpi(_PIXELS_PER_INCH)
        with matplotlib.rc_context(STYLE):
            FigureCanvasAgg(self.figure).print_png(file, metadata={"Software": None})
        self.figure.set_layout_engine(engine)
        return file.getvalue()

    @contextlib.contextmanager
    def _titled(self) -> Iterator[None]:
        width = self.figure.get_figwidth() - (_LEGEND if self.figure.legends else 0.0)
        lines = textwrap.wrap(self.title, int(_LETTERS_PER_INCH * width))
        title = self.figure.suptitle("\n".join(lines), x=0.005, ha="left", fontsize=10, fontweight="bold", color=INK)
        try:
            yield
        finally:
            title.set(visible=False, in_layout=False)


def colour_of(results: Results, arm: str) -> tuple[str, str]:
    """Return the colour and dashes of an arm, the same in every figure; the baseline has the colour of text."""
    if arm == results.baseline:
        return INK, "-"
    arms = [a for a in results.manifest.arms[results.sizes[0]] if a != results.baseline]
    i = arms.index(arm) if arm in arms else 0
    return _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]


def make_panels(count: int, height: float = 3.1, legend: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many axes, and the axes.

    Args:
        height: of a row, in inches.
        legend: leave room for one.
    """
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns + (_LEGEND if legend else 0.0), height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def draw_line(axes: Axes, results: Results, arm: str, x: np.ndarray, rows: np.ndarray, marker: str = "") -> None:
    """Draw the mean of rows (seeds, points) as a line, and their range as a band."""
    colour, dashes = colour_of(results, arm)
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    x, rows = x[keep], rows[:, keep]
    marker = marker or ("o" if len(x) == 1 else "")  # a single point makes no line
    axes.plot(x, rows.mean(0), color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=arm)
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)


def zoom(axes: Axes, means: Sequence[np.ndarray], include: float | None = None) -> None:
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


def draw_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Draw one legend of everything that has a label in some of the axes."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
