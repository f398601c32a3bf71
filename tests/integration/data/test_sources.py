"""Columnar files and hub data sets, through the real libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.errors import DataError
from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset, read_rows
from tunesmith.data.read import read_file, read_hub
from tunesmith.pipeline.stages import Stages

pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

CALLS = {
    "messages": [
        {"role": "user", "content": "double 2"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "double", "arguments": {"number": 2}}}
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 4."},
    ]
}
PLAIN = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure."}]
}


def stages(folder: Path, train: Path, **data: Any) -> Stages:
    recipe = {
        "name": "test",
        "store": {"folder": folder / "store"},
        "model": {"base": "builtin/tiny-llama"},
        "data": {"train": str(train), "evaluation_fraction": 0.5, **data},
    }
    return Stages(Recipe.model_validate(recipe))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_gives_the_rows_of_jsonl(tmp_path: Path) -> None:
    """Parquet fills the keys that only other rows have with nulls; they must not be learnt."""
    lines = tmp_path / "rows.jsonl"
    lines.write_text(f"{json.dumps(CALLS)}\n{json.dumps(PLAIN)}\n", encoding="utf-8")
    written = [lines, write_parquet(tmp_path / "rows.parquet", [CALLS, PLAIN])]
    made = [make_dataset(stages(tmp_path, path)) for path in written]
    from_lines, from_parquet = (
        {
            row["id"]: row
            for name in ("train.jsonl", "evaluation.jsonl")
            for row in read_rows(artifact.root / name)
        }
        for artifact in made
    )
    assert len(from_lines) == 2
    assert from_parquet == from_lines


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [{"text": "a"}, {"text": " "}, {"text": None}])
    with pytest.raises(DataError) as raised:
        make_dataset(stages(tmp_path, path, format="text"))
    assert "rows.parquet:row 2: text is empty" in str(raised.value)
    assert "rows.parquet:row 3: no text" in str(raised.value)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and then nothing of the kind PAR1")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_file(path))


def test_hub_data_comes_from_the_split_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub library loads a folder just as it loads a repository."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n', encoding="utf-8")
    rows = [
        [raw.value for raw in read_hub(str(folder), None, splits)]
        for splits in (("train",), ("validation", "test"))
    ]
    assert rows == [[{"text": "train"}], [{"text": "test"}]]
    # Nothing was copied: the rows came as a stream.
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(DataError, match="it has the splits train, test, none of other"):
        list(read_hub(str(folder), None, ("other",)))
    with pytest.raises(DataError, match="cannot load it from the hub"):
        list(read_hub(str(tmp_path / "none"), None, ("train",)))


def test_hub_data_that_cannot_be_streamed_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "b": null}\n', encoding="utf-8")

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("this format has no streaming")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", refuse)
    rows = [raw.value for raw in read_hub(str(folder), None, ("train",))]
    assert rows == [{"text": "a"}]
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_a_stream_that_breaks_names_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    lines = (json.dumps({"text": "a" * 900}) + "\n") * 20_000
    lines += '{"text": '
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot read on after row [1-9]\d+: "):
        list(read_hub(str(folder), None, ("train",)))
