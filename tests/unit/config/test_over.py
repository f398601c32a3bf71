"""Training over a quantized base: what goes with it, and what the recipe then makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.config import Recipe, load_recipe
from tunesmith.pipeline import Stages
from tunesmith.pipeline.run import steps


def recipe(folder: Path, train: dict[str, Any] | None, **quantize: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    return Recipe.model_validate(
        {
            "name": "over",
            "store": {"folder": folder / "store"},
            "model": {"base": str(base)},
            "data": {"train": str(rows), "format": "prompt_completion"},
            "train": None if train is None else {"method": "lora", **train},
            "quantize": {"scheme": ["w8a8-int8", "w4a16"], **quantize},
            "evaluate": {},
        }
    )


def test_the_base_is_quantized_first_and_the_adapter_served_over_it(tmp_path: Path) -> None:
    stages = Stages(recipe(tmp_path, {"over": "w4a16"}))
    assert [step.name for step in steps(stages)] == ["data", "quantize", "train", "eval"]
    assert list(stages.variants) == ["base", "w8a8-int8", "w4a16", "adapter"]
    checkpoint = stages.quantized("w4a16")
    assert checkpoint.parents["parent"] == stages.base.id
    assert stages.trained.parents["base"] == checkpoint.id
    assert stages.served_over("adapter") == checkpoint
    assert stages.served_over("w4a16") is None
    assert stages.evaluation("adapter").parents["model"] == checkpoint.id
    assert stages.evaluated == tuple(stages.variants)
    assert stages.benchmarked == ("adapter",)
    assert stages.recipe.serves_adapter


def test_without_it_ids_are_what_they_were_and_the_tuned_model_is_quantized(tmp_path: Path) -> None:
    stages = Stages(recipe(tmp_path, {}))
    assert [step.name for step in steps(stages)] == ["data", "train", "quantize", "eval"]
    assert "over" not in stages.trained.section["train"]
    assert stages.quantized("w4a16").parents["parent"] == stages.tuned.id
    assert stages.served_over("adapter") == stages.base


def test_what_is_recovered_follows_its_checkpoint(tmp_path: Path) -> None:
    stages = Stages(recipe(tmp_path, {}, recover={"schemes": ["w4a16"], "max_steps": 5}))
    assert [step.name for step in steps(stages)] == ["data", "train", "quantize", "recover", "eval"]
    assert list(stages.variants)[-3:] == ["w8a8-int8", "w4a16", "w4a16+recover"]
    adapter = stages.recovered("w4a16")
    assert adapter.parents == {
        "base": stages.quantized("w4a16").id,
        "teacher": stages.tuned.id,
        "data": stages.dataset.id,
    }
    assert stages.served_over("w4a16+recover") == stages.quantized("w4a16")
    other = Stages(recipe(tmp_path, {}, recover={"max_steps": 6}))
    assert list(other.variants)[-1] == "w4a16+recover"
    assert other.recovered("w4a16").id != adapter.id
    assert Stages(recipe(tmp_path, None, recover={})).recovered("w4a16").parents["teacher"] == (
        stages.base.id
    )


def test_a_builtin_base_is_made_before_it_is_quantized(tmp_path: Path) -> None:
    given = recipe(tmp_path, {"over": "w4a16"})
    builtin = given.model_copy(
        update={"model": given.model.model_copy(update={"base": "builtin/tiny-llama"})}
    )
    first = next(step for step in steps(Stages(builtin)) if step.name == "base")
    assert first.recipe and load_recipe(first.recipe).train


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"over": "w2a16"}, "train.over: w2a16 is made by quantize: add it to quantize.scheme"),
        ({"over": "w4a16", "merge": True}, "merge: false"),
        ({"over": "w4a16", "method": "qlora"}, "over is for method: lora"),
        ({"over": "w4a16", "lora": {"use_dora": True}}, "neither lora.use_dora nor pissa"),
        ({"over": "w4a16", "base_precision": "fp8"}, "leave base_precision out"),
        ({"merge": False}, "train.merge: true, or train.over"),
    ],
)
def test_what_cannot_be_trained_over_is_refused(
    tmp_path: Path, train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(tmp_path, train)


def test_only_what_is_made_is_recovered(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"w2a16 is not made: add it to quantize\.scheme"):
        recipe(tmp_path, {}, recover={"schemes": ["w2a16"]})
