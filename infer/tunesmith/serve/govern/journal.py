"""The request log and the day's spending, written behind the requests' back.

One thread takes entries from a bounded queue and writes them a few times a second. A disk that is
full, or slower than the requests, costs entries, which are counted; it never holds up a request.
What was spent is kept in memory until it is written, and is never dropped.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from tunesmith.serve.govern.archive import count_lines
from tunesmith.serve.govern.database import requests, spending
from tunesmith.serve.govern.governor import Subject
from tunesmith.serve.govern.limits import Use
from tunesmith.terminal import log

Ending = Literal["complete", "error", "disconnected", "refused", "lost"]
"""`error` was the engine's answer, `refused` ours; `lost` is an engine that died meanwhile."""

Purpose = Literal["request", "shadow", "probe"]
"""A client's own, a copy of it for a second model, or a question of a rollout."""

_FLUSH_INTERVAL_S = 0.2
_CAPACITY = 20_000
_COMPLAINT_INTERVAL_S = 60.0
_ARCHIVE_RETRY_S = 60.0


@dataclass(frozen=True)
class Entry:
    """One line of the request log; money in nano-USD, null where the model has no price."""

    request_id: str
    response_id: str | None
    at_s: float
    key_id: str | None
    key_name: str | None
    group: str | None
    method: str
    path: str
    model: str | None
    artifact: str | None
    status: int
    ending: Ending
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    is_estimated: bool
    nano_usd: int | None
    ttft_s: float | None
    duration_s: float
    request_body: str | None = None
    response_body: str | None = None
    guardrails: str | None = None
    """What they found, as JSON."""

    route: str | None = None
    arm: str | None = None
    """The upstream that answered."""

    version: str | None = None
    """What the model is called there: it never names two sets of weights."""

    attempts: int = 0
    """Upstreams that were asked."""

    purpose: Purpose = "request"
    experiment: str | None = None


class Journal:
    """Writes while its `with` block lasts, and what is left when it ends."""

    def __init__(self, engine: Engine, folder: Path, *, rows_per_file: int) -> None:
        self.dropped = 0
        """Entries that could not be written."""
        self._engine, self.folder, self._rows_per_file = engine, folder, rows_per_file
        self._queue: deque[Entry] = deque()
        self._lock = threading.Lock()
        self._charges: dict[tuple[int, Subject], Use] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._is_writing = False
        self._complained_s = -_COMPLAINT_INTERVAL_S
        self._rows = 0
        self._archiver: subprocess.Popen[str] | None = None
        self._archive_from_s = 0.0

    def add(self, entry: Entry, charges: Mapping[Subject, int]) -> None:
        """Take one entry; `charges` names who pays for its tokens, with the day of each."""
        used = Use(entry.prompt_tokens + entry.output_tokens, entry.nano_usd or 0)
        with self._lock:
            for subject, day in charges.items():
                before = self._charges.get((day, subject), Use())
                self._charges[day, subject] = Use(
                    before.tokens + used.tokens, before.nano_usd + used.nano_usd
                )
        if len(self._queue) < _CAPACITY:
            self._queue.append(entry)
        else:
            self.dropped += 1

    @property
    def is_behind(self) -> bool:
        """Whether there are entries that are not written yet."""
        return bool(self._queue) or self._is_writing  # in this order: it says so, then takes them

    def __enter__(self) -> Journal:
        self._rows = count_lines(self._engine)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()
        if self._archiver:  # it loses nothing, and the next gateway goes on
            self._archiver.kill()
            self._archiver.communicate()

    def _run(self) -> None:
        while not self._stopping.wait(_FLUSH_INTERVAL_S):
            self._flush()
            self._archive()
        self._flush()

    def _flush(self) -> None:
        self._is_writing = True
        try:
            self._write()
        finally:
            self._is_writing = False

    def _write(self) -> None:
        entries = [self._queue.popleft() for _ in range(len(self._queue))]
        with self._lock:
            charges, self._charges = self._charges, {}
        if not entries and not charges:
            return
        try:
            with self._engine.begin() as db:
                _spend(db, charges)
                if entries:
                    db.exec_driver_sql(str(_INSERT), [_row_of(entry) for entry in entries])
        except DBAPIError as error:
            self.dropped += len(entries)
            self._keep(charges)
            self._complain(f"{len(entries)} lines of the request log are lost: {error.orig}")
            return
        self._rows += len(entries)

    def _archive(self) -> None:
        """Have old lines moved to files, by a process of its own, one at a time."""
        if self._archiver:
            if self._archiver.poll() is None:
                return
            _, said = self._archiver.communicate()
            if self._archiver.returncode:
                self._archive_from_s = time.monotonic() + _ARCHIVE_RETRY_S
                self._complain(f"the request log stays in its database: {said.strip()[-200:]}")
            self._archiver = None
            with contextlib.suppress(DBAPIError):  # then what there was is tried again
                self._rows = count_lines(self._engine)
        if self._rows >= self._rows_per_file and time.monotonic() >= self._archive_from_s:
            command = [sys.executable, "-m", "tunesmith.serve.govern.archive"]
            self._archiver = subprocess.Popen(
                [*command, str(self.folder.parent), str(self._rows_per_file)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip

    def _keep(self, charges: Mapping[tuple[int, Subject], Use]) -> None:
        with self._lock:
            for key, used in charges.items():
                later = self._charges.get(key, Use())
                self._charges[key] = Use(later.tokens + used.tokens, later.nano_usd + used.nano_usd)

    def _complain(self, message: str) -> None:
        if time.monotonic() - self._complained_s >= _COMPLAINT_INTERVAL_S:
            self._complained_s = time.monotonic()
            log(f"serve: {message}")


def read_spending(engine: Engine, day: int) -> dict[Subject, Use]:
    """What each key and group has spent on a day, for a gateway that starts."""
    query = sa.select(spending).where(spending.c.day == day)
    with engine.connect() as db:
        return {(row.kind, row.subject): Use(row.tokens, row.nano_usd) for row in db.execute(query)}


def _upsert() -> Insert:
    row = insert(spending)
    return row.on_conflict_do_update(
        index_elements=["day", "kind", "subject"],
        set_={
            "tokens": spending.c.tokens + row.excluded.tokens,
            "nano_usd": spending.c.nano_usd + row.excluded.nano_usd,
        },
    )


_UPSERT = _upsert()
_INSERT = requests.insert().compile(
    dialect=sqlite.dialect(), column_keys=[item.name for item in fields(Entry)]
)
_row_of = attrgetter(*_INSERT.positiontup or ())


def _spend(db: Connection, charges: Mapping[tuple[int, Subject], Use]) -> None:
    rows = [
        {"day": day, "kind": kind, "subject": subject, **vars(used)}
        for (day, (kind, subject)), used in charges.items()
    ]
    if rows:
        db.execute(_UPSERT, rows)
