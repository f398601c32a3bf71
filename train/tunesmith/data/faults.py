"""What can be wrong with one row, and how many such rows a run puts up with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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
    "nothing_learnt",
    "unlearnable_role",
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


class FaultLog:
    """The rows that were dropped: all of them in a file, and their number in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w", encoding="utf-8")
        self._first: list[Fault] = []
        self.kinds: Counter[str] = Counter()
        """How many rows each kind of fault cost."""

    def __enter__(self) -> FaultLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, fault: Fault) -> None:
        """Keep one."""
        self._file.write(f"{fault.to_json()}\n")
        self.kinds[fault.error] += 1
        self._first = [*self._first, fault][:_SHOWN]

    def begin(self) -> None:
        """Show the first ones of what is read from now on."""
        self._first = []

    def check(self, source: str, rows: int, dropped: int, max_error_rate: float) -> None:
        """Raises DataError when more rows of a source than allowed are malformed."""
        if dropped <= max_error_rate * rows:
            return
        first = "".join(f"\n  {fault.place}: {fault.detail}" for fault in self._first)
        more = dropped - _SHOWN
        raise DataError(
            f"{source}: {dropped} of {rows} rows are malformed, more than data.max_error_rate "
            f"({max_error_rate:g}) allows:{first}"
            + (f"\n  and {more} more, all listed in {self._path}" if more > 0 else "")
            + "\nmend them, or raise data.max_error_rate to leave them out"
        )
