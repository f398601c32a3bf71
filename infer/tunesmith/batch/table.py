"""One schema for rows of any shape: what columns a Parquet file of them has, and the values in it.

The type of a column is the least one that holds all its values: whole numbers among fractions are
fractions, objects have the keys of all of them, and what does not go together, or has no end of
keys, is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config import require

_MOST_KEYS = 200
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Shape:
    """The type of a value; `none` is that of a column without any."""

    kind: str = "none"
    """none, bool, int, float, str, list, object or json."""

    item: Shape | None = None
    fields: Mapping[str, Shape] = field(default_factory=dict)


_NONE, _JSON, _TEXT = Shape(), Shape("json"), Shape("str")


def shape_of(value: Any) -> Shape:
    """The shape of one value that JSON can have."""
    match value:
        case None:
            return _NONE
        case bool():
            return Shape("bool")
        case int():
            return Shape("int") if value in _INT64 else _JSON
        case float():
            return Shape("float")
        case str():
            return _TEXT
        case list():
            item = _NONE
            for one in value:
                item = merge(item, shape_of(one))
            return Shape("list", item=item)
        case dict():
            return _closed(Shape("object", fields={k: shape_of(v) for k, v in value.items()}))
    return _JSON


def merge(one: Shape, other: Shape) -> Shape:
    """The least shape that holds what either does; in any order the same."""
    if one == other or other.kind == "none":
        return one
    if one.kind == "none":
        return other
    kinds = {one.kind, other.kind}
    if kinds == {"int", "float"}:
        return Shape("float")
    if len(kinds) > 1:
        return _JSON
    if one.item and other.item:
        return Shape("list", item=merge(one.item, other.item))
    if one.kind == "object":
        names = {**one.fields, **other.fields}
        fields = {
            name: merge(one.fields.get(name, _NONE), other.fields.get(name, _NONE))
            for name in names
        }
        return _closed(Shape("object", fields=fields))
    return one


def _closed(shape: Shape) -> Shape:
    return _JSON if len(shape.fields) > _MOST_KEYS else shape


def shape_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Shape]:
    """The shape of each column, columns in the order in which they first appear."""
    columns: dict[str, Shape] = {}
    for row in rows:
        for name, value in row.items():
            columns[name] = merge(columns.get(name, _NONE), shape_of(value))
    return columns


def arrow_schema(columns: Mapping[str, Shape]) -> Any:
    """The `pyarrow.Schema` of columns."""
    arrow = require("pyarrow", "infer")
    return arrow.schema([(name, _arrow_type(arrow, shape)) for name, shape in columns.items()])


def _arrow_type(arrow: Any, shape: Shape) -> Any:
    match shape.kind:
        case "bool":
            return arrow.bool_()
        case "int":
            return arrow.int64()
        case "float":
            return arrow.float64()
        case "list":
            return arrow.list_(_arrow_type(arrow, shape.item or _NONE))
        case "object" if shape.fields:
            return arrow.struct(
                [(name, _arrow_type(arrow, part)) for name, part in shape.fields.items()]
            )
    return arrow.string()


def fit(value: Any, shape: Shape) -> Any:
    """A value as its column has it."""
    if value is None:
        return None
    match shape.kind:
        case "list":
            return [fit(one, shape.item or _NONE) for one in value]
        case "object" if shape.fields:
            return {name: fit(value.get(name), part) for name, part in shape.fields.items()}
        case "float":
            return float(value)
        case "str":
            return clean(value)
        case "bool" | "int":
            return value
    # An id that is a number in one row and a text in another is a text.
    return clean(value) if isinstance(value, str) else to_text(value)


def clean(text: str) -> str:
    """Without halves of surrogate pairs, which UTF-8 cannot have."""
    return text.encode("utf-8", "replace").decode()


def to_text(value: Any) -> str:
    """A value as JSON in one line."""
    return clean(json.dumps(value, ensure_ascii=False))
