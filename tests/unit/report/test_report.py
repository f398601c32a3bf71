"""The page says what the artifacts say, needs no network, and lives with whatever is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bokeh.models import ColumnDataSource

from tunesmith.pipeline import Stages
from tunesmith.report import figures as say
from tunesmith.report import summary, write_report
from tunesmith.report.charts import labels
from tunesmith.report.contents import gather
from tunesmith.statistics import Interval

Make = Callable[..., None]


class Page(HTMLParser):
    """Visible text, and every address that a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.fetched, self._unseen = "", [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._unseen += tag in ("script", "style")
        self.fetched += [
            value
            for name, value in attributes
            if value and (name == "src" or (name == "href" and tag == "link"))
        ]

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.text += " ".join(data.split()) + " "


def test_the_page_is_whole_and_alone(stages: Stages, make: Make, tmp_path: Path) -> None:
    make(stages)
    path = write_report(stages, tmp_path / "out", {"train": 80.25, "data": 0.0})
    page = Page(path)
    assert path == tmp_path / "out" / "report.html"
    assert path.stat().st_size < 3_000_000
    assert all(address.startswith("data:") for address in page.fetched)
    for artifact in (made.artifact for made in gather(stages).lineage):
        assert artifact.id in page.text
    titles = ("Training", "Quality", "Throughput", "Time to first token", "Quality and cost")
    titles += ("Compressed checkpoints", "Error by layer", "Quality, size and speed")
    for words in (*titles, "train 1 min 20 s", "data made already", "gpu_hour_usd: 0.1"):
        assert words in page.text, words
    assert "Not made" not in page.text
    assert len(re.findall(r'<div id="[^"]+" data-root-id', path.read_text())) == 9


def test_figures_are_those_of_the_artifacts(stages: Stages, make: Make) -> None:
    make(stages)
    variants = {variant.name: variant for variant in gather(stages).variants}
    tuned, small = variants["tuned"], variants["w4a16"]
    assert tuned.change.against == "base" and small.change.against == "tuned"
    assert tuned.change.relative.value == pytest.approx(-0.34, abs=0.005)
    assert tuned.change.relative.low <= tuned.change.relative.value <= tuned.change.relative.high
    assert 0.01 < small.change.relative.low < small.change.relative.high < 0.025
    assert variants["base"].change is None
    assert small.size_bytes == int(6.3 * 2**20)
    table = summary(stages)
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert list(rows) == ["base", "tuned", "w8a8-int8", "w4a16"]
    assert rows["w8a8-int8"]["batch tok/s"] == "2,900"
    assert rows["tuned"]["TTFT p50 / p95 ms"] == "25.0 / 75.0"
    assert rows["tuned"]["out"] == "0.00833"
    assert rows["base"]["runs"] == "–" and rows["tuned"]["runs"] == "VALID"


def test_checkpoints_stand_with_their_figures_and_their_verdict(
    stages: Stages, make: Make, tmp_path: Path
) -> None:
    make(stages)
    text = Page(write_report(stages, tmp_path / "out", {})).text
    assert text.count("approved") == 2
    assert "+1.10 % +0.99 to +1.21 %" in text and "0.0022" in text and "1.20×" in text
    strict = {"quantize": stages.recipe.quantize.model_copy(update={"max_kl": 0.001})}
    judged = Stages(stages.recipe.model_copy(update=strict), stages.store, stages.path)
    text = Page(write_report(judged, tmp_path / "strict", {})).text
    assert text.count("approved") == 1
    assert "w4a16: the divergence is 0.0022 nats per token [0.00198, 0.00242]" in text


def test_a_doubtful_or_refused_run_is_named(
    stages: Stages, make_bench: Make, tmp_path: Path
) -> None:
    late = {"check": "client_bound", "detail": "the client was up to 80 ms late"}
    make_bench(stages, "serve", tuned={"valid": False, "faults": [late]})
    text = Page(write_report(stages, tmp_path, {})).text
    assert "tuned, serve: the client was up to 80 ms late" in text
    assert text.count("INVALID") == 1 and "Not made: bench batch." in text
    rows = {row[0]: row[-1] for row in summary(stages)["rows"]}
    assert rows == {"base": "–", "tuned": "INVALID", "w8a8-int8": "VALID", "w4a16": "VALID"}


def test_nothing_is_made_yet(stages: Stages, tmp_path: Path) -> None:
    text = Page(write_report(stages, tmp_path, {})).text
    for words in (
        "Not made: training. Run: tunesmith train configs/quickstart.yaml",
        "Not made: w8a8-int8, w4a16. Run: tunesmith quantize configs/quickstart.yaml",
        "Not made: bench batch, bench serve. Run: tunesmith bench all configs/quickstart.yaml",
    ):
        assert words in text


def test_lineage_shows_each_artifact_once_under_its_closest_parent(
    stages: Stages, make: Make
) -> None:
    make(stages)
    lineage = {made.artifact.manifest.label: made for made in gather(stages).lineage}
    depths = {label: made.depth for label, made in lineage.items()}
    assert len(lineage) == len(gather(stages).lineage) == 14
    assert depths["base"] == depths["data"] == depths["bench serve"] == 0
    assert (depths["adapter"], depths["tuned"], depths["w4a16"]) == (1, 2, 3)
    assert depths["eval w4a16"] == depths["fidelity w4a16"] == 4
    assert lineage["tuned"].others == {"base": stages.base.id}


def test_names_from_outside_are_escaped(stages: Stages, tmp_path: Path) -> None:
    hostile = Stages(stages.recipe, stages.store, "<script>alert(1)</script>.yaml")
    assert "<script>alert" not in write_report(hostile, tmp_path, {}).read_text()


def test_the_ground_floor_needs_no_torch() -> None:
    code = "import sys, tunesmith.report; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (say.price(0.00833), "0.00833"),
        (say.price(0.0995), "0.0995"),
        (say.price(12.34), "12.3"),
        (say.price(1240.4), "1,240"),
        (say.usd(None), "–"),
        (say.size(13_841_203), "13.2 MiB"),
        (say.size(16 * 2**30), "16.00 GiB"),
        (say.duration(9.96), "10.0 s"),
        (say.duration(200), "3 min 20 s"),
        (say.duration(18_720), "5 h 12 min"),
        (say.percent(-0.2741), "−27.4 %"),
        (say.percent_bounds(Interval(0.0, -0.001, 0.002), 2), "−0.10 to +0.20 %"),
    ],
)
def test_figures_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_labels_of_close_points_do_not_cover_each_other() -> None:
    names = ["base", "w8a8-int8", "tuned", "w4a16", "adapter"]
    usd, loss = [4.0, 3.0, 3.2, 3.3, 5.4], [26.3, 0.0, 0.0, 0.01, 0.0]
    source = ColumnDataSource({"name": names, "usd": usd, "loss": loss})
    labels(source, "usd", "loss")
    lifts = dict(zip(names, source.data["label_y_px"], strict=True))
    assert lifts["base"] == lifts["adapter"] == lifts["w8a8-int8"]
    assert len({lifts[name] for name in ("w8a8-int8", "tuned", "w4a16")}) == 3
