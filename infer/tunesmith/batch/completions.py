"""A row's result as a line of the OpenAI Batch API's output."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from tunesmith.batch.answers import Origin
from tunesmith.batch.openai import CHAT, EMBEDDINGS
from tunesmith.batch.results import output_tokens
from tunesmith.batch.rows import Row

# Anything else is the engine's fault and not the request's.
_SERVER_FAULTS = ("engine_crashed",)


def output_line(row: Row, result: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    """Every request has one: the answer, or the error with the status that the API gives it."""
    name = hashlib.sha256(f"{row.index} {row.id}".encode()).hexdigest()[:32]
    error = result.get("error")
    status = 200
    if error:
        status = 500 if error["type"] in _SERVER_FAULTS else 400
        kind = "invalid_request_error" if status == 400 else "server_error"
        detail = {"message": error["detail"], "type": kind, "param": None, "code": error["type"]}
        body: dict[str, Any] = {"error": detail}
    else:
        body = _body(row, result, origin, name)
    return {
        "id": f"batch_req_{name}",
        "custom_id": str(row.id),
        "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
        "error": {"code": error["type"], "message": error["detail"]} if error else None,
    }


def _body(row: Row, result: Mapping[str, Any], origin: Origin, name: str) -> dict[str, Any]:
    asked, url = row.columns["body"], row.columns["url"]
    if url == EMBEDDINGS:
        return _embeddings(result, asked.get("encoding_format"), origin.of(row))
    is_chat = url == CHAT
    choices = [
        _chat_choice(at, output, asked.get("top_logprobs") or 0)
        if is_chat
        else _text_choice(at, output, asked.get("logprobs"))
        for at, output in enumerate(result["outputs"])
    ]
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": origin.created,
        "model": origin.of(row),
        "system_fingerprint": origin.fingerprint,
        "choices": choices,
        "usage": {
            "prompt_tokens": result["prompt_tokens"],
            "completion_tokens": output_tokens(result),
            "total_tokens": result["prompt_tokens"] + output_tokens(result),
            "prompt_tokens_details": {"cached_tokens": result["cached_tokens"]},
        },
    }


def _chat_choice(at: int, output: Mapping[str, Any], count: int) -> dict[str, Any]:
    logprobs = output.get("logprobs")
    return {
        "index": at,
        "message": {"role": "assistant", "content": output["text"], "refusal": None},
        "logprobs": None if logprobs is None else {"content": _tokens(logprobs, count)},
        "finish_reason": output["finish_reason"],
    }


def _tokens(logprobs: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    return [
        {**_token(one), "top_logprobs": [_token(other) for other in one["top"][:count]]}
        for one in logprobs
    ]


def _token(one: Mapping[str, Any]) -> dict[str, Any]:
    token = one["token"]
    return {"token": token, "logprob": one["logprob"], "bytes": list(token.encode())}


def _text_choice(at: int, output: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    logprobs = output.get("logprobs")
    return {
        "index": at,
        "text": output["text"],
        "logprobs": None if logprobs is None else _columns(logprobs, count or 0),
        "finish_reason": output["finish_reason"],
    }


def _columns(logprobs: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    tokens = [one["token"] for one in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [one["logprob"] for one in logprobs],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in one["top"][:count]} for one in logprobs
        ],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0)) if tokens else [],
    }


def _embeddings(result: Mapping[str, Any], encoding: str | None, model: str) -> dict[str, Any]:
    def written(values: Sequence[float]) -> Any:
        if encoding != "base64":
            return values
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": at, "embedding": written(values)}
            for at, values in enumerate(result["embeddings"])
        ],
        "model": model,
        "usage": {
            "prompt_tokens": result["prompt_tokens"],
            "total_tokens": result["prompt_tokens"],
        },
    }
