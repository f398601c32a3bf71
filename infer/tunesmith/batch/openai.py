"""The OpenAI Batch API's lines: a request in, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.batch.errors import Invalid, quote
from tunesmith.batch.requests import Ask
from tunesmith.batch.values import (
    conversation,
    number,
    response_format,
    structure,
    texts,
    whole,
)
from tunesmith.config.schema.batch import Batch

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_URLS = (CHAT, COMPLETIONS, EMBEDDINGS)
# They change nothing in an answer of this engine.
_IGNORED = frozenset({
    "metadata", "parallel_tool_calls", "priority", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "safety_identifier", "service_tier", "store", "stream_options", "user",
})  # fmt: skip
_READ = frozenset({
    "messages", "prompt", "input", "model", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "n", "seed", "stop", "logprobs", "top_logprobs", "response_format",
    "structured_outputs", "encoding_format", "dimensions", "tools", "tool_choice",
})  # fmt: skip
# Further arguments of `SamplingParams` that vLLM's server takes under their own names.
_NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p")
_WHOLE = ("top_k", "min_tokens")
_FLAGS = (
    "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens",
)  # fmt: skip
_ID_LISTS = ("stop_token_ids", "allowed_token_ids")
_PASSED = frozenset({*_NUMBERS, *_WHOLE, *_FLAGS, *_ID_LISTS, "bad_words", "logit_bias"})
# What may be said as long as it says nothing.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "functions": ([],),
    "modalities": (["text"],),
}
# Ids are kept in four bytes each; no vocabulary comes near.
_MOST_IDS = 2**31
_MOST_LOGPROBS = 20
_API_COMPLETION_TOKENS = 16


def is_call(columns: Mapping[str, Any]) -> bool:
    """Whether a row is a request of the Batch API."""
    return {"custom_id", "method", "url", "body"} <= {*columns}


def is_embeddings(columns: Mapping[str, Any]) -> bool:
    """Whether a request asks for embeddings."""
    return columns.get("url") == EMBEDDINGS


def ask_of_call(columns: Mapping[str, Any], section: Batch, *, embeds: bool) -> Ask:
    """Raises Invalid when it is not a request that this job can answer."""
    name, url, body = columns.get("custom_id"), columns.get("url"), columns.get("body")
    if not isinstance(name, str):
        raise Invalid("invalid_id", f"custom_id must be a text, not {quote(name)}")
    if columns.get("method") != "POST":
        raise _unsupported(f"method must be POST, not {quote(columns.get('method'))}")
    if url not in _URLS:
        raise _unsupported(f"url must be one of {', '.join(_URLS)}, not {quote(url)}")
    if not isinstance(body, dict):
        raise Invalid("invalid_parameter", f"body must be an object, not {quote(body)}")
    if embeds != (url == EMBEDDINGS):
        kind = "embeddings" if embeds else "answers"
        raise _unsupported(
            f"this input is read for {kind}, as its first row asks; put {url} in another file"
        )
    body = {name: value for name, value in body.items() if value is not None}
    _check_names(body)
    adapter = body["model"] if body.get("model") in section.adapters else None
    if url == EMBEDDINGS:
        return _embeddings(body, adapter)
    sampling = _sampling(body, section, is_chat=url == CHAT)
    if url == COMPLETIONS:
        prompts = _prompts("prompt", body.get("prompt"))
        return Ask(prompts=prompts, sampling=sampling, adapter=adapter)
    if body.get("tools") and body.get("tool_choice") != "none":
        raise _unsupported(
            'tools: calls of tools are not read out of answers here; give tool_choice "none"'
        )
    messages = conversation(body.get("messages"))
    return Ask(messages=messages, tools=body.get("tools"), sampling=sampling, adapter=adapter)


def _embeddings(body: Mapping[str, Any], adapter: str | None) -> Ask:
    sampling = {}
    if "dimensions" in body:
        sampling["dimensions"] = whole("dimensions", body["dimensions"])
    if body.get("encoding_format", "float") not in ("float", "base64"):
        raise Invalid("invalid_parameter", "encoding_format must be float or base64")
    prompts = _prompts("input", body.get("input"))
    return Ask(prompts=prompts, kind="embed", sampling=sampling, adapter=adapter)


def _unsupported(detail: str) -> Invalid:
    return Invalid("unsupported_request", detail)


def _check_names(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in _OFF:
            if value not in _OFF[name]:
                raise _unsupported(f"{name}: {quote(value)} cannot be done here")
        elif name not in _READ | _PASSED | _IGNORED:
            raise _unsupported(f"{name}: no parameter of this name is known")


def _prompts(name: str, value: Any) -> tuple[str | list[int], ...]:
    """A text, its token ids, or a list of either."""
    if isinstance(value, str) or isinstance(value, list) and value and _is_id(value[0]):
        value = [value]
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(one and _is_prompt(one) for one in value):
        raise Invalid(
            "missing_prompt",
            f"{name} must be a text, token ids, or a list of them, not {quote(value)}",
        )
    return tuple(value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_IDS


def _sampling(body: Mapping[str, Any], section: Batch, *, is_chat: bool) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`: the request's, else the recipe's, else the API's."""
    heat = 1.0 if section.temperature is None else section.temperature
    found: dict[str, Any] = {
        "temperature": number("temperature", body.get("temperature", heat), least=0.0),
    }
    most = body.get("max_completion_tokens", body.get("max_tokens", section.max_tokens))
    if most is None and not is_chat:
        most = _API_COMPLETION_TOKENS
    if most is not None:
        found["max_tokens"] = whole("max_tokens", most)
    top_p = number("top_p", body.get("top_p", section.top_p), least=0.0, most=1.0)
    if top_p < 1:
        found["top_p"] = top_p
    if "seed" in body:
        found["seed"] = whole("seed", body["seed"], least=-(2**63), most=2**63 - 1)
    if stop := body.get("stop", list(section.stop)):
        found["stop"] = texts("stop", stop)
    count = whole("n", body.get("n", section.n))
    if count > 1:
        found["n"] = count
        if found["temperature"] == 0:
            raise Invalid("invalid_parameter", "n above 1 needs a temperature above 0")
    if (logprobs := _logprobs(body, is_chat=is_chat)) is not None:
        found["logprobs"] = logprobs
    for name in _NUMBERS:
        if name in body:
            found[name] = number(name, body[name])
    for name in _WHOLE:
        if name in body:
            found[name] = whole(name, body[name], least=-1)
    for name in _FLAGS:
        if name in body:
            found[name] = _flag(name, body[name])
    for name in _ID_LISTS:
        if body.get(name):
            found[name] = _ids(name, body[name])
    if body.get("bad_words"):
        found["bad_words"] = texts("bad_words", body["bad_words"])
    if body.get("logit_bias"):
        found["logit_bias"] = _bias(body["logit_bias"])
    if structured := _structured(body, section):
        found["structured_outputs"] = structured
    return found


