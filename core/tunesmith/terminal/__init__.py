"""What a person sees while work goes on: bars, tables and log lines. Results go to stdout,
everything else to stderr."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_PLAIN_INTERVAL_S = 10.0


def log(message: str) -> None:
    """One line on stderr."""
    _stderr().print(message, highlight=False, markup=False, soft_wrap=True)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table whose first column is left-aligned and all others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


class Bar:
    """A progress bar on a terminal; a line every ten seconds elsewhere."""

    def __init__(self, progress: Progress | None, description: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="") if progress else None
        self._description, self._total = description, total
        self._done = 0
        self._started_s = self._printed_s = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count finished work; `note` stands at the end of the line."""
        self._done += amount
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount, note=note)
        elif time.monotonic() - self._printed_s >= _PLAIN_INTERVAL_S:
            self._printed_s = time.monotonic()
            note = f"{self._left()} {note}".strip()
            log(f"{self._description}: {self._done}/{self._total or '?'} {note}".rstrip())

    def _left(self) -> str:
        """How long the rest takes if it goes on as it did."""
        if not self._total or not self._done:
            return ""
        left_s = (self._printed_s - self._started_s) * max(0, self._total - self._done) / self._done
        return f"({timedelta(seconds=round(left_s))} left)"


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Bar]:
    """Show how far long work is, with elapsed and remaining time."""
    if not sys.stderr.isatty():
        yield Bar(None, description, total)
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_stderr()) as progress:
        yield Bar(progress, description, total)


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Mute the bars that libraries draw with tqdm, which would break ours."""
    tqdm = importlib.import_module("tqdm").tqdm
    make = tqdm.__init__

    def make_muted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs | {"disable": True})

    tqdm.__init__ = make_muted
    try:
        yield
    finally:
        tqdm.__init__ = make


def _stderr() -> Console:
    return Console(stderr=True)
