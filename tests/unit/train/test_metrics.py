"""The log of a resumed run goes on where its checkpoint stands."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.train.metrics import MetricsLog


def test_lines_after_the_checkpoint_and_a_torn_line_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, None)
    for step in range(5):
        first.write(step=step, loss=1.0)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = MetricsLog(path, 3)
    resumed.write(step=4, loss=2.0)  # on disk before it is closed
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0),
    ]  # fmt: skip
    resumed.close()
    MetricsLog(path, None).close()
    assert path.read_text() == ""
