"""The request log: every line once, through rotation, restarts and a full disk."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tunesmith.serve.govern import archive, journal
from tunesmith.serve.govern.archive import read_log
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.journal import Entry, Journal, read_spending
from tunesmith.serve.govern.limits import Use
from tunesmith.serve.govern.report import show, usage

DAY = 20_000
ANN = ("key", "a1")


def entry(number: int, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "request_id": f"r{number}", "response_id": None, "at_s": 1000.0 + number, "key_id": "a1",
        "key_name": "ann", "group": None, "method": "POST", "path": "chat/completions",
        "model": "bot", "artifact": "checkpoint-1", "status": 200, "ending": "complete",
        "finish_reason": "stop", "prompt_tokens": 3, "cached_tokens": 1, "output_tokens": 2,
        "is_estimated": False, "nano_usd": 7, "ttft_s": None, "duration_s": 0.5,
    }  # fmt: skip
    return Entry(**fields | changes)


def wait_until(check: Any) -> None:
    deadline_s = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _files(folder: Path) -> int:
    return len(list((folder / "requests").glob("*.parquet")))


def test_lines_move_to_files_and_every_sum_stays(tmp_path: Path) -> None:
    engine, folder = open_gateway(tmp_path), tmp_path / "serve"
    for start in (0, 25):  # the second gateway goes on where the first one ended
        with Journal(engine, folder, rows_per_file=10) as book:
            for number in range(start, start + 25):
                book.add(entry(number), {ANN: DAY})
            wait_until(lambda files=2 + 3 * start // 25: _files(folder) == files)
        assert book.dropped == 0
    assert read_log(engine, folder, ["seq"])["seq"].to_pylist() == list(range(1, 51))
    log = read_log(engine, folder, ["request_id"])
    assert log["request_id"].to_pylist() == [f"r{number}" for number in range(50)]
    assert read_log(engine, folder, [], since_s=1040.0).num_rows == 10
    assert read_spending(engine, DAY) == {ANN: Use(250, 350)}
    assert read_spending(engine, DAY + 1) == {}
    (line,) = usage(engine, folder, "key", 0.0)["lines"]
    assert line["requests"] == 50 and line["prompt_tokens"] == 150
    assert line["usd"] == pytest.approx(350e-9)
    show(usage(engine, folder, "day", 0.0))


def test_a_kill_between_file_and_database_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = open_gateway(tmp_path), tmp_path / "serve"
    with Journal(engine, folder, rows_per_file=100) as book:
        for number in range(20):
            book.add(entry(number), {})

    def killed(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "_LINES_AT_ONCE", 3)
    monkeypatch.setattr(archive, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        archive.archive(engine, folder, 10)
    monkeypatch.undo()
    monkeypatch.setattr(archive, "_LINES_AT_ONCE", 4)
    assert read_log(engine, folder, []).num_rows == 20
    assert archive.archive(engine, folder, 10) == 10
    assert read_log(engine, folder, ["seq"])["seq"].to_pylist() == list(range(1, 21))
    with engine.connect() as db:
        assert db.scalar(sa.text("SELECT count(*) FROM requests")) == 0


def test_a_log_that_is_read_while_lines_move_has_each_once(tmp_path: Path) -> None:
    engine, folder = open_gateway(tmp_path), tmp_path / "serve"
    with Journal(engine, folder, rows_per_file=1_000) as book:
        for number in range(300):
            book.add(entry(number), {})

    def move() -> None:
        while archive.archive(engine, folder, 10):
            pass

    mover = threading.Thread(target=move)
    mover.start()
    looks = 0
    while mover.is_alive():
        looks += 1
        assert read_log(engine, folder, ["seq"])["seq"].to_pylist() == list(range(1, 301))
        some = archive.read_lines(engine, folder, {5, 150, 300, 999})
        assert [line["seq"] for line in some] == [5, 150, 300]
    mover.join()
    assert looks > 1 and _files(folder) == 30


def test_what_cannot_be_archived_stays_in_the_database_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_ARCHIVE_RETRY_S", 0.5)
    engine, folder = open_gateway(tmp_path), tmp_path / "serve"
    (folder / "requests").write_text("where the files should go")
    with Journal(engine, folder, rows_per_file=10) as book:
        for number in range(10):
            book.add(entry(number), {})
        said: list[str] = []
        wait_until(lambda: said.append(capsys.readouterr().err) or "stays in its" in said[-1])
        assert "exists" in said[-1]
        with engine.connect() as db:
            assert db.scalar(sa.text("SELECT count(*) FROM requests")) == 10
        (folder / "requests").unlink()
        wait_until(lambda: _files(folder) == 1)


def test_a_full_disk_costs_lines_and_never_spending(tmp_path: Path) -> None:
    engine = open_gateway(tmp_path)
    is_full = [False]

    def refuse(*_: object) -> None:
        if is_full[0]:
            raise sa.exc.OperationalError("", {}, sqlite3.OperationalError("disk is full"))

    sa.event.listen(engine, "before_cursor_execute", refuse)
    with Journal(engine, tmp_path / "serve", rows_per_file=100) as book:
        is_full[0] = True
        started_s = time.monotonic()
        for number in range(30):
            book.add(entry(number), {ANN: DAY})
        assert time.monotonic() - started_s < 0.1
        wait_until(lambda: book.dropped == 30)
        is_full[0] = False
        book.add(entry(30), {ANN: DAY})
        wait_until(lambda: read_spending(engine, DAY).get(ANN))
    assert read_spending(engine, DAY) == {ANN: Use(31 * 5, 31 * 7)}
    assert read_log(engine, tmp_path / "serve", ["request_id"])["request_id"].to_pylist() == ["r30"]


def test_a_queue_that_is_full_drops_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_CAPACITY", 5)
    book = Journal(open_gateway(tmp_path), tmp_path / "serve", rows_per_file=100)
    for number in range(8):
        book.add(entry(number), {})
    assert book.dropped == 3
