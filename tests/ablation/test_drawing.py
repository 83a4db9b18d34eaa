"""Figures: no empty axes, and a title beside its legend."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ablation.drawing import STYLE, ReportFigure, draw_legend, make_panels

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
