"""Two processes on one training: one artifact, one result, the same loss, divided or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tunesmith.config import (
    Recipe,
    UserError,
    WorkInterrupted,
    dump_recipe,
    load_recipe,
)
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages
from tunesmith.train import command, sharding
from tunesmith.train.batches import Rows
from tunesmith.train.launch import _wait
from tunesmith.train.loop import Trainer
from tunesmith.train.ranks import join
from tunesmith.train.stage import train_stage


def test_two_ranks_are_started_stopped_and_resumed_as_one(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = {"max_steps": 120, "learning_rate": 1e-3, "save_steps": 200}
    alone = train_stage(
        Stages(recipe_of(store="alone", per_device_train_batch_size=8, **settings)), join()
    ).manifest.metrics
    recipe = recipe_of(store="two", per_device_train_batch_size=4, processes=2, **settings)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    line = [sys.executable, "-m", "tunesmith.cli", "train", str(tmp_path / "recipe.yaml")]
    stages = Stages(recipe)
    scratch = stages.store.scratch(stages.trained)
    with subprocess.Popen(line, stderr=subprocess.PIPE) as process:
        try:
            wait_for_line(scratch / "metrics.jsonl", '"step": 3,', process)
            process.send_signal(signal.SIGTERM)
            _, message = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 75, message.decode()[-3000:]
    [checkpoint] = (scratch / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.partition("-")[2]) < 120
    assert {"random-0.pt", "random-1.pt"} < {path.name for path in checkpoint.iterdir()}

    done = subprocess.run([*line, "--json"], capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert b"resuming after step" in done.stderr
    together = json.loads(done.stdout)
    assert together["tuned"]["kl_nats"]["original"] <= 1e-4
    for key in ("eval_loss_before", "eval_loss_after", "final_loss"):
        assert together["trained"][key] == pytest.approx(alone[key], rel=1e-4), key
    assert not stages.store.faults(stages.made(stages.trained))


def wait_for_line(path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text} was not reached; exit code {process.poll()}")


def test_the_first_failure_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits for it, as a rank does in a collective operation."""
    monkeypatch.setattr("tunesmith.train.launch._GRACE_S", 0.5)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code])
        for code in ("import time; time.sleep(600)", "raise SystemExit(3)")
    ]
    assert _wait(ranks) == 1
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 3]


def test_settings_of_the_launcher_do_not_pass_for_the_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"see train\.sharding"):
        join()


def test_as_many_processes_as_the_recipe_says(
    stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"train\.processes is 2, and the launcher started 1"):
        command.run(stages_of(processes=2))


def test_a_divided_training_ends_as_a_whole_one_does(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    """All weights with tied embeddings, and an adapter on packed ones; the best weights are kept,
    and the second half of each divided training goes on from a checkpoint of whole weights."""
    settings: dict[str, Any] = {
        "load_best_model_at_end": True, "eval_steps": 2, "per_device_train_batch_size": 2,
        "processes": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    }  # fmt: skip
    recipes = [
        recipe_of(base, f"{method}-{sharding}", method=method, learning_rate=rate,
                  sharding=sharding, model={"dtype": dtype}, **settings)
        for base, method, dtype, rate in (
            ("gemma3", "full", "float32", 1e-3), ("llama", "qlora", "bfloat16", 5e-3)
        )
        for sharding in ("none", "full")
    ]  # fmt: skip
    paths = [tmp_path / f"{recipe.store.folder.name}.yaml" for recipe in recipes]
    for recipe, path in zip(recipes, paths, strict=True):
        path.write_text(dump_recipe(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         __file__, *map(str, paths)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    shares = json.loads(done.stdout)
    # Matrices with an odd number of rows leave one more on a rank, and norms are small.
    assert len(shares) == 4 and all(0.45 < share < 0.55 for share in shares)
    made = [Stages(recipe) for recipe in recipes]
    for whole, divided in ((made[0], made[1]), (made[2], made[3])):
        assert_close(whole.made(whole.trained), divided.made(divided.trained))


def assert_close(whole: Artifact, divided: Artifact) -> None:
    assert whole.id == divided.id and whole.manifest.files.keys() == divided.manifest.files.keys()
    for file in (path for path in whole.manifest.files if path.endswith(".safetensors")):
        one, other = load_file(whole.root / file), load_file(divided.root / file)
        assert one.keys() == other.keys() and one
        for name, weight in one.items():
            assert other[name].dtype == weight.dtype
            torch.testing.assert_close(other[name], weight, rtol=1e-2, atol=1e-4)
    ours, theirs = divided.manifest.metrics, whole.manifest.metrics
    for key in ("eval_loss_before", "eval_loss_after", "final_loss"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert ours["best_step"] == theirs["best_step"]
    assert (whole.root / "config.json").exists() == (divided.root / "config.json").exists()


def run_rank(paths: Sequence[str]) -> None:
    """One rank of the test above; prints which share of the weights each attempt at a divided
    training holds."""
    accelerator, shares = join(), []
    shard, step = sharding.shard, Trainer._step

    def shard_and_count(loss: Any, accelerator: Any) -> None:
        shard(loss, accelerator)
        weights = list(loss.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        held = sum(weight.to_local().nbytes for weight in weights)
        shares.append(held / sum(weight.nbytes for weight in weights))

    def step_and_stop(trainer: Trainer, rows: Rows) -> torch.Tensor:
        norm = step(trainer, rows)
        if trainer.progress.step == 3 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.train.stage.shard", shard_and_count)
        for path in paths:
            recipe = load_recipe(Path(path))
            assert recipe.train
            if recipe.train.sharding == "full":
                begun = recipe.train.model_copy(update={"sharding": "none"})
                with patch.context() as stopping, pytest.raises(WorkInterrupted):
                    stopping.setattr(Trainer, "_step", step_and_stop)
                    train_stage(Stages(recipe.model_copy(update={"train": begun})), accelerator)
            train_stage(Stages(recipe), accelerator)
    found = [None] * 2
    torch.distributed.all_gather_object(found, shares)
    print(json.dumps(sum(found, [])))


if __name__ == "__main__":
    run_rank(sys.argv[1:])
