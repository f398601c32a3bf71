"""`tunesmith batch` on a Ray cluster of two nodes, of which one is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

from ray_nodes import TwoNodes, two_nodes

from tunesmith.batch.cluster import connect
from tunesmith.config import UserError

# Two engines, Ray and the command on half a core of a busy machine.
pytestmark = pytest.mark.timeout(900)

ROWS = 400
RECIPE = """
name: bot
model: {{base: {base}, dtype: float32}}
batch:
  {{input: prompts.jsonl, output: answers.jsonl, max_tokens: 24, max_error_rate: 0.1, cluster: ray}}
engine: {{kv_cache_gib: 0.1, max_num_seqs: 8, max_model_len: 128}}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as nodes:
        yield nodes


def start(folder: Path, address: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json", *overrides],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 480
    while committed(folder) < rows and process.poll() is None:
        assert time.monotonic() < deadline_s, f"{committed(folder)} of {rows} rows"
        time.sleep(0.02)


def committed(folder: Path) -> int:
    shards = (folder / ".tunesmith" / "work").glob("*/scratch/shards/*.jsonl")
    return sum(len(shard.read_bytes().splitlines()) - 1 for shard in shards)


@pytest.fixture(scope="module")
def job(nodes: TwoNodes, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Any]:
    """A job that lost a node when a third of it was done."""
    folder = tmp_path_factory.mktemp("cluster")
    rows: list[Any] = [{"id": at, "prompt": f"What is {at} plus {at}?"} for at in range(ROWS)]
    rows[7], rows[150] = {"id": "empty"}, {"id": 150, "prompt": "long " * 400}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(base=llama))
    process = start(folder, nodes.address)
    wait_for_rows(folder, ROWS // 3, process)
    engines, left = nodes.engines(), committed(folder)
    nodes.kill_other()
    out, words = process.communicate(timeout=300)
    return {
        "folder": folder,
        "code": process.returncode,
        "left": left,
        "engines": (engines, nodes.engines_left(20.0)),
        "words": words,
        "result": json.loads(out or "{}"),
    }


def test_every_row_is_there_once_though_a_node_was_lost(job: dict[str, Any]) -> None:
    assert job["code"] == 0, job["words"]
    assert ROWS // 3 <= job["left"] < ROWS - 20
    assert "1 node(s) lost" in job["words"]
    lines = (job["folder"] / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows if row["id"] != "empty"] == [
        at for at in range(ROWS) if at != 7
    ]
    good = [row for row in rows if row["error"] is None]
    assert len(good) == ROWS - 2
    assert all(isinstance(row["answer"], str) and row["output_tokens"] > 0 for row in good)


def test_rows_that_are_wrong_have_the_same_types_as_on_one_machine(job: dict[str, Any]) -> None:
    assert job["result"]["errors"] == {"missing_prompt": 1, "prompt_too_long": 1}


def test_no_engine_is_left_behind(job: dict[str, Any]) -> None:
    before, after = job["engines"]
    assert before and not after


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    started_s = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster at 127.0.0.1:1: .*ray start"):
        connect("127.0.0.1:1", None, 1)
    with pytest.raises(UserError, match="Ray's client"):
        connect("ray://127.0.0.1:10001", None, 1)
    assert time.monotonic() - started_s < 20
