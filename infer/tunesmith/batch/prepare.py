"""Requests made ahead of the engine, in an order in which it reuses what it has read."""

from __future__ import annotations

import queue
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tunesmith.batch.errors import RowError
from tunesmith.batch.requests import RequestMaker
from tunesmith.batch.rows import Row
from tunesmith.engine import Request

# Rows that share a prefix meet when they are in one window; it is what memory is spent on.
_WINDOW_ROWS = 4096
_WINDOW_TOKENS = 400_000


@dataclass(frozen=True)
class Wrong:
    """A row that the model cannot take."""

    index: int
    error: RowError


@dataclass(frozen=True)
class Same:
    """A row that asks the same as an earlier one, and so has the same answer."""

    index: int
    first: int


Prepared = Request | Wrong | Same


def prepare(
    rows: Iterable[Row], maker: RequestMaker, digests: Digests, *, reuse: bool
) -> Iterator[list[Prepared]]:
    """Windows of what becomes of the rows; with `reuse` equal requests are there once and those
    of a window are sorted, so that equal beginnings come one after the other."""
    window: list[Prepared] = []
    requests: list[Request] = []
    tokens = 0
    for row in rows:
        made = maker.request(row.index, row.ask)
        if isinstance(made, RowError):
            window.append(Wrong(row.index, made))
        elif reuse and is_repeatable(made) and (
            first := digests.first(made.digest, row.index)
        ) != row.index:  # fmt: skip
            window.append(Same(row.index, first))
        else:
            requests.append(made)
            tokens += made.longest
        if len(window) + len(requests) >= _WINDOW_ROWS or tokens >= _WINDOW_TOKENS:
            yield [*window, *_in_order(requests, reuse)]
            window, requests, tokens = [], [], 0
    yield [*window, *_in_order(requests, reuse)]


def is_repeatable(request: Request) -> bool:
    """Whether the engine would say the same again."""
    sampling = request.sampling
    is_greedy = sampling.get("temperature", 1.0) == 0
    return request.kind != "generate" or is_greedy or sampling.get("seed") is not None


def _in_order(requests: list[Request], reuse: bool) -> list[Request]:
    if reuse:
        requests.sort(key=lambda request: (request.adapter or "", request.prompt_ids))
    return requests


class Digests:
    """The first row of each digest, in 24 bytes a row and 8 to 16 for the table."""

    def __init__(self) -> None:
        self._keys = array("Q")  # two for each entry
        self._rows = array("q")
        self._table = array("q", [-1]) * 1024

    def first(self, digest: str, row: int) -> int:
        """The first row that came with this digest: `row` itself, when none did before."""
        high, low = int(digest[:16], 16), int(digest[16:32], 16)
        slot = self._slot(high, low)
        entry = self._table[slot]
        if entry >= 0:
            return self._rows[entry]
        self._table[slot] = len(self._rows)
        self._rows.append(row)
        self._keys.extend((high, low))
        if 2 * len(self._rows) > len(self._table):
            self._grow()
        return row

    def _slot(self, high: int, low: int) -> int:
        """Where the digest is in the table, or would be."""
        size = len(self._table)
        slot = high % size
        while (entry := self._table[slot]) >= 0:
            if self._keys[2 * entry] == high and self._keys[2 * entry + 1] == low:
                break
            slot = (slot + 1) % size
        return slot

    def _grow(self) -> None:
        self._table = array("q", [-1]) * (2 * len(self._table))
        for entry in range(len(self._rows)):
            slot = self._slot(self._keys[2 * entry], self._keys[2 * entry + 1])
            self._table[slot] = entry


class Ahead:
    """The contents of windows that another thread makes, from now on, one window ahead."""

    def __init__(self, make: Callable[[], Iterator[list[Prepared]]]) -> None:
        self._make = make
        self._made: queue.SimpleQueue[list[Prepared] | BaseException | None] = queue.SimpleQueue()
        self._wanted = threading.Semaphore()
        self._is_closed = False
        threading.Thread(target=self._work, daemon=True).start()

    def __iter__(self) -> Iterator[Prepared]:
        while (window := self._made.get()) is not None:
            if isinstance(window, BaseException):
                raise window
            self._wanted.release()
            window.reverse()
            while window:
                yield window.pop()

    def close(self) -> None:
        """Nothing more is wanted."""
        self._is_closed = True
        self._wanted.release()

    def _work(self) -> None:
        try:
            windows = self._make()
            while self._wanted.acquire() and not self._is_closed:
                window = next(windows, None)
                self._made.put(window)
                if window is None:
                    return
        except BaseException as error:
            self._made.put(error)
