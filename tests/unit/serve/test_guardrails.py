"""Guardrails over HTTP: requests, whole answers and streams of every kind of the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from gateways import Served, asynchronous, before

from tunesmith.config import UserError
from tunesmith.config.schema.guardrail import Guardrail
from tunesmith.serve.guard.rails import Rails

PII: dict[str, Any] = {"name": "pii", "pii": ["email", "card"]}
CARD = "4111 1111 1111 1111"
SECRET = "write to ann@example.com or 4111 1111 1111 1111 today"
MASKED = "write to [email] or [card] today"


class Upstream:
    """Says what it is told to, whole or in pieces of `size` characters."""

    def __init__(self, text: str = SECRET, size: int = 3) -> None:
        self.url, self.is_ready = "", True
        self.text, self.size = text, size
        self.asked: list[dict[str, Any]] = []

    @property
    def server(self) -> Upstream:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if not body.get("stream"):
            return web.json_response(self.whole(request.path))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in self.events(request.path):
            name = f"event: {event['type']}\n" if "type" in event else ""
            await response.write(f"{name}data: {json.dumps(event)}\n\n".encode())
        if not request.path.endswith("responses"):
            await response.write(b"data: [DONE]\n\n")
        return response

    def whole(self, path: str) -> dict[str, Any]:
        usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 9}}
        if path.endswith("chat/completions"):
            call = {
                "id": "call-4111111111111111",
                "function": {"name": "f", "arguments": self.text},
            }
            message = {"role": "assistant", "content": self.text, "tool_calls": [call]}
            told = {"content": [{"token": self.text, "logprob": -0.1}]}
            choice = {"index": 0, "message": message, "logprobs": told, "finish_reason": "stop"}
            return {"id": "c-1", "object": "chat.completion", "choices": [choice], **usage}
        if path.endswith("responses"):
            return {"id": "r-1", **self.response(self.text), **usage}
        choice = {"index": 0, "text": self.text, "finish_reason": "stop", "logprobs": None}
        return {"id": "c-1", "object": "text_completion", "choices": [choice], **usage}

    @staticmethod
    def response(text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text}
        item = {"id": "i-1", "type": "message", "content": [part]}
        return {"object": "response", "status": "completed", "output": [item] if text else []}

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        pieces = [self.text[at : at + self.size] for at in range(0, len(self.text), self.size)]
        usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 9}}
        if path.endswith("responses"):
            yield {"type": "response.created", "sequence_number": 0, "response": self.response("")}
            place = {"item_id": "i-1", "content_index": 0}
            for number, piece in enumerate(pieces, 1):
                kind = "response.output_text.delta"
                yield {"type": kind, **place, "delta": piece, "sequence_number": number}
            number = len(pieces) + 1
            done = {"type": "response.output_text.done", **place, "text": self.text}
            yield done | {"sequence_number": number}
            response = self.response(self.text) | {"id": "r-1"} | usage
            yield {
                "type": "response.completed", "response": response, "sequence_number": number + 1
            }  # fmt: skip
            return
        is_chat = path.endswith("chat/completions")
        form = {"id": "c-1", "object": "chat.completion.chunk" if is_chat else "text_completion"}
        for count, piece in enumerate(pieces, 1):
            text = {"delta": {"content": piece}} if is_chat else {"text": piece}
            told = {"logprobs": {"content": [{"token": piece}]}} if is_chat else {}
            choice = {"index": 0, **text, **told, "finish_reason": None}
            yield form | {"choices": [choice], "usage": {"completion_tokens": count}}
        text = {"delta": {}} if is_chat else {"text": ""}
        choice = {"index": 0, **text, "finish_reason": "stop"}
        yield form | {"choices": [choice], "usage": {"completion_tokens": 9}}
        yield form | {"choices": [], **usage}


async def events_of(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    text = await response.text()
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def text_of(events: Sequence[dict[str, Any]]) -> str:
    parts = []
    for event in events:
        for choice in event.get("choices", ()):
            parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
        if event.get("type", "").endswith(".delta"):
            parts.append(event["delta"])
    return "".join(parts)


def hits(served: Served) -> list[dict[str, Any]]:
    return [json.loads(line["guardrails"] or "[]") for line in served.lines()]


def chat(text: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"json": {"model": "bot", "messages": [{"role": "user", "content": text}]} | fields}


@asynchronous
async def test_what_goes_in_is_masked_wherever_a_model_reads_it() -> None:
    upstream = Upstream("fine")
    parts = [{"type": "text", "text": SECRET}, {"type": "image_url", "image_url": {"url": "u"}}]
    log = {"payload": True}
    async with before(upstream, upstream.answer, guardrails=[PII], log=log) as (served, client):
        for path, body in (
            ("chat/completions", chat(SECRET, user="ann@example.com")["json"]),
            ("chat/completions", chat(parts, stop=["x"])["json"]),
            ("completions", {"prompt": [SECRET, "b"], "stream": True}),
            ("responses", {"input": [{"role": "user", "content": SECRET}], "instructions": SECRET}),
            ("embeddings", {"input": SECRET}),
        ):
            async with client.post(f"/v1/{path}", json=body) as response:
                assert response.status == 200
                await response.read()
        sent = json.dumps(upstream.asked)
        assert CARD not in sent and sent.count("[card]") == 6
        assert upstream.asked[0]["user"] == "ann@example.com"
        assert upstream.asked[1]["messages"][0]["content"][1] == parts[1]
        assert upstream.asked[2]["stream_options"]["include_usage"] is True
        found = hits(served)
        count = {"where": "input", "action": "mask", "count": 1}
        assert found[0] == [{"rule": "pii/email", **count}, {"rule": "pii/card", **count}]
        assert CARD not in "".join(str(line) for line in served.lines())
        async with client.get("/metrics") as response:
            text = await response.text()
        labels = 'action="mask",rule="pii/card",where="input"'
        assert f"tunesmith_guardrail_matches_total{{{labels}}} 6.0" in text


@asynchronous
async def test_what_may_not_go_in_does_not_reach_the_engine() -> None:
    rails = [
        {"name": "topics", "keywords": ["project x"], "action": "block", "routes": ["bot"]},
        {"name": "elsewhere", "keywords": ["project y"], "action": "block", "routes": ["other"]},
    ]
    upstream = Upstream("fine")
    with pytest.raises(UserError, match="elsewhere: there is no route 'other'"):
        async with before(upstream, upstream.answer, guardrails=rails):
            pass
    rails[1]["routes"] = []
    async with before(upstream, upstream.answer, guardrails=rails) as (served, client):
        async with client.post("/v1/chat/completions", **chat("tell of Project X")) as response:
            assert response.status == 400
            error = (await response.json())["error"]
            assert error["code"] == "content_filter" and "topics" in error["message"]
        for path, body in (
            ("completions", {"model": "bot", "prompt": [1, 2, 3]}),
            ("completions", {"prompt_embeds": "AAAA"}),
            ("messages", chat()["json"]),
        ):
            async with client.post(f"/v1/{path}", json=body) as response:
                assert response.status in (400, 403), path
                assert (await response.json())["error"]["code"] == "guardrail"
        assert upstream.asked == []
        async with client.post("/v1/chat/completions", **chat("project y")) as response:
            assert response.status == 200  # that one is for another model
        lines = served.lines()
        assert [line["status"] for line in lines] == [400, 400, 400, 403, 200]
        assert hits(served)[0][0]["action"] == "block"


@asynchronous
async def test_whole_answers_are_masked() -> None:
    upstream = Upstream()
    async with before(upstream, upstream.answer, guardrails=[PII]) as (served, client):
        async with client.post("/v1/chat/completions", **chat()) as response:
            answer = await response.json()
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == MASKED
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["arguments"] == MASKED
            assert call["id"] == "call-4111111111111111"
            assert choice["logprobs"] is None and answer["usage"]["completion_tokens"] == 9
        for path in ("completions", "responses"):
            async with client.post(f"/v1/{path}", json={"prompt": "x", "input": "x"}) as response:
                text = await response.text()
                assert MASKED in text and CARD not in text
        assert [line["output_tokens"] for line in served.lines()] == [9, 9, 9]
        assert {one["count"] for one in hits(served)[0]} == {2}


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_streams_are_masked_over_the_edges_of_their_pieces(path: str, size: int) -> None:
    @asynchronous
    async def check() -> None:
        upstream = Upstream(size=size)
        async with before(upstream, upstream.answer, guardrails=[PII]) as (served, client):
            body = {"stream": True, "prompt": "x", "input": "x", "messages": []}
            async with client.post(f"/v1/{path}", json=body) as response:
                text = await response.text()
                events = await events_of(response)
            assert text_of(events) == MASKED and CARD not in text
            numbers = [one["sequence_number"] for one in events if "sequence_number" in one]
            assert numbers == list(range(len(numbers)))
            (line,) = served.lines()
            assert (line["output_tokens"], line["ending"]) == (9, "complete")
            assert [one["count"] for one in hits(served)[0]] == [1, 1]

    check()


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_that_may_not_come_out_is_ended(path: str, is_stream: bool) -> None:
    rails = [PII | {"action": "block", "where": "output"}]

    @asynchronous
    async def check() -> None:
        upstream = Upstream()
        async with before(upstream, upstream.answer, guardrails=rails) as (served, client):
            body = {"stream": is_stream, "prompt": "x", "input": "x", "messages": []}
            async with client.post(f"/v1/{path}", json=body) as response:
                assert response.status == 200
                text = await response.text()
                if is_stream:  # what came before it stays
                    assert text_of(await events_of(response)) == "write to "
            assert "ann" not in text and "today" not in text and text.count("content_filter") == 1
            (line,) = served.lines()
            assert line["finish_reason"] == "content_filter" and line["output_tokens"] == 9

    check()


@asynchronous
async def test_untouched_answers_are_the_engines_own_bytes() -> None:
    rails = [{"name": "never", "keywords": ["zzz"]}]
    plain, railed = Upstream("quite fine", 20), Upstream("quite fine", 20)
    answers = []
    for upstream, given in ((plain, []), (railed, rails)):
        async with before(upstream, upstream.answer, guardrails=given) as (_, client):
            for stream in (False, True):
                body = {"prompt": "x", "stream": stream}
                async with client.post("/v1/completions", json=body) as response:
                    answers.append(await response.read())
    assert answers[:2] == answers[2:]


@asynchronous
async def test_a_slow_pattern_blocks_its_request_and_holds_up_no_other() -> None:
    rails = [{"name": "slow", "patterns": [r"(?:a|aa)+(?:b|bb)+c$"]}]
    upstream = Upstream("fine")
    async with before(upstream, upstream.answer, guardrails=rails) as (served, client):
        evil = asyncio.create_task(
            client.post("/v1/chat/completions", **chat("a" * 3000 + "b" * 3000 + "d"))
        )
        meanwhile = 0
        while not evil.done():
            async with client.get("/healthz") as response:
                assert response.status == 200
            meanwhile += 1
        assert (await evil).status == 400 and meanwhile >= 10
        assert hits(served)[0][0]["rule"] == "timeout"


def test_what_cannot_be_a_guardrail_is_told() -> None:
    for fields, words in (
        ({}, "keywords, patterns or pii"),
        ({"patterns": ["("]}, "no regular expression"),
        ({"patterns": ["a*"]}, "empty text"),
        ({"name": "Not this"}, "name"),
    ):
        with pytest.raises(ValueError, match=words):
            Guardrail.model_validate({"name": "r", **fields})
    with pytest.raises(UserError, match="serve.guardrails: r"):
        Rails([Guardrail(name="r", patterns=(r"(?x) a # b",))], ["bot"])
