"""From rows without a result to results in shards, through the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from tunesmith.batch.errors import RowError, refusal
from tunesmith.batch.requests import RequestMaker
from tunesmith.batch.results import result_of, share_seconds
from tunesmith.batch.rows import read_rows
from tunesmith.batch.shards import Shards
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import (
    Answer,
    EngineSpec,
    Request,
    close_llm,
    open_llm,
    prepare_process,
    stream,
)
from tunesmith.terminal import log, progress_bar

_COMMIT_INTERVAL_S = 1.0


def generate(
    section: Batch, spec: EngineSpec, shards: Shards, total: int, usd_per_s: float | None
) -> float:
    """Give every valid row that has no result one; `total` counts the valid rows.

    Whatever ends it, results that were finished are in the shards. A kill loses at most three
    times `engine.max_num_seqs` rows: those in the engine and the next shard. Returns the seconds
    that the engine took to load.
    """
    prepare_process()
    log(f"batch: starting the engine for {total - shards.count} rows")
    started_s = time.monotonic()
    llm = open_llm(spec)
    load_s = time.monotonic() - started_s
    maker = RequestMaker.open(spec, llm.model_config.max_model_len)
    size = spec.settings.max_num_seqs
    with (
        progress_bar("batch", total) as bar,
        _Writer(shards, size) as writer,
    ):
        bar.advance(shards.count)
        rate = _Rate(usd_per_s)
        opened: dict[int, Request] = {}
        requests = _requests(section, shards, maker, writer, opened)
        for index, made in stream(llm, requests, window=2 * size, spec=spec):
            request = opened.pop(index)
            writer.add(index, refusal(request, made) if isinstance(made, Exception) else made)
            bar.advance(1, rate.note(made, writer.errors))
    close_llm(llm)
    return load_s


def _requests(
    section: Batch,
    shards: Shards,
    maker: RequestMaker,
    writer: _Writer,
    opened: dict[int, Request],
) -> Iterator[Request]:
    """What the engine can take of the rows that are left; the writer gets the others."""
    for row in read_rows(section):
        if row.error or row.index in shards:
            continue
        made = maker.request(row.index, row.ask)
        if isinstance(made, RowError):
            writer.add(row.index, made)
        else:
            opened[row.index] = made
            yield made


class _Writer:
    """Collects results and commits them in shards of `size` rows, or once a second."""

    def __init__(self, shards: Shards, size: int) -> None:
        self._shards, self._size = shards, size
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._committed_s = time.monotonic()
        self.errors = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, OSError):  # a disk that is full will not take this either
            self._commit()

    def add(self, index: int, made: Answer | RowError) -> None:
        self.errors += isinstance(made, RowError)
        self._pending.append((index, result_of(made)))
        waited_s = time.monotonic() - self._committed_s
        if len(self._pending) >= self._size or waited_s >= _COMMIT_INTERVAL_S:
            self._commit()

    def _commit(self) -> None:
        if not self._pending:
            return
        now_s = time.monotonic()
        seconds = now_s - self._committed_s
        shares = share_seconds([result for _, result in self._pending], seconds)
        for (_, result), share in zip(self._pending, shares, strict=True):
            result["device_s"] = round(share, 9)
        self._shards.commit(self._pending, seconds)
        self._pending, self._committed_s = [], now_s


class _Rate:
    """Speed and cost of this attempt, for the progress bar."""

    def __init__(self, usd_per_s: float | None) -> None:
        self._usd_per_s = usd_per_s
        self._started_s = time.monotonic()
        self._rows = self._tokens = 0

    def note(self, answer: Answer | Exception, errors: int) -> str:
        self._rows += 1
        self._tokens += answer.output_tokens if isinstance(answer, Answer) else 0
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        text = f"{self._rows / elapsed_s:.1f} rows/s, {self._tokens / elapsed_s:,.0f} tokens/s"
        if errors:
            text += f", {errors} errors"
        if self._usd_per_s is not None:
            text += f", {elapsed_s * self._usd_per_s:.4f} USD"
        return text
