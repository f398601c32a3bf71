"""How far a training is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a training is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""

    train_s: float = 0.0
    """Seconds in steps, evaluation and saving left out."""

    elapsed_s: float = 0.0
    """Seconds in all, over every attempt."""

    supervised_tokens: int = 0
    tokens: int = 0
    slots: int = 0
    """Places for tokens in all forward passes, those of padding too."""

    window_sums: list[float] = field(default_factory=list)
    """The objective's figures, summed since the last report."""

    window_count: int = 0
    """What they are divided by."""

    window_tokens: int = 0
    """Learnt tokens since the last report."""

    window_s: float = 0.0
    final_loss: float | None = None
    """The loss in the last report."""

    eval_losses: list[float] = field(default_factory=list)
    """Loss on held-out rows, from before the first step to after the last."""

    eval_figures: dict[str, float] = field(default_factory=dict)
    """All figures of the last evaluation."""

    best_step: int = 0
    """When the lowest of them was measured."""

    @property
    def evaluations_since_best(self) -> int:
        """How many in a row have brought nothing."""
        return len(self.eval_losses) - 1 - self.eval_losses.index(min(self.eval_losses))
