"""The page's plots, in Bokeh."""

from __future__ import annotations

from collections.abc import Sequence
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

from tunesmith.report import figures as say
from tunesmith.report.charts import (
    COLORS,
    HEIGHT_PX,
    Plot,
    color_of,
    empty_chart,
    labels,
    legend,
    name_places,
    plain,
)
from tunesmith.report.contents import Contents, Curve, Made, Variant
from tunesmith.statistics import Interval


def plots(contents: Contents) -> list[Plot]:
    """Those that there is something to draw for, in reading order."""
    candidates = [
        _training(contents.training, contents.held_out),
        _quality(contents),
        _throughput(contents.variants),
        _latency(contents, "ttft", "Time to first token", "ttft_p95_ms"),
        _latency(contents, "tpot", "Time per output token", "tpot_p95_ms"),
        _cost(contents.variants),
        _stages(contents.lineage),
    ]
    return [plot for plot in candidates if plot]


def _training(training: Curve | None, held_out: Curve | None) -> Plot | None:
    if training is None:
        return None
    chart = empty_chart("optimizer step", "loss, nats per token")
    line = chart.line(training.steps, training.losses, line_width=2, color=COLORS["tuned"])
    items = [LegendItem(label="training", renderers=[line])]
    if held_out:
        dots = chart.scatter(held_out.steps, held_out.losses, size=8, color="#e8852b")
        joined = chart.line(held_out.steps, held_out.losses, line_width=2, color="#e8852b")
        items.append(LegendItem(label="held out", renderers=[joined, dots]))
    chart.add_layout(legend(items), "above")
    chart.add_tools(HoverTool(tooltips=[("step", "@x"), ("loss", "@y{0.0000}")]))
    return Plot("Training", "Loss of learnt tokens, on training rows and on held-out rows.", chart)


def _quality(contents: Contents) -> Plot | None:
    measured = [variant for variant in contents.variants if variant.loss]
    if not measured:
        return None
    levels = [variant.loss for variant in measured if variant.loss]
    chart = _by_variant(measured, "held-out loss, nats per token")
    source = _interval_source(measured, levels)
    chart.scatter("value", "place", source=source, size=11, color="color")
    chart.add_layout(_whisker(source))
    chart.add_tools(
        HoverTool(
            tooltips=[("model", "@name"), ("loss", "@value{0.0000} (@low{0.000}–@high{0.000})")]
        )
    )
    level = f"{contents.confidence:.0%}"
    return Plot(
        "Quality",
        f"Loss on held-out answers, lower is better; bars are {level} intervals over rows. "
        "The paired change in the table is far sharper.",
        chart,
    )


def _throughput(variants: Sequence[Variant]) -> Plot | None:
    rates = [
        (variant, Interval(**found))
        for variant in variants
        if (found := variant.bench.get("batch", {}).get("output_tokens_per_s"))
    ]
    if not rates:
        return None
    measured, levels = [variant for variant, _ in rates], [rate for _, rate in rates]
    chart = _by_variant(measured, "output tokens per second")
    chart.x_range.start, chart.x_range.end = 0, 1.06 * max(level.high for level in levels)
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    source = _interval_source(measured, levels)
    chart.hbar("place", height=0.5, left=0, right="value", source=source, color="color")
    chart.add_layout(_whisker(source))
    chart.add_tools(
        HoverTool(tooltips=[("model", "@name"), ("tokens/s", "@value{0,0} (@low{0,0}–@high{0,0})")])
    )
    figures = measured[0].bench["batch"]
    return Plot(
        "Throughput",
        f"Full queue, {figures['concurrency']} requests in flight, "
        f"{figures['output_tokens']:g} tokens each; bars show how even the run was.",
        chart,
    )


def _latency(contents: Contents, name: str, title: str, slo_key: str) -> Plot | None:
    columns_ms = {
        variant: _latencies_ms(samples, name) for variant, samples in contents.serve_samples.items()
    }
    columns_ms = {variant: column for variant, column in columns_ms.items() if len(column)}
    if not columns_ms:
        return None
    chart = empty_chart("milliseconds", "share of requests")
    chart.yaxis.formatter = NumeralTickFormatter(format="0%")
    chart.yaxis.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 0.95])
    chart.y_range.start, chart.y_range.end = 0, 1.02
    items = []
    for variant, column_ms in columns_ms.items():
        share = np.arange(1, len(column_ms) + 1) / len(column_ms)
        line = chart.step(
            column_ms, share, mode="after", line_width=2, color=color_of(variant), name=variant
        )
        items.append(LegendItem(label=variant, renderers=[line]))
    bench = contents.stages.recipe.bench
    assert bench  # there are samples of it
    timed = {"ttft": "timed from when they were due", "tpot": "the mean of each after its first"}
    note = f"Requests arriving at {bench.request_rate:g}/s, {timed[name]}."
    limit_ms = getattr(bench.slo, slo_key)
    if limit_ms < 2 * max(column[-1] for column in columns_ms.values()):
        note += f" The dashed line is the promise of {limit_ms:g} ms."
        chart.add_layout(
            Span(location=limit_ms, dimension="height", line_color="#d64545", line_dash="dashed")
        )
    chart.x_range.start = 0
    chart.add_layout(legend(items), "above")
    chart.add_tools(
        HoverTool(tooltips=[("model", "$name"), ("ms", "@x{0.0}"), ("share", "@y{0%}")])
    )
    return Plot(title, note, chart)


