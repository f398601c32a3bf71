"""The page in a real browser, where there is one: plots drawn, nothing on the console."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.pipeline import Stages
from tunesmith.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
STEPS = [{"step": step, "loss": 4.0 - step / 50} for step in range(0, 100, 10)]


def test_plots_are_drawn_and_fit_a_phone(
    llama: Path, stages_of: Callable[..., Stages], tmp_path: Path
) -> None:
    stages = stages_of(tmp_path, llama, train={"method": "lora"}, bench={}, evaluate={})
    with stages.store.write(stages.trained, stages.recipe) as work:
        (work.out / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in STEPS))
    page = write_report(stages, tmp_path, {})
    for width in (1280, 390):
        found = browse(page, tmp_path / f"profile-{width}", width)
        assert "SEVERE" not in found.stderr and "Uncaught" not in found.stderr, found.stderr
        assert "document idle" in found.stderr  # Bokeh has drawn
        assert "<canvas" in found.stdout or "bk-Canvas" in found.stdout


def browse(page: Path, profile: Path, width: int) -> Any:
    """The page's DOM on stdout after its scripts ran, its console on stderr."""
    return subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=5000",
            "--enable-logging=stderr", f"--window-size={width},2000", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
