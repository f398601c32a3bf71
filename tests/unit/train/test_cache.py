"""Tokenised rows are found again, and only while nothing that made them has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.chat import ChatTemplate
from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset
from tunesmith.pipeline import Stages
from tunesmith.train import cache, language
from tunesmith.train.cache import cached
from tunesmith.train.examples import Example, Examples
from tunesmith.train.language import Language
from tunesmith.train.tokenizer import learn_tokenizer
from tunesmith.train.tokens import TokenRows, TokenWriter

sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9),
    min_size=1,
    max_size=9,
)


def example(tokens: list[tuple[int, bool]]) -> Example:
    ids, learnt = zip(*tokens, strict=True)
    return Example(np.array(ids, dtype=np.int32), np.array(learnt, dtype=np.bool_))


def write(writer: TokenWriter, rows: list[Any]) -> Examples:
    for tokens in rows:
        writer.append(example(tokens))
    return Examples(read=len(rows), kept=len(rows), truncated=2, faults=["row a: bad"])


@given(sequences)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    writer = TokenWriter(folder)
    write(writer, rows)
    writer.close()
    found = TokenRows(folder)
    assert [list(zip(e.input_ids, e.learnt, strict=True)) for e in found] == rows
    assert found[-1].input_ids.tolist() == found[len(rows) - 1].input_ids.tolist()
    assert [len(part.learnt) for part in found[1:]] == [len(row) for row in rows[1:]]
    with pytest.raises(IndexError):
        found[len(rows)]
    examples, plain = Examples(found), Examples([example(row) for row in rows])
    assert examples.lengths().tolist() == plain.lengths().tolist()
    assert examples.supervised().tolist() == plain.supervised().tolist()
    assert examples.largest_id == plain.largest_id == max(token for row in rows for token, _ in row)


def talk(at: int) -> dict[str, Any]:
    messages = [("user", f"add {at}?"), ("assistant", f"return {at}")]
    return {"messages": [{"role": r, "content": c} for r, c in messages]}


Settings = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return learn_tokenizer(["def add(a, b): return a + b\n"] * 20, 600, 64)


@pytest.fixture
def tokenise(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Examples, bool]]:
    """Examples of a recipe over written rows, and whether they were made now."""
    real, made = language.tokenise_conversations, []

    def counting(*arguments: Any) -> Examples:
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(language, "tokenise_conversations", counting)

    def run(rows: list[Any], other: Any = tokenizer, limit: int | None = None, **data: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "name": "test",
            "store": {"folder": tmp_path / "store"},
            "model": {"base": "x/y"},
            "data": {"train": str(path), "evaluation_fraction": 0.5, **data},
        }
        stages = Stages(Recipe.model_validate(recipe))
        assert stages.recipe.data
        before = len(made)
        found = Language(other, ChatTemplate(other)).tokenise(
            make_dataset(stages), "train.jsonl", stages.recipe.data, limit
        )
        return found, len(made) > before

    return run


def changed(tokenizer: Any, old: str, new: str) -> Any:
    """A copy whose template differs."""
    import copy

    other = copy.deepcopy(tokenizer)
    assert old in other.chat_template
    other.chat_template = other.chat_template.replace(old, new)
    return other


def test_any_change_misses_and_nothing_else_does(
    tokenise: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [talk(at) for at in range(20)]
    first, is_made = tokenise(rows)
    assert is_made
    again, is_made = tokenise(rows, max_error_rate=0.0, max_dropped_rate=0.5)
    assert not is_made
    assert [e.input_ids.tolist() for e in again.rows] == [e.input_ids.tolist() for e in first.rows]
    assert (again.read, again.kept) == (first.read, first.kept) == (len(first.rows),) * 2

    one_byte = [*rows[:-1], talk(29)]
    vocabulary = learn_tokenizer(["def add(a, b): return a + b; x\n"] * 20, 601, 64)
    template = changed(tokenizer, "\n", "\n\n")
    for changes in (
        {"rows": one_byte},
        {"other": vocabulary},
        {"other": template},
        {"max_length": 63},
        {"truncation": "start"},
        {
            "learn": "last",
            "rows": [{"messages": talk(1)["messages"] + row["messages"]} for row in rows],
        },
        {"limit": 3},
    ):
        arguments = {"rows": rows} | changes
        assert tokenise(**arguments)[1], changes
        assert not tokenise(**arguments)[1], changes
    assert not tokenise(rows)[1]

    copies = []
    for at, folder in enumerate(cache._CODE):
        copies.append(tmp_path / str(at))
        shutil.copytree(folder, copies[-1])
    monkeypatch.setattr(cache, "_CODE", tuple(copies))
    cache.code_sha256.cache_clear()
    assert not tokenise(rows)[1]
    for path in (copies[0] / "spans.py", copies[1] / "examples.py"):
        path.write_text(path.read_text() + " ")
        cache.code_sha256.cache_clear()
        assert tokenise(rows)[1], path
    cache.code_sha256.cache_clear()
    monkeypatch.setattr(cache, "version", lambda name: f"{name} 99")
    assert tokenise(rows)[1]


@pytest.fixture(autouse=True)
def _forget_code() -> Any:
    yield
    cache.code_sha256.cache_clear()


def test_limits_are_checked_also_on_what_is_found(tokenise: Any) -> None:
    from tunesmith.config import DataError

    rows = [talk(at) for at in range(20)]
    rows[3]["messages"][0]["content"] = rows[4]["messages"][0]["content"] = "add " * 200
    settings = {"max_length": 60, "evaluation_fraction": 0.05}
    _, is_made = tokenise(rows, max_dropped_rate=0.5, **settings)
    assert is_made
    with pytest.raises(DataError, match="data.max_dropped_rate"):
        tokenise(rows, max_dropped_rate=0.01, **settings)


ROWS = [[(1, False), (2, True)], [(3, True)]]


def test_what_was_used_longest_ago_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(name: str) -> tuple[Examples, bool]:
        made: list[bool] = []
        found = cached(
            tmp_path, {"a": name}, lambda writer: made.append(True) or write(writer, ROWS)
        )
        time.sleep(0.02)
        return found, bool(made)

    first, _ = use("first")
    one_entry = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    monkeypatch.setattr(cache, "_LARGEST_CACHE_BYTES", 2 * one_entry)
    assert use("second")[1] and not use("first")[1]
    assert use("third")[1]
    assert not use("first")[1] and not use("third")[1], "the second was used longest ago"
    monkeypatch.setattr(cache, "_LARGEST_CACHE_BYTES", 0)
    assert use("second")[1] and not use("second")[1], "the newest stays, however large"
    assert len(list(tmp_path.glob("*/counts.json"))) == 1
    assert first.rows[0].input_ids.tolist() == [1, 2], "open ones can still be read"


@pytest.mark.parametrize(
    "name", ["ids.bin", "learnt.bin", "ends.bin", "counts.json", "supervised.bin"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    cached(tmp_path, {"a": 1}, lambda writer: write(writer, ROWS))
    (path,) = tmp_path.glob(f"*/{name}")
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    found = cached(tmp_path, {"a": 1}, lambda writer: write(writer, ROWS))
    assert [list(zip(e.input_ids, e.learnt, strict=True)) for e in found.rows] == ROWS
    assert (found.truncated, found.faults) == (2, ["row a: bad"])


def _slowly(folder: Path, log: Path, wait_s: float) -> None:
    def make(writer: TokenWriter) -> Examples:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(wait_s)
        return write(writer, ROWS)

    assert len(cached(folder, {"a": 1}, make).rows) == 2


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [
        context.Process(target=_slowly, args=(tmp_path / "cache", log, 0.5)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "made\n"


def test_a_killed_process_leaves_nothing_to_be_found(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    worker = context.Process(target=_slowly, args=(tmp_path / "cache", log, 60))
    worker.start()
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    _slowly(tmp_path / "cache", log, 0)
    assert log.read_text() == "made\nmade\n"
    assert not list((tmp_path / "cache").glob("*.part"))
