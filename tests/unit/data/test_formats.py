"""Each shape of a row becomes the one shape, or is refused with its kind of fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.faults import RowError
from tunesmith.data.formats import REQUIRED, normalise

USER = {"role": "user", "content": "Is it so?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row_format", "raw", "expected"),
    [
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ("messages", {"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
        (
            "messages",
            {"messages": [{**USER, "content": [{"type": "text", "text": "Is it so?"}]}, ASSISTANT]},
            [USER, ASSISTANT],
        ),
        ("messages", {"messages": [{**USER, "id": 3, "name": None}, ASSISTANT]}, [USER, ASSISTANT]),
        (
            "messages",
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
                        ],
                    },
                    {"role": "tool", "content": "4", "tool_call_id": "1"},
                    ASSISTANT,
                ]
            },
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "1"},
                ASSISTANT,
            ],
        ),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "reasoning_content": "Hm."}]},
            [USER, {**ASSISTANT, "reasoning": "Hm."}],
        ),
        ("prompt_completion", {"prompt": "Is it so?", "completion": "Yes."}, [USER, ASSISTANT]),
        (
            "prompt_completion",
            {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
            [SYSTEM, USER, ASSISTANT],
        ),
        (
            "alpaca",
            {"instruction": "Is it", "input": "so?", "output": "Yes."},
            [{**USER, "content": "Is it\n\nso?"}, ASSISTANT],
        ),
        (
            "alpaca",
            {
                "instruction": "Is it so?",
                "output": "Yes.",
                "system": "Be brief.",
                "history": [["a", "b"]],
            },
            [
                SYSTEM,
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                USER,
                ASSISTANT,
            ],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Is it so?"},
                    {"from": "gpt", "value": "Yes."},
                ]
            },
            [SYSTEM, USER, ASSISTANT],
        ),
    ],
)
def test_a_good_row_becomes_messages(row_format: Any, raw: Any, expected: Any) -> None:
    assert normalise(raw, row_format) == ({"messages": expected}, 0)


def test_tools_are_kept_and_text_is_text() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row, _ = normalise({"messages": [USER, ASSISTANT], "tools": json.dumps(tools)}, "messages")
    assert row["tools"] == tools
    assert normalise({"text": " words "}, "text") == ({"text": " words "}, 0)


def test_turns_after_the_last_answer_are_cut_and_counted() -> None:
    row, cut = normalise({"messages": [USER, ASSISTANT, USER, USER]}, "messages")
    assert (row["messages"], cut) == ([USER, ASSISTANT], 2)


def test_weights_and_last_say_what_is_learnt() -> None:
    left_out = {**ASSISTANT, "weight": 0}
    given = [{**USER, "weight": 0}, {**left_out}, USER, {**ASSISTANT, "weight": 1}, USER, ASSISTANT]
    row, _ = normalise({"messages": given}, "messages")
    assert row["messages"] == [USER, left_out, USER, ASSISTANT, USER, ASSISTANT]
    row, _ = normalise({"messages": given}, "messages", "last")
    assert row["messages"] == [USER, left_out, USER, left_out, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row_format", "raw", "kind", "detail"),
    [
        ("messages", {"text": "a"}, "missing_column", "no messages; the row has: text"),
        ("alpaca", {"output": None}, "missing_column", "no instruction and no output"),
        ("messages", {"messages": "hello"}, "wrong_type", "messages is a list of objects"),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": 3}]}, "wrong_type", "turn 2"),
        (
            "messages",
            {"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]},
            "wrong_type",
            "only text can be learnt",
        ),
        ("messages", {"messages": [{"from": "human"}]}, "unknown_role", "data.format: sharegpt"),
        ("messages", {"messages": [{"role": "bot"}]}, "unknown_role", "system, user, assistant"),
        ("messages", {"messages": []}, "no_assistant_turn", "nothing to learn"),
        ("messages", {"messages": [SYSTEM, USER]}, "no_assistant_turn", "nothing to learn"),
        ("messages", {"messages": [ASSISTANT]}, "wrong_role_order", "turn 1: assistant after"),
        ("messages", {"messages": [SYSTEM, ASSISTANT]}, "wrong_role_order", "assistant after sys"),
        (
            "messages",
            {"messages": [USER, ASSISTANT, ASSISTANT]},
            "wrong_role_order",
            "turn 3: assistant after assistant",
        ),
        ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "wrong_role_order", "turn 2"),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "content": " \n"}]},
            "empty_assistant",
            "turn 2",
        ),
        ("messages", {"messages": [{**USER, "content": ""}, ASSISTANT]}, "empty_user", "turn 1"),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "content": "\ud800"}]},
            "not_utf8",
            "half a character",
        ),
        ("prompt_completion", {"prompt": "a", "completion": " "}, "empty_assistant", "turn 2"),
        ("sharegpt", {"conversations": [{"from": "x", "value": ""}]}, "unknown_role", "'x'"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "missing_column", "no value"),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            "nothing_learnt",
            "weight 0",
        ),
        ("messages", {"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "wrong_type", "turn 2"),
        ("messages", {"messages": [USER, {**ASSISTANT, "weight": True}]}, "wrong_type", "turn 2"),
        (
            "messages",
            {"messages": [{**USER, "weight": 1}, ASSISTANT]},
            "unlearnable_role",
            "only the assistant's can be learnt",
        ),
        ("text", {"text": "\n"}, "empty_text", "empty"),
        ("text", {"text": 3}, "wrong_type", "text is a string, not 3"),
    ],
)
def test_a_bad_row_is_refused_by_kind(row_format: Any, raw: Any, kind: str, detail: str) -> None:
    with pytest.raises(RowError) as raised:
        normalise(raw, row_format)
    assert raised.value.kind == kind
    assert detail in raised.value.detail


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "weight"]
            ),
            inner
            | st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
columns = sorted(
    {"tools", "system", "history", "input", "prompt"}.union(*map(set, REQUIRED.values()))
)


@given(st.dictionaries(st.sampled_from(columns), values), st.sampled_from(list(REQUIRED)))
def test_any_row_is_normalised_or_refused(raw: dict[str, Any], row_format: Any) -> None:
    try:
        row, _ = normalise(raw, row_format)
    except RowError:
        return
    json.dumps(row, ensure_ascii=False).encode()
    if row_format != "text":
        assert row["messages"][-1]["role"] == "assistant"
    if row_format == "preference":
        answer = row["messages"][row["prompt_turns"] :]
        assert row["prompt_turns"]
        assert answer != row["rejected"]
        assert row["rejected"][-1]["role"] == "assistant"
