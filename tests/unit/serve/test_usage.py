"""What the gateway reads from requests and answers, and that it changes nothing else of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.serve.govern.usage import Ask, EventReader, Usage, read_answer, read_ask

FULL = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def piece(text: str, tokens: int) -> dict[str, Any]:
    """A piece as vLLM writes it: what is before the usage, and the usage."""
    return {"id": "c-1", "choices": [{"index": 0, "delta": {"content": text}}]} | {
        "usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    }


def plain(fields: dict[str, Any]) -> bytes:
    return event(**{name: value for name, value in fields.items() if name != "usage"})


PIECES = [piece('say "usage":1, ok', 1), piece("é", 2)]
LAST = {"id": "c-1", "choices": [], "usage": FULL}


def read(options: dict[str, Any] | None, cuts: list[int]) -> tuple[bytes, Usage]:
    body: dict[str, Any] = {"model": "m", "stream": True}
    if options is not None:
        body["stream_options"] = options
    ask, usage = read_ask("chat/completions", json.dumps(body).encode()), Usage()
    sent = json.loads(ask.sent("m", to_vllm=True))["stream_options"]
    assert sent["include_usage"] and sent["continuous_usage_stats"]
    elsewhere = json.loads(ask.sent("there", to_vllm=False))
    assert elsewhere["model"] == "there" and elsewhere["stream_options"]["include_usage"]
    assert ask.wants_every_usage or "continuous_usage_stats" not in elsewhere["stream_options"]
    reader = EventReader(ask, usage)
    raw = b"".join(event(**one) for one in (*PIECES, LAST)) + b"data: [DONE]\n\n"
    edges = [0, *sorted(cut % len(raw) for cut in cuts), len(raw)]
    passed = b"".join(reader.feed(raw[a:b]) for a, b in zip(edges, edges[1:], strict=False))
    return passed + reader.close(), usage


@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_a_client_gets_the_usage_that_it_asked_for_and_no_other(cuts: list[int]) -> None:
    done = b"data: [DONE]\n\n"
    for options, expected in [
        (None, b"".join(plain(one) for one in PIECES) + done),
        ({"include_usage": True}, b"".join(plain(one) for one in PIECES) + event(**LAST) + done),
        (
            {"include_usage": True, "continuous_usage_stats": True},
            b"".join(event(**one) for one in (*PIECES, LAST)) + done,
        ),
    ]:
        passed, usage = read(options, cuts)
        assert passed == expected
        assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (7, 2, 4)
        assert usage.is_known and usage.response_id == "c-1"


def test_a_stream_that_is_left_is_known_up_to_the_last_piece() -> None:
    usage = Usage()
    reader = EventReader(Ask(b"", is_stream=True), usage)
    reader.feed(event(**PIECES[0]) + event(**PIECES[1])[:-5])
    assert usage.is_known and usage.output_tokens == 1


def test_errors_and_reasons_are_noted() -> None:
    usage = Usage()
    reader = EventReader(Ask(b"", is_stream=True), usage)
    reader.feed(event(choices=[{"index": 0, "finish_reason": "length"}]))
    assert usage.finish_reason == "length" and not usage.error
    raw = event(error={"message": "gone"})
    assert reader.feed(raw) == raw and usage.error


@pytest.mark.parametrize(
    ("answer", "prompt", "cached", "output"),
    [
        ({"usage": FULL, "choices": [{"finish_reason": "stop"}]}, 7, 4, 2),
        ({"usage": {"input_tokens": 3, "output_tokens": 5}}, 3, 0, 5),
        ({"usage": {"prompt_tokens": 3, "total_tokens": 3}, "data": []}, 3, 0, 0),
        ({"usage": None}, 0, 0, 0),
    ],
)
def test_whole_answers(answer: dict[str, Any], prompt: int, cached: int, output: int) -> None:
    usage = Usage()
    read_answer(json.dumps(answer).encode(), usage)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (
        prompt,
        cached,
        output,
    )


@given(st.binary(max_size=60))
def test_what_is_not_understood_goes_through_as_it_is(body: bytes) -> None:
    ask = read_ask("chat/completions", body)
    assert ask.sent("m", to_vllm=True) == ask.body == body and not ask.is_stream
    reader = EventReader(ask, Usage())
    assert reader.feed(body) + reader.close() == body.replace(b"\r\n", b"\n")


@pytest.mark.parametrize("body", [{"stream": 1}, {"stream": False, "n": -1}, {"max_tokens": "x"}])
def test_odd_fields_are_the_engines_to_refuse(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    ask = read_ask("completions", raw)
    assert ask.body == raw and ask.choices == 1 and ask.most_output_tokens is None


def test_lines_that_end_like_those_of_windows_are_events_at_once() -> None:
    usage = Usage()
    reader = EventReader(Ask(b"", is_stream=True, wants_usage=True), usage)
    stream = b'data: {"id": "r-1", "choices": [{"index": 0}]}\r\n\r\ndata: [DONE]\r\n\r\n'
    found = [reader.feed(stream[at : at + 1]) for at in range(len(stream))]
    assert [one for one in found if one] == [
        b'data: {"id": "r-1", "choices": [{"index": 0}]}\n\n',
        b"data: [DONE]\n\n",
    ]
    assert usage.is_done and usage.response_id == "r-1"
