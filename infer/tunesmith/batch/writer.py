"""Results on their way into shards, with the time and the devices that went into them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from tunesmith.batch.errors import RowError
from tunesmith.batch.prepare import Same
from tunesmith.batch.ray_pool import RayPool
from tunesmith.batch.results import result_of, share_seconds
from tunesmith.batch.shards import Shards
from tunesmith.engine import Answer, EnginePool

_COMMIT_INTERVAL_S = 1.0


class Writer:
    """Collects results and commits them in shards of `size` rows, or once a second."""

    def __init__(self, shards: Shards, size: int, pool: EnginePool | RayPool) -> None:
        self._shards, self._size, self._pool = shards, size, pool
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._committed_s = self._counted_s = time.monotonic()
        self._restarts = 0
        self._handed = 0
        self.errors = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, OSError):  # a disk that is full will not take this either
            self._commit()

    def start(self) -> None:
        """From now on time is spent on rows, no more on loading the model."""
        self._committed_s = self._counted_s = time.monotonic()

    def hand(self, count: int) -> None:
        """So many requests go to an engine next."""
        self._handed += count
        self._shards.note_handed(self._handed + self._pool.retried)

    def add(self, index: int, made: Answer | RowError | Same, digest: str | None = None) -> None:
        """`digest` is that of a request which an engine had."""
        self.errors += isinstance(made, RowError)
        result = {"same_as": made.first} if isinstance(made, Same) else result_of(made)
        self._pending.append((index, {"digest": digest[:32], **result} if digest else result))
        waited_s = time.monotonic() - self._committed_s
        if len(self._pending) >= self._size or waited_s >= _COMMIT_INTERVAL_S:
            self._commit()

    def _commit(self) -> None:
        if not self._pending:
            return
        now_s = time.monotonic()
        # Time in which no engine finished a row belongs to the rows that they finish next.
        is_computed = any("digest" in result for _, result in self._pending)
        seconds = now_s - self._counted_s if is_computed else 0.0
        self._counted_s += seconds
        shares = share_seconds([result for _, result in self._pending], seconds)
        for (_, result), share in zip(self._pending, shares, strict=True):
            result["device_s"] = round(share, 9)
        restarts = self._pool.restarts
        self._shards.commit(self._pending, seconds, restarts - self._restarts)
        self._pending, self._committed_s, self._restarts = [], now_s, restarts
