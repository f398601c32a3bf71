"""The `data` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from tunesmith.config.schema.base import Fraction, Positive, Section

DataFormat = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference"]
Learn = Literal["all", "last"]
Truncation = Literal["end", "start", "drop", "error"]


class Source(Section):
    """One of several sources of training rows."""

    source: str
    """JSONL, JSON, Parquet or CSV file, hub data set id, or `builtin/stdlib`."""

    format: DataFormat | None = None
    """Shape of its rows; `data.format` when null."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """How often each of its rows is used per epoch: 2 is twice, 0.5 half of the rows, 1.5 all of
    them and half a second time, chosen by `seed`."""

    revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit it resolves to is recorded."""


def _is_list(value: Any) -> str:
    return "tuple" if isinstance(value, (list, tuple)) else "str"


Sources = Annotated[
    Annotated[str, Tag("str")] | Annotated[tuple[Source, ...], Tag("tuple")],
    Discriminator(_is_list),
]


class Data(Section):
    """What the model learns from, and what it is judged on."""

    train: Sources
    """JSONL, JSON, Parquet or CSV file, hub data set id, or `builtin/stdlib`; or a list of them
    with weights."""

    evaluation: str | None = None
    """Held-out rows, in the same forms; `evaluation_fraction` of `train` when null."""

    format: DataFormat = "messages"
    """Shape of a row."""

    revision: str | None = None
    """Branch, tag or commit of a hub data set (of `evaluation` alone where `train` is a list); the
    commit it resolves to is recorded."""

    evaluation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of `train` that is held out when `evaluation` is null, chosen by hash of the row."""

    max_length: Positive = 2048
    """Longest training example, in tokens; what becomes of longer ones says `truncation`."""

    truncation: Truncation = "end"
    """Cut longer examples at their `end` or their `start`, `drop` them (all of this is counted), or
    stop with an `error`. Rows of `text` are divided and never cut."""

    learn: Learn = "all"
    """Learn `all` answers of a conversation or only the `last`. A message with `"weight": 0` is not
    learnt either way."""

    max_rows: Positive | None = None
    """Use only this many training rows, chosen by `seed`; all when null."""

    max_error_rate: Fraction = 0.0
    """Share of rows that may be malformed before the run stops; they are kept in
    `errors.jsonl` either way."""

    max_dropped_rate: Fraction = 0.1
    """Share of examples that may have nothing to learn within `max_length`, or be dropped as
    longer, before the run stops."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What `train` names."""
        if isinstance(self.train, str):
            return (Source(source=self.train, revision=self.revision),)
        return self.train

    @model_validator(mode="after")
    def _settings_fit_the_format(self) -> Data:
        if not self.sources:
            raise ValueError("train: a list of sources has at least one")
        kinds = {_kind(source.format or self.format) for source in self.sources}
        if kinds != {_kind(self.format)}:
            raise ValueError(
                f"train: sources of format {', '.join(sorted(kinds))} cannot be mixed with "
                f"data.format: {self.format}; conversations, preferences and text are learnt in "
                "different ways"
            )
        if self.format == "text" and self.learn != "all":
            raise ValueError("learn: last is of conversations; of format: text all is learnt")
        return self


def _kind(row_format: DataFormat) -> str:
    return row_format if row_format in ("text", "preference") else "messages"
