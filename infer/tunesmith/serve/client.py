"""HTTP/1.1 to upstreams over connections that are kept: what passing answers on needs, no more.

A general client spends on cookies, redirects and sessions what a gateway may add to a request in
all. The parsing is llhttp's, by httptools.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools

_CONNECT_TIMEOUT_S = 10.0
_MOST_IDLE_S = 3.0
"""Less than servers wait (uvicorn: 5 s), so that none closes a connection while it is asked."""

_MOST_HEAD_BYTES = 2**18
_MOST_UNREAD_BYTES = 2**18
_OWN_HEADERS = "User-Agent: tunesmith\r\nAccept-Encoding: identity\r\n"


class LostError(Exception):
    """No connection, one that broke before the answer was whole, or an answer that is not HTTP."""


class _Place(NamedTuple):
    """Where a URL leads."""

    host: str
    port: int
    is_secure: bool


class Client:
    """Asks upstreams. Use it as an async context manager; leaving it ends what is under way."""

    def __init__(self) -> None:
        # The last one given back is the first to be used again, so that the others can grow old.
        self._idle: dict[_Place, dict[_Connection, float]] = {}
        self._all: set[_Connection] = set()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in list(self._all):
            connection.abort()

    async def ask(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """The answer, once its head and the first piece of its body are here.

        Redirects are answers like any other: who is sent where is not for a server to change.
        Raises LostError. Cancelled, it closes the connection.
        """
        try:
            place, host, target = _split(url)
        except ValueError as error:
            raise LostError(f"{url}: {error}") from error
        head = _head(method, target, host, headers or {}, len(body))
        connection = self._kept(place) or await self._connect(place)
        answer = Answer(connection, has_body=method != "HEAD")
        connection.send(head, body, answer)
        try:
            await answer.begin()
        except BaseException:
            answer.close()
            raise
        return answer

    def _kept(self, place: _Place) -> _Connection | None:
        """The connection that was used last; those that have waited too long are closed."""
        kept = self._idle.get(place, {})
        oldest_s = time.monotonic() - _MOST_IDLE_S
        while kept and next(iter(kept.values())) < oldest_s:
            next(iter(kept)).abort()
        while kept:
            connection, _ = kept.popitem()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, place: _Place) -> _Connection:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    functools.partial(_Connection, self, place),
                    place.host,
                    place.port,
                    ssl=_trusted() if place.is_secure else None,
                    happy_eyeballs_delay=0.25,
                )
        except TimeoutError as error:
            raise LostError(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from error
        except (OSError, UnicodeError) as error:
            raise LostError(str(error) or type(error).__name__) from error
        return connection

    def opened(self, connection: _Connection) -> None:
        """A connection is there."""
        self._all.add(connection)

    def give_back(self, connection: _Connection) -> None:
        """Its answer is whole, and it can be asked again."""
        self._idle.setdefault(connection.place, {})[connection] = time.monotonic()

    def closed(self, connection: _Connection) -> None:
        """It cannot be asked again."""
        self._all.discard(connection)
        kept = self._idle.get(connection.place, {})
        kept.pop(connection, None)
        if not kept:
            self._idle.pop(connection.place, None)


class Answer:
    """An answer while it comes; leaving its block before its end closes the connection."""

    def __init__(self, connection: _Connection, *, has_body: bool) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """By names in lower case; of several of one name the last."""

        self.is_whole = False
        """Whether nothing more will come; pieces may still be unread."""

        self.has_body = has_body
        self._connection = connection
        self._pieces: list[bytes] = []
        self._unread_bytes = 0
        self._lost: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        """As the head says."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdecimal() else None

    async def read(self) -> bytes:
        """All that has come since the last piece, waiting for some; empty at the end. Raises
        LostError where the answer breaks off, after what came before."""
        await self.begin()
        piece = b"".join(self._pieces)
        self._pieces.clear()
        if self._unread_bytes > _MOST_UNREAD_BYTES and not self.is_whole:
            self._connection.go_on()
        self._unread_bytes = 0
        return piece

    async def json(self) -> Any:
        """The whole body. Raises ValueError where it is no JSON."""
        whole = bytearray()
        while piece := await self.read():
            whole += piece
        return json.loads(whole)

    def close(self) -> None:
        """Have nothing more of it."""
        if not self.is_whole:
            self._connection.abort()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def begin(self) -> None:
        """Wait for a piece, or for the end. Raises LostError where neither will come."""
        while not (self._pieces or self.is_whole):
            if self._lost is not None:
                raise LostError(self._lost)
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Tell who waits that there is news."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def start(self, status: int, headers: dict[str, str]) -> None:
        """The head is here."""
        self.status, self.headers = status, headers

    def add(self, piece: bytes) -> bool:
        """Keep a piece; whether no more should come until it is read."""
        self._pieces.append(piece)
        self._unread_bytes += len(piece)
        return self._unread_bytes > _MOST_UNREAD_BYTES

    def end(self) -> None:
        """Nothing more will come."""
        self.is_whole = True

    def lose(self, reason: str) -> None:
        """Nothing more will come, and that is not all."""
        self._lost = reason
        self.wake()

    @property
    def ends_with_connection(self) -> bool:
        """Whether the head is here, and tells no other end of the body."""
        is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        return bool(self.status) and not is_chunked and self.content_length is None


