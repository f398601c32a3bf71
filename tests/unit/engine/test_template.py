"""A model is served in the chat template that it was trained with, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.config import ModelError, Recipe
from tunesmith.engine import engine_spec
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages

TRAINED = "{% for m in messages %}{{ m.content }}{% endfor %}"


def make_checkpoint(folder: Path, data_format: str) -> str:
    """A trained checkpoint, as far as the ledger can tell; its id."""
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    recipe = Recipe.model_validate(
        {
            "name": "first",
            "store": {"folder": folder / "store"},
            "model": {"base": str(folder / "base")},
            "data": {"train": str(folder / "rows.jsonl"), "format": data_format},
            "train": {"method": "full"},
        }
    )
    stages = Stages(recipe)
    stages.made(stages.base)
    with stages.store.write(stages.dataset, recipe):
        pass
    with stages.store.write(stages.trained, recipe) as work:
        (work.out / "config.json").write_text("{}")
        (work.out / "chat_template.jinja").write_text(TRAINED)
        work.metrics["method"] = "full"
    return stages.trained.id


@pytest.mark.parametrize(
    ("data_format", "template", "is_served"),
    [("messages", TRAINED, True), ("messages", TRAINED + "!", False), ("text", "other", True)],
)
def test_another_template_is_refused(
    tmp_path: Path, data_format: str, template: str, is_served: bool
) -> None:
    checkpoint = make_checkpoint(tmp_path, data_format)
    path = tmp_path / "served.jinja"
    path.write_text(template)
    recipe = Recipe.model_validate(
        {
            "name": "second",
            "store": {"folder": tmp_path / "store"},
            "model": {"base": checkpoint, "chat_template": path},
            "serve": {},
        }
    )
    stages = Stages(recipe, Store.of(recipe))
    if is_served:
        assert engine_spec(stages, None).chat_template == path
    else:
        with pytest.raises(ModelError, match=f"not the template that {checkpoint} was trained"):
            engine_spec(stages, None)
