"""A batch that was interrupted is continued or refused, never mixed and never left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.batch.drift import SHARDS, check_drift, note_output
from tunesmith.batch.shards import Shards
from tunesmith.config import Recipe, UserError
from tunesmith.pipeline import Stages


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "in.jsonl").write_text('{"prompt": "1"}\n')
    return tmp_path


def stages_of(**batch: Any) -> Stages:
    section = {"input": "in.jsonl", "output": "out.jsonl", **batch}
    return Stages(
        Recipe.model_validate(
            {"name": "bot", "store": {"folder": "store"}, "model": {"base": "base"},
             "batch": section}
        )
    )  # fmt: skip


def check(stages: Stages, *, discard: bool = False) -> None:
    assert stages.recipe.batch
    check_drift(stages, stages.recipe.batch, discard=discard)


def interrupt(stages: Stages, rows: int) -> Path:
    """Leave what a batch leaves that was killed after so many rows."""
    assert stages.recipe.batch
    stages.made(stages.base)
    with (
        pytest.raises(KeyboardInterrupt),
        stages.store.write(stages.batch(), stages.recipe) as work,
    ):
        note_output(work.scratch, stages.recipe.batch)
        shards = Shards(work.scratch / SHARDS, rows, {"id": work.draft.id})
        if rows:
            shards.commit([(row, {"text": ""}) for row in range(rows)], 1.0)
        raise KeyboardInterrupt
    return work.scratch


def test_a_changed_recipe_model_or_input_is_refused_with_what_changed(folder: Path) -> None:
    scratch = interrupt(stages_of(), 40)
    check(stages_of())
    check(stages_of(replicas=2, reuse=False, max_error_rate=0.5))
    with pytest.raises(UserError, match="interrupted after 40 rows") as refused:
        check(stages_of(max_tokens=9))
    assert "  batch.max_tokens: null → 9\n" in str(refused.value)
    assert "--discard" in str(refused.value)
    (folder / "in.jsonl").write_text(json.dumps({"prompt": "2"}))
    with pytest.raises(UserError, match=r"batch.input: changed \(in.jsonl\)"):
        check(stages_of())
    (folder / "in.jsonl").write_text('{"prompt": "1"}\n')
    (folder / "base" / "config.json").write_text("{ }")
    with pytest.raises(UserError, match="model.base: config.json changed"):
        check(stages_of())
    assert scratch.exists()
    check(stages_of(), discard=True)
    assert not scratch.exists()


def test_another_output_is_another_batch_and_nothing_done_is_nothing_lost(folder: Path) -> None:
    interrupt(stages_of(), 3)
    check(stages_of(output="other.jsonl", max_tokens=9))
    interrupt(stages_of(output="third.jsonl", max_tokens=7), 0)
    check(stages_of(output="third.jsonl", max_tokens=9))
