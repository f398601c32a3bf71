"""Pairs of a better and a worse answer to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from tunesmith.config.schema.data import Learn
from tunesmith.data.faults import RowError
from tunesmith.data.messages import (
    Row,
    decoded,
    learnt,
    leave_out,
    read_messages,
    read_side,
    through_last_answer,
)


def read_preference(raw: Mapping[str, Any], learn: Learn) -> tuple[Row, int]:
    """A pair in the one shape, and how many turns after the last answers were cut.

    `prompt`, `chosen` and `rejected` are strings or lists of messages. Without a `prompt`, and
    where `chosen` and `rejected` are whole conversations, the prompt is what both begin with.
    Answers in the prompt are never learnt. Raises RowError when there is no prompt, or no two
    different answers to it.
    """
    given = raw.get("prompt")
    prompt = [] if given is None else read_side(given, "prompt", "user")
    chosen, rejected = (_answer(raw[side], side, bool(prompt)) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError("equal_answers", "chosen and rejected are the same")
    if not prompt or _is_conversation(chosen) or _is_conversation(rejected):
        at = _first_difference(chosen, rejected)
        # Data sets repeat in `prompt` the whole beginning, or the last question alone.
        if not at or prompt not in ([], chosen[: len(prompt)], chosen[at - len(prompt) : at]):
            raise RowError(
                "different_prompts", "chosen and rejected do not both begin with the prompt"
            )
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    before = len(prompt)
    answers = [
        _through_answer(prompt, chosen, "chosen"),
        _through_answer(prompt, rejected, "rejected"),
    ]
    if answers[0] == answers[1]:
        raise RowError("equal_answers", "chosen and rejected are the same up to their last answer")
    cut = len(chosen) + len(rejected) + 2 * before - len(answers[0]) - len(answers[1])
    chosen, rejected = (one[before:] for one in answers)
    return {
        "messages": [*leave_out(prompt), *learnt(chosen, learn)],
        "rejected": learnt(rejected, learn),
        "prompt_turns": before,
    }, cut


def _answer(value: Any, column: str, has_prompt: bool) -> list[Row]:
    if has_prompt:
        return read_side(value, column, "assistant")
    if isinstance(decoded(value), str):
        raise RowError(
            "missing_column",
            f"no prompt, and {column} is a text, in which nobody can tell where the prompt ends; "
            "give the prompt, or lists of messages",
        )
    return read_messages(value, column)


def _is_conversation(messages: Sequence[Row]) -> bool:
    """Whether they begin before the answer."""
    return bool(messages) and messages[0]["role"] in ("system", "user")


def _first_difference(one: Sequence[Row], other: Sequence[Row]) -> int:
    """How many messages both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


def _through_answer(prompt: list[Row], answer: list[Row], column: str) -> list[Row]:
    """The prompt and one answer, up to the last thing that the assistant says."""
    roles = [message["role"] for message in answer]
    if "assistant" not in roles:
        raise RowError("no_assistant_turn", f"{column} has no answer after the prompt")
    try:
        whole = through_last_answer([*prompt, *answer])
    except RowError as error:
        raise RowError(error.kind, f"{column}: {error.detail}") from error
    if any(message["role"] not in ("assistant", "tool") for message in whole[len(prompt) :]):
        raise RowError(
            "different_prompts",
            f"{column} has another {next(r for r in roles if r in ('user', 'system'))} turn after "
            "the prompt; a pair is two answers to the same prompt",
        )
    return whole
