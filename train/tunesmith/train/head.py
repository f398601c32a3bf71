"""The loss at a frozen head, with its gradient found on the way: logits are computed once.

Letters of shapes: N learnt tokens, C of one chunk, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Hidden states (C, D) and targets (C) → the loss of each in nats (C)."""


def loss_at_frozen_head(hidden_ND: Tensor, targets_N: Tensor, loss_of: LossOf, rows: int) -> Tensor:
    """Loss in nats of each target (N), from `rows` of them at a time.

    What is kept for the backward pass is how each loss changes with its own hidden state, which is
    as large as `hidden_ND`, in place of logits, or of computing them a second time. `loss_of` must
    use no weight that is trained: it would get no gradient.
    """
    nats_N: Tensor = _Loss.apply(hidden_ND, targets_N, loss_of, rows)
    return nats_N


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, loss_of: LossOf, rows: int
    ) -> Tensor:
        gradient_ND = torch.empty_like(hidden_ND)
        nats_N = hidden_ND.new_empty(len(targets_N), dtype=torch.float32)
        for start in range(0, len(targets_N), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                hidden_CD = hidden_ND[chunk].detach().requires_grad_()
                nats_C = loss_of(hidden_CD, targets_N[chunk])
                (gradient_ND[chunk],) = torch.autograd.grad(nats_C.sum(), hidden_CD)
            nats_N[chunk] = nats_C.detach()
        ctx.save_for_backward(gradient_ND)
        return nats_N

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None, None, None]:
        (weight_N,) = weights
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * weight_N.unsqueeze(1)).to(gradient_ND.dtype), None, None, None
