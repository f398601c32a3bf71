"""The engine's answer to the client, each piece as soon as it is there."""

from __future__ import annotations

import json
import time

from aiohttp import web

from tunesmith.serve.client import Answer, LostError
from tunesmith.serve.errors import error_body, error_response
from tunesmith.serve.govern.governance import Visit
from tunesmith.serve.govern.usage import EventReader, read_answer
from tunesmith.serve.guard.rails import CUT, Screen

RETRY_AFTER_S = "5"
_TO_CLIENT = {name.lower(): name for name in ("Content-Type", "Retry-After", "Cache-Control")}
_EVENTS = "text/event-stream"
_LOST = "the engine stopped before the answer was complete; send the request again"
_LARGEST_READ_BYTES = 16 * 2**20


async def relay(
    request: web.Request, answer: Answer, visit: Visit, *, keep: bool
) -> web.StreamResponse:
    """Pass an answer, of which the first piece is here, on and note in `visit` what it says; `keep`
    its bytes there too."""
    found = answer.headers
    headers = {name: found[key] for key, name in _TO_CLIENT.items() if key in found}
    headers["X-Request-Id"] = visit.request_id
    is_stream = answer.content_type == _EVENTS
    screen = visit.screen if visit.screen and visit.screen.checks_answers else None
    if screen and not is_stream:
        return await _checked(request, answer, headers, visit, screen, keep=keep)
    if not is_stream and answer.is_whole:
        return await _whole(request, answer, headers, visit, keep=keep)
    reader = EventReader(visit.ask, visit.usage) if is_stream else None
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = None if is_stream else answer.content_length
    whole = bytearray()
    await response.prepare(request)
    try:
        while chunk := await answer.read():
            if visit.first_piece_s is None and is_stream:
                visit.first_piece_s = time.perf_counter() - visit.started_s
            passed = reader.feed(chunk) if reader else chunk
            if screen and passed:
                passed = await screen.feed(passed)
            if keep or (reader is None and len(whole) < _LARGEST_READ_BYTES):
                whole += passed
            if passed:
                await response.write(passed)
    except LostError:
        return await _cut(request, response, visit, is_stream=is_stream)
    if reader:
        rest = reader.close()
        if screen:
            rest = await screen.feed(rest, is_last=True)
            visit.usage.finish_reason = CUT if screen.cuts else visit.usage.finish_reason
        if rest:
            await response.write(rest)
            whole += rest if keep else b""
        visit.answer = bytes(whole) if keep else b""
    else:
        _read(answer, bytes(whole), visit, keep=keep)
    _end(answer, visit)
    await response.write_eof()
    return response


async def _whole(
    request: web.Request,
    answer: Answer,
    headers: dict[str, str],
    visit: Visit,
    *,
    keep: bool,
) -> web.StreamResponse:
    """Pass an answer that is all here on in one write, and look into it afterwards."""
    body = await answer.read()
    response = web.Response(status=answer.status, headers=headers, body=body)
    await response.prepare(request)
    await response.write_eof()
    _read(answer, body, visit, keep=keep)
    _end(answer, visit)
    return response


def _read(answer: Answer, body: bytes, visit: Visit, *, keep: bool) -> None:
    if answer.content_type == "application/json":
        read_answer(body, visit.usage)
    visit.answer = body if keep else b""


def _end(answer: Answer, visit: Visit) -> None:
    visit.status = answer.status
    visit.ending = "error" if answer.status >= 400 or visit.usage.error else "complete"


async def _checked(
    request: web.Request,
    answer: Answer,
    headers: dict[str, str],
    visit: Visit,
    screen: Screen,
    *,
    keep: bool,
) -> web.StreamResponse:
    """Pass a whole answer on after the guardrails have seen all of it."""
    whole = bytearray()
    try:
        while chunk := await answer.read():
            whole += chunk
    except LostError:
        return lost(visit)
    read_answer(bytes(whole), visit.usage)
    passed = await screen.whole(bytes(whole))
    visit.usage.finish_reason = CUT if screen.cuts else visit.usage.finish_reason
    visit.answer = passed if keep else b""
    _end(answer, visit)
    response = web.Response(status=answer.status, headers=headers, body=passed)
    await response.prepare(request)
    await response.write_eof()
    return response


def lost(visit: Visit) -> web.Response:
    """The answer when the engine has gone before it said anything."""
    visit.status, visit.ending = 502, "lost"
    return error_response(502, _LOST, "engine_unavailable", {"Retry-After": RETRY_AFTER_S})


async def _cut(
    request: web.Request, response: web.StreamResponse, visit: Visit, *, is_stream: bool
) -> web.StreamResponse:
    """The engine has gone in the middle: the client must not take this for a whole answer."""
    visit.status, visit.ending = 502, "lost"
    if not is_stream:
        # The client knows the length, so a closed connection tells it.
        if request.transport:
            request.transport.abort()
        return response
    event = json.dumps(error_body(502, _LOST, "engine_unavailable"))
    await response.write(f"data: {event}\n\n".encode())
    await response.write_eof()
    return response
