"""What a row of plain columns asks for, by the recipe's templates and the row's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.batch.errors import Invalid, quote
from tunesmith.batch.requests import Ask
from tunesmith.batch.values import (
    conversation,
    fill,
    number,
    response_format,
    structure,
    texts,
    whole,
)
from tunesmith.config.schema.batch import Batch

_MAX_TOKENS = 128
_TEMPERATURE = 0.0


def ask_of_columns(columns: Mapping[str, Any], section: Batch) -> Ask:
    """Raises Invalid when the row does not have what its prompt takes."""
    messages, prompt = _prompt(columns, section)
    completions: tuple[str, ...] = ()
    if section.task == "classify":
        completions = section.labels or ()
    elif section.task == "score":
        completions = (_completion(columns, section),)
    return Ask(
        messages=messages,
        prompts=() if prompt is None else (prompt,),
        kind=_KINDS[section.task],
        completions=completions,
        sampling=_sampling(columns, section) if section.task == "generate" else {},
        adapter=_adapter(columns),
    )


_KINDS: Mapping[str, Any] = {
    "generate": "generate",
    "classify": "score",
    "score": "score",
    "embed": "embed",
}


def _prompt(
    columns: Mapping[str, Any], section: Batch
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The conversation, or the text that goes to the model as it is."""
    if isinstance(section.messages, tuple):
        turns = [(turn.role, fill(turn.content, columns)) for turn in section.messages]
        return [{"role": role, "content": text} for role, text in turns], None
    if section.messages is not None:
        if columns.get(section.messages) is None:
            raise Invalid("missing_column", f"it has no {section.messages!r}")
        messages = conversation(columns[section.messages], section.messages)
        return _with_system(messages, columns, section), None
    if section.prompt is not None:
        return _turn(fill(section.prompt, columns), columns, section)
    prompt, written = columns.get("prompt"), columns.get("messages")
    if prompt is not None and written is not None:
        raise Invalid("invalid_messages", "it has both prompt and messages; give one of them")
    if written is not None:
        if section.raw:
            raise Invalid("invalid_messages", "batch.raw takes prompts, and it has messages")
        return _with_system(conversation(written), columns, section), None
    if prompt is None:
        raise Invalid("missing_prompt", "it has neither prompt nor messages")
    if not isinstance(prompt, str) or not prompt:
        raise Invalid("missing_prompt", f"prompt must be a text, not {quote(prompt)}")
    return _turn(prompt, columns, section)


def _turn(
    text: str, columns: Mapping[str, Any], section: Batch
) -> tuple[list[dict[str, Any]] | None, str | None]:
    if not text:
        raise Invalid("missing_prompt", "the prompt is empty")
    if section.raw or section.task == "embed":
        return None, text
    return _with_system([{"role": "user", "content": text}], columns, section), None


def _with_system(
    messages: list[dict[str, Any]], columns: Mapping[str, Any], section: Batch
) -> list[dict[str, Any]]:
    if section.system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": fill(section.system, columns)}, *messages]


def _completion(columns: Mapping[str, Any], section: Batch) -> str:
    text = fill(section.completion or "{completion}", columns)
    if not text:
        raise Invalid("missing_column", "the completion to score is empty")
    return text


def _adapter(columns: Mapping[str, Any]) -> str | None:
    value = columns.get("adapter")
    if value is not None and not isinstance(value, str):
        raise Invalid("unknown_adapter", f"adapter must be a name, not {quote(value)}")
    return value


def _sampling(columns: Mapping[str, Any], section: Batch) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`; those at vLLM's own default are left out."""

    def given(name: str, default: Any) -> Any:
        value = columns.get(name)
        return default if value is None else value

    most = _MAX_TOKENS if section.max_tokens is None else section.max_tokens
    heat = _TEMPERATURE if section.temperature is None else section.temperature
    found: dict[str, Any] = {
        "max_tokens": whole("max_tokens", given("max_tokens", most)),
        "temperature": number("temperature", given("temperature", heat), least=0.0),
    }
    top_p = number("top_p", given("top_p", section.top_p), least=0.0, most=1.0)
    if top_p == 0:
        raise Invalid("invalid_parameter", "top_p must be above 0")
    if top_p < 1:
        found["top_p"] = top_p
    if (seed := columns.get("seed")) is not None:
        found["seed"] = whole("seed", seed, least=0, most=2**63 - 1)
    if stop := given("stop", list(section.stop)):
        found["stop"] = texts("stop", stop)
    if section.n > 1:
        found["n"] = section.n
        if found["temperature"] == 0:
            raise Invalid(
                "invalid_parameter",
                f"temperature 0 makes {section.n} answers that are all the same",
            )
    if structured := _structured(columns, section):
        found["structured_outputs"] = structured
    return found


def _structured(columns: Mapping[str, Any], section: Batch) -> dict[str, Any] | None:
    if (own := columns.get("structured_outputs")) is not None:
        return structure(own)
    if (asked := columns.get("response_format")) is not None:
        return response_format(asked)
    return section.structured_outputs
