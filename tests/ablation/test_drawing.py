"""Figures: no empty axes, a title beside its legend, and nothing written beyond the edge."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ablation.drawing import STYLE, ReportFigure, draw_legend, make_panels
from ablation.figures import draw
from ablation.results import read_results
from tests.training.tiny import ROOT

LONG = "adamw, adamw_4m: relu needs 1.16 times relu2's compute (1.10 to 1.24), and swiglu 1.16 (1.03 to 1.31)"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_figure_has_the_axes_that_are_drawn_on_and_no_others(count):
    figure, panels = make_panels(count)
    assert figure.axes == panels
    assert len(panels) == count


@pytest.mark.parametrize("count", [1, 2])
def test_a_title_does_not_cover_the_legend(count):
    with matplotlib.rc_context(STYLE):
        figure, panels = make_panels(count)
        for axes in panels:
            axes.plot([0, 1], [0, 1], label="swiglu")
        draw_legend(figure, panels)
        canvas = FigureCanvasAgg(figure)
        with ReportFigure("scaling", LONG, figure)._titled():
            canvas.draw()
            renderer = canvas.get_renderer()
            title, legend = figure._suptitle.get_window_extent(renderer), figure.legends[0].get_window_extent(renderer)
    assert title.width > 0 < legend.width
    assert not title.overlaps(legend)


def test_no_figure_writes_beyond_its_edge():
    figures = {drawn.name: drawn for drawn in draw(read_results(ROOT / "bench" / "results" / "optimizer_by_arm"))}
    assert {"verdicts", "curves", "learning_rates", "scaling", "sizes"} <= figures.keys()
    for name, drawn in figures.items():
        with matplotlib.rc_context(STYLE), drawn._titled():
            figure = drawn.figure
            drawn._svg()  # as a file is written: laid out for SVG, and drawn as PNG with that layout
            drawn._png()
            renderer = FigureCanvasAgg(figure).get_renderer()
            texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
            for axes in figure.axes:
                texts += [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title, axes._right_title]
            boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        outside = [
            text
            for text, box in boxes
            if text and (box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1)
        ]
        assert not outside, name
