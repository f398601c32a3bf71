"""Keeps one engine running: starts it, watches it, starts it again when it has died."""

from __future__ import annotations

import asyncio
import contextlib
import time

from tunesmith.config import TunesmithError
from tunesmith.engine import EngineServer
from tunesmith.engine.failures import root_cause
from tunesmith.terminal import log

_WATCH_INTERVAL_S = 0.1
_LONGEST_PAUSE_S = 60.0
_GOOD_UPTIME_S = 300.0
"""An engine that lived this long may be started again at once."""


class Supervisor:
    """The engine's states: starting, ready, and dead until the next start."""

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self.is_ready = False
        self.became_ready = asyncio.Event()
        """Set from the first time on that it is ready."""
        self.restarts = 0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the engine answers while it is ready."""
        return self.server.url

    def start(self) -> asyncio.Task[None]:
        """Begin. The task ends by `stop`, or with the error of a first start that failed."""
        self._task = asyncio.create_task(self._run())
        return self._task

    async def stop(self) -> None:
        """End the engine in whatever state it is; no process is left afterwards."""
        self._stopping.set()
        self.is_ready = False
        while self._task and not self._task.done():
            await asyncio.to_thread(self.server.stop)
            await asyncio.wait({self._task}, timeout=_WATCH_INTERVAL_S)
        await asyncio.to_thread(self.server.stop)

    async def _run(self) -> None:
        failures = 0
        while True:
            started_s = time.monotonic()
            try:
                await asyncio.to_thread(self.server.start)
            except TunesmithError as error:
                if self._stopping.is_set():
                    return
                if not self.became_ready.is_set():
                    raise
                log(f"the engine did not start again: {error}")
            else:
                await self._watch()
            if self._stopping.is_set():
                return
            if time.monotonic() - started_s > _GOOD_UPTIME_S:
                failures = 0
            pause_s = min(2.0**failures, _LONGEST_PAUSE_S) if failures else 0.0
            failures += 1
            self.restarts += 1
            log(f"starting the engine again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            if self._stopping.is_set():
                return

    async def _watch(self) -> None:
        """Return when the engine has died or is to stop."""
        self.is_ready = True
        self.became_ready.set()
        while self.server.is_alive and not self._stopping.is_set():
            await asyncio.sleep(_WATCH_INTERVAL_S)
        self.is_ready = False
        if self._stopping.is_set():
            return
        self.server.kill()
        path = self.server.log_path
        _, cause = root_cause(path.read_text(encoding="utf-8", errors="replace")) or ("", "")
        kept = path.replace(path.with_suffix(".died.log"))
        log(f"the engine died{f': {cause}' if cause else ''}; its log is {kept}")
