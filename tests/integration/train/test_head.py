"""At a frozen head the loss and its gradient are those of the plain way, and logits never stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tunesmith.config.schema.train import Lora
from tunesmith.train import loss as losses
from tunesmith.train.examples import Example
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.model import add_adapter

LORA = Lora(r=4)


def _model(folder: Path, lora: Lora | None = LORA) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if lora is None:
        return model
    model = add_adapter(model, lora)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def _gradient(loss: TokenLoss, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    rows = [
        Example(random.integers(0, 500, length).astype(np.int32), np.arange(length) % 3 > 0)
        for length in (40, 31, 12)
    ]
    batch = collate(rows)
    loss.train()
    loss.zero_grad()
    nats = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum()
    (nats * scale).backward()
    found = [weight.grad.flatten() for weight in loss.parameters() if weight.requires_grad]
    return nats.detach(), torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_the_gradient_is_that_of_the_plain_way(
    family: str, rows: int, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_FROZEN_LOGITS", rows * 512)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", {"cpu": 1})
    loss = TokenLoss(_model(base_of(family)), torch.float32)
    calls = []
    plain = losses.loss_at_frozen_head
    monkeypatch.setattr(
        losses, "loss_at_frozen_head", lambda *given: calls.append(1) or plain(*given)
    )
    nats, gradient = _gradient(loss, 0.01)
    assert calls
    loss.__dict__["_head_is_frozen"] = False
    expected_nats, expected = _gradient(loss, 0.01)
    assert len(calls) == 1
    torch.testing.assert_close(nats, expected_nats)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_a_head_that_is_trained_goes_the_plain_way(base_of: Callable[[str], Path]) -> None:
    for lora, dtype in ((None, torch.float32), (LORA, torch.float16)):
        assert not TokenLoss(_model(base_of("llama"), lora), dtype)._head_is_frozen
    loss = TokenLoss(_model(base_of("llama")), torch.float32)
    head = loss.model.get_base_model().get_output_embeddings().weight.requires_grad_(True)
    _gradient(loss, 1.0)
    assert head.grad is not None and head.grad.norm() > 0


def test_logits_are_not_kept(base_of: Callable[[str], Path]) -> None:
    loss = TokenLoss(_model(base_of("llama")), torch.float32)
    _gradient(loss, 1.0)  # until then the decoder's kind of output is not known
    kept: list[torch.Size] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.shape)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        hidden_ND = torch.randn(9, 64, requires_grad=True)
        losses.loss_at_frozen_head(hidden_ND, torch.arange(9), loss._nats, 4)
    # Within chunks of 4 the inner backward pass has used up what it kept.
    assert [shape for shape in kept if shape[:1] == (9,)] == [torch.Size([9, 64])]
    assert kept[-1] == torch.Size([9, 64])
