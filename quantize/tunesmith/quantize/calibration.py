"""Calibration examples: the recipe's own training rows, as its own template renders them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.chat import ChatTemplate
from tunesmith.config import DataError, require


@dataclass(frozen=True)
class Calibration:
    """Token ids of the chosen training rows."""

    input_ids: list[list[int]]
    rows: int
    cut: int
    """Examples that were longer than `data.max_length` and lost their end."""

    rejected: int
    """Rows that the chat template refused, as training does."""

    def counts(self) -> dict[str, int]:
        """What the manifest records."""
        return {
            "rows": self.rows,
            "tokens": sum(map(len, self.input_ids)),
            "cut": self.cut,
            "rejected": self.rejected,
        }


def calibrate_on(
    rows: list[dict[str, Any]],
    parent: Path,
    *,
    chat_template: Path | None,
    max_length: int,
    trust_remote_code: bool,
) -> Calibration:
    """Tokenise rows as training does. Raises DataError when the template refuses all of them."""
    tokenize = _tokenizer(rows, parent, chat_template, trust_remote_code)
    examples: list[list[int]] = []
    faults = []
    for row in rows:
        try:
            examples += tokenize(row)
        except DataError as error:
            faults.append(f"row {row['id']}: {error}")
    if not examples:
        raise DataError(f"no training row can be used to calibrate: {'; '.join(faults[:3])}")
    return Calibration(
        input_ids=[ids[:max_length] for ids in examples],
        rows=len(rows),
        cut=sum(len(ids) > max_length for ids in examples),
        rejected=len(faults),
    )


def _tokenizer(
    rows: list[dict[str, Any]], parent: Path, chat_template: Path | None, trust_remote_code: bool
) -> Any:
    """From a row to the token ids of its examples."""
    if any("messages" in row for row in rows):
        template = ChatTemplate.load(parent, chat_template, trust_remote_code=trust_remote_code)
        return lambda row: [
            example.input_ids
            for example in template.examples(row["messages"], tools=row.get("tools"))
        ]
    transformers = require("transformers", "quantize")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        parent, trust_remote_code=trust_remote_code
    )
    return lambda row: [list(tokenizer(row["text"], verbose=False)["input_ids"])]
