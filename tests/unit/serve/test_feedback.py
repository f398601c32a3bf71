"""What people say of answers, from the request to the rows that a training reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from gateways import ARTIFACT, Served, asynchronous, before
from sqlalchemy.engine import Engine as Database
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.config import DataError, Recipe, UserError
from tunesmith.data.formats import normalise
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages
from tunesmith.serve.feedback.conversations import NotUsableError, read_answer, read_prompt
from tunesmith.serve.feedback.export import run
from tunesmith.serve.govern.archive import archive
from tunesmith.serve.govern.keys import create_key


class Upstream:
    """Answers with its turn: `answer 1`, `answer 2`, …"""

    def __init__(self) -> None:
        self.url, self.is_ready, self.turn = "", True, 0

    @property
    def server(self) -> Upstream:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "bot", "max_model_len": 4096}]})
        body = await request.json()
        self.turn += 1
        form = {"id": f"chatcmpl-{self.turn}", "object": "chat.completion"}
        usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        if not body.get("stream"):
            message = {"role": "assistant", "content": f"answer {self.turn}"}
            choice = {"index": 0, "message": message, "finish_reason": body.get("end", "stop")}
            return web.json_response(form | {"choices": [choice], **usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece, reason in (("ans", None), (f"wer {self.turn}", None), (None, "stop")):
            delta = {"content": piece} if piece else {}
            event = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **usage}
            await response.write(f"data: {json.dumps(form | event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


async def ask(client: aiohttp.ClientSession, text: str, key: str = "", **fields: Any) -> str:
    """The id of the answer."""
    body = {"model": "bot", "messages": [{"role": "user", "content": text}], **fields}
    async with client.post("/v1/chat/completions", json=body, headers=shown(key)) as response:
        assert response.status == 200
        text = await response.text()
    return str(json.loads(text.partition("\n")[0].removeprefix("data: "))["id"])


async def say(client: aiohttp.ClientSession, key: str = "", **word: Any) -> tuple[int, Any]:
    async with client.post("/v1/feedback", json=word, headers=shown(key)) as response:
        return response.status, await response.json()


def shown(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def stages_of(store: Path) -> Stages:
    recipe = Recipe.model_validate(
        {"name": "bot", "store": {"folder": store}, "model": {"base": "x"}, "serve": {}}
    )
    return Stages(recipe, Store.of(recipe))


def read(result: dict[str, Any], name: str = "rows.jsonl") -> list[dict[str, Any]]:
    path = Path(result["file"]).parent / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def held(folder: Path, body: Callable[..., Any], **section: Any) -> None:
    """Run `body(served, client)` before a gateway that keeps its log in `folder`."""

    @asynchronous
    async def go() -> None:
        upstream = Upstream()
        async with before(upstream, upstream.answer, store=folder, **section) as (served, client):
            await body(served, client)

    go()


PAYLOAD = {"payload": True}


def test_from_the_buttons_to_a_data_set(tmp_path: Path) -> None:
    stages = stages_of(tmp_path)
    held_out = {
        "messages": [
            {"role": "user", "content": "held  out"},
            {"role": "assistant", "content": "x"},
        ]
    }
    folder = tmp_path / "artifacts" / "dataset-eval"

    async def use(served: Served, client: aiohttp.ClientSession) -> None:
        good = await ask(client, "one", stream=True)
        assert (await say(client, id=good, score=1, label="up"))[0] == 200
        bad = await ask(client, "two")
        await say(client, id=bad, score=0)
        assert (await say(client, id=bad, correction="better"))[1]["is_exportable"] is True
        await say(client, id=await ask(client, "three"), score=0.2)
        await say(client, id=await ask(client, "held out"), score=1)
        await say(client, id=await ask(client, "cut", end="length"), score=1)
        await say(client, id=await ask(client, "one"), score=0)
        served.settle()
        archive(served.database, served.folder, 3)  # the first lines are in a file now
        await say(client, id=good, comment="said later")

    held(tmp_path, use, log=PAYLOAD)
    with stages.store.write(_evaluation(stages), stages.recipe) as work:
        (work.out / "evaluation.jsonl").write_text(json.dumps(held_out) + "\n")
    assert not folder.exists()
    result = run(stages)
    assert [one["messages"][-1]["content"] for one in read(result)] == ["answer 1", "better"]
    assert result["left_out"] == {
        "in an evaluation set": 1,
        "no correction, and no good score": 2,
        "answer was not complete": 1,
    }
    first, second = read(result, "provenance.jsonl")
    assert first["response_id"] == "chatcmpl-1" and first["artifact"] == ARTIFACT
    assert first["feedback"][0] | {"at_s": 0} == {
        "giver": "", "at_s": 0, "score": 1.0, "label": "up", "comment": "said later",
    }  # fmt: skip
    assert second["is_correction"] is True and second["feedback"][0]["score"] == 0.0
    found = stages.store.get(result["id"])
    assert found.manifest.metrics["rows"] == 2 and stages.store.verify(result["id"])[1] == []
    assert run(stages)["id"] == result["id"]

    pairs = run(stages, kind="preference")
    for row in (*read(result), *read(pairs)):
        normalise(row, "preference" if "chosen" in row else "messages")
    chosen = {row["prompt"][0]["content"]: row["chosen"][0]["content"] for row in read(pairs)}
    rejected = {row["prompt"][0]["content"]: row["rejected"][0]["content"] for row in read(pairs)}
    assert chosen == {"two": "better", "one": "answer 1"}
    assert rejected == {"two": "answer 2", "one": "answer 6"}


def _evaluation(stages: Stages) -> Any:
    from tunesmith.ledger import Draft

    return Draft(kind="dataset", label="data", name="bot", section={})


def test_a_key_speaks_of_its_own_answers_alone() -> None:
    keys: list[str] = []

    def prepare(database: Database) -> None:
        keys.extend(create_key(database, name)[1] for name in ("ann", "ben"))

    async def use(served: Served, client: aiohttp.ClientSession) -> None:
        answer = await ask(client, "one", keys[0])
        assert (await say(client, keys[1], id=answer, score=1))[0] == 404
        assert (await say(client, "", id=answer, score=1))[0] == 401
        status, said = await say(client, keys[0], id=answer, score=1)
        assert (status, said["model"], said["is_exportable"]) == (200, "bot", False)
        assert [line["status"] for line in served.lines()].count(404) == 1

    with TemporaryDirectory() as folder:
        held(Path(folder), use, keys=True, prepare=prepare)


def test_what_is_no_feedback_is_refused() -> None:
    async def use(served: Served, client: aiohttp.ClientSession) -> None:
        answer = await ask(client, "one")
        for word, status in (
            ({"score": 1}, 400), ({"id": answer}, 400), ({"id": "no", "score": 1}, 404),
            ({"id": answer, "score": 2}, 400), ({"id": answer, "score": True}, 400),
            ({"id": answer, "label": ""}, 400), ({"id": answer, "comment": 1}, 400),
            ({"id": answer, "scor": 1}, 400), ({"id": "x" * 200, "score": 1}, 400),
        ):  # fmt: skip
            found, body = await say(client, **word)
            assert found == status and body["error"]["message"], word
        async with client.get("/v1/feedback") as response:
            assert response.status == 405

    with TemporaryDirectory() as folder:
        held(Path(folder), use)


def test_without_kept_bodies_the_export_says_what_to_do(tmp_path: Path) -> None:
    stages = stages_of(tmp_path)
    with pytest.raises(DataError, match="no feedback yet"):
        run(stages)

    async def use(served: Served, client: aiohttp.ClientSession) -> None:
        await say(client, id=await ask(client, "one"), score=1)

    held(tmp_path, use)
    with pytest.raises(UserError, match="serve.log.payload is off"):
        run(stages)
    with pytest.raises(UserError, match="messages and preference"):
        run(stages, kind="sft")


def test_the_command_says_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    store = tmp_path / "store"
    recipe.write_text(f"name: bot\nmodel: {{base: x}}\nstore: {{folder: {store}}}\nserve: {{}}\n")
    done = CliRunner().invoke(app, ["feedback", "export", str(recipe)])
    assert done.exit_code != 0 and isinstance(done.exception, DataError)


def test_only_whole_conversations_become_rows() -> None:
    user = {"role": "user", "content": "a"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompt, _ = read_prompt(
        "chat/completions", json.dumps({"messages": [user | {"content": parts}]})
    )
    assert prompt == [{"role": "user", "content": "ab"}]
    prompt, _ = read_prompt("responses", json.dumps({"input": "a", "instructions": "be"}))
    assert [one["role"] for one in prompt] == ["system", "user"]
    done = {"status": "completed", "output": [{"type": "message", "content": parts}]}
    event = json.dumps({"type": "response.completed", "response": done})
    assert read_answer("responses", f"event: response.completed\ndata: {event}")["content"] == "ab"
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    for body, reason in (
        (None, "not kept"), ('{"messages": [', "cut"), ("{}", "no conversation"),
        (json.dumps(image), "only text"),
    ):  # fmt: skip
        with pytest.raises(NotUsableError, match=reason):
            read_prompt("chat/completions", body)
    for body, reason in (
        ("data: {}\n\ndata: [DONE]", "not one"), ('{"choices": []}', "not one"),
        ('{"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}', "empty"),
    ):  # fmt: skip
        with pytest.raises(NotUsableError, match=reason):
            read_answer("chat/completions", body)


def test_two_who_speak_at_once_are_both_heard() -> None:
    async def use(served: Served, client: aiohttp.ClientSession) -> None:
        answers = [await ask(client, str(at)) for at in range(20)]
        found = await asyncio.gather(*(say(client, id=one, score=1) for one in answers))
        assert {status for status, _ in found} == {200}

    with TemporaryDirectory() as folder:
        held(Path(folder), use)
