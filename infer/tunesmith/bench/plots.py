"""The plots of a benchmark's page, in Bokeh: distributions, the timeline, and loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LegendItem,
    NumeralTickFormatter,
    Span,
    Whisker,
)

from tunesmith.report.charts import (
    COLORS,
    Plot,
    color_of,
    empty_chart,
    labels,
    legend,
    plain,
)

_MOST_DOTS = 4000  # of a plot: more only make the page heavy
_LIMIT_COLOR = "#d64545"
_SECOND_COLOR = "#e8852b"
_USD = "usd_per_million_output_tokens"
Entries = Mapping[str, Mapping[str, Any]]


def distribution(
    entries: Entries, title: str, note: str, value_ms: Callable[[Mapping[str, Any]], float | None],
    limit_ms: float | None = None,
) -> Plot | None:  # fmt: skip
    """Share of the requests that took at most so long, one line for each model."""
    chart = empty_chart("milliseconds, logarithmic", "share of requests", x_scale="log")
    chart.yaxis.formatter = NumeralTickFormatter(format="0%")
    chart.y_range.start, chart.y_range.end = 0, 1.02
    _plain_numbers(chart.xaxis)
    items = []
    for name, entry in entries.items():
        column = [value_ms(one) for one in entry["samples"] if one["error"] is None]
        found = np.sort([value for value in column if value and value > 0])
        if not len(found):
            continue
        at = np.unique(np.linspace(0, len(found) - 1, min(len(found), 600)).astype(int))
        line = chart.step(
            found[at], (at + 1) / len(found), mode="after", line_width=2,
            color=color_of(name), name=name,
        )  # fmt: skip
        items.append(LegendItem(label=name, renderers=[line]))
    if not items:
        return None
    if limit_ms:
        note += f" The dashed line is the promise of {limit_ms:g} ms."
        chart.add_layout(_limit(limit_ms, "height"))
    chart.add_layout(legend(items), "above")
    chart.add_tools(
        HoverTool(tooltips=[("model", "$name"), ("ms", "@x{0.0}"), ("share", "@y{0%}")])
    )
    return Plot(title, note, chart)


def timeline(entries: Entries) -> Plot | None:
    """Every request by when it was meant to be sent, and how long its first token took."""
    chart = empty_chart("seconds of the round", "first token, ms")
    items = []
    total = sum(len(entry["samples"]) for entry in entries.values())
    every = -(-total // _MOST_DOTS) if total else 1
    for name, entry in entries.items():
        kept = [one for one in entry["samples"][::every] if one["error"] is None]
        if not kept:
            continue
        source = ColumnDataSource(
            {
                "at": [one["intended_s"] for one in kept],
                "ttft": [_ttft_ms(one) for one in kept],
                "e2e": [1000 * (one["ended_s"] - one["intended_s"]) for one in kept],
                "late": [1000 * (one["sent_s"] - one["intended_s"]) for one in kept],
                "index": [one["index"] for one in kept],
                "round": [one["round"] + 1 for one in kept],
                "tokens": [f"{one['input_tokens']} + {one['output_tokens']}" for one in kept],
            }
        )
        dots = chart.scatter(
            "at", "ttft", source=source, size=5, alpha=0.65, color=color_of(name), name=name
        )
        items.append(LegendItem(label=name, renderers=[dots]))
    if not items:
        return None
    chart.y_range.start = 0
    chart.add_layout(legend(items), "above")
    chart.add_tools(
        HoverTool(
            tooltips=[
                ("model", "$name"), ("request", "@index, round @round"), ("tokens", "@tokens"),
                ("first token", "@ttft{0.0} ms"), ("whole answer", "@e2e{0.0} ms"),
                ("client late", "@late{0.0} ms"),
            ]
        )
    )  # fmt: skip
    return Plot(
        "Timeline",
        "Every answered request, of all rounds one above the other; a stall is a slope that falls.",
        chart,
    )


def by_rate(name: str, points: Sequence[Mapping[str, Any]], limit_ms: float) -> Plot | None:
    """First token against the rate of arrivals, p50 and p95."""
    known = [point for point in points if "p95" in point["figures"]["ttft_ms"]]
    if len(known) < 2:
        return None
    return _levels(
        f"Latency against rate, {name}",
        f"First token; bars are 95 % intervals. The dashed line is the promise of {limit_ms:g} ms.",
        ("requests per second", "milliseconds, logarithmic"),
        [point["request_rate"] for point in known],
        {
            percent: [point["figures"]["ttft_ms"][percent] for point in known]
            for percent in ("p50", "p95")
        },
        limit_ms,
    )


def by_concurrency(name: str, points: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Throughput against requests in flight."""
    known = [point for point in points if point["figures"]["output_tokens_per_s"]]
    if len(known) < 2:
        return None
    known.sort(key=lambda point: float(point["concurrency"]))
    rates = [point["figures"]["output_tokens_per_s"] for point in known]
    return _levels(
        f"Throughput against requests in flight, {name}",
        "Output tokens per second; bars show how even the run was.",
        ("requests in flight", "tokens per second"),
        [point["concurrency"] for point in known],
        {"tokens/s": rates},
    )


