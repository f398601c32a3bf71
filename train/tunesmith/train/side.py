"""One side of a training, what is learnt from or what is held out, and its figures under a model.

Letters of shapes: N learnt tokens, R rows, K figures of the objective.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.config.schema.train import Preference
from tunesmith.terminal import progress_bar
from tunesmith.train.batches import Groups, Rows, passes
from tunesmith.train.examples import Examples
from tunesmith.train.loss import Batch, collate
from tunesmith.train.objective import make_objective, sum_by_row


@dataclass(frozen=True)
class Layout:
    """How rows stand together in a forward pass."""

    as_documents: bool = False
    """Back to back in one row, each seeing itself alone; padded to the longest otherwise."""

    block_tokens: int | None = None
    """Pack rows into blocks of this size."""


class Side:
    """Rows in groups, and what the objective says of them."""

    def __init__(
        self,
        examples: Examples,
        layout: Layout,
        preference: Preference | None,
        accelerator: Any,
        seed: int,
    ) -> None:
        self.objective = make_objective(preference)
        self._rows, self._layout, self._accelerator = examples.rows, layout, accelerator
        self._lengths, self._supervised = examples.lengths(), examples.supervised()
        self._widest = int(self._lengths.max())
        self.groups = (
            Groups.packed(self._lengths, layout.block_tokens, seed)
            if layout.block_tokens
            else Groups.of(self._lengths, 2 if preference else 1)
        )
        self._placeholder = self.groups.rows_of(np.zeros(1, dtype=np.int64))
        """What a rank without rows puts through the model, so that all take part."""
        self._reference_R: Tensor | None = None

    def passes(self, groups: Rows, per_pass: int) -> list[list[Rows]]:
        """The rows of each rank in each forward pass over some groups."""
        ranks = self._accelerator.num_processes
        return [
            [self.groups.rows_of(share) for share in shares]
            for shares in passes(groups, self.groups.lengths, per_pass, ranks)
        ]

    def supervised(self, rows: Rows) -> int:
        """Learnt tokens of some rows."""
        return int(self._supervised[rows].sum())

    def count(self, rows: Rows) -> int:
        """What `sums` over some rows is divided by."""
        return self.objective.count(len(rows), self.supervised(rows))

    def sums(self, model: Any, rows: Rows) -> Tensor:
        """The objective's figures [K] over some rows, summed; nothing for no rows."""
        nats_N, batch = self._nats(model, rows)
        reference_R = None
        if self._reference_R is not None:
            at = torch.from_numpy(rows if len(rows) else self._placeholder)
            reference_R = self._reference_R[at].to(nats_N.device, non_blocking=True)
        sums = self.objective.sums(nats_N, batch, reference_R)
        return sums if len(rows) else sums * 0.0

    def named(self, sums: Tensor, count: int) -> dict[str, float]:
        """The objective's figures by name."""
        return dict(zip(self.objective.figures, (sums / count).tolist(), strict=True))

    def no_sums(self) -> Tensor:
        """Where sums begin."""
        size = len(self.objective.figures)
        return torch.zeros(size, dtype=torch.float64, device=self._accelerator.device)

    def slots(self, groups: Rows, turns: list[list[Rows]]) -> int:
        """Places for tokens in the forward passes over some groups, padding included."""
        if self._layout.block_tokens:
            return len(groups) * self._layout.block_tokens
        return sum(self.places(rows) for shares in turns for rows in shares if len(rows))

    def places(self, rows: Rows) -> int:
        """Places for tokens in one forward pass over some rows, padding included."""
        lengths = self._lengths[rows]
        if self._layout.as_documents:
            return int(lengths.sum())
        return len(rows) * int(lengths.max())

    @torch.no_grad()
    def compare_with(self, model: Any, per_pass: int, path: Path) -> None:
        """Have the objective compare with each row's loss under this model, as it is now; what is
        at `path` is taken instead."""
        if not path.exists():
            device = self._accelerator.device
            found_R = torch.zeros(len(self._lengths), dtype=torch.float64, device=device)
            model.eval()
            groups = np.arange(len(self.groups))
            with progress_bar("comparing with the start", len(groups)) as bar:
                for shares in self.passes(groups, per_pass):
                    rows = shares[self._accelerator.process_index]
                    nats_N, batch = self._nats(model, rows)
                    if len(rows):
                        at = torch.from_numpy(rows).to(device)
                        found_R[at] = sum_by_row(nats_N, batch).double()
                    bar.advance(len(np.concatenate(shares)) // len(self._placeholder))
            found_R = self._accelerator.reduce(found_R)
            if self._accelerator.is_main_process:
                aside = path.with_suffix(".writing")
                save_file({"nats": found_R}, aside)
                os.replace(aside, path)
            self._accelerator.wait_for_everyone()
        self._reference_R = load_file(path)["nats"]

    def _nats(self, model: Any, rows: Rows) -> tuple[Tensor, Batch]:
        rows = rows if len(rows) else self._placeholder
        examples = [self._rows[row] for row in rows]
        batch = collate(examples, self._layout.as_documents, self._widest)
        batch = batch.to(self._accelerator.device)
        nats_N: Tensor = model(
            batch.input_ids_BS, batch.positions_N, batch.targets_N, batch.bounds, batch.longest
        )
        return nats_N, batch
