from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.pipeline.rows import sample_rows


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"id": str(at)}) + "\n" for at in range(50)))
    return path


def test_rows_are_chosen_by_the_seed_and_kept_in_order(rows_file: Path) -> None:
    first = [int(row["id"]) for row in sample_rows(rows_file, 10, seed=17)]
    assert first == sorted(set(first))
    assert len(first) == 10
    assert first == [int(row["id"]) for row in sample_rows(rows_file, 10, seed=17)]
    assert first != [int(row["id"]) for row in sample_rows(rows_file, 10, seed=18)]


def test_a_small_file_or_no_count_gives_all(rows_file: Path) -> None:
    assert len(sample_rows(rows_file, 1000, seed=0)) == 50
    assert len(sample_rows(rows_file, None, seed=0)) == 50