def pareto(cells: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Quality against price; the models that no other one beats in both are joined."""
    known = [cell for cell in cells if cell.get("loss_change") and cell.get(_USD)]
    if len(known) < 2:
        return None
    chart = empty_chart("USD per million output tokens", "held-out loss against the reference, %")
    source = ColumnDataSource(
        {
            "name": [cell["variant"] for cell in known],
            "usd": [cell[_USD] for cell in known],
            **{
                bound: [100 * cell["loss_change"][bound] for cell in known]
                for bound in ("value", "low", "high")
            },
            "color": [color_of(cell["variant"]) for cell in known],
        }
    )
    front = sorted(
        ((cell[_USD], 100 * cell["loss_change"]["value"]) for cell in known
         if cell["pareto"]),
    )  # fmt: skip
    chart.line(
        [usd for usd, _ in front], [loss for _, loss in front], line_dash="dotted",
        line_width=2, color=COLORS["base"],
    )  # fmt: skip
    whisker = Whisker(source=source, base="usd", lower="low", upper="high", dimension="height")
    chart.add_layout(plain(whisker))
    chart.scatter("usd", "value", source=source, size=12, color="color")
    chart.add_layout(labels(source, "usd", "value"))
    prices = [cell[_USD] for cell in known]
    width = max(prices) - min(prices) or max(prices)
    chart.x_range.start = max(0, min(prices) - 0.15 * width)
    chart.x_range.end = max(prices) + 0.4 * width
    lows, highs = source.data["low"], source.data["high"]
    height = max(highs) - min(lows) or 1.0
    chart.y_range.start, chart.y_range.end = min(lows) - 0.1 * height, max(highs) + 0.15 * height
    chart.add_tools(
        HoverTool(
            tooltips=[
                ("model", "@name"),
                ("USD per M", "@usd{0.0000}"),
                ("loss", "@value{+0.00} %"),
            ]
        )
    )
    return Plot(
        "Quality and cost",
        "Down and to the left is better; bars are paired intervals. No model beats those on the "
        "dotted line in both.",
        chart,
    )


def _levels(
    title: str, note: str, axes: tuple[str, str], at: Sequence[float],
    columns: Mapping[str, Sequence[Mapping[str, float]]], limit: float | None = None,
) -> Plot:  # fmt: skip
    """Lines with intervals over a load."""
    chart = empty_chart(*axes, y_scale="log" if limit else "linear")
    items = []
    for (name, column), color in zip(
        columns.items(), (COLORS["tuned"], _SECOND_COLOR), strict=False
    ):
        source = ColumnDataSource(
            {"at": list(at)}
            | {bound: [one[bound] for one in column] for bound in ("value", "low", "high")}
        )
        line = chart.line("at", "value", source=source, line_width=2, color=color)
        dots = chart.scatter("at", "value", source=source, size=8, color=color, name=name)
        bars = Whisker(source=source, base="at", lower="low", upper="high", dimension="height")
        chart.add_layout(plain(bars))
        items.append(LegendItem(label=name, renderers=[line, dots]))
    if limit:
        _plain_numbers(chart.yaxis)
        chart.add_layout(_limit(limit, "width"))
    else:
        chart.y_range.start = 0
    chart.add_layout(legend(items), "above")
    chart.add_tools(
        HoverTool(
            tooltips=[
                ("figure", "$name"), ("at", "@at{0.[00]}"),
                ("value", "@value{0.0} (@low{0.0}–@high{0.0})"),
            ]
        )
    )  # fmt: skip
    return Plot(title, note, chart)


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, … on a logarithmic axis, in place of powers of ten."""
    axis.ticker = FixedTicker(ticks=[m * 10.0**k for k in range(-2, 7) for m in (1, 2, 5)])
    axis.formatter = NumeralTickFormatter(format="0,0.[00]")


def _limit(value: float, dimension: str) -> Span:
    return Span(location=value, dimension=dimension, line_color=_LIMIT_COLOR, line_dash="dashed")


def _ttft_ms(sample: Mapping[str, Any]) -> float:
    return float(1000 * (sample["piece_s"][0] - sample["intended_s"]))
