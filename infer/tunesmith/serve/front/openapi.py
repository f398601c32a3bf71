"""The OpenAPI description of the gateway: what it takes, what it answers, how it refuses."""

from __future__ import annotations

from typing import Any

_JSON = "application/json"
_EVENTS = "text/event-stream"
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_CHANCE = {"type": "number", "minimum": 0, "maximum": 1}

_REFUSALS = {
    400: "The request is not what the API takes, or a guardrail refused it.",
    401: "No key, or a wrong one.",
    403: "The key may not do this.",
    404: "There is no such path or model.",
    405: "The path has other methods.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    422: "The engine cannot work with the request.",
    429: "A limit or a budget of the key is used up, or the gateway is full.",
    502: "The engine stopped before its answer was complete.",
    503: "The engine is not ready.",
}

_SAMPLING: dict[str, Any] = {
    "model": {"type": "string", "maxLength": 200},
    "stream": {"type": "boolean"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": _CHANCE,
    "n": {"type": "integer", "minimum": 1, "maximum": 8},
    "seed": {"type": "integer"},
    "stop": {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 4}]},
    "max_tokens": _COUNT,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": {
            "oneOf": [
                _TEXT,
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                    },
                },
            ]
        },
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_FEEDBACK = {
    "id": {"type": "string", "minLength": 1, "maxLength": 128},
    "score": _CHANCE,
    "label": {"type": "string", "minLength": 1, "maxLength": 64},
    "correction": {"type": "string", "minLength": 1, "maxLength": 100_000},
    "comment": {"type": "string", "minLength": 1, "maxLength": 10_000},
}
_HEARD = {
    "type": "object",
    "required": ["object", "id", "request_id", "created", "is_exportable"],
    "properties": {
        "object": {"const": "feedback"},
        "id": _TEXT,
        "created": _COUNT,
        "is_exportable": {"type": "boolean"},
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT},
}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
_TEXTS = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tunesmith gateway", "version": "1"},
        "security": [{"key": []}, {}],
        "paths": {
            "/healthz": {"get": _get("Whether the gateway is up", {"type": "object"})},
            "/readyz": {"get": _get("Whether the engine answers", {"type": "object"})},
            "/metrics": {"get": _get("Counters for Prometheus", _TEXT, "text/plain")},
            "/openapi.json": {"get": _get("This document", {"type": "object"})},
            "/ui/state": {"get": _get("What the page at /ui shows", {"type": "object"})},
            "/v1/models": {"get": _get("The served models", _MODELS)},
            "/v1/models/{model}": {
                "get": _get("One model", _MODEL)
                | {
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": _TEXT}
                    ]
                }
            },
            "/v1/feedback": {
                "post": _post("Say what an answer was like", ["id"], _FEEDBACK, _HEARD)
            },
            **{f"/v1/{path}": {"post": operation} for path, operation in _answers().items()},
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _answers() -> dict[str, Any]:
    """What the engine answers; its own fields pass through beside those that are named here."""
    chat = {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}}
    return {
        "chat/completions": _post("Answer a conversation", ["messages"], chat | _SAMPLING),
        "completions": _post("Continue a text", ["prompt"], {"prompt": _TEXTS} | _SAMPLING),
        "embeddings": _post(
            "Embed texts", ["input"], {"input": _TEXTS, "model": _SAMPLING["model"]}
        ),
        "responses": _post(
            "Answer by the responses API",
            ["input"],
            {"input": _TEXT, "max_output_tokens": _COUNT}
            | {name: _SAMPLING[name] for name in ("model", "stream", "temperature", "top_p")},
        ),
    }


def _get(summary: str, schema: dict[str, Any], media: str = _JSON) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses({media: {"schema": schema}})}


def _post(
    summary: str,
    required: list[str],
    properties: dict[str, Any],
    answer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    body = {"type": "object", "required": required, "properties": properties}
    content: dict[str, Any] = {_JSON: {"schema": answer or {"type": "object"}}}
    if "stream" in properties:
        content[_EVENTS] = {"schema": {}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
        "responses": _responses(content),
    }


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "Done.", "content": content},
        **{
            str(status): {"description": text, "content": error}
            for status, text in _REFUSALS.items()
        },
    }
