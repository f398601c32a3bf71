"""`POST /v1/feedback`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from sqlalchemy.exc import DBAPIError

from tunesmith.serve.errors import ApiError
from tunesmith.serve.feedback.record import Word, read_word, record
from tunesmith.serve.front.intake import check_body, read_body
from tunesmith.serve.govern.governance import Governance
from tunesmith.serve.govern.keys import Key
from tunesmith.serve.govern.usage import read_ask

_LOOKS, _PAUSE_S = 6, 0.2

Caller = Callable[[web.Request], Key | None]
"""The key that a request shows; None where it needs none. Raises ApiError on others."""


def add_feedback(app: web.Application, governance: Governance, caller: Caller) -> None:
    """Take what people say of answers."""

    async def hear(request: web.Request) -> web.Response:
        key = caller(request)
        ask = read_ask("feedback", await read_body(request, governance.section.read_timeout_s))
        check_body("feedback", ask)
        answer_id, word = read_word(ask.fields)
        giver = key.id if key else None
        try:
            said = await keep(answer_id, word, giver)
        except DBAPIError as error:
            message = "the feedback could not be kept; send it again later"
            raise ApiError(503, message, "unavailable", {"Retry-After": "5"}) from error
        if said is None:
            raise ApiError(404, "the log has no such answer of this key", "not_found")
        return web.json_response(said)

    async def keep(answer_id: str, word: Word, giver: str | None) -> dict[str, Any] | None:
        """The log is written behind the answers' back, so a line may take a moment to be there; and
        a client may have read an answer's last word before the answer has ended."""
        journal = governance.journal
        for look in range(_LOOKS):
            is_behind = look == 0 or journal.is_behind
            said = await asyncio.to_thread(
                record, governance.engine, journal.folder, answer_id, word, giver
            )
            if said or not is_behind:
                return said
            await asyncio.sleep(_PAUSE_S)
        return None

    app.router.add_post("/v1/feedback", hear)
