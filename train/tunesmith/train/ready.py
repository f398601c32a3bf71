"""From the weights of a base to the model that is trained: everything `train` asks for on top."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from tunesmith.config.errors import ModelError
from tunesmith.config.schema import Train
from tunesmith.train import fp8
from tunesmith.train import model as models
from tunesmith.train.region import compile_layers


def check_device(train: Train, device: torch.device) -> None:
    """Raise ModelError, before weights are loaded, where the device lacks what `train` asks for."""
    if train.base_precision == "fp8":
        fp8.check_device(device)
    if train.torch_compile and device.type == "cuda" and not find_spec("triton"):
        raise ModelError("train.torch_compile: on a GPU this needs triton; install it or leave it")


def make_ready(model: Any, train: Train) -> Any:
    """Checkpointing, adapter, precision of what is frozen, noise and compilation, in the order in
    which each can see what it needs. Returns the model, wrapped by its adapter if it has one."""
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if train.method in ("lora", "qlora"):
        model = models.add_adapter(model, train.lora)
    if train.base_precision == "fp8":
        fp8.convert_frozen(model)
    if train.neftune_noise_alpha:
        models.add_noise(model, train.neftune_noise_alpha)
    if train.torch_compile:
        compile_layers(model)
    return model
