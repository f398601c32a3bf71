"""Digests of what a recipe reads from outside the store, so that ids are known before any work."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

from tunesmith.config.errors import DataError, ModelError, require
from tunesmith.config.schema.data import Data
from tunesmith.ledger import Store, hash_file

BUILTIN_DATA = "builtin/stdlib"
BUILTIN_BASE = "builtin/tiny-llama"
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def is_file_source(source: str) -> bool:
    """Whether a data source names a file: by its ending or by being there."""
    return source.endswith(FILE_SUFFIXES) or Path(source).is_file()


def source_names(data: Data) -> list[str]:
    """Under what a dataset's manifest has the digest of each training source."""
    if isinstance(data.train, str):
        return ["train"]
    return [f"train.{at}" for at in range(len(data.train))]


def digest_data(store: Store, source: str, revision: str | None) -> str:
    """SHA-256 (or a commit) that changes whenever the rows could.

    Raises DataError when the source is missing.
    """
    if source == BUILTIN_DATA:
        return _digest_stdlib()
    if source.startswith("builtin/"):
        raise DataError(f"{source}: no such builtin data; there is {BUILTIN_DATA}")
    path = Path(source)
    if is_file_source(source):
        if not path.is_file():
            raise DataError(f"{source}: no such file (relative to {Path.cwd()})")
        return store.digest(path)
    if path.exists() or source.startswith((".", "/")):
        raise DataError(
            f"{source}: not a {', '.join(FILE_SUFFIXES)} file; give one, or a hub data set id"
        )
    return f"{source}@{hub_commit(source, revision, 'dataset')}"


def stdlib_files() -> list[Path]:
    """The Python files of the running interpreter's standard library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "idlelib"}
    return sorted(
        path
        for path in root.rglob("*.py")
        if not left_out.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    )


def _digest_stdlib() -> str:
    whole = hashlib.sha256(f"python {sys.version_info[:3]}\n".encode())
    for path in stdlib_files():
        whole.update(f"{path.name} {hash_file(path)}\n".encode())
    return whole.hexdigest()


def hub_commit(repository: str, revision: str | None, kind: str) -> str:
    """The commit that a hub id stands for: asked of the hub, else of the local cache."""
    hub = require("huggingface_hub", "train")
    error_type = DataError if kind == "dataset" else ModelError
    try:
        info = hub.HfApi().repo_info(repository, revision=revision, repo_type=kind)
        return str(info.sha)
    except Exception as error:
        try:
            folder = hub.snapshot_download(
                repository, revision=revision, repo_type=kind, local_files_only=True
            )
            return Path(folder).name
        except Exception:
            raise error_type(
                f"{repository}: neither a local path nor a {kind} that the hub or its cache has "
                f"({type(error).__name__})"
            ) from error
