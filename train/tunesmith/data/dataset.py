"""The dataset artifact: every row read, checked, normalised, split and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.config.errors import DataError
from tunesmith.config.schema import Data, DataFormat
from tunesmith.data.faults import Fault, RowError, check_error_rate, counts, write_faults
from tunesmith.data.formats import REQUIRED, fitting_formats, normalise
from tunesmith.data.messages import Row
from tunesmith.data.read import Raw, read_file, read_hub
from tunesmith.data.split import Keyed, choose, hold_out, identify
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


@dataclass
class Source:
    """What was read from one source."""

    rows: list[Keyed] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """The rows that were dropped."""

    turns_cut: int = 0
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
        train, evaluation, sources = _sides(data, draft, work.scratch / ERRORS_FILE)
        used = choose(train, data.max_rows, stages.recipe.seed)
        _write_rows(work.out / TRAIN_FILE, used)
        _write_rows(work.out / EVALUATION_FILE, evaluation)
        faults = [fault for source in sources for fault in source.faults]
        write_faults(work.out / ERRORS_FILE, faults)
        work.metrics |= _metrics(used, evaluation) | {
            "unused_rows": len(train) - len(used),
            "dropped_rows": len(faults),
            "dropped": counts(faults),
            "turns_cut": sum(source.turns_cut for source in sources),
        }
    return stages.made(draft)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one of the artifact's files."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _sides(
    data: Data, draft: Draft, listing: Path
) -> tuple[list[Keyed], list[Keyed], list[Source]]:
    """Training rows, evaluation rows, and the sources that they are from."""
    is_builtin = BUILTIN_DATA in (data.train, data.evaluation)
    builtin = builtin_rows(data.format, data.evaluation_fraction) if is_builtin else ([], [])

    def read(name: str, side: Side) -> Source:
        raws: Iterator[Raw]
        if name == BUILTIN_DATA:
            raws = (Raw(at, row) for at, row in enumerate(builtin[side == "evaluation"], 1))
        elif is_file_source(name):
            raws = read_file(Path(name))
        else:
            raws = read_hub(name, draft.inputs[side].rpartition("@")[2], _HUB_SPLITS[side])
        return _read_source(name, raws, data, listing)

    train = read(data.train, "train")
    held_out = data.evaluation or (BUILTIN_DATA if is_builtin else None)
    if held_out:
        evaluation = read(held_out, "evaluation")
        return train.rows, evaluation.rows, [train, evaluation]
    train_rows, evaluation_rows = hold_out(train.rows, data.evaluation_fraction)
    if not evaluation_rows:
        raise DataError(
            f"{data.train}: its {len(train.rows)} usable rows are all the same, so none can be "
            "held out; give more rows, or held-out ones with data.evaluation"
        )
    return train_rows, evaluation_rows, [train]


def _read_source(name: str, raws: Iterator[Raw], data: Data, listing: Path) -> Source:
    """Every usable row of one source. Raises DataError when too many are not, or none is."""
    source = Source()
    columns: set[str] = set()
    with progress_bar(f"reading {name}", None) as bar:
        for raw in raws:
            bar.advance()
            try:
                if isinstance(raw.value, RowError):
                    raise raw.value
                columns |= raw.value.keys()
                row, cut = normalise(raw.value, data.format)
                source.rows.append(Keyed.of(row))
                source.turns_cut += cut
            except RowError as error:
                source.faults.append(Fault(name, raw.line, error.kind, error.detail))
    total = len(source.rows) + len(source.faults)
    if not total:
        raise DataError(f"{name}: no rows; give a source that has some")
    _check_columns(name, columns, data.format)
    check_error_rate(name, total, source.faults, data.max_error_rate, listing)
    if not source.rows:
        reasons = ", ".join(f"{kind} {count}" for kind, count in counts(source.faults).items())
        raise DataError(f"{name}: none of its {total} rows can be used ({reasons})")
    return source


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


def _write_rows(path: Path, rows: Sequence[Keyed]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for name, keyed in zip(identify(rows), rows, strict=True):
            # ASCII, because many readers also break lines at U+2028 and its kin.
            file.write(json.dumps({"id": name, **keyed.row}) + "\n")


def _metrics(train: Sequence[Keyed], evaluation: Sequence[Keyed]) -> dict[str, Any]:
    held_out = {row.key for row in evaluation}
    held_out_prompts = {_prompt(row.row) for row in evaluation}
    return {
        "train_rows": len(train),
        "evaluation_rows": len(evaluation),
        "duplicate_rows": len(train) - len({row.key for row in train}),
        "leaked_rows": sum(row.key in held_out for row in train),
        "leaked_prompts": sum(_prompt(row.row) in held_out_prompts for row in train),
        "train_characters": sum(_characters(row.row) for row in train),
        "evaluation_characters": sum(_characters(row.row) for row in evaluation),
    }


def _prompt(row: Row) -> str:
    """What a row asks, without its last answer."""
    if "text" in row:
        return str(row["text"])
    return json.dumps(row["messages"][: row.get("prompt_turns", -1)], sort_keys=True)


def _characters(row: Row) -> int:
    turns = [*row.get("messages", ()), *row.get("rejected", ())]
    return sum(len(turn["content"]) for turn in turns) + len(row.get("text", ""))
