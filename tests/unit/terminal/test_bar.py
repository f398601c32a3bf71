from __future__ import annotations

import pytest

from tunesmith import terminal


def test_lines_say_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now_s)
    with terminal.progress_bar("w4a16", 40) as bar:
        now_s = 105.0
        bar.advance(1)
        now_s = 160.0
        bar.advance(9, note="slow")
    with terminal.progress_bar("rows", None) as bar:
        now_s = 200.0
        bar.advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["w4a16: 10/40 (0:03:00 left) slow", "rows: 3/?"]
