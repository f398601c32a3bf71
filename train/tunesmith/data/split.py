"""Which rows are held out and which are used: decided by content alone, never by position.

Rows are known here by their keys, an array of SHA-256 digests, so that data larger than memory
can be split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.bytes_]
"""One digest of 32 bytes per row (dtype `S32`)."""

Indices = NDArray[np.int64]


def key_of(row: dict[str, Any]) -> bytes:
    """SHA-256 of a row's content."""
    text = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def hold_out(keys: Keys, fraction: float) -> NDArray[np.bool_]:
    """Whether each row is held out: where its key's place in [0, 1) is below `fraction`. Equal rows
    are always on the same side, and each side gets a row as soon as two are different."""
    places = _head(keys).astype(np.float64) / 2.0**64
    ordered = np.sort(keys)
    held_out: NDArray[np.bool_] = (keys != ordered[-1]) & (
        (places < fraction) | (keys == ordered[0])
    )
    return held_out


def choose(keys: Keys, limit: int, seed: int) -> Indices:
    """Indices of `limit` of the rows in their order, the same rows for a seed however they are
    ordered; all when they are fewer."""
    if not limit or len(keys) <= limit:
        return np.arange(min(limit, len(keys)))
    draws = bytearray()
    for name in identify(keys):
        draws += hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.sort(np.argsort(np.frombuffer(draws, "S32"), kind="stable")[:limit])


def identify(keys: Keys) -> Iterator[str]:
    """A stable, unique id for each row: of its content, and of how often it came before."""
    digests = np.ascontiguousarray(keys).tobytes()
    for at, before in enumerate(_occurrences(keys).tolist()):
        name = digests[32 * at : 32 * at + 8].hex()
        yield f"{name}-{before + 1}" if before else name


def count_distinct(keys: Keys) -> int:
    """How many different rows there are."""
    return len(np.unique(keys))


def _head(keys: Keys) -> NDArray[np.uint64]:
    """The first eight bytes of each key, as a number."""
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, 4)[:, 0]


def _occurrences(keys: Keys) -> Indices:
    """How many rows before each one are equal to it."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    found = np.empty(len(keys), dtype=np.int64)
    found[order] = np.arange(len(keys)) - starts
    return found
