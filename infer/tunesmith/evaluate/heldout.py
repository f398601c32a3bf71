"""Held-out rows as the engine gets them: the tokens to score and the prompt to answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.chat import ChatTemplate
from tunesmith.chat.content import as_served
from tunesmith.config import DataError, require

Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """One sequence whose learnt tokens are scored."""

    input_ids: list[int]

    learnt: list[int]
    """Positions of the tokens that training learns from; never 0, which nothing predicts."""


@dataclass(frozen=True)
class Item:
    """One held-out row."""

    id: str
    scored: list[Scored]
    prompt_ids: list[int] | None
    """The conversation before its last answer; None for plain text, which has none."""

    reference: str | None
    """That answer."""


@dataclass
class HeldOut:
    """The rows that can be measured, and a count of those that cannot."""

    items: list[Item] = field(default_factory=list)
    cut: int = 0
    """Sequences longer than the limit, scored up to it as in training."""

    excluded: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""

    end_of_turn_id: int | None = None
    """The token after which an answer ends."""


def hold_out(
    rows: Sequence[Row],
    model: Path,
    *,
    chat_template: Path | None,
    max_length: int,
    max_model_len: int,
    max_tokens: int,
    trust_remote_code: bool = False,
) -> HeldOut:
    """Tokenise rows for one model. Sequences are cut at `max_length`, or at what the engine takes.

    Raises DataError when no row is left, ModelError when the chat template is unusable.
    """
    found = HeldOut()
    if any("messages" in row for row in rows):
        template = ChatTemplate.load(model, chat_template, trust_remote_code=trust_remote_code)
        found.end_of_turn_id = template.end_of_turn_id
        read = partial(_conversation, template=template)
    else:
        transformers = require("transformers", "infer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code
        )
        read = partial(_text, tokenizer=tokenizer)
    # The engine writes one token after the ones that it scores.
    limit = min(max_length, max_model_len - 1)
    for row in rows:
        try:
            _add(found, read(row), limit, max_model_len - max_tokens)
        except DataError:
            found.excluded["refused by the chat template"] += 1
    if not found.items:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.excluded.items())
        raise DataError(
            f"none of {len(rows)} held-out rows can be measured"
            + (f" ({reasons})" if reasons else "; give data.evaluation, or more data")
        )
    return found


def _conversation(row: Row, template: ChatTemplate) -> Item:
    messages, tools = row["messages"], row.get("tools")
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return Item(row["id"], [], None, None)
    examples = template.examples(messages, tools=tools)
    last = answers[-1]
    return Item(
        id=row["id"],
        scored=[_scored(example.input_ids, example.mask) for example in examples],
        prompt_ids=template.prompt_ids(messages[:last], tools=tools),
        reference=as_served([messages[last]], as_parts=False)[0]["content"],
    )


def _text(row: Row, tokenizer: Any) -> Item:
    input_ids = [*tokenizer(row["text"], verbose=False)["input_ids"], tokenizer.eos_token_id]
    return Item(row["id"], [_scored(input_ids, [True] * len(input_ids))], None, None)


def _scored(input_ids: list[int], mask: list[bool]) -> Scored:
    return Scored(input_ids, [at for at, learnt in enumerate(mask) if learnt and at > 0])


def _add(found: HeldOut, item: Item, limit: int, prompt_limit: int) -> None:
    """Cut an item to the limits, and keep it if there is something to measure."""
    cut = [
        Scored(one.input_ids[:limit], [at for at in one.learnt if at < limit])
        for one in item.scored
    ]
    scored = [one for one in cut if one.learnt]
    if not item.scored:
        found.excluded["without an assistant turn"] += 1
    elif not scored or (item.prompt_ids is not None and len(item.prompt_ids) > prompt_limit):
        found.excluded["too long"] += 1
    else:
        found.cut += sum(len(one.input_ids) > limit for one in item.scored)
        found.items.append(Item(item.id, scored, item.prompt_ids, item.reference))
