"""The dataset artifact: every row read, checked, normalised, split and counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.errors import DataError
from tunesmith.config.schema.data import Data, DataFormat, Source
from tunesmith.data.faults import Fault, FaultLog, RowError
from tunesmith.data.formats import REQUIRED, fitting_formats, normalise
from tunesmith.data.messages import Row
from tunesmith.data.read import Raw, read_file, read_hub
from tunesmith.data.split import Indices, choose, count_among, count_distinct, hold_out
from tunesmith.data.spool import Spool
from tunesmith.data.stdlib import builtin_rows
from tunesmith.ledger import Artifact, Draft
from tunesmith.pipeline.sources import BUILTIN_DATA, is_file_source, source_names
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
    format: DataFormat
    weight: float
    rows: range
    """Its usable rows in the spool."""

    dropped: int
    turns_cut: int
    """Turns after the last answer of a conversation, from which nothing is learnt."""

    def of(self, rows: Indices) -> Indices:
        """Those of some rows that are from this source."""
        return rows[(rows >= self.rows.start) & (rows < self.rows.stop)]


def make_dataset(stages: Stages) -> Artifact:
    """The dataset of a recipe, made unless it is already there.

    Raises DataError, with the place of the first faults, when the data cannot be used.
    """
    draft = stages.dataset
    if found := stages.store.find(draft.id):
        return found
    data, seed = stages.recipe.data, stages.recipe.seed
    assert data is not None, "stages.dataset asks for the section"
    with stages.store.write(draft, stages.recipe) as work:
        errors = work.scratch / ERRORS_FILE
        with Spool(work.scratch / "rows.jsonl") as spool, FaultLog(errors) as faults:
            reads = _read(data, draft, spool, faults)
            train, evaluation = _split(data, reads, spool)
            weighted = np.concatenate([_weigh(read, train, spool, seed) for read in reads])
            used = weighted
            if data.max_rows is not None:
                used = weighted[choose(spool.keys[weighted], data.max_rows, seed)]
            spool.write(work.out / TRAIN_FILE, used)
            spool.write(work.out / EVALUATION_FILE, evaluation)
            work.metrics |= _metrics(spool, used, evaluation) | {
                "unused_rows": len(weighted) - len(used),
                "dropped_rows": faults.kinds.total(),
                "dropped": dict(sorted(faults.kinds.items())),
                "turns_cut": sum(read.turns_cut for read in reads),
                "sources": [_source_metrics(read, used, evaluation) for read in reads],
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
    builtin = cache(lambda row_format: builtin_rows(row_format, data.evaluation_fraction))

    def read(side: Side, name: str, source: Source) -> Read:
        row_format = source.format or data.format
        raws: Iterator[Raw]
        if source.source == BUILTIN_DATA:
            rows = builtin(row_format)[side == "evaluation"]
            raws = (Raw(at, row) for at, row in enumerate(rows, 1))
        elif is_file_source(source.source):
            raws = read_file(Path(source.source))
        else:
            commit = draft.inputs[name].rpartition("@")[2]
            raws = read_hub(source.source, commit, _HUB_SPLITS[side])
        settings = data.model_copy(update={"format": row_format})
        return _read_source(source, side, raws, settings, spool, faults)

    named = zip(source_names(data), data.sources, strict=True)
    reads = [read("train", name, source) for name, source in named]
    if data.evaluation:
        return [*reads, read("evaluation", "evaluation", Source(source=data.evaluation))]
    # A builtin source has its own rows in reserve.
    if BUILTIN_DATA in (source.source for source in data.sources):
        reads.append(read("evaluation", "evaluation", Source(source=BUILTIN_DATA)))
    return reads


def _split(data: Data, reads: Sequence[Read], spool: Spool) -> tuple[Indices, Indices]:
    """Which rows of the spool are trained on, and which are held out."""

    def rows(side: Side, is_builtin: bool) -> Indices:
        chosen = [
            np.arange(read.rows.start, read.rows.stop)
            for read in reads
            if read.side == side and (read.name == BUILTIN_DATA) == is_builtin
        ]
        return np.concatenate([np.arange(0), *chosen])

    own, builtin = rows("train", False), rows("train", True)
    if data.evaluation or not len(own):
        held_out = np.concatenate([rows("evaluation", False), rows("evaluation", True)])
        return np.sort(np.concatenate([own, builtin])), held_out
    is_held_out = hold_out(spool.keys[own], data.evaluation_fraction)
    evaluation = np.concatenate([own[is_held_out], rows("evaluation", True)])
    if not len(evaluation):
        names = ", ".join(source.source for source in data.sources)
        raise DataError(
            f"{names}: its {len(own)} usable rows are all the same, so none can be "
            "held out; give more rows, or held-out ones with data.evaluation"
        )
    return np.sort(np.concatenate([own[~is_held_out], builtin])), evaluation


def _weigh(read: Read, train: Indices, spool: Spool, seed: int) -> Indices:
    """The training rows of one source, each as often as its weight says."""
    rows = read.of(train)
    if read.weight == 1.0:
        return rows
    whole, rest = divmod(read.weight, 1.0)
    counts = np.full(len(rows), int(whole))
    counts[choose(spool.keys[rows], round(rest * len(rows)), seed, "weight")] += 1
    if len(rows) and not counts.any():
        raise DataError(
            f"{read.name}: weight {read.weight:g} of its {len(rows)} training rows leaves none; "
            "raise it, or leave the source out of data.train"
        )
    return np.repeat(rows, counts)


def _read_source(
    source: Source, side: Side, raws: Iterator[Raw], data: Data, spool: Spool, faults: FaultLog
) -> Read:
    """Every usable row of one source. Raises DataError when too many are not, or none is."""
    name, first, turns_cut = source.source, len(spool), 0
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
    rows = range(first, len(spool))
    total = len(rows) + dropped.total()
    if not total:
        raise DataError(f"{name}: no rows; give a source that has some")
    _check_columns(name, columns, data.format)
    faults.check(name, total, dropped.total(), data.max_error_rate)
    if not rows:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(dropped.items()))
        raise DataError(f"{name}: none of its {total} rows can be used ({reasons})")
    return Read(name, side, data.format, source.weight, rows, dropped.total(), turns_cut)


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


def _metrics(spool: Spool, used: Indices, evaluation: Indices) -> dict[str, Any]:
    keys, prompts, characters = spool.keys, spool.prompts, spool.characters
    # Rows that a weight repeats are one row here.
    train = np.unique(used)
    return {
        "train_rows": len(used),
        "evaluation_rows": len(evaluation),
        "duplicate_rows": len(train) - count_distinct(keys[train]),
        "leaked_rows": count_among(keys[train], keys[evaluation]),
        "leaked_prompts": count_among(prompts[train], prompts[evaluation]),
        "train_characters": int(characters[used].sum()),
        "evaluation_characters": int(characters[evaluation].sum()),
    }


def _source_metrics(read: Read, used: Indices, evaluation: Indices) -> dict[str, Any]:
    return {
        "source": read.name,
        "format": read.format,
        "weight": read.weight,
        "usable_rows": len(read.rows),
        "dropped_rows": read.dropped,
        "train_rows": len(read.of(used)),
        "evaluation_rows": len(read.of(evaluation)),
    }
