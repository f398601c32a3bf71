"""The fast paths of training on a GPU: they compute what the plain one computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config import Recipe
from tunesmith.config.schema.train import Lora, Train
from tunesmith.pipeline import Stages
from tunesmith.train import bench, fp8
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.ready import make_ready
from tunesmith.train.shapes import random_model, random_rows, shape_config

pytestmark = pytest.mark.gpu
LENGTH = 256
LORA = Train(method="lora", lora=Lora(r=8))


def _model(device: torch.device, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = random_model(shape_config("tiny", LENGTH), torch.bfloat16, device)
    model = make_ready(model, LORA.model_copy(update=changes), base=None)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def _pass(model: Any, device: torch.device, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(random_rows(rows, LENGTH, 4096, 0).rows).to(device)
    loss = TokenLoss(model, torch.bfloat16).train()
    nats = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum()
    nats.backward()
    gradient = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
    return nats.detach(), torch.cat(gradient)


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).norm() / right.float().norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(device: torch.device, checkpointing: bool) -> None:
    same = {"gradient_checkpointing": checkpointing}
    nats, gradient = _pass(_model(device, **same), device)
    compiled_nats, compiled = _pass(_model(device, **same, torch_compile=True), device)
    assert _distance(compiled_nats, nats) < 1e-3
    assert _distance(compiled, gradient) < 0.05


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_is_near_bfloat16(device: torch.device, compiled: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs FP8 matrix products: compute capability 8.9")
    nats, gradient = _pass(_model(device), device)
    found = _model(device, base_precision="fp8", torch_compile=compiled)
    fp8_nats, other = _pass(found, device)
    assert _distance(fp8_nats, nats) < 5e-3
    assert _distance(other, gradient) < 0.2
    layer = next(module for module in found.modules() if isinstance(module, fp8.Fp8Linear))
    inputs = torch.randn(48, layer.in_features, device=device, dtype=torch.bfloat16)
    assert _distance(layer(inputs), inputs.float() @ layer.dequantized().t()) < 0.05


def test_a_pass_waits_for_the_device_at_most_once(device: torch.device) -> None:
    """transformers looks at the positions once per pass; whatever else waits is ours."""
    model = _model(device)
    _pass(model, device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _pass(model, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) <= 1, waits


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_shape_is_measured(method: str, device: torch.device, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    recipe = Recipe.model_validate(
        {
            "name": "shape",
            "store": {"folder": str(tmp_path)},
            "model": {"base": "random"},
            "data": {"train": "random"},
            "train": {"method": method, "per_device_train_batch_size": 4},
        }
    )
    few = {"steps": 2, "warmup_steps": 1, "rounds": 2}
    result = bench.run(Stages(recipe), shape="tiny", length=LENGTH, **few)
    assert 0 < result["share_of_ceiling"] < 1
    assert 0 < result["peak_memory_gib"] < 8
    assert result["final_loss"] == pytest.approx(8.3, abs=0.3)
