"""Compile the decoder layer by layer: one compilation serves all layers, since they are alike.

The whole model would compile for minutes and again for each change of shape; one layer takes
seconds, and fuses what is slow by itself: norms, rotary embeddings, gates, the adapter's sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tunesmith.config.errors import ModelError

_VERSIONS_OF_A_LAYER = 64
"""Compiled versions of one layer's code that are kept: lengths that vary or not, one sequence or
several, training or not, and each kind of layer. Past the limit torch silently runs it eagerly."""


def compile_layers(model: nn.Module, backend: str = "inductor") -> Sequence[nn.Module]:
    """Have each decoder layer compiled when it first runs; returns the layers.

    Names of weights stay as they are, and gradient checkpointing goes around the compiled layer.
    A first length is compiled for itself; when another comes, once more for all lengths.
    """
    layers = decoder_layers(model)
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VERSIONS_OF_A_LAYER)
    for layer in layers:
        layer.compile(backend=backend)
    return layers


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks of a causal language model, adapter or not.

    Raises ModelError when there is no list of them.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    depth = base.config.get_text_config().num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ModelError(
        f"train.torch_compile: {type(base).__name__} has no list of {depth} decoder layers to "
        "compile; turn it off"
    )
