"""Weights, gradients and optimizer divided over the processes (FSDP2): each holds a part of every
matrix, and gathers one decoder layer at a time.

Torch's own `fully_shard` on the whole loss: the embeddings and the head, which the loss calls apart
from the decoder, then belong to the root, which is gathered as long as the loss is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tunesmith.config.errors import ModelError
from tunesmith.train.loss import TokenLoss


def shard(loss: TokenLoss, accelerator: Any) -> None:
    """Divide the weights of a model in place; called on every rank, before the optimizer is made.

    A layer at a time goes to the device, so a model that is in host memory may be larger than one
    device. Raises ModelError when the model does not say what its layers are.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    base = loss.model.get_base_model() if hasattr(loss.model, "get_base_model") else loss.model
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in loss.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"train.sharding: {type(base).__name__} does not name its layers "
            "(_no_split_modules), so it cannot be divided; set train.sharding to none"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # By default the root would stay whole after a pass without gradients, and what reads or sets
    # its weights then, as the optimizer and a checkpoint do, would do so to a copy.
    fully_shard(loss, mesh=mesh, reshard_after_forward=True)
    for method in ("logits", "all_logits"):
        register_fsdp_forward_method(loss, method)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks; called on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, divided as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def hollow(model: nn.Module) -> Any:
    """A copy of a model without the memory of its weights, made before it is divided, that can be
    filled with the trained ones and saved."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    for module in model.modules():
        if state := getattr(module, "quant_state", None):
            memo[id(state)] = None
    return copy.deepcopy(model, memo)


def fill(model: Any, weights: Mapping[str, Tensor | None]) -> None:
    """Put the trained weights into a hollow model, on the rank that has them."""
    present = {name: weight for name, weight in weights.items() if weight is not None}
    unknown = model.load_state_dict(present, strict=False, assign=True).unexpected_keys
    assert not unknown, f"not weights of the model that was divided: {unknown}"
    model.tie_weights()
