"""A tracker is shown what `metrics.jsonl` holds, and a resumed training goes on in its run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tunesmith.config import MissingExtraError, Recipe, WorkInterrupted
from tunesmith.pipeline import Stages
from tunesmith.train.batches import Rows
from tunesmith.train.loop import Trainer
from tunesmith.train.ranks import join
from tunesmith.train.stage import train_stage


def stop_once(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    step = Trainer._step

    def step_and_stop(trainer: Trainer, groups: Rows) -> torch.Tensor:
        norm = step(trainer, groups)
        if trainer.progress.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    monkeypatch.setattr(Trainer, "_step", step_and_stop)


def train(recipe: Recipe) -> list[dict[str, Any]]:
    """Train, stopped once in between; returns the lines of `metrics.jsonl`."""
    stages = Stages(recipe)
    with pytest.raises(WorkInterrupted):
        train_stage(stages, join())
    lines = (train_stage(stages, join()).root / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_tensorboard_shows_every_line(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_once(monkeypatch, at=3)
    recipe = recipe_of(report_to=["tensorboard"])
    lines = train(recipe)
    [folder] = (recipe.store.folder / "tracking" / "tensorboard").iterdir()
    assert folder.name == Stages(recipe).trained.id
    events = EventAccumulator(str(folder / recipe.name)).Reload()
    for name in ("loss", "eval_loss", "learning_rate"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines if name in line})


def test_mlflow_keeps_one_run(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stop_once(monkeypatch, at=3)
    recipe = recipe_of(report_to=["mlflow"])
    lines = train(recipe)
    client = mlflow.MlflowClient(f"sqlite:///{recipe.store.folder / 'tracking' / 'mlflow.db'}")
    [experiment] = [each for each in client.search_experiments() if each.name == recipe.name]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["train.learning_rate"] == "0.005"
    shown = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "loss")}
    assert shown == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line})


def test_wandb_is_told(recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    stop_once(monkeypatch, at=3)
    recipe = recipe_of(report_to=["wandb"])
    train(recipe)
    runs = list((recipe.store.folder / "tracking" / "wandb").glob("offline-run-*"))
    assert runs and all(run.name.endswith(Stages(recipe).trained.id) for run in runs)


def test_a_tracker_that_is_not_installed_is_named(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(MissingExtraError, match=r"tunesmith\[mlflow\]"):
        train_stage(Stages(recipe_of(report_to=["mlflow"])), join())
