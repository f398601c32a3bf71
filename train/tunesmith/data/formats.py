"""From a raw row in one of the usual shapes to the one shape that all stages read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.config.schema.data import DataFormat, Learn
from tunesmith.data.faults import RowError
from tunesmith.data.messages import (
    Row,
    brief,
    decoded,
    learnt,
    objects,
    plain,
    read_messages,
    read_side,
    said,
    string,
    through_last_answer,
)
from tunesmith.data.preference import read_preference

REQUIRED: Mapping[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}
"""The columns without which a row is not of the format."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def normalise(
    raw: Mapping[str, Any], row_format: DataFormat, learn: Learn = "all"
) -> tuple[Row, int]:
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
        text = string(raw["text"], "text")
        if not text.strip():
            raise RowError("empty_text", "text is empty")
        return {"text": text}, 0
    row: Row = {}
    if row_format in ("messages", "preference") and (tools := decoded(raw.get("tools"))):
        row["tools"] = [plain(tool, "tools") for tool in objects(tools, "tools")]
    match row_format:
        case "messages":
            messages = read_messages(raw["messages"], "messages")
        case "prompt_completion":
            messages = read_side(raw["prompt"], "prompt", "user")
            messages += read_side(raw["completion"], "completion", "assistant")
        case "alpaca":
            messages = _alpaca(raw)
        case "sharegpt":
            messages = _sharegpt(raw)
        case "preference":
            pair, cut = read_preference(raw, learn)
            return {**pair, **row}, cut
    answered = through_last_answer(messages)
    return {"messages": learnt(answered, learn), **row}, len(messages) - len(answered)


def fitting_formats(columns: Sequence[str]) -> list[DataFormat]:
    """The formats whose required columns are all there."""
    return [name for name, needed in REQUIRED.items() if set(needed) <= set(columns)]


def _alpaca(raw: Mapping[str, Any]) -> list[Row]:
    messages = _optional_system(raw)
    history = decoded(raw.get("history")) or []
    if not isinstance(history, list):
        raise RowError("wrong_type", f"history is a list of pairs, not {brief(history)}")
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowError("wrong_type", f"history: not a question and its answer: {brief(turn)}")
        messages += [said("user", turn[0]), said("assistant", turn[1])]
    question = string(raw["instruction"], "instruction")
    if extra := string(raw.get("input") or "", "input"):
        question += f"\n\n{extra}"
    return [*messages, said("user", question), said("assistant", raw["output"])]


def _sharegpt(raw: Mapping[str, Any]) -> list[Row]:
    messages = _optional_system(raw)
    for turn in objects(decoded(raw["conversations"]), "conversations"):
        if "from" not in turn or "value" not in turn:
            raise RowError("missing_column", f"a turn has no from or no value: {brief(turn)}")
        role = _SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise RowError(
                "unknown_role", f"from {turn['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append(said(role, turn["value"]))
    return messages


def _optional_system(raw: Mapping[str, Any]) -> list[Row]:
    return [said("system", raw["system"])] if raw.get("system") else []
