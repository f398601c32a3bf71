"""Requests are ordered so that prefixes meet, and equal ones are made once."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tunesmith.batch import prepare as module
from tunesmith.batch.errors import RowError
from tunesmith.batch.prepare import Ahead, Digests, Same, Wrong, is_repeatable, prepare
from tunesmith.batch.requests import Ask
from tunesmith.batch.rows import Row
from tunesmith.engine import Request


class Maker:
    """Takes the ids out of the row's columns; none are wrong."""

    def request(self, index: int, ask: Ask) -> Request | RowError:
        ids = [int(one) for one in ask.prompts[0]]
        return Request(index, ids, sampling=ask.sampling) if ids else RowError("refused", "none")


def windows(prompts: list[list[int]], *, reuse: bool = True, **sampling: Any) -> list[list[Any]]:
    sampling = {"temperature": 0.0} | sampling
    rows = (
        Row(at, at + 1, at, {}, Ask(prompts=[ids], sampling=sampling))
        for at, ids in enumerate(prompts)
    )
    maker: Any = Maker()
    return list(prepare(rows, maker, Digests(), reuse=reuse))


def test_a_window_is_sorted_and_equal_requests_are_there_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_WINDOW_ROWS", 5)
    prompts = [[2, 1], [1, 9], [2, 1], [], [1, 2], [3], [1, 9], [2]]
    first, second = windows(prompts)
    assert [item for item in first if not isinstance(item, Request)] == [
        Same(2, 0), Wrong(3, RowError("refused", "none")),
    ]  # fmt: skip
    assert [item.key for item in first if isinstance(item, Request)] == [4, 1, 0]
    assert [getattr(item, "key", item) for item in second] == [Same(6, 1), 7, 5]
    plain = [item.key for item in sum(windows(prompts, reuse=False), []) if hasattr(item, "key")]
    assert plain == [0, 1, 2, 4, 5, 6, 7]


def test_long_prompts_close_a_window_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW_TOKENS", 10)
    assert [len(window) for window in windows([[at] * 4 for at in range(7)])] == [3, 3, 1]


def test_only_what_would_be_said_again_is_taken_for_the_same() -> None:
    assert len(sum(windows([[1], [1]], temperature=1.0), [])) == 2
    kinds = [type(item) for item in sum(windows([[1], [1]], temperature=1.0, seed=3), [])]
    assert kinds == [Same, Request]
    assert is_repeatable(Request(0, [1], "embed"))
    assert not is_repeatable(Request(0, [1]))  # the engine's own temperature is 1


def test_digests_find_the_first_row_of_each_in_little_memory() -> None:
    digests, seen = Digests(), {}
    numbers = [random.Random(1).randrange(4000) for _ in range(20_000)]
    for row, number in enumerate(numbers):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        assert digests.first(digest, row) == seen.setdefault(number, row)
    size = sum(len(part) * part.itemsize for part in vars(digests).values())
    assert size <= 64 * max(len(seen), 1024)


def test_the_next_window_is_made_while_one_is_used_and_no_further() -> None:
    made: list[int] = []
    second_made = threading.Event()

    def make() -> Iterator[list[Any]]:
        for at in range(10):
            made.append(at)
            if at == 1:
                second_made.set()
            yield [at]

    items = iter(Ahead(make))
    assert next(items) == 0
    assert second_made.wait(5)
    time.sleep(0.1)
    assert made == [0, 1]
    assert list(items) == list(range(1, 10))


def test_nothing_is_made_after_the_end() -> None:
    made: list[int] = []
    is_ended = threading.Event()

    def make() -> Iterator[list[Any]]:
        try:
            for at in range(10):
                made.append(at)
                yield [at]
        finally:
            is_ended.set()

    ahead = Ahead(make)
    assert next(iter(ahead)) == 0
    ahead.close()
    assert is_ended.wait(5)
    assert made[-1] <= 1


def test_what_goes_wrong_while_reading_ahead_is_raised() -> None:
    def make() -> Iterator[list[Any]]:
        yield [1]
        raise OSError("gone")

    items = iter(Ahead(make))
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)
