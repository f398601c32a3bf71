"""Charts in the page's style. Colours that carry no meaning are set by the page, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.core.properties import value as constant
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    LabelSet,
    Legend,
    LegendItem,
    Whisker,
)
from bokeh.plotting import figure

COLORS = {
    "base": "#8b93a1",
    "adapter": "#9a6fe0",
    "tuned": "#3b7ddd",
    "w8a8-int8": "#0fa38f",
    "w4a16": "#e8852b",
    "fp8-dynamic": "#d9558a",
}
_OTHER_COLOR = "#8b93a1"
MUTED = "#808793"  # until the page knows whether it is light or dark
HEIGHT_PX = 280
_FONT = "system-ui, sans-serif"
# Of a label beside a point: where it is, its line, and what it hides as shares of the points' span.
_LABEL_Y_PX, _LABEL_PX, _LABEL_WIDTH, _LABEL_HEIGHT = 5, 14, 0.3, 0.06


@dataclass(frozen=True)
class Plot:
    """One figure and what is said about it."""

    title: str
    note: str
    figure: Any


def empty_chart(
    x_label: str,
    y_label: str,
    height: int = HEIGHT_PX,
    y_scale: str = "linear",
    x_scale: str = "linear",
) -> Any:
    """An empty chart in the page's style: no box, no vertical lines, no toolbar."""
    chart = figure(
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        x_axis_label=x_label,
        y_axis_label=y_label,
        y_axis_type=y_scale,
        x_axis_type=x_scale,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=14,
    )
    chart.xaxis.ticker.desired_num_ticks = 5
    chart.grid.grid_line_color = MUTED
    chart.grid.grid_line_alpha = 0.22
    chart.axis.axis_line_color = None
    chart.axis.major_tick_line_color = None
    chart.axis.minor_tick_line_color = None
    chart.axis.major_label_text_color = MUTED
    chart.axis.axis_label_text_color = MUTED
    chart.axis.axis_label_text_font = chart.axis.major_label_text_font = _FONT
    chart.axis.axis_label_text_font_style = "normal"
    chart.axis.axis_label_text_font_size = "12px"
    chart.axis.major_label_text_font_size = "12px"
    return chart


def name_places(chart: Any, names: Sequence[str]) -> None:
    """Names in place of numbers on the vertical axis."""
    chart.yaxis.ticker = FixedTicker(ticks=list(range(len(names))))
    chart.yaxis.major_label_overrides = dict(enumerate(names))
    chart.y_range.start, chart.y_range.end = -0.6, len(names) - 0.4
    chart.ygrid.grid_line_color = None


def plain(whisker: Whisker) -> Whisker:
    whisker.line_color = MUTED
    whisker.line_width = 2
    whisker.upper_head = whisker.lower_head = None
    return whisker


def legend(items: list[LegendItem]) -> Legend:
    return Legend(
        items=items,
        orientation="horizontal",
        background_fill_color=None,
        border_line_color=None,
        label_text_color=MUTED,
        label_text_font=_FONT,
        label_text_font_size="12px",
        glyph_width=16,
        margin=0,
        padding=0,
        spacing=14,
    )


def labels(source: ColumnDataSource, x: str, y: str) -> LabelSet:
    """The `name` of each point beside it; those of close points stand one above the other."""
    lifts_px = _lifts_px(source.data[x], source.data[y])
    source.data["label_y_px"] = [_LABEL_Y_PX + lift_px for lift_px in lifts_px]
    return LabelSet(
        x=x,
        y=y,
        text="name",
        source=source,
        x_offset=11,
        y_offset="label_y_px",
        text_font=constant(_FONT),
        text_font_size="12px",
        text_color=MUTED,
        name="muted",
    )


def _lifts_px(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    width, height = (max(values) - min(values) or 1.0 for values in (xs, ys))
    lifts = [0] * len(xs)
    placed: list[int] = []
    for at in sorted(range(len(xs)), key=lambda at: xs[at]):
        near = {
            lifts[other]
            for other in placed
            if xs[at] - xs[other] < _LABEL_WIDTH * width
            and abs(ys[at] - ys[other]) < _LABEL_HEIGHT * height
        }
        while lifts[at] in near:
            lifts[at] += _LABEL_PX
        placed.append(at)
    return lifts


def color_of(name: str) -> str:
    return COLORS.get(name, _OTHER_COLOR)
