"""Input rows: read one at a time, named, and typed when they are wrong."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from tunesmith.batch.columns import ask_of_columns
from tunesmith.batch.errors import Invalid, RowError, quote
from tunesmith.batch.openai import ask_of_call, is_call, is_embeddings
from tunesmith.batch.requests import Ask
from tunesmith.batch.sources import Record, read_records
from tunesmith.config.schema.batch import Batch

_LOOK_AHEAD_ROWS = 100
_NOTHING = Ask()


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    index: int
    """Position among the rows, from 0."""

    line: int
    """Line of the file, from 1; the number of the row in files that have no lines."""

    id: str | int
    columns: Mapping[str, Any]
    """The row as it was written; empty when it could not be read."""

    ask: Ask
    """What the row wants; nothing where there is an error."""

    file: str | None = None
    """Where the line is, when the input is several files."""

    is_call: bool = False
    """Whether the input is of the OpenAI Batch API."""

    error: RowError | None = None


@dataclass(frozen=True)
class Form:
    """How the rows of an input say what they want."""

    is_openai: bool = False
    """They are requests of the OpenAI Batch API."""

    embeds: bool = False
    """They want embeddings, for which the engine runs the model in another way."""


def find_form(section: Batch) -> Form:
    """The form of the input: what the recipe says, else what the first good row is."""
    return _form([*islice(read_records(section), _LOOK_AHEAD_ROWS)], section)


def _form(head: Sequence[tuple[str | None, Record]], section: Batch) -> Form:
    columns = (record.columns for _, record in head)
    first = next((found for found in columns if not isinstance(found, RowError)), {})
    is_found = section.format is None and not section.column_keys and is_call(first)
    is_openai = section.format == "openai" or is_found
    embeds = is_embeddings(first) if is_openai else section.task == "embed"
    return Form(is_openai, embeds)


def read_rows(section: Batch) -> Iterator[Row]:
    """Every row in order, good or bad; lines of white space are not rows.

    Raises DataError when the input cannot be read.
    """
    records = read_records(section)
    head = [*islice(records, _LOOK_AHEAD_ROWS)]
    form = _form(head, section)
    seen = _Hashes()
    for index, (file, record) in enumerate(chain(head, records)):
        row = _row(index, file, record, section, form)
        # A row without an id is called after its line, which a later id may clash with.
        is_new = seen.add(hash(str(row.id)))
        if not is_new and row.error is None:
            detail = f"an earlier row has the id {row.id!r} too"
            row = replace(row, error=RowError("duplicate_id", detail))
        yield row


class _Hashes:
    """A set of hashes in 16 to 32 bytes each, where Python's takes 70 to 100."""

    def __init__(self) -> None:
        self._table = array("q", [0]) * 1024
        self._count = 0

    def add(self, value: int) -> bool:
        """Whether it was not there before."""
        value = value or 1  # 0 is an empty place
        place = self._place(value)
        if self._table[place]:
            return False
        self._table[place] = value
        self._count += 1
        if 2 * self._count > len(self._table):
            former, self._table = self._table, array("q", [0]) * (2 * len(self._table))
            for kept in former:
                if kept:
                    self._table[self._place(kept)] = kept
        return True

    def _place(self, value: int) -> int:
        """Where it is in the table, or would be."""
        table = self._table
        place = value % len(table)
        while table[place] not in (0, value):
            place = (place + 1) % len(table)
        return place


def _row(index: int, file: str | None, record: Record, section: Batch, form: Form) -> Row:
    name: str | int = f"{file}:{record.line}" if file else f"line-{record.line}"
    columns, ask, error = record.columns, _NOTHING, None
    if isinstance(columns, RowError):
        return Row(index, record.line, name, {}, ask, file, form.is_openai, columns)
    try:
        name = _id(columns, "custom_id" if form.is_openai else section.id_column, name)
        if form.is_openai:
            ask = ask_of_call(columns, section, embeds=form.embeds)
        else:
            ask = ask_of_columns(columns, section)
    except Invalid as invalid:
        error = invalid.error
    return Row(index, record.line, name, columns, ask, file, form.is_openai, error)


def _id(columns: Mapping[str, Any], column: str, otherwise: str | int) -> str | int:
    value = columns.get(column)
    if value is None:
        return otherwise
    if value == "" or isinstance(value, bool) or not isinstance(value, (str, int)):
        raise Invalid(
            "invalid_id", f"{column} must be a text or a whole number, not {quote(value)}"
        )
    return value
