"""What a request asks for and what its answer used, read from the bytes that pass by. Pure.

Engines tell the tokens of a stream only when asked, so streams are always asked for them, and
vLLM's with every piece: then a client that leaves in the middle is charged what the engine did for
it. What the client did not ask for is cut out again, and all other bytes are those of the engine,
with LF at the ends of lines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeGuard

_USAGE = b'"usage":'
_DONE = b"[DONE]"
_DATA = b"data:"


@dataclass(frozen=True)
class Ask:
    """What matters of a request's body."""

    body: bytes
    """As the client sent it."""

    fields: dict[str, Any] = field(default_factory=dict)
    """The body as JSON; empty when it is not an object."""

    is_stream: bool = False
    wants_usage: bool = False
    """Whether the client itself asked for the usage at the end of the stream."""

    wants_every_usage: bool = False
    """Whether it asked for it with every piece."""

    adds_usage: bool = False
    """Whether an engine is asked for the usage of the stream in any case."""

    def sent(self, model: str, *, to_vllm: bool) -> bytes:
        """The body for an upstream where the model is called `model`; the client's own bytes where
        nothing of them has to change."""
        changed: dict[str, Any] = {}
        if self.fields and self.fields.get("model") != model:
            changed["model"] = model
        if self.adds_usage:
            added = {"include_usage": True} | ({"continuous_usage_stats": True} if to_vllm else {})
            changed["stream_options"] = (self.fields.get("stream_options") or {}) | added
        return json.dumps(self.fields | changed).encode() if changed else self.body

    @property
    def model(self) -> str | None:
        found = self.fields.get("model")
        return found if isinstance(found, str) else None

    @property
    def most_output_tokens(self) -> int | None:
        """The limit that the client set; None where the engine's own holds."""
        for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
            if _is_count(found := self.fields.get(name)):
                return found
        return None

    @property
    def choices(self) -> int:
        """Answers per request."""
        found = self.fields.get("n")
        return found if _is_count(found) and found > 0 else 1


def read_ask(path: str, body: bytes) -> Ask:
    """Raises nothing: what is not understood goes to the engine as it is, which says what is wrong.

    `path` is what follows `/v1/`.
    """
    try:
        fields = json.loads(body.decode())
    except (ValueError, RecursionError):
        return Ask(body)
    if not isinstance(fields, dict):
        return Ask(body)
    if fields.get("stream") is not True:
        return Ask(body, fields)
    options = fields.get("stream_options")
    if path == "responses" or not isinstance(options, dict | None):
        return Ask(body, fields, is_stream=True, wants_usage=True, wants_every_usage=True)
    wanted = options or {}
    return Ask(
        body,
        fields,
        is_stream=True,
        wants_usage=wanted.get("include_usage") is True,
        wants_every_usage=wanted.get("continuous_usage_stats") is True,
        adds_usage=True,
    )


@dataclass(slots=True)
class Usage:
    """What an answer used, as far as it is known."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    is_known: bool = False
    pieces: int = 0
    """Pieces of a stream that came with a choice: about one for each token."""

    response_id: str | None = None
    finish_reason: str | None = None
    error: bool = False
    """Whether the stream told of an error."""

    is_done: bool = False
    """Whether the stream came to its end; clients may leave as soon as they have read that."""

    def note(self, answer: dict[str, Any]) -> None:
        """Take over what one JSON object of the engine says."""
        self.error = self.error or "error" in answer and answer["error"] is not None
        inner = answer.get("response")
        answer = inner if isinstance(inner, dict) else answer
        if isinstance(found := answer.get("id"), str):
            self.response_id = found
        choices = answer.get("choices")
        self.pieces += bool(choices)
        for choice in choices if isinstance(choices, list) else ():
            reason = choice.get("finish_reason") if isinstance(choice, dict) else None
            self.finish_reason = reason if isinstance(reason, str) else self.finish_reason
        if not isinstance(usage := answer.get("usage"), dict):
            return
        self.is_known = True
        self.prompt_tokens = _count(usage, "prompt_tokens", "input_tokens")
        self.output_tokens = _count(usage, "completion_tokens", "output_tokens")
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.cached_tokens = _count(details, "cached_tokens")


class EventReader:
    """Server-sent events: notes what they say, and gives back what the client is to get."""

    def __init__(self, ask: Ask, usage: Usage) -> None:
        self._ask, self._usage = ask, usage
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Whole events of `chunk` and what was left before it."""
        given = self._rest + chunk
        if b"\r" in given:  # as some APIs end their lines
            given = given.replace(b"\r\n", b"\n")
        whole, end, self._rest = given.rpartition(b"\n\n")
        if not end:
            return b""
        return b"".join(self._event(event) for event in whole.split(b"\n\n"))

    def close(self) -> bytes:
        """What came after the last whole event."""
        rest, self._rest = self._rest, b""
        return rest

    def _event(self, event: bytes) -> bytes:
        whole = event + b"\n\n"
        _, found, payload = event.partition(_DATA)
        payload = payload.strip()
        if payload == _DONE:
            self._usage.is_done = True
        if not found or payload == _DONE:
            return whole
        try:
            answer = json.loads(payload)
        except ValueError:
            return whole
        if not isinstance(answer, dict):
            return whole
        self._usage.note(answer)
        if "usage" not in answer:
            return whole
        is_last = answer.get("choices") == []
        if self._ask.wants_every_usage or (is_last and self._ask.wants_usage):
            return whole
        return b"" if is_last else _without_usage(event) + b"\n\n"


def read_answer(body: bytes, usage: Usage) -> None:
    """Note what a whole JSON answer says."""
    try:
        answer = json.loads(body)
    except ValueError:
        return
    if isinstance(answer, dict):
        usage.note(answer)


def _without_usage(event: bytes) -> bytes:
    """The event less its `usage`, every other byte as it was."""
    at = event.rindex(_USAGE)
    text = event[at + len(_USAGE) :].decode()
    start = len(text) - len(text.lstrip())
    _, end = json.JSONDecoder().raw_decode(text, start)
    before, after = event[:at].rstrip(), text[end:].encode()
    if before.endswith(b","):
        return before[:-1] + after
    return before + after.lstrip(b" ,")


def _count(found: Any, *names: str) -> int:
    for name in names:
        if isinstance(found, dict) and _is_count(found.get(name)):
            return int(found[name])
    return 0


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
