"""Useful floating-point operations of a training, and the time they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.train.batches import Order, Rows, count_tokens
from tunesmith.train.model import linear_layers

CEILING_SHARE = 0.4
"""Of what large matrix products reach: an assumption. The best published LoRA training on an H100
has 0.5 (NVIDIA NeMo AutoModel, 12,473 tokens/s on Llama-3-8B)."""


@dataclass(frozen=True)
class TokenCost:
    """Operations per token in matrix products, as sums over the whole model."""

    body: int
    """Per token, in the layers."""

    head: int
    """Per learnt token, in the output head."""

    attention: int
    """Per token and token of its sequence."""


def token_cost(model: Any) -> TokenCost:
    """Forward and backward: 6 per trained weight, 4 per frozen one, which needs no gradient; causal
    attention takes half of 12 x layers x width per token and position."""
    head = model.get_output_embeddings().weight
    linear = set(linear_layers(model))
    body = 0
    for name, module in model.named_modules():
        if name in linear:
            # The shape of the layer: 4-bit weights are packed.
            count = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
            count = count or module.weight.numel()
            body += count * (6 if module.weight.requires_grad else 4)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TokenCost(
        body,
        head.numel() * (6 if head.requires_grad else 4),
        6 * config.num_hidden_layers * width,
    )


def useful_flops(cost: TokenCost, order: Order, steps: int, lengths: Rows, learnt: Rows) -> float:
    """Of a whole training; padding, recomputation and evaluation are not useful."""
    return float(
        cost.body * count_tokens(order, steps, lengths)
        + cost.head * count_tokens(order, steps, learnt)
        + cost.attention * count_tokens(order, steps, lengths**2)
    )
