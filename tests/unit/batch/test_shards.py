"""Results are durable in whole shards, and the output has every row once, in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tunesmith.batch.answers import Origin
from tunesmith.batch.output import write_output
from tunesmith.batch.results import result_of
from tunesmith.batch.rows import read_rows
from tunesmith.batch.shards import Shards, count_finished
from tunesmith.config import UserError
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import Answer, Output


def result(text: str) -> dict[str, Any]:
    made = Output(text=text, finish_reason="stop", output_tokens=2)
    return result_of(Answer(prompt_tokens=3, cached_tokens=1, outputs=[made]))


def text_of(result: dict[str, Any]) -> str:
    text: str = result["outputs"][0]["text"]
    return text


def test_a_reopened_folder_has_what_was_committed_and_nothing_else(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 200)
    for first in range(0, 150, 3):
        rows = [(row, result(f"é{row}\ud800")) for row in (first + 2, first, first + 1)]
        shards.commit(rows, 0.5)
    (tmp_path / "00000050.tmp").write_bytes(b'{"seconds": 1}\n[160, {"te')
    again = Shards(tmp_path, 200)
    assert again.count == 150 and again.seconds == pytest.approx(25)
    assert 149 in again and 150 not in again and 160 not in again
    assert [text_of(again[row]) for row in range(150)] == [f"é{row}\ud800" for row in range(150)]
    assert not list(tmp_path.glob("*.tmp"))
    again.commit([(199, result("last"))], 0.5)
    again.close()
    assert text_of(Shards(tmp_path, 200)[199]) == "last"


def test_a_shard_that_the_disk_does_not_take_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(tmp_path, 10)
    shards.commit([(0, result("kept"))], 1.0)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space.*00000001.jsonl"):
            shards.commit([(1, result("lost"))], 1.0)
    assert [path.name for path in tmp_path.glob("*.*")] == ["00000000.jsonl"]
    shards.commit([(1, result("again"))], 1.0)
    assert text_of(shards[0]) == "kept" and text_of(shards[1]) == "again"


def test_an_equal_row_has_the_result_of_the_first_one(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 9)
    digest = "a" * 32
    shards.commit([(5, {"same_as": 2, "device_s": 0.0})], 1.0)
    shards.commit([(2, {"digest": digest, **result('{"digest": "x"}'), "device_s": 4.0})], 1.0, 2)
    shards.commit([(3, {"error": {"type": "prompt_too_long", "detail": ""}})], 1.0)
    for opened in (shards, Shards(tmp_path, 9)):
        assert opened[5] == opened[2] | {"same_as": 2, "device_s": 0.0}
        assert list(opened.digests()) == [(2, digest)] and "digest" not in opened[2]
        counts = opened.count, opened.repeated, opened.computed, opened.restarts
        assert counts == (3, 1, 1, 2)
    assert count_finished(tmp_path) == 3


def test_what_was_handed_out_is_known_after_a_kill(tmp_path: Path) -> None:
    for handed in (30, 12, 0):
        shards = Shards(tmp_path, 9)
        shards.note_handed(handed)
    assert Shards(tmp_path, 9).handed == 42


def test_results_of_another_job_are_refused(tmp_path: Path) -> None:
    Shards(tmp_path, 9, {"id": "batch-1"}).commit([(0, result("mine"))], 1.0)
    assert Shards(tmp_path, 9, {"id": "batch-1"}).count == 1
    with pytest.raises(UserError, match="results of another job: id differs"):
        Shards(tmp_path, 9, {"id": "batch-2"})


@pytest.fixture
def section(tmp_path: Path) -> Batch:
    rows = [
        {"id": "b", "prompt": "1", "answer": "mine"},
        {"id": "a", "prompt": "2"},
        {"prompt": ""},
        {"id": "a", "prompt": "3"},
    ]
    path = tmp_path / "input.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Batch(input=str(path), output=str(tmp_path / "out" / "answers.jsonl"))


def test_output_has_every_row_in_order_with_its_columns(section: Batch, tmp_path: Path) -> None:
    assert len(list(read_rows(section))) == 4
    shards = Shards(tmp_path / "shards", 4)
    failure = {"error": {"type": "prompt_too_long", "detail": "9 tokens"}}
    shards.commit([(1, failure), (0, result("one"))], 2.0)
    totals = write_output(section, shards, tmp_path, Origin("tuned-1", usd_per_s=0.5))
    lines = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "id": "b",
        "answer": "one",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "output_tokens": 2,
        "cost_usd": None,
        "model": "tuned-1",
        "error": None,
        "prompt": "1",
        "input_answer": "mine",
    }
    assert [line["id"] for line in lines] == ["b", "a", "line-3", "a"]
    kinds = [line["error"] and line["error"]["type"] for line in lines]
    assert kinds == [None, "prompt_too_long", "missing_prompt", "duplicate_id"]
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert errors[0] == {"id": "a", "line": 2, "type": "prompt_too_long", "detail": "9 tokens"}
    assert [error["line"] for error in errors] == [2, 3, 4]
    assert totals.rows == 4 and totals.output_tokens == 2 and totals.errors.total() == 3
