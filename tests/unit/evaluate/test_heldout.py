from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat import ChatTemplate
from tunesmith.config import DataError
from tunesmith.evaluate.heldout import HeldOut, hold_out

Row = dict[str, Any]


def talk(name: str, *contents: str) -> Row:
    roles = ("user", "assistant")
    return {
        "id": name,
        "messages": [
            {"role": roles[at % 2], "content": content} for at, content in enumerate(contents)
        ],
    }


def held_out(rows: list[Row], folder: Path, **limits: int) -> HeldOut:
    given = {"max_length": 512, "max_model_len": 512, "max_tokens": 8} | limits
    return hold_out(rows, folder, chat_template=None, **given)


def test_scored_tokens_are_the_ones_training_learns(tokenizer_folder: Path) -> None:
    row = talk("a", "What is one?", "It is one.", "And two?", "It is two.")
    found = held_out([row], tokenizer_folder)
    template = ChatTemplate.load(tokenizer_folder)
    expected = template.supervise(row["messages"])
    (item,) = found.items
    (scored,) = item.scored
    assert scored.input_ids == expected.input_ids
    assert [at in scored.learnt for at in range(len(expected.mask))] == expected.mask
    assert item.prompt_ids == template.prompt_ids(row["messages"][:3])
    assert item.reference == "It is two."
    assert found.end_of_turn_id == template.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_rows_that_cannot_be_measured_are_counted_by_reason(tokenizer_folder: Path) -> None:
    good = talk("good", "What is one?", "It is one.")
    long_answer = talk("cut", "What is one?", "It is one. " * 40)
    rows = [
        good,
        long_answer,
        talk("silent", "What is one?"),
        talk("long", "What is one? " * 60, "It is one."),
        talk("bad", "What is one?", "It <|im_end|> is"),
    ]
    found = held_out(rows, tokenizer_folder, max_length=100)
    assert [item.id for item in found.items] == ["good", "cut"]
    assert found.cut == 1
    assert len(found.items[1].scored[0].input_ids) == 100
    assert max(found.items[1].scored[0].learnt) == 99
    assert found.excluded == {
        "without an assistant turn": 1,
        "too long": 1,
        "refused by the chat template": 1,
    }


def test_a_prompt_that_leaves_no_room_for_the_answer_is_too_long(tokenizer_folder: Path) -> None:
    row = talk("a", "What is one?", "One.")
    room = len(held_out([row], tokenizer_folder).items[0].prompt_ids or [])
    fits = {"max_tokens": 30, "max_model_len": room + 30}
    assert len(held_out([row], tokenizer_folder, **fits).items) == 1
    with pytest.raises(DataError, match="none of 1 held-out rows can be measured .1 too long"):
        held_out([row], tokenizer_folder, max_tokens=30, max_model_len=room + 29)


def test_plain_text_is_scored_whole_and_has_no_answer(tokenizer_folder: Path) -> None:
    (item,) = held_out([{"id": "t", "text": "It is two."}], tokenizer_folder).items
    (scored,) = item.scored
    assert scored.learnt == list(range(1, len(scored.input_ids)))
    assert item.prompt_ids is None


def test_no_rows_is_an_error_that_says_what_to_do(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="data.evaluation"):
        held_out([], tokenizer_folder)
