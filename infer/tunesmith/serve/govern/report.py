"""Who used what: sums over the request log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from tunesmith.config import UserError, require
from tunesmith.serve.govern.archive import read_log
from tunesmith.serve.govern.limits import NANO
from tunesmith.terminal import make_table

_COLUMNS = {
    "key": ["key_id", "key_name"],
    "group": ["group"],
    "model": ["model"],
    "artifact": ["artifact"],
    "route": ["route"],
    "arm": ["route", "arm", "version"],
    "experiment": ["purpose", "experiment"],
    "status": ["status", "ending"],
    "day": ["day"],
}
_SUMS = ("prompt_tokens", "cached_tokens", "output_tokens", "nano_usd")


def usage(engine: Engine, folder: Path, by: str, since_s: float) -> dict[str, Any]:
    """Requests, tokens and USD since a moment, for each value of `by`, dearest first.

    Raises UserError when the log cannot be divided that way.
    """
    if by not in _COLUMNS:
        raise UserError(f"--by {by}: the log can be divided by {', '.join(_COLUMNS)}")
    names = _COLUMNS[by]
    stored = [name for name in names if name != "day"]
    table = read_log(engine, folder, [*stored, *_SUMS], since_s)
    if by == "day":
        compute = require("pyarrow.compute", "infer")
        moments = compute.cast(compute.floor(table["at_s"]), "int64").cast("timestamp[s]")
        table = table.append_column("day", compute.strftime(moments, format="%Y-%m-%d"))
    sums = table.group_by(names).aggregate([("seq", "count"), *((name, "sum") for name in _SUMS)])
    lines = [
        {
            **{name: line[name] for name in names},
            "requests": line["seq_count"],
            **{name: line[f"{name}_sum"] or 0 for name in _SUMS[:-1]},
            "usd": None if line["nano_usd_sum"] is None else line["nano_usd_sum"] / NANO,
        }
        for line in sums.to_pylist()
    ]
    lines.sort(key=lambda line: (-(line["usd"] or 0.0), -line["requests"]))
    return {"by": by, "lines": lines}


def show(result: dict[str, Any]) -> Any:
    """One row for each value."""
    names = _COLUMNS[result["by"]]
    rows = [
        (
            " ".join(str(line[name]) for name in names if line[name] is not None) or "none",
            f"{line['requests']:,}",
            f"{line['prompt_tokens']:,}",
            f"{line['cached_tokens']:,}",
            f"{line['output_tokens']:,}",
            "no price" if line["usd"] is None else f"{line['usd']:,.6f}",
        )
        for line in result["lines"]
    ]
    columns = (result["by"], "requests", "prompt tokens", "of them cached", "output tokens", "USD")
    return make_table("Usage", columns, rows)
