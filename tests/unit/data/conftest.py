"""Recipes over small files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.schema import Recipe
from tunesmith.pipeline.stages import Stages

MakeStages = Callable[..., Stages]


@pytest.fixture
def make_stages(tmp_path: Path) -> MakeStages:
    """Stages of a recipe whose data section is given, in a store of its own."""

    def make(train: Path | str | list[Any], seed: int = 17, **data: Any) -> Stages:
        recipe = Recipe.model_validate(
            {
                "name": "test",
                "seed": seed,
                "store": {"folder": tmp_path / "store"},
                "model": {"base": "builtin/tiny-llama"},
                "data": {"train": train if isinstance(train, list) else str(train), **data},
            }
        )
        return Stages(recipe, path="recipe.yaml")

    return make


def conversation(question: object, answer: object = "Yes.") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Is it {question}?"},
            {"role": "assistant", "content": str(answer)},
        ]
    }


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """A JSONL file of rows; a string or bytes is written as it is."""

    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        raw = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        path.write_bytes(b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in raw))
        return path

    return write


@pytest.fixture
def conversations() -> Callable[[int], list[dict[str, Any]]]:
    """So many different good rows."""
    return lambda count: [conversation(number) for number in range(count)]
