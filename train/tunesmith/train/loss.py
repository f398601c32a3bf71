"""The loss: cross-entropy summed over learnt tokens, with logits only where one is predicted.

Letters of shapes: B sequences, S positions, D width, N learnt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from tunesmith.config.errors import ModelError
from tunesmith.train.examples import Example
from tunesmith.train.head import loss_at_frozen_head

_LARGEST_LOGITS = 2**26
"""Elements of one matrix of logits: 256 MiB in float32."""


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

    The decoder runs once; the model's own forward then computes the logits, whatever its head does
    (bias, scale, soft cap), for the positions that matter and a bounded number of them at a time.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._given_1ND: Tensor | None = None
        self._output_type: Any = None
        # In a tuple: as attributes they would be registered, and their weights listed, twice.
        self._parts = base, base.get_decoder(), base.get_decoder().forward
        base.get_decoder().forward = self._decode

    def forward(self, input_ids_BS: Tensor, positions_N: Tensor, targets_N: Tensor) -> Tensor:
        """Loss in nats, summed over the targets."""
        hidden_ND = self._hidden(input_ids_BS, positions_N)
        rows = max(1, _LARGEST_LOGITS // self._vocabulary)
        if hidden_ND.requires_grad and self._head_is_frozen:
            return loss_at_frozen_head(hidden_ND, targets_N, self._summed_loss, rows)
        if len(targets_N) <= rows:
            return self._summed_loss(hidden_ND, targets_N)
        nats = torch.zeros((), device=hidden_ND.device)
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
            # Logits of one chunk live at a time; the backward pass computes them again.
            nats = nats + checkpoint(self._summed_loss, hidden_CD, targets_C, use_reentrant=False)
        return nats

    def logits(self, input_ids_BS: Tensor, positions_N: Tensor) -> Tensor:
        """Logits in float32 at the given positions."""
        return self._head(self._hidden(input_ids_BS, positions_N))

    def all_logits(self, input_ids_BS: Tensor) -> Tensor:
        """Logits in float32 at every position, as the model computes them by itself."""
        with self._precision(input_ids_BS):
            logits: Tensor = self.model(input_ids=input_ids_BS, use_cache=False).logits
        return logits.float()

    def _summed_loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(self._head(hidden_ND), targets_N, reduction="sum")

    def _hidden(self, input_ids_BS: Tensor, positions_N: Tensor) -> Tensor:
        """What the head is given at some positions."""
        _, decoder, _ = self._parts
        with self._precision(input_ids_BS):
            hidden_BSD = decoder(input_ids=input_ids_BS, use_cache=False)[0]
        hidden_ND: Tensor = hidden_BSD.flatten(0, 1).index_select(0, positions_N)
        return hidden_ND

    def _head(self, hidden_ND: Tensor) -> Tensor:
        base, _, _ = self._parts
        self._given_1ND = hidden_ND.unsqueeze(0)
        try:
            with self._precision(hidden_ND):
                logits: Tensor = base(
                    input_ids=hidden_ND.new_zeros((1, 1), dtype=torch.long), use_cache=False
                ).logits
        finally:
            self._given_1ND = None
        return logits[0].float()

    def _decode(self, *arguments: Any, **keywords: Any) -> Any:
        """The decoder's forward, which is skipped while there is something to hand to the head."""
        if self._given_1ND is not None:
            return self._output_type(last_hidden_state=self._given_1ND)
        _, _, forward = self._parts
        output = forward(*arguments, **keywords)
        self._output_type = type(output)
        return output

    @property
    def _vocabulary(self) -> int:
        return int(self._parts[0].get_output_embeddings().weight.shape[0])

    @cached_property
    def _head_is_frozen(self) -> bool:
        """Whether nothing that is trained comes after the decoder.

        Never where FSDP divides the model, which gathers weights for whole backward passes; nor in
        float16, where gradients are too small before they are scaled.
        """
        base, decoder, _ = self._parts
        inside = {id(weight) for weight in decoder.parameters()}
        after = [weight for weight in base.parameters() if id(weight) not in inside]
        after += base.get_output_embeddings().parameters()
        is_divided = any(isinstance(module, FSDPModule) for module in self.modules())
        is_trained = any(weight.requires_grad for weight in after)
        return not (is_divided or is_trained or self._dtype == torch.float16)

    def _precision(self, like: Tensor) -> Any:
        is_reduced = self._dtype != torch.float32
        return torch.autocast(like.device.type, self._dtype, enabled=is_reduced)


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
