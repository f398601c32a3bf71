"""Which rows are held out and which are used: decided by content alone, never by position.

Rows are known here by their keys, an array of digests, so that data larger than memory
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
"""One digest of 16 bytes per row (dtype `S16`)."""

Indices = NDArray[np.int64]

_BLOCK_ROWS = 1 << 16


def key_of(row: dict[str, Any]) -> bytes:
    """The first half of the SHA-256 of a row's content."""
    text = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]


def hold_out(keys: Keys, fraction: float) -> NDArray[np.bool_]:
    """Whether each row is held out: where its key's place in [0, 1) is below `fraction`. Equal rows
    are always on the same side, and each side gets a row as soon as two are different."""
    heads = keys.view(">u8").reshape(-1, 2)[:, 0]
    lowest = min(keys[heads == heads.min()].tolist())
    highest = max(keys[heads == heads.max()].tolist())
    held_out: NDArray[np.bool_] = (heads / 2.0**64 < fraction) | (keys == lowest)
    held_out &= keys != highest
    return held_out


def choose(keys: Keys, limit: int, seed: int, purpose: str = "") -> Indices:
    """Indices of `limit` of the rows in their order, the same rows for a seed however they are
    ordered; all when they are fewer. Choices for different purposes do not depend on each other."""
    if not limit or len(keys) <= limit:
        return np.arange(min(limit, len(keys)))
    draws = bytearray()
    for name in identify(keys):
        draws += hashlib.sha256(f"{seed}{purpose} {name}".encode()).digest()[:16]
    return np.sort(np.argsort(np.frombuffer(draws, "S16"), kind="stable")[:limit])


def identify(keys: Keys) -> Iterator[str]:
    """A stable, unique id for each row: of its content, and of how often it came before."""
    occurrences = _occurrences(keys)
    for start in range(0, len(keys), _BLOCK_ROWS):
        digests = keys[start : start + _BLOCK_ROWS].tobytes()
        for at, before in enumerate(occurrences[start : start + _BLOCK_ROWS].tolist()):
            name = digests[16 * at : 16 * at + 8].hex()
            yield f"{name}-{before + 1}" if before else name


def count_distinct(keys: Keys) -> int:
    """How many different rows there are."""
    ordered = np.sort(keys)
    return int((ordered[1:] != ordered[:-1]).sum()) + min(1, len(keys))


def count_among(keys: NDArray[Any], others: NDArray[Any]) -> int:
    """How many of the keys are also among others."""
    if not len(others):
        return 0
    ordered, found = np.sort(others), 0
    for start in range(0, len(keys), _BLOCK_ROWS):
        block = keys[start : start + _BLOCK_ROWS]
        at = np.minimum(np.searchsorted(ordered, block), len(ordered) - 1)
        found += int((ordered[at] == block).sum())
    return found


def _occurrences(keys: Keys) -> NDArray[np.int32]:
    """How many rows before each one are equal to it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    del ordered
    firsts, repeated = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    found = np.zeros(len(keys), dtype=np.int32)
    found[order[repeated]] = repeated - firsts[np.searchsorted(firsts, repeated, "right") - 1]
    return found
