"""Every recipe that ships is a valid recipe."""

from pathlib import Path

import pytest

from tunesmith.config import load_recipe

ROOT = Path(__file__).parents[3]
SHIPPED = sorted(ROOT.glob("configs/*.yaml")) + sorted(ROOT.glob("core/tunesmith/config/recipes/*"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.train is not None and recipe.data is not None


def test_the_promised_recipes_ship() -> None:
    assert {"quickstart", "qwen3-4b-lora", "llama3-8b-qlora", "llama3-70b-qlora"} <= {
        path.stem for path in SHIPPED
    }
