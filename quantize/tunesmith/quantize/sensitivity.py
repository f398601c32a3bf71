"""What each block of a checkpoint costs by itself: the parent with that one block exchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.quantize.modules import block_of
from tunesmith.quantize.profile import Tensors, dequantized, schemes_of
from tunesmith.terminal import progress_bar


def block_divergences(
    parent: Path,
    child: Path,
    quantized: Iterable[str],
    sequences: Sequence[Sequence[int]],
    *,
    dtype: str,
    trust_remote_code: bool,
) -> dict[str, float]:
    """By block, the Kullback-Leibler divergence of the next-token distributions from the parent's,
    in nats per token, when only the weights of that block are the child's.

    Holds the parent, and its log-probabilities of all `sequences` (tokens times vocabulary).
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.accelerator.current_accelerator() or "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        parent, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    ).to(device)
    model.eval()
    inputs = [torch.tensor([list(ids)], device=device) for ids in sequences]
    tensors, schemes = Tensors(child), schemes_of(child)
    found = {}
    with torch.inference_mode():
        exact = [_log_probabilities(model, ids_BS) for ids_BS in inputs]
        blocks = _blocks(quantized)
        with progress_bar("sensitivity of blocks", len(blocks)) as bar:
            for block, names in blocks.items():
                layers = [model.get_submodule(name) for name in names]
                before = [layer.weight.data for layer in layers]
                for layer, name in zip(layers, names, strict=True):
                    weight = dequantized(tensors, name, schemes)
                    layer.weight.data = weight.to(layer.weight)
                found[block] = _divergence(model, inputs, exact)
                for layer, weight in zip(layers, before, strict=True):
                    layer.weight.data = weight
                bar.advance()
    return found


def _blocks(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)
    return found


def _divergence(model: Any, inputs: list[Any], exact: list[Any]) -> float:
    total, tokens = 0.0, 0
    for ids_BS, was_SV in zip(inputs, exact, strict=True):
        now_SV = _log_probabilities(model, ids_BS)
        total += float((was_SV.exp() * (was_SV - now_SV)).sum())
        tokens += len(was_SV)
    return total / tokens


def _log_probabilities(model: Any, ids_BS: Any) -> Any:
    found = model(input_ids=ids_BS, use_cache=False).logits[0].float().log_softmax(dim=-1)
    return found
