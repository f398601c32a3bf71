"""The benchmark measures the real loop, on the recipe's rows and on random ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config import ModelError, UserError
from tunesmith.pipeline import Stages
from tunesmith.report import write_report
from tunesmith.train import bench, command, fp8, peer
from tunesmith.train.shapes import random_model, shape_config

FEW = {"steps": 2, "warmup_steps": 1, "rounds": 2}
MAKES = {"method": "lora", "per_device_train_batch_size": 4, "merge": False}


def test_the_recipes_own_training_is_measured(
    stages_of: Callable[..., Stages], tmp_path: Path
) -> None:
    stages = stages_of(**MAKES)
    result = bench.run(stages, **FEW)
    assert result["mode"] == "train" and len(result["rounds"]) == 2
    for one in result["rounds"]:
        assert 0 < one["supervised_tokens"] < one["tokens"]
        assert one["useful_flops"] > 0 and one["seconds"] > 0 and one["grad_norm"] > 0
    rates = [one["tokens"] / one["seconds"] for one in result["rounds"]]
    assert result["tokens_per_s"]["lowest"] == pytest.approx(min(rates))
    assert 0 < result["share_of_ceiling"] < 1 and result["mfu"] is None
    assert result["peak_memory_gib"] > 0.01 and result["peer"] is None
    artifact = stages.store.get(result["id"])
    assert artifact.manifest.parents == {"data": stages.dataset.id, "base": stages.base.id}
    report = json.loads((artifact.folder / "bench.json").read_text(encoding="utf-8"))
    assert report["rounds"] == result["rounds"] and report["environment"]["cpu"]
    assert stages.store.faults(artifact) == []
    assert bench.show(result)
    assert bench.run(stages, **FEW)["rounds"] == result["rounds"], "measured once, then kept"
    # The loop that is measured is the one that trains.
    trained = command.run(stages_of(**MAKES, max_steps=3, logging_steps=1))["trained"]
    lines = (Path(trained["path"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line) for line in lines]
    assert [line["loss"] for line in losses if "loss" in line][0] > result["final_loss"]
    assert write_report(stages, tmp_path / "report", {}).is_file()


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_shape_needs_no_model_and_no_rows(
    method: str, stages_of: Callable[..., Stages], tmp_path: Path
) -> None:
    stages = stages_of(
        **MAKES | {"method": method},
        base="no/such-model",
        data={"train": str(tmp_path / "absent.jsonl")},
    )
    result = bench.run(stages, shape="tiny", length=32, profile=True, **FEW)
    assert "aten::" in (Path(result["path"]) / "profile.txt").read_text(encoding="utf-8")
    for one in result["rounds"]:
        assert one["tokens"] == 2 * 4 * 32 and one["supervised_tokens"] == 2 * 4 * 31
    # Nothing can be learnt from noise: as uncertain as 4096 equal tokens, 8.32 nats.
    assert result["final_loss"] == pytest.approx(8.3, abs=0.3)
    assert stages.store.get(result["id"]).manifest.parents == {}


def test_packed_and_plain_shapes_are_of_one_size() -> None:
    config, cpu = shape_config("tiny", 64), torch.device("cpu")
    plain = random_model(config, torch.bfloat16, cpu)
    assert sum(weight.numel() for weight in plain.parameters()) == 5_245_184
    assert {weight.dtype for weight in plain.parameters()} == {torch.bfloat16}
    packed = random_model(config, torch.bfloat16, cpu, nf4=True)
    sizes = [sum(w.nbytes for w in model.parameters()) for model in (plain, packed)]
    outside = 2 * 2 * 4096 * 256  # embeddings and head, in bytes
    assert (sizes[0] - outside) / (sizes[1] - outside) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape": "huge"}, "no such shape; there are tiny"),
        ({"length": 5}, "which --shape asks for"),
        ({"length": 1, "shape": "tiny"}, "--length: at least 2"),
        ({"peer": "axolotl"}, "there is trl"),
        ({"steps": 0}, "--steps: at least 1"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], said: str, stages_of: Callable[..., Stages]
) -> None:
    with pytest.raises(UserError, match=said):
        bench.run(stages_of(**MAKES), **FEW | options)
    with pytest.raises(UserError, match="compares method lora or full"):
        bench.run(stages_of(**MAKES | {"method": "qlora"}), **FEW, peer="trl")


def test_a_peers_job_says_what_the_recipe_says(stages_of: Callable[..., Stages]) -> None:
    train = stages_of(**MAKES | {"learning_rate": 3e-4, "max_grad_norm": 0.5}).recipe.train
    assert train
    arguments = peer.trl_arguments(train, 64, 5)
    assert arguments["learning_rate"] == 3e-4 and arguments["max_grad_norm"] == 0.5
    assert arguments["per_device_train_batch_size"] == 4 and arguments["seed"] == 5
    lora = peer.trl_lora(train)
    assert lora and lora["r"] == train.lora.r and lora["target_modules"] == "all-linear"


def test_fp8_learns_what_bfloat16_learns(
    stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty steps with torch's own FP8 products, which run on a CPU, if slowly."""
    settings = {"max_steps": 50, "logging_steps": 10, "merge": False, "eval_steps": 25}
    precise = {"model": {"dtype": "bfloat16"}}
    with pytest.raises(ModelError, match="needs an NVIDIA GPU"):
        command.run(stages_of(**settings, **precise, base_precision="fp8"))
    monkeypatch.setattr(fp8, "check_device", lambda device: None)
    plain = command.run(stages_of(**settings, **precise))["trained"]
    found = command.run(stages_of(**settings, **precise, base_precision="fp8"))["trained"]
    assert plain["id"] != found["id"]
    assert plain["total_parameters"] == found["total_parameters"]
    learnt = plain["eval_loss_before"] - plain["eval_loss_after"]
    assert learnt > 0.1
    for name in ("eval_loss_before", "eval_loss_after", "final_loss"):
        assert abs(found[name] - plain[name]) < 0.02 * learnt, name
        assert found[name] != plain[name], "FP8 was not used"


def test_the_gpu_script_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """One of its runs, from the shell to the report."""
    root = Path(__file__).parents[3]
    few = ["--length", "16", "--batch", "1", "--steps", "1", "--warmup-steps", "1", "--rounds", "1"]
    done = subprocess.run(
        [root / "scripts/gpu", "--shape", "tiny", *few, "--only", "QLoRA", "--out", tmp_path],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "train-gpu.json").read_text(encoding="utf-8"))
    runs = {run["name"]: run for run in report["runs"]}
    assert runs["QLoRA, checkpointed"]["figures"]["tokens_per_s"]["median"] > 0
    assert runs["LoRA"]["left_out"] == "not asked for"
    verdicts = {goal["verdict"] for goal in report["goals"]}
    assert verdicts <= {"not measured", "not judged"}, "no goal is met without its GPU"
    assert (tmp_path / "train-gpu.md").read_text(encoding="utf-8") in done.stdout
