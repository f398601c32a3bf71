"""Messages in the shape in which the engine's chat endpoint hands them to a template.

A training text is only what serving sends when the template gets the very same values: text as a
string or as a list of parts, arguments of tool calls as objects, nothing else than known keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def as_served(messages: Sequence[Message], *, as_parts: bool) -> list[dict[str, Any]]:
    """The messages as the template gets them; `as_parts` for templates that loop over content."""
    return [_served(message, as_parts) for message in messages]


def content_text(message: Message) -> str:
    """A message's content as one string."""
    return "\n".join(_texts(message.get("content")))


def _served(message: Message, as_parts: bool) -> dict[str, Any]:
    role = message["role"]
    served: dict[str, Any] = {"role": role, "content": content_text(message)}
    if as_parts and role != "tool":
        parts = _texts(message.get("content"))
        served["content"] = [{"type": "text", "text": text} for text in parts]
    if role == "assistant":
        if calls := message.get("tool_calls"):
            served["tool_calls"] = [_call(call) for call in calls]
        if (reasoning := message.get("reasoning")) is not None:
            served |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if role == "tool" and "tool_call_id" in message:
        served["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        served["name"] = message["name"]
    return served


def _texts(content: Any) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else part["text"] for part in content]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}
