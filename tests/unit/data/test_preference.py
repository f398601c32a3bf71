"""Pairs of answers, in every shape in which data sets have them."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset, read_rows
from tunesmith.data.faults import RowError
from tunesmith.data.formats import normalise

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it so?"}
GOOD = {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "Who knows."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("raw", "prompt", "chosen", "rejected"),
    [
        (
            {"prompt": "Is it so?", "chosen": "Yes.", "rejected": "Who knows."},
            [USER],
            [GOOD],
            [BAD],
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": "Who knows."},
            [SYSTEM, USER],
            [GOOD],
            [BAD],
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            [USER, {**GOOD, "weight": 0}, USER],
            [GOOD],
            [BAD],
        ),
        (
            {
                "prompt": "Is it so?",
                "chosen": [SYSTEM, USER, GOOD],
                "rejected": [SYSTEM, USER, BAD],
            },
            [SYSTEM, USER],
            [GOOD],
            [BAD],
        ),
        (
            {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, CALL, RESULT, BAD]},
            [USER],
            [GOOD],
            [CALL, RESULT, BAD],
        ),
        (
            {"chosen": [USER, CALL, RESULT, GOOD], "rejected": [USER, CALL, RESULT, BAD]},
            [USER, {**CALL, "weight": 0}, RESULT],
            [GOOD],
            [BAD],
        ),
    ],
)
def test_every_shape_becomes_one(
    raw: dict[str, Any], prompt: list[Any], chosen: list[Any], rejected: list[Any]
) -> None:
    row, cut = normalise(raw, "preference")
    expected = {"messages": prompt + chosen, "rejected": rejected, "prompt_turns": len(prompt)}
    assert (row, cut) == (expected, 0)


def test_turns_after_the_answers_are_cut_and_tools_kept() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    raw = {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD], "tools": tools}
    row, cut = normalise(raw, "preference")
    assert (row["messages"], row["rejected"], row["tools"], cut) == ([USER, GOOD], [BAD], tools, 1)


def test_of_an_answer_in_steps_the_last_can_be_learnt_alone() -> None:
    raw = {"prompt": [USER], "chosen": [CALL, RESULT, GOOD], "rejected": [BAD]}
    row, _ = normalise(raw, "preference", "last")
    assert row["messages"] == [USER, {**CALL, "weight": 0}, RESULT, GOOD]
    assert row["rejected"] == [BAD]


@pytest.mark.parametrize(
    ("raw", "kind", "detail"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing_column", "no rejected; the row has: prompt"),
        ({"chosen": "a", "rejected": "b"}, "missing_column", "no prompt, and chosen is a text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal_answers", "are the same"),
        (
            {"prompt": "a", "chosen": [GOOD], "rejected": [GOOD, USER]},
            "equal_answers",
            "up to their last answer",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "?"}, BAD]},
            "different_prompts",
            "do not both begin",
        ),
        (
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, {**USER, "content": "?"}, BAD]},
            "different_prompts",
            "chosen has another user turn",
        ),
        (
            {"prompt": "Is it?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "different_prompts",
            "do not both begin with the prompt",
        ),
        (
            {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]},
            "different_prompts",
            "do not both begin with the prompt",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "different_prompts", "begin with the prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "no_assistant_turn", "rejected has no"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty_assistant", "rejected: turn 2"),
        ({"prompt": [USER, GOOD], "chosen": "b", "rejected": "c"}, "wrong_role_order", "chosen: "),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "weight": 0}]},
            "nothing_learnt",
            "weight 0",
        ),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "wrong_type", "prompt is a list"),
    ],
)
def test_a_bad_pair_is_refused_by_kind(raw: dict[str, Any], kind: str, detail: str) -> None:
    with pytest.raises(RowError) as raised:
        normalise(raw, "preference")
    assert (raised.value.kind, detail in raised.value.detail) == (kind, True), raised.value.detail


def test_the_dataset_counts_pairs(make_stages: Any, write_lines: Any) -> None:
    rows = [{"prompt": f"{at}?", "chosen": "Yes.", "rejected": "No."} for at in range(40)]
    same = {"prompt": "?", "chosen": "a", "rejected": "a"}
    path = write_lines(*rows, same, {**rows[0], "chosen": "Of course."})
    artifact = make_dataset(make_stages(path, format="preference", max_error_rate=0.1))
    metrics = artifact.manifest.metrics
    assert metrics["dropped"] == {"equal_answers": 1}
    assert metrics["train_rows"] + metrics["evaluation_rows"] == 41
    row = next(read_rows(artifact.root / "train.jsonl"))
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    characters = metrics["train_characters"] + metrics["evaluation_characters"]
    assert characters == sum(len(f"{at}?Yes.No.") for at in range(40)) + len("0?Of course.No.")


def test_pretraining_on_preferences_is_refused() -> None:
    recipe = {
        "name": "test",
        "model": {},
        "data": {"train": "rows.jsonl", "format": "preference"},
        "train": {"method": "pretrain", "architecture": {}},
    }
    with pytest.raises(ValueError, match="exactly when data.format is preference"):
        Recipe.model_validate(recipe)
