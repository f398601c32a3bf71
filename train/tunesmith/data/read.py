"""Raw rows from a file or the hub, each with its place; a bad row never costs the good ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.errors import DataError, require
from tunesmith.data.faults import RowError
from tunesmith.data.pieces import JsonArray, Lines, first_bad_byte

_BOM = "\ufeff"
_BATCH_ROWS = 1_000
_LARGEST_CELL = 1 << 24
"""Characters of one CSV cell."""


@dataclass(frozen=True)
class Raw:
    """One row as it was found."""

    line: int
    """Line of the file where it starts; number of the row where a format has no lines."""

    value: dict[str, Any] | RowError
    """Its columns, or why it could not be read."""


def read_file(path: Path) -> Iterator[Raw]:
    """The rows of a JSONL, JSON, CSV or Parquet file, by its ending (JSONL for any other).

    Raises DataError when the file as a whole cannot be read.
    """
    try:
        match path.suffix:
            case ".parquet":
                yield from _read_parquet(path)
            case ".csv":
                yield from _read_csv(path)
            case ".json" if _first_character(path) == "[":
                yield from _read_array(path)
            case _:
                yield from _read_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror or error}") from error


def _read_lines(path: Path) -> Iterator[Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Raw(number, _parse_line(line))


def _parse_line(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _object(json.loads(line.decode("utf-8").removeprefix(_BOM)))
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"byte {error.start + 1} of the line is not UTF-8")
    except json.JSONDecodeError as error:
        return RowError("invalid_json", f"invalid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RowError("invalid_json", "invalid JSON: nested too deeply")


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError("not_an_object", f"a row is a JSON object, not {_json_type(value)}")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(4096):
            if text := block.lstrip().removeprefix(_BOM).lstrip():
                return text[0]
    return ""


def _read_array(path: Path) -> Iterator[Raw]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, value in JsonArray(file).elements():
                yield Raw(line, _object(value))
    except UnicodeDecodeError as error:
        at = first_bad_byte(path)
        raise DataError(f"{path}: byte {at} is not UTF-8; convert the file") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}; what "
            "follows in an array cannot be read, so mend it, or write one row per line (JSONL)"
        ) from error


def _read_csv(path: Path) -> Iterator[Raw]:
    # A quote that is never closed must not read the whole file into one cell.
    csv.field_size_limit(_LARGEST_CELL)
    # Bytes that are not UTF-8 become lone surrogates, which are found row by row below.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = Lines(file)
        header = next(csv.reader(lines), [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: a column name occurs twice: {', '.join(header)}")
        reader = csv.reader(lines, strict=True)
        while (start := lines.begin()) is not None:
            row = _csv_row(header, reader)
            if row is not None:
                yield Raw(start, row)
            if isinstance(row, RowError) and lines.give_back():
                reader = csv.reader(lines, strict=True)


def _csv_row(header: list[str], reader: Any) -> dict[str, Any] | RowError | None:
    """The next record; None for an empty line."""
    try:
        cells: list[str] = next(reader)
    except csv.Error as error:
        return RowError("invalid_csv", f"invalid CSV: {error}")
    if not cells:
        return None
    if len(cells) != len(header):
        detail = f"{len(cells)} cells, but the first line names {len(header)} columns"
        return RowError("invalid_csv", detail)
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return RowError("not_utf8", "not UTF-8")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Raw]:
    parquet, arrow = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Raw(number, _without_nulls(row))
    except arrow.ArrowException as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"{path}: not a readable Parquet file{after}: {error}") from error


def read_hub(repository: str, commit: str | None, splits: tuple[str, ...]) -> Iterator[Raw]:
    """The rows of a hub data set: its only split, or the first that it has of `splits`. They are
    streamed, or read from the library's cache where they cannot be.

    Raises DataError when it cannot be loaded or has none of them.
    """
    datasets = require("datasets", "train")
    try:
        found = _load_hub(datasets, repository, commit)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{repository}: cannot load it from the hub: {reason}") from error
    names = list(found)
    split = names[0] if len(names) == 1 else next((name for name in splits if name in names), None)
    if split is None:
        raise DataError(
            f"{repository}: it has the splits {', '.join(names)}, none of {', '.join(splits)}; "
            "save the one you mean as a Parquet file and name that"
        )
    number = 0
    try:
        for number, row in enumerate(found[split], 1):
            yield Raw(number, _without_nulls(row))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{repository}: cannot read on after row {number}: {type(error).__name__}: {error}"
        ) from error


def _load_hub(datasets: Any, repository: str, commit: str | None) -> Any:
    """Splits by name. Nothing is copied to the disk first where the format can be streamed."""
    try:
        found = datasets.load_dataset(repository, revision=commit, streaming=True)
        for rows in found.values():
            next(iter(rows), None)
    except Exception:
        # Offline, from a cache, or in an archive: what is wrong with it the other way will say.
        return datasets.load_dataset(repository, revision=commit)
    return found


def _without_nulls(value: Any) -> Any:
    """Columnar formats give every object the keys of all others, filled with nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
