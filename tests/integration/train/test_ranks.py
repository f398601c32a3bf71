"""Two processes on one training: one artifact, one result, the same loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.config import Recipe, dump_recipe
from tunesmith.pipeline import Stages
from tunesmith.train.ranks import join
from tunesmith.train.stage import train_stage


def test_two_ranks_make_one_artifact(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    alone = train_stage(
        Stages(recipe_of(store="alone", per_device_train_batch_size=8, save_steps=2)), join()
    ).manifest.metrics
    recipe = recipe_of(store="together", per_device_train_batch_size=4, save_steps=2)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "tunesmith.cli", "train", str(tmp_path / "recipe.yaml"), "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    together = json.loads(done.stdout)
    assert together["tuned"]["kl_nats"]["original"] <= 1e-4
    for key in ("eval_loss_before", "eval_loss_after", "final_loss"):
        assert together["trained"][key] == pytest.approx(alone[key], rel=1e-5), key
    stages = Stages(recipe)
    assert not stages.store.faults(stages.made(stages.trained))
