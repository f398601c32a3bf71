"""The plots of compressed checkpoints: where their weights err, and what they cost and gain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LegendItem,
    NumeralTickFormatter,
    Whisker,
)

from tunesmith.report.charts import (
    MUTED,
    Plot,
    color_of,
    empty_chart,
    labels,
    legend,
    plain,
)
from tunesmith.report.contents import Checkpoint

_DOT_PX = 18.0
_MOST_TICKS = 12


def quantization_plots(checkpoints: Sequence[Checkpoint]) -> list[Plot]:
    """Those that there is something to draw for."""
    return [plot for plot in (_layers(checkpoints), _trade(checkpoints)) if plot]


def _layers(checkpoints: Sequence[Checkpoint]) -> Plot | None:
    """Every quantized layer in the order of the model."""
    known = [checkpoint for checkpoint in checkpoints if checkpoint.layers]
    if not known:
        return None
    names = sorted({name for one in known for name in one.layers}, key=_in_order)
    places = {name: at for at, name in enumerate(names)}
    chart = empty_chart("block of the model", "relative error of the weights", y_scale="log")
    chart.yaxis.formatter = NumeralTickFormatter(format="0.[00]%")
    chart.yaxis.ticker = FixedTicker(ticks=[n * 10.0**p for p in range(-5, 2) for n in (1, 2, 5)])
    items = []
    for checkpoint in known:
        layers = [(name, entry) for name, entry in checkpoint.layers.items() if entry["error"] > 0]
        source = ColumnDataSource(
            {
                "place": [places[name] for name, _ in layers],
                "name": [name for name, _ in layers],
                "error": [entry["error"] for _, entry in layers],
                "worst": [entry["worst_row"] for _, entry in layers],
                "scheme": [checkpoint.name] * len(layers),
            }
        )
        dots = chart.scatter(
            "place", "error", source=source, size=8, color=color_of(checkpoint.name), alpha=0.85
        )
        items.append(LegendItem(label=checkpoint.name, renderers=[dots]))
    _name_blocks(chart, names)
    chart.add_layout(legend(items), "above")
    tips = [("scheme", "@scheme"), ("layer", "@name"), ("error", "@error{0.00%}")]
    chart.add_tools(HoverTool(tooltips=[*tips, ("worst output", "@worst{0.00%}")]))
    return Plot(
        "Error by layer",
        "How far each quantized layer's weights are from the parent's, from the first layer to the "
        "last. A dot far above its neighbours is a scale that cannot be right.",
        chart,
    )


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers in names count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _name_blocks(chart: Any, names: Sequence[str]) -> None:
    """The number of each block where it begins; of some of them in a deep model."""
    firsts: dict[str, int] = {}
    for at, name in enumerate(names):
        if found := re.search(r"\.(\d+)\.", name):
            firsts.setdefault(found[1], at)
    chosen = list(firsts.items())[:: max(1, -(-len(firsts) // _MOST_TICKS))]
    chart.xaxis.ticker = FixedTicker(ticks=[at for _, at in chosen])
    chart.xaxis.major_label_overrides = {at: block for block, at in chosen}


def _trade(checkpoints: Sequence[Checkpoint]) -> Plot | None:
    """Size, quality and speed of each, with those that no other one beats joined."""
    measured = [one for one in checkpoints if (one.found["metrics"] or {}).get("loads")]
    if not measured:
        return None
    points = [("parent", measured[0].parent_bytes, (0.0, 0.0, 0.0), 1.0, "")]
    for one in measured:
        metrics = one.found["metrics"]
        loss = metrics["total"]["loss_increase"]
        percents = (100 * loss["value"], 100 * loss["low"], 100 * loss["high"])
        speed = 1 + metrics["speed"]["saturation"]["change"]["value"]
        points.append((one.name, one.size_bytes, percents, speed, one.found["state"]))
    chart = empty_chart("size of the weights, MiB", "rise of the held-out loss, %")
    front = [point for point in points if not any(_beats(other, point) for other in points)]
    front.sort(key=lambda point: point[1])
    chart.line(
        [size / 2**20 for _, size, *_ in front],
        [loss[0] for _, _, loss, *_ in front],
        line_width=1.5,
        line_dash="dashed",
        line_color=MUTED,
    )
    source = ColumnDataSource(
        {
            "name": [name for name, *_ in points],
            "mib": [size / 2**20 for _, size, *_ in points],
            "value": [loss[0] for _, _, loss, *_ in points],
            "low": [loss[1] for _, _, loss, *_ in points],
            "high": [loss[2] for _, _, loss, *_ in points],
            "speed": [speed for *_, speed, _ in points],
            "dot_px": [_DOT_PX * speed**0.5 for *_, speed, _ in points],
            "color": [color_of("tuned" if name == "parent" else name) for name, *_ in points],
            "fill": [0.0 if state == "refused" else 0.75 for *_, state in points],
            "state": [state for *_, state in points],
        }
    )
    bars = Whisker(source=source, base="mib", lower="low", upper="high", dimension="height")
    chart.add_layout(plain(bars))
    chart.scatter(
        "mib", "value", source=source, size="dot_px", color="color", fill_alpha="fill", line_width=2
    )
    chart.add_layout(labels(source, "mib", "value"))
    widest = max(size for _, size, *_ in points) / 2**20
    chart.x_range.start, chart.x_range.end = 0, 1.25 * widest
    lows, highs = [loss[1] for _, _, loss, *_ in points], [loss[2] for _, _, loss, *_ in points]
    height = max(highs) - min(lows) or 1.0
    chart.y_range.start, chart.y_range.end = min(lows) - 0.15 * height, max(highs) + 0.2 * height
    tips = [("model", "@name"), ("MiB", "@mib{0,0.0}"), ("loss", "@value{+0.00} %")]
    chart.add_tools(
        HoverTool(tooltips=[*tips, ("speed", "@speed{0.00} of the parent's"), ("", "@state")])
    )
    return Plot(
        "Quality, size and speed",
        "Down and to the left is better; a larger dot writes more tokens per second with a full "
        "queue. The dashed line joins the models that no other one beats in both size and loss; "
        "an empty dot was refused.",
        chart,
    )


_Point = tuple[str, int, tuple[float, float, float], float, str]


def _beats(other: _Point, point: _Point) -> bool:
    """Smaller or of less loss, and in neither worse."""
    mine, theirs = (point[1], point[2][0]), (other[1], other[2][0])
    return theirs != mine and theirs[0] <= mine[0] and theirs[1] <= mine[1]
