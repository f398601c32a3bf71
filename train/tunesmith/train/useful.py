"""How much arithmetic a training step needs, and how much of it this device can do.

*Useful* work is what the result depends on, whatever the implementation does besides: a frozen
matrix needs its output and the gradient of its input (4 operations per weight and token), a trained
one also its own gradient (6). Counting 6 for a frozen model, as for pre-training, makes a LoRA
training look half as fast again as it is. Recomputed activations and padding are not useful work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunesmith.train.examples import Example

Sizes = NDArray[np.int64]

_PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L4", 121.0),
)
"""Dense bfloat16 and float16 by the vendor's data sheets; the first name that fits."""


@dataclass(frozen=True)
class Layers:
    """The matrices of a model, in weights, and its attention."""

    frozen: int
    trained: int
    """Of all linear layers, the head left out; of adapters too."""

    head: int
    head_is_trained: bool

    attention_width: int
    """Heads times their dimension."""

    windows: tuple[int | None, ...]
    """How far back each attention layer looks, in tokens; None is to the beginning."""

    def useful_flops(self, rows: Iterable[Example]) -> float:
        """Floating-point operations to learn from these rows once.

        The last token of a row is only ever a target, and the head works at learnt tokens only.
        """
        sizes = [(len(row.input_ids), int(row.learnt.sum())) for row in rows]
        lengths, learnt = np.array(sizes, dtype=np.int64).T
        return float(self.per_row(lengths, learnt).sum())

    def per_row(self, lengths: Sizes, learnt: Sizes) -> NDArray[Any]:
        """The same of each row, from its tokens and its learnt tokens."""
        seen = lengths - 1
        pairs = sum(_pairs(seen, window) for window in self.windows)
        # Scores and values, 2 each, and as much again twice over in the backward pass.
        attention = 12.0 * self.attention_width * pairs
        per_token = 4 * self.frozen + 6 * self.trained
        per_learnt = (6 if self.head_is_trained else 4) * self.head
        found: NDArray[Any] = per_token * seen + per_learnt * learnt + attention
        return found


def count_layers(model: Any) -> Layers | None:
    """The sizes of a causal language model, with whatever adapter and packing it has.

    None for a mixture of experts, where the work depends on the routing.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None
    head = base.get_output_embeddings()
    frozen = trained = 0
    for module in model.modules():
        if module is head or not _is_matrix(module):
            continue
        size = _size(module)
        if module.weight.requires_grad:
            trained += size
        else:
            frozen += size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Layers(
        frozen,
        trained,
        _size(head),
        head.weight.requires_grad,
        config.num_attention_heads * width,
        _windows(config),
    )


def matmul_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """The rate of a large square matrix product here and now, in TFLOP/s: what a perfect step would
    reach. On random numbers, since zeros draw less power and run faster; the median of ten."""
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times_s = []
    for _ in range(13):
        synchronize(device)
        started_s = time.perf_counter()
        left @ right
        synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    return 2 * size**3 / statistics.median(times_s[3:]) / 1e12


def peak_tflops(dtype: torch.dtype, device: torch.device) -> float | None:
    """What the vendor promises for dense products, in TFLOP/s, if this GPU is a known one."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAK_TFLOPS if part in name), None)


def peak_of(name: str) -> float:
    """The same of a GPU that is known by this name."""
    return dict(_PEAK_TFLOPS)[name]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _pairs(lengths: Sizes, window: int | None) -> NDArray[Any]:
    """Pairs of a token and one it looks at, each token counting its own half."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return seen * seen / 2 + (lengths - seen) * seen


def _windows(config: Any) -> tuple[int | None, ...]:
    layers: int = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _is_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    from tunesmith.train.fp8 import Fp8Linear

    return isinstance(module, (nn.Linear, Conv1D, Fp8Linear))


def _size(module: Any) -> int:
    """Weights of a linear layer, whatever they are packed into."""
    if hasattr(module, "in_features"):
        return int(module.in_features * module.out_features)
    return int(module.weight.numel())
