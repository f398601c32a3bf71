"""Engines that die, with a stand-in for vLLM in a real process of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import members

from tunesmith.config import ModelError, TunesmithError
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineSpec
from tunesmith.engine.places import Place
from tunesmith.engine.pool import Crashed, EnginePool
from tunesmith.engine.protocol import Refused
from tunesmith.engine.requests import Answer, Request

# Answers a request with its key, and does as the first token of its prompt says.
HEAD = """
import os, sys, time
from multiprocessing.connection import Connection
from tunesmith.config import ModelError
from tunesmith.engine.requests import Answer
from tunesmith.engine.protocol import Ready
from tunesmith.engine.worker import answer_all

def answering(requests):
    held = []
    for request in requests:
        if request is not None:
            held.append(request)
            continue
        time.sleep(0.002)
        for request in held:
            match request.prompt_ids[0]:
                case 0: yield request.key, Answer(request.key)
                case 1: os._exit(1)
                case 2: yield request.key, ValueError("too hot")
                case 3: raise RuntimeError("CUDA error")
                case 4: time.sleep(60)
        held = []

if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    setup = connection.recv()
"""
WORKER = f"""{HEAD}
    os.sched_setaffinity(0, setup.cores or os.sched_getaffinity(0))
    connection.send(Ready(64, 0.5))
    answer_all(connection, answering)
"""
REFUSING = f"{HEAD}    connection.send(ModelError('no kernel for this'))\n"
DYING = f"{HEAD}    raise ValueError('no such model')\n"

Make = Callable[..., EnginePool]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A pool whose engines run the given code."""

    def _make(code: str = WORKER, places: int = 1, window: int = 16, **settings: int) -> EnginePool:
        spec = EngineSpec(
            model=tmp_path, settings=Engine(**settings), dtype="float32", served_name="x"
        )
        script = tmp_path / "worker.py"
        script.write_text(code)
        monkeypatch.setattr("tunesmith.engine.pool._WORKER", (sys.executable, str(script)))
        return EnginePool(
            spec,
            [Place() for _ in range(places)],
            window=window,
            log_folder=tmp_path,
        )

    return _make


def requests(count: int, **special: int) -> Iterator[Request]:
    """Harmless ones but for `row_7=1`, which does as token 1 says."""
    for key in range(count):
        yield Request(key, [special.get(f"row_{key}", 0)])


@pytest.mark.parametrize("places", [1, 2])
def test_every_request_has_one_answer_and_the_window_is_kept(make: Make, places: int) -> None:
    most = taken = 0
    found: dict[int, Answer | Exception] = {}

    def taking() -> Iterator[Request]:
        nonlocal taken
        for request in requests(500, row_9=2):
            taken += 1
            yield request

    with make(places=places) as pool:
        for request, answer in pool.stream(taking()):
            assert request.key not in found
            most = max(most, taken - len(found))
            found[request.key] = answer
        assert pool.max_model_len == 64 and pool.load_s == 0.5
        groups = pool.pids
        assert len(groups) == places and all(members(group) for group in groups)
    refused = found.pop(9)
    assert isinstance(refused, Refused) and str(refused) == "too hot"
    assert found == {key: Answer(key) for key in range(500) if key != 9}
    assert 16 <= most <= 17 * places and pool.retried == pool.restarts == 0
    assert not any(members(group) for group in groups)


def test_requests_may_come_later_if_the_pool_is_woken(make: Make) -> None:
    come: list[Request | None] = []

    def later() -> None:
        for request in requests(40):
            time.sleep(0.005)
            come.append(request)
            pool.wake()
        is_over.set()
        pool.wake()

    def coming() -> Iterator[Request | None]:
        while come or not is_over.is_set():
            yield come.pop(0) if come else None

    is_over = threading.Event()
    with make() as pool:
        thread = threading.Thread(target=later)
        thread.start()
        found = [request.key for request, _ in pool.stream(coming())]
        thread.join()
    assert sorted(found) == list(range(40))


def test_rows_in_flight_are_answered_after_a_kill(make: Make) -> None:
    found: dict[int, Answer | Exception] = {}
    with make() as pool:
        for request, answer in pool.stream(requests(300)):
            assert request.key not in found
            found[request.key] = answer
            if len(found) in (50, 150):
                os.killpg(pool.pids[0], signal.SIGKILL)
    assert found == {key: Answer(key) for key in range(300)}
    assert pool.restarts == 2 and 0 < pool.retried <= 2 * 16


def test_rows_that_kill_are_found_and_the_rows_beside_them_survive(make: Make) -> None:
    found: dict[int, Answer | Exception] = {}
    with make(places=2) as pool:
        for request, answer in pool.stream(requests(60, row_20=1, row_59=3)):
            assert request.key not in found
            found[request.key] = answer
    for key, cause in ((20, "killed, or left no reason"), (59, "RuntimeError: CUDA error")):
        crashed = found.pop(key)
        assert isinstance(crashed, Crashed)
        assert cause in str(crashed) and "times over this row" in str(crashed)
    assert found == {key: Answer(key) for key in range(60) if key not in (20, 59)}
    assert pool.restarts <= 6


def test_an_engine_that_always_dies_is_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.engine.pool._FIRST_WAIT_S", 0.05)
    monkeypatch.setattr("tunesmith.engine.pool._MOST_DEATHS", 2)
    with make(window=2) as pool, pytest.raises(TunesmithError, match="vLLM died .* see .*log"):
        for request, answer in pool.stream(Request(at, [1]) for at in range(60)):
            assert isinstance(answer, Crashed) and request.key < 4
    assert pool.pids == []


@pytest.mark.parametrize(
    ("code", "words"), [(REFUSING, "no kernel for this"), (DYING, "no such model")]
)
def test_what_does_not_start_is_told_at_once(make: Make, code: str, words: str) -> None:
    with make(code) as pool, pytest.raises(ModelError, match=words):
        list(pool.stream(requests(9)))
    assert pool.restarts == 0


def test_a_start_that_takes_too_long_is_ended(make: Make) -> None:
    slow = f"{HEAD}    time.sleep(60)\n"
    with (
        make(slow, start_timeout_s=1) as pool,
        pytest.raises(TunesmithError, match="not ready .* after 1 s; raise engine.start_timeout"),
    ):
        list(pool.stream(requests(9)))


def test_a_stop_lets_what_is_in_flight_finish(make: Make) -> None:
    found = []
    with make() as pool:
        for request, _ in pool.stream(requests(1000)):
            found.append(request.key)
            if len(found) == 40:
                pool.stop()
        assert pool.open == 0
    assert 40 <= len(found) < 40 + 2 * 16


def test_a_stop_while_nothing_is_answered_ends_the_wait(make: Make) -> None:
    slow = f"{HEAD}    time.sleep(60)\n"
    started_s = time.monotonic()
    with make(slow) as pool:
        threading.Timer(0.2, pool.stop).start()
        assert list(pool.stream(requests(9))) == []
    assert time.monotonic() - started_s < 10
