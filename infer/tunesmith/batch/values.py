"""Values of a row, checked: each function raises Invalid with the type of the fault."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.batch.errors import Invalid, quote
from tunesmith.config.schema.batch import template_parts

_STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def number(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number, which may be written as a text, as CSV does."""
    value = _read(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Invalid("invalid_parameter", f"{name} must be a number, not {quote(value)}")
    if not least <= value <= most:
        upper = "up" if most == math.inf else f"to {most:g}"
        raise Invalid(
            "invalid_parameter", f"{name} must be a number from {least:g} {upper}, not {value}"
        )
    return float(value)


def whole(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """A whole number, which may be written as a text or as a float without a fraction."""
    value = _read(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Invalid(
            "invalid_parameter",
            f"{name} must be a whole number from {least} up, not {quote(value)}",
        )
    if most is not None and value > most:
        raise Invalid("invalid_parameter", f"{name} must be at most {most}, not {value}")
    return value


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=str)
    except (ValueError, RecursionError):
        return value


def texts(name: str, value: Any) -> list[str]:
    """A text or a list of texts."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise Invalid("invalid_parameter", f"{name} must be texts, not {quote(value)}")
    return found


def conversation(value: Any, name: str = "messages") -> list[dict[str, Any]]:
    """A list of messages, which may be written as JSON; members that are null are left out."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _read(value)
    if not isinstance(value, list) or not value:
        raise Invalid("invalid_messages", f"{name} must be a list with at least one message")
    found = [without_nulls(message) for message in value]
    for at, message in enumerate(found):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Invalid("invalid_messages", f"{name}[{at}] has no role")
        if not _is_content(message):
            raise Invalid("invalid_messages", f"{name}[{at}] has no text as its content")
    return found


def _is_content(message: Mapping[str, Any]) -> bool:
    """A text, or a list of text parts; an assistant turn may have tool calls in its place."""
    content = message.get("content")
    if isinstance(content, list):
        return all(
            isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))
            for part in content
        )
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def without_nulls(value: Any) -> Any:
    """Columnar formats give every object the keys of all others, filled with nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """A template with the row's columns in their places."""
    found = []
    for part, is_column in template_parts(template):
        if not is_column:
            found.append(part)
            continue
        value = columns.get(part)
        if value is None:
            have = ", ".join(columns) or "none"
            raise Invalid("missing_column", f"it has no {part!r}; its columns are {have}")
        found.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(found)


def structure(value: Any, name: str = "structured_outputs") -> dict[str, Any]:
    """What an answer has to look like, as vLLM's `StructuredOutputsParams` name it."""
    value = without_nulls(_read(value))
    if not isinstance(value, dict) or len(value) != 1 or not {*value} <= {*_STRUCTURES}:
        raise Invalid(
            "invalid_schema",
            f"{name} must be an object with one of {', '.join(_STRUCTURES)}, not {quote(value)}",
        )
    ((kind, content),) = value.items()
    if kind == "json":
        return {"json": schema(content, name)}
    if kind == "choice" and not (
        isinstance(content, Sequence)
        and content
        and not isinstance(content, str)
        and all(isinstance(one, str) for one in content)
    ):
        raise Invalid("invalid_schema", f"{name}.choice must be texts, not {quote(content)}")
    if kind in ("regex", "grammar", "structural_tag") and not isinstance(content, str):
        raise Invalid("invalid_schema", f"{name}.{kind} must be a text, not {quote(content)}")
    return value


def response_format(value: Any) -> dict[str, Any] | None:
    """The same from the OpenAI API's `response_format`; None where it asks for any text."""
    value = without_nulls(_read(value))
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    inner = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(inner, dict) or "schema" not in inner:
        raise Invalid(
            "invalid_schema",
            "response_format must have the type text, json_object, or json_schema with a "
            f"json_schema.schema, not {quote(value)}",
        )
    return {"json": schema(inner["schema"], "response_format")}


def schema(value: Any, name: str) -> dict[str, Any]:
    """A JSON Schema; what the engine's grammar makes of it is seen when it gets the request."""
    value = _read(value)
    if not isinstance(value, dict):
        raise Invalid("invalid_schema", f"{name}: a schema is an object, not {quote(value)}")
    return value
