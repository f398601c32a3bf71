"""One request to the upstreams that may answer it, one after another until one begins to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlencode

from aiohttp import web

from tunesmith.serve.client import Answer, Client, LostError
from tunesmith.serve.errors import ApiError, error_response
from tunesmith.serve.govern.governance import Visit
from tunesmith.serve.relay import RETRY_AFTER_S, lost, relay
from tunesmith.serve.upstream import Attached, Upstream

_TO_ENGINE = ("Content-Type", "Accept")
_FAILED = (408, 429)


class _FailedError(Exception):
    """An upstream did not begin to answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


async def forward(
    client: Client,
    request: web.Request,
    visit: Visit,
    upstreams: Sequence[Upstream],
    *,
    timeout_s: float | None = None,
    keep: bool = False,
) -> web.StreamResponse:
    """The answer of the first upstream that gives one, passed on as it comes.

    Before the first byte has gone to the client, one that fails is followed by the next; what
    the last one says, or that it is lost, is what the client gets.
    """
    visit.sent_s = time.perf_counter()
    for last in upstreams:
        visit.arm, visit.tried = last, visit.tried + 1
        is_final = last is upstreams[-1]
        try:
            return await _try(client, request, visit, last, timeout_s, keep, is_final)
        except _FailedError as error:
            visit.failures.append(error.reason)
    if visit.failures[-1] == "timeout":
        visit.status, visit.ending = 504, "lost"
        message = f"no answer within {timeout_s:g} s; try again later"
        return error_response(504, message, "timeout", {"Retry-After": RETRY_AFTER_S})
    return lost(visit)


async def _try(
    client: Client,
    request: web.Request,
    visit: Visit,
    upstream: Upstream,
    timeout_s: float | None,
    keep: bool,
    is_final: bool,
) -> web.StreamResponse:
    if not upstream.can_take:
        reason = "full" if upstream.place.is_ready else "not ready"
        if not is_final:
            raise _FailedError(reason)
        visit.failures.append(reason)
        _check_room(upstream)
    with upstream.taken():
        visit.is_sent = True
        with await _begin(client, request, visit, upstream, timeout_s) as answer:
            if not is_final and (answer.status >= 500 or answer.status in _FAILED):
                raise _FailedError(str(answer.status))
            return await relay(request, answer, visit, keep=keep)


def _check_room(upstream: Upstream) -> None:
    """Raises ApiError where an upstream is not to be asked now."""
    if not upstream.place.is_ready:
        message = f"{upstream.name} is being loaded; try again soon"
        raise ApiError(503, message, "loading", {"Retry-After": RETRY_AFTER_S})
    if upstream.load.is_full:
        message = f"as many requests are open at {upstream.name} as may be; try again soon"
        raise ApiError(429, message, "overloaded", {"Retry-After": "1"})


async def _begin(
    client: Client,
    request: web.Request,
    visit: Visit,
    upstream: Upstream,
    timeout_s: float | None,
) -> Answer:
    headers = {name: request.headers[name] for name in _TO_ENGINE if name in request.headers}
    url = f"{upstream.place.url}/{visit.path}"
    if request.query_string:
        url += f"?{urlencode(list(request.query.items()), errors='surrogateescape')}"
    try:
        async with asyncio.timeout(timeout_s):
            return await client.ask(
                request.method,
                url,
                headers={**headers, **upstream.headers, "X-Request-Id": visit.request_id},
                body=visit.ask.sent(upstream.model, to_vllm=upstream.is_vllm),
            )
    except TimeoutError as error:
        raise _FailedError("timeout") from error
    except LostError as error:
        if isinstance(upstream.place, Attached):
            upstream.place.doubt()
        raise _FailedError("lost") from error
