"""The page of a benchmark: whole, small, and drawn by a browser without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess

import made_up
import pytest

from tunesmith.bench.page import render

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
TITLES = {
    "serve": ["Time to the first token", "Time per output token", "Whole answers", "Timeline"],
    "sweep": ["Latency against rate, tuned", "Throughput against requests in flight, tuned"],
    "frontier": ["Quality and cost", "Time to the first token"],
}


@pytest.mark.parametrize("mode", TITLES)
def test_a_page_has_every_figure(tmp_path, mode):
    found = getattr(made_up, mode)()
    path = render(found, tmp_path / f"{mode}.html", "bot", "bench-0123456789ab", 3.6)
    text = path.read_text()
    for title in TITLES[mode]:
        assert f"<h3>{title}</h3>" in text
    assert len(text) < 3_000_000
    assert "<script src" not in text and "stylesheet" not in text[:2000], "it needs no network"
    if mode != "sweep":
        assert "this device has no FP" in text
    if mode == "sweep":
        assert "INVALID" in text or "VALID" in text


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_browser_draws_it_on_a_phone(tmp_path):
    page = render(made_up.sweep(), tmp_path / "sweep.html", "bot", "bench-0123456789ab", 3.6)
    done = browse(page, 390)
    assert "SEVERE" not in done.stderr and "Uncaught" not in done.stderr, done.stderr
    assert "document idle" in done.stderr  # Bokeh has drawn


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_the_widest_table_needs_no_scrolling_on_a_desk(tmp_path):
    page = render(made_up.frontier(), tmp_path / "frontier.html", "bot", "bench-0123456789ab", 3.6)
    with page.open("a") as file:
        file.write(
            "<script>const table = document.querySelector('table.variants');"
            "document.title = `${table.offsetWidth} in ${table.parentElement.clientWidth}`"
            "</script>"
        )
    found = re.search(r"<title>(\d+) in (\d+)</title>", browse(page, 1280).stdout)
    assert found
    table, room = map(int, found.groups())
    assert 0 < table <= room


def browse(page, width):
    return subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={page.parent / 'profile'}",
            "--virtual-time-budget=5000", "--enable-logging=stderr", f"--window-size={width},2000",
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
