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
from safetensors.torch import load_file

from tunesmith.config import Recipe, WorkInterrupted, dump_recipe, load_recipe
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


NOISY: dict[str, Any] = {
    "max_steps": 100, "save_steps": 9, "eval_steps": 13, "lora": {"lora_dropout": 0.1},
    "neftune_noise_alpha": 5.0,
}  # fmt: skip


def train_with_stops(stages: Stages, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train to the end through SIGTERMs at random steps, each heard by one rank alone; returns how
    many there were."""
    accelerator = join()
    assert stages.recipe.train and stages.recipe.train.max_steps
    steps = random.Random(1).sample(range(1, stages.recipe.train.max_steps), count)
    mine = set(steps[accelerator.process_index :: accelerator.num_processes])
    step, stops = Trainer._step, 0

    def step_and_stop(trainer: Trainer, rows: Rows) -> torch.Tensor:
        norm = step(trainer, rows)
        if trainer.progress.step in mine:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    monkeypatch.setattr(Trainer, "_step", step_and_stop)
    while not stages.store.find(stages.trained.id):
        try:
            train_stage(stages, accelerator)
        except WorkInterrupted:
            stops += 1
    return stops


def assert_same(cut: Stages, whole: Stages) -> None:
    """The same weights, bit for bit, and the same metrics."""
    ours, theirs = cut.made(cut.trained).root, whole.made(whole.trained).root
    weights = "adapter_model.safetensors"
    assert hash_file(ours / weights) == hash_file(theirs / weights)
    assert lines(ours / "metrics.jsonl") == lines(theirs / "metrics.jsonl")


def test_twenty_stops_at_random_steps_change_nothing(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (Stages(recipe_of(store=store, **NOISY)) for store in ("whole", "cut"))
    train_stage(whole, join())
    assert train_with_stops(cut, 20, monkeypatch) == 20
    assert_same(cut, whole)


def test_stops_of_three_ranks_change_nothing(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Six of them with a whole model in each rank, three with a divided one. Every attempt is one
    more training in the same processes, whose start takes longest. Two ranks would not do: a sum
    of two is rounded in one way only."""
    recipes = [
        recipe_of(
            store=f"{store}-{sharding}", sharding=sharding, processes=3, **NOISY | {"max_steps": 30}
        )
        for sharding in ("none", "full")
        for store in ("whole", "cut")
    ]
    paths = [tmp_path / f"{recipe.store.folder.name}.yaml" for recipe in recipes]
    for recipe, path in zip(recipes, paths, strict=True):
        path.write_text(dump_recipe(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
         __file__, *map(str, paths)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stdout.decode() == "6 stops\n3 stops\n"
    whole, cut, whole_divided, cut_divided = map(Stages, recipes)
    assert_same(cut, whole)
    assert_same(cut_divided, whole_divided)
    one, other = (
        load_file(stages.made(stages.trained).root / "adapter_model.safetensors")
        for stages in (whole, whole_divided)
    )
    assert one.keys() == other.keys() and len(one) == 28  # 7 layers of A and B in 2 blocks
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-5)
    assert not any(torch.equal(weight, torch.zeros_like(weight)) for weight in other.values())


def run_rank(*paths: str) -> None:
    """One rank of the test above."""
    whole, cut, whole_divided, cut_divided = (Stages(load_recipe(Path(path))) for path in paths)
    for stages, other, count in ((whole, cut, 6), (whole_divided, cut_divided, 3)):
        train_stage(stages, join())
        with pytest.MonkeyPatch.context() as monkeypatch:
            print(f"{train_with_stops(other, count, monkeypatch)} stops")


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
