"""All records of an input, in the order of its files."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.batch.sources.columnar import read_hub, read_parquet, read_saved
from tunesmith.batch.sources.lines import read_csv, read_jsonl
from tunesmith.batch.sources.record import Record
from tunesmith.config.schema.batch import Batch
from tunesmith.pipeline.batch import batch_files, is_saved_dataset
from tunesmith.pipeline.files import InputFile
from tunesmith.pipeline.sources import hub_commit


def read_records(batch: Batch) -> Iterator[tuple[str | None, Record]]:
    """Every record with its file, which is None where the input is one file or a data set.

    Each call reads from the beginning, and holds no more than a group of rows. Raises UserError
    when there is no such input, DataError when it cannot be read.
    """
    if is_saved_dataset(batch):
        yield from ((None, record) for record in read_saved(batch))
        return
    files = batch_files(batch)
    if not files:
        commit = hub_commit(batch.input, batch.revision, "dataset")
        yield from ((None, record) for record in read_hub(batch, commit))
    is_unique = len({file.name for file in files}) == len(files)
    for file in files:
        name = (file.name if is_unique else file.place) if len(files) > 1 else None
        for record in read_file(file):
            yield name, record


def read_file(file: InputFile) -> Iterator[Record]:
    """The records of one file, by its suffix; JSON Lines when it has none of those known."""
    with file.open() as opened:
        if file.suffix == ".parquet":
            yield from read_parquet(opened, file.place)
        elif file.suffix == ".csv":
            yield from read_csv(opened, file.place)
        else:
            yield from read_jsonl(opened)
