"""Which rows are held out and which are used: decided by content alone, never by position."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keyed:
    """A row and the SHA-256 of its content."""

    key: str
    row: dict[str, Any]

    @classmethod
    def of(cls, row: dict[str, Any]) -> Keyed:
        text = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return cls(hashlib.sha256(text.encode()).hexdigest(), row)

    @property
    def place(self) -> float:
        """Where in [0, 1) the row falls."""
        return int(self.key[:16], 16) / 2**64


def hold_out(rows: Sequence[Keyed], fraction: float) -> tuple[list[Keyed], list[Keyed]]:
    """Training and evaluation rows: those whose place is below `fraction` are held out. Equal rows
    are always on the same side, and each side gets a row as soon as two are different."""
    keys = [row.key for row in rows]
    lowest, highest = min(keys), max(keys)
    train: list[Keyed] = []
    evaluation: list[Keyed] = []
    for row in rows:
        is_held_out = row.key != highest and (row.place < fraction or row.key == lowest)
        (evaluation if is_held_out else train).append(row)
    return train, evaluation


def choose(rows: Sequence[Keyed], limit: int | None, seed: int) -> list[Keyed]:
    """`limit` of the rows in their order, the same ones for a seed however they are ordered."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    numbered = [(_draw(seed, name), at) for at, name in enumerate(identify(rows))]
    return [rows[at] for at in sorted(at for _, at in heapq.nsmallest(limit, numbered))]


def identify(rows: Iterable[Keyed]) -> list[str]:
    """A stable, unique id for each row: of its content, and of how often it came before."""
    seen: Counter[str] = Counter()
    ids = []
    for row in rows:
        seen[row.key] += 1
        count = seen[row.key]
        ids.append(row.key[:16] if count == 1 else f"{row.key[:16]}-{count}")
    return ids


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