def _logprobs(body: Mapping[str, Any], *, is_chat: bool) -> int | None:
    """How many of the likeliest tokens to tell; the two APIs ask in their own ways."""
    if not is_chat:
        return (
            whole("logprobs", body["logprobs"], least=0, most=_MOST_LOGPROBS)
            if "logprobs" in body
            else None
        )
    if not _flag("logprobs", body.get("logprobs", False)):
        if body.get("top_logprobs"):
            raise Invalid("invalid_parameter", "top_logprobs needs logprobs: true")
        return None
    return whole("top_logprobs", body.get("top_logprobs", 0), least=0, most=_MOST_LOGPROBS)


def _structured(body: Mapping[str, Any], section: Batch) -> dict[str, Any] | None:
    if "structured_outputs" in body:
        return structure(body["structured_outputs"])
    if "response_format" in body:
        return response_format(body["response_format"])
    return section.structured_outputs


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Invalid("invalid_parameter", f"{name} must be true or false, not {quote(value)}")
    return value


def _ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(map(_is_id, value)):
        raise Invalid("invalid_parameter", f"{name} must be token ids, not {quote(value)}")
    return value


def _bias(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise Invalid("invalid_parameter", f"logit_bias must have token ids, not {quote(value)}")
    return {key: number("logit_bias", bias, least=-100, most=100) for key, bias in value.items()}