class _Connection(asyncio.Protocol):
    """One connection, and the answer that is under way on it."""

    def __init__(self, client: Client, place: _Place) -> None:
        self.place = place
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._answer: Answer | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0

    def send(self, head: bytes, body: bytes, answer: Answer) -> None:
        """Ask; `answer` is told what comes."""
        self._answer, self._head_bytes = answer, 0
        if not self.is_open:
            answer.lose("the connection was closed")
        elif len(body) < 2**16:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return not self._transport.is_closing()

    def go_on(self) -> None:
        """What had piled up is read."""
        if self.is_open:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close it, whatever is under way."""
        self._transport.abort()
        self._client.closed(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # An answer may take minutes; a machine that is gone says nothing either.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._client.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.closed(self)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if exc is None and answer.ends_with_connection:
            answer.end()
            answer.wake()
        else:
            answer.lose(str(exc or "") or "the connection was closed")

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody asked for this
            self.abort()
            return
        if not answer.status:
            self._head_bytes += len(data)
        try:
            if not answer.status and self._head_bytes > _MOST_HEAD_BYTES:
                raise httptools.HttpParserError("its head has no end")
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._answer = None
            self.abort()
            if not answer.is_whole:
                answer.lose(f"this is no answer: {error}")
        answer.wake()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._answer is None:
            raise ValueError("more came than was asked for")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._headers[name.decode("latin-1").lower()] = value.decode("utf-8", "surrogateescape")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if self._answer and status >= 200:  # below are news of an answer that is still to come
            self._answer.start(status, self._headers)
            self._headers = {}  # what comes behind the body is not the head's
            if not self._answer.has_body:
                # The parser does not know what was asked, so it waits for a body.
                self._finish(keep=False)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if self._answer and self._answer.add(body):
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._answer and self._answer.status:
            is_sent = self._transport.get_write_buffer_size() == 0
            self._finish(keep=self._parser.should_keep_alive() and is_sent)

    def _finish(self, *, keep: bool) -> None:
        answer, self._answer = self._answer, None
        assert answer
        answer.end()
        if keep and self.is_open:
            self.go_on()
            self._client.give_back(self)
        else:
            self.abort()


@functools.lru_cache(maxsize=1024)
def _split(url: str) -> tuple[_Place, str, str]:
    """Where a URL leads, what the `Host` header says, and what is asked for there."""
    parts = urlsplit(url)
    is_secure = parts.scheme == "https"
    place = _Place(parts.hostname or "", parts.port or (443 if is_secure else 80), is_secure)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return place, parts.netloc.rpartition("@")[2], target


def _head(method: str, target: str, host: str, headers: Mapping[str, str], length: int) -> bytes:
    """Raises ValueError where a line would end within it."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if length or method not in ("GET", "HEAD"):
        lines.append(f"Content-Length: {length}")
    head = "\r\n".join(lines)
    if head.count("\n") >= len(lines) or head.count("\r") >= len(lines):
        raise ValueError("a header has a line break in it")
    return f"{head}\r\n{_OWN_HEADERS}\r\n".encode("utf-8", "surrogateescape")


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()
