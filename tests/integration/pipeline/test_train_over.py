"""From a quantized base to an adapter fitted to it, in training and in the real engine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from tunesmith.config import Recipe, UserError, WorkInterrupted
from tunesmith.config.schemes import has_amx
from tunesmith.data import make_dataset
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.evaluate.variants import measure_variant, read_rows
from tunesmith.pipeline import Stages
from tunesmith.quantize.command import run as quantize
from tunesmith.train import command, recover
from tunesmith.train.batches import Rows
from tunesmith.train.language import EVALUATION_FILE, read_language
from tunesmith.train.loop import Trainer
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.model import load_adapter, load_base

SCHEMES = ("w8a8-int8", "w4a16", "w2a16")
# What this machine's engine takes an adapter over.
OVER = "w8a8-int8" if has_amx() or has_gpu_engine() else "w4a16"


def stages_over(folder: Path, base: str, rows: list[dict[str, Any]], **train: Any) -> Stages:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"method": "lora", "lora": {"r": 4}, "learning_rate": 1e-2, "max_steps": 10}
    recipe = {
        "name": "over",
        "store": {"folder": folder / "store"},
        "model": {"base": base},
        "data": {"train": str(path), "max_length": 64, "evaluation_fraction": 0.3},
        "train": settings | train,
        "evaluate": {"variants": ["adapter"], "tasks": ["completion_loss"]},
        "engine": {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_gib": 0.25},
    }
    if "over" in train:
        recipe["quantize"] = {
            "scheme": SCHEMES,
            "calibration_rows": 24,
            "recover": {"schemes": ["w2a16"], "max_steps": 60, "r": 16, "learning_rate": 5e-3},
        }
    return Stages(Recipe.model_validate(recipe))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("over")


@pytest.fixture(scope="module")
def stages(folder: Path, llama: Path, rows: list[dict[str, Any]]) -> Stages:
    stages = stages_over(folder, str(llama), rows, over=OVER)
    make_dataset(stages)
    with pytest.raises(UserError, match="run: tunesmith quantize"):
        command.run(stages)
    quantize(stages)
    return stages


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_computes_with_the_weights_that_are_served(stages: Stages, scheme: str) -> None:
    checkpoint = stages.made(stages.quantized(scheme))
    ours = load_base(checkpoint.root, torch.bfloat16, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint.root,
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    for name in checkpoint.manifest.metrics["quantized"]:
        layer = ours.get_submodule(name)
        assert type(layer) is torch.nn.Linear
        assert torch.equal(layer.weight, theirs.get_submodule(name).weight), name
        assert bool(layer._forward_pre_hooks) == (scheme == "w8a8-int8")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        found, expected = ours(ids).logits.float(), theirs(ids).logits.float()
    # compressed-tensors rounds the scales of activations to bfloat16, engines do not.
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert not any("scale" in name for name, _ in ours.named_parameters())


def test_the_engine_says_of_the_adapter_what_training_said(stages: Stages) -> None:
    made = command.run(stages)
    assert "tuned" not in made
    trained = made["trained"]
    checkpoint = stages.made(stages.quantized(OVER))
    assert made["base"] == trained["base"] == checkpoint.id
    assert trained["eval_loss_after"] < trained["eval_loss_before"] - 0.1
    assert command.run(stages)["trained"]["id"] == trained["id"]

    served = {row["id"]: row for row in read_rows(measure_variant(stages, "adapter"))}
    adapter = stages.made(stages.trained)
    language, recipe = read_language(adapter.root, stages.recipe), stages.recipe
    assert recipe.data
    model = load_base(checkpoint.root, torch.bfloat16, torch.device("cpu"))
    loss = TokenLoss(load_adapter(model, adapter.root), torch.bfloat16).eval()
    dataset = stages.made(stages.dataset)
    ids = [
        json.loads(line)["id"] for line in (dataset.root / EVALUATION_FILE).read_text().splitlines()
    ]
    examples = language.tokenise(dataset, EVALUATION_FILE, recipe.data).rows
    assert len(ids) == len(examples) == len(served) > 10
    for row_id, example in zip(ids, examples, strict=True):
        batch = collate([example])
        with torch.no_grad():
            nats = float(loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum())
        row = served[row_id]
        assert row["completion_tokens"] == len(batch.targets_N)
        assert row["completion_loss_sum_nats"] == pytest.approx(nats, rel=5e-3)


def test_what_two_bits_lost_is_won_back_by_learning_from_the_parent(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def step_and_stop(trainer: Trainer, rows: Rows) -> Any:
        norm = step(trainer, rows)
        if trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_and_stop)
        with pytest.raises(WorkInterrupted):
            recover.run(stages)
    command.run(stages)  # another training of the same name does not mind
    quantize = stages.recipe.quantize
    assert quantize and quantize.recover
    changed = quantize.recover.model_copy(update={"r": 8})
    other = stages.recipe.model_copy(
        update={"quantize": quantize.model_copy(update={"recover": changed})}
    )
    with pytest.raises(UserError, match="recover.r: 16 → 8"):
        recover.run(Stages(other))

    made = recover.run(stages)["adapters"]["w2a16"]
    assert made["kl_nats_mended"] < made["kl_nats_before"]
    assert made["eval_loss_after"] < 0.7 * made["kl_nats_before"]
    adapter = stages.made(stages.recovered("w2a16"))
    assert adapter.manifest.parents["teacher"] == stages.base.id
    config = json.loads((adapter.root / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == stages.quantized("w2a16").id
    assert recover.run(stages)["adapters"]["w2a16"]["reused"]


def test_an_adapter_may_begin_from_what_the_weights_that_serve_it_lost(
    stages: Stages, folder: Path, llama: Path, rows: list[dict[str, Any]]
) -> None:
    lora = {"r": 16, "init_lora_weights": "loftq"}
    trained = command.run(stages_over(folder, str(llama), rows, over="w2a16", lora=lora))["trained"]
    assert trained["base"] == stages.quantized("w2a16").id
    assert trained["kl_nats_mended"] < 0.8 * trained["kl_nats_before"]
    assert trained["eval_loss_after"] < trained["eval_loss_before"] - 0.1


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "set train.merge: false"),
        ({"method": "full"}, "over such a base there is lora alone"),
        ({"merge": False, "lora": {"init_lora_weights": "pissa"}}, "another start than zeros"),
    ],
)
def test_a_base_that_is_quantized_already_is_trained_over_or_refused(
    stages: Stages,
    folder: Path,
    rows: list[dict[str, Any]],
    train: dict[str, Any],
    message: str,
) -> None:
    base = stages.quantized("w4a16").id
    with pytest.raises(UserError, match=message):
        command.run(stages_over(folder, base, rows, **train))


def test_a_quantized_checkpoint_can_be_the_base_of_a_recipe(
    stages: Stages, folder: Path, rows: list[dict[str, Any]], stages_of: Callable[..., Stages]
) -> None:
    base = stages.quantized("w4a16").id
    over = stages_over(folder, base, rows, merge=False)
    assert command.run(over)["trained"]["base"] == base
    assert over.served_over("adapter") == over.base
