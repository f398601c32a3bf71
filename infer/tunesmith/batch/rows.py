"""Input rows: read one line at a time, checked, and typed when they are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.batch.errors import Invalid, RowError, quote
from tunesmith.batch.requests import Ask
from tunesmith.config import DataError
from tunesmith.config.schema.batch import Batch


@dataclass(frozen=True)
class Row:
    """One line of the input."""

    index: int
    """Position among the rows, from 0."""

    line: int
    """Line of the file, from 1."""

    id: str | int
    columns: Mapping[str, Any]
    """The row as it was written; empty when the line is not a JSON object."""

    ask: Ask
    """What the row wants; nothing where there is an error."""

    error: RowError | None = None


def read_rows(section: Batch) -> Iterator[Row]:
    """Every row in order, good or bad; lines of white space are not rows.

    Raises DataError when the file cannot be read.
    """
    seen: set[int] = set()
    index = 0
    try:
        with section.input.open("rb") as file:
            for line, raw in enumerate(file, 1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if not raw.strip():
                    continue
                row = _row(index, line, raw, section)
                # A row without an id is called after its line, which a later id may clash with.
                digest = hash(str(row.id))
                if digest in seen and row.error is None:
                    detail = f"an earlier row has the id {row.id!r} too"
                    row = replace(row, error=RowError("duplicate_id", detail))
                seen.add(digest)
                yield row
                index += 1
    except OSError as error:
        raise DataError(f"batch.input: cannot read {section.input}: {error.strerror}") from error


def _row(index: int, line: int, raw: bytes, section: Batch) -> Row:
    row = Row(index, line, f"line-{line}", {}, Ask())
    try:
        row = replace(row, columns=_object(raw))
        row = replace(row, id=_id(row))
        return replace(row, ask=_ask(row.columns, section))
    except Invalid as invalid:
        return replace(row, error=invalid.error)


def _ask(columns: Mapping[str, Any], section: Batch) -> Ask:
    sampling = {
        "max_tokens": _max_tokens(columns.get("max_tokens"), section),
        "temperature": _temperature(columns.get("temperature"), section),
    }
    return Ask(messages=_messages(columns), sampling=sampling)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Invalid("malformed_line", f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Invalid("malformed_line", f"not JSON: {error or 'nested too deeply'}") from error
    if not isinstance(value, dict):
        raise Invalid("malformed_line", f"not a JSON object but {quote(value)}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _id(row: Row) -> str | int:
    value = row.columns.get("id")
    if value is None:
        return row.id
    if value == "" or isinstance(value, bool) or not isinstance(value, (str, int)):
        raise Invalid("invalid_id", f"id must be a text or a whole number, not {quote(value)}")
    return value


def _messages(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation to answer; a plain prompt is its one user turn."""
    prompt, messages = columns.get("prompt"), columns.get("messages")
    if prompt is not None and messages is not None:
        raise Invalid("invalid_messages", "it has both prompt and messages; give one of them")
    if messages is None:
        if prompt is None:
            raise Invalid("missing_prompt", "it has neither prompt nor messages")
        if not isinstance(prompt, str) or not prompt:
            raise Invalid("missing_prompt", f"prompt must be a text, not {quote(prompt)}")
        return [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise Invalid("invalid_messages", "messages must be a list with at least one message")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Invalid("invalid_messages", f"messages[{at}] has no role")
        if not _is_content(message):
            raise Invalid("invalid_messages", f"messages[{at}] has no text as its content")
    return messages


def _is_content(message: Mapping[str, Any]) -> bool:
    """A text, or a list of text parts; an assistant turn may have tool calls in its place."""
    content = message.get("content")
    if isinstance(content, list):
        return all(
            isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))
            for part in content
        )
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _max_tokens(value: Any, section: Batch) -> int:
    if value is None:
        return section.max_tokens
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Invalid(
            "invalid_parameter", f"max_tokens must be a whole number above 0, not {quote(value)}"
        )
    return value


def _temperature(value: Any, section: Batch) -> float:
    if value is None:
        return section.temperature
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise Invalid(
            "invalid_parameter", f"temperature must be a number from 0 up, not {quote(value)}"
        )
    return float(value)
