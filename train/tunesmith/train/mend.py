"""Start an adapter from what quantization took from the weights that it is trained over.

LoftQ (arXiv:2310.08659) for NF4 weights; for a student of the model that was quantized the diagonal
form of QERA (arXiv:2410.06040), which weighs an error by the size of the input that it meets. PEFT
has the first as a function that needs a GPU, and that leaves out that an adapter's product is
scaled by lora_alpha / r.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.config.errors import ModelError
from tunesmith.train.distil import Distillation
from tunesmith.train.loss import Batch

_MORE_DIRECTIONS = 8
_POWER_ITERATIONS = 4
"""Of the randomized decomposition: its error is then that of the exact one within some percent."""


@torch.no_grad()
def mend_quantization(peft_model: Any, folder: Path) -> None:
    """Set each adapter to the best approximation, of its rank, of the difference between the base's
    own weights, read from `folder`, and their NF4 form.

    Raises ModelError when the folder does not have them as safetensors.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    read = _reader(folder, peft_model.get_base_model().base_model_prefix)
    for name, module in _adapted(peft_model):
        if isinstance(module, Linear4bit):
            weight = module.base_layer.weight
            lost = read(f"{name}.weight").to(weight.device, torch.float32)
            _approximate(module, lost - dequantize_4bit(weight.data, weight.quant_state).float())


@torch.no_grad()
def mend_student(
    loss: Distillation, seen: Sequence[Batch], judged: Sequence[Batch]
) -> tuple[float, float]:
    """Set each adapter to the best approximation, of its rank, of the difference between the
    teacher's weight and the student's, each input weighed by its root mean square in `seen`.

    What is no error of a weight cannot be mended so (a rotation, a scale that moved to another
    layer): the adapters go back to nothing unless the student comes closer to its teacher on
    `judged`. Returns the divergence there before and after, in nats per token.
    """
    before = _divergence(loss, judged)
    weights = dict(loss.teacher.model.named_parameters())
    sizes = _input_sizes(loss, seen)
    for name, module in _adapted(loss.model):
        own, weight = module.base_layer.weight, weights.get(f"{name}.weight")
        if weight is not None and weight.shape == own.shape:
            _approximate(module, weight.float() - own.float(), sizes[name])
    after = _divergence(loss, judged)
    if after < before:
        return before, after
    for _, module in _adapted(loss.model):
        for adapter in module.r:
            module.reset_lora_parameters(adapter, init_lora_weights=True)
    return before, before


def _adapted(peft_model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers with an adapter, by their names in the model without."""
    from peft.tuners.lora import LoraLayer

    names = {id(module): name for name, module in peft_model.get_base_model().named_modules()}
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            yield names[id(module)], module


def _approximate(module: Any, lost_OI: Tensor, sizes_I: Tensor | None = None) -> None:
    """Set a layer's adapters to what is nearest to `lost_OI`, weighed by its inputs' sizes."""
    weighed_OI = lost_OI if sizes_I is None else lost_OI * sizes_I
    for adapter, rank in module.r.items():
        directions = min(rank + _MORE_DIRECTIONS, *lost_OI.shape)
        left, strengths, right = torch.svd_lowrank(weighed_OI, directions, _POWER_ITERATIONS)
        root = strengths[:rank].sqrt()
        found = len(root)  # fewer than the rank where a layer is narrower
        into_RI = (right[:, :found] * root).T
        into_RI = into_RI if sizes_I is None else into_RI / sizes_I
        module.lora_A[adapter].weight[:found] = into_RI
        module.lora_B[adapter].weight[:, :found] = left[:, :found] * root / module.scaling[adapter]


def _input_sizes(loss: Distillation, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The root mean square of each input of each adapted layer."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, input_BSI: Tensor) -> None:
        input_NI = input_BSI.flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + input_NI.square().sum(0)
        rows[name] = rows.get(name, 0) + len(input_NI)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, module in _adapted(loss.model)
    ]
    try:
        _divergence(loss, batches)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {name: (total / rows[name]).sqrt() for name, total in sums.items()}
    # What is divided by is not zero, even where an input always was.
    return {name: its.clamp(min=1e-3 * float(its.mean()) + 1e-12) for name, its in sizes.items()}


def _divergence(loss: Distillation, batches: Sequence[Batch]) -> float:
    """Nats per learnt token."""
    was_training = loss.training
    loss.eval()
    nats: list[float] = [
        loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum().item()
        for batch in batches
    ]
    loss.train(was_training)
    return sum(nats) / sum(len(batch.targets_N) for batch in batches)


def _reader(folder: Path, prefix: str) -> Callable[[str], Tensor]:
    """Reads a weight by its name in the model, which a file may leave the prefix out of."""
    index = folder / "model.safetensors.index.json"
    files: dict[str, str] = {}
    if index.exists():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")

    def read(name: str) -> Tensor:
        for known in (name, name.removeprefix(f"{prefix}.")):
            if known in files:
                with safe_open(folder / files[known], framework="pt") as file:
                    weight: Tensor = file.get_tensor(known)
                    return weight
        raise ModelError(
            f"train.lora.init_lora_weights: loftq needs {name} as safetensors in {folder}, which "
            "has no such weight; use zeros"
        )

    return read
