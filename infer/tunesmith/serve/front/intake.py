"""Paths and bodies: what may go on to the engine at all."""

from __future__ import annotations

import asyncio
import json
import re

from aiohttp import web

from tunesmith.serve.errors import ApiError
from tunesmith.serve.govern.usage import Ask

_JSON_PATHS = ("chat/completions", "completions", "embeddings", "responses", "feedback")
_OWN = {"models": "GET", "feedback": "POST"}
"""What the gateway answers itself, by these methods."""

_SEGMENT = r"(?!\.+(?:/|$))[A-Za-z0-9_.:@~-]{1,128}"
_PATH = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_ADMIN_PATHS = re.compile(r"(?:un)?load_lora_adapter(?:/|$)")
"""What vLLM keeps under `/v1/` that only the gateway itself may ask of it."""


def check_path(path: str) -> None:
    """Raises ApiError for a path that would leave `/v1/`, or is not for clients to write to."""
    if allowed := _OWN.get(path.partition("/")[0]):
        message = f"here is only {allowed}"
        raise ApiError(405, message, "invalid_request_error", {"Allow": allowed})
    if not _PATH.fullmatch(path) or _ADMIN_PATHS.match(path):
        raise ApiError(404, "there is no such path here", "not_found")


async def read_body(request: web.Request, timeout_s: float) -> bytes:
    """The body. Raises ApiError when it does not come in time or breaks off."""
    try:
        async with asyncio.timeout(None if request.content.is_eof() else timeout_s):
            return await request.read()
    except TimeoutError as error:
        request.protocol.keep_alive(False)
        message = f"the body did not come within {timeout_s:g} s"
        raise ApiError(408, message, "timeout", {"Connection": "close"}) from error
    except (ValueError, web.RequestPayloadError) as error:
        message = "the body is not what the headers say: its length, chunks or compression"
        raise ApiError(400, message, "invalid_body", {"Connection": "close"}) from error


def check_body(path: str, ask: Ask) -> None:
    """Raises ApiError where a JSON object is due and the body is none, or has broken text."""
    if not ask.fields:
        if path in _JSON_PATHS and (fault := _fault(ask.body)):
            raise ApiError(400, f"the body has to be a JSON object: {fault}", "invalid_json")
    elif b"\\ud" in ask.body.lower():
        try:
            json.dumps(ask.fields, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            message = "a text in the body has half of a surrogate pair, which is no character"
            raise ApiError(400, message, "invalid_json") from error


def _fault(body: bytes) -> str | None:
    try:
        found = json.loads(body.decode())
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError:
        return "a number in it is too long"
    except RecursionError:
        return "it is nested too deep"
    return None if isinstance(found, dict) else f"it is a {type(found).__name__}"
