"""The engine in a process of its own: requests come in and answers go out over a socket.

    python -m tunesmith.engine.worker SOCKET

First comes a `Setup`, then lists of requests. It says `Ready` once, or what hinders it from
starting, and then sends lists of `(key, answer)`. It ends when the other side closes the socket.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from tunesmith.config.errors import TunesmithError
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.engine.offline import open_llm
from tunesmith.engine.primitives import keep_few_primitives
from tunesmith.engine.protocol import Ready, Refused, Setup
from tunesmith.engine.requests import Answer, Request
from tunesmith.engine.stream import stream

# A message for each answer would cost both sides more than the answers.
_MESSAGE_ANSWERS = 32
_MESSAGE_INTERVAL_S = 0.05

Answers = Iterator[tuple[int, Answer | Exception]]


def main(handle: int) -> None:
    """Load what the setup asks for and answer until the socket closes."""
    connection: Connection[Any, Any] = Connection(handle)
    setup: Setup = connection.recv()
    if setup.cores:
        os.sched_setaffinity(0, setup.cores)
    started_s = time.monotonic()
    try:
        if not has_gpu_engine():
            keep_few_primitives()
        llm = open_llm(setup.spec)
    except TunesmithError as error:
        connection.send(error)
        return
    connection.send(Ready(llm.model_config.max_model_len, time.monotonic() - started_s))
    answer_all(
        connection,
        lambda requests: stream(llm, requests, window=sys.maxsize, spec=setup.spec),
    )


def answer_all(
    connection: Connection[Any, Any], answering: Callable[[Iterable[Request | None]], Answers]
) -> None:
    """Pass requests on to `answering` as they come, None where there are none at the moment, and
    send what it answers, until the other side is gone."""
    line = _Line(connection)
    try:
        for key, answer in answering(line.requests()):
            line.add(key, answer)
    except (BrokenPipeError, ConnectionResetError):
        return


class _Line:
    """Both directions of the socket, seen from the engine's loop."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        # Asked before each step: `Connection.poll` makes a selector each time.
        self._incoming = select.poll()
        self._incoming.register(connection, select.POLLIN)
        self._open = 0
        self._answers: list[tuple[int, Answer | Exception]] = []
        self._sent_s = time.monotonic()

    def requests(self) -> Iterator[Request | None]:
        """Waits for more only while nothing is open."""
        while True:
            self._send_some()
            if self._open and not self._incoming.poll(0):
                yield None
                continue
            try:
                requests = self._connection.recv()
            except EOFError:
                return
            self._open += len(requests)
            yield from requests

    def add(self, key: int, answer: Answer | Exception) -> None:
        self._open -= 1
        self._answers.append(
            (key, Refused(str(answer)) if isinstance(answer, Exception) else answer)
        )

    def _send_some(self) -> None:
        if not self._answers:
            return
        now_s = time.monotonic()
        is_due = len(self._answers) >= _MESSAGE_ANSWERS or not self._open
        if is_due or now_s - self._sent_s >= _MESSAGE_INTERVAL_S:
            self._connection.send(self._answers)
            self._answers, self._sent_s = [], now_s


if __name__ == "__main__":
    main(int(sys.argv[1]))
