"""Parquet files and Hugging Face data sets: read a group of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from tunesmith.batch.sources.record import Record, plain
from tunesmith.config import DataError, UserError, require
from tunesmith.config.schema.batch import Batch

_BATCH_ROWS = 256


def read_parquet(file: BinaryIO, place: str) -> Iterator[Record]:
    """Every row. Raises DataError when the file is damaged, which no single row can be."""
    parquet, arrow = require("pyarrow.parquet", "infer"), require("pyarrow", "infer")
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, plain(row))
    except arrow.ArrowException as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"{place}: not a readable Parquet file{after}: {error}") from error


def read_saved(batch: Batch) -> Iterator[Record]:
    """The rows of a folder that `save_to_disk` wrote."""
    datasets = require("datasets", "infer")
    try:
        found = datasets.load_from_disk(batch.input)
    except Exception as error:
        raise DataError(f"batch.input: cannot load {batch.input}: {_first_line(error)}") from error
    splits = found if isinstance(found, dict) else {"train": found}
    return _rows(datasets, _split(splits, batch), batch)


def read_hub(batch: Batch, commit: str | None) -> Iterator[Record]:
    """The rows of a hub data set, streamed where its format can be."""
    datasets = require("datasets", "infer")
    name = (batch.input, batch.subset) if batch.subset else (batch.input,)
    try:
        found = datasets.load_dataset(*name, revision=commit, streaming=True)
        for rows in found.values():
            next(iter(rows), None)
    except Exception:
        # Offline, from a cache, or in an archive: what is wrong with it the other way will say.
        try:
            found = datasets.load_dataset(*name, revision=commit)
        except Exception as error:
            raise DataError(f"{batch.input}: cannot load it: {_first_line(error)}") from error
    return _rows(datasets, _split(found, batch), batch)


def _rows(datasets: Any, rows: Any, batch: Batch) -> Iterator[Record]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield Record(number, plain(row))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{batch.input}: cannot read on after row {number}: {_first_line(error)}"
        ) from error


def _split(splits: Any, batch: Batch) -> Any:
    names = list(splits)
    if batch.split is None and len(names) == 1:
        return splits[names[0]]
    if batch.split not in names:
        asked = f"no split {batch.split!r}" if batch.split else "several splits"
        raise UserError(
            f"batch.split: {batch.input} has {asked}; name one of {', '.join(map(str, names))}"
        )
    return splits[batch.split]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
