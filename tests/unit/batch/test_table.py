"""A schema for rows of any shape, and a file that has them all."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.batch.publish import check_output, publish
from tunesmith.batch.shards import to_line
from tunesmith.batch.table import arrow_schema, fit, merge, shape_of, shape_of_rows
from tunesmith.config import UserError
from tunesmith.config.schema.batch import Batch
from tunesmith.ledger import hash_file

ROWS: list[dict[str, Any]] = [
    {"id": 1, "messages": [{"role": "user", "content": "a"}], "score": 1, "error": None},
    {"id": "x", "messages": [{"role": "tool", "name": "n"}], "score": 0.5, "error": {"type": "t"}},
    {"id": "y\ud800", "extra": {}, "mixed": [1, "a"], "answer": "z", "none": None},
    {"id": "z", "big": 2**70, "mixed": [2], "answer": None},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100)
@given(JSON, JSON, JSON)
def test_a_shape_does_not_depend_on_the_order_of_the_rows(one: Any, two: Any, three: Any) -> None:
    a, b, c = shape_of(one), shape_of(two), shape_of(three)
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=2), JSON, max_size=4), max_size=5))
def test_any_rows_fit_the_schema_that_is_made_of_them(rows: list[dict[str, Any]]) -> None:
    shapes = shape_of_rows(rows)
    columns = {name: [fit(row.get(name), shape) for row in rows] for name, shape in shapes.items()}
    table = arrow.Table.from_pydict(columns, schema=arrow_schema(shapes))
    assert table.num_rows == (len(rows) if shapes else 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "artifact.jsonl"
    path.write_bytes(b"".join(to_line(row) for row in ROWS))
    return path


def put(source: Path, output: Path | str, **keys: Any) -> bool:
    section = Batch(input="none.jsonl", output=str(output), **keys)
    return publish(source, hash_file(source), section)


def test_jsonl_is_copied_once_and_at_once(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert put(source, target) and not put(source, target)
    target.write_bytes(b"half")
    assert put(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["artifact.jsonl", "out.jsonl"]


def test_parquet_has_a_type_for_every_column(source: Path, tmp_path: Path) -> None:
    put(source, tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    found = table.to_pylist()
    assert [row["id"] for row in found] == ["1", "x", "y?", "z"]
    assert found[0]["messages"] == [{"role": "user", "content": "a", "name": None}]
    assert [row["score"] for row in found] == [1.0, 0.5, None, None]
    assert found[2]["mixed"] == ["1", "a"]
    assert found[3]["big"] == str(2**70) and found[2]["extra"] == "{}"
    assert table.schema.field("none").type == arrow.string()


def test_csv_has_every_column(source: Path, tmp_path: Path) -> None:
    put(source, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == ["1", "x", "y?", "z"]
    assert json.loads(found[1]["error"]) == {"type": "t"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_a_folder_of_parts_takes_the_place_of_the_old_one(
    source: Path, tmp_path: Path, suffix: str, scheme: str
) -> None:
    target = f"{scheme}{tmp_path}/out{suffix}"
    fs, path = fsspec.core.url_to_fs(target)
    check = Batch(input="none.jsonl", output=target, rows_per_file=1)
    put(source, target, rows_per_file=1)
    assert len(fs.glob(f"{path}/part-*{suffix}")) == 4
    put(source, target, rows_per_file=3)
    names = sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False))
    assert names == ["_SUCCESS", f"part-00000{suffix}", f"part-00001{suffix}"]
    assert not [name for name in fs.ls(str(tmp_path), detail=False) if "/." in name]
    if suffix == ".parquet":
        schemas = [parquet.read_schema(fs.open(f"{path}/part-0000{at}.parquet")) for at in (0, 1)]
        assert schemas[0] == schemas[1]
    if suffix == ".jsonl":
        whole = b"".join(fs.cat_file(f"{path}/part-0000{at}.jsonl") for at in (0, 1))
        assert whole == source.read_bytes()
    if not scheme:
        (tmp_path / "in.jsonl").touch()
        check_output(check.model_copy(update={"input": str(tmp_path / "in.jsonl")}))


def test_a_uri_gets_the_whole_file_or_none(source: Path) -> None:
    put(source, "memory://there/out.jsonl")
    memory = fsspec.filesystem("memory")
    assert memory.cat_file("/there/out.jsonl") == source.read_bytes()
    assert [one.rpartition("/")[2] for one in memory.ls("/there", detail=False)] == ["out.jsonl"]


def test_no_rows_are_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    put(tmp_path / "empty.jsonl", tmp_path / "parts.jsonl", rows_per_file=2)
    assert (tmp_path / "parts.jsonl" / "part-00000.jsonl").read_bytes() == b""


def test_an_output_that_cannot_be_written_is_told_before_any_work(
    source: Path, tmp_path: Path
) -> None:
    for name in ("file", "there.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "mine").touch()
    for output, keys, words in [
        (tmp_path, {}, "is a folder"),
        (source, {}, "is the input itself"),
        (tmp_path / "file" / "answers.jsonl", {}, "cannot write"),
        (Path("/proc/answers.jsonl"), {}, "cannot write"),
        (tmp_path / "folder.jsonl", {"rows_per_file": 5}, "no batch has written"),
        (tmp_path / "there.jsonl", {"rows_per_file": 5}, "is a file"),
    ]:
        section = Batch(input=str(source), output=str(output), **keys)
        with pytest.raises(UserError, match=words):
            check_output(section)
    assert sorted(os.listdir(tmp_path)) == [
        "artifact.jsonl",
        "file",
        "folder.jsonl",
        "there.jsonl",
    ]


@pytest.mark.parametrize(
    ("place", "output"),
    [
        ("in", "in/out.jsonl"),
        ("in/*.jsonl", "in/out.jsonl"),
        ("in.jsonl", "./in.jsonl"),
        ("memory://in", "memory://in/out.jsonl"),
        ("memory://in/*.jsonl", "memory://in/out.jsonl"),
    ],
)
def test_an_output_is_not_among_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="one of its files"):
        check_output(Batch(input=place, output=output))
    check_output(Batch(input=place, output="other/out.jsonl"))
