"""`tunesmith plan`: what each section would make or reuse, and the size of the training.

Counts are exact: the rows are read and tokenised, and the model is built without its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from tunesmith.config import require
from tunesmith.data import make_dataset
from tunesmith.ledger import Artifact, Draft
from tunesmith.pipeline.run import steps
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log, make_table

_COUNTED_CHARACTERS = 50_000_000
"""Larger data sets are not tokenised for a plan; it would take minutes."""

_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]


def run(stages: Stages) -> dict[str, Any]:
    """Every artifact of the recipe with its state, and the figures of its training."""
    result: dict[str, Any] = {
        "stages": [
            {
                "stage": step.name,
                "what": draft.label,
                "id": draft.id,
                "state": _state(stages, draft),
            }
            for step in steps(stages)
            for draft in step.makes
        ]
    }
    if stages.recipe.train:
        result["training"] = _training(stages)
    return result


def show(result: dict[str, Any]) -> RenderableType:
    """The stages in order, then the training."""
    rows = [[part["stage"], part["what"], part["id"], part["state"]] for part in result["stages"]]
    parts: list[RenderableType] = [make_table("stages", ("stage", "what", "id", "state"), rows)]
    if training := result.get("training"):
        figures = [
            (name.replace("_", " "), "not counted" if value is None else f"{value:,}")
            for name, value in training.items()
        ]
        parts.append(make_table("training", ("", ""), figures))
    return Group(*parts)


def _state(stages: Stages, draft: Draft) -> str:
    if stages.store.find(draft.id):
        return "made"
    return "resumes" if stages.store.in_progress(draft) else "to make"


def _training(stages: Stages) -> dict[str, Any]:
    for module in ("torch", "transformers"):
        require(module, "train")
    import numpy as np

    from tunesmith.train.batches import Groups, Order, count_steps, count_tokens
    from tunesmith.train.language import TRAIN_FILE
    from tunesmith.train.model import count_parameters, quiet_libraries

    quiet_libraries()
    require("peft", "train")
    recipe = stages.recipe
    assert recipe.train and recipe.data
    train = recipe.train
    dataset = make_dataset(stages)
    language, model = _language_and_model(stages, dataset)
    parameters = count_parameters(model)
    figures: dict[str, Any] = {
        "rows": dataset.manifest.metrics["train_rows"],
        "total_parameters": parameters.total,
        "trainable_parameters": parameters.trainable,
    }
    if dataset.manifest.metrics["train_characters"] > _COUNTED_CHARACTERS:
        log("the data set is large; its tokens and steps are counted when it is trained on")
        return figures | dict.fromkeys(("steps", "tokens", "supervised_tokens"))
    examples = language.tokenise(dataset, TRAIN_FILE, recipe.data, texts_apart=train.packing)
    rows_per_pass = train.per_device_train_batch_size * train.processes
    per_step = rows_per_pass * train.gradient_accumulation_steps
    groups = (
        Groups.packed(examples.lengths(), recipe.data.max_length, recipe.seed)
        if train.packing
        else Groups.of(examples.lengths(), 2 if train.preference else 1)
    )
    supervised = examples.supervised()
    per_group = np.add.reduceat(supervised[groups.rows], groups.starts[:-1])
    order = Order(groups.lengths, per_step, recipe.seed)
    steps = count_steps(train.num_train_epochs, train.max_steps, order.steps_per_epoch)
    return figures | {
        "sequences": len(examples.rows),
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "groups_per_step": per_step,
        "steps_per_epoch": order.steps_per_epoch,
        "steps": steps,
        "tokens": count_tokens(order, steps, groups.lengths),
        "supervised_tokens": count_tokens(order, steps, per_group),
    }


def _language_and_model(stages: Stages, dataset: Artifact) -> tuple[Any, Any]:
    """The tokenizer and the model of a training, the model on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.train.language import learn_language, read_language
    from tunesmith.train.model import add_adapter, llama_config

    recipe = stages.recipe
    assert recipe.train
    folder = None if recipe.train.method == "pretrain" else config_folder(stages)
    trust = recipe.model.trust_remote_code
    if folder:
        language = read_language(folder, recipe)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    else:
        maker = stages if recipe.train.method == "pretrain" else stages.builtin_base
        assert maker.recipe.train and maker.recipe.train.architecture
        language = learn_language(make_dataset(maker), maker.recipe)
        config = llama_config(maker.recipe.train.architecture, language.tokenizer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        if recipe.train.method in ("lora", "qlora"):
            model = add_adapter(model, recipe.train.lora)
    return language, model


def config_folder(stages: Stages) -> Path | None:
    """Configuration and tokenizer of the base, without its weights; None while it is not made."""
    if found := stages.store.find(stages.base.id):
        return found.root
    if stages.builds_base:
        return None
    section = stages.base.section
    if section["source"] == "folder":
        return Path(str(stages.recipe.model.base))
    hub = require("huggingface_hub", "train")
    return Path(
        hub.snapshot_download(
            section["source"], revision=section["commit"], allow_patterns=_CONFIG_FILES
        )
    )
