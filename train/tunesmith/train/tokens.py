"""Token ids of many sequences in files that are mapped into memory: a row is read when it is used.

FOLDER/ids.bin         int32, all sequences one after the other
FOLDER/learnt.bin      one byte per token
FOLDER/ends.bin        int64, where each sequence ends, after a 0
FOLDER/supervised.bin  int64, learnt tokens of each sequence
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """One sequence, cut after the last token from which anything is learnt."""

    input_ids: NDArray[np.int32]

    learnt: NDArray[np.bool_]
    """True where the token is a target; never at the first token, which nothing predicts."""


class TokenWriter:
    """Writes sequences one by one, and holds nothing but their lengths."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = (folder / "ids.bin").open("wb")
        self._learnt = (folder / "learnt.bin").open("wb")
        self._ends, self._supervised = array("q", [0]), array("q")

    def append(self, example: Example) -> None:
        """Keep one."""
        self._ids.write(example.input_ids.tobytes())
        self._learnt.write(example.learnt.tobytes())
        self._ends.append(self._ends[-1] + len(example.input_ids))
        self._supervised.append(int(example.learnt.sum()))

    def close(self) -> None:
        """Make the files whole."""
        self._ids.close()
        self._learnt.close()
        for name, numbers in (("ends.bin", self._ends), ("supervised.bin", self._supervised)):
            (self._folder / name).write_bytes(numbers.tobytes())


class TokenRows(Sequence[Example]):
    """What a TokenWriter wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError or ValueError when a file is missing or not as long as it was."""
        self._ends = np.fromfile(folder / "ends.bin", dtype=np.int64)
        self.supervised = np.fromfile(folder / "supervised.bin", dtype=np.int64)
        """Learnt tokens of each sequence."""

        # Plain arrays over the mapping: numpy's own class makes each slice a slow object.
        self._ids = np.asarray(np.memmap(folder / "ids.bin", np.int32, "r"))
        self._learnt = np.asarray(np.memmap(folder / "learnt.bin", np.bool_, "r"))
        sizes = {len(self._ids), len(self._learnt), int(self._ends[-1])}
        if len(sizes) > 1 or len(self._ends) != len(self.supervised) + 1:
            raise ValueError(f"{folder}: its files do not belong together")

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self._ends)

    @property
    def largest_id(self) -> int:
        """The highest token id in any sequence."""
        return int(self._ids.max())

    def used_ids(self) -> NDArray[np.int64]:
        """The token ids that occur, each once."""
        return np.flatnonzero(np.bincount(self._ids))

    def __len__(self) -> int:
        return len(self.supervised)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start, end = int(self._ends[at]), int(self._ends[at + 1])
        return Example(self._ids[start:end], self._learnt[start:end])

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))
