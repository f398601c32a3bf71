"""A training that was interrupted after a checkpoint and is not the one the recipe now asks for."""

from __future__ import annotations

from tunesmith.ledger import Draft
from tunesmith.pipeline import drift
from tunesmith.pipeline.stages import Stages
from tunesmith.train.checkpoint import newest


def check_drift(stages: Stages, new: Draft, *, discard: bool) -> None:
    """Raise UserError, saying what changed, rather than begin from nothing beside it."""

    def progress(draft: Draft) -> str | None:
        checkpoint = newest(stages.store.scratch(draft))
        if checkpoint is None or _purpose(draft) != _purpose(new):
            return None
        return f"step {int(checkpoint.name.partition('-')[2])}"

    drift.check_drift(stages, new, "training", progress, discard=discard)


def _purpose(draft: Draft) -> str:
    """What a training is for; the recipe's own may change its method and so its label."""
    return draft.label if draft.label.startswith("recover ") else "train"
