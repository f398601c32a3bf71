"""Every row has its line; a bad one costs no other."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.errors import DataError
from tunesmith.data import pieces
from tunesmith.data.faults import RowError
from tunesmith.data.read import read_file


def read(path: Path) -> list[tuple[int, Any]]:
    """Lines with their values, or with the kind of their fault."""
    return [
        (raw.line, raw.value.kind if isinstance(raw.value, RowError) else raw.value)
        for raw in read_file(path)
    ]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2\r\n[3]\n{"a": "\xff"}\n'
        + b"[" * 100_000
        + b'\n{"a": "\xe2\x80\xa8"}'
    )
    assert read(path) == [
        (1, {"a": 1}),
        (3, "invalid_json"),
        (4, "not_an_object"),
        (5, "not_utf8"),
        (6, "invalid_json"),
        (7, {"a": "\u2028"}),
    ]


def test_json_array_and_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[ {"a":\n 1},\n\n "b", {"a": [2]}]\n', encoding="utf-8")
    assert read(path) == [(2, {"a": 1}), (5, "not_an_object"), (5, {"a": [2]})]
    path.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert read(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("text", ['[{"a": 1},\n{"a" 2}]', '[{"a": 1}\n{}]', '[{"a": 1},\n'])
def test_a_broken_json_array_names_the_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json:2: invalid JSON.*one row per line"):
        read(path)


def test_a_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "' + "é".encode() * 300_000 + b'\xff"}]')
    with pytest.raises(DataError, match=r"rows\.json: byte 600008 is not UTF-8"):
        read(path)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_an_array_is_read_in_pieces_of_any_size(
    size: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [
        {"a": "\U0001f40d\\ \n]}", "b": [-1.25e-7, True, None, {"c": "" * 5}]},
        1234,
        "x" * 99,
    ]
    text = json.dumps(values * 9, indent=indent)
    path = tmp_path / "rows.json"
    path.write_text(text + "\n", encoding="utf-8")
    whole = read(path)
    assert [value for _, value in whole[::3]] == values[:1] * 9
    monkeypatch.setattr(pieces, "_BLOCK_CHARACTERS", size)
    assert read(path) == whole
    lines = [at for at, line in enumerate(text.split("\n"), 1) if line in (" {", text)]
    assert [line for line, _ in whole[::3]] == lines * (1 if indent else 9)


@pytest.mark.parametrize("size", [1, 5, 1 << 18])
def test_a_fault_has_its_line_and_column_however_far_in(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_BLOCK_CHARACTERS", size)
    path = tmp_path / "rows.json"
    text = '[{"a": 1},\n' + '{"a": 2}, {"a": 3},\n' * 50 + '{"a": 4}, {"a" 5}]'
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read(path)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    place = f"rows.json:{expected.value.lineno}: invalid JSON: {expected.value.msg}"
    assert f"{place} at column {expected.value.colno};" in str(raised.value)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'a,b\r\n1,"two\nlines"\r\n3\r\n\r\n4,\xff\r\n"5,never closed\r\n6,"six ""6"""\r\n7,8'
    )
    assert read(path) == [
        (2, {"a": "1", "b": "two\nlines"}),
        (4, "invalid_csv"),
        (6, "not_utf8"),
        (7, "invalid_csv"),
        (8, {"a": "6", "b": 'six "6"'}),
        (9, {"a": "7", "b": "8"}),
    ]


def test_csv_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv:1: a column name occurs twice"):
        read(path)


rows = st.lists(
    st.fixed_dictionaries({"a": st.text(), "b": st.text(min_size=1)}), min_size=1, max_size=5
)


@given(rows)
def test_what_json_and_csv_writers_write_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    (folder / "rows.jsonl").write_bytes(lines.encode("utf-8"))
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["a", "b"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    for name in ("rows.json", "rows.jsonl", "rows.csv"):
        assert [value for _, value in read(folder / name)] == rows