def _latencies_ms(samples: Sequence[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    """Sorted, of answered requests."""
    found = []
    for sample in samples:
        if sample["error"] is not None:
            continue
        first_s, last_s = sample["piece_s"][0], sample["piece_s"][-1]
        later = sample["output_tokens"] - sample["piece_tokens"][0]
        if name == "ttft":
            found.append(1000 * (first_s - sample["intended_s"]))
        elif later:
            found.append(1000 * (last_s - first_s) / later)
    return np.sort(np.asarray(found))


def _cost(variants: Sequence[Variant]) -> Plot | None:
    """Against the tuned model, where the paired intervals are; nothing without them."""
    points = [
        (variant, 100 * change.value, 100 * change.low, 100 * change.high, price)
        for variant in variants
        if (change := _against_tuned(variant))
        and (price := variant.bench.get("batch", {}).get("usd_per_million_output_tokens"))
    ]
    if len(points) < 2:
        return None
    chart = empty_chart("USD per million output tokens", "held-out loss against tuned, %")
    prices = [price for *_, price in points]
    source = ColumnDataSource(
        {
            "name": [variant.name for variant, *_ in points],
            "usd": prices,
            "value": [value for _, value, *_ in points],
            "low": [low for _, _, low, *_ in points],
            "high": [high for _, _, _, high, _ in points],
            "color": [color_of(variant.name) for variant, *_ in points],
        }
    )
    whisker = Whisker(source=source, base="usd", lower="low", upper="high", dimension="height")
    chart.add_layout(plain(whisker))
    chart.scatter("usd", "value", source=source, size=12, color="color")
    chart.add_layout(labels(source, "usd", "value"))
    width = max(prices) - min(prices) or max(prices)
    chart.x_range.start = max(0, min(prices) - 0.15 * width)
    chart.x_range.end = max(prices) + 0.35 * width
    lows, highs = [low for _, _, low, *_ in points], [high for _, _, _, high, _ in points]
    height = max(highs) - min(lows) or 1.0
    chart.y_range.start, chart.y_range.end = min(lows) - 0.1 * height, max(highs) + 0.15 * height
    chart.xaxis.formatter = NumeralTickFormatter(format="0.0000" if max(prices) < 0.1 else "0.000")
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
        "Full queue. Down and to the left is better; bars are paired intervals.",
        chart,
    )


def _against_tuned(variant: Variant) -> Interval | None:
    """The change of a variant from the tuned model, which itself is at zero."""
    if variant.name == "tuned":
        return Interval(0.0, 0.0, 0.0)
    change = variant.change
    return change.relative if change and change.against == "tuned" else None


def _stages(lineage: Sequence[Made]) -> Plot | None:
    made = [
        one.artifact.manifest for one in lineage if one.artifact.manifest.cost.device_seconds > 0
    ]
    if not made:
        return None
    made = sorted(made, key=lambda manifest: manifest.created_at, reverse=True)
    chart = empty_chart("device-seconds", "", height=max(HEIGHT_PX, 60 + 22 * len(made)))
    source = ColumnDataSource(
        {
            "place": list(range(len(made))),
            "label": [manifest.label for manifest in made],
            "seconds": [manifest.cost.device_seconds for manifest in made],
            "usd": [say.usd(manifest.cost.usd) for manifest in made],
        }
    )
    chart.hbar("place", height=0.6, left=0, right="seconds", source=source, color=COLORS["tuned"])
    name_places(chart, [manifest.label for manifest in made])
    chart.x_range.start = 0
    chart.add_tools(
        HoverTool(tooltips=[("made", "@label"), ("seconds", "@seconds{0.0}"), ("USD", "@usd")])
    )
    total_s = sum(manifest.cost.device_seconds for manifest in made)
    costs = [manifest.cost.usd for manifest in made]
    money = f", {say.usd(sum(cost or 0 for cost in costs))}" if any(costs) else ""
    return Plot("Where the time went", f"{total_s:,.0f} device-seconds in all{money}.", chart)


def _by_variant(variants: Sequence[Variant], x_label: str) -> Any:
    """A chart with one line per variant, the first on top."""
    chart = empty_chart(x_label, "", height=max(HEIGHT_PX, 90 + 42 * len(variants)))
    name_places(chart, [variant.name for variant in reversed(variants)])
    return chart


def _interval_source(variants: Sequence[Variant], levels: Sequence[Interval]) -> ColumnDataSource:
    return ColumnDataSource(
        {
            "place": list(range(len(variants)))[::-1],
            "name": [variant.name for variant in variants],
            "color": [color_of(variant.name) for variant in variants],
            "value": [level.value for level in levels],
            "low": [level.low for level in levels],
            "high": [level.high for level in levels],
        }
    )


def _whisker(source: ColumnDataSource) -> Whisker:
    whisker = Whisker(source=source, base="place", lower="low", upper="high", dimension="width")
    return plain(whisker)
