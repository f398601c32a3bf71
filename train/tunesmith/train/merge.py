"""The adapter folded into its base, and how far that moves the model's predictions.

The measure is the mean Kullback-Leibler divergence, in nats per token, from the model as it was
trained (adapter beside its base) to the merged one, at the learnt tokens of held-out rows.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.config.schema import Recipe
from tunesmith.ledger import Artifact
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log
from tunesmith.train import model as models
from tunesmith.train.batches import choose_rows
from tunesmith.train.examples import Example, Examples
from tunesmith.train.language import EVALUATION_FILE, Language, read_language
from tunesmith.train.loss import Batch, TokenLoss, collate
from tunesmith.train.save import save_model

Into = Literal["original", "dequantized"]
"""The weights that an adapter can be merged into: those of the base, or NF4 ones made dense."""

_REFERENCE_FLOATS = 2**27
"""Log-probabilities of the trained model that are kept to compare with: 512 MiB."""


@dataclass(frozen=True)
class Divergence:
    """How a merged model's predictions differ from those of the model that was trained."""

    kl_nats: float
    """Mean over tokens."""

    same_top_share: float
    """Share of tokens for which both find the same one most likely."""

    tokens: int


def merge_stage(stages: Stages) -> Artifact:
    """The merged checkpoint of a recipe's adapter, found or made.

    An adapter that was trained on NF4 weights is merged into the original and into the dequantized
    weights, and the model that is nearer to the trained one is kept.
    """
    if found := stages.store.find(stages.tuned.id):
        return found
    adapter, base = stages.made(stages.trained), stages.made(stages.base)
    dataset, recipe = stages.made(stages.dataset), stages.recipe
    assert recipe.data and recipe.train
    language = read_language(adapter.root, recipe)
    held_out = language.tokenise(dataset, EVALUATION_FILE, recipe.data)
    with stages.store.write(stages.tuned, recipe) as work:
        merge = _Merge(base.root, adapter.root, recipe, language)
        found_by = merge.run(
            _chosen(held_out, recipe.train.max_eval_rows, recipe.seed), work.scratch
        )
        best = min(found_by, key=lambda into: found_by[into].kl_nats)
        for path in (work.scratch / best).iterdir():
            os.rename(path, work.out / path.name)
        work.metrics |= {
            "merged_into": best,
            "kl_nats": {into: found.kl_nats for into, found in found_by.items()},
            "same_top_share": {into: found.same_top_share for into, found in found_by.items()},
            "kl_tokens": found_by[best].tokens,
            "template_sha256": language.template_sha256,
        }
    return stages.made(stages.tuned)


class _Merge:
    """One adapter and the bases it can be merged into, one model in memory at a time."""

    def __init__(self, base: Path, adapter: Path, recipe: Recipe, language: Language) -> None:
        assert recipe.train
        self._base, self._adapter, self._recipe, self._language = base, adapter, recipe, language
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = models.torch_dtype(recipe.model.dtype, self._device)
        self._on_nf4 = recipe.train.method == "qlora"
        self._batch_rows = recipe.train.per_device_eval_batch_size

    def run(self, rows: Sequence[Example], scratch: Path) -> dict[Into, Divergence]:
        """Save each candidate in a folder of its name, and measure it."""
        reference = self._reference(rows)
        candidates: tuple[Into, ...] = (
            ("original", "dequantized") if self._on_nf4 else ("original",)
        )
        found = {}
        for into in candidates:
            merged = self._with_adapter(into).merge_and_unload()
            found[into] = self._compare(TokenLoss(merged, self._dtype), rows, reference)
            log(f"merged into the {into} weights: KL {found[into].kl_nats:.2e} nats per token")
            save_model(merged, self._language, scratch / into, self._dtype)
            del merged
            _free_memory()
        return found

    def _reference(self, rows: Sequence[Example]) -> list[Tensor]:
        """Log-probabilities of the model as it was trained, until memory is used up."""
        trained = TokenLoss(self._with_adapter("nf4" if self._on_nf4 else "original"), self._dtype)
        kept: list[Tensor] = []
        floats = 0
        for batch in self._batches(rows):
            kept.append(_log_probs(trained, batch).cpu())
            floats += kept[-1].numel()
            if floats > _REFERENCE_FLOATS:
                break
        del trained
        _free_memory()
        return kept

    @torch.no_grad()
    def _compare(
        self, merged: TokenLoss, rows: Sequence[Example], reference: Sequence[Tensor]
    ) -> Divergence:
        kl, same, tokens = 0.0, 0, 0
        for batch, trained_NV in zip(self._batches(rows), reference, strict=False):
            trained_NV = trained_NV.to(self._device)
            merged_NV = _log_probs(merged, batch)
            kl += float((trained_NV.exp() * (trained_NV - merged_NV)).sum(dtype=torch.float64))
            same += int((trained_NV.argmax(-1) == merged_NV.argmax(-1)).sum())
            tokens += len(trained_NV)
        # Where nothing differs, rounding can leave a sum below nothing.
        return Divergence(max(0.0, kl / tokens), same / tokens, tokens)

    def _with_adapter(self, base: Into | Literal["nf4"]) -> Any:
        """The adapter on its base, in NF4 or dense."""
        model = models.load_base(
            self._base,
            self._dtype,
            self._device,
            nf4=base != "original",
            trust_remote_code=self._recipe.model.trust_remote_code,
        )
        if base == "dequantized":
            model = model.dequantize(self._dtype)
        return models.load_adapter(model, self._adapter)

    def _batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        for start in range(0, len(rows), self._batch_rows):
            yield collate(rows[start : start + self._batch_rows]).to(self._device)


def _chosen(examples: Examples, limit: int, seed: int) -> list[Example]:
    """Held-out rows to compare on, those of like length together."""
    rows = [examples.rows[at] for at in choose_rows(len(examples.rows), limit, seed)]
    return sorted(rows, key=lambda row: len(row.input_ids))


@torch.no_grad()
def _log_probs(model: TokenLoss, batch: Batch) -> Tensor:
    model.eval()
    return model.logits(batch).log_softmax(-1)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
