"""The dataset artifact: every row read, checked, normalised, split and counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.errors import DataError
from tunesmith.config.schema import Data, DataFormat
from tunesmith.data.faults import Fault, FaultLog, RowError
from tunesmith.data.formats import REQUIRED, fitting_formats, normalise
from tunesmith.data.messages import Row
from tunesmith.data.read import Raw, read_file, read_hub
from tunesmith.data.split import Indices, choose, count_distinct, hold_out
from tunesmith.data.spool import Spool
from tunesmith.data.stdlib import builtin_rows
from tunesmith.ledger import Artifact, Draft
from tunesmith.pipeline.sources import BUILTIN_DATA, is_file_source
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import progress_bar

TRAIN_FILE, EVALUATION_FILE, ERRORS_FILE = "train.jsonl", "evaluation.jsonl", "errors.jsonl"
Side = Literal["train", "evaluation"]
_HUB_SPLITS: dict[Side, tuple[str, ...]] = {
    "train": ("train",),
    "evaluation": ("evaluation", "validation", "test", "train"),
}


@dataclass(frozen=True)
class Read:
    """What was read from one source."""

    name: str
    side: Side
    first: int
    """Its first row in the spool."""

    rows: int
    dropped: Counter[str]
    turns_cut: int
    """Turns after the last answer of a conversation, from which nothing is learnt."""


def make_dataset(stages: Stages) -> Artifact:
    """The dataset of a recipe, made unless it is already there.

    Raises DataError, with the place of the first faults, when the data cannot be used.
    """
    draft = stages.dataset
    if found := stages.store.find(draft.id):
        return found
    data = stages.recipe.data
    assert data is not None, "stages.dataset asks for the section"
    with stages.store.write(draft, stages.recipe) as work:
        errors = work.scratch / ERRORS_FILE
        with Spool(work.scratch / "rows.jsonl") as spool, FaultLog(errors) as faults:
            reads = _read(data, draft, spool, faults)
            train, evaluation = _split(data, reads, spool)
            used = train
            if data.max_rows is not None:
                used = train[choose(spool.keys[train], data.max_rows, stages.recipe.seed)]
            spool.write(work.out / TRAIN_FILE, used)
            spool.write(work.out / EVALUATION_FILE, evaluation)
            work.metrics |= _metrics(spool, used, evaluation) | {
                "unused_rows": len(train) - len(used),
                "dropped_rows": faults.kinds.total(),
                "dropped": dict(sorted(faults.kinds.items())),
                "turns_cut": sum(read.turns_cut for read in reads),
            }
        os.replace(errors, work.out / ERRORS_FILE)
    return stages.made(draft)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one of the artifact's files."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _read(data: Data, draft: Draft, spool: Spool, faults: FaultLog) -> list[Read]:
    """Every usable row of all sources into the spool."""
    is_builtin = BUILTIN_DATA in (data.train, data.evaluation)
    builtin = builtin_rows(data.format, data.evaluation_fraction) if is_builtin else ([], [])

    def read(name: str, side: Side) -> Read:
        raws: Iterator[Raw]
        if name == BUILTIN_DATA:
            raws = (Raw(at, row) for at, row in enumerate(builtin[side == "evaluation"], 1))
        elif is_file_source(name):
            raws = read_file(Path(name))
        else:
            raws = read_hub(name, draft.inputs[side].rpartition("@")[2], _HUB_SPLITS[side])
        return _read_source(name, side, raws, data, spool, faults)

    reads = [read(data.train, "train")]
    if held_out := data.evaluation or (BUILTIN_DATA if is_builtin else None):
        reads.append(read(held_out, "evaluation"))
    return reads


def _split(data: Data, reads: Sequence[Read], spool: Spool) -> tuple[Indices, Indices]:
    """Which rows of the spool are trained on, and which are held out."""
    rows = {
        side: np.concatenate(
            [np.arange(read.first, read.first + read.rows) for read in reads if read.side == side]
            or [np.arange(0)]
        )
        for side in _HUB_SPLITS
    }
    train, evaluation = rows["train"], rows["evaluation"]
    if len(evaluation):
        return train, evaluation
    is_held_out = hold_out(spool.keys[train], data.evaluation_fraction)
    if not is_held_out.any():
        raise DataError(
            f"{data.train}: its {len(train)} usable rows are all the same, so none can be "
            "held out; give more rows, or held-out ones with data.evaluation"
        )
    return train[~is_held_out], train[is_held_out]


def _read_source(
    name: str, side: Side, raws: Iterator[Raw], data: Data, spool: Spool, faults: FaultLog
) -> Read:
    """Every usable row of one source. Raises DataError when too many are not, or none is."""
    first, turns_cut = len(spool), 0
    dropped: Counter[str] = Counter()
    columns: set[str] = set()
    faults.begin()
    with progress_bar(f"reading {name}", None) as bar:
        for raw in raws:
            bar.advance()
            try:
                if isinstance(raw.value, RowError):
                    raise raw.value
                columns |= raw.value.keys()
                row, cut = normalise(raw.value, data.format, data.learn)
                spool.add(row)
                turns_cut += cut
            except RowError as error:
                faults.add(Fault(name, raw.line, error.kind, error.detail))
                dropped[error.kind] += 1
    rows = len(spool) - first
    total = rows + dropped.total()
    if not total:
        raise DataError(f"{name}: no rows; give a source that has some")
    _check_columns(name, columns, data.format)
    faults.check(name, total, dropped.total(), data.max_error_rate)
    if not rows:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(dropped.items()))
        raise DataError(f"{name}: none of its {total} rows can be used ({reasons})")
    return Read(name, side, first, rows, dropped, turns_cut)


def _check_columns(name: str, columns: set[str], row_format: DataFormat) -> None:
    """Raises DataError when no row has a column that the format needs."""
    missing = [column for column in REQUIRED[row_format] if column not in columns]
    if not columns or not missing:
        return
    fitting = fitting_formats(sorted(columns))
    way_out = (
        f"they fit data.format: {' or '.join(fitting)}"
        if fitting
        else "rename them, or give data.format: "
        + ", ".join(f"{other} ({', '.join(needed)})" for other, needed in REQUIRED.items())
    )
    raise DataError(
        f"{name}: data.format: {row_format} needs the column{'s' * (len(missing) > 1)} "
        f"{', '.join(missing)}; there are {', '.join(sorted(columns))}; {way_out}"
    )


def _metrics(spool: Spool, train: Indices, evaluation: Indices) -> dict[str, Any]:
    keys, prompts, characters = spool.keys, spool.prompts, spool.characters
    return {
        "train_rows": len(train),
        "evaluation_rows": len(evaluation),
        "duplicate_rows": len(train) - count_distinct(keys[train]),
        "leaked_rows": int(np.isin(keys[train], keys[evaluation]).sum()),
        "leaked_prompts": int(np.isin(prompts[train], prompts[evaluation]).sum()),
        "train_characters": int(characters[train].sum()),
        "evaluation_characters": int(characters[evaluation].sum()),
    }
