"""Finds and masks in a text that may come in pieces. Pure.

The engine is `regex`, for three things that others lack together: it says whether the end of a text
may be the beginning of a match, so that a stream is held back only where it has to be; each search
has a time limit; and it lets other threads run meanwhile. RE2 could not hang at all, but would have
every stream held back by the length of the longest match.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.config import UserError, require
from tunesmith.config.schema.guardrail import Guardrail
from tunesmith.serve.guard.pii import KINDS

WINDOW = 1024
"""Characters of a stream that are held back at most: a match that is longer is found in parts."""

_CONTEXT = 64
"""Characters before what is looked at, for patterns that look back."""

_NEVER = "\U0010ffff"
"""No character, so no text has it: what needs it to match can only begin to."""


@dataclass(frozen=True)
class Matcher:
    """One pattern of a guardrail."""

    rule: str
    """Name of the guardrail, and after a slash the kind of personal data."""

    mask: str
    blocks: bool
    whole: Any
    """Finds matches."""

    begun: Any
    """Finds what may become a match once more text is there."""

    is_real: Callable[[str], bool] = lambda _: True
    needs: str = ""
    looks_ahead: bool = False
    """Whether it may depend on the character after it without saying so."""


@dataclass(frozen=True)
class Found:
    """A match."""

    start: int
    end: int
    matcher: Matcher


def compile_rail(rail: Guardrail) -> list[Matcher]:
    """Raises UserError for a pattern that Python's `re` takes and `regex` does not."""
    parts: list[tuple[str, str, dict[str, Any]]] = []
    for kind in rail.pii:
        for shape in KINDS[kind]:
            own = {"is_real": shape.is_real, "needs": shape.needs}
            parts.append((f"{rail.name}/{kind}", shape.pattern, own))
    if rail.keywords:
        words = sorted(rail.keywords, key=len, reverse=True)
        either = "|".join(r"\s{1,8}".join(map(re.escape, word.split())) for word in words)
        parts.append((rail.name, rf"(?i)(?<!\w)(?:{either})(?!\w)", {}))
    parts += [(rail.name, pattern, {"looks_ahead": True}) for pattern in rail.patterns]
    return [
        Matcher(
            rule,
            f"[{rule.rpartition('/')[2]}]",
            rail.action == "block",
            _compile(rail.name, pattern),
            _compile(rail.name, f"(?:{pattern}){_NEVER}"),
            **own,
        )
        for rule, pattern, own in parts
    ]


def _compile(name: str, pattern: str) -> Any:
    regex = require("regex", "infer")
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"serve.guardrails: {name}: {pattern!r}: {error}") from error


class Scanner:
    """One text. What `feed` gives back can be passed on; `found` is what was masked in that."""

    def __init__(self, matchers: Sequence[Matcher]) -> None:
        self._matchers = matchers
        self._before = ""
        self._held = ""
        self.found: list[Found] = []
        self.blocked: Matcher | None = None
        """Set once something was found that ends the text; nothing comes out after that."""

    def feed(self, piece: str, deadline_s: float, *, is_last: bool = False) -> str:
        """Raises TimeoutError when the patterns take until after `deadline_s` (monotonic); the
        piece is then not taken."""
        self.found = []
        if self.blocked:
            return ""
        text, start = self._before + self._held + piece, len(self._before)
        if len(text) == start:
            return ""
        found = [
            one for matcher in self._matchers for one in _find(matcher, text, start, deadline_s)
        ]
        end = len(text) if is_last else self._settled(text, start, found, deadline_s)
        settled = [one for one in found if one.start < end]
        settled.sort(key=lambda one: (one.start, -one.end))
        passed = self._masked(text, start, end, settled)
        self._before, self._held = text[max(0, end - _CONTEXT) : end], text[end:]
        return passed

    def _settled(self, text: str, start: int, found: list[Found], deadline_s: float) -> int:
        """Where in the text begins what later pieces may change."""
        end = len(text)
        for matcher in self._matchers:
            if begun := _search(matcher.begun, text, start, deadline_s, partial=True):
                end = min(end, begun.start())
            if matcher.looks_ahead:
                end = min(end, len(text) - 1)
        end = min([end, *(one.start for one in found if one.end == len(text))])
        while crossing := [one.start for one in found if one.start < end < one.end]:
            end = min(crossing)
        least = len(text) - WINDOW
        if end < least:
            end = max([least, *(one.end for one in found if one.start < least)])
        return max(end, start)

    def _masked(self, text: str, start: int, end: int, settled: list[Found]) -> str:
        """Overlapping matches are one, under the mask of the first."""
        parts, at = [], start
        for one in settled:
            self.found.append(one)
            if one.start >= at:
                parts.append(text[at : one.start])
                if not one.matcher.blocks:
                    parts.append(one.matcher.mask)
            if one.matcher.blocks:
                self.blocked = one.matcher
                return "".join(parts)
            at = max(at, one.end)
        parts.append(text[at:end])
        return "".join(parts)


def mask(text: str, matchers: Sequence[Matcher], deadline_s: float) -> tuple[str, Scanner]:
    """A whole text. Raises TimeoutError like `Scanner.feed`."""
    scanner = Scanner(matchers)
    return scanner.feed(text, deadline_s, is_last=True), scanner


def _find(matcher: Matcher, text: str, start: int, deadline_s: float) -> Iterable[Found]:
    if matcher.needs and matcher.needs not in text:
        return
    at = start
    while match := _search(matcher.whole, text, at, deadline_s):
        begin, end = match.span()
        if begin == end:
            at = end + 1
        elif matcher.is_real(match.group()):
            yield Found(begin, end, matcher)
            at = end
        else:
            at = begin + 1


def _search(
    pattern: Any, text: str, start: int, deadline_s: float, *, partial: bool = False
) -> Any:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return pattern.search(text, start, partial=partial, timeout=left_s, concurrent=True)
