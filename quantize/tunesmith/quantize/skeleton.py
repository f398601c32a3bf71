"""A model without its weights, whose layers are filled from disk and emptied again one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import ModelError
from tunesmith.quantize.weights import Weights


@dataclass(frozen=True)
class Skeleton:
    """The module tree of a causal language model; its parameters are shapes only."""

    model: Any
    weights: Weights
    layers: dict[str, Any]
    """The decoder layers by name, in the order in which they run."""

    tied: frozenset[str]
    """Parameters that are another one under a second name, and stored under the first alone."""

    @classmethod
    def of(cls, parent: Path, dtype: str, trust_remote_code: bool) -> Skeleton:
        """Raises ModelError when transformers knows no such model."""
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(parent, trust_remote_code=trust_remote_code)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{parent}: no model can be loaded from it: {error}") from error
        model.tie_weights()
        model.eval().requires_grad_(False)
        first: dict[int, str] = {}
        tied = {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if first.setdefault(id(parameter), name) != name
        }
        return cls(model, Weights.of(parent), decoder_layers(model), frozenset(tied))

    def stored(self, module: Any, prefix: str = "") -> dict[str, Any]:
        """Every tensor of a module that a checkpoint holds, by its name in the model."""
        return {
            name: tensor
            for name, tensor in module.state_dict(prefix=prefix, keep_vars=True).items()
            if name not in self.tied
        }

    def outside(self) -> dict[str, Any]:
        """What the checkpoint holds beside the decoder layers."""
        within = tuple(f"{name}." for name in self.layers)
        return {
            name: tensor
            for name, tensor in self.stored(self.model).items()
            if not name.startswith(within)
        }

    def differs(self) -> str | None:
        """How the files differ from the model's own names and shapes, if they do."""
        for name, tensor in self.stored(self.model).items():
            if name not in self.weights.files:
                return f"no safetensors file has {name}"
            if self.weights.shape(name) != tuple(tensor.shape):
                return f"{name} is stored as {self.weights.shape(name)}, not {tuple(tensor.shape)}"
        return None

    def move_buffers(self, device: Any) -> None:
        """Bring what no file holds, such as frequencies of positions, to where the layers run."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def fill(self, tensors: dict[str, Any], device: Any) -> None:
        """Give parameters and buffers their contents; those that no file has become zeros."""
        import torch

        found = dict(self.weights.read(name for name in tensors if name in self.weights.files))
        for name, empty in tensors.items():
            content = found.pop(name, None)
            if content is None:
                if not empty.is_meta:
                    continue
                content = torch.zeros(empty.shape, dtype=empty.dtype)
            self._put(name, content.to(device, empty.dtype), empty)

    def empty(self, tensors: dict[str, Any]) -> None:
        """Let go of what `fill` brought."""
        for name, tensor in tensors.items():
            self._put(name, tensor.detach().to("meta"), tensor)

    def _put(self, name: str, content: Any, place: Any) -> None:
        from torch import nn

        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        if isinstance(place, nn.Parameter):
            owner._parameters[leaf] = nn.Parameter(content, requires_grad=False)
        else:
            owner._buffers[leaf] = content


def decoder_layers(model: Any) -> dict[str, Any]:
    """The longest list of modules in the decoder: what transformers calls its layers."""
    from torch import nn

    decoder = model.get_decoder()
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(module is own for own in decoder.modules())
    ]
    if not lists:
        return {}
    prefix, longest = max(lists, key=lambda found: len(found[1]))
    return {f"{prefix}.{at}": layer for at, layer in enumerate(longest)}
