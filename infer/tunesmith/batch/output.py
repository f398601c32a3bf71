"""The output file: written whole, in input order, and put into its place at once."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.batch.results import output_tokens
from tunesmith.batch.rows import Row, read_rows
from tunesmith.batch.shards import Shards, to_line
from tunesmith.config import UserError
from tunesmith.config.schema.batch import Batch


@dataclass
class Totals:
    """What the rows of a batch add up to."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0


def write_output(section: Batch, shards: Shards, folder: Path) -> Totals:
    """`output.jsonl`, one row per input row, and `errors.jsonl`, from rows that all have a
    result."""
    totals = Totals()
    with (
        (folder / "output.jsonl").open("wb") as output,
        (folder / "errors.jsonl").open("wb") as errors,
    ):
        for row in read_rows(section):
            result: dict[str, Any] = (
                {"error": asdict(row.error)} if row.error else shards[row.index]
            )
            output.write(to_line(output_row(row, result)))
            totals.rows += 1
            if error := result.get("error"):
                totals.errors[error["type"]] += 1
                errors.write(to_line({"id": row.id, "line": row.line, **error}))
            else:
                totals.prompt_tokens += result["prompt_tokens"]
                totals.output_tokens += output_tokens(result)
    shards.close()
    return totals


def output_row(row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
    """The result, then the input's columns; one that has a result's name gets `input_` before
    it."""
    outputs = result.get("outputs")
    made = {
        "id": row.id,
        "answer": outputs[0]["text"] if outputs else None,
        "finish_reason": outputs[0]["finish_reason"] if outputs else None,
        "prompt_tokens": result.get("prompt_tokens"),
        "cached_tokens": result.get("cached_tokens"),
        "output_tokens": output_tokens(result) if outputs else None,
        "error": result.get("error"),
    }
    kept = {
        f"input_{name}" if name in made else name: value
        for name, value in row.columns.items()
        if name != "id"
    }
    return made | kept


def check_output(section: Batch) -> None:
    """Raises UserError when the output file could not be written at the end."""
    target = section.output
    if target.is_dir():
        raise UserError(f"batch.output: {target} is a folder; give the path of a file")
    if target.exists() and target.samefile(section.input):
        raise UserError(f"batch.output: {target} is the input itself; give another path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _beside(target):
            pass
    except OSError as error:
        raise UserError(
            f"batch.output: cannot write to {target.parent or '.'}: {error.strerror}; give a path "
            "in a folder that can be written to"
        ) from error


def publish(source: Path, target: Path) -> None:
    """Copy a file so that the target is the old one or the whole new one at any moment."""
    with _beside(target) as temporary:
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """An empty file in the target's folder, gone afterwards unless it was renamed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.touch()
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
