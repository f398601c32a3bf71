"""The loss at a frozen head, with its gradient found on the way: logits are computed once.

Letters of shapes: N learnt tokens, C of one chunk, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""Hidden states (C, D) and targets (C) → their loss in nats."""


def loss_at_frozen_head(
    hidden_ND: Tensor, targets_N: Tensor, summed_loss: SummedLoss, rows: int
) -> Tensor:
    """Loss in nats, summed over the targets, from `rows` of them at a time.

    What is kept for the backward pass is the gradient of `hidden_ND`, which is as large as
    `hidden_ND`, in place of logits, or of computing them a second time. `summed_loss` must use no
    weight that is trained: it would get no gradient.
    """
    nats: Tensor = _Loss.apply(hidden_ND, targets_N, summed_loss, rows)
    return nats


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, summed_loss: SummedLoss, rows: int
    ) -> Tensor:
        gradient_ND = torch.empty_like(hidden_ND)
        nats = torch.zeros((), device=hidden_ND.device)
        for start in range(0, len(targets_N), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                hidden_CD = hidden_ND[chunk].detach().requires_grad_()
                nats_of_chunk = summed_loss(hidden_CD, targets_N[chunk])
                (gradient_ND[chunk],) = torch.autograd.grad(nats_of_chunk, hidden_CD)
            nats += nats_of_chunk.detach()
        ctx.save_for_backward(gradient_ND)
        return nats

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = scales
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * scale, None, None, None
