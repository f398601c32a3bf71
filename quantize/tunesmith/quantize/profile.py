"""How far each quantized layer's weights are from its parent's, read from the files themselves.

Tensor by tensor: never more than one layer of each model is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.config import require

_NORMS = "norm.weight"


def layer_errors(
    parent: Path, child: Path, quantized: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """By layer: `error`, the norm of the difference over the norm of the parent's weights, and
    `worst_row`, the same for the output that is furthest off.

    A scheme that moves scales from a layer to the norm before it is compared after moving them
    back. A layer whose name the parent's files do not have is left out.
    """
    before, after = Tensors(parent), Tensors(child)
    schemes, moved = _schemes(child), _moved(before, after)
    found = {}
    for name in sorted(quantized):
        if f"{name}.weight" in before:
            weight = _dequantized(after, name, schemes)
            if weight is not None:
                found[name] = _least_error(name, weight, before, moved)
    return found


class Tensors:
    """The tensors of a model folder, opened one at a time."""

    def __init__(self, folder: Path) -> None:
        self._open = require("safetensors", "quantize").safe_open
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with self._open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def get(self, name: str) -> Any:
        with self._open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def of_layer(self, name: str) -> dict[str, Any]:
        """The tensors of a module by their local names."""
        start = f"{name}."
        return {key.removeprefix(start): self.get(key) for key in self if key.startswith(start)}


def _schemes(folder: Path) -> list[tuple[tuple[str, ...], Any]]:
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = QuantizationConfig.model_validate(config["quantization_config"])
    return [
        (tuple(group.targets), group.model_copy(update={"format": group.format or found.format}))
        for group in found.config_groups.values()
    ]


def _dequantized(tensors: Tensors, name: str, schemes: list[tuple[tuple[str, ...], Any]]) -> Any:
    """The weights of a layer in full precision; None when no group of the config targets it."""
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.utils.match import is_match

    layer = torch.nn.Linear(1, 1, device="meta")
    for targets, scheme in schemes:
        if is_match(name, layer, targets):
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            return compressor.decompress(tensors.of_layer(name), scheme)["weight"].float()
    return None


def _least_error(
    name: str, weight: Any, before: Tensors, moved: Mapping[str, Any]
) -> dict[str, float]:
    """The error as it stands, or with the scale of a norm in the same block moved back: whichever
    is less."""
    exact = before.get(f"{name}.weight").float()
    block = name.rpartition(".")[0].rpartition(".")[0]
    candidates = [weight]
    candidates += [
        weight / scale
        for norm, scale in moved.items()
        if norm.startswith(f"{block}.") and len(scale) == weight.shape[1]
    ]
    return min((_error(exact, found) for found in candidates), key=lambda found: found["error"])


def _error(exact: Any, weight: Any) -> dict[str, float]:
    squares, wrong = exact.square().sum(dim=1), (weight - exact).square().sum(dim=1)
    # A row of next to nothing is no measure.
    counted = squares > 1e-6 * squares.mean()
    worst = (
        (wrong[counted] / squares[counted]).max() if bool(counted.any()) else wrong.new_zeros(())
    )
    return {
        "error": round(float((wrong.sum() / squares.sum().clamp(min=1e-30)).sqrt()), 6),
        "worst_row": round(float(worst.sqrt()), 6),
    }


def _moved(before: Tensors, after: Tensors) -> dict[str, Any]:
    """Of each norm that the scheme changed, what it was divided by."""
    found = {}
    for name in after:
        if name.endswith(_NORMS) and name in before:
            was, now = before.get(name).float(), after.get(name).float()
            if was.shape == now.shape and not bool((was == now).all()):
                found[name] = was / now
    return found
