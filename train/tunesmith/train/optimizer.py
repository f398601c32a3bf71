"""Optimizer and learning-rate schedule by the names of the recipe."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from tunesmith.config.errors import UserError
from tunesmith.config.schema.train import Train


def make_optimizer(model: nn.Module, train: Train, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trainable weights, with weight decay on matrices only, and the learning rate
    of LoRA+ (arXiv:2402.12354) on an adapter's B matrices.

    Raises UserError when the device does not have the one asked for.
    """
    weights: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            ratio = train.lora.loraplus_lr_ratio if ".lora_B." in name else 1.0
            decay = train.weight_decay if weight.ndim > 1 else 0.0
            weights[train.learning_rate * ratio, decay].append(weight)
    groups: list[dict[str, Any]] = [
        {"params": found, "lr": rate, "weight_decay": decay}
        for (rate, decay), found in weights.items()
    ]
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
    }
    match train.optim:
        case "adamw_torch":
            return torch.optim.AdamW(groups, **options)
        case "adamw_torch_fused":
            return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes

    if train.optim == "adamw_8bit":
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
        return optimizer
    if device.type == "cpu":
        raise UserError("train.optim: paged_adamw_8bit pages GPU memory; use adamw_8bit on a CPU")
    optimizer = bitsandbytes.optim.PagedAdamW8bit(groups, **options)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, train: Train, steps: int) -> Any:
    """The learning rate over all steps."""
    from transformers import get_scheduler

    warmup = train.warmup_steps * steps if train.warmup_steps < 1 else train.warmup_steps
    return get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(warmup),
        num_training_steps=steps,
    )
