"""One row as it was written."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.batch.errors import RowError


@dataclass(frozen=True)
class Record:
    """Columns of a row, or why there are none."""

    line: int
    """Where it begins, from 1; the number of the row where there are no lines."""

    columns: Mapping[str, Any] | RowError


def plain(value: Any) -> Any:
    """A value of a columnar format as JSON has it."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return str(value)
        case _ if hasattr(value, "tolist"):  # an array or a number of numpy
            return plain(value.tolist())
        case _:
            return str(value)
