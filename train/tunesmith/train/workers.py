"""The same work on many rows, in several processes where there are enough of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from tunesmith.config.errors import TunesmithError

T = TypeVar("T")
Work = Callable[[list[dict[str, Any]]], T]

_FEW_ROWS = 50_000
"""Fewer are done before other processes have started."""

_FEW_PROCESSES = 4
"""With fewer cores the tokenizer's own threads keep them busy."""

_ROWS_PER_GROUP = 256
_MOST_PROCESSES = 16


def in_groups(rows: Iterable[dict[str, Any]], work: Work[T], total: int | None) -> Iterator[T]:
    """What `work` makes of each group of rows, in their order. It must be picklable when there
    are many rows; its errors are raised here."""
    rows = iter(rows)
    groups = iter(lambda: list(islice(rows, _ROWS_PER_GROUP)), [])
    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    if processes < _FEW_PROCESSES or (total or 0) < _FEW_ROWS:
        yield from map(work, groups)
        return
    pool = ProcessPoolExecutor(
        processes,
        # Not forked: this process has threads, and may have a GPU.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(work,),
    )
    waiting: deque[Future[T]] = deque()
    try:
        for group in groups:
            waiting.append(pool.submit(_do, group))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TunesmithError(
            "a process that tokenises was killed, perhaps for want of memory; "
            "run the same command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_given: list[Work[Any]] = []
"""In a process of the pool: the work, which is sent once and not with every group."""


def _begin(work: Work[Any]) -> None:
    # Ctrl-C reaches every process; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _given.append(work)


def _do(group: list[dict[str, Any]]) -> Any:
    return _given[0](group)
