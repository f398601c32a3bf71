"""A student's loss is the divergence from its teacher, and a quantized base is what serving has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunesmith.config.schema.train import Lora
from tunesmith.train import loss as losses
from tunesmith.train.compressed import _RoundToInt8
from tunesmith.train.distil import Distillation
from tunesmith.train.examples import Example
from tunesmith.train.loss import Batch, collate
from tunesmith.train.mend import mend_student
from tunesmith.train.model import add_adapter


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_the_loss_and_its_gradient_are_those_of_whole_distributions(
    family: str, rows: int, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_FROZEN_LOGITS", rows * 512)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", {"cpu": 1})
    student, teacher = (AutoModelForCausalLM.from_pretrained(base_of(family)) for _ in range(2))
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    student = add_adapter(student, Lora(r=4))
    loss = Distillation(student, teacher, torch.float32)
    ids = np.arange(40, dtype=np.int32)
    batch = collate([Example(ids, ids % 3 > 0), Example(ids[:25], ids[:25] > 4)])
    nats_N = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N)
    nats_N.sum().backward()
    found = [weight.grad for weight in loss.parameters() if weight.requires_grad]
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert not {id(w) for w in teacher.parameters()} & {id(w) for w in loss.parameters()}

    student.zero_grad()
    learnt_NV, taught_NV = (
        model.all_logits(batch.input_ids_BS).flatten(0, 1)[batch.positions_N].log_softmax(-1)
        for model in (loss, loss.teacher)
    )
    expected_N = (taught_NV.exp() * (taught_NV - learnt_NV)).sum(-1)
    torch.testing.assert_close(nats_N, expected_N, rtol=1e-4, atol=1e-6)
    assert float(expected_N.detach().mean()) > 1e-3
    expected_N.sum().backward()
    for ours, weight in zip(found, (w for w in loss.parameters() if w.requires_grad), strict=True):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-3, atol=1e-5)


def _pair(folder: Path) -> tuple[Any, Any, list[Batch]]:
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    ids = np.arange(40, dtype=np.int32)
    return student, teacher, [collate([Example(ids * step % 97, ids > 0)]) for step in (1, 3, 7)]


def test_an_error_of_low_rank_is_mended_before_a_step(base_of: Callable[[str], Path]) -> None:
    student, teacher, batches = _pair(base_of("llama"))
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "proj" in name:
                rows, columns = weight.shape
                weight.add_(torch.randn(rows, 3) @ torch.randn(3, columns) * 0.05)
    loss = Distillation(add_adapter(student, Lora(r=4)), teacher, torch.float32)
    before, after = mend_student(loss, batches, batches)
    assert before > 1e-2
    assert after < 1e-3 * before


def test_weights_that_only_changed_places_are_left_alone(base_of: Callable[[str], Path]) -> None:
    student, teacher, batches = _pair(base_of("llama"))
    for layer in student.model.layers:
        mlp = layer.mlp
        order = torch.randperm(mlp.gate_proj.weight.shape[0])
        for part, turned in ((mlp.gate_proj, True), (mlp.up_proj, True), (mlp.down_proj, False)):
            kept = part.weight.data
            part.weight.data = kept[order] if turned else kept[:, order]
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight) * 0.02)
    loss = Distillation(add_adapter(student, Lora(r=4)), teacher, torch.float32)
    before, after = mend_student(loss, batches, batches)
    assert before == after
    products = [weight for name, weight in loss.named_parameters() if "lora_B" in name]
    assert products and not any(weight.any() for weight in products)


def test_activations_are_rounded_token_by_token_and_gradients_pass() -> None:
    value = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5)[:, None]
    value.requires_grad_()
    rounded: Tensor = _RoundToInt8.apply(value)
    error = (rounded - value).abs().amax(-1) / value.abs().amax(-1)
    assert float(error.min()) > 0 and float(error.max()) <= 0.5 / 127 * 1.001
    zeros: Tensor = _RoundToInt8.apply(torch.zeros(3, 8))
    assert not zeros.any()
    weight = nn.Parameter(torch.randn_like(value))
    (rounded * weight).sum().backward()
    assert torch.equal(value.grad, weight)  # type: ignore[arg-type]
