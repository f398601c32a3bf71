"""Messages as rows hold them: read into one shape, and checked to be a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.config.schema.data import Learn
from tunesmith.data.faults import RowError

Row = dict[str, Any]
"""`{"messages": [{"role", "content", …}, …], "tools"?: […]}` or `{"text": …}`; of a preference
also `"rejected"`, the worse answer, and `"prompt_turns"`, how many messages come before either."""

_ROLES = ("system", "user", "assistant", "tool")
_ALLOWED_BEFORE = {
    "system": ("nothing",),
    "user": ("nothing", "system", "user", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def read_messages(value: Any, column: str) -> list[Row]:
    """The messages of a column, also when it holds them as JSON text."""
    return [_message(turn, at) for at, turn in enumerate(objects(decoded(value), column), 1)]


def read_side(value: Any, column: str, role: str) -> list[Row]:
    """A prompt or an answer, which is a string or a list of messages."""
    value = decoded(value)
    return [said(role, value)] if isinstance(value, str) else read_messages(value, column)


def said(role: str, content: Any) -> Row:
    """One message. Raises RowError when its content is no text."""
    return {"role": role, "content": string(content, f"the {role}'s text")}


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
        message["reasoning"] = string(reasoning, f"turn {at}: reasoning")
    if role == "assistant" and (calls := decoded(turn.get("tool_calls"))):
        message["tool_calls"] = [_call(call, at) for call in objects(calls, "tool_calls")]
    if turn.get("weight") is not None and _weight(turn, at) == 0 and role == "assistant":
        message["weight"] = 0
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            message[key] = string(turn[key], f"turn {at}: {key}")
    return message


def _weight(turn: Mapping[str, Any], at: int) -> int:
    """Whether a message is learnt, as its row says it: 1 or 0."""
    weight = turn["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError("wrong_type", f"turn {at}: weight is 0 or 1, not {brief(weight)}")
    if weight and turn["role"] != "assistant":
        raise RowError(
            "unlearnable_role",
            f"turn {at}: weight 1 on a {turn['role']}'s message; only the assistant's can be "
            "learnt, because serving says for no other where it begins",
        )
    return int(weight)


def leave_out(messages: Sequence[Row], but_last: int = 0) -> list[Row]:
    """The messages with the assistant's marked as not learnt, all or but for the last few."""
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    left_out = answers[: len(answers) - but_last]
    return [
        {**message, "weight": 0} if at in left_out else message
        for at, message in enumerate(messages)
    ]


def learnt(messages: Sequence[Row], learn: Learn) -> list[Row]:
    """The messages with those marked that are not to be learnt.

    Raises RowError when no answer is left to learn.
    """
    marked = leave_out(messages, but_last=1) if learn == "last" else list(messages)
    answers = [message for message in marked if message["role"] == "assistant"]
    if all(message.get("weight") == 0 for message in answers):
        raise RowError("nothing_learnt", "every answer that could be learnt has weight 0")
    return marked


def _text(content: Any, at: int) -> str:
    """A message's content as one string; parts other than text are refused."""
    if content is None:
        return ""
    if isinstance(content, str):
        return string(content, f"turn {at}: content")
    parts = objects(content, f"turn {at}: content")
    if any(part.get("type", "text") != "text" for part in parts):
        raise RowError("wrong_type", f"turn {at}: only text can be learnt, not {brief(content)}")
    return "\n".join(string(part.get("text"), f"turn {at}: text") for part in parts)


def _call(call: Mapping[str, Any], at: int) -> Row:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise RowError("wrong_type", f"turn {at}: a tool call has no function with a name")
    arguments = decoded(function.get("arguments")) or {}
    if not isinstance(arguments, Mapping):
        raise RowError("wrong_type", f"turn {at}: a tool call's arguments are no JSON object")
    arguments = plain(arguments, f"turn {at}: arguments")
    called: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return called | ({"id": string(call["id"], "id")} if call.get("id") else {})


def through_last_answer(messages: list[Row]) -> list[Row]:
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


def decoded(value: Any) -> Any:
    """A list or an object that a CSV cell or a string column holds as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def objects(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """Raises RowError when the value is no list of objects."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value):
        return value
    raise RowError("wrong_type", f"{name} is a list of objects, not {brief(value)}")


def string(value: Any, name: str) -> str:
    """Raises RowError when the value is no text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} is a string, not {brief(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not_utf8", f"{name} has half a character at {error.start}") from error
    return value


def plain(value: Mapping[str, Any], name: str) -> Row:
    """An object that UTF-8 JSON can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("wrong_type", f"{name}: {error}") from error
    return dict(value)


def brief(value: Any) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
