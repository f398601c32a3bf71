"""Where texts are in the JSON of requests and answers. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_STRUCTURE = frozenset(
    {
        "model", "role", "type", "id", "object", "tool_call_id", "call_id", "item_id", "user",
        "finish_reason", "stop_reason", "status", "encoding_format", "service_tier", "url", "data",
        "image_url", "file_id", "file_data", "detail", "previous_response_id", "response_format",
        "system_fingerprint", "safety_identifier", "prompt_cache_key",
    }
)  # fmt: skip
"""Keys whose texts steer, name or encode; no model reads them as words, or writes them."""

_ANSWERS = ("choices", "output", "output_text")
_BESIDE = frozenset(
    {"logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids", "top_logprobs", "tokens"}
)
"""The same text again, in a form in which nothing can be found."""

Change = Callable[[str], str]


def change_texts(value: Any, change: Change, key: str = "") -> Any:
    """A copy in which every text that a model reads or writes has gone through `change`."""
    if isinstance(value, str):
        return value if key in _STRUCTURE else change(value)
    if isinstance(value, list):
        return [change_texts(one, change, key) for one in value]
    if isinstance(value, dict):
        return {name: change_texts(one, change, name) for name, one in value.items()}
    return value


def has_token_ids(fields: dict[str, Any]) -> bool:
    """Whether a prompt comes as numbers or vectors, in which no text can be looked for."""
    if fields.get("prompt_embeds") or fields.get("prompt_token_ids"):
        return True
    for name in ("prompt", "input"):
        found = fields.get(name)
        if isinstance(found, list) and any(not isinstance(one, str | dict) for one in found):
            return True
    return False


def change_answer(answer: dict[str, Any], change: Change) -> dict[str, Any]:
    """A whole answer's JSON, without what tells its tokens once more."""
    return {
        name: change_texts(without_tokens(one), change, name) if name in _ANSWERS else one
        for name, one in answer.items()
        if name not in _BESIDE
    }


def without_tokens(value: Any) -> Any:
    """A copy in which probabilities and ids of tokens are null or empty."""
    if isinstance(value, list):
        return [without_tokens(one) for one in value]
    if isinstance(value, dict):
        return {
            name: ([] if isinstance(one, list) else None)
            if name in _BESIDE
            else without_tokens(one)
            for name, one in value.items()
        }
    return value


def filtered_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """The same answer with nothing in it, and the reason for that."""
    found = dict(answer)
    if "output" in found:
        found |= {"output": [], "status": "incomplete"}
        found["incomplete_details"] = {"reason": "content_filter"}
        found.pop("output_text", None)
    if isinstance(choices := found.get("choices"), list):
        found["choices"] = [_filtered(one) for one in choices if isinstance(one, dict)]
    return found


def _filtered(choice: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"index": choice.get("index", 0), "finish_reason": "content_filter"}
    if "message" in choice:
        return kept | {"message": {"role": "assistant", "content": ""}, "logprobs": None}
    return kept | {"text": "", "logprobs": None}
