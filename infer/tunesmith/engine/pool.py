"""Engines that may die: rows in flight are tried again, and one that kills them is set aside."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from tunesmith.config.errors import TunesmithError
from tunesmith.engine.failures import death, start_failure
from tunesmith.engine.group import end_group, start_group
from tunesmith.engine.places import Place
from tunesmith.engine.protocol import Ready, Setup
from tunesmith.engine.requests import Answer, Request
from tunesmith.engine.spec import EngineSpec

# Deaths of one engine with no answer between them, after which another start is no use.
_MOST_DEATHS = 5
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_END_TIMEOUT_S = 10.0
Answered = Iterator[tuple[Request, Answer | Exception]]
_WORKER = (sys.executable, "-m", "tunesmith.engine.worker")


class Crashed(Exception):
    """A request that was in flight when its engine died, and alone when it died again."""


class EnginePool:
    """Copies of one engine, each in a process group of its own, that answer a stream together.

    Nothing of them outlives the `with` block, nor a SIGKILL of this process.
    """

    def __init__(
        self,
        spec: EngineSpec,
        places: Sequence[Place] = (Place(),),
        *,
        window: int,
        log_folder: Path,
    ) -> None:
        self._spec, self._window = spec, window
        self._inbox: SimpleQueue[tuple[_Engine | None, int, Any]] = SimpleQueue()
        self._engines = [
            _Engine(spec, place, self._inbox, log_folder / f"engine-{number}.log")
            for number, place in enumerate(places)
        ]
        self._deaths: Counter[int] = Counter()
        self.is_stopping = False
        """Whether `stop` was called."""
        self._has_length = threading.Event()
        self._max_model_len = spec.settings.max_model_len or 0
        self.load_s = 0.0
        """Seconds that the first engine took to load."""
        self.restarts = 0
        self.retried = 0
        """Requests that were given to an engine again, each time that they were."""
        self.before_sending: Callable[[int], None] = lambda _: None
        """Told how many requests go to an engine next, for the first time."""

    def __enter__(self) -> EnginePool:
        for engine in self._engines:
            engine.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._has_length.set()  # nobody waits for it any more
        for engine in self._engines:
            engine.end()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer; waits for the first engine where the recipe names none."""
        if not self._max_model_len:
            self._has_length.wait()
        return self._max_model_len

    @property
    def open(self) -> int:
        """Requests that engines are at."""
        return sum(len(engine.flying) for engine in self._engines)

    @property
    def is_ready(self) -> bool:
        """Whether any engine is up, and so may be at requests."""
        return any(engine.is_ready for engine in self._engines)

    @property
    def pids(self) -> list[int]:
        """The process group of every engine that is up."""
        return [engine.process.pid for engine in self._engines if engine.process]

    def stop(self) -> None:
        """Hand out nothing more: `stream` ends with the answers to what is in flight.

        May be called from a signal handler.
        """
        self.is_stopping = True
        self.wake()

    def wake(self) -> None:
        """Look at `requests` again, from any thread, after they had a None."""
        self._inbox.put((None, 0, None))

    def stream(self, requests: Iterable[Request | None]) -> Answered:
        """Answers as they are done, each with its request; `Refused` or `Crashed` where there is
        none.

        At most `window` requests are in flight in each engine, and `requests` is read no further.
        A None among them says that there is no other before the next `wake`. Raises ModelError
        when vLLM refuses the model, TunesmithError when engines keep dying.
        """
        waiting, is_exhausted = iter(requests), False
        while True:
            for engine in self._engines:
                is_exhausted |= self.is_stopping or self._feed(engine, waiting, is_exhausted)
            is_busy = any(engine.flying for engine in self._engines)
            is_left = any(engine.suspects for engine in self._engines)
            if is_exhausted and not is_busy and (self.is_stopping or not is_left):
                return
            yield from self._next_event()

    def _feed(self, engine: _Engine, waiting: Iterator[Request | None], is_exhausted: bool) -> bool:
        """Fill an engine's window; returns whether there are no further requests."""
        if not engine.is_ready:
            return is_exhausted
        if engine.suspects or engine.is_isolating:
            if not engine.flying:
                engine.is_isolating = bool(engine.suspects)
                if engine.is_isolating:
                    group = engine.suspects.pop(0)
                    self.retried += len(group)
                    engine.send(group)
            if engine.is_isolating:
                return is_exhausted
        room = self._window - len(engine.flying)
        if is_exhausted or room < max(1, self._window // 8):  # few messages, each of several rows
            return is_exhausted
        requests, is_exhausted = [], True
        for request in islice(waiting, room):
            if request is None:
                is_exhausted = False
                break
            requests.append(request)
        if requests:
            self.before_sending(len(requests))
            engine.send(requests)
        return is_exhausted and len(requests) < room

    def _next_event(self) -> Answered:
        """Wait for one message, or until an engine is to be started or given up."""
        due_s = min(engine.due_s for engine in self._engines)
        wait_s = None if due_s == math.inf else max(0.0, due_s - time.monotonic())
        try:
            engine, life, message = self._inbox.get(timeout=wait_s)
        except Empty:
            for engine in self._engines:
                yield from self._when_due(engine)
            return
        if engine is None or life != engine.life:
            return
        match message:
            case Ready():
                engine.now_ready()
                self.load_s = self.load_s or message.load_s
                self._max_model_len = message.max_model_len
                self._has_length.set()
            case list():
                engine.deaths = 0
                for key, answer in message:
                    if request := engine.flying.pop(key, None):
                        yield request, answer
            case _:
                yield from self._died(engine, message)

    def _when_due(self, engine: _Engine) -> Answered:
        if engine.due_s > time.monotonic():
            return
        if engine.process is None:
            self.restarts += 1
            engine.start()
        else:
            seconds = self._spec.settings.start_timeout_s
            cause = TunesmithError(
                f"vLLM was not ready with {self._spec.model} after {seconds} s; raise "
                f"engine.start_timeout_s, or see its log: {engine.log_path}"
            )
            yield from self._died(engine, cause)

    def _died(self, engine: _Engine, cause: TunesmithError | None) -> Answered:
        """Take its requests back, and set one aside when it alone can be the reason."""
        explain = death if engine.was_ready else start_failure
        cause = cause or explain(engine.last_words(), self._spec, engine.log_path)
        flying = list(engine.flying.values())
        engine.end()
        engine.deaths += 1
        if not engine.was_ready or engine.deaths > _MOST_DEATHS:
            raise cause
        engine.due_s = time.monotonic() + _wait_s(engine.deaths)
        self._deaths.update(request.key for request in flying)
        if len(flying) == 1 and self._deaths[flying[0].key] > 1:
            times = self._deaths[flying[0].key]
            yield flying[0], Crashed(f"the engine died {times} times over this row: {cause}")
        else:
            again = any(self._deaths[request.key] > 1 for request in flying)
            engine.suspects[:0] = _groups(flying, 1 if again else math.isqrt(len(flying)))


class _Engine:
    """One engine's process, what it is at, and what it is to try again."""

    def __init__(
        self,
        spec: EngineSpec,
        place: Place,
        inbox: SimpleQueue[Any],
        log_path: Path,
    ) -> None:
        self._spec, self._place, self._inbox = spec, place, inbox
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._log_start = 0
        self.life = 0
        """Counts its starts, so that a message of a former process is not taken for its own."""
        self.is_ready = self.was_ready = False
        self.deaths = 0
        """Since the last answer."""
        self.due_s = math.inf
        """When it is to be started, or to be given up while it loads."""
        self.flying: dict[int, Request] = {}
        self.suspects: list[list[Request]] = []
        """Requests that were in flight when it died, in groups that are tried one by one."""
        self.is_isolating = False

    def start(self) -> None:
        ours, theirs = Pipe()
        self.life += 1
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = start_group(
                [*_WORKER, str(theirs.fileno())],
                log=log,
                environment={"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
                | dict(self._place.environment),
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        self.due_s = time.monotonic() + self._spec.settings.start_timeout_s
        self._connection = ours
        self._thread = threading.Thread(
            target=_receive, args=(ours, self._inbox, self, self.life), daemon=True
        )
        self._thread.start()
        self._post(Setup(self._spec, self._place.cores))

    def now_ready(self) -> None:
        self.is_ready = self.was_ready = True
        self.due_s = math.inf

    def send(self, requests: list[Request]) -> None:
        self.flying |= {request.key: request for request in requests}
        self._post(requests)

    def _post(self, message: Any) -> None:
        assert self._connection
        with contextlib.suppress(OSError):  # of its death the receiving thread tells
            self._connection.send(message)

    def last_words(self) -> str:
        """What this process wrote to the log."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def end(self) -> None:
        """End the process group and forget what it was at."""
        if self.process is not None:
            end_group(self.process)
        if self._connection is not None:
            # With its last process the other end of the socket is closed.
            self._thread.join(_END_TIMEOUT_S)
            self._connection.close()
        self.process = self._connection = None
        self.life += 1
        self.is_ready = self.is_isolating = False
        self.flying = {}


def _receive(
    connection: Connection[Any, Any], inbox: SimpleQueue[Any], engine: _Engine, life: int
) -> None:
    """Whatever comes from an engine, until it is gone, which is None."""
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put((engine, life, connection.recv()))
    finally:  # a message that cannot be read is as good as a death, and its stack is on stderr
        inbox.put((engine, life, None))


def _groups(requests: list[Request], count: int) -> list[list[Request]]:
    """Divide in about `count` groups: one of them dies again, and then one row of it."""
    size = 1 if count == 1 else math.ceil(len(requests) / count)
    return [requests[at : at + size] for at in range(0, len(requests), size)]


def _wait_s(deaths: int) -> float:
    """At once after the first death, then twice as long each time."""
    return 0.0 if deaths == 1 else min(_FIRST_WAIT_S * 2 ** (deaths - 2), _LONGEST_WAIT_S)
