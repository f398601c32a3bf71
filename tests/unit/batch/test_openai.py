"""Lines of the OpenAI Batch API are read strictly, and what is written parses as the API's."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from tunesmith.batch.answers import Origin
from tunesmith.batch.completions import output_line
from tunesmith.batch.errors import Invalid
from tunesmith.batch.openai import CHAT, COMPLETIONS, EMBEDDINGS, ask_of_call
from tunesmith.batch.requests import Ask
from tunesmith.batch.results import result_of
from tunesmith.batch.rows import Row, find_form, read_rows
from tunesmith.batch.shards import to_line
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import Answer, Output

USER = [{"role": "user", "content": "Hi"}]


def call(url: str = CHAT, **body: Any) -> dict[str, Any]:
    body = {"messages": USER, **body} if url == CHAT else body
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **body}}


def ask(columns: dict[str, Any], **keys: Any) -> Ask:
    section = Batch(input="i", output="o", **keys)
    return ask_of_call(columns, section, embeds=columns.get("url") == EMBEDDINGS)


def test_a_chat_is_sampled_as_the_api_or_the_recipe_says() -> None:
    assert ask(call()) == Ask(messages=USER, sampling={"temperature": 1.0})
    assert ask(call(), temperature=0.0, max_tokens=5).sampling == {
        "temperature": 0.0,
        "max_tokens": 5,
    }
    body: dict[str, Any] = {
        "max_tokens": 3,
        "max_completion_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": -1,
        "stop": "x",
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"5": -100},
        "presence_penalty": 1,
        "top_k": 5,
        "ignore_eos": True,
        "user": "me",
        "stream": False,
        "metadata": {},
        "response_format": {"type": "json_object"},
    }
    assert ask(call(**body)).sampling == {
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": -1,
        "stop": ["x"],
        "logprobs": 3,
        "logit_bias": {"5": -100.0},
        "presence_penalty": 1.0,
        "top_k": 5,
        "ignore_eos": True,
        "structured_outputs": {"json_object": True},
    }
    assert ask(call(logprobs=True)).sampling["logprobs"] == 0
    assert ask(call(model="formal"), adapters={"formal": "adapter-1"}).adapter == "formal"
    assert ask(call(model="other"), adapters={"formal": "adapter-1"}).adapter is None


@pytest.mark.parametrize("value", ["x", ["x", "y"], [1, 2], [[1, 2], [3]], ["x", [4]]])
def test_prompts_and_inputs_are_texts_or_tokens(value: Any) -> None:
    is_one = isinstance(value, str) or isinstance(value[0], int)
    wanted = (value,) if is_one else tuple(value)
    assert ask(call(COMPLETIONS, prompt=value)).prompts == wanted
    assert ask(call(COMPLETIONS, prompt="x")).sampling["max_tokens"] == 16
    found = ask(call(EMBEDDINGS, input=value, dimensions=4))
    assert (found.prompts, found.kind, found.sampling) == (wanted, "embed", {"dimensions": 4})


@pytest.mark.parametrize(
    ("columns", "kind", "words"),
    [
        (call() | {"method": "GET"}, "unsupported_request", "method must be POST"),
        (call() | {"url": "/v1/rerank"}, "unsupported_request", "url must be one of"),
        (call() | {"custom_id": 3}, "invalid_id", "custom_id"),
        (call() | {"body": "x"}, "invalid_parameter", "body must be an object"),
        (call(stream=True), "unsupported_request", "stream"),
        (call(temprature=1), "unsupported_request", "temprature: no parameter"),
        (call(tools=[{"type": "function"}]), "unsupported_request", "tools"),
        (call(messages="x"), "invalid_messages", "messages must be a list"),
        (call(temperature="hot"), "invalid_parameter", "temperature"),
        (call(n=2, temperature=0), "invalid_parameter", "n above 1"),
        (call(COMPLETIONS, prompt=[5, 2**31]), "missing_prompt", "token ids"),
        (call(top_logprobs=2), "invalid_parameter", "top_logprobs needs"),
        (call(logprobs=True, top_logprobs=21), "invalid_parameter", "at most 20"),
        (call(logprobs=3), "invalid_parameter", "true or false"),
        (call(logit_bias={"a": 1}), "invalid_parameter", "logit_bias"),
        (call(response_format={"type": "xml"}), "invalid_schema", "response_format"),
        (call(COMPLETIONS, prompt=""), "missing_prompt", "prompt must be"),
        (call(COMPLETIONS, prompt=[]), "missing_prompt", "prompt must be"),
        (call(COMPLETIONS, prompt="x", echo=True), "unsupported_request", "echo"),
        (call(EMBEDDINGS, input=[[]]), "missing_prompt", "input must be"),
        (call(EMBEDDINGS, input="x", encoding_format="hex"), "invalid_parameter", "encoding"),
    ],
)
def test_each_fault_of_a_request_has_its_type(columns: Any, kind: str, words: str) -> None:
    with pytest.raises(Invalid, match=words) as caught:
        ask(columns)
    assert caught.value.error.type == kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["messages", "prompt", "input", "n", "stop", "logprobs", "top_logprobs", "logit_bias", "seed"]
    + ["temperature", "response_format", "structured_outputs", "tools", "max_tokens", "bad_words"]
)


@given(st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS]), st.dictionaries(NAMES, JSON))
def test_any_body_is_an_ask_or_a_fault(url: str, body: dict[str, Any]) -> None:
    columns = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    try:
        found = ask(columns)
    except Invalid as invalid:
        assert invalid.error.detail
    else:
        assert found.messages or found.prompts


def test_the_first_good_row_says_what_a_file_is(tmp_path: Any) -> None:
    def form(*rows: Any, **keys: Any) -> tuple[bool, bool]:
        path = tmp_path / "in.jsonl"
        path.write_bytes(b"{bad\n" + b"".join(map(to_line, rows)))
        found = find_form(Batch(input=str(path), output="o", **keys))
        return found.is_openai, found.embeds

    assert form(call()) == (True, False)
    assert form(call(EMBEDDINGS, input="x"), call()) == (True, True)
    assert form({"prompt": "x"}) == (False, False)
    assert form({"prompt": "x"}, task="embed") == (False, True)
    assert form(call(), format="columns") == (False, False)
    form(call(EMBEDDINGS, input="x"), call() | {"custom_id": "b"}, call() | {"custom_id": "a"})
    rows = list(read_rows(Batch(input=str(tmp_path / "in.jsonl"), output="o")))
    assert [row.id for row in rows] == ["line-1", "a", "b", "a"]
    kinds = [row.error.type if row.error else None for row in rows]
    assert kinds == ["malformed_line", None, "unsupported_request", "unsupported_request"]


def line(columns: dict[str, Any], answer: Answer) -> dict[str, Any]:
    row = Row(0, 1, "a", columns, ask(columns))
    made = output_line(row, result_of(answer), Origin("tuned-1", created=5, fingerprint="vllm-1"))
    assert made["custom_id"] == "a" and made["error"] is None
    assert made["response"]["status_code"] == 200 and made["response"]["request_id"]
    body: dict[str, Any] = made["response"]["body"]
    return body


def test_answers_parse_as_the_clients_types() -> None:
    top = [{"token": "Hé", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
    logprobs = [{**top[0], "top": top}, {**top[1], "top": top}]
    outputs = [Output("Hé", "stop", 2, logprobs), Output("b", "length", 2)]
    answer = Answer(7, 3, outputs)
    chat = ChatCompletion.model_validate(
        line(call(logprobs=True, top_logprobs=1), answer), strict=True
    )
    assert [choice.message.content for choice in chat.choices] == ["Hé", "b"]
    assert chat.choices[1].finish_reason == "length" and chat.model == "tuned-1"
    assert chat.system_fingerprint == "vllm-1"
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and content[0].bytes == list("Hé".encode())
    assert [one.token for one in content[1].top_logprobs] == ["Hé"]
    assert chat.usage and chat.usage.total_tokens == 11
    assert chat.usage.prompt_tokens_details and chat.usage.prompt_tokens_details.cached_tokens == 3
    text = Completion.model_validate(line(call(COMPLETIONS, prompt="x", logprobs=2), answer))
    found = text.choices[0].logprobs
    assert found and found.text_offset == [0, 2] and found.token_logprobs == [-0.5, -1.0]
    assert found.top_logprobs and found.top_logprobs[0] == {"Hé": -0.5, "b": -1.0}


def test_embeddings_parse_as_the_clients_types() -> None:
    answer = Answer(4, 0, embeddings=[[0.5, -1.0], [1.0, 0.0]])
    body = line(call(EMBEDDINGS, input=["x", "y"]), answer)
    found = CreateEmbeddingResponse.model_validate(body)
    assert [one.embedding for one in found.data] == answer.embeddings
    assert [one.index for one in found.data] == [0, 1] and found.usage.prompt_tokens == 4
    packed = line(call(EMBEDDINGS, input=["x", "y"], encoding_format="base64"), answer)
    assert struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"])) == (0.5, -1.0)


def test_a_row_without_an_answer_has_the_status_that_the_api_gives_it() -> None:
    row = Row(3, 4, "line-4", {}, Ask())
    made = output_line(row, {"error": {"type": "malformed_line", "detail": "d"}}, Origin("t"))
    assert made["custom_id"] == "line-4" and made["response"]["status_code"] == 400
    assert made["response"]["body"]["error"]["code"] == "malformed_line"
    assert made["error"] == {"code": "malformed_line", "message": "d"}
    again = output_line(row, {"error": {"type": "malformed_line", "detail": "d"}}, Origin("t"))
    assert again == made
