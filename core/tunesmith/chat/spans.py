"""Where in a rendered conversation the model has to learn: pure functions over text and offsets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]
"""A half-open range of characters."""


@dataclass(frozen=True)
class Ending:
    """How a template ends an assistant turn."""

    text: str
    """What follows the answer, up to and including `token`, for example ` </s>`."""

    token: str
    """The single token after which the engine stops."""


def find_ending(after_answer: str, tokens: Sequence[str]) -> Ending | None:
    """The ending in what a template writes after an answer: up to its first special token."""
    by_length = sorted(filter(None, tokens), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, by_length)), after_answer) if by_length else None
    return Ending(after_answer[: found.end()], found.group()) if found else None


def shared_prefix_length(left: str, right: str) -> int:
    """Number of characters that two texts have in common at their beginning."""
    return len(os.path.commonprefix([left, right]))


def turn_span(whole: str, prompt: str, through: str, ending: Ending) -> Span | None:
    """The characters that the model must write for one turn: all after the prompt that serving
    sends, up to the end of the turn.

    `prompt` is the conversation before the turn with the generation prompt, `through` the
    conversation up to and including it. None when `whole` does not go on from `prompt`, or does
    not hold the turn as `through` does: then the template writes a turn in another way once
    others follow, and no mask over `whole` can be right.
    """
    if not whole.startswith(prompt):
        return None
    last = whole.rfind(ending.text, len(prompt), shared_prefix_length(whole, through))
    return None if last < 0 else (len(prompt), last + len(ending.text))


def holds(text: str, content: str) -> bool:
    """Whether `content` is in `text`, however the template treats white space."""
    return "".join(content.split()) in "".join(text.split())


def narrow(span: Span, marks: Sequence[Span]) -> list[Span]:
    """The parts of `span` that lie inside marks."""
    parts = [(max(span[0], start), min(span[1], end)) for start, end in marks]
    return [(start, end) for start, end in parts if start < end]


def touches(token: Span, spans: Sequence[Span]) -> bool:
    """Whether a token's characters are in any of the spans."""
    return any(token[0] < end and token[1] > start for start, end in spans)
