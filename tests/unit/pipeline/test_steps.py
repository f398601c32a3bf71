"""What `tunesmith run` does with a recipe, in which order."""

from __future__ import annotations

from pathlib import Path

from tunesmith.config import Recipe
from tunesmith.pipeline import Stages
from tunesmith.pipeline.run import steps


def test_a_model_that_is_pre_trained_can_be_quantized(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "new",
            "store": {"folder": tmp_path},
            "model": {},
            "data": {"train": "builtin/stdlib", "format": "text"},
            "train": {
                "method": "pretrain",
                "architecture": {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                },
            },
            "quantize": {"scheme": "w4a16"},
        }
    )
    stages = Stages(recipe)
    assert [step.name for step in steps(stages)] == ["data", "train", "quantize"]
    assert stages.variants[stages.unquantized_name].id == stages.trained.id
