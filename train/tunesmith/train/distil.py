"""A student that learns to predict what its teacher predicts: the loss is KL(teacher || student).

The teacher runs on the same tokens as the student, in the same pass, and its logits exist for as
many positions at a time as the student's: nothing is kept or cut, however large the vocabulary.
Letters of shapes: B sequences, S positions, D width, N learnt tokens, C of one chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.train.loss import TokenLoss


class Distillation(TokenLoss):
    """A causal language model that answers, for each learnt token, with the divergence in nats
    from its teacher's prediction to its own."""

    def __init__(self, model: Any, teacher: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        teacher.requires_grad_(False).eval()
        # In a tuple: as an attribute its weights would be listed among those of the student.
        self._taught_by = (TokenLoss(teacher, dtype),)

    @property
    def teacher(self) -> TokenLoss:
        """The model whose predictions are learnt."""
        return self._taught_by[0]

    def forward(
        self,
        input_ids_BS: Tensor,
        positions_N: Tensor,
        targets_N: Tensor,
        bounds: Tensor | None = None,
        longest: int = 0,
    ) -> Tensor:
        """Divergence in nats at each position [N]; what follows there in the text is not asked."""
        with torch.no_grad():
            taught_ND = self.teacher._hidden(input_ids_BS, positions_N, bounds, longest)
        hidden_ND = self._hidden(input_ids_BS, positions_N, bounds, longest)
        return self._in_chunks(hidden_ND, taught_ND)

    def _nats(self, hidden_CD: Tensor, taught_CD: Tensor) -> Tensor:
        with torch.no_grad():
            taught_CV = self.teacher._head(taught_CD).log_softmax(-1)
        learnt_CV = self._head(hidden_CD).log_softmax(-1)
        return F.kl_div(learnt_CV, taught_CV, reduction="none", log_target=True).sum(-1)
