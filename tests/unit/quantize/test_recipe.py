"""What the recipe alone decides about quantized checkpoints, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.config import Recipe
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return {
        "name": "test",
        "store": {"folder": tmp_path / "store"},
        "model": {"base": str(tmp_path / "base")},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "quantize": {"scheme": "w4a16"},
        "evaluate": {},
    }


def ids(recipe: dict[str, Any]) -> tuple[str, str]:
    loaded = Recipe.model_validate(recipe)
    stages = Stages(loaded, Store.of(loaded))
    return stages.quantized("w4a16").id, stages.evaluation("w4a16").id


def test_ids_follow_what_decides_the_result(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello")
    quantized, evaluated = ids(recipe)
    assert (quantized, evaluated) == ids(recipe)
    for change in (
        {"model": recipe["model"] | {"dtype": "float32"}},
        {"data": recipe["data"] | {"max_length": 17}},
        {"quantize": recipe["quantize"] | {"calibration_rows": 3}},
        {"quantize": recipe["quantize"] | {"algorithm": "awq"}},
        {"quantize": recipe["quantize"] | {"group_size": 64}},
        {"quantize": recipe["quantize"] | {"calibration_text": "generic"}},
        {"quantize": recipe["quantize"] | {"calibration_text": str(text)}},
        {"data": recipe["data"] | {"truncation": "start"}},
        {"quantize": recipe["quantize"] | {"kv_cache": "fp8"}},
        {"seed": 5},
    ):
        other_quantized, other_evaluated = ids(recipe | change)
        assert other_quantized != quantized, change
        assert other_evaluated != evaluated, change


def test_ids_do_not_follow_what_decides_nothing(recipe: dict[str, Any]) -> None:
    for change in ({"algorithm": "gptq"}, {"device": "cpu"}, {"scheme": ("w8a8-int8", "w4a16")}):
        assert ids(recipe | {"quantize": recipe["quantize"] | change}) == ids(recipe), change


def test_what_needs_no_calibration_keeps_its_id(recipe: dict[str, Any]) -> None:
    rounded = recipe["quantize"] | {"algorithm": "rtn"}
    other = {"quantize": rounded | {"calibration_text": "generic"}}
    assert ids(recipe | {"quantize": rounded}) == ids(recipe | other)


def test_only_an_evaluation_depends_on_how_it_is_measured(recipe: dict[str, Any]) -> None:
    quantized, evaluated = ids(recipe)
    measured = recipe | {"evaluate": {"max_rows": 5}}
    assert ids(measured)[0] == quantized
    assert ids(measured)[1] != evaluated
    shown = recipe | {"evaluate": {"confidence": 0.9, "variants": ("w4a16",)}}
    assert ids(shown) == (quantized, evaluated)


def test_an_adapter_that_is_not_merged_cannot_be_quantized(recipe: dict[str, Any]) -> None:
    train = {"train": {"method": "lora", "merge": False}}
    with pytest.raises(ValidationError, match="quantize needs the merged model: train.merge: true"):
        Recipe.model_validate(recipe | train)
