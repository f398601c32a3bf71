"""Useful work is counted as what the result needs, by hand and against torch's own counter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MixtralConfig

from tunesmith.config.schema.train import Lora
from tunesmith.train.examples import Example
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.model import add_adapter
from tunesmith.train.shapes import random_rows, shape_config
from tunesmith.train.useful import Layers, count_layers, matmul_tflops, peak_tflops

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
MATRICES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
HEAD = 64 * 512


def _row(length: int, learnt: int) -> Example:
    mask = np.zeros(length, dtype=np.bool_)
    mask[-learnt:] = True
    return Example(np.ones(length, dtype=np.int32), mask)


def test_a_frozen_matrix_counts_four_and_a_trained_one_six() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    full = count_layers(model)
    assert full == Layers(0, MATRICES, HEAD, True, 64, (None, None))
    lora = count_layers(add_adapter(model, Lora(r=4)))
    adapter = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert lora == Layers(MATRICES, adapter, HEAD, False, 64, (None, None))
    row = _row(length=11, learnt=3)
    attention = 6 * 2 * 64 * 10 * 10  # 6 · layers · width · length²
    assert full.useful_flops([row]) == 6 * MATRICES * 10 + 6 * HEAD * 3 + attention
    expected = 4 * MATRICES * 10 + 6 * adapter * 10 + 4 * HEAD * 3 + attention
    assert lora.useful_flops([row, row]) == 2 * expected


@pytest.mark.parametrize("method", ["full", "lora"])
def test_torch_counts_the_same_matrix_products(method: str) -> None:
    """But for the first layer's inputs, whose gradient only embeddings need, and attention, which
    torch counts whole where half of it is masked."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    if method == "lora":
        model = add_adapter(model, Lora(r=4))
    layers = count_layers(model)
    assert layers
    rows = [_row(33, 32), _row(33, 32)]
    loss = TokenLoss(model, torch.float32)
    batch = collate(rows)
    with FlopCounterMode(display=False) as counter:
        loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum().backward()
    attention = 2 * 6 * 2 * 64 * 32 * 32
    skipped = 2 * 64 * (64 + 32 + 32) * 64 if method == "lora" else 0  # the first q, k and v
    useful = layers.useful_flops(rows)
    assert counter.get_total_flops() == pytest.approx(useful + attention - skipped, rel=0.01)


def test_windows_limit_attention() -> None:
    config = MistralConfig(**SIZES, sliding_window=8)
    layers = Layers(0, 0, 0, False, 64, (8, 8))
    with torch.device("meta"):
        from transformers import MistralForCausalLM

        found = count_layers(MistralForCausalLM(config))
    assert found and found.windows == (8, 8)
    row = _row(length=21, learnt=1)
    assert layers.useful_flops([row]) == 12 * 64 * 2 * (8 * 8 / 2 + 12 * 8)


def test_a_mixture_of_experts_is_not_counted() -> None:
    from transformers import MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    assert count_layers(model) is None


def test_the_8b_shape_is_the_known_one() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(shape_config("llama-8b", 4096))
        assert sum(weight.numel() for weight in model.parameters()) == 8_030_261_248
        layers = count_layers(add_adapter(model, Lora(r=16)))
    assert layers
    per_token = layers.useful_flops(random_rows(1, 4096, 1000, 0).rows) / 4096
    assert per_token == pytest.approx(33.5e9, rel=0.01)


def test_the_ceiling_is_measured_and_no_peak_is_claimed_for_a_cpu() -> None:
    assert matmul_tflops(torch.float32, torch.device("cpu")) > 1e-4
    assert peak_tflops(torch.bfloat16, torch.device("cpu")) is None
