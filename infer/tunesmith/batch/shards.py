"""Results that survive a kill: small files, each written whole, synced and renamed into place."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.ledger.durable import sync

_OFFSET_BITS = 40
_ABSENT = -1
_OPEN_FILES = 64


class Shards:
    """Finished rows of a batch by their position in the input.

    A shard's first line is `{"seconds": …}`, the time since the one before it; each further line
    is `[row, result]`. Memory: 8 bytes a row.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder = folder
        self._places = array("q", [_ABSENT]) * rows
        self.count = 0
        """Rows that have a result."""
        self.seconds = 0.0
        """Time that went into all results, over every attempt."""
        self._files: dict[int, BinaryIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.tmp"):
            left_over.unlink()
        names = sorted(int(path.stem) for path in folder.glob("*.jsonl"))
        self._next = names[-1] + 1 if names else 0
        for name in names:
            self._index(name)

    def __contains__(self, row: int) -> bool:
        return self._places[row] != _ABSENT

    def __getitem__(self, row: int) -> dict[str, Any]:
        shard, offset = divmod(self._places[row], 1 << _OFFSET_BITS)
        file = self._open(shard)
        file.seek(offset)
        result: dict[str, Any] = json.loads(file.readline())[1]
        return result

    def commit(self, results: Sequence[tuple[int, Mapping[str, Any]]], seconds: float) -> None:
        """Make results durable, all or none. Raises OSError when the disk does not take them."""
        path, temporary = self._path(self._next), self._path(self._next).with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(to_line({"seconds": seconds}))
                for row, result in results:
                    file.write(to_line([row, result]))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(self._folder)
        self._index(self._next)
        self._next += 1

    def _index(self, shard: int) -> None:
        with self._path(shard).open("rb") as file:
            head = file.readline()
            self.seconds += json.loads(head)["seconds"]
            offset = len(head)
            for line in file:
                row = int(line[1 : line.index(b",")])
                self.count += row not in self
                self._places[row] = (shard << _OFFSET_BITS) | offset
                offset += len(line)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:08d}.jsonl"

    def close(self) -> None:
        """Close the files that reading has opened."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self.close()
            self._files[shard] = self._path(shard).open("rb")
        return self._files[shard]


def to_line(value: Any) -> bytes:
    """A value as a line of JSON Lines."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only write escaped
        return json.dumps(value).encode() + b"\n"
