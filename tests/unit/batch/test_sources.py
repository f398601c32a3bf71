"""Every file that can be read gives the same rows, and a fault is that of its own row alone."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.batch.errors import RowError
from tunesmith.batch.rows import read_rows
from tunesmith.batch.sources import read_records
from tunesmith.batch.sources.columnar import read_hub
from tunesmith.batch.sources.lines import read_csv
from tunesmith.config import DataError, MissingExtraError, UserError
from tunesmith.config.schema.batch import Batch
from tunesmith.ledger import Store
from tunesmith.pipeline.batch import digest_batch

ROWS: list[dict[str, Any]] = [
    {"id": f"r{at}", "prompt": f"Say “{at}”,\nplease", "topic": None if at % 3 else "x"}
    for at in range(7)
]


def read(place: Path | str, **keys: Any) -> list[dict[str, Any]]:
    section = Batch(input=str(place), output="o.jsonl", **keys)
    found = []
    for _, record in read_records(section):
        assert not isinstance(record.columns, RowError), record
        found.append(dict(record.columns))
    return found


def jsonl(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def test_each_form_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    with arrow.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(jsonl())
    write_csv(tmp_path / "d.csv")
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "f.parquet", row_group_size=3)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == ROWS, path.name
    assert read(f"file://{tmp_path}/f.parquet") == ROWS
    assert read(tmp_path) == ROWS * 6
    assert read(f"{tmp_path}/*.jsonl*") == ROWS * 3
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ROWS


def test_a_split_has_to_be_named_where_there_are_several(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list(ROWS[:at]) for name, at in (("test", 2), ("dev", 3))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split="dev") == ROWS[:3]
    for split in (None, "train"):
        with pytest.raises(UserError, match="name one of test, dev"):
            read(tmp_path / "saved", split=split)


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub library loads a folder just as it loads a repository."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl())
    (tmp_path / "set" / "test.jsonl").write_bytes(jsonl(ROWS[:2]))
    section = Batch(input=str(tmp_path / "set"), output="o", split="test")
    assert [record.columns for record in read_hub(section, None)] == ROWS[:2]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(UserError, match="several splits; name one of train, test"):
        list(read_hub(section.model_copy(update={"split": None}), None))
    with pytest.raises(DataError, match="cannot load it"):
        list(read_hub(Batch(input=str(tmp_path / "none"), output="o"), None))


def test_places_are_read_by_uri(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/in/b.jsonl", jsonl(ROWS[3:]))
    memory.pipe_file("/in/a.jsonl.gz", gzip.compress(jsonl(ROWS[:3])))
    memory.pipe_file("/in/_SUCCESS", b"")
    memory.pipe_file("/in/.b.jsonl", b"{")
    store = Store(tmp_path)
    for place in ("memory://in", "memory://in/*.jsonl*"):
        assert read(place) == ROWS
    section = Batch(input="memory://in", output="o")
    before = digest_batch(store, section)
    ids = [row.id for row in read_rows(Batch(input="memory://in", output="o", id_column="none"))]
    assert ids[:4] == ["a.jsonl.gz:1", "a.jsonl.gz:2", "a.jsonl.gz:3", "b.jsonl:1"]
    memory.pipe_file("/in/b.jsonl", jsonl(ROWS[3:-1]))
    assert digest_batch(store, section) != before
    with pytest.raises(UserError, match="no such file"):
        read("memory://in/none.jsonl")
    with pytest.raises(UserError, match="no protocol 'nonsense'"):
        read("nonsense://in")
    with pytest.raises(MissingExtraError, match=r"tunesmith\[s3\]"):
        read("s3://bucket/in.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 is not enough"),
        ("a.jsonl.gz", b"not gzip"),
        ("b.jsonl.gz", gzip.compress(jsonl() * 100)[:-20]),
        ("a.jsonl.zst", b"not zstd"),
        ("a.csv", b"id,id\n1,2\n"),
        ("b.csv", b"id,\n1,2\n"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_what_is_not_there_says_what_could_be(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "notes.txt").touch()
    for place, words in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "*.jsonl", "no such file"),
        (tmp_path, "has no .jsonl"),
    ]:
        with pytest.raises(UserError, match=words):
            read(place)
    with pytest.raises(UserError, match="no hub data set that can be reached"):
        digest_batch(Store(tmp_path / "store"), Batch(input="no/such-set", output="o"))


def test_values_of_columnar_files_are_those_of_json(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    row = {"at": moment, "raw": b"\x00\xff", "nan": float("nan"), "nested": [{"a": 1}, {"b": "x"}]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = read(tmp_path / "a.parquet")
    assert found == {
        "at": "2026-01-02T03:04:05",
        "raw": "AP8=",
        "nan": None,
        "nested": [{"a": 1, "b": None}, {"a": None, "b": "x"}],
    }


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"long.{suffix}"
    row = jsonl(ROWS[:1]) if suffix == "jsonl" else b"1,2\n"
    path.write_bytes((b"" if suffix == "jsonl" else b"a,b\n") + row * 10_000)
    tracemalloc.start()
    count = sum(1 for _ in read_records(Batch(input=str(path), output="o")))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000 and peak_bytes < 1_000_000


@pytest.mark.parametrize(
    ("lines", "kinds"),
    [
        (["1,2", "3", "4,5"], "good bad good"),
        (["1,2", '"3,4', "5,6", "7,8"], "good bad good good"),
        (["1,2", '"3"x,4', "5,6"], "good bad good"),
        (['"a\nb",2', "3,4"], "good good"),
        (["1,\xff", "3,4"], "bad good"),
        (["", "1,2", ""], "good"),
    ],
)
def test_a_wrong_line_of_csv_takes_no_other_with_it(lines: list[str], kinds: str) -> None:
    content = "\n".join(["a,b", *lines]).encode("latin-1") + b"\n"
    found = list(read_csv(io.BytesIO(content), "x.csv"))
    assert ["bad" if isinstance(r.columns, RowError) else "good" for r in found] == kinds.split()


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)


@given(st.lists(st.lists(CELL.filter(bool), min_size=2, max_size=2), max_size=6))
def test_what_a_csv_writer_wrote_is_read_again(rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["a", "b"], *rows])
    found = list(read_csv(io.BytesIO(text.getvalue().encode()), "x.csv"))
    assert [list(record.columns.values()) for record in found] == rows  # type: ignore[union-attr]


@given(st.binary(max_size=200))
def test_any_bytes_after_a_header_give_records_or_faults(content: bytes) -> None:
    lines = [record.line for record in read_csv(io.BytesIO(b"a,b\n" + content), "x.csv")]
    assert lines == sorted({*lines}) and all(line >= 2 for line in lines)
