"""Every line of an input is one row, good or typed as bad."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.batch.rows import Row, _Hashes, read_rows
from tunesmith.config import UserError
from tunesmith.config.schema.batch import Batch


def rows_of(folder: Path, *lines: bytes | str | dict[str, Any]) -> list[Row]:
    path = folder / "input.jsonl"
    with path.open("wb") as file:
        for line in lines:
            text = json.dumps(line) if isinstance(line, dict) else line
            file.write((text.encode() if isinstance(text, str) else text) + b"\n")
    return list(read_rows(Batch(input=str(path), output="output.jsonl", max_tokens=9)))


def test_prompt_and_messages_are_read_with_their_parameters(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    plain, chat = rows_of(
        tmp_path,
        {"prompt": "Hi", "topic": "x"},
        "   ",
        {"id": 7, "messages": messages, "max_tokens": 3, "temperature": 1},
    )
    assert plain.error is None and chat.error is None
    assert plain.ask.messages == [{"role": "user", "content": "Hi"}]
    assert (plain.id, plain.line, plain.index) == ("line-1", 1, 0)
    assert plain.ask.sampling == {"max_tokens": 9, "temperature": 0.0}
    assert (chat.id, chat.line, chat.index) == (7, 3, 1)
    assert chat.ask.messages == messages
    assert chat.ask.sampling == {"max_tokens": 3, "temperature": 1.0}
    assert plain.columns == {"prompt": "Hi", "topic": "x"}


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("{bad", "malformed_line", "not JSON"),
        ('"text"', "malformed_line", "not a JSON object"),
        (b'{"prompt": "\xff"}', "malformed_line", "not UTF-8 at byte 12"),
        ('{"prompt": "x", "n": NaN}', "malformed_line", "NaN"),
        ("[" * 100_000, "malformed_line", "not JSON"),
        ({"text": "x"}, "missing_prompt", "neither prompt nor messages"),
        ({"prompt": ""}, "missing_prompt", "must be a text"),
        ({"prompt": ["x"]}, "missing_prompt", "must be a text"),
        ({"prompt": "x", "messages": []}, "invalid_messages", "both"),
        ({"messages": []}, "invalid_messages", "at least one"),
        ({"messages": [{"content": "x"}]}, "invalid_messages", "messages[0] has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_messages", "no text"),
        ({"messages": [{"role": "user"}]}, "invalid_messages", "no text"),
        ({"prompt": "x", "max_tokens": 0}, "invalid_parameter", "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "invalid_parameter", "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "invalid_parameter", "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "invalid_parameter", "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "invalid_parameter", "temperature"),
        ('{"prompt": "x", "temperature": 1e999}', "invalid_parameter", "temperature"),
        ({"id": {}, "prompt": "x"}, "invalid_id", "id must be"),
        ({"id": "", "prompt": "x"}, "invalid_id", "id must be"),
    ],
)
def test_each_fault_has_its_type_and_does_not_touch_its_neighbours(
    tmp_path: Path, line: Any, kind: str, words: str
) -> None:
    before, bad, after = rows_of(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    assert before.error is None and after.error is None
    assert bad.error and bad.error.type == kind
    assert words in bad.error.detail
    assert bad.line == 2


def test_an_id_is_taken_once_also_when_it_was_the_name_of_a_line(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        {"id": "a", "prompt": "1"},
        {"prompt": "2"},
        {"id": "line-2", "prompt": "3"},
        {"id": "a", "prompt": "4"},
        {"id": 5, "prompt": "5"},
        {"id": "5", "prompt": "6"},
    )
    kinds = [row.error.type if row.error else None for row in rows]
    assert kinds == [None, None, "duplicate_id", "duplicate_id", None, "duplicate_id"]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, b"\xef\xbb\xbf" + b'{"prompt": "x"}')
    assert row.error is None


def test_an_input_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(Batch(input=str(tmp_path / "none.jsonl"), output="o")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
COLUMNS = st.sampled_from(["id", "prompt", "messages", "max_tokens", "temperature", "other"])
LINES = st.binary() | st.dictionaries(COLUMNS, JSON).map(lambda row: json.dumps(row).encode())


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(LINES, max_size=6))
def test_any_bytes_give_one_row_for_each_line(tmp_path: Path, lines: list[bytes]) -> None:
    content = b"".join(line + b"\n" for line in lines)
    rows = rows_of(tmp_path, *lines)
    written = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(rows) == sum(bool(line.strip()) for line in written)
    assert [row.index for row in rows] == list(range(len(rows)))
    good = [str(row.id) for row in rows if row.error is None]
    assert len(good) == len(set(good))
    assert all(row.ask.messages for row in rows if row.error is None)


@given(
    st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-9, 9).map((1024).__mul__)))
)
def test_hashes_are_a_set(values: list[int]) -> None:
    table, former = _Hashes(), set[int]()
    for value in values * 2:
        value = value or 1
        assert table.add(value) == (value not in former)
        former.add(value)


def test_many_hashes_take_little_memory() -> None:
    table = _Hashes()
    assert all(table.add(hash(str(at))) for at in range(5000))
    assert not any(table.add(hash(str(at))) for at in range(5000))
    assert sys.getsizeof(table._table) <= 32 * 5000
