"""The whole of `tunesmith batch` in the real engine: killed, resumed, and compared."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.batch.command import run, show
from tunesmith.config import GateError, load_recipe
from tunesmith.pipeline import Stages

ROWS = 400

RECIPE = """
name: bot
model: {{base: {base}, dtype: float32}}
batch: {{input: prompts.jsonl, output: out/answers.jsonl, max_tokens: 24, max_error_rate: 0.2}}
engine: {{kv_cache_gib: 0.1, max_num_seqs: 8, max_model_len: 128}}
price: {{gpu_hour_usd: 3.6}}
"""


def make_job(folder: Path, base: Path) -> Path:
    """A recipe over 400 rows of which every tenth is wrong, in five ways."""
    wrong: list[Any] = [
        "{bad",
        {"id": "empty"},
        {"prompt": "long " * 400},
        {"id": 1, "prompt": "twice"},
        {"prompt": "x", "max_tokens": 0},
    ]
    rows = [
        wrong[at // 10 % 5] if at % 10 == 9 else {"id": at, "prompt": f"What is {at} plus {at}?"}
        for at in range(ROWS)
    ]
    rows[4] |= {"max_tokens": 2, "topic": "sums"}
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base))
    return folder


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json", *overrides]


def batch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *overrides), cwd=folder, capture_output=True, text=True, timeout=300
    )


def stop_after(
    folder: Path, rows: int, signal_number: int, *, engine_after: int | None = None
) -> int:
    """Start, send a signal once so many rows are committed, return the exit code; before that kill
    only the engine once `engine_after` rows are."""
    with subprocess.Popen(command(folder), cwd=folder, stderr=subprocess.DEVNULL) as process:
        if engine_after is not None:
            wait_for(folder, engine_after, process)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            os.killpg(int(children.read_text().split()[0]), signal.SIGKILL)
        wait_for(folder, rows, process)
        process.send_signal(signal_number)
        return process.wait()


def wait_for(folder: Path, rows: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 240
    while committed(folder) < rows and process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def committed(folder: Path) -> int:
    shards = (folder / ".tunesmith" / "work").glob("*/scratch/shards/*.jsonl")
    return sum(len(shard.read_bytes().splitlines()) - 1 for shard in shards)


def answers(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "out" / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Any]:
    """A job that was killed, then lost its engine and was asked to stop, then finished."""
    folder = make_job(tmp_path_factory.mktemp("killed"), llama)
    first = stop_after(folder, 60, signal.SIGKILL)
    left_by_kill = committed(folder)
    second = stop_after(folder, left_by_kill + 80, signal.SIGTERM, engine_after=left_by_kill + 20)
    left_by_stop = committed(folder)
    done = batch(folder)
    assert done.returncode == 0, done.stderr
    return {
        "folder": folder,
        "codes": (first, second),
        "left": (left_by_kill, left_by_stop),
        "done": done,
        "result": json.loads(done.stdout),
    }


def test_every_row_is_there_once_in_order_after_a_kill_and_a_stop(killed: dict[str, Any]) -> None:
    assert killed["codes"] == (-signal.SIGKILL, 75)
    assert 60 <= killed["left"][0] < killed["left"][1] < 360
    rows = answers(killed["folder"])
    assert len(rows) == ROWS
    good = [row for row in rows if row["error"] is None]
    assert [row["id"] for row in good] == [at for at in range(ROWS) if at % 10 != 9]
    assert all(isinstance(row["answer"], str) and row["output_tokens"] > 0 for row in good)
    assert not (killed["folder"] / ".tunesmith" / "work" / killed["result"]["id"]).exists()


def test_what_was_committed_is_not_done_again(killed: dict[str, Any]) -> None:
    found = re.search(r"starting the engine for (\d+) rows", killed["done"].stderr)
    assert found
    valid = ROWS - 4 * ROWS // 50  # the overlong prompts are valid until they are tokenised
    assert int(found[1]) == valid - killed["left"][1]
    # The first attempt and the engine each had at most 3 * 8 rows that were in no shard.
    assert killed["result"]["restarts"] == 1 and 0 < killed["result"]["rework_rows"] <= 48


def test_wrong_rows_are_typed_and_their_columns_kept(killed: dict[str, Any]) -> None:
    rows = answers(killed["folder"])
    kinds = [row["error"]["type"] for row in rows if row["error"]]
    order = ["malformed_line", "missing_prompt", "prompt_too_long", "duplicate_id"]
    assert kinds == [*order, "invalid_parameter"] * 8
    result = killed["result"]
    assert result["errors"] == dict.fromkeys(kinds, 8)
    assert result["rows"] == ROWS and result["answered"] == ROWS - 40
    assert rows[4]["topic"] == "sums" and rows[4]["output_tokens"] <= 2
    assert rows[4]["prompt"] == "What is 4 plus 4?"
    errors = Path(result["errors_file"]).read_text().splitlines()
    assert json.loads(errors[0])["line"] == 10 and len(errors) == 40


def test_figures_add_up(killed: dict[str, Any]) -> None:
    result, rows = killed["result"], answers(killed["folder"])
    tokens = sum(row["output_tokens"] or 0 for row in rows)
    assert result["output_tokens"] == tokens
    assert result["prompt_tokens"] == sum(row["prompt_tokens"] or 0 for row in rows)
    assert result["tokens_per_s"] == pytest.approx(tokens / result["generation_s"], rel=0.01)
    price = result["generation_s"] * 0.001 / tokens * 1e6
    assert result["usd_per_million_output_tokens"] == pytest.approx(price, rel=0.01)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show(result))
    assert "error: prompt_too_long" in console.export_text()


def test_answers_are_those_of_a_job_that_nobody_touched(
    killed: dict[str, Any], tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_job(tmp_path, llama))
    recipe = load_recipe(Path("recipe.yaml"), ["batch.max_error_rate=0.05"])
    with pytest.raises(GateError, match="40 of 400 rows have no answer"):
        run(Stages(recipe, path="recipe.yaml"))
    pairs = list(zip(answers(tmp_path), answers(killed["folder"]), strict=True))
    assert sum(one["answer"] == other["answer"] for one, other in pairs) >= 0.99 * ROWS


def test_a_finished_job_is_reused_and_its_output_mended(killed: dict[str, Any]) -> None:
    folder, output = killed["folder"], killed["folder"] / "out" / "answers.jsonl"
    whole = output.read_bytes()
    output.write_bytes(whole[:1000])
    started_s = time.monotonic()
    again = batch(folder, "batch.output=other.jsonl", "price=null")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["reused"] and result["id"] == killed["result"]["id"]
    assert (folder / "other.jsonl").read_bytes() == whole
    assert batch(folder).returncode == 0 and output.read_bytes() == whole
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.input=nothing.jsonl", "no such file: nothing.jsonl"),
        ("batch.input=blank.jsonl", "has no rows"),
        ("batch.output=/proc/answers.jsonl", "batch.output: cannot write"),
        ("batch.model=tuned", "makes no model 'tuned'"),
    ],
)
def test_what_cannot_work_is_told_before_the_engine_starts(
    killed: dict[str, Any], override: str, words: str
) -> None:
    (killed["folder"] / "blank.jsonl").write_text("\n \n")
    failed = batch(killed["folder"], override)
    assert failed.returncode == 2 and words in failed.stderr
    assert "starting the engine" not in failed.stderr
