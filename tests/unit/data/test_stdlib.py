"""The standard library as data: what is in reserve is never trained on."""

from __future__ import annotations

import ast

import pytest

from tunesmith.config.errors import DataError
from tunesmith.data.stdlib import (
    INSTRUCTION,
    RESERVE,
    _modules,
    _pairs,
    _place,
    builtin_rows,
    first_sentence,
)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[dict], list[dict]]:  # type: ignore[type-arg]
    return builtin_rows("messages", RESERVE)


@pytest.fixture(scope="module")
def texts() -> tuple[list[dict], list[dict]]:  # type: ignore[type-arg]
    return builtin_rows("text", RESERVE)


def code_of(row: dict) -> str:  # type: ignore[type-arg]
    return str(row["messages"][0]["content"]).removeprefix(f"{INSTRUCTION}\n\n")


def test_there_is_enough_to_learn_from(pairs, texts) -> None:  # type: ignore[no-untyped-def]
    assert len(pairs[0]) > 3_000
    assert len(pairs[1]) > 200
    assert sum(len(row["text"]) for row in texts[0]) > 5_000_000


def test_pairs_are_functions_without_their_docstrings(pairs) -> None:  # type: ignore[no-untyped-def]
    for row in pairs[0] + pairs[1]:
        (function,) = ast.parse(code_of(row)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert len(code_of(row)) <= 1_500


def test_reserved_modules_are_in_no_training_row(pairs, texts) -> None:  # type: ignore[no-untyped-def]
    reserved = [source for module, source in _modules() if _place(module) < RESERVE]
    assert not {row["text"] for row in texts[0]} & set(reserved)
    held_out = {code_of(row) for row in pairs[1]}
    assert not held_out & {code_of(row) for row in pairs[0]}
    for source in reserved[:5]:
        assert {code_of(row) for row in _pairs(source)} <= held_out


def test_the_share_decides_which_reserved_rows_are_held_out(pairs) -> None:  # type: ignore[no-untyped-def]
    train, evaluation = builtin_rows("messages", 0.03)
    assert train == pairs[0]
    assert {code_of(row) for row in evaluation} < {code_of(row) for row in pairs[1]}


SOURCE = '''
class Box:
    @property
    # a remark
    async def size(self,
                   unit="m"):
        """Return the size, e.g. of
        the box.  Slowly.

        More.
        """

        # measure
        return {unit:   "é"}  # odd   spacing

    def odd(self):
        """Continue a string in the first column."""
        return """
first column"""

    def empty(self):
        """Only a docstring here, no body."""

    def one(self): "A docstring on the same line."; return 1

    def code(self):
        """code(a, b) -> result of it."""
        return 2
'''


def test_the_docstring_is_taken_out_and_nothing_else() -> None:
    row, odd = _pairs(SOURCE)
    assert code_of(odd) == 'def odd(self):\n    return """\nfirst column"""'
    assert code_of(row) == (
        '@property\n# a remark\nasync def size(self,\n               unit="m"):\n'
        '    # measure\n    return {unit:   "é"}  # odd   spacing'
    )
    assert row["messages"][1]["content"] == "Return the size, e.g. of the box."


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the value. And more.", "Return the value."),
        ("Return the value\n\nMore.", "Return the value"),
        ("Is it a number?  Say so.", "Is it a number?"),
        ("Version 3.11 is the least.", "Version 3.11 is the least."),
        ("Short.", None),
        (">>> f() and so on and on", None),
        ("x" * 300, None),
    ],
)
def test_first_sentence(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match="has the formats text and messages, not alpaca"):
        builtin_rows("alpaca", 0.05)
    with pytest.raises(DataError, match=r"evaluation_fraction.*give 0\.1 or less"):
        builtin_rows("messages", 0.2)
