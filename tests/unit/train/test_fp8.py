"""The FP8 layer against the same layer in float32, forward and backward, on torch's own product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tunesmith.config.errors import ModelError
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.train import Train
from tunesmith.train import fp8
from tunesmith.train.fp8 import Fp8Linear, check_device, convert_frozen, quantize_rows


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).detach().norm() / right.float().detach().norm())


def _linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=bias).to(torch.bfloat16)
    # Rows of very different sizes: one scale for all of them would lose the small ones.
    linear.weight.data *= torch.logspace(-3, 1, 64).unsqueeze(1).to(torch.bfloat16)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_near_the_exact_ones(bias: bool) -> None:
    linear = _linear(bias)
    layer = Fp8Linear(linear)
    assert _distance(layer.dequantized(), linear.weight) < 0.03
    inputs = (torch.randn(2, 5, 96) * torch.logspace(-2, 2, 5).view(1, 5, 1)).to(torch.bfloat16)
    upstream = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    found, exact = inputs.clone().requires_grad_(), inputs.float().requires_grad_()
    output = layer(found)
    output.backward(upstream)
    bias_N = linear.bias.float() if bias else None
    reference = nn.functional.linear(exact, linear.weight.float(), bias_N)
    reference.backward(upstream.float())
    assert found.grad is not None and exact.grad is not None
    assert output.dtype == found.grad.dtype == torch.bfloat16
    for at in range(5):  # every row by itself, the small ones too
        assert _distance(output[:, at], reference[:, at]) < 0.08
        assert _distance(found.grad[:, at], exact.grad[:, at]) < 0.08


def test_the_gradient_is_that_of_the_quantized_weight() -> None:
    """Inputs and gradients that FP8 holds exactly leave only the sums to be rounded."""
    layer = Fp8Linear(_linear(bias=False))
    inputs = torch.randint(-4, 5, (7, 96)).to(torch.bfloat16)
    inputs[:, 0] = 448.0
    weight_NK = layer.dequantized()
    assert _distance(layer(inputs), inputs.float() @ weight_NK.t()) < 0.005


def test_no_activation_is_kept() -> None:
    layer = Fp8Linear(_linear(bias=False))
    kept: list[torch.Size] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.shape)
        return value

    inputs = torch.randn(7, 96, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(inputs)
    assert sorted(kept) == [torch.Size([64, 1]), torch.Size([64, 96])]


def test_rows_of_zeros_stay_zeros() -> None:
    value, scale = quantize_rows(torch.zeros(2, 16))
    assert torch.isfinite(scale).all() and not value.float().any()


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(32, 32), nn.Linear(32, 64)
        self.odd, self.trained = nn.Linear(32, 20), nn.Linear(32, 32)
        for module in (self.frozen, self.head, self.odd):
            module.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_only_frozen_layers_that_fit_are_converted() -> None:
    model = _Model()
    assert convert_frozen(model) == ["frozen"]
    assert isinstance(model.frozen, Fp8Linear)
    assert model.frozen.weight.element_size() == 1 and not model.frozen.weight.requires_grad
    assert type(model.head) is type(model.odd) is type(model.trained) is nn.Linear
    with pytest.raises(ModelError, match="no frozen linear layer"):
        convert_frozen(_Model().requires_grad_(True))


def test_a_device_without_the_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="needs an NVIDIA GPU"):
        check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ModelError, match="A100 has 8.0"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "qlora"}, "method: lora"),
        ({"method": "full"}, "method: lora"),
        ({"method": "lora", "lora": {"use_dora": True}}, "use_dora"),
        ({"method": "lora", "lora": {"init_lora_weights": "pissa"}}, "pissa"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Train.model_validate(settings | {"base_precision": "fp8"})


def test_other_precisions_of_the_rest_are_refused() -> None:
    recipe = {
        "name": "x",
        "model": {"base": "some/model", "dtype": "float16"},
        "data": {"train": "rows.jsonl"},
        "train": {"method": "lora", "base_precision": "fp8"},
    }
    with pytest.raises(ValidationError, match="needs model.dtype: bfloat16"):
        Recipe.model_validate(recipe)


def test_the_layer_compiles_whole() -> None:
    layer = Fp8Linear(_linear(bias=True))
    inputs = torch.randn(7, 96, dtype=torch.bfloat16)
    results = []
    compiled: Callable[..., torch.Tensor] = torch.compile(
        layer, backend="aot_eager", fullgraph=True
    )
    for run in (layer, compiled):
        given = inputs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):  # as in training
            output = run(given)
        output.sum().backward()
        assert given.grad is not None
        results.append((output.detach(), given.grad))
    assert fp8.quantize_rows(inputs)[1].shape == (7, 1)
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)
