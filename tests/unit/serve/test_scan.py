"""What guardrails find in a text, and that pieces of it are masked as the whole is."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.schema.guardrail import Guardrail
from tunesmith.serve.guard.scan import WINDOW, Matcher, Scanner, compile_rail, mask

PII = ("email", "phone", "card", "iban", "ip")
REAL = {
    "email": ["ann@example.com", "a.b+c@mail.example.co.uk", "x@münchen.de"],
    "phone": ["+49 171 1234567", "+1 (555) 010-9999", "(555) 123-4567", "555-123-4567",
              "030 1234567"],
    "card": ["4111 1111 1111 1111", "4111-1111-1111-1111", "378282246310005", "3782 822463 10005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO93 8601 1117 947"],
    "ip": ["192.168.0.1", "2001:db8::1", "fe80:0:0:0:1:2:3:4", "::ffff:10.0.0.1"],
}  # fmt: skip
NONE = [
    "std::vector<int> a::b", "12:30:45", "version 1.2.3 of 2024-01-02", "1,234,567.89", "1 000 000",
    "4111 1111 1111 1112", "DE88370400440532013000", "me@home", "@user and a @ b", "256.1.1.1",
    "f(x)[0]: 12345", "01/02/2024", "8080:80",
]  # fmt: skip


def later() -> float:
    return time.monotonic() + 30


def rail(**fields: object) -> list[Matcher]:
    return compile_rail(Guardrail.model_validate({"name": "r", **fields}))


@pytest.mark.parametrize("kind", PII)
def test_personal_data_is_found_where_it_is(kind: str) -> None:
    matchers = rail(pii=[kind])
    for text in REAL[kind]:
        for before, after in (("", ""), ("to ", " now"), ("(", ")."), ("a:\n", ",\nb"), ('"', '"')):
            changed, _ = mask(before + text + after, matchers, later())
            assert changed == f"{before}[{kind}]{after}", text


def test_what_only_looks_alike_is_left() -> None:
    matchers = rail(pii=PII)
    for text in NONE:
        assert mask(text, matchers, later())[0] == text


def test_keywords_are_whole_words_in_any_case() -> None:
    matchers = rail(keywords=["Project X", "tea", "ärger"])
    text = "project\n x, Teapot, TEA! team tea ÄRGER"
    assert mask(text, matchers, later())[0] == "[r], Teapot, [r]! team [r] [r]"


def test_overlapping_matches_become_one_mask() -> None:
    matchers = rail(patterns=["abc"]) + compile_rail(
        Guardrail(name="s", patterns=("cde",), action="mask")
    )
    changed, scanner = mask("xabcdex", matchers, later())
    assert changed == "x[r]x"
    assert [one.matcher.rule for one in scanner.found] == ["r", "s"]


def test_a_block_ends_the_text_before_the_match() -> None:
    matchers = rail(keywords=["stop"], action="block")
    scanner = Scanner(matchers)
    assert scanner.feed("go on, st", later()) + scanner.feed("op now", later()) == "go on, "
    assert scanner.blocked and scanner.feed("more", later(), is_last=True) == ""


def streamed(text: str, cuts: Sequence[int], matchers: list[Matcher]) -> str:
    scanner = Scanner(matchers)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    passed = [scanner.feed(piece, later()) for piece in pieces]
    return "".join([*passed, scanner.feed("", later(), is_last=True)])


WORDS = st.sampled_from(
    [one for some in REAL.values() for one in some]
    + NONE
    + ["foo", "foobar", "-foo", "aab", "aaab", " ", "\n", ".", "@", "+", "1", "4111", "a", "é"]
    + [":", "b-", "00 0"]
)  # fmt: skip
RAILS = [
    rail(pii=PII),
    rail(keywords=["foo bar", "foo", "aab"]),
    rail(patterns=[r"-\bfoo\b", r"a+b(?!-)", r"(?<=1)\d+$", r"foo(?=bar)", r"\b\w{3}\b"]),
]


@given(
    st.lists(WORDS, max_size=8), st.lists(st.integers(0, 80), max_size=12), st.sampled_from(RAILS)
)
@settings(max_examples=1500, deadline=None)
def test_pieces_are_masked_as_the_whole(
    words: list[str], cuts: list[int], matchers: list[Matcher]
) -> None:
    text = "".join(words)
    assert streamed(text, cuts, matchers) == mask(text, matchers, later())[0]


@pytest.mark.parametrize(
    "text", ["-foo", "xaab-aab", "12 345", "foobar", "a fox", "4111111111111111"]
)
def test_every_place_to_cut_gives_the_same(text: str) -> None:
    for matchers in RAILS:
        for cut in range(len(text) + 1):
            assert streamed(text, [cut], matchers) == mask(text, matchers, later())[0]


def test_only_what_may_become_a_match_is_held_back() -> None:
    scanner = Scanner(rail(pii=["card"], keywords=["secret"]))
    assert scanner.feed("The answer is, in short: ", later()) == "The answer is, in short: "
    assert scanner.feed("a sec", later()) == "a "
    assert scanner.feed("ond", later()) == "second"
    assert scanner.feed(" 4111 11", later()) == " "
    assert scanner.feed("11x", later()) == "4111 1111x"


def test_no_more_than_the_window_is_held_back() -> None:
    scanner = Scanner(rail(patterns=["BEGIN.*END"]))
    passed = "".join(scanner.feed(one, later()) for one in ["BEGIN "] + ["x" * 100] * 50)
    assert len(passed) >= 5006 - WINDOW


def test_a_pattern_that_never_ends_is_stopped() -> None:
    matchers = rail(patterns=[r"(?:a|aa)+(?:b|bb)+c$"])
    started_s = time.monotonic()
    with pytest.raises(TimeoutError):
        mask("a" * 3000 + "b" * 3000 + "d", matchers, time.monotonic() + 0.05)
    assert time.monotonic() - started_s < 1


def test_personal_data_is_looked_for_in_linear_time() -> None:
    matchers = rail(pii=PII)
    for text in (
        "a" * 100_000,
        "1 " * 50_000,
        "a@b." * 25_000,
        "DE89 3704 " * 10_000,
        ":" * 100_000,
    ):
        started_s = time.process_time()
        mask(text, matchers, time.monotonic() + 60)
        assert time.process_time() - started_s < 1, text[:10]
