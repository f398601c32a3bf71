"""What a training lowers: the loss of learnt tokens, or the loss of preferring one answer.

An objective turns the loss of each token into figures summed over the rows of a forward pass, the
loss first, and says by what count they are divided, so that a step means the same however it is
split into passes and ranks. Letters of shapes: N learnt tokens, R sequences, P pairs, K figures.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.config.schema.train import Preference
from tunesmith.train.loss import Batch


class Objective(Protocol):
    """One thing to lower."""

    figures: tuple[str, ...]
    """Names of what `sums` returns; the first is the loss."""

    needs_reference: bool
    """Whether rows are compared with what the model said of them before the first step."""

    def count(self, rows: int, supervised_tokens: int) -> int:
        """What the sums over so many rows and learnt tokens are divided by."""

    def sums(self, nats_N: Tensor, batch: Batch, reference_R: Tensor | None) -> Tensor:
        """The figures [K], summed over the sequences of one pass."""


class Likelihood:
    """Cross-entropy per learnt token."""

    figures: tuple[str, ...] = ("loss",)
    needs_reference = False

    def count(self, rows: int, supervised_tokens: int) -> int:
        return supervised_tokens

    def sums(self, nats_N: Tensor, batch: Batch, reference_R: Tensor | None) -> Tensor:
        return nats_N.sum().unsqueeze(0)


class PreferenceLoss:
    """Prefer the first answer of each pair to the second.

    `dpo`: Direct Preference Optimization (arXiv:2305.18290), with label smoothing that of its
    conservative form. `orpo`: odds ratio preference optimization (arXiv:2403.07691), which needs no
    reference.
    """

    figures: tuple[str, ...] = ("loss", "accuracy", "margin")

    def __init__(self, settings: Preference) -> None:
        self._settings = settings
        self.needs_reference = settings.loss_type == "dpo"

    def count(self, rows: int, supervised_tokens: int) -> int:
        return rows // 2

    def sums(self, nats_N: Tensor, batch: Batch, reference_R: Tensor | None) -> Tensor:
        nats_R = sum_by_row(nats_N, batch)
        if self._settings.loss_type == "orpo":
            return self._odds_ratio(nats_R, batch)
        assert reference_R is not None
        # How much likelier each answer is than the reference finds it.
        chosen_P, rejected_P = (reference_R - nats_R).view(-1, 2).unbind(1)
        margin_P = self._settings.beta * (chosen_P - rejected_P)
        doubt = self._settings.label_smoothing
        loss_P = -F.logsigmoid(margin_P) * (1 - doubt) - F.logsigmoid(-margin_P) * doubt
        return _totals(loss_P, margin_P)

    def _odds_ratio(self, nats_R: Tensor, batch: Batch) -> Tensor:
        tokens_R = torch.bincount(batch.rows_N, minlength=len(nats_R))
        # An answer that is certain has infinite odds.
        mean_R = (-nats_R / tokens_R).clamp(max=-1e-6)
        log_odds_R = mean_R - torch.log(-torch.expm1(mean_R))
        chosen_P, rejected_P = log_odds_R.view(-1, 2).unbind(1)
        margin_P = self._settings.beta * (chosen_P - rejected_P)
        ratio_P = self._settings.beta * F.logsigmoid(chosen_P - rejected_P)
        return _totals(-mean_R[::2] - ratio_P, margin_P)


def make_objective(settings: Preference | None) -> Objective:
    """The objective that a recipe asks for."""
    return PreferenceLoss(settings) if settings else Likelihood()


def sum_by_row(nats_N: Tensor, batch: Batch) -> Tensor:
    """The loss of each sequence of a pass."""
    return nats_N.new_zeros(batch.sequences).index_add(0, batch.rows_N, nats_N)


def _totals(loss_P: Tensor, margin_P: Tensor) -> Tensor:
    return torch.stack([loss_P.sum(), (margin_P > 0).sum(), margin_P.detach().sum()])
