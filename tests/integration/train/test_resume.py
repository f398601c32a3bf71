"""A training that was stopped or killed ends bit for bit as it would have without."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config import Recipe, WorkInterrupted, dump_recipe
from tunesmith.ledger import hash_file
from tunesmith.pipeline import Stages
from tunesmith.train.batches import Rows
from tunesmith.train.loop import Trainer
from tunesmith.train.ranks import join
from tunesmith.train.stage import train_stage

STEPS = 60


def start(recipe: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tunesmith.cli", "train", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached; exit code {process.poll()}")


def lines(path: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock."""
    timed = {"elapsed_s", "supervised_tokens_per_s"}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in line.keys() - timed} for line in found]


def test_sigterm_and_kill_change_nothing(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": 7, "eval_steps": 10, "logging_steps": 3,
        "lora": {"lora_dropout": 0.1}, "merge": False,
    }  # fmt: skip
    whole = train_stage(Stages(recipe_of(store="whole", **settings)), join())

    recipe = recipe_of(store="cut", **settings)
    stages = Stages(recipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    scratch = tmp_path / "cut" / "work" / stages.trained.id / "scratch"

    process = start(tmp_path / "recipe.yaml")
    wait_for_step(scratch / "metrics.jsonl", 9, process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"run the same command again to resume" in message
    [checkpoint] = (scratch / "checkpoints").iterdir()
    assert 9 <= int(checkpoint.name.partition("-")[2]) < STEPS
    saved = {path.name for path in checkpoint.iterdir()}
    assert saved == {"weights.safetensors", "state.pt", "random-0.pt"}
    base = stages.made(stages.base).root / "model.safetensors"
    assert (checkpoint / "weights.safetensors").stat().st_size < 0.5 * base.stat().st_size

    process = start(tmp_path / "recipe.yaml")
    wait_for_step(scratch / "metrics.jsonl", 30, process)
    process.kill()
    process.communicate()
    assert stages.store.in_progress(stages.trained)
    assert not stages.store.find(stages.trained.id)

    resumed = train_stage(stages, join())
    assert resumed.id == whole.id
    weights = "adapter_model.safetensors"
    assert hash_file(resumed.root / weights) == hash_file(whole.root / weights)
    assert hash_file(resumed.root / "adapter_config.json") == hash_file(
        whole.root / "adapter_config.json"
    )
    assert lines(resumed.root / "metrics.jsonl") == lines(whole.root / "metrics.jsonl")
    same = ("steps", "final_loss", "eval_loss_before", "eval_loss_after", "supervised_tokens_seen")
    assert [resumed.manifest.metrics[key] for key in same] == [
        whole.manifest.metrics[key] for key in same
    ]
    assert not scratch.exists()


def test_twenty_stops_at_random_steps_change_nothing(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "max_steps": 100, "save_steps": 9, "eval_steps": 13, "lora": {"lora_dropout": 0.1},
        "neftune_noise_alpha": 5.0,
    }  # fmt: skip
    whole = train_stage(Stages(recipe_of(store="whole", **settings)), join())
    steps = set(random.Random(1).sample(range(1, 100), 20))
    step = Trainer._step

    def step_and_stop(trainer: Trainer, rows: Rows) -> torch.Tensor:
        norm = step(trainer, rows)
        if trainer.progress.step in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    monkeypatch.setattr(Trainer, "_step", step_and_stop)
    stages, stops = Stages(recipe_of(store="cut", **settings)), 0
    while not stages.store.find(stages.trained.id):
        try:
            train_stage(stages, join())
        except WorkInterrupted:
            stops += 1
    assert stops == 20
    weights = "adapter_model.safetensors"
    cut = stages.made(stages.trained)
    assert hash_file(cut.root / weights) == hash_file(whole.root / weights)
    assert lines(cut.root / "metrics.jsonl") == lines(whole.root / "metrics.jsonl")
