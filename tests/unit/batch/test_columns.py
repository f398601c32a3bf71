"""What a row of columns asks for, by templates and by its own settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunesmith.batch.answers import Origin, output_row
from tunesmith.batch.columns import ask_of_columns
from tunesmith.batch.errors import Invalid
from tunesmith.batch.requests import Ask
from tunesmith.batch.results import result_of, share_seconds
from tunesmith.batch.rows import Row
from tunesmith.batch.values import fill
from tunesmith.config.schema.batch import Batch, template_faults
from tunesmith.engine import Answer, Output


def ask(columns: dict[str, Any], **keys: Any) -> Ask:
    return ask_of_columns(columns, Batch(input="i.jsonl", output="o.jsonl", **keys))


def test_templates_make_prompts_and_conversations() -> None:
    row = {"text": "Rain.", "lang": "German", "list": [1, "é"]}
    assert ask(row, prompt="{{x}} {text} {list}", raw=True).prompts == ('{x} Rain. [1, "é"]',)
    user = {"role": "user", "content": "Say Rain."}
    assert ask(row, prompt="Say {text}").messages == [user]
    system = {"role": "system", "content": "Speak German"}
    assert ask(row, prompt="Say {text}", system="Speak {lang}").messages == [system, user]
    turns = [{"role": "user", "content": "{text}"}, {"role": "assistant", "content": "Hm."}, user]
    written = ask(row, messages=turns).messages
    assert written == [{"role": "user", "content": "Rain."}, turns[1], user]
    chat = {"talk": json.dumps([user]), "prompt": "not this"}
    assert ask(chat, messages="talk", system="Hi").messages == [
        {"role": "system", "content": "Hi"},
        user,
    ]
    own = {"messages": [{"role": "system", "content": "mine"}, {**user, "name": None}]}
    assert ask(own, system="yours").messages == [own["messages"][0], user]


def test_each_task_asks_the_engine_in_its_way() -> None:
    one = ask({"prompt": "p"}, task="classify", labels=["yes", "no"])
    assert (one.kind, one.completions, one.sampling) == ("score", ("yes", "no"), {})
    two = ask({"prompt": "p", "a": "b"}, task="score", completion="<{a}>", raw=True)
    assert (two.kind, two.prompts, two.completions) == ("score", ("p",), ("<b>",))
    three = ask({"text": "p"}, task="embed", prompt="{text}")
    assert (three.kind, three.prompts, three.messages) == ("embed", ("p",), None)


def test_a_row_has_the_last_word_on_how_it_is_sampled() -> None:
    keys: dict[str, Any] = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"]}
    plain = ask({"prompt": "p"}, **keys)
    assert plain.sampling == {**keys, "stop": ["\n"]}
    own = {"max_tokens": "3", "temperature": 1, "top_p": 1, "seed": 7.0, "stop": "."}
    assert ask({"prompt": "p", **own}, **keys).sampling == {
        "max_tokens": 3,
        "temperature": 1.0,
        "seed": 7,
        "stop": ["."],
    }
    assert ask({"prompt": "p"}).sampling == {"max_tokens": 128, "temperature": 0.0}
    assert ask({"prompt": "p"}, n=2, temperature=1.0).sampling["n"] == 2
    assert ask({"prompt": "p", "adapter": "formal"}).adapter == "formal"


@pytest.mark.parametrize(
    ("own", "recipe", "wanted"),
    [
        (None, {"choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        (None, {"regex": "a+"}, {"regex": "a+"}),
        (None, {"json_schema": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"structured_outputs": {"regex": "b"}}, {"regex": "a"}, {"regex": "b"}),
        ({"structured_outputs": '{"json": {}}'}, None, {"json": {}}),
        ({"response_format": {"type": "json_object"}}, None, {"json_object": True}),
        ({"response_format": {"type": "text"}}, {"regex": "a"}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
            None,
            {"json": {"a": 1}},
        ),
    ],
)
def test_answers_can_be_held_to_a_form(own: Any, recipe: Any, wanted: Any) -> None:
    found = ask({"prompt": "p", **(own or {})}, structured=recipe)
    assert found.sampling.get("structured_outputs") == wanted


@pytest.mark.parametrize(
    ("row", "keys", "kind"),
    [
        ({"text": None}, {"prompt": "{text}"}, "missing_column"),
        ({}, {"messages": "talk"}, "missing_column"),
        ({"talk": "[{]"}, {"messages": "talk"}, "invalid_messages"),
        ({"text": ""}, {"prompt": "{text}"}, "missing_prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, {"raw": True}, "invalid_messages"),
        ({"prompt": "p"}, {"task": "score"}, "missing_column"),
        ({"prompt": "p", "completion": ""}, {"task": "score"}, "missing_column"),
        ({"prompt": "p", "adapter": 3}, {}, "unknown_adapter"),
        ({"prompt": "p", "top_p": 0}, {}, "invalid_parameter"),
        ({"prompt": "p", "top_p": 1.5}, {}, "invalid_parameter"),
        ({"prompt": "p", "seed": -1}, {}, "invalid_parameter"),
        ({"prompt": "p", "stop": [1]}, {}, "invalid_parameter"),
        ({"prompt": "p", "temperature": 0}, {"n": 2, "temperature": 1}, "invalid_parameter"),
        ({"prompt": "p", "structured_outputs": {"jsn": {}}}, {}, "invalid_schema"),
        ({"prompt": "p", "structured_outputs": {"json": 3}}, {}, "invalid_schema"),
        ({"prompt": "p", "structured_outputs": {"choice": []}}, {}, "invalid_schema"),
        ({"prompt": "p", "structured_outputs": {"regex": 1}}, {}, "invalid_schema"),
        ({"prompt": "p", "response_format": {"type": "json_schema"}}, {}, "invalid_schema"),
    ],
)
def test_what_a_row_lacks_has_its_type(row: Any, keys: dict[str, Any], kind: str) -> None:
    with pytest.raises(Invalid) as caught:
        ask(row, **keys)
    assert caught.value.error.type == kind


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"prompt": "a { b"}, "a brace is alone"),
        ({"prompt": "{}"}, "names no column"),
        ({"prompt": "a", "messages": "b"}, "two ways"),
        ({"raw": True, "system": "a"}, "raw prompts have no messages"),
        ({"task": "classify"}, "labels are given exactly when"),
        ({"labels": ["a", "b"]}, "labels are given exactly when"),
        ({"task": "classify", "labels": ["a", "a"]}, "twice"),
        ({"task": "embed", "temperature": 1.0}, "temperature is for answers"),
        ({"task": "score", "structured": {"regex": "a"}}, "structured is for answers"),
        ({"completion": "{a}"}, "task: score only"),
        ({"n": 2}, "needs a temperature above 0"),
        ({"n": 2, "temperature": 0.0}, "needs a temperature above 0"),
        ({"structured": {"regex": "a", "choice": ["a"]}}, "exactly one"),
        ({"structured": {}}, "exactly one"),
        ({"format": "openai", "prompt": "a"}, "says itself"),
        ({"format": "openai", "task": "embed"}, "says itself"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last one cannot be"),
        ({"rows_per_file": 5, "output": "folder"}, "rows_per_file needs"),
    ],
)
def test_keys_that_do_not_go_together_are_errors_of_the_recipe(
    keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        Batch(**{"input": "i", "output": "o", **keys})


@given(st.text(alphabet="ab{}", max_size=8))
def test_a_template_without_faults_can_be_filled(template: str) -> None:
    if not list(template_faults(template)):
        columns = dict.fromkeys(["a", "b", "ab", "ba", "aa", "bb"], "{a}")
        try:
            text = fill(template, columns)
        except Invalid as error:
            assert error.error.type == "missing_column"
        else:
            assert len(text) <= 3 * len(template)


def answered(**values: Any) -> dict[str, Any]:
    return {**result_of(Answer(10, 4, **values)), "device_s": 0.5}


def test_the_output_says_what_each_task_is_for() -> None:
    origin = Origin("tuned-1", {"formal": "adapter-2"}, usd_per_s=0.01)
    row = Row(0, 1, "a", {"id": "a", "model": "mine"}, Ask(adapter="formal"))

    def columns(result: dict[str, Any], **keys: Any) -> dict[str, Any]:
        return output_row(row, result, Batch(input="i", output="o", **keys), origin)

    outputs = [Output("x", "stop", 2), Output("y", "length", 3)]
    made = columns(answered(outputs=outputs), n=2, temperature=1.0)
    assert made == {
        "id": "a",
        "answer": "x",
        "finish_reason": "stop",
        "answers": ["x", "y"],
        "finish_reasons": ["stop", "length"],
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 5,
        "cost_usd": 0.005,
        "model": "adapter-2",
        "error": None,
        "input_model": "mine",
    }
    made = columns(answered(scores=[[-1.0, -1.0], [-2.0]]), task="classify", labels=["p", "q"])
    assert made["answer"] == "p" and made["logprobs"] == {"p": -2.0, "q": -2.0}
    assert made["probabilities"] == {"p": 0.5, "q": 0.5}
    made = columns(answered(scores=[[-1.0, -0.5]]), task="score")
    assert (made["logprob"], made["scored_tokens"]) == (-1.5, 2)
    assert columns(answered(embeddings=[[0.5]]), task="embed")["embedding"] == [0.5]
    failed = columns({"error": {"type": "refused", "detail": "d"}, "device_s": 0.5}, task="embed")
    assert failed["embedding"] is None and failed["model"] is None


def test_time_of_a_shard_is_shared_by_work_and_adds_up() -> None:
    results = [answered(outputs=[Output("x", "stop", 6)]), answered(), {"error": {}}]
    shares = share_seconds(results, 3.6)
    assert shares == pytest.approx([3.0, 0.6, 0.0])
    assert share_seconds([{"error": {}}] * 2, 1.0) == [0.5, 0.5]
