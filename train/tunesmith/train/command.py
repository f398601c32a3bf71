"""`tunesmith train`: the dataset, the base, the training and the merge of one recipe."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tunesmith.config import UserError
from tunesmith.data import make_dataset
from tunesmith.ledger import Artifact
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import make_table
from tunesmith.train.launch import is_launched, launch
from tunesmith.train.libraries import check_libraries, load_libraries


def run(stages: Stages, *, discard: bool = False) -> dict[str, Any]:
    """Make what the recipe's `train` section asks for, unless it is there.

    Raises UserError when a training that was interrupted would be left behind, unless `discard`.
    """
    train = stages.recipe.train
    if train is None:
        raise UserError(f"{stages.path}: this needs a train section")
    check_libraries(train)
    if not is_launched():
        # What is wrong with rows or the base is told at once: the libraries take seconds to load.
        make_dataset(stages)
    is_made = stages.store.find(stages.trained.id) is not None
    load_libraries(train)
    from tunesmith.train.drift import check_drift
    from tunesmith.train.merge import merge_stage
    from tunesmith.train.ranks import check_processes, join, main_first
    from tunesmith.train.stage import make_base, make_trained_over, train_stage

    if train.processes > 1 and not is_made and not is_launched():
        check_drift(stages, stages.trained, discard=discard)
        if stages.builds_base:
            make_base(stages, join())
        return launch(stages.recipe)
    accelerator = join()
    if not is_made:
        check_processes(accelerator, train.processes)
    main_first(lambda: check_drift(stages, stages.trained, discard=discard))
    result: dict[str, Any] = {"data": main_first(lambda: make_dataset(stages)).id}
    if train.method != "pretrain":
        result["base"] = make_trained_over(stages, accelerator).id
    result["trained"] = _summary(train_stage(stages, accelerator))
    if stages.trained.kind == "adapter" and train.merge and accelerator.is_main_process:
        result["tuned"] = _summary(merge_stage(stages))
    return result


def show(result: dict[str, Any]) -> RenderableType:
    """What was made and how it went."""
    trained, tuned = result["trained"], result.get("tuned")
    rows = [
        ("held-out loss before", f"{trained['eval_loss_before']:.4f}"),
        ("held-out loss after", f"{trained['eval_loss_after']:.4f}"),
        ("training loss at the end", f"{trained['final_loss']:.4f}"),
        ("steps", f"{trained['steps']:,}"),
        ("sequences", f"{trained['examples']:,}"),
        ("supervised tokens per second", f"{trained['supervised_tokens_per_s']:,.0f}"),
        ("seconds", f"{trained['train_s']:,.1f}"),
    ]
    rows.append(("peak memory in GiB", f"{trained['peak_memory_gib']:.2f}"))
    if tuned:
        kl = tuned["kl_nats"][tuned["merged_into"]]
        rows.append((f"KL of merging into {tuned['merged_into']}", f"{kl:.2e}"))
    paths = [part["path"] for part in (trained, tuned) if part]
    return Group(
        make_table(trained["id"], ("nats per token where it is a loss", ""), rows),
        Text("\n".join(paths), style="dim"),
    )


def _summary(artifact: Artifact) -> dict[str, Any]:
    return {"id": artifact.id, "path": str(artifact.folder), **artifact.manifest.metrics}
