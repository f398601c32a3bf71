"""What can be wrong with one row, and how many such rows a run puts up with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.config.errors import DataError
from tunesmith.pipeline.sources import is_file_source

Kind = Literal[
    "invalid_json",
    "invalid_csv",
    "not_utf8",
    "not_an_object",
    "missing_column",
    "wrong_type",
    "unknown_role",
    "wrong_role_order",
    "no_assistant_turn",
    "empty_assistant",
    "empty_user",
    "empty_text",
    "equal_answers",
    "different_prompts",
]
_SHOWN = 5


class RowError(Exception):
    """A row that cannot be used."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind: Kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Fault:
    """A row that was dropped, and why."""

    source: str
    line: int
    error: Kind
    detail: str

    @property
    def place(self) -> str:
        """`FILE:LINE`, or the row where a source has no lines."""
        has_lines = is_file_source(self.source) and not self.source.endswith(".parquet")
        return f"{self.source}:{'' if has_lines else 'row '}{self.line}"

    def to_json(self) -> str:
        """One line of `errors.jsonl`."""
        return json.dumps(vars(self))


def counts(faults: Sequence[Fault]) -> dict[str, int]:
    """How many rows each kind of fault cost."""
    return dict(sorted(Counter(fault.error for fault in faults).items()))


def write_faults(path: Path, faults: Sequence[Fault]) -> None:
    """All of them, one JSON object per line."""
    path.write_text("".join(f"{fault.to_json()}\n" for fault in faults), encoding="utf-8")


def check_error_rate(
    source: str, rows: int, faults: Sequence[Fault], max_error_rate: float, listing: Path
) -> None:
    """Raises DataError when more rows than allowed are malformed; all are written to `listing`."""
    if len(faults) <= max_error_rate * rows:
        return
    write_faults(listing, faults)
    first = "".join(f"\n  {fault.place}: {fault.detail}" for fault in faults[:_SHOWN])
    more = len(faults) - _SHOWN
    raise DataError(
        f"{source}: {len(faults)} of {rows} rows are malformed, more than data.max_error_rate "
        f"({max_error_rate:g}) allows:{first}"
        + (f"\n  and {more} more, all listed in {listing}" if more > 0 else "")
        + "\nmend them, or raise data.max_error_rate to leave them out"
    )
