"""Why a row has no answer: a type that programs can count, and words for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.engine import Request

ErrorType = Literal[
    "malformed_line",
    "missing_column",
    "missing_prompt",
    "invalid_messages",
    "invalid_parameter",
    "invalid_schema",
    "invalid_id",
    "duplicate_id",
    "unknown_adapter",
    "unsupported_request",
    "prompt_too_long",
    "refused",
    "engine_crashed",
]
_LONGEST_QUOTE = 200


@dataclass(frozen=True)
class RowError:
    """Why a row has no answer."""

    type: ErrorType
    detail: str


class Invalid(Exception):
    """Carries a RowError out of the functions that look at a row."""

    def __init__(self, kind: ErrorType, detail: str) -> None:
        super().__init__(detail)
        self.error = RowError(kind, detail)


def refusal(request: Request, error: Exception) -> RowError:
    """The fault of a request that vLLM did not take."""
    kind: ErrorType = "invalid_schema" if "structured_outputs" in request.sampling else "refused"
    return RowError(kind, f"the engine does not take it: {error}")


def quote(value: Any) -> str:
    """A value of a row for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"
