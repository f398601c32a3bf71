"""A training's figures also in TensorBoard, MLflow or Weights & Biases: mirrors, never the record.

An artifact's own `metrics.jsonl` holds the same figures whether or not anything is mirrored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.config.errors import require
from tunesmith.ledger import Draft
from tunesmith.pipeline.stages import Stages

_MLFLOW_RUN = "mlflow-run"


@contextmanager
def tracked(stages: Stages, draft: Draft, scratch: Path, accelerator: Any) -> Iterator[None]:
    """Mirror what the accelerator logs while the block lasts, one run for one artifact: a resumed
    training goes on in the run it began.

    Raises MissingExtraError when the package of a tracker is not installed.
    """
    names = stages.recipe.train.report_to if stages.recipe.train else ()
    for name in names:
        require(name, name)
    if not names:
        yield
        return
    folder = stages.store.folder / "tracking"
    folder.mkdir(exist_ok=True)
    accelerator.log_with = list(names)
    accelerator.project_configuration.logging_dir = str(folder / "tensorboard" / draft.id)
    remembered = scratch / _MLFLOW_RUN
    options = {
        "mlflow": {
            "run_name": draft.id,
            "run_id": remembered.read_text(encoding="utf-8") if remembered.exists() else None,
        },
        "wandb": {"name": draft.id, "id": draft.id, "resume": "allow", "dir": str(folder)},
    }
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        require("mlflow", "mlflow").set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    accelerator.init_trackers(stages.recipe.name, dict(_flat(draft.section)), options)
    if "mlflow" in names and accelerator.is_main_process:
        run = accelerator.get_tracker("mlflow").tracker
        remembered.write_text(run.info.run_id, encoding="utf-8")
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"train": {"lora": {"r": 8}}}` → `train.lora.r: 8`, in types that every tracker takes."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", str(value)
