"""From the weights of a base to the model that is trained: everything `train` asks for on top."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.errors import ModelError
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.train import Train
from tunesmith.terminal import log
from tunesmith.train import fp8
from tunesmith.train import model as models
from tunesmith.train.devices import find_device
from tunesmith.train.examples import Example, Examples
from tunesmith.train.forecast import Forecaster
from tunesmith.train.heap import keep_small
from tunesmith.train.language import Language
from tunesmith.train.loss import TokenLoss, keep_documents_apart
from tunesmith.train.mend import mend_quantization
from tunesmith.train.region import compile_layers
from tunesmith.train.side import Layout


def check_device(train: Train, device: torch.device) -> None:
    """Raise ModelError, before weights are loaded, where the device lacks what `train` asks for."""
    if train.base_precision == "fp8":
        fp8.check_device(device)
    if train.torch_compile and device.type == "cuda" and not find_spec("triton"):
        raise ModelError("train.torch_compile: on a GPU this needs triton; install it or leave it")


def check_memory(
    recipe: Recipe, language: Language, base: Path | None, examples: Examples, held_out: Examples
) -> None:
    """Raise GateError, before weights are loaded, when the training cannot fit.

    A preflight tries it instead. What is far smaller than the device is not looked at closely.
    """
    assert recipe.train
    if recipe.train.preflight:
        return
    config = models.read_config(recipe, language.tokenizer, base)
    device = find_device(processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    forecaster = Forecaster(recipe, config, examples, held_out, device)
    if forecaster.is_far_below():
        return
    if forecast := forecaster.forecast():
        forecaster.refuse_what_cannot_fit(forecast)


def make_ready(model: Any, train: Train, base: Path | None) -> Any:
    """Checkpointing, adapter, precision of what is frozen, noise, compilation and a tidy heap, in
    the order in which each can see what it needs. `base` is the folder the weights are from, if
    they are not new. Returns the model, wrapped by its adapter if it has one."""
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if train.method in ("lora", "qlora"):
        model = models.add_adapter(model, train.lora)
        if base and train.lora.init_lora_weights == "loftq":
            mend_quantization(model, base)
    if train.base_precision == "fp8":
        fp8.convert_frozen(model)
    if train.neftune_noise_alpha:
        models.add_noise(model, train.neftune_noise_alpha)
    if train.torch_compile:
        compile_layers(model)
    elif model.device.type == "cpu":
        keep_small(model)
    return model


def choose_layout(
    recipe: Recipe, rows: Sequence[Example], loss: TokenLoss, accelerator: Any
) -> Layout:
    """How rows stand together: the fastest way that keeps them apart on this model and device.

    Raises ModelError when rows are to be packed and the model would mix them.
    """
    assert recipe.train and recipe.data
    train, device = recipe.train, accelerator.device
    # On a CPU padded batches of like length take fewer, larger kernels; noise depends on them.
    by_default = device.type == "cuda" and not train.neftune_noise_alpha
    layout, how = Layout(), "in padded batches of like length"
    if train.packing or by_default:
        fault = keep_documents_apart(loss, rows, device)
        if fault and train.packing:
            raise ModelError(f"train.packing: {fault}; set train.packing: false")
        if fault:
            how += f" ({fault})"
        else:
            layout = Layout(True, recipe.data.max_length if train.packing else None)
            kernel = "one variable-length kernel" if device.type == "cuda" else "row by row"
            how = f"{'packed' if train.packing else 'back to back'}, attention in each ({kernel})"
    if accelerator.is_main_process:
        log(f"sequences stand {how}")
    return layout
