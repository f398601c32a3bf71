"""What `tunesmith bench train` measures, as its options say; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.config import UserError
from tunesmith.pipeline.stages import Stages

PROFILED_STEPS = 2


@dataclass(frozen=True)
class Workload:
    """What the measurement adds to the recipe."""

    shape: str | None = None
    """Random weights and rows in place of the recipe's, by a name in `shapes.SHAPES`."""

    length: int | None = None
    """Tokens of each random row; `data.max_length` when None."""

    steps: int = 10
    """Optimizer steps of one round."""

    warmup_steps: int = 5
    """Steps before the first round, and before each of a peer's."""

    rounds: int = 3
    peer: str | None = None
    """Another program that trains in turns with Tunesmith; there is `trl`."""

    profile: bool = False
    """Also say which operations a step's time goes to."""

    def check(self, stages: Stages) -> None:
        """Raise UserError on options that do not go together, or not with the recipe."""
        if self.peer not in (None, "trl"):
            raise UserError(f"--peer {self.peer}: there is trl")
        if self.length is not None and not self.shape:
            raise UserError("--length is of random rows, which --shape asks for")
        if self.length is not None and self.length < 2:
            raise UserError("--length: at least 2, since the first token is never learnt")
        for name in ("steps", "warmup_steps", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: at least 1")
        train = stages.recipe.train
        assert train
        if self.shape and train.method == "pretrain":
            raise UserError("--shape: train.architecture is the shape of a model to pre-train")
        if (self.shape or self.peer) and train.over:
            raise UserError("--shape and --peer go without train.over; leave it out")
        if self.peer:
            from tunesmith.train.peer import trl_lora

            trl_lora(train)
