"""Changed after an interruption, a recipe is refused with what changed, and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.config import Recipe, TunesmithError, UserError, WorkInterrupted, dump_recipe
from tunesmith.pipeline import Stages
from tunesmith.train import command
from tunesmith.train.batches import Rows
from tunesmith.train.drift import check_drift
from tunesmith.train.loop import Trainer

RecipeOf = Callable[..., Recipe]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stages], Path]:
    """Stop a training after its third step; returns its work folder."""

    def train_and_stop(stages: Stages) -> Path:
        step = Trainer._step

        def step_and_stop(trainer: Trainer, rows: Rows) -> Any:
            norm = step(trainer, rows)
            if trainer.progress.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return norm

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", step_and_stop)
            with pytest.raises(WorkInterrupted):
                command.run(stages)
        return stages.store.scratch(stages.trained).parent

    return train_and_stop


def refusal(recipe: Recipe) -> list[str]:
    """The lines of the error that say what changed."""
    with pytest.raises(UserError, match="interrupted after step 3") as caught:
        command.run(Stages(recipe))
    assert "--discard" in str(caught.value)
    return [line.strip() for line in str(caught.value).splitlines()[1:-1]]


def test_a_changed_recipe_is_refused_and_the_former_one_goes_on(
    recipe_of: RecipeOf, interrupt: Callable[[Stages], Path]
) -> None:
    recipe = recipe_of(merge=False, save_steps=100)
    work = interrupt(Stages(recipe))
    changed = recipe_of(
        merge=False, learning_rate=1e-3, lora={"r": 8}, data={"max_length": 100, "max_rows": 40}
    )
    assert refusal(changed) == [
        "data.max_length: 128 → 100",
        "train.learning_rate: 0.005 → 0.001",
        "train.lora.r: 16 → 8",
        "data.max_rows: null → 40",
    ]
    assert refusal(recipe_of(merge=False, processes=2)) == ["train.processes: 1 → 2"]
    assert refusal(recipe_of("llama", method="full")) == ["train.method: lora → full"]
    assert refusal(recipe_of("qwen3", merge=False)) == [
        "model.base: config.json changed (" + str(recipe_of("qwen3").model.base) + ")",
        "model.base: model.safetensors changed (" + str(recipe_of("qwen3").model.base) + ")",
    ]
    assert work.exists()
    # What changes no result is no drift, and neither is a training of another name.
    command.run(Stages(changed.model_copy(update={"name": "another"})))
    resumed = command.run(Stages(recipe_of(merge=False, save_steps=2)))
    assert resumed["trained"]["steps"] == 6
    assert not work.exists()
    command.run(Stages(changed))


def test_changed_rows_and_a_changed_template_are_named(
    recipe_of: RecipeOf, interrupt: Callable[[Stages], Path], tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    recipe = recipe_of(model={"chat_template": template})
    template.write_text((Path(str(recipe.model.base)) / "chat_template.jinja").read_text())
    work = interrupt(Stages(recipe))
    before = template.read_text()
    template.write_text("{# new #}" + before)
    assert refusal(recipe) == [f"model.chat_template: changed ({template})"]
    assert refusal(recipe_of()) == ["model.chat_template: taken away"]
    template.write_text(before)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    assert refusal(recipe) == [f"data.train: rows changed ({rows})"]

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--json"]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, UserError) and refused.exception.exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--discard"]).exit_code == 0
    assert not work.exists()


def test_a_training_that_runs_or_saved_nothing_is_left_alone(recipe_of: RecipeOf) -> None:
    stages, changed = Stages(recipe_of(merge=False)), recipe_of(merge=False, learning_rate=1e-3)
    with pytest.raises(KeyboardInterrupt), stages.store.write(stages.trained, stages.recipe):
        raise KeyboardInterrupt
    assert stages.store.interrupted("test") == [stages.trained]
    check_drift(Stages(changed), Stages(changed).trained, discard=False)
    with stages.store.write(stages.trained, stages.recipe) as work:
        (work.scratch / "checkpoints" / "step-00000001").mkdir(parents=True)
        assert stages.store.interrupted("test") == []
        check_drift(Stages(changed), Stages(changed).trained, discard=False)
        with pytest.raises(TunesmithError, match="another process"):
            stages.store.discard(stages.trained)
