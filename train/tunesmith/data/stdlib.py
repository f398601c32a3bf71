"""Rows from the running interpreter's own standard library: real text that needs no network.

Modules are divided once and for all, by a hash of their names: those in reserve are never trained
on, neither as text nor as pairs, so that a base and what is fine-tuned from it agree on what is
unseen. A recipe's evaluation rows are of reserved modules.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.config.errors import DataError
from tunesmith.pipeline.sources import BUILTIN_DATA, stdlib_files

RESERVE = 0.1
"""Share of modules that no training row comes from."""

INSTRUCTION = "Say in one sentence what this Python function does."
_MAX_SOURCE_CHARACTERS = 1_500
_SENTENCE_CHARACTERS = range(15, 201)
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def builtin_rows(
    row_format: str, evaluation_fraction: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and evaluation rows, each once and none on both sides.

    Raises DataError when the format does not exist for this data, or the share is larger than
    what is reserved.
    """
    if row_format not in ("text", "messages"):
        raise DataError(
            f"data.format: {BUILTIN_DATA} has the formats text and messages, not {row_format}"
        )
    if evaluation_fraction > RESERVE:
        raise DataError(
            f"data.evaluation_fraction: {BUILTIN_DATA} has {RESERVE} of its modules in reserve, "
            f"so {evaluation_fraction} cannot be held out; give {RESERVE} or less"
        )
    train: dict[str, dict[str, Any]] = {}
    reserved: dict[str, dict[str, Any]] = {}
    evaluation: dict[str, dict[str, Any]] = {}
    for module, source in _modules():
        place = _place(module)
        for row in [{"text": source}] if row_format == "text" else _pairs(source):
            key = _key(row)
            (reserved if place < RESERVE else train).setdefault(key, row)
            if place < evaluation_fraction:
                evaluation.setdefault(key, row)
    return [row for key, row in train.items() if key not in reserved], list(evaluation.values())


def _modules() -> Iterator[tuple[str, str]]:
    """Dotted name and source of each module that has something to read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_files():
        parts = path.relative_to(root).with_suffix("").parts
        # Character tables are numbers, not text.
        if parts[0] == "encodings":
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if source.strip():
            yield ".".join(parts), source


def _place(module: str) -> float:
    """Where in [0, 1) a module's name falls."""
    digest = hashlib.sha256(f"stdlib {module}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _key(row: dict[str, Any]) -> str:
    """What makes two rows the same to a reader: the text, or the question without its answer."""
    return str(row["text"] if "text" in row else row["messages"][0]["content"])


def _pairs(source: str) -> Iterator[dict[str, Any]]:
    """Each documented function with its docstring taken out, and the docstring's first sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    # Not splitlines(): it also splits at form feeds, which the parser does not count as lines.
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, _Function) and (pair := _pair(node, lines)):
            code, sentence = pair
            yield {
                "messages": [
                    {"role": "user", "content": f"{INSTRUCTION}\n\n{code}"},
                    {"role": "assistant", "content": sentence},
                ]
            }


def _pair(node: _Function, lines: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or len(node.body) < 2:
        return None
    sentence = first_sentence(docstring)
    first, following = node.body[0], node.body[1]
    alone = first.lineno > node.lineno and following.lineno > (first.end_lineno or 0)
    if sentence is None or not alone:
        return None
    code = _without_docstring(node, lines)
    return (code, sentence) if len(code) <= _MAX_SOURCE_CHARACTERS else None


def _without_docstring(node: _Function, lines: list[str]) -> str:
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = node.body[0]
    before = lines[start - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno : node.end_lineno]
    while after and not after[0].strip():
        after = after[1:]
    # Not textwrap.dedent: one string that goes on in the first column would keep it from working.
    indent = " " * node.col_offset
    return "\n".join(line.removeprefix(indent) for line in [*before, *after])


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line; None when there is none of usual length."""
    paragraph = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else paragraph
    if len(sentence) not in _SENTENCE_CHARACTERS or not sentence[0].isalpha():
        return None
    is_code = ">>>" in sentence or "->" in sentence
    return None if is_code else sentence
