"""A quantized checkpoint against its parent with transformers, where no engine here can run it.

Weights are what the checkpoint stores, multiplied in the model's own precision; activations are
rounded before every layer whose scheme rounds them.

Shapes: S tokens of a sequence, L of them learnt, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import ModelError, require


@dataclass(frozen=True)
class Quality:
    """How the two models predict the learnt tokens of one sequence."""

    tokens: int
    loss_sum_nats: float
    parent_loss_sum_nats: float
    kl_sum_nats: float
    """Of the next-token distributions, from the parent's to the checkpoint's."""

    flipped: int
    """Tokens for which the likeliest is another than the parent's."""


def judge(
    checkpoint: Path,
    parent: Path,
    sequences: Sequence[tuple[list[int], list[int]]],
    *,
    trust_remote_code: bool = False,
) -> list[Quality]:
    """Each sequence (its tokens, and the positions of those that count; never 0, which nothing
    predicts) through both models. Raises ModelError when the checkpoint would not be judged with
    the activations that it was made for."""
    return list(
        compare(
            open_model(checkpoint, trust_remote_code=trust_remote_code),
            open_model(parent, trust_remote_code=trust_remote_code),
            sequences,
        )
    )


def open_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A model with its weights in full, and with the rounding of activations that its config asks
    for."""
    transformers = require("transformers", "quantize")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    settings: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    if quantization:
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    groups = (quantization or {}).get("config_groups", {}).values()
    if any(group.get("input_activations") for group in groups) and not _rounds_activations(model):
        raise ModelError(f"{folder}: transformers opened it without rounding its activations")
    return model


def _rounds_activations(model: Any) -> bool:
    return any(
        getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        and getattr(module, "quantization_enabled", True)
        for module in model.modules()
    )


def compare(
    model: Any, parent: Any, sequences: Sequence[tuple[list[int], list[int]]]
) -> Iterator[Quality]:
    """Each sequence through two opened models."""
    import torch

    for input_ids, learnt in sequences:
        with torch.inference_mode():
            ours_LV = _log_probabilities(model, input_ids, learnt)
            theirs_LV = _log_probabilities(parent, input_ids, learnt)
        targets_L1 = torch.tensor(input_ids)[learnt].unsqueeze(1)
        yield Quality(
            tokens=len(learnt),
            loss_sum_nats=-float(ours_LV.gather(1, targets_L1).sum()),
            parent_loss_sum_nats=-float(theirs_LV.gather(1, targets_L1).sum()),
            kl_sum_nats=float((theirs_LV.exp() * (theirs_LV - ours_LV)).sum()),
            flipped=int((ours_LV.argmax(-1) != theirs_LV.argmax(-1)).sum()),
        )


def _log_probabilities(model: Any, input_ids: list[int], learnt: list[int]) -> Any:
    """Of what follows the token before each learnt one."""
    import torch

    before_L = torch.tensor(learnt) - 1
    input_ids_1S = torch.tensor([input_ids], device=model.device)
    logits_1LV = model(input_ids_1S, logits_to_keep=before_L, use_cache=False).logits
    return logits_1LV[0].float().log_softmax(-1).cpu()
