"""JSON Lines and CSV: a line that is wrong is an error of its own and no other's."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from tunesmith.batch.errors import Invalid, RowError, quote
from tunesmith.batch.sources.record import Record
from tunesmith.config import DataError

_BOM = b"\xef\xbb\xbf"
# A quote that is never closed must not read the whole file into one cell.
_LONGEST_RECORD_BYTES = 1 << 20


def read_jsonl(lines: Iterable[bytes]) -> Iterator[Record]:
    """One record for each line that is not white space."""
    for number, raw in enumerate(lines, 1):
        raw = raw.removeprefix(_BOM) if number == 1 else raw
        if not raw.strip():
            continue
        try:
            yield Record(number, parse_object(raw))
        except Invalid as invalid:
            yield Record(number, invalid.error)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A line as a JSON object. Raises Invalid when it is none."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Invalid("malformed_line", f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Invalid("malformed_line", f"not JSON: {error or 'nested too deeply'}") from error
    if not isinstance(value, dict):
        raise Invalid("malformed_line", f"not a JSON object but {quote(value)}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def read_csv(lines: Iterable[bytes], place: str) -> Iterator[Record]:
    """One record for each that the quoting makes; an empty cell is null.

    What follows a record that is wrong is read from its second line on. Raises DataError when the
    header is wrong.
    """
    taker = _Lines(lines)
    header = next(_records(taker), None)
    if header is None:
        return
    names = header.columns
    if isinstance(names, RowError):
        raise DataError(f"{place}:{header.line}: the names of the columns: {names.detail}")
    if len({*names}) < len(names) or not all(names):
        raise DataError(
            f"{place}:{header.line}: a column has no name or one that is there twice: "
            f"{', '.join(names)}"
        )
    for record in _records(taker):
        cells = record.columns
        if isinstance(cells, list) and len(cells) != len(names):
            detail = f"{len(cells)} cells, but the first line names {len(names)} columns"
            cells = RowError("malformed_line", detail)
        if isinstance(cells, RowError):
            yield Record(record.line, cells)
        else:
            values = (cell or None for cell in cells)
            yield Record(record.line, dict(zip(names, values, strict=True)))


class _Cells:
    """A record of CSV before its cells have names."""

    def __init__(self, line: int, columns: list[str] | RowError) -> None:
        self.line, self.columns = line, columns


def _records(lines: _Lines) -> Iterator[_Cells]:
    while (first := lines.begin()) is not None:
        try:
            cells = next(csv.reader(lines, strict=True), [])
        except (csv.Error, UnicodeDecodeError) as error:
            lines.give_back()
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not CSV: {error}"
            yield _Cells(first, RowError("malformed_line", reason))
            continue
        if cells:
            yield _Cells(first, cells)


class _Lines:
    """Lines as texts, of which those of the present record can be had again."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._source = iter(lines)
        self._waiting: deque[bytes] = deque()
        self._taken: list[bytes] = []
        self._number = 0
        self._size = 0

    def begin(self) -> int | None:
        """The number of the line on which the next record begins; None at the end."""
        self._taken, self._size = [], 0
        if not self._waiting:
            line = next(self._source, None)
            if line is None:
                return None
            self._waiting.append(line)
        return self._number + 1

    def give_back(self) -> None:
        """All but the first line of the present record will be read again."""
        again = self._taken[1:]
        self._waiting.extendleft(reversed(again))
        self._number -= len(again)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._source)
        self._number += 1
        self._taken.append(line)
        self._size += len(line)
        if self._size > _LONGEST_RECORD_BYTES:
            raise csv.Error(f"a record of more than {_LONGEST_RECORD_BYTES:,} bytes")
        return line.removeprefix(_BOM).decode("utf-8") if self._number == 1 else line.decode()
