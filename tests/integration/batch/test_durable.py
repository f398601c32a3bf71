"""What a batch does when disks are full and engines die, with a stand-in for vLLM that can be told
to die. Killing the real one is in test_batch.py."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.batch.command import run, show
from tunesmith.cli.failures import exit_code_for
from tunesmith.config import GateError, Recipe, TunesmithError, UserError, WorkInterrupted
from tunesmith.engine import pool
from tunesmith.pipeline import Stages

# Says how long the prompt is; `max_tokens` of 13 kills it, and each answer takes 2 ms.
WORKER = """
import os, sys, time
from multiprocessing.connection import Connection
from tunesmith.engine.protocol import Ready
from tunesmith.engine.requests import Answer, Output
from tunesmith.engine.worker import answer_all

def answering(requests):
    held = []
    for request in requests:
        if request is not None:
            held.append(request)
        elif held:
            made, held = held[:8], held[8:]
            time.sleep(0.016)
            for one in made:
                if one.sampling["max_tokens"] == 13:
                    os._exit(1)
                text = str(sum(one.prompt_ids))
                yield one.key, Answer(len(one.prompt_ids), 0, [Output(text, "stop", 2)])

if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    connection.recv()
    connection.send(Ready(128, 0.1))
    answer_all(connection, answering)
"""


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(pool, "_WORKER", (sys.executable, str(tmp_path / "worker.py")))


def stages_of(base: Path, rows: list[dict[str, Any]], **batch: Any) -> Stages:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"input": "in.jsonl", "output": "out.jsonl", **batch}
    return Stages(
        Recipe.model_validate(
            {
                "name": "bot",
                "store": {"folder": "store"},
                "model": {"base": str(base)},
                "engine": {"max_num_seqs": 8, "max_model_len": 128},
                "price": {"gpu_hour_usd": 3.6},
                "batch": section,
            }
        )
    )


def plain_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": at, "prompt": f"What is {at} plus {at}?"} for at in range(count)]


def output() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_a_full_disk_loses_nothing_that_was_kept(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = plain_rows(200)
    fsync, calls = os.fsync, 0

    def filling(handle: int) -> None:
        nonlocal calls
        if "/shards/" in os.readlink(f"/proc/self/fd/{handle}"):
            calls += 1
            if calls > 12:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", filling)
        with pytest.raises(OSError, match="No space left") as caught:
            run(stages_of(llama, rows))
    assert exit_code_for(caught.value) == 2
    said = capsys.readouterr().err
    assert "no space left on the disk" in said and "run the same command again" in said
    assert not Path("out.jsonl").exists()
    capsys.readouterr()
    result = run(stages_of(llama, rows))
    assert "rows" in result and [row["id"] for row in output()] == list(range(200))
    kept = 200 - int(capsys.readouterr().err.partition("engine for ")[2].split()[0])
    assert 0 < kept < 200 and 0 < result["rework_rows"] <= 24


def test_an_output_that_becomes_unwritable_is_written_later_without_an_engine(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, place = plain_rows(60), Path("answers")
    fsync = os.fsync

    def replacing(handle: int) -> None:
        if "/shards/" in os.readlink(f"/proc/self/fd/{handle}") and place.is_dir():
            place.rmdir()
            place.touch()
        fsync(handle)

    with monkeypatch.context() as changed:
        changed.setattr(os, "fsync", replacing)
        with pytest.raises(TunesmithError, match="cannot write to answers/out.jsonl.*same command"):
            run(stages_of(llama, rows, output="answers/out.jsonl"))
    place.unlink()
    capsys.readouterr()
    run(stages_of(llama, rows, output="answers/out.jsonl"))
    made = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in made] == list(range(60)) and all(row["answer"] for row in made)
    assert "starting the engine" not in capsys.readouterr().err


def test_a_row_that_kills_the_engine_is_set_aside_and_equal_rows_are_computed_once(
    llama: Path,
) -> None:
    rows = plain_rows(120)
    rows[50] |= {"max_tokens": 13}
    for at in range(100, 120):
        rows[at] |= {"prompt": rows[at - 80]["prompt"]}
    with pytest.raises(GateError, match="1 of 120 rows have no answer .1 engine_crashed"):
        run(stages_of(llama, rows))
    result = run(stages_of(llama, rows, max_error_rate=0.01))
    made = output()
    assert [row["id"] for row in made] == list(range(120))
    assert [row["id"] for row in made if row["error"]] == [50]
    assert made[50]["error"]["type"] == "engine_crashed"
    assert "killed, or left no reason" in made[50]["error"]["detail"]
    assert Path(result["errors_file"]).with_name("engine-0.log").is_file()
    assert all(made[at]["answer"] == made[at - 80]["answer"] for at in range(100, 120))
    assert result["deduplicated_rows"] == 20 and result["restarts"] == 3
    assert result["usd"] == pytest.approx(result["generation_s"] * 0.001, abs=1e-6)
    costs = [row["cost_usd"] for row in made]
    assert sum(costs) == pytest.approx(result["usd"], rel=1e-3) and costs[110] == 0
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show(result))
    assert "engines started again" in console.export_text()


def test_a_signal_lets_rows_in_flight_finish_and_two_replicas_go_on(llama: Path) -> None:
    rows = plain_rows(400)
    timer = threading.Thread(target=stop_when_kept, args=(60,))
    timer.start()
    with pytest.raises(WorkInterrupted, match="of 400 rows are kept"):
        run(stages_of(llama, rows))
    timer.join()
    with pytest.raises(UserError, match="batch.max_tokens: null → 5"):
        run(stages_of(llama, rows, max_tokens=5))
    cores = len(os.sched_getaffinity(0))
    result = run(stages_of(llama, rows, replicas=min(2, cores)))
    assert result["rework_rows"] == 0 and result["replicas"] == min(2, cores)
    assert [row["id"] for row in output()] == list(range(400))
    with pytest.raises(UserError, match="batch.replicas: 999 engines need 999 cores"):
        run(stages_of(llama, rows[:1], replicas=999))


def stop_when_kept(rows: int) -> None:
    """SIGTERM to this process once so many rows are in shards."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        shards = Path("store").glob("work/*/scratch/shards/*.jsonl")
        if sum(len(shard.read_bytes().splitlines()) - 1 for shard in shards) >= rows:
            break
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
