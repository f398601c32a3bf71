"""Rows of a dataset as token ids, with the tokens that are learnt, and a count of what was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.chat import ChatTemplate, Supervised
from tunesmith.chat.length import kept_part, learnt_length
from tunesmith.config.errors import DataError
from tunesmith.config.schema.data import Data, Truncation
from tunesmith.terminal import progress_bar
from tunesmith.train.tokens import Example, TokenRows, TokenWriter
from tunesmith.train.workers import in_groups

__all__ = ["Example", "Examples", "tokenise_conversations", "tokenise_pairs", "tokenise_texts"]

_TEXTS_PER_CALL = 64
_SHOWN_FAULTS = 3


class TooLong(DataError):
    """A row that does not fit, where the recipe asks for an error."""


@dataclass
class Examples:
    """Sequences to train or to evaluate on."""

    rows: list[Example] | TokenRows = field(default_factory=list)
    read: int = 0
    """Rows that were looked at."""

    kept: int = 0
    """Sequences (of preferences: pairs) that are in `rows`."""

    truncated: int = 0
    """Longer than the limit: cut to it."""

    dropped: int = 0
    """Nothing to learn was left within the limit."""

    too_long: int = 0
    """Those of the dropped that are longer than the limit and were not to be cut."""

    faults: list[str] = field(default_factory=list)
    """Rows that the chat template or its proof refused, with the reason."""

    writer: TokenWriter | None = field(default=None, repr=False)
    """Where sequences go in place of `rows` while they are made."""

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        if isinstance(self.rows, TokenRows):
            return self.rows.lengths
        return np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)

    def supervised(self) -> NDArray[np.int64]:
        """Learnt tokens of each sequence."""
        if isinstance(self.rows, TokenRows):
            return self.rows.supervised
        return np.array([row.learnt.sum() for row in self.rows], dtype=np.int64)

    @property
    def largest_id(self) -> int:
        """The highest token id in any sequence."""
        if isinstance(self.rows, TokenRows):
            return self.rows.largest_id
        return max(int(row.input_ids.max()) for row in self.rows)

    def used_ids(self) -> NDArray[np.int64]:
        """The token ids that occur, each once."""
        if isinstance(self.rows, TokenRows):
            return self.rows.used_ids()
        found = [row.input_ids for row in self.rows]
        return np.unique(np.concatenate(found)).astype(np.int64)

    def add(
        self,
        input_ids: Sequence[int],
        learnt: Sequence[bool],
        max_length: int,
        truncation: Truncation = "end",
    ) -> None:
        """Keep what fits and can be learnt, and count what does not. Raises TooLong."""
        self._keep([self._cut(input_ids, learnt, max_length, truncation)])

    def add_pair(
        self,
        chosen: Supervised,
        rejected: Supervised,
        max_length: int,
        truncation: Truncation = "end",
    ) -> None:
        """Keep both answers in this order, or count one dropped pair when either has nothing to
        learn within the limit or nothing in which they differ. Raises TooLong."""
        too_long = self.too_long
        pair = [
            self._cut(one.input_ids, one.mask, max_length, truncation) for one in (chosen, rejected)
        ]
        self.too_long = min(self.too_long, too_long + 1)
        if pair[0] and pair[1] and np.array_equal(pair[0].input_ids, pair[1].input_ids):
            pair = [None]
        self._keep(pair)

    def _keep(self, examples: Sequence[Example | None]) -> None:
        if None in examples:
            self.dropped += 1
            return
        self.kept += 1
        for example in examples:
            assert example
            self._append(example)

    def take(self, other: Examples) -> None:
        """Add all of another's."""
        for example in other.rows:
            self._append(example)
        for name in ("read", "kept", "truncated", "dropped", "too_long", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _append(self, example: Example) -> None:
        rows = self.writer or self.rows
        assert not isinstance(rows, TokenRows), "files are only written through their writer"
        rows.append(example)

    def _cut(
        self,
        input_ids: Sequence[int],
        learnt: Sequence[bool],
        max_length: int,
        truncation: Truncation,
    ) -> Example | None:
        """The part of a sequence that is trained on; None when there is nothing to learn in it."""
        mask = np.array(learnt, dtype=np.bool_)
        mask[:1] = False
        length = learnt_length(mask)
        if length > max_length:
            match truncation:
                case "error":
                    raise TooLong(
                        f"{length:,} tokens, more than data.max_length ({max_length:,}); raise it, "
                        "or choose with data.truncation what becomes of longer rows"
                    )
                case "drop":
                    self.too_long += 1
                    return None
            self.truncated += 1
        part = kept_part(mask, max_length, truncation)
        mask = mask[part]
        mask[:1] = False
        if not mask.any():
            return None
        return Example(np.array(input_ids[part], dtype=np.int32), mask)

    def check(self, data: Data) -> None:
        """Raises DataError when more was lost than the recipe allows, or nothing is left."""
        if len(self.faults) > data.max_error_rate * self.read:
            shown = "\n".join(f"  {fault}" for fault in self.faults[:_SHOWN_FAULTS])
            raise DataError(
                f"{len(self.faults)} of {self.read} rows cannot be learnt (data.max_error_rate is "
                f"{data.max_error_rate}):\n{shown}"
            )
        if not self.kept:
            raise DataError(
                f"nothing to learn: within data.max_length ({data.max_length} tokens) none of "
                f"{self.read} rows has an assistant's token; raise data.max_length"
            )
        if self.dropped > data.max_dropped_rate * (self.kept + self.dropped):
            raise DataError(
                f"{self.dropped} of {self.kept + self.dropped} sequences are left out because "
                f"nothing to learn is within data.max_length ({data.max_length} tokens), more than "
                f"data.max_dropped_rate ({data.max_dropped_rate:g}) allows; raise data.max_length, "
                "or data.max_dropped_rate to go on without them"
            )


def tokenise_conversations(
    rows: Iterable[dict[str, Any]],
    template: ChatTemplate,
    data: Data,
    total: int | None = None,
    writer: TokenWriter | None = None,
) -> Examples:
    """Conversations as the chat template renders them, learning the assistant's turns.

    Raises DataError when more rows than allowed cannot be rendered or learnt, or none can.
    """
    return _tokenise(rows, partial(_add_conversation, template, data), data, total, writer)


def tokenise_pairs(
    rows: Iterable[dict[str, Any]],
    template: ChatTemplate,
    data: Data,
    total: int | None = None,
    writer: TokenWriter | None = None,
) -> Examples:
    """Preferences as alternating sequences: those of pair i are `2 i`, with the better answer, and
    `2 i + 1`, with the worse. Only what follows the prompt is learnt.

    Raises DataError when more rows than allowed cannot be rendered or learnt, or none can.
    """
    return _tokenise(rows, partial(_add_pair, template, data), data, total, writer)


def supervise_pair(template: ChatTemplate, row: dict[str, Any]) -> tuple[Supervised, Supervised]:
    """The better and the worse answer, each after the prompt and learnt alone. Each has to be one
    sequence: raises HistoryDiffers when the template rewrites turns of it once others follow."""
    prompt = row["messages"][: row["prompt_turns"]]

    def supervise(answer: list[Any]) -> Supervised:
        messages = [*prompt, *answer]
        turns = [turn for turn in template.learnt_turns(messages) if turn >= len(prompt)]
        return template.supervise(messages, tools=row.get("tools"), turns=turns)

    return supervise(row["messages"][len(prompt) :]), supervise(row["rejected"])


def _add_conversation(
    template: ChatTemplate, data: Data, found: Examples, row: dict[str, Any]
) -> None:
    for one in template.examples(row["messages"], tools=row.get("tools")):
        found.add(one.input_ids, one.mask, data.max_length, data.truncation)


def _add_pair(template: ChatTemplate, data: Data, found: Examples, row: dict[str, Any]) -> None:
    found.add_pair(*supervise_pair(template, row), data.max_length, data.truncation)


Add = Callable[[Examples, dict[str, Any]], None]


def _tokenise(
    rows: Iterable[dict[str, Any]],
    add: Add,
    data: Data,
    total: int | None,
    writer: TokenWriter | None,
) -> Examples:
    found = Examples(writer=writer)
    with progress_bar("tokenising", total) as bar:
        for group in in_groups(rows, partial(_tokenise_group, add), total):
            found.take(group)
            bar.advance(group.read)
    found.check(data)
    return found


def _tokenise_group(add: Add, rows: list[dict[str, Any]]) -> Examples:
    found = Examples(read=len(rows))
    for row in rows:
        try:
            add(found, row)
        except TooLong as error:
            raise TooLong(f"row {row['id']}: {error}") from error
        except DataError as error:
            found.faults.append(f"row {row['id']}: {error}")
    return found


def tokenise_texts(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    data: Data,
    total: int | None = None,
    writer: TokenWriter | None = None,
    *,
    apart: bool = False,
) -> Examples:
    """Texts, each ended by the end-of-sequence token, back to back in sequences of `max_length`,
    learning every token; `apart`, a sequence never goes on into the next text.

    Raises DataError when there is nothing to learn.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("data.format: text needs a tokenizer with an end-of-sequence token")
    found, max_length = Examples(writer=writer), data.max_length
    tokens: list[int] = []
    with progress_bar("tokenising", total) as bar:
        for texts in _groups((row["text"] for row in rows), _TEXTS_PER_CALL):
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                tokens += chain(ids, [tokenizer.eos_token_id])
                found.read += 1
                bar.advance()
                if apart:
                    _add_chunks(found, tokens, max_length)
                    tokens = []
            whole = len(tokens) - len(tokens) % max_length
            _add_chunks(found, tokens[:whole], max_length)
            tokens = tokens[whole:]
    _add_chunks(found, tokens, max_length)
    found.check(data)
    return found


def _add_chunks(found: Examples, tokens: list[int], max_length: int) -> None:
    for start in range(0, len(tokens), max_length):
        chunk = tokens[start : start + max_length]
        if len(chunk) == 1:  # Nothing comes before the end of this text.
            continue
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
