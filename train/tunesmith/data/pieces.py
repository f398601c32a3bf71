"""Large text files a piece at a time, where a row can span lines."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_BLOCK_CHARACTERS = 1 << 18
_LONGEST_WORD = 16
"""More than any JSON token other than a string has behind the place that is found wrong."""


class JsonArray:
    """A JSON array of any size, of which a few elements at a time are in memory."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._line, self._column = 1, 0
        """Where the text that is in memory begins."""

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Line and value of each element. Raises JSONDecodeError with its line in the file."""
        try:
            self._skip()
            self._at += 1
            while self._skip() != "]":
                line = self._line + self._text.count("\n", 0, self._at)
                yield line, self._value()
                if self._skip() == ",":
                    self._at += 1
                elif self._skip() != "]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at)
        except json.JSONDecodeError as error:
            error.colno += self._column if error.lineno == 1 else 0
            error.lineno += self._line - 1
            raise

    def _value(self) -> Any:
        self._forget()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Only what is cut off by the end of the text can be mended by more of it.
                is_cut = len(self._text) - error.pos < _LONGEST_WORD or "string" in error.msg
                if not is_cut or not self._more():
                    raise
                continue
            # A number at the very end may have more digits.
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def _skip(self) -> str:
        """Go past white space; returns what comes then."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Twice as much text; False at the end of the file."""
        block = self._file.read(max(_BLOCK_CHARACTERS, len(self._text)))
        self._text += block
        return bool(block)

    def _forget(self) -> None:
        """Let go of what was read."""
        if self._at < _BLOCK_CHARACTERS:
            return
        gone, self._text, self._at = self._text[: self._at], self._text[self._at :], 0
        lines = gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 + (0 if lines else self._column)
        self._line += lines


def first_bad_byte(path: Path) -> int:
    """The place of the first byte that is not UTF-8."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_CHARACTERS):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            read += len(block)
    return read


class Lines:
    """The lines of a file, of which those after the first of a record can be given back."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._waiting: deque[str] = deque()
        self._taken: list[str] = []
        self._number = 0
        """Lines taken so far."""

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._file)
        self._taken.append(line)
        self._number += 1
        return line

    def begin(self) -> int | None:
        """The number of the line with which the next record begins; None at the end."""
        self._taken = []
        if not self._waiting and (line := self._file.readline()):
            self._waiting.append(line)
        return self._number + 1 if self._waiting else None

    def give_back(self) -> bool:
        """A quote that is never closed swallows the lines after it: begin again with them."""
        swallowed = self._taken[1:]
        self._waiting.extendleft(reversed(swallowed))
        self._number -= len(swallowed)
        return bool(swallowed)
