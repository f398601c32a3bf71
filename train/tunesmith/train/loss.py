"""The loss: cross-entropy summed over learnt tokens, with logits only where one is predicted.

Letters of shapes: B sequences, S positions, D width, N learnt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.config.errors import ModelError
from tunesmith.train.examples import Example


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, padded on the right."""

    input_ids_BS: Tensor

    positions_N: Tensor
    """Indices into the flattened B x S from which a learnt token is predicted."""

    targets_N: Tensor

    def to(self, device: torch.device) -> Batch:
        """A copy on another device."""
        return Batch(
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (self.input_ids_BS, self.positions_N, self.targets_N)
            )
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Pad to the longest. No attention mask is needed, because padding stands after all that is
    learnt and attention is causal."""
    # The last token of a sequence is only ever a target.
    width = max(len(example.input_ids) for example in examples) - 1
    ids_BS = np.zeros((len(examples), width), dtype=np.int64)
    positions, targets = [], []
    for at, example in enumerate(examples):
        length = len(example.input_ids) - 1
        ids_BS[at, :length] = example.input_ids[:-1]
        learnt = np.flatnonzero(example.learnt[1:])
        positions.append(at * width + learnt)
        targets.append(example.input_ids[1:][learnt].astype(np.int64))
    return Batch(
        torch.from_numpy(ids_BS),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(targets)),
    )


class TokenLoss(nn.Module):
    """A causal language model that answers with a summed loss.

    The model's own forward computes the logits, whatever its head does (bias, scale, soft cap);
    it is only handed the hidden states of the positions that matter.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        self._positions_N: Tensor | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.get_decoder().register_forward_hook(self._keep_positions)

    def forward(self, input_ids_BS: Tensor, positions_N: Tensor, targets_N: Tensor) -> Tensor:
        """Loss in nats, summed over the targets."""
        logits_NV = self.logits(input_ids_BS, positions_N)
        return F.cross_entropy(logits_NV, targets_N, reduction="sum")

    def logits(self, input_ids_BS: Tensor, positions_N: Tensor) -> Tensor:
        """Logits in float32 at the given positions."""
        self._positions_N = positions_N
        try:
            return self._run(input_ids_BS)[0]
        finally:
            self._positions_N = None

    def all_logits(self, input_ids_BS: Tensor) -> Tensor:
        """Logits in float32 at every position, as the model computes them by itself."""
        return self._run(input_ids_BS)

    def _run(self, input_ids_BS: Tensor) -> Tensor:
        device_type = input_ids_BS.device.type
        with torch.autocast(device_type, self._dtype, enabled=self._dtype != torch.float32):
            logits: Tensor = self.model(input_ids=input_ids_BS, use_cache=False).logits
        return logits.float()

    def _keep_positions(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._positions_N is None:
            return None
        hidden_BSD = output[0]
        hidden_1ND = hidden_BSD.flatten(0, 1).index_select(0, self._positions_N).unsqueeze(0)
        if isinstance(output, tuple):
            return (hidden_1ND, *output[1:])
        output.last_hidden_state = hidden_1ND
        return output


@torch.no_grad()
def check_logits(loss: TokenLoss, example: Example, device: torch.device) -> None:
    """Raise ModelError when what the loss relies on does not hold for this model: a logit depends
    on nothing after its position, and on the hidden state of no other position."""
    batch = collate([example]).to(device)
    ids_1S = batch.input_ids_BS
    half = max(1, ids_1S.shape[1] // 2)
    was_training = loss.training
    loss.eval()
    try:
        whole_SV = loss.all_logits(ids_1S)[0]
        half_SV = loss.all_logits(ids_1S[:, :half])[0]
        chosen_NV = loss.logits(ids_1S, batch.positions_N)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"the base cannot be run on token ids alone: {error}") from error
    finally:
        loss.train(was_training)
    if not torch.isfinite(whole_SV).all():
        raise ModelError("the base computes logits that are not finite; its weights are damaged")
    name = type(loss.model).__name__
    if _distance(half_SV, whole_SV[:half]) > _MOST_ROUNDING:
        raise ModelError(
            f"{name} looks at later tokens; only causal language models can be trained"
        )
    if _distance(chosen_NV, whole_SV.index_select(0, batch.positions_N)) > _MOST_ROUNDING:
        raise ModelError(f"{name}: its logits depend on other positions too; it cannot be trained")


_MOST_ROUNDING = 0.1
"""Largest relative difference between two ways to compute the same logits in low precision."""


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm().clamp(min=1e-6))
