"""What of the `bench` section decides a measurement, mode by mode. Pure but for the digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config import UserError
from tunesmith.config.schema.bench import Bench
from tunesmith.ledger import Store

# Keys that are read after the measurement, and those that only some modes read.
_VIEWS = {"api_price", "requests_per_hour", "lifetime_requests", "most_loss"}
_READ = {
    "sweep": {"rates", "concurrencies", "search_s", "search_tolerance"},
    "settings": {"settings", "search_s"},
    "frontier": {"variants", "engines"},
}
_SOME = set().union(*_READ.values())
NOT_LOAD = _VIEWS | _SOME | {"slo", "rounds"}
"""Keys in which two measurements of the same load may differ."""


def bench_section(bench: Bench, mode: str) -> dict[str, Any]:
    """The keys that `mode` measures by."""
    return bench.model_dump(mode="json", exclude=_VIEWS | _SOME - _READ.get(mode, set()))


def bench_inputs(store: Store, bench: Bench) -> dict[str, str]:
    """Digests of the files that a load is replayed from. Raises UserError when one is missing."""
    found: dict[str, str] = {}
    for key, path in {"trace": bench.trace, "log": bench.log}.items():
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"bench.{key}: no such file: {path}")
        found |= {f"{key}.{file.name}": store.digest(file) for file in log_files(path)}
    return found


def log_files(path: Path) -> list[Path]:
    """A file itself, or the Parquet files of a folder, oldest first."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]
