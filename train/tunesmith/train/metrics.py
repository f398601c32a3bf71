"""`metrics.jsonl`: one line per report, on disk as soon as it is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    """An append-only log that a resumed run continues where its checkpoint stands."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        """Keep the lines up to `resumed_step`; none when the run starts from the beginning."""
        kept = [] if resumed_step is None else _lines_until(path, resumed_step)
        aside = path.with_suffix(".writing")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, **figures: Any) -> None:
        """Add one line."""
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break  # A kill can cut the last line.
    return kept
