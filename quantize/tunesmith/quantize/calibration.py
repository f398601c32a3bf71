"""Calibration examples: the recipe's own training rows, as its own template renders them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.chat import ChatTemplate
from tunesmith.chat.length import kept_part
from tunesmith.config import DataError, UserError, require
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.data import Data
from tunesmith.ledger import Artifact

Row = dict[str, Any]


@dataclass(frozen=True)
class Calibration:
    """Token ids to run the model on while it is quantized."""

    input_ids: list[list[int]]
    rows: int
    cut: int
    """Examples that were longer than `data.max_length` and lost a part or all of it."""

    rejected: int
    """Rows that the chat template refused, as training does."""

    text: str = "own"
    """`own`, `generic` or the file that took its place."""

    def counts(self) -> dict[str, Any]:
        """What the manifest records."""
        return {
            "text": self.text,
            "rows": self.rows,
            "sequences": len(self.input_ids),
            "tokens": sum(map(len, self.input_ids)),
            "cut": self.cut,
            "rejected": self.rejected,
        }


def calibration_of(recipe: Recipe, dataset: Artifact, parent: Path) -> Calibration:
    """What a recipe calibrates on. Raises DataError when nothing of it can be used."""
    section, data = recipe.quantize, recipe.data
    assert section and data
    path = dataset.root / "train.jsonl"
    sizes = [source["train_rows"] for source in dataset.manifest.metrics.get("sources", [])]
    chosen = frozenset(stratify(_line_lengths(path), sizes, section.calibration_rows, recipe.seed))
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for at, line in enumerate(file) if at in chosen]
    own = calibrate_on(
        rows,
        parent,
        data,
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    own = _within(own, section.calibration_tokens, recipe.seed)
    if section.calibration_text == "own":
        return own
    return _other_text(own, section.calibration_text, parent, recipe.model.trust_remote_code)


def stratify(lengths: Sequence[int], sizes: Sequence[int], count: int, seed: int) -> list[int]:
    """Indices of `count` rows: of every source its share, and of every source one row from each of
    so many equal slices of its rows ordered by length.

    `sizes` are the numbers of rows of each source, which follow one another.
    """
    if sum(sizes) != len(lengths):
        sizes = [len(lengths)]
    draw, first = random.Random(seed), 0
    chosen: list[int] = []
    for size, wanted in zip(sizes, _shares(sizes, min(count, len(lengths))), strict=True):
        ordered = sorted(range(first, first + size), key=lambda at: (lengths[at], at))
        edges = [round(step * size / wanted) for step in range(wanted + 1)] if wanted else []
        chosen += [
            ordered[draw.randrange(low, high)] for low, high in zip(edges, edges[1:], strict=False)
        ]
        first += size
    return sorted(chosen)


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` divided in proportion to sizes, at least one for each while there are enough."""
    total = sum(sizes)
    shares = [min(size, max(1, count * size // total)) if size else 0 for size in sizes]
    while sum(shares) > count:
        shares[shares.index(max(shares))] -= 1
    while sum(shares) < count:
        lacking = [count * size / total - share for size, share in zip(sizes, shares, strict=True)]
        open_ones = [at for at, size in enumerate(sizes) if shares[at] < size]
        shares[max(open_ones, key=lambda at: lacking[at])] += 1
    return shares


def _line_lengths(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [len(line) for line in file]


def calibrate_on(
    rows: list[Row],
    parent: Path,
    data: Data,
    *,
    chat_template: Path | None,
    trust_remote_code: bool,
) -> Calibration:
    """Tokenise and cut rows as training does; of texts as many pieces as there are rows. Raises
    DataError when none of them can be used."""
    if not any("messages" in row for row in rows):
        ids = _token_ids((row["text"] for row in rows), parent, trust_remote_code)
        chunks = [ids[at : at + data.max_length] for at in range(0, len(ids), data.max_length)]
        # A document may be as long as a thousand conversations.
        count = min(len(rows), len(chunks))
        evenly = [chunks[at * len(chunks) // count] for at in range(count)]
        return Calibration(evenly, len(rows), cut=0, rejected=0)
    template = ChatTemplate.load(parent, chat_template, trust_remote_code=trust_remote_code)
    sequences, cut, faults = [], 0, []
    for row in rows:
        try:
            examples = template.examples(row["messages"], tools=row.get("tools"))
        except DataError as error:
            faults.append(f"row {row['id']}: {error}")
            continue
        for one in examples:
            part = kept_part(np.array(one.mask, dtype=np.bool_), data.max_length, data.truncation)
            cut += any(one.mask[part.stop :]) or part.start > 0
            sequences.append(one.input_ids[part])
    sequences = [ids for ids in sequences if ids]
    if not sequences:
        why = "; ".join(faults[:3]) or f"none has an answer within {data.max_length} tokens"
        raise DataError(f"no training row can be used to calibrate: {why}")
    return Calibration(sequences, len(rows), cut, len(faults))


def _within(own: Calibration, limit: int | None, seed: int) -> Calibration:
    """As many sequences, in an order of chance, as have no more tokens than the limit."""
    if limit is None:
        return own
    order = random.Random(seed).sample(own.input_ids, len(own.input_ids))
    kept, total = [], 0
    for ids in order:
        if total + len(ids) <= limit:
            kept.append(ids)
            total += len(ids)
    if not kept:
        raise DataError(
            f"quantize.calibration_tokens: {limit} is less than any of {len(order)} rows has"
        )
    return Calibration(kept, own.rows, own.cut, own.rejected)


def _other_text(
    own: Calibration, text: str | Path, parent: Path, trust_remote_code: bool
) -> Calibration:
    """Sequences of the same lengths from another text, for as long as it lasts."""
    ids = _token_ids(_paragraphs(text), parent, trust_remote_code)
    sequences: list[list[int]] = []
    at = 0
    for length in map(len, own.input_ids):
        if at + length > len(ids):
            break
        sequences.append(ids[at : at + length])
        at += length
    if not sequences:
        raise DataError(f"quantize.calibration_text: {text} has only {len(ids)} tokens")
    return Calibration(sequences, len(sequences), cut=0, rejected=0, text=str(text))


def _paragraphs(text: str | Path) -> Iterator[str]:
    if text == "generic":
        from pydoc_data.topics import topics

        yield from topics.values()
        return
    try:
        yield Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"quantize.calibration_text: {text}: cannot be read: {error}") from error


def _token_ids(texts: Any, parent: Path, trust_remote_code: bool) -> list[int]:
    """All texts as one sequence, each ended as in training."""
    transformers = require("transformers", "quantize")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        parent, trust_remote_code=trust_remote_code
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        token_id
        for text in texts
        for token_id in [*tokenizer(text, verbose=False)["input_ids"], *end]
    ]
