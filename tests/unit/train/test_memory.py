"""What is counted without contents is what is alive when the same code runs with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.config import Recipe
from tunesmith.config.schema.train import Train
from tunesmith.train import memory
from tunesmith.train.forecast import empty_model
from tunesmith.train.loss import TokenLoss
from tunesmith.train.model import add_adapter
from tunesmith.train.optimizer import make_optimizer

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=640,
)
WORK = memory.Workload(
    (memory.Pass(4, 48, 100),), (memory.Pass(8, 32, 60),), memory.Pass(1, 20, 9), False
)


def predicted(dtype: str = "float32", work: memory.Workload = WORK, **train: Any) -> memory.Parts:
    settings = Train.model_validate({"method": "lora", **train})
    recipe = Recipe.model_construct(
        model=Recipe.model_validate({"name": "x", "model": {"base": "y", "dtype": dtype}}).model,
        train=settings,
    )
    return memory.simulate(empty_model(recipe, CONFIG), settings, getattr(torch, dtype), work)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_tensors_without_contents_weigh_as_much_as_real_ones(method: str) -> None:
    train = Train.model_validate({"method": method})
    model: Any = LlamaForCausalLM(CONFIG)
    if method == "lora":
        model = add_adapter(model, train.lora)
    meter = memory._Meter(CONFIG.vocab_size)
    for tensor in [*model.parameters(), *model.buffers()]:
        is_adapter = method == "lora" and tensor.requires_grad
        meter.add(tensor, "adapters" if is_adapter else "weights")
    loss = TokenLoss(model, torch.float32)
    optimizer = make_optimizer(loss, train, torch.device("cpu"))
    with meter:
        memory._run(loss, optimizer, WORK, meter)
    without = predicted(method=method)
    assert without.keys() == meter.peak.keys()
    for part, size in meter.peak.items():
        assert without[part] == pytest.approx(size, rel=0.02, abs=4096), part


def test_parts_are_those_of_the_settings() -> None:
    weights = sum(weight.numel() for weight in LlamaForCausalLM(CONFIG).parameters())
    full, lora, half = predicted(method="full"), predicted(), predicted("bfloat16")
    buffers = 1024  # rotary frequencies
    assert full["weights"] == pytest.approx(4 * weights, abs=buffers)
    assert full["optimizer"] == pytest.approx(8 * weights, rel=0.001)
    assert lora["optimizer"] == pytest.approx(2 * lora["adapters"], rel=0.02)
    assert half["weights"] == pytest.approx(2 * weights, abs=buffers)
    assert predicted("bfloat16", method="qlora")["weights"] < 0.7 * half["weights"]


def test_settings_that_save_memory_do() -> None:
    long = memory.Workload(
        (memory.Pass(8, 512, 512),), (memory.Pass(1, 8, 4),), memory.Pass(1, 8, 4), False
    )
    plain = predicted(work=long)
    checkpointed = predicted(work=long, gradient_checkpointing=True)
    assert checkpointed["activations"] < 0.7 * plain["activations"]
    small = memory.Workload(long.evaluation, long.evaluation, long.first, False)
    eight = predicted(work=small, method="full", optim="adamw_8bit")
    assert eight["optimizer"] < 0.85 * predicted(work=small, method="full")["optimizer"]
    more = predicted(work=long, lora={"use_dora": True, "lora_dropout": 0.1})
    assert more["activations"] > 1.1 * plain["activations"]


def test_gradients_of_earlier_passes_are_counted() -> None:
    several = memory.Workload(WORK.train, WORK.evaluation, WORK.first, True)
    weights = sum(weight.numel() for weight in LlamaForCausalLM(CONFIG).parameters())
    found = predicted(method="full", work=several)
    assert found["gradients"] == pytest.approx(4 * weights, rel=0.001)


def test_random_numbers_stay_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    predicted(lora={"lora_dropout": 0.5})
    assert torch.equal(before, torch.get_rng_state())
