"""The `batch` section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from tunesmith.config.schema.base import Fraction, Positive, Section, Variant

Task = Literal["generate", "classify", "score", "embed"]

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv")


class Turn(Section):
    """One message that every row's conversation has."""

    role: Literal["system", "user", "assistant"]
    """Who says it."""

    content: str
    """Template of its text: `{column}` is replaced by the row's, `{{` is a brace."""


class Structured(Section):
    """What an answer has to look like; exactly one of the keys."""

    json_schema: dict[str, Any] | None = None
    """A JSON Schema that the answer follows."""

    regex: str | None = None
    """A regular expression that the whole answer matches."""

    choice: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Texts of which the answer is one."""

    @model_validator(mode="after")
    def _is_one(self) -> Structured:
        given = [self.json_schema, self.regex, self.choice]
        if sum(value is not None for value in given) != 1:
            raise ValueError("structured has exactly one of json_schema, regex and choice")
        return self


def _is_text(value: Any) -> str:
    return "str" if isinstance(value, str) else "tuple"


Messages = Annotated[
    Annotated[str, Tag("str")] | Annotated[tuple[Turn, ...], Field(min_length=1), Tag("tuple")],
    Discriminator(_is_text),
]


class Batch(Section):
    """Answers for a file of prompts."""

    input: str
    """JSONL, CSV or Parquet (also `.gz`, `.zst`): a file, a folder or a pattern of them, here or at
    a URI such as `s3://bucket/in/*.jsonl`; or a hub data set id, or the folder of a saved one."""

    format: Literal["columns", "openai"] | None = None
    """What a row is: `columns`, or a request of the `openai` Batch API; found out from the first
    row when null."""

    split: str | None = None
    """Split of a data set; its only one when null."""

    subset: str | None = None
    """Configuration of a hub data set."""

    revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit it resolves to is recorded."""

    output: str
    """`.jsonl`, `.csv` or `.parquet`, here or at a URI: one row per input row, in input order."""

    rows_per_file: Positive | None = None
    """Makes `output` a folder of numbered files with this many rows each."""

    model: Variant | None = None
    """Which model of the recipe answers; the last quantized, else the tuned one, when null."""

    adapters: dict[str, str] = {}
    """Further LoRA adapters by the names that the rows' column `adapter` has: an artifact id, a
    `NAME@ALIAS`, a folder, or a variant of this recipe (`adapter`, or `base` for none)."""

    task: Task = "generate"
    """`generate` an answer, `classify` by the likelihood of each of `labels`, `score` the
    likelihood of a given `completion`, or `embed`."""

    id_column: str = "id"
    """Column that names a row; a row without it is called after its line."""

    prompt: str | None = None
    """Template of the prompt: `{column}` is replaced by the row's, `{{` is a brace; the column
    `prompt` when null."""

    messages: Messages | None = None
    """The conversation in place of `prompt`: a list of templates, or the name of the column that
    has it; the column `messages` when null."""

    system: str | None = None
    """Template of a system message, before conversations that have none."""

    raw: bool = False
    """Give prompts to the model as they are, without the chat template. Texts to embed always
    are."""

    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """The answers between which `task: classify` chooses."""

    completion: str | None = None
    """Template of what `task: score` scores after the prompt; the column `completion` when null."""

    structured: Structured | None = None
    """What answers have to look like, unless the row's column `structured_outputs` or
    `response_format` says otherwise."""

    n: Positive = 1
    """Answers per row."""

    max_tokens: Positive | None = None
    """Longest answer, unless the row says otherwise. Null: 128; in OpenAI files what the API does,
    which is as many as fit in a chat and 16 in a completion."""

    temperature: Annotated[float, Field(ge=0.0)] | None = None
    """Sampling temperature, unless the row says otherwise; 0 is greedy. Null: 0; in OpenAI files 1,
    as in the API."""

    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the likeliest tokens that have this share of the probability, unless the row says
    otherwise."""

    stop: tuple[str, ...] = ()
    """Texts that end an answer, unless the row says otherwise; they are not part of it."""

    max_error_rate: Fraction = 0.0
    """Share of rows that may fail before the command ends with exit code 3."""

    reuse: bool = True
    """Compute equal requests once, and order the others so that the prefix cache helps most; the
    output stays in input order."""

    replicas: Positive | None = None
    """Engines side by side, each with `engine.tensor_parallel_size` GPUs; as many as the GPUs have
    room for when null, one on a CPU (on a cluster, one on each node)."""

    cluster: Literal["ray"] | None = None
    """Run the engines on all nodes of a Ray cluster; on this machine when null."""

    cluster_address: str | None = None
    """`HOST:PORT` of the cluster; `RAY_ADDRESS`, else the cluster that this machine is a node of,
    when null."""

    @property
    def column_keys(self) -> list[str]:
        """Those of the keys here that say what to make of plain columns."""
        names = ("task", "prompt", "messages", "system", "raw", "labels", "completion")
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    @property
    def structured_outputs(self) -> dict[str, Any] | None:
        """`structured` as vLLM names it."""
        if self.structured is None:
            return None
        if self.structured.json_schema is not None:
            return {"json": self.structured.json_schema}
        if self.structured.regex is not None:
            return {"regex": self.structured.regex}
        return {"choice": list(self.structured.choice or ())}

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Batch:
        for fault in self._faults():
            raise ValueError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        if not self.input or not self.output:
            yield "input and output cannot be empty"
        if self.rows_per_file and not self.output.endswith(_SUFFIXES):
            yield f"rows_per_file needs an output whose name ends with {', '.join(_SUFFIXES)}"
        if (self.task == "classify") != (self.labels is not None):
            yield "labels are given exactly when task is classify"
        if self.labels and len(set(self.labels)) < len(self.labels):
            yield "labels: one of them is there twice"
        if self.completion is not None and self.task != "score":
            yield "completion is scored by task: score only"
        if self.task != "generate":
            names = ("structured", "n", "max_tokens", "temperature", "top_p", "stop")
            defaults = type(self).model_fields
            for name in names:
                if getattr(self, name) != defaults[name].default:
                    yield f"{name} is for answers that are written, so for task: generate"
        if self.n > 1 and self.temperature == 0:
            yield "n above 1 needs a temperature above 0: greedy answers are all the same"
        if self.n > 1 and self.temperature is None and self.format != "openai":
            yield "n above 1 needs a temperature above 0; give one"
        yield from self._prompt_faults()

    def _prompt_faults(self) -> Iterator[str]:
        if self.prompt is not None and self.messages is not None:
            yield "prompt and messages are two ways to say the same; give one of them"
        if self.raw and (self.messages is not None or self.system is not None):
            yield "raw prompts have no messages: leave messages and system out, or raw"
        if self.system is not None and isinstance(self.messages, tuple):
            yield "system: make it the first of messages"
        if self.task == "embed" and self.system is not None and self.prompt is not None:
            yield "system: a text to embed is given to the model as it is"
        if self.format == "openai":
            for name in self.column_keys:
                yield f"{name}: a request of format: openai says itself what it asks"
        if isinstance(self.messages, tuple):
            templates = [turn.content for turn in self.messages]
            if self.messages[-1].role == "assistant":
                yield "messages: the last one cannot be the assistant's, which is to be answered"
        else:
            templates = []
        for template in (self.prompt, self.system, self.completion, *templates):
            if template is not None:
                yield from template_faults(template)


def template_faults(template: str) -> Iterator[str]:
    """What is wrong with a template, as words."""
    rest = _PLACE.sub("", template)
    if "{" in rest or "}" in rest:
        yield f"{template!r}: a brace is alone; write {{{{ or }}}} for a brace in the text"
    if any(match[0] == "{}" for match in _PLACE.finditer(template)):
        yield f"{template!r}: {{}} names no column"


def template_parts(template: str) -> Iterator[tuple[str, bool]]:
    """Text and the names of columns, in turn; the flag says which."""
    at = 0
    for match in _PLACE.finditer(template):
        yield template[at : match.start()], False
        yield (match[1], True) if match[1] is not None else (match[0][0], False)
        at = match.end()
    yield template[at:], False
