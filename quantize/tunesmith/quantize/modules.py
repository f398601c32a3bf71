"""What to quantize and what to keep: every module with weights ends in exactly one list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.config import ModelError
from tunesmith.quantize.schemes import Method

Shape = tuple[int, int]
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Selection:
    """The modules of a model that hold weights, by name."""

    quantized: dict[str, Shape]
    """Linear layers to quantize, with their outputs and inputs."""

    kept: dict[str, str]
    """All others, with the reason."""

    group_size: int | None
    """Weights per scale along the input; None for one scale per output channel."""


def select(model: Any, method: Method) -> Selection:
    """Sort a model's modules. Raises ModelError when nothing is left to quantize."""
    from torch import nn

    linear: dict[str, Shape] = {}
    kept: dict[str, str] = {}
    decoder = {id(module) for module in model.get_decoder().modules()}
    for name, module in _with_weights(model):
        if not isinstance(module, nn.Linear):
            kept[name] = f"{type(module).__name__} is not a linear layer"
        elif module is model.get_output_embeddings():
            kept[name] = "output head"
        elif id(module) not in decoder:
            kept[name] = "outside the text decoder"
        elif name.rpartition(".")[2] in _ROUTERS:
            kept[name] = "router"
        else:
            linear[name] = (module.out_features, module.in_features)
    return split_by_shape(linear, kept, method)


def split_by_shape(linear: dict[str, Shape], kept: dict[str, str], method: Method) -> Selection:
    """Also keep the layers whose shape no kernel takes, with their siblings: engines join some of
    those (query, key and value; gate and up) into one matrix, which must have one format."""
    multiple = method.scheme.multiple_of
    odd = {
        name.rpartition(".")[0]: f"{name} is {outputs} x {inputs}"
        for name, (outputs, inputs) in linear.items()
        if outputs % multiple or inputs % multiple
    }
    quantized = {
        name: shape for name, shape in linear.items() if name.rpartition(".")[0] not in odd
    }
    kept = kept | {
        name: f"{method.name} needs multiples of {multiple}, {odd[parent]}"
        for name in linear
        if (parent := name.rpartition(".")[0]) in odd
    }
    if not quantized:
        first = kept[next(iter(linear))] if linear else "its decoder has no linear layers"
        raise ModelError(f"{method.name} cannot quantize any layer of this model: {first}")
    return Selection(quantized, kept, _group_size(quantized, method))


def _group_size(quantized: dict[str, Shape], method: Method) -> int | None:
    """What the recipe asks for, or the largest that divides the inputs of every layer."""
    allowed = (method.group_size,) if method.group_size else method.scheme.group_sizes
    if not allowed:
        return None
    for size in allowed:
        odd = next((name for name, (_, inputs) in quantized.items() if inputs % size), None)
        if odd is None:
            return size
    inputs = quantized[str(odd)][1]
    raise ModelError(f"quantize.group_size: {size} does not divide the {inputs} inputs of {odd}")


def _with_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Every module that has parameters of its own."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module
