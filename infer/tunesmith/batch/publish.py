"""The output where the recipe wants it: another form, other files, another place; at once.

The artifact keeps JSON Lines. What is published is the old one or the whole new one at any moment
where the place can rename; in an object store `_SUCCESS` is written last and taken away first.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tunesmith.batch.table import Shape, arrow_schema, clean, fit, shape_of_rows, to_text
from tunesmith.config import TunesmithError, UserError, require
from tunesmith.config.schema.batch import Batch
from tunesmith.ledger import hash_file
from tunesmith.ledger.durable import sync
from tunesmith.pipeline.files import file_system, is_uri

_GROUP_ROWS = 1000
_DONE = "_SUCCESS"


def check_output(section: Batch) -> None:
    """Raises UserError when the output could not be written at the end."""
    target = section.output
    _check_apart(section)
    if is_uri(target):
        fs, path = file_system(target)
        with _told(target):
            fs.makedirs(fs._parent(path), exist_ok=True)
            with _beside_uri(fs, path) as temporary:
                fs.pipe_file(temporary, b"")
        return
    folder = Path(target)
    if folder.is_dir() and not section.rows_per_file:
        raise UserError(
            f"batch.output: {target} is a folder; give the path of a file, or batch.rows_per_file "
            "for a folder of files"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _DONE).exists():
        raise UserError(
            f"batch.output: {target} is a folder that no batch has written; give another path"
        )
    if folder.is_file() and section.rows_per_file:
        raise UserError(f"batch.output: {target} is a file; with rows_per_file it is a folder")
    with _told(target):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder) as temporary:
            temporary.touch()


def _check_apart(section: Batch) -> None:
    """An output among the files of the input would be read as one of them the next time."""
    source, target = section.input, section.output
    if is_uri(source) or is_uri(target):
        same = target == source or target.startswith(f"{source.rstrip('/')}/")
        inside = same or fnmatch.fnmatch(target, source)
    else:
        here, there = Path(target).resolve(), Path(source).resolve()
        inside = (
            here == there or (there.is_dir() and there in here.parents) or here.match(str(there))
        )
    if inside:
        raise UserError(
            f"batch.output: {target} is the input itself, or one of its files; give another path"
        )


def publish(source: Path, sha256: str, section: Batch) -> bool:
    """Write the output from the artifact's rows; False where it was there already.

    Raises TunesmithError when the place does not take it.
    """
    target, files = section.output, _files(source, section)
    if is_uri(target):
        with _told(target, TunesmithError):
            _publish_uri(files, target, is_folder=bool(section.rows_per_file))
        return True
    path = Path(target)
    is_copy = not section.rows_per_file and _suffix(target) not in (".parquet", ".csv")
    if is_copy and path.is_file() and hash_file(path) == sha256:
        return False
    with _told(target, TunesmithError):
        if section.rows_per_file:
            _publish_folder(files, path)
        elif is_copy:
            with _beside(path) as temporary:
                shutil.copyfile(source, temporary)
                _sync_file(temporary)
                temporary.replace(path)
        else:
            _, write = next(files)
            with _beside(path) as temporary:
                with temporary.open("wb") as file:
                    write(file)
                _sync_file(temporary)
                temporary.replace(path)
    sync(path.parent)
    return True


def _files(source: Path, section: Batch) -> Iterator[tuple[str, Any]]:
    """The names of the output's files, each with the function that writes it, in order."""
    suffix = _suffix(section.output)
    is_table = suffix in (".parquet", ".csv")
    shapes = shape_of_rows(map(json.loads, _lines(source))) if is_table else {}
    rows: Iterator[Any] = map(json.loads, _lines(source)) if is_table else _lines(source)
    size = section.rows_per_file
    number = 0
    while (first := next(rows, None)) is not None or not number:
        head = [] if first is None else [first]
        part = itertools.chain(head, itertools.islice(rows, size - 1) if size else rows)
        yield f"part-{number:05d}{suffix}", _writer(suffix, part, shapes)
        number += 1


def _writer(suffix: str, rows: Iterator[Any], shapes: Mapping[str, Shape]) -> Any:
    def write(file: BinaryIO) -> None:
        if suffix == ".parquet":
            _write_parquet(file, rows, shapes)
        elif suffix == ".csv":
            _write_csv(file, rows, shapes)
        else:
            file.writelines(rows)

    return write


def _write_parquet(
    file: BinaryIO, rows: Iterator[dict[str, Any]], shapes: Mapping[str, Shape]
) -> None:
    arrow, parquet = require("pyarrow", "infer"), require("pyarrow.parquet", "infer")
    schema = arrow_schema(shapes)
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _GROUP_ROWS)):
            columns = {
                name: [fit(row.get(name), shape) for row in group] for name, shape in shapes.items()
            }
            writer.write_table(arrow.Table.from_pydict(columns, schema=schema))


def _write_csv(file: BinaryIO, rows: Iterator[dict[str, Any]], shapes: Mapping[str, Shape]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([clean(name) for name in shapes])
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in shapes])
    text.flush()
    text.detach()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    return to_text(value) if isinstance(value, (bool, list, dict)) else value


def _lines(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        yield from file


def _suffix(target: str) -> str:
    suffix = PurePosixPath(target).suffix
    return suffix if suffix in (".parquet", ".csv") else ".jsonl"


def _publish_folder(files: Iterator[tuple[str, Any]], target: Path) -> None:
    """All files into a folder beside, which then takes the target's place."""
    with _beside(target) as fresh, _beside(target, "old") as old:
        fresh.mkdir()
        for name, write in files:
            with (fresh / name).open("wb") as file:
                write(file)
            _sync_file(fresh / name)
        (fresh / _DONE).touch()
        sync(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)


def _publish_uri(files: Iterator[tuple[str, Any]], target: str, *, is_folder: bool) -> None:
    fs, path = file_system(target)
    if not is_folder:
        _, write = next(files)
        with _beside_uri(fs, path) as temporary:
            with fs.open(temporary, "wb") as file:
                write(file)
            fs.mv(temporary, path)
        return
    if fs.exists(f"{path}/{_DONE}"):
        fs.rm_file(f"{path}/{_DONE}")
    fs.makedirs(path, exist_ok=True)
    written = {_DONE}
    for name, write in files:
        with fs.open(f"{path}/{name}", "wb") as file:
            write(file)
        written.add(name)
    for found in fs.ls(path, detail=False):
        name = PurePosixPath(found).name
        if name.startswith("part-") and name not in written:
            fs.rm_file(found)
    fs.pipe_file(f"{path}/{_DONE}", b"")


@contextmanager
def _beside(target: Path, kind: str = "tmp") -> Iterator[Path]:
    """A name in the target's folder; what has it is gone afterwards unless it was renamed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{kind}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def _beside_uri(fs: Any, path: str) -> Iterator[str]:
    parent, name = fs._parent(path), PurePosixPath(path).name
    temporary = f"{parent}/.{name}.{os.getpid()}.tmp"
    try:
        yield temporary
    finally:
        if fs.exists(temporary):
            fs.rm_file(temporary)


@contextmanager
def _told(target: str, error_type: type[TunesmithError] = UserError) -> Iterator[None]:
    """What a place says against being written to, with what to do about it."""
    try:
        yield
    except OSError as error:
        raise error_type(
            f"batch.output: cannot write to {target}: {error.strerror or error}; make room or give "
            "another place, and run the same command again"
        ) from error


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
