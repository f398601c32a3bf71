"""Layers that are compiled compute what they computed, whatever the lengths, and compile few times.

`aot_eager` traces and differentiates as the real compiler does, and leaves out its code generation,
which is slow on a CPU; tests/gpu has that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from tunesmith.config.errors import ModelError
from tunesmith.config.schema.train import Lora
from tunesmith.train.examples import Example
from tunesmith.train.fp8 import convert_frozen
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.model import add_adapter
from tunesmith.train.region import compile_layers, decoder_layers

SIZES = ((4, 33), (3, 48))
"""Sequences and tokens of each pass."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def _model(folder: Path, *, fp8: bool = False, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if fp8 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = add_adapter(model, Lora(r=4))
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    if fp8:
        convert_frozen(model)
    return model


def _loss_and_gradient(model: Any, loss: TokenLoss, size: tuple[int, int]) -> Any:
    batch = collate(_rows(*size))
    loss.train()
    model.zero_grad()
    nats = loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum()
    nats.backward()
    gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])
    return nats.detach(), gradient


@torch.no_grad()
def _held_out(loss: TokenLoss, size: tuple[int, int]) -> torch.Tensor:
    batch = collate(_rows(*size))
    nats: torch.Tensor = loss.eval()(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum()
    return nats


def _rows(count: int, length: int) -> list[Example]:
    random = np.random.default_rng(length)
    learnt = np.arange(length) > 0
    return [Example(random.integers(0, 500, length).astype(np.int32), learnt) for _ in range(count)]


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"fp8": True}], ids=str)
def test_compiled_layers_compute_the_same(
    options: dict[str, bool], base_of: Callable[[str], Path]
) -> None:
    dtype = torch.bfloat16 if options.get("fp8") else torch.float32
    eager, compiled = (_model(base_of("llama"), **options) for _ in range(2))
    names = list(dict(compiled.named_parameters()))
    compile_layers(compiled, backend="aot_eager")
    assert list(dict(compiled.named_parameters())) == names, "checkpoints would not fit"
    losses = TokenLoss(eager, dtype), TokenLoss(compiled, dtype)
    for size in SIZES:
        expected, gradient = _loss_and_gradient(eager, losses[0], size)
        found, other = _loss_and_gradient(compiled, losses[1], size)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        assert float((gradient - other).norm() / gradient.norm()) < 1e-4
    held_out = float(_held_out(losses[1], SIZES[0]))
    assert held_out == pytest.approx(float(_held_out(losses[0], SIZES[0])), rel=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not counters["graph_break"]
    for size in ((4, 57), (2, 12)):
        _loss_and_gradient(compiled, losses[1], size)
    assert counters["stats"]["unique_graphs"] == graphs, "new lengths compile again and again"


def test_a_model_without_layers_is_refused(base_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_of("llama"))
    assert len(decoder_layers(model)) == 2
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="no list of 5 decoder layers"):
        decoder_layers(model)
