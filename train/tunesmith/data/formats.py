"""From a raw row in one of the usual shapes to the one shape that all stages read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.config.schema import DataFormat
from tunesmith.data.faults import RowError

Row = dict[str, Any]
"""`{"messages": [{"role", "content", …}, …], "tools"?: […]}` or `{"text": …}`."""

REQUIRED: Mapping[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
"""The columns without which a row is not of the format."""

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def normalise(raw: Mapping[str, Any], row_format: DataFormat) -> tuple[Row, int]:
    """The row in the one shape, and how many turns after its last answer were cut.

    Raises RowError when it is not of the format.
    """
    missing = [name for name in REQUIRED[row_format] if raw.get(name) is None]
    if missing:
        present = ", ".join(name for name, value in raw.items() if value is not None)
        raise RowError(
            "missing_column", f"no {' and no '.join(missing)}; the row has: {present or 'nothing'}"
        )
    if row_format == "text":
        text = _string(raw["text"], "text")
        if not text.strip():
            raise RowError("empty_text", "text is empty")
        return {"text": text}, 0
    row: Row = {}
    match row_format:
        case "messages":
            messages = _messages(raw["messages"], "messages")
            if tools := _decoded(raw.get("tools")):
                row["tools"] = [_plain(tool, "tools") for tool in _objects(tools, "tools")]
        case "prompt_completion":
            messages = _side(raw["prompt"], "prompt", "user")
            messages += _side(raw["completion"], "completion", "assistant")
        case "alpaca":
            messages = _alpaca(raw)
        case "sharegpt":
            messages = _sharegpt(raw)
    answered = _conversation(messages)
    return {"messages": answered, **row}, len(messages) - len(answered)


def fitting_formats(columns: Sequence[str]) -> list[DataFormat]:
    """The formats whose required columns are all there."""
    return [name for name, needed in REQUIRED.items() if set(needed) <= set(columns)]


def _alpaca(raw: Mapping[str, Any]) -> list[Row]:
    messages = _optional_system(raw)
    history = _decoded(raw.get("history")) or []
    if not isinstance(history, list):
        raise RowError("wrong_type", f"history is a list of pairs, not {_brief(history)}")
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowError("wrong_type", f"history: not a question and its answer: {_brief(turn)}")
        messages += [_said("user", turn[0]), _said("assistant", turn[1])]
    question = _string(raw["instruction"], "instruction")
    if extra := _string(raw.get("input") or "", "input"):
        question += f"\n\n{extra}"
    return [*messages, _said("user", question), _said("assistant", raw["output"])]


def _sharegpt(raw: Mapping[str, Any]) -> list[Row]:
    messages = _optional_system(raw)
    for turn in _objects(_decoded(raw["conversations"]), "conversations"):
        if "from" not in turn or "value" not in turn:
            raise RowError("missing_column", f"a turn has no from or no value: {_brief(turn)}")
        role = _SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise RowError(
                "unknown_role", f"from {turn['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append(_said(role, turn["value"]))
    return messages


def _optional_system(raw: Mapping[str, Any]) -> list[Row]:
    return [_said("system", raw["system"])] if raw.get("system") else []


def _side(value: Any, column: str, role: str) -> list[Row]:
    """A prompt or a completion, which is a string or a list of messages."""
    value = _decoded(value)
    return [_said(role, value)] if isinstance(value, str) else _messages(value, column)


def _said(role: str, content: Any) -> Row:
    return {"role": role, "content": _string(content, f"the {role}'s text")}


def _messages(value: Any, column: str) -> list[Row]:
    return [_message(turn, at) for at, turn in enumerate(_objects(_decoded(value), column), 1)]


def _message(turn: Mapping[str, Any], at: int) -> Row:
    role = turn.get("role")
    if role not in _ROLES:
        hint = "; for from and value use data.format: sharegpt" if "from" in turn else ""
        raise RowError(
            "unknown_role", f"turn {at}: role {role!r}; known are {', '.join(_ROLES)}{hint}"
        )
    message: Row = {"role": role, "content": _text(turn.get("content"), at)}
    reasoning = turn.get("reasoning") or turn.get("reasoning_content")
    if role == "assistant" and reasoning:
        message["reasoning"] = _string(reasoning, f"turn {at}: reasoning")
    if role == "assistant" and (calls := _decoded(turn.get("tool_calls"))):
        message["tool_calls"] = [_call(call, at) for call in _objects(calls, "tool_calls")]
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            message[key] = _string(turn[key], f"turn {at}: {key}")
    return message


def _text(content: Any, at: int) -> str:
    """A message's content as one string; parts other than text are refused."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _string(content, f"turn {at}: content")
    parts = _objects(content, f"turn {at}: content")
    if any(part.get("type", "text") != "text" for part in parts):
        raise RowError("wrong_type", f"turn {at}: only text can be learnt, not {_brief(content)}")
    return "\n".join(_string(part.get("text"), f"turn {at}: text") for part in parts)


def _call(call: Mapping[str, Any], at: int) -> Row:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise RowError("wrong_type", f"turn {at}: a tool call has no function with a name")
    arguments = _decoded(function.get("arguments")) or {}
    if not isinstance(arguments, Mapping):
        raise RowError("wrong_type", f"turn {at}: a tool call's arguments are no JSON object")
    arguments = _plain(arguments, f"turn {at}: arguments")
    called: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return called | ({"id": _string(call["id"], "id")} if call.get("id") else {})


def _conversation(messages: list[Row]) -> list[Row]:
    """The messages up to the last answer. Raises RowError when they are not a conversation."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("no_assistant_turn", "no assistant turn, so nothing to learn")
    messages = messages[: len(roles) - roles[::-1].index("assistant")]
    before = "nothing"
    for at, message in enumerate(messages, 1):
        role = message["role"]
        if before not in _ALLOWED_BEFORE[role]:
            raise RowError("wrong_role_order", f"turn {at}: {role} after {before}")
        if not message["content"].strip() and not message.get("tool_calls"):
            if role == "assistant":
                raise RowError("empty_assistant", f"turn {at}: the assistant's text is empty")
            if role == "user":
                raise RowError("empty_user", f"turn {at}: the user's text is empty")
        before = role
    if roles.index("assistant") and "user" not in roles[: roles.index("assistant")]:
        raise RowError("wrong_role_order", "the assistant speaks before any user")
    return messages


_ALLOWED_BEFORE = {
    "system": ("nothing",),
    "user": ("nothing", "system", "user", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _decoded(value: Any) -> Any:
    """A list or an object that a CSV cell or a string column holds as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _objects(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value):
        return value
    raise RowError("wrong_type", f"{name} is a list of objects, not {_brief(value)}")


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} is a string, not {_brief(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not_utf8", f"{name} has half a character at {error.start}") from error
    return value


def _plain(value: Mapping[str, Any], name: str) -> Row:
    """An object that UTF-8 JSON can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("wrong_type", f"{name}: {error}") from error
    return dict(value)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
