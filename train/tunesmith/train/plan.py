"""`tunesmith plan`: what each section would make or reuse, and what the training would take.

Counts are exact: the rows are read and tokenised, and the model is built without its weights.
Memory is that of the training's own code, run without contents; hours rest on an assumed share of
the speed of matrix products.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType

from tunesmith.config import Recipe
from tunesmith.data import make_dataset
from tunesmith.ledger import Artifact, Draft
from tunesmith.pipeline.configs import config_folder
from tunesmith.pipeline.run import steps
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log, make_table
from tunesmith.train.libraries import load_libraries

THIS_MACHINE = "this"
_COUNTED_CHARACTERS = 50_000_000
"""Larger data sets are not tokenised for a plan; it would take minutes."""

_CEILING_SHARE = 0.4
"""Of what large matrix products reach: an assumption. The best published LoRA training on an H100
has 0.5 (NVIDIA NeMo AutoModel, 12,473 tokens/s on Llama-3-8B)."""


def run(stages: Stages, device: str = THIS_MACHINE) -> dict[str, Any]:
    """Every artifact of the recipe with its state, and the figures of its training.

    Raises GateError when the training does not fit the device.
    """
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
        result |= _training(stages, device)
    return result


def show(result: dict[str, Any]) -> RenderableType:
    """The stages in order, then the training, its memory, time and price."""
    rows = [[part["stage"], part["what"], part["id"], part["state"]] for part in result["stages"]]
    parts: list[RenderableType] = [make_table("stages", ("stage", "what", "id", "state"), rows)]
    if training := result.get("training"):
        figures = [
            (name.replace("_", " "), "not counted" if value is None else f"{value:,}")
            for name, value in training.items()
        ]
        parts.append(make_table("training", ("", ""), figures))
    if memory := result.get("memory"):
        figures = [(part, f"{size:.3f}") for part, size in memory["parts_gib"].items()]
        figures += [(name, f"{memory[f'{name}_gib']:.3f}") for name in ("peak", "available")]
        parts.append(make_table(f"memory on {memory['device']}", ("part", "GiB"), figures))
    if time := result.get("time"):
        figures = [
            ("useful TFLOP", f"{time['useful_tflop']:,.1f}"),
            ("TFLOP/s of matrix products", f"{time['matmul_tflops']:,.2f}"),
            ("share of them, assumed", f"{time['assumed_share']:.0%}"),
            ("hours", f"{time['hours']:,.4f}"),
        ]
        if time["usd"] is not None:
            figures.append(("USD", f"{time['usd']:,.4f}"))
        parts.append(make_table(f"time on {time['device']}", ("", ""), figures))
    return Group(*parts)


def _state(stages: Stages, draft: Draft) -> str:
    if stages.store.find(draft.id):
        return "made"
    return "resumes" if stages.store.in_progress(draft) else "to make"


def _training(stages: Stages, device_name: str) -> dict[str, Any]:
    load_libraries(None)
    from tunesmith.train.batches import Groups, Order, count_steps, count_tokens
    from tunesmith.train.devices import find_device
    from tunesmith.train.forecast import Forecaster
    from tunesmith.train.language import EVALUATION_FILE, TRAIN_FILE
    from tunesmith.train.model import count_parameters
    from tunesmith.train.useful import count_layers

    recipe = stages.recipe
    assert recipe.train and recipe.data
    train = recipe.train
    dataset = make_dataset(stages)
    language, config = _language_and_config(stages, dataset)
    model = _dense_model(recipe, config)
    parameters = count_parameters(model)
    figures: dict[str, Any] = {
        "rows": dataset.manifest.metrics["train_rows"],
        "total_parameters": parameters.total,
        "trainable_parameters": parameters.trainable,
    }
    if dataset.manifest.metrics["train_characters"] > _COUNTED_CHARACTERS:
        log("the data set is large; it is counted, and its memory checked, when it is trained on")
        return {"training": figures | dict.fromkeys(("steps", "tokens", "supervised_tokens"))}
    examples, held_out = (
        language.tokenise(dataset, file, recipe.data, texts_apart=train.packing)
        for file in (TRAIN_FILE, EVALUATION_FILE)
    )
    lengths, learnt = examples.lengths(), examples.supervised()
    groups = Groups.of_training(lengths, train, recipe.data.max_length, recipe.seed)
    per_step = (
        train.per_device_train_batch_size * train.processes * train.gradient_accumulation_steps
    )
    order = Order(groups.lengths, per_step, recipe.seed)
    steps = count_steps(train.num_train_epochs, train.max_steps, order.steps_per_epoch)
    figures |= {
        "sequences": len(examples.rows),
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "groups_per_step": per_step,
        "steps_per_epoch": order.steps_per_epoch,
        "steps": steps,
        "tokens": count_tokens(order, steps, groups.lengths),
        "supervised_tokens": count_tokens(order, steps, groups.sums(learnt)),
    }
    result: dict[str, Any] = {"training": figures}
    device = find_device(device_name, train.processes)
    forecaster = Forecaster(recipe, config, examples, held_out, device)
    if forecast := forecaster.forecast():
        forecaster.refuse_what_cannot_fit(forecast)
        result["memory"] = {
            "device": device.name,
            "parts_gib": forecast.in_gib(),
            "peak_gib": round(forecast.peak_bytes / 2**30, 4),
            "available_gib": round(device.memory_bytes / 2**30, 4),
        }
    if layers := count_layers(model):
        flops = count_tokens(order, steps, groups.sums(layers.per_row(lengths, learnt)))
        result["time"] = _time(recipe, device, flops)
    return result


def _time(recipe: Recipe, device: Any, flops: float) -> dict[str, Any]:
    """Hours and USD of so much work, at the share of the device's products that is assumed."""
    assert recipe.train
    tflops = device.measured_tflops(recipe.model.dtype)
    hours = flops / (tflops * 1e12 * _CEILING_SHARE) / 3600
    price = recipe.price.gpu_hour_usd if recipe.price else None
    return {
        "device": device.name,
        "useful_tflop": round(flops / 1e12, 4),
        "matmul_tflops": round(tflops, 4),
        "assumed_share": _CEILING_SHARE,
        "hours": round(hours, 6),
        "usd": None if price is None else round(hours * recipe.train.processes * price, 6),
    }


def _dense_model(recipe: Recipe, config: Any) -> Any:
    """The model without contents, counted without packing: 4-bit weights hold two in a byte."""
    from tunesmith.train.forecast import empty_model

    assert recipe.train
    method = "lora" if recipe.train.method == "qlora" else recipe.train.method
    counted = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"method": method})}
    )
    return empty_model(counted, config)


def _language_and_config(stages: Stages, dataset: Artifact) -> tuple[Any, Any]:
    """The tokenizer and the model's configuration of a training."""
    from tunesmith.train.language import learn_language, read_language
    from tunesmith.train.model import read_config

    recipe = stages.recipe
    assert recipe.train
    folder = None if recipe.train.method == "pretrain" else config_folder(stages)
    if folder:
        language = read_language(folder, recipe)
        return language, read_config(recipe, language.tokenizer, folder)
    maker = stages if recipe.train.method == "pretrain" else stages.builtin_base
    language = learn_language(make_dataset(maker), maker.recipe)
    return language, read_config(maker.recipe, language.tokenizer, None)
