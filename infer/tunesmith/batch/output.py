"""The rows of the output, whole and in input order, as the artifact keeps them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.batch.answers import Origin, output_row
from tunesmith.batch.completions import output_line
from tunesmith.batch.results import output_tokens
from tunesmith.batch.rows import read_rows
from tunesmith.batch.shards import Shards, to_line
from tunesmith.config.schema.batch import Batch

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"


@dataclass
class Totals:
    """What the rows of a batch add up to."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


def write_output(section: Batch, shards: Shards, folder: Path, origin: Origin) -> Totals:
    """`output.jsonl`, one row per input row, and `errors.jsonl`, from rows that all have a
    result."""
    totals = Totals()
    with (folder / OUTPUT).open("wb") as output, (folder / ERRORS).open("wb") as errors:
        for row in read_rows(section):
            result: dict[str, Any] = (
                {"error": asdict(row.error)} if row.error else shards[row.index]
            )
            made = (
                output_line(row, result, origin)
                if row.is_call
                else output_row(row, result, section, origin)
            )
            output.write(to_line(made))
            totals.rows += 1
            if error := result.get("error"):
                totals.errors[error["type"]] += 1
                place = {"file": row.file} if row.file else {}
                errors.write(to_line({"id": row.id, **place, "line": row.line, **error}))
            else:
                totals.prompt_tokens += result["prompt_tokens"]
                totals.cached_tokens += result["cached_tokens"]
                totals.output_tokens += output_tokens(result)
    shards.close()
    return totals
