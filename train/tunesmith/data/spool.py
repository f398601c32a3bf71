"""Rows on disk while it is decided what becomes of them; memory holds about 125 bytes of each."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.messages import Row
from tunesmith.data.split import Indices, Keys, identify, key_of


class Spool:
    """Rows in the order in which they were read, each with the figures that decide about it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._keys, self._prompts = bytearray(), bytearray()
        self._ends, self._characters = array("q", [0]), array("I")

    def __len__(self) -> int:
        return len(self._characters)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        """Keep a row."""
        # ASCII, because many readers also break lines at U+2028 and its kin.
        line = json.dumps(row).encode()
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))
        self._keys += key_of(row)
        self._prompts += hashlib.sha256(_prompt(row).encode()).digest()[:8]
        self._characters.append(_characters(row))

    @property
    def keys(self) -> Keys:
        """What identifies each row."""
        return np.frombuffer(self._keys, dtype="S16")

    @property
    def prompts(self) -> NDArray[np.int64]:
        """A hash of what each row asks, without its last answer."""
        return np.frombuffer(self._prompts, dtype=np.int64)

    @property
    def characters(self) -> NDArray[np.uint32]:
        """Length of each row's texts."""
        return np.frombuffer(self._characters, dtype=np.uint32)

    def write(self, path: Path, rows: Indices) -> None:
        """Write rows as JSONL, each with its id; a row that is named twice gets two ids."""
        self._file.flush()
        with path.open("wb") as file:
            for name, at in zip(identify(self.keys[rows]), rows.tolist(), strict=True):
                start, end = self._ends[at : at + 2]
                # Not mapped into memory, where every page once read would count as the process's.
                line = os.pread(self._file.fileno(), end - start, start)
                # The row's own object, with the id put in front.
                file.write(b'{"id": "%s", %s\n' % (name.encode(), line[1:]))


def _prompt(row: Row) -> str:
    if "text" in row:
        return str(row["text"])
    return json.dumps(row["messages"][: row.get("prompt_turns", -1)], sort_keys=True)


def _characters(row: Row) -> int:
    turns = [*row.get("messages", ()), *row.get("rejected", ())]
    return sum(len(turn["content"]) for turn in turns) + len(row.get("text", ""))
