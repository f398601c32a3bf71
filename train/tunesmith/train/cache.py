"""Tokenised rows kept in the store: found again only while nothing that made them has changed.

STORE/cache/tokens-<key>/   files of TokenRows, and `counts.json`, touched when they are used

Past 20 GiB what was not used for the longest time is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tunesmith.chat
from tunesmith.ledger.durable import sync_tree
from tunesmith.train.examples import Examples
from tunesmith.train.tokens import TokenRows, TokenWriter

_COUNTS_FILE = "counts.json"
_LARGEST_CACHE_BYTES = 20 * 2**30
_COUNTS = ("read", "kept", "truncated", "dropped", "too_long", "faults")
_LIBRARIES = ("jinja2", "tokenizers", "transformers")
_CODE = (Path(tunesmith.chat.__file__).parent, Path(__file__).parent)
_FILES = ("examples.py", "language.py", "tokens.py", "workers.py")


def cached(
    folder: Path, identity: Mapping[str, Any], make: Callable[[TokenWriter], Examples]
) -> Examples:
    """What `make` writes, from the cache if it was made before for the same identity, by the same
    code and versions of libraries.

    Several processes may ask at once: one makes it, the others wait. A killed one leaves nothing
    that could be found. Everything in the folder can be deleted at any time.
    """
    whole = {**identity, "code": code_sha256(), "versions": {n: version(n) for n in _LIBRARIES}}
    key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]
    place = folder / f"tokens-{key}"
    if found := _open(place):
        return found
    folder.mkdir(exist_ok=True)
    with (folder / f"tokens-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _open(place):
            return found
        _make(place, make)
    _drop_oldest(folder, keep=place)
    found = _open(place)
    assert found, "it was just written"
    return found


@cache
def code_sha256() -> str:
    """Hash of the modules that turn a row into tokens."""
    chat, train = _CODE
    whole = hashlib.sha256()
    for path in [*sorted(chat.glob("*.py")), *(train / name for name in _FILES)]:
        whole.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _make(place: Path, make: Callable[[TokenWriter], Examples]) -> None:
    aside = place.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with contextlib.closing(TokenWriter(aside)) as writer:
            examples = make(writer)
        counts = {name: getattr(examples, name) for name in _COUNTS}
        (aside / _COUNTS_FILE).write_text(json.dumps(counts), encoding="utf-8")
        sync_tree(aside)
        # What stands here could not be opened.
        shutil.rmtree(place, ignore_errors=True)
        os.rename(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _drop_oldest(folder: Path, keep: Path) -> None:
    """Drop what was used longest ago while the cache is too large. Who has it open keeps it: the
    system frees a file once nobody maps it."""
    found = []
    for counts in folder.glob(f"tokens-*/{_COUNTS_FILE}"):
        with contextlib.suppress(FileNotFoundError):  # another process dropped it
            size = sum(path.stat().st_size for path in counts.parent.iterdir())
            found.append((counts.stat().st_mtime_ns, size, counts.parent))
    total = sum(size for _, size, _ in found)
    for _, size, place in sorted(found):
        if total <= _LARGEST_CACHE_BYTES:
            return
        if place != keep:
            shutil.rmtree(place, ignore_errors=True)
            total -= size


def _open(place: Path) -> Examples | None:
    """None when it is not there or damaged."""
    with contextlib.suppress(OSError):
        os.utime(place / _COUNTS_FILE)
    try:
        counts = json.loads((place / _COUNTS_FILE).read_text(encoding="utf-8"))
        return Examples(TokenRows(place), **counts)
    except (OSError, ValueError, TypeError):
        return None
