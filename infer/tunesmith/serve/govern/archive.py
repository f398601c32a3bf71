"""Old lines of the request log as Parquet files, and all lines of it as one table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tunesmith.config import require
from tunesmith.ledger.durable import sync
from tunesmith.serve.govern.database import requests

_FOLDER = "requests"


def archive(engine: Engine, folder: Path, rows: int) -> int:
    """Move the oldest lines into a file of their own; returns how many.

    The file is whole and on disk before a line leaves the database. After a kill between the two
    the lines are in both, and leave the database the next time.
    """
    with engine.begin() as db:
        db.execute(requests.delete().where(requests.c.seq <= _archived(folder)))
        found = db.execute(sa.select(requests).order_by(requests.c.seq).limit(rows)).mappings()
        lines = [dict(row) for row in found]
    if not lines:
        return 0
    first, last = lines[0]["seq"], lines[-1]["seq"]
    target = folder / _FOLDER / f"{first:012d}-{last:012d}.parquet"
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_suffix(".tmp")
    require("pyarrow.parquet", "infer").write_table(_table(lines), temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(target)
    sync(target.parent)
    with engine.begin() as db:
        db.execute(requests.delete().where(requests.c.seq <= last))
    return len(lines)


def read_log(engine: Engine, folder: Path, columns: list[str], since_s: float = 0.0) -> Any:
    """Lines from `since_s` on as a `pyarrow.Table`, oldest first, each once."""
    pyarrow = require("pyarrow", "infer")
    compute = require("pyarrow.compute", "infer")
    wanted = list(dict.fromkeys(("seq", "at_s", *columns)))
    parquet = require("pyarrow.parquet", "infer")
    parts = [
        # Files keep the columns that the log had when they were written.
        parquet.read_table(path, columns=[*({*wanted} & {*parquet.read_schema(path).names})])
        for path in _files(folder)
    ]
    query = sa.select(*(requests.c[name] for name in wanted)).where(
        requests.c.seq > _archived(folder)
    )
    with engine.connect() as db:
        parts.append(_table([dict(row) for row in db.execute(query).mappings()]).select(wanted))
    whole = pyarrow.concat_tables(parts, promote_options="default").select(wanted)
    return whole.filter(compute.greater_equal(whole["at_s"], since_s))


def _files(folder: Path) -> list[Path]:
    return sorted((folder / _FOLDER).glob("*.parquet"))


def _archived(folder: Path) -> int:
    """The last line that is in a file; 0 when none is."""
    files = _files(folder)
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
