"""Connections that nobody holds open by sending or reading slowly; errors of HTTP itself in the one
shape."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tunesmith.serve.errors import SERVER, error_body, error_response

Refused = Callable[[str, str, int], None]
"""Called with the method, the path and the status of a request that no handler has seen."""

_LINGER_S = 1.0
"""How long the rest of a refused body is read, so that its sender comes to see the refusal."""

_SLOW = "the request did not come in time"


class Site(web.SockSite):
    """Listens on a socket; a client has `head_timeout_s` for the head of each request, and
    `write_timeout_s` to take what has piled up for it."""

    def __init__(
        self,
        runner: web.AppRunner,
        listener: socket.socket,
        *,
        head_timeout_s: float,
        write_timeout_s: float,
        refused: Refused,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner, listener, ssl_context=ssl_context)
        self._listener, self._refused = listener, refused
        self._timeouts_s = head_timeout_s, write_timeout_s

    async def start(self) -> None:
        """Begin to accept."""
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server

        def connection() -> _Connection:
            return _Connection(server, loop, *self._timeouts_s, self._refused)

        self._server = await loop.create_server(
            connection, sock=self._listener, ssl=self._ssl_context, backlog=self._backlog
        )


class _Connection(web.RequestHandler):
    """Times each request's head from its first byte, the first one from the connection on; and
    each time that more waits for the client than the transport's limit."""

    __slots__ = ("_head_timeout_s", "_head_timer", "_refused", "_write_timeout_s", "_write_timer")

    def __init__(
        self,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
        head_timeout_s: float,
        write_timeout_s: float,
        refused: Refused,
    ) -> None:
        options: dict[str, Any] = {
            "access_log": None,
            # Also ends what began behind a whole request, where no timer could tell it from idling.
            "keepalive_timeout": 2 * head_timeout_s,
            "lingering_time": _LINGER_S,
        }
        super().__init__(server, loop=loop, **options)
        self._head_timeout_s, self._write_timeout_s = head_timeout_s, write_timeout_s
        self._refused = refused
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._current_request:
            self._drop_timer()
        else:
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport:
            self._write_timer = self._loop.call_later(self._write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drop_write_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._drop_timer()
        self._drop_write_timer()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP; what it was is not repeated."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        self._refused("", "", status)
        first_line = (message or "").strip().partition("\n")[0].rstrip(":")
        response = error_response(status, f"this is no valid request: {first_line or 'malformed'}")
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(self._head_timeout_s, self._too_slow)

    def _drop_timer(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _drop_write_timer(self) -> None:
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        transport: Any = self.transport
        if transport is None or self._current_request or self._messages:
            return
        body = json.dumps(error_body(408, _SLOW)).encode()
        head = (
            "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        transport.write(head.encode() + body)
        self._refused("", "", 408)
        self.force_close()
