"""From the bodies that the request log keeps back to a conversation. Pure."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


class NotUsableError(Exception):
    """A line that no training row can be made of; its text is the reason, as one counts it."""


def read_prompt(path: str, body: str | None) -> tuple[list[Message], Any]:
    """The messages that were sent, and the tools. Raises NotUsableError."""
    fields = _object(body)
    tools = fields.get("tools")
    if path == "chat/completions":
        return [_message(one) for one in _list(fields.get("messages"))], tools
    if path == "responses":
        given = fields.get("input")
        asked = [{"role": "user", "content": given}] if isinstance(given, str) else _list(given)
        first = fields.get("instructions")
        before = [{"role": "system", "content": first}] if isinstance(first, str) else []
        return [_message(one) for one in (*before, *asked)], tools
    raise NotUsableError("no conversation")


def read_answer(path: str, body: str | None) -> Message:
    """The assistant's message, of a whole answer or a stream. Raises NotUsableError."""
    if body is None:
        raise NotUsableError("payload was not kept")
    if body.lstrip().startswith(("data:", "event:")):
        choices = _streamed(body)
    else:
        answer = _object(body)
        choices = _response(answer) if path == "responses" else answer.get("choices") or []
    if len(choices) != 1:
        raise NotUsableError("not one answer")
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict) or choice.get("finish_reason") in ("length", "content_filter"):
        raise NotUsableError("answer was not complete")
    kept = {
        name: message[name]
        for name in ("content", "reasoning_content", "tool_calls")
        if message.get(name)
    }
    if not kept.keys() & {"content", "tool_calls"}:
        raise NotUsableError("empty answer")
    return {"role": "assistant", "content": "", **kept}


def _streamed(body: str) -> list[dict[str, Any]]:
    """Choices put together from their pieces."""
    texts: dict[int, list[str]] = {}
    reasons: dict[int, Any] = {}
    for line in body.splitlines():
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        event = _object(line.removeprefix("data:"))
        if event.get("type") == "response.completed":
            return _response(event.get("response") or {})
        for choice in event.get("choices") or ():
            delta, index = choice.get("delta") or {}, choice.get("index", 0)
            if delta.get("tool_calls"):
                raise NotUsableError("streamed tool call")
            texts.setdefault(index, []).append(delta.get("content") or "")
            reasons[index] = choice.get("finish_reason") or reasons.get(index, "length")
    return [
        {"message": {"content": "".join(text)}, "finish_reason": reasons[index]}
        for index, text in texts.items()
    ]


def _response(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """A response as a choice."""
    parts = [
        part.get("text") or ""
        for item in answer.get("output") or ()
        if item.get("type") == "message"
        for part in item.get("content") or ()
    ]
    reason = "stop" if answer.get("status") == "completed" else "length"
    return [{"message": {"content": "".join(parts)}, "finish_reason": reason}]


def _message(found: Any) -> Message:
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        raise NotUsableError("no conversation")
    content = found.get("content")
    if isinstance(content, list):
        texts = [one.get("text") if isinstance(one, dict) else None for one in content]
        if not all(isinstance(text, str) for text in texts):
            raise NotUsableError("not only text")
        content = "".join(text for text in texts if text)
    role = "system" if found["role"] == "developer" else found["role"]
    kept = {name: found[name] for name in ("name", "tool_calls", "tool_call_id") if found.get(name)}
    return {"role": role, "content": content or "", **kept}


def _list(found: Any) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise NotUsableError("no conversation")
    return found


def _object(text: str | None) -> dict[str, Any]:
    """A body as JSON: one that was cut to the log's size is none any more."""
    if text is None:
        raise NotUsableError("payload was not kept")
    try:
        found = json.loads(text)
    except ValueError:
        raise NotUsableError("payload was cut") from None
    if not isinstance(found, dict):
        raise NotUsableError("no conversation")
    return found
