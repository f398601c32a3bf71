"""Checkpoints are whole or absent, and bring every optimizer back exactly."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tunesmith.config.schema.train import Train
from tunesmith.pipeline import Stages
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.optimizer import make_optimizer, make_schedule
from tunesmith.train.stage import train_stage


class Run:
    """A frozen and two trained layers, with an optimizer and a schedule."""

    def __init__(self, optim: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64))
        self.model[0].requires_grad_(False)
        settings = Train(method="full", optim=optim, weight_decay=0.1)  # type: ignore[arg-type]
        self.optimizer = make_optimizer(self.model, settings, torch.device("cpu"))
        self.parts: dict[str, Any] = {
            "optimizer": self.optimizer,
            "schedule": make_schedule(self.optimizer, settings, 20),
        }

    def step(self) -> None:
        self.model(torch.randn(8, 64)).square().mean().backward()
        self.optimizer.step()
        self.parts["schedule"].step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit"])
def test_a_restored_run_goes_on_exactly(optim: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True))
    run, other = Run(optim), Run(optim)
    frozen = run.model[0].weight.clone()
    for _ in range(3):
        run.step()
    checkpoints.save(3, run.model, run.parts, {"step": 3})
    run.step()  # While it is being written.
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest
    assert checkpoints.restore(latest, other.model, other.parts) == {"step": 3}
    other.step()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
    assert torch.equal(frozen, run.model[0].weight)
    assert not torch.equal(run.model[2].weight, torch.ones(64))


def test_a_half_written_checkpoint_is_none_and_older_ones_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True))
    assert checkpoints.latest() is None
    run = Run("adamw_torch")
    run.step()
    checkpoints.save(9, run.model, run.parts, {"step": 9})
    checkpoints.wait()
    (folder / "writing").mkdir()
    (folder / "writing" / "weights.safetensors").write_bytes(b"torn")
    assert checkpoints.latest() == folder / "step-00000009"
    checkpoints.save(10, run.model, run.parts, {"step": 10})
    checkpoints.close()
    assert [path.name for path in folder.iterdir()] == ["step-00000010"]


def test_of_fifty_kills_while_saving_each_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The saving process is a fork of this one: fifty starts of torch would take minutes. Each
    lives for a few checkpoints, and is killed at any point of writing one."""
    dice, run, other = random.Random(0), Run("adamw_torch"), Run("adamw_torch")
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True))
    run.step()
    reached = 0
    for _ in range(50):
        pid = os.fork()
        if pid == 0:
            for step in range(reached + 1, 10**8):
                checkpoints.save(step, run.model, run.parts, {"step": step})
        time.sleep(dice.uniform(0.005, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if latest := checkpoints.latest():
            progress = checkpoints.restore(latest, other.model, other.parts)
            assert progress["step"] == int(latest.name.partition("-")[2]) >= reached
            reached = progress["step"]
            assert torch.equal(other.model[1].weight, run.model[1].weight)
    assert reached > 10


@contextlib.contextmanager
def no_file_larger_than(limit_bytes: int) -> Iterator[None]:
    """Writes past the limit fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_failed_is_told_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True))
    run = Run("adamw_torch")
    run.step()
    checkpoints.save(1, run.model, run.parts, {"step": 1})
    checkpoints.wait()
    with no_file_larger_than(1024):
        checkpoints.save(2, run.model, run.parts, {"step": 2})
        checkpoints.close()
    assert checkpoints.has_failed
    with pytest.raises(Exception, match="File too large"):
        checkpoints.wait()
    assert checkpoints.latest() == tmp_path / "checkpoints" / "step-00000001"


def test_a_write_that_failed_ends_the_training_at_the_next_step(
    stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for the first checkpoint alone, and nothing is saved after it."""
    write, attempts = Checkpoints._write, []

    def write_on_a_full_disk(*arguments: Any) -> None:
        attempts.append(arguments)
        with no_file_larger_than(1024):
            write(*arguments)

    monkeypatch.setattr(Checkpoints, "_write", write_on_a_full_disk)
    stages = stages_of(max_steps=200, save_steps=2)
    with pytest.raises(Exception, match="File too large"):
        train_stage(stages, Accelerator(cpu=True))
    assert len(attempts) == 1
    assert not stages.store.find(stages.trained.id)


def test_weight_decay_is_for_matrices_alone() -> None:
    groups = Run("adamw_torch").optimizer.param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 1),
        (0.0, 3),
    ]
