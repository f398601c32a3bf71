"""Frozen linear layers in FP8 (e4m3): half the memory of bfloat16, and matrix products at twice
its rate where the GPU has them. Adapters, norms, embeddings and the head stay as they are.

Letters of shapes: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config.errors import ModelError

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_MULTIPLE = 16
"""FP8 products need sizes that are multiples of this."""

_ADA = (8, 9)
"""The first compute capability with FP8 products."""


def check_device(device: torch.device) -> None:
    """Raise ModelError where there is no hardware for FP8 products."""
    if device.type != "cuda":
        raise ModelError(
            f"train.base_precision: fp8 needs an NVIDIA GPU with FP8 matrix products; this is a "
            f"{device.type}: leave base_precision out"
        )
    found = torch.cuda.get_device_capability(device)
    if found < _ADA:
        raise ModelError(
            "train.base_precision: fp8 needs compute capability 8.9 (Ada, Hopper or newer); "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: leave "
            "base_precision out, or use method: qlora to save memory"
        )


def convert_frozen(model: Any) -> list[str]:
    """Put every frozen linear layer into FP8 in place, one after the other, the head left out;
    returns their names. Layers whose sizes FP8 products cannot take stay as they are.

    Raises ModelError when no layer can be converted.
    """
    head = model.get_output_embeddings()
    wanted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not module.weight.requires_grad
        and module.weight.is_floating_point()
        and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
    ]
    for name in wanted:
        parent, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), attribute, Fp8Linear(linear))
    if not wanted:
        raise ModelError(
            f"train.base_precision: fp8: {type(model).__name__} has no frozen linear layer whose "
            f"sizes are multiples of {_MULTIPLE}"
        )
    return wanted


class Fp8Linear(nn.Module):
    """A frozen linear layer whose products with inputs and with gradients are FP8.

    Each row of the weight and of whatever it is multiplied with has a scale of its own (as in
    torchao's row-wise recipe); activations are scaled by what they are, not by history.
    """

    scale_N1: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_NK, scale_N1 = quantize_rows(linear.weight.detach())
        # As bytes: neither a cast of the model nor a broadcast between ranks may touch them.
        self.weight = nn.Parameter(weight_NK.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale_N1", scale_N1)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) → (…, N) in bfloat16."""
        input_MK = input.reshape(-1, self.in_features)
        output_MN: Tensor = _FrozenProduct.apply(input_MK, self.weight, self.scale_N1)
        output = output_MN.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def dequantized(self) -> Tensor:
        """The weight (N, K) that this layer stands for, in float32."""
        return self.weight.view(_FP8).float() * self.scale_N1

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _FrozenProduct(torch.autograd.Function):
    """input @ weight.T, with a gradient for the input alone; keeps no activation."""

    @staticmethod
    def forward(ctx: Any, input_MK: Tensor, weight_NK: Tensor, scale_N1: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NK, scale_N1)
        ctx.input_dtype = input_MK.dtype
        quantized_MK, scale_M1 = quantize_rows(input_MK)
        return _product(quantized_MK, weight_NK.view(_FP8).t(), scale_M1, scale_N1.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MN,) = gradients
        weight_NK, scale_N1 = ctx.saved_tensors
        # The scales of the weight's rows stand along the summed dimension here: they go into the
        # gradient before it is quantized.
        quantized_MN, scale_M1 = quantize_rows(gradient_MN.float() * scale_N1.t())
        # The product wants its right side column by column, which is the weight transposed: a
        # copy of bytes, small beside the product, in place of a second weight in memory.
        columns_NK = weight_NK.t().contiguous().view(_FP8).t()
        ones_1K = scale_N1.new_ones((1, weight_NK.shape[1]))
        gradient_MK = _product(quantized_MN, columns_NK, scale_M1, ones_1K)
        return gradient_MK.to(ctx.input_dtype), None, None


def quantize_rows(value: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in FP8, and what each of its rows is to be multiplied with, in float32."""
    value = value.float()
    scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (value / scale).to(_FP8), scale


def _product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    # A CPU emulates the product by a plain one, which autocast would round.
    with torch.autocast(left.device.type, enabled=False):
        product: Tensor = torch._scaled_mm(
            left,
            right,
            scale_a=left_scale,
            scale_b=right_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return product
