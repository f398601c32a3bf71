"""Errors as the OpenAI API spells them, so that its clients raise what their users know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from tunesmith.terminal import log

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    502: "server_error",
    503: "service_unavailable_error",
}


SERVER = "tunesmith"
"""The `Server` header: what the gateway is made of is nobody's business."""


class ApiError(Exception):
    """A request that the gateway itself refuses."""

    def __init__(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code or kind}}


def error_response(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """An error as a response."""
    return web.json_response(error_body(status, message, code), status=status, headers=headers)


def shape_errors(refused: Callable[[web.Request, int], None]) -> Any:
    """A middleware that gives all errors one shape, and tells of those that are the client's."""

    @web.middleware
    async def shape(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
            return response
        except (ApiError, web.HTTPException) as error:
            if error.status < 400:
                raise
            if error.status < 500:
                refused(request, error.status)
            return _shaped(request, error)
        except ConnectionError:
            raise  # the client has gone
        except Exception as error:
            log(f"serve: {request.method} {request.path!r}: {type(error).__name__}: {error}")
            return error_response(500, "a fault in the gateway; its log says more")

    return shape


def _shaped(request: web.Request, error: ApiError | web.HTTPException) -> web.Response:
    if isinstance(error, ApiError):
        return error_response(error.status, error.message, error.code, error.headers)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return error_response(413, f"the body is too large: {error.text}")
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    path = request.path.encode("ascii", "backslashreplace").decode()
    return error_response(error.status, f"{request.method} {path}: {error.reason}", headers=headers)
