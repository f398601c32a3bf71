"""Rows of a dataset as token ids, with the tokens that are learnt, and a count of what was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.chat import ChatTemplate, Supervised
from tunesmith.config.errors import DataError
from tunesmith.terminal import progress_bar

_TEXTS_PER_CALL = 64
_SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Example:
    """One sequence, cut after the last token from which anything is learnt."""

    input_ids: NDArray[np.int32]

    learnt: NDArray[np.bool_]
    """True where the token is a target; never at the first token, which nothing predicts."""


@dataclass
class Examples:
    """Sequences to train or to evaluate on."""

    rows: list[Example] = field(default_factory=list)
    truncated: int = 0
    """Longer than the limit: cut at the end."""

    dropped: int = 0
    """Nothing to learn was left within the limit."""

    faults: list[str] = field(default_factory=list)
    """Rows that the chat template or its proof refused, with the reason."""

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)

    def supervised(self) -> NDArray[np.int64]:
        """Learnt tokens of each sequence."""
        return np.array([row.learnt.sum() for row in self.rows], dtype=np.int64)

    def add(self, input_ids: Sequence[int], learnt: Sequence[bool], max_length: int) -> None:
        """Keep what fits and can be learnt, and count what does not."""
        if example := self._cut(input_ids, learnt, max_length):
            self.rows.append(example)
        else:
            self.dropped += 1

    def add_pair(self, chosen: Supervised, rejected: Supervised, max_length: int) -> None:
        """Keep both answers in this order, or count one dropped row when either has nothing to
        learn within the limit or nothing in which they differ."""
        pair = [self._cut(one.input_ids, one.mask, max_length) for one in (chosen, rejected)]
        if pair[0] and pair[1] and not np.array_equal(pair[0].input_ids, pair[1].input_ids):
            self.rows += [pair[0], pair[1]]
        else:
            self.dropped += 1

    def _cut(
        self, input_ids: Sequence[int], learnt: Sequence[bool], max_length: int
    ) -> Example | None:
        self.truncated += len(input_ids) > max_length
        mask = np.array(learnt[:max_length], dtype=np.bool_)
        mask[:1] = False
        targets = np.flatnonzero(mask)
        if not len(targets):
            return None
        # Attention is causal: nothing after the last target can change any loss.
        end = int(targets[-1]) + 1
        return Example(np.array(input_ids[:end], dtype=np.int32), mask[:end])


def tokenise_conversations(
    rows: Iterable[dict[str, Any]],
    template: ChatTemplate,
    max_length: int,
    max_error_rate: float,
    total: int | None = None,
) -> Examples:
    """Conversations as the chat template renders them, learning the assistant's turns.

    Raises DataError when more rows than `max_error_rate` cannot be rendered, or none can be learnt.
    """
    found = Examples()
    count = 0
    with progress_bar("tokenising", total) as bar:
        for row in rows:
            count += 1
            bar.advance()
            try:
                for one in template.examples(row["messages"], tools=row.get("tools")):
                    found.add(one.input_ids, one.mask, max_length)
            except DataError as error:
                found.faults.append(f"row {row['id']}: {error}")
    _check(found, count, max_length, max_error_rate)
    return found


def tokenise_pairs(
    rows: Iterable[dict[str, Any]],
    template: ChatTemplate,
    max_length: int,
    max_error_rate: float,
    total: int | None = None,
) -> Examples:
    """Preferences as alternating sequences: those of row pair i are `2 i`, with the better answer,
    and `2 i + 1`, with the worse. Only what follows the prompt is learnt.

    Raises DataError when more rows than `max_error_rate` cannot be rendered, or none can be learnt.
    """
    found = Examples()
    count = 0
    with progress_bar("tokenising", total) as bar:
        for row in rows:
            count += 1
            bar.advance()
            prompt = row["messages"][: row["prompt_turns"]]
            try:
                chosen = _supervise_answer(template, prompt, row["messages"][len(prompt) :], row)
                rejected = _supervise_answer(template, prompt, row["rejected"], row)
                found.add_pair(chosen, rejected, max_length)
            except DataError as error:
                found.faults.append(f"row {row['id']}: {error}")
    _check(found, count, max_length, max_error_rate)
    return found


def _supervise_answer(
    template: ChatTemplate, prompt: list[Any], answer: list[Any], row: dict[str, Any]
) -> Supervised:
    """A conversation of which the answer alone is learnt. It has to be one sequence: raises
    HistoryDiffers when the template rewrites its first turns once others follow."""
    messages = [*prompt, *answer]
    turns = [at for at in range(len(prompt), len(messages)) if messages[at]["role"] == "assistant"]
    return template.supervise(messages, tools=row.get("tools"), turns=turns)


def tokenise_texts(
    rows: Iterable[dict[str, Any]], tokenizer: Any, max_length: int, total: int | None = None
) -> Examples:
    """Texts, each ended by the end-of-sequence token, back to back in sequences of `max_length`,
    learning every token.

    Raises DataError when there is nothing to learn.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("data.format: text needs a tokenizer with an end-of-sequence token")
    found = Examples()
    tokens: list[int] = []
    with progress_bar("tokenising", total) as bar:
        for texts in _groups((row["text"] for row in rows), _TEXTS_PER_CALL):
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                tokens += chain(ids, [tokenizer.eos_token_id])
                bar.advance()
            whole = len(tokens) - len(tokens) % max_length
            _add_chunks(found, tokens[:whole], max_length)
            tokens = tokens[whole:]
    if len(tokens) > 1:
        _add_chunks(found, tokens, max_length)
    _check(found, 1, max_length, 0.0)
    return found


def _add_chunks(found: Examples, tokens: list[int], max_length: int) -> None:
    for start in range(0, len(tokens), max_length):
        chunk = tokens[start : start + max_length]
        found.add(chunk, [True] * len(chunk), max_length)


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _check(found: Examples, rows: int, max_length: int, max_error_rate: float) -> None:
    if len(found.faults) > max_error_rate * rows:
        shown = "\n".join(f"  {fault}" for fault in found.faults[:_SHOWN_FAULTS])
        raise DataError(
            f"{len(found.faults)} of {rows} rows cannot be learnt (data.max_error_rate is "
            f"{max_error_rate}):\n{shown}"
        )
    if not found.rows:
        raise DataError(
            f"nothing to learn: within data.max_length ({max_length} tokens) none of {rows} rows "
            "has an assistant's token; raise data.max_length"
        )
