"""A template, facts and figures to one page of HTML that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.report import figures as say
from tunesmith.report.charts import Plot


def render_page(
    template: str, path: Path, facts: Mapping[str, Any], plots: Mapping[str, Sequence[Plot]]
) -> Path:
    """Write the page to `path` and return it; the template gets each group of plots by its name."""
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment, PackageLoader, StrictUndefined

    drawn = [plot for group in plots.values() for plot in group]
    script, divs = components([plot.figure for plot in drawn]) if drawn else ("", ())
    made = iter(
        {"title": plot.title, "note": plot.note, "div": div}
        for plot, div in zip(drawn, divs, strict=True)
    )
    groups = {name: [next(made) for _ in group] for name, group in plots.items()}
    environment = Environment(
        loader=PackageLoader("tunesmith.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    resources = Resources(mode="inline", components=["bokeh"])
    html = environment.get_template(template).render(
        **facts,
        **groups,
        bokeh=resources.render() if drawn else "",
        script=script,
        say=say,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path
