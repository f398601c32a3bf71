"""`tunesmith recover`: adapters over quantized checkpoints that win back what quantization lost."""

from __future__ import annotations

from typing import Any

from tunesmith.config import UserError
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.quantize import Recover
from tunesmith.config.schema.train import Lora, Train
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log, make_table
from tunesmith.train.libraries import load_libraries


def run(stages: Stages, *, discard: bool = False) -> dict[str, Any]:
    """Make each adapter that is not there yet.

    Raises UserError when one that was interrupted would be left behind, unless `discard`.
    """
    quantize = stages.recipe.quantize
    if quantize is None or quantize.recover is None:
        raise UserError(f"{stages.path}: this needs quantize.recover")
    load_libraries(None)
    from tunesmith.train.drift import check_drift
    from tunesmith.train.ranks import check_processes, join
    from tunesmith.train.stage import recover_stage

    accelerator = join()
    check_processes(accelerator, 1)
    recipe = _as_training(stages.recipe, quantize.recover)
    adapters = {}
    for scheme in quantize.recovered:
        draft = stages.recovered(scheme)
        check_drift(stages, draft, discard=discard)
        found = stages.store.find(draft.id)
        if found is None:
            log(f"recover {scheme}: learning from {stages.unquantized.id}")
        artifact = found or recover_stage(stages, scheme, recipe, accelerator)
        adapters[scheme] = {
            "id": artifact.id,
            "path": str(artifact.folder),
            "reused": found is not None,
            **artifact.manifest.metrics,
        }
    return {"adapters": adapters}


def show(result: dict[str, Any]) -> Any:
    """One line per adapter: how far the checkpoint was from its parent, before and after."""
    rows = [
        (
            scheme,
            f"{made['kl_nats_before']:.5f}",
            f"{made['kl_nats_mended']:.5f}",
            f"{made['eval_loss_after']:.5f}",
            f"{1 - made['eval_loss_after'] / made['kl_nats_before']:.0%}",
            f"{made['steps']:,}",
            "reused" if made["reused"] else f"{made['train_s']:,.1f} s",
            made["id"],
        )
        for scheme, made in result["adapters"].items()
    ]
    columns = ("scheme", "KL before", "mended", "after", "less", "steps", "time", "artifact")
    return make_table(
        "Recovered (KL from the parent on held-out rows, nats per token)", columns, rows
    )


def _as_training(recipe: Recipe, recover: Recover) -> Recipe:
    """The recipe with the distillation in the place of its training."""
    train = Train(
        method="lora",
        lora=Lora(r=recover.r, lora_alpha=2 * recover.r),
        learning_rate=recover.learning_rate,
        max_steps=recover.max_steps,
        per_device_train_batch_size=recover.per_device_train_batch_size,
        gradient_checkpointing=recover.gradient_checkpointing,
        merge=False,
    )
    return recipe.model_copy(update={"train": train})
