"""A training that was interrupted after a checkpoint and is not the one the recipe now asks for."""

from __future__ import annotations

from tunesmith.ledger import Draft
from tunesmith.pipeline import drift
from tunesmith.pipeline.stages import Stages
from tunesmith.train.checkpoint import newest


def check_drift(stages: Stages, *, discard: bool) -> None:
    """Raise UserError, saying what changed, rather than begin from nothing beside it."""

    def progress(draft: Draft) -> str | None:
        checkpoint = newest(stages.store.scratch(draft))
        return f"step {int(checkpoint.name.partition('-')[2])}" if checkpoint else None

    drift.check_drift(stages, stages.trained, "training", progress, discard=discard)
