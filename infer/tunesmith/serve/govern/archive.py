"""Old lines of the request log as Parquet files, and all lines of it as one table.

    python -m tunesmith.serve.govern.archive STORE ROWS

moves what there is, in files of so many lines: a process of its own, so that the gateway neither
waits for that nor has the memory for it.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from tunesmith.config import require
from tunesmith.ledger.durable import sync
from tunesmith.serve.govern.database import open_gateway, requests

_FOLDER = "requests"
_LOCK = "requests.lock"
_LINES_AT_ONCE = 2_000
"""What is in memory, and the longest that writers of the log wait for."""

_ASKED = "request"
"""The purpose of what clients asked themselves."""


def archive(engine: Engine, folder: Path, rows: int) -> int:
    """Move the oldest lines into a file of their own; returns how many.

    The file is whole and on disk before a line leaves the database. After a kill between the two
    the lines are in both, and leave the database the next time.
    """
    parts = folder / _FOLDER
    parts.mkdir(exist_ok=True)
    with _alone(folder):
        _drop(engine, _last(_files(folder)))
        temporary = parts / "next.tmp"
        seqs = _write(engine, temporary, rows)
        if not seqs:
            return 0
        temporary.rename(parts / f"{seqs[0]:012d}-{seqs[-1]:012d}.parquet")
        sync(parts)
        _drop(engine, seqs[-1])
    return len(seqs)


def _write(engine: Engine, path: Path, rows: int) -> list[int]:
    """The oldest lines into a file, which is on disk then; returns their numbers."""
    parquet = require("pyarrow.parquet", "infer")
    query = sa.select(requests).order_by(requests.c.seq).limit(rows)
    seqs: list[int] = []
    with path.open("wb") as file:
        with (
            engine.connect().execution_options(yield_per=_LINES_AT_ONCE) as db,
            parquet.ParquetWriter(file, _table([]).schema) as writer,
        ):
            for part in db.execute(query).mappings().partitions():
                lines = [dict(row) for row in part]
                seqs += [line["seq"] for line in lines]
                writer.write_table(_table(lines))
        file.flush()
        os.fsync(file.fileno())
    return seqs


def _drop(engine: Engine, last: int) -> None:
    """Let the lines up to this one leave the database, a few at a time: others write there too."""
    with engine.connect() as db:
        first = db.scalar(sa.select(sa.func.min(requests.c.seq))) or last + 1
    for start in range(first, last + 1, _LINES_AT_ONCE):
        end = min(last, start + _LINES_AT_ONCE - 1)
        with engine.begin() as db:
            db.execute(requests.delete().where(requests.c.seq <= end))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time: that of a gateway which was killed may still be at work."""
    with (folder / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def count_lines(engine: Engine) -> int:
    """Lines that are in the database."""
    with engine.connect() as db:
        return db.scalar(sa.select(sa.func.count()).select_from(requests)) or 0


def read_log(engine: Engine, folder: Path, columns: list[str], since_s: float = 0.0) -> Any:
    """Lines from `since_s` on as a `pyarrow.Table`, oldest first, each once."""
    pyarrow = require("pyarrow", "infer")
    compute = require("pyarrow.compute", "infer")
    wanted = list(dict.fromkeys(("seq", "at_s", *columns)))
    parquet = require("pyarrow.parquet", "infer")
    files, lines = _both(engine, folder, sa.select(*(requests.c[name] for name in wanted)))
    parts = [
        # Files keep the columns that the log had when they were written.
        parquet.read_table(path, columns=[*({*wanted} & {*parquet.read_schema(path).names})])
        for path in files
    ]
    parts.append(_table(lines).select(wanted))
    whole = pyarrow.concat_tables(parts, promote_options="default").select(wanted)
    return whole.filter(compute.greater_equal(whole["at_s"], since_s))


def find_line(
    engine: Engine, folder: Path, answer_id: str, key_id: str | None
) -> dict[str, Any] | None:
    """The newest line of an answer or request by its id, of one key or (None) of any."""
    names = ("seq", "request_id", "response_id", "model", "artifact")
    query = (
        sa.select(*(requests.c[name] for name in names), requests.c.response_body.is_not(None))
        .where(sa.or_(requests.c.response_id == answer_id, requests.c.request_id == answer_id))
        .where(sa.true() if key_id is None else requests.c.key_id == key_id)
        .where(sa.func.coalesce(requests.c.purpose, _ASKED) == _ASKED)
        .order_by(requests.c.seq.desc())
    )
    with engine.connect() as db:
        if found := db.execute(query.limit(1)).first():
            return dict(zip((*names, "has_payload"), found, strict=True))
    parquet = require("pyarrow.parquet", "infer")
    for path in reversed(_files(folder)):
        is_it = [[("response_id", "==", answer_id)], [("request_id", "==", answer_id)]]
        columns = {*names, "key_id", "response_body", "purpose"}
        columns &= {*parquet.read_schema(path).names}
        table = parquet.read_table(path, columns=[*columns], filters=is_it)
        for line in reversed(table.to_pylist()):
            is_asked = (line.get("purpose") or _ASKED) == _ASKED
            if is_asked and key_id in (None, line["key_id"]):
                return {**line, "has_payload": line["response_body"] is not None}
    return None


def read_lines(engine: Engine, folder: Path, seqs: set[int]) -> list[dict[str, Any]]:
    """Whole lines by their numbers, oldest first."""
    parquet = require("pyarrow.parquet", "infer")
    if not seqs:
        return []
    wanted = sorted(seqs)
    parts = [wanted[at : at + _LINES_AT_ONCE] for at in range(0, len(wanted), _LINES_AT_ONCE)]
    asked = [sa.select(requests).where(requests.c.seq.in_(part)) for part in parts]
    files, found = _both(engine, folder, *asked)
    for path in files:
        found += parquet.read_table(path, filters=[("seq", "in", seqs)]).to_pylist()
    return sorted(found, key=lambda line: line["seq"])


def _both(
    engine: Engine, folder: Path, *asked: sa.Select[Any]
) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files, and the lines that are in none of them, of one moment: others archive meanwhile,
    and lines leave the database once their file is there."""
    while True:
        files = _files(folder)
        with engine.connect() as db:
            lines = [
                dict(row)
                for query in asked
                for row in db.execute(query.where(requests.c.seq > _last(files))).mappings()
            ]
        if _files(folder) == files:
            return files, lines


def _files(folder: Path) -> list[Path]:
    return sorted((folder / _FOLDER).glob("*.parquet"))


def _last(files: list[Path]) -> int:
    """The last line that is in a file; 0 when none is."""
    return int(files[-1].stem.partition("-")[2]) if files else 0


def _table(lines: list[dict[str, Any]]) -> Any:
    pyarrow = require("pyarrow", "infer")
    kinds = {
        sa.Integer: pyarrow.int64(),
        sa.BigInteger: pyarrow.int64(),
        sa.Float: pyarrow.float64(),
        sa.Boolean: pyarrow.bool_(),
    }
    names = list(lines[0]) if lines else [column.name for column in requests.columns]
    schema = pyarrow.schema(
        [(name, kinds.get(type(requests.c[name].type), pyarrow.string())) for name in names]
    )
    return pyarrow.Table.from_pylist(lines, schema=schema)


def _main(store: Path, rows: int) -> None:
    engine = open_gateway(store)
    try:
        while count_lines(engine) >= rows:
            archive(engine, store / "serve", rows)
    except (DBAPIError, OSError) as error:
        sys.exit(str(error.orig if isinstance(error, DBAPIError) else error))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
