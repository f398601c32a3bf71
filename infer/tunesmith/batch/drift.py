"""A batch that was interrupted with finished rows and is not the one the recipe now asks for."""

from __future__ import annotations

from pathlib import Path

from tunesmith.batch.shards import count_finished
from tunesmith.config.schema.batch import Batch
from tunesmith.ledger import Draft
from tunesmith.ledger.durable import write_synced
from tunesmith.pipeline import Stages, drift

_OUTPUT = "output"
SHARDS = "shards"


def check_drift(stages: Stages, section: Batch, *, discard: bool) -> None:
    """Raise UserError, saying what changed, rather than begin from nothing beside it.

    A recipe may be used for several inputs: they are other batches where their outputs are.
    """

    def progress(draft: Draft) -> str | None:
        scratch = stages.store.scratch(draft)
        noted = scratch / _OUTPUT
        if draft.kind != "batch" or not noted.exists():
            return None
        rows = count_finished(scratch / SHARDS)
        is_same = noted.read_text(encoding="utf-8") == _absolute(section)
        return f"{rows:,} rows" if rows and is_same else None

    drift.check_drift(stages, stages.batch(), "batch", progress, discard=discard)


def note_output(scratch: Path, section: Batch) -> None:
    """Say in the work folder where its answers are to go."""
    write_synced(scratch / _OUTPUT, _absolute(section))


def _absolute(section: Batch) -> str:
    output = str(section.output)
    return output if "://" in output else str(Path(output).absolute())
