"""Results that survive a kill: small files, each written whole, synced and renamed into place."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.config import UserError
from tunesmith.ledger.durable import sync, write_synced

_OFFSET_BITS = 40
_ABSENT = -1
_OPEN_FILES = 64
_OWNER = "owner.json"
_HANDED = "handed"
_DIGITS = 20
# How the results begin that are told apart without reading the whole of them.
_DIGEST = b'{"digest": "'
_SAME = b'{"same_as": '


class Shards:
    """Finished rows of a batch by their position in the input.

    A shard's first line is `{"seconds": …, "restarts": …}` since the one before it; each further
    line is `[row, result]`. Memory: 8 bytes a row.
    """

    def __init__(self, folder: Path, rows: int, owner: Mapping[str, Any] | None = None) -> None:
        """`owner` is what the rows belong to. Raises UserError when the folder has others."""
        self.folder = folder
        self._places = array("q", [_ABSENT]) * rows
        self.count = 0
        """Rows that have a result."""
        self.repeated = 0
        """Those of them that have the result of an earlier row."""
        self.computed = 0
        """Those that an engine was asked for."""
        self.seconds = 0.0
        """Time that went into all results, over every attempt."""
        self.restarts = 0
        """Engines that died and were started again, over every attempt."""
        self._files: dict[int, BinaryIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.tmp"):
            left_over.unlink()
        if owner is not None:
            _check_owner(folder / _OWNER, owner)
        names = sorted(int(path.stem) for path in folder.glob("*.jsonl"))
        self._next = names[-1] + 1 if names else 0
        for name in names:
            self._index(name)
        self._handed_file = os.open(folder / _HANDED, os.O_RDWR | os.O_CREAT, 0o644)
        self._handed_before = int(os.pread(self._handed_file, _DIGITS, 0) or 0)
        self.handed = self._handed_before
        """Requests given to engines, each time that they were, over every attempt."""

    def __contains__(self, row: int) -> bool:
        return self._places[row] != _ABSENT

    def __getitem__(self, row: int) -> dict[str, Any]:
        result = self._read(row)
        if "same_as" in result:
            result = self._read(result["same_as"]) | result
        result.pop("digest", None)
        return result

    def digests(self) -> Iterator[tuple[int, str]]:
        """Each row that an engine was asked for, with the digest of its request."""
        for shard in range(self._next):
            if self._path(shard).exists():
                with self._path(shard).open("rb") as file:
                    file.readline()
                    for line in file:
                        row, _, result = line[1:].partition(b", ")
                        if result.startswith(_DIGEST):
                            digest, _, _ = result[len(_DIGEST) :].partition(b'"')
                            yield int(row), digest.decode()

    def note_handed(self, handed: int) -> None:
        """Say how many requests this attempt has given to engines. A kill does not undo it."""
        self.handed = self._handed_before + handed
        os.pwrite(self._handed_file, b"%0*d" % (_DIGITS, self.handed), 0)

    def commit(
        self, results: Sequence[tuple[int, Mapping[str, Any]]], seconds: float, restarts: int = 0
    ) -> None:
        """Make results durable, all or none. Raises OSError when the disk does not take them."""
        path, temporary = self._path(self._next), self._path(self._next).with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(to_line({"seconds": seconds, "restarts": restarts}))
                for row, result in results:
                    file.write(to_line([row, result]))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        sync(self.folder)
        self._index(self._next)
        self._next += 1

    def _index(self, shard: int) -> None:
        with self._path(shard).open("rb") as file:
            line = file.readline()
            head, offset = json.loads(line), len(line)
            self.seconds += head["seconds"]
            self.restarts += head["restarts"]
            for line in file:
                row, _, result = line[1:].partition(b", ")
                if int(row) not in self:
                    self.count += 1
                    self.repeated += result.startswith(_SAME)
                    self.computed += result.startswith(_DIGEST)
                self._places[int(row)] = (shard << _OFFSET_BITS) | offset
                offset += len(line)

    def _read(self, row: int) -> dict[str, Any]:
        shard, offset = divmod(self._places[row], 1 << _OFFSET_BITS)
        file = self._open(shard)
        file.seek(offset)
        result: dict[str, Any] = json.loads(file.readline())[1]
        return result

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:08d}.jsonl"

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


def count_finished(folder: Path) -> int:
    """Rows in all shards of a folder that may be nobody's by now."""
    found = 0
    for path in folder.glob("*.jsonl"):
        with path.open("rb") as file:
            found += sum(1 for _ in file) - 1
    return found


def _check_owner(path: Path, owner: Mapping[str, Any]) -> None:
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        write_synced(temporary, json.dumps(owner, indent=1))
        temporary.rename(path)
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != owner:
        changed = [name for name in owner if owner[name] != found.get(name)]
        raise UserError(
            f"{path.parent} has results of another job: {', '.join(changed)} differs; they are not "
            "mixed: move that folder away, or put the recipe back"
        )


def to_line(value: Any) -> bytes:
    """A value as a line of JSON Lines."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only write escaped
        return json.dumps(value).encode() + b"\n"
