"""Rows become examples, and every loss on the way is counted."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tunesmith.config import DataError
from tunesmith.config.schema.data import Data
from tunesmith.train import workers
from tunesmith.train.examples import (
    Examples,
    tokenise_conversations,
    tokenise_pairs,
    tokenise_texts,
)
from tunesmith.train.language import Language
from tunesmith.train.tokenizer import PAD, TURN_END, learn_tokenizer


@pytest.fixture(scope="module")
def language() -> Language:
    from tunesmith.chat import ChatTemplate

    tokenizer = learn_tokenizer(["def add(a, b): return a + b\n"] * 20, 600, 64)
    return Language(tokenizer, ChatTemplate(tokenizer))


def data(max_length: int = 64, **settings: Any) -> Data:
    return Data(train="rows.jsonl", max_length=max_length, **settings)


def talk(answer: str, question: str = "add?") -> dict[str, Any]:
    messages = [("user", question), ("assistant", answer)]
    return {"id": "r", "messages": [{"role": r, "content": c} for r, c in messages]}


def test_examples_end_at_the_last_target_and_the_first_token_is_never_one() -> None:
    examples = Examples()
    examples.add([5, 6, 7, 8, 9], [True, False, True, False, False], max_length=10)
    assert examples.rows[0].input_ids.tolist() == [5, 6, 7]
    assert examples.rows[0].learnt.tolist() == [False, False, True]


def test_cut_and_empty_rows_are_counted() -> None:
    examples = Examples()
    examples.add([1] * 8, [False] * 4 + [True] * 4, max_length=6)
    examples.add([1] * 8, [False] * 6 + [True] * 2, max_length=6)
    assert (examples.truncated, examples.dropped) == (2, 1)
    assert examples.lengths().tolist() == [6]
    assert examples.supervised().tolist() == [2]


def test_the_answer_and_its_end_are_learnt(language: Language) -> None:
    assert language.template
    found = tokenise_conversations([talk("return a")], language.template, data())
    row = found.rows[0]
    learnt = language.tokenizer.decode(row.input_ids[row.learnt])
    assert learnt == f"return a{TURN_END}"
    assert row.input_ids[-1] == language.end_of_turn_id
    assert language.end_of_turn_id != language.tokenizer.convert_tokens_to_ids(PAD)


def test_too_many_refused_rows_stop_the_run_with_their_reasons(language: Language) -> None:
    assert language.template
    rows = [talk("return a"), talk(f"a {TURN_END} b")]
    with pytest.raises(DataError, match=r"1 of 2 rows .*\n  row r: .*ends a turn"):
        tokenise_conversations(rows, language.template, data(max_error_rate=0.4))
    found = tokenise_conversations(rows, language.template, data(max_error_rate=0.5))
    assert (len(found.rows), len(found.faults)) == (1, 1)


def test_nothing_to_learn_is_an_error_that_names_the_limit(language: Language) -> None:
    assert language.template
    with pytest.raises(DataError, match=r"data.max_length \(4 tokens\)"):
        tokenise_conversations([talk("b")], language.template, data(4))


def test_texts_are_packed_with_an_end_after_each(language: Language) -> None:
    tokenizer = language.tokenizer
    texts = ["def add(a, b): return a + b\n", "x\n", "return\n"]
    found = tokenise_texts([{"text": text} for text in texts], tokenizer, data(5))
    ids = [token for row in found.rows for token in row.input_ids.tolist()]
    assert tokenizer.decode(ids) == "".join(text + TURN_END for text in texts)
    assert {len(row.input_ids) for row in found.rows[:-1]} == {5}
    assert all(row.learnt.sum() == len(row.input_ids) - 1 for row in found.rows)


def test_texts_can_stay_apart(language: Language) -> None:
    tokenizer = language.tokenizer
    texts = ["def add(a, b): return a + b\n", "x\n", "return\n"]
    found = tokenise_texts([{"text": text} for text in texts], tokenizer, data(5), apart=True)
    expected = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        expected += [ids[at : at + 5] for at in range(0, len(ids), 5)]
    # An end alone has nothing before it that could predict it.
    assert [row.input_ids.tolist() for row in found.rows] == [
        chunk for chunk in expected if len(chunk) > 1
    ]
    assert found.dropped == 0


def test_the_tokenizer_spells_any_byte_and_is_always_the_same(language: Language) -> None:
    text = "naïve 漢字 \x00 \U0001f40d"
    assert language.tokenizer.decode(language.tokenizer(text)["input_ids"]) == text
    again = learn_tokenizer(["def add(a, b): return a + b\n"] * 20, 600, 64)
    assert again.get_vocab() == language.tokenizer.get_vocab()
    assert len(again) <= 600


def test_what_becomes_of_longer_rows_is_chosen_and_counted() -> None:
    ids, learnt = list(range(8)), [False] * 3 + [True] * 3 + [False] * 2
    found = {}
    for truncation in ("end", "start", "drop"):
        found[truncation] = examples = Examples()
        examples.add(ids, learnt, 6, truncation)  # only what is not learnt is past the limit
        examples.add(ids, learnt, 5, truncation)
        assert examples.rows[0].input_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert found["end"].rows[1].input_ids.tolist() == [0, 1, 2, 3, 4]
    assert found["start"].rows[1].input_ids.tolist() == [1, 2, 3, 4, 5]
    assert found["start"].rows[1].learnt.tolist() == [False, False, True, True, True]
    counted = {name: (e.kept, e.truncated, e.dropped, e.too_long) for name, e in found.items()}
    assert counted == {"end": (2, 1, 0, 0), "start": (2, 1, 0, 0), "drop": (1, 0, 1, 1)}
    # Nothing predicts the first token, also where it was not the first.
    examples = Examples()
    examples.add(ids, [True] * 8, 5, "start")
    assert examples.rows[0].learnt.tolist() == [False] + [True] * 4


def test_a_longer_row_can_be_an_error(language: Language) -> None:
    assert language.template
    settings = data(20, truncation="error", max_error_rate=1.0)
    rows = [talk("a"), talk("return a + b" * 9)]
    with pytest.raises(DataError, match=r"row r: \d+ tokens, more than data.max_length \(20\)"):
        tokenise_conversations(rows, language.template, settings)


def test_too_many_dropped_rows_stop_the_run(language: Language) -> None:
    assert language.template
    rows = [talk("a")] * 8 + [talk("a", question="long " * 30)] * 2
    with pytest.raises(DataError, match=r"2 of 10 sequences .*data.max_dropped_rate \(0.1\)"):
        tokenise_conversations(rows, language.template, data())
    found = tokenise_conversations(rows, language.template, data(max_dropped_rate=0.2))
    assert (found.kept, found.dropped, found.read) == (8, 2, 10)


def test_messages_of_weight_0_are_context(language: Language) -> None:
    assert language.template
    row = talk("return a")
    row["messages"] = [*talk("def add", question="first?")["messages"], *row["messages"]]
    both = tokenise_conversations([row], language.template, data()).rows[0]
    row["messages"][1]["weight"] = 0
    last = tokenise_conversations([row], language.template, data()).rows[0]
    assert last.input_ids.tolist() == both.input_ids.tolist()
    learnt = [language.tokenizer.decode(one.input_ids[one.learnt]) for one in (both, last)]
    assert learnt == [f"def add{TURN_END}return a{TURN_END}", f"return a{TURN_END}"]


def pair(chosen: str, rejected: str) -> dict[str, Any]:
    row = talk(chosen)
    answer = {"role": "assistant", "content": rejected}
    return {**row, "rejected": [answer], "prompt_turns": len(row["messages"]) - 1}


def test_pairs_alternate_and_only_answers_are_learnt(language: Language) -> None:
    assert language.template
    rows = [pair("return a", "def b"), pair("return b", "a")]
    found = tokenise_pairs(rows, language.template, data())
    learnt = [language.tokenizer.decode(row.input_ids[row.learnt]) for row in found.rows]
    assert learnt == [f"{text}{TURN_END}" for text in ("return a", "def b", "return b", "a")]
    prompts = [row.input_ids[~row.learnt].tolist() for row in found.rows]
    assert prompts == [language.template.prompt_ids(rows[0]["messages"][:1])] * 4


def test_earlier_answers_are_context_in_a_pair(language: Language) -> None:
    assert language.template
    row = pair("return a", "def b")
    row["messages"] = talk("def add", question="first?")["messages"] + row["messages"]
    row["prompt_turns"] += 2
    (chosen, _) = tokenise_pairs([row], language.template, data(96)).rows
    assert language.tokenizer.decode(chosen.input_ids[chosen.learnt]) == f"return a{TURN_END}"


def test_a_pair_is_dropped_as_a_whole(language: Language) -> None:
    assert language.template
    prompt = len(language.template.prompt_ids(talk("a")["messages"][:1]))
    rows = [pair("a", "b"), pair("return a + b" * 9 + "!", "return a + b" * 9 + "?")]
    found = tokenise_pairs(rows, language.template, data(prompt + 4, max_dropped_rate=0.5))
    assert (len(found.rows), found.dropped, found.truncated) == (2, 1, 2)
    with pytest.raises(DataError, match="nothing to learn"):
        tokenise_pairs(rows, language.template, data(prompt))


def test_an_answer_that_the_template_rewrites_is_refused(language: Language) -> None:
    """Thinking models' templates leave the reasoning out of all turns but the last."""
    from tunesmith.chat import ChatTemplate

    tokenizer = learn_tokenizer(["def add(a, b): return a + b\n"] * 20, 600, 64)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.reasoning and loop.last %}{{ '<t>' + message.reasoning + '</t>' }}"
        "{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = pair("return a", "def b")
    first = {"role": "assistant", "content": "call", "reasoning": "think"}
    row["rejected"] = [first, {"role": "tool", "content": "1"}, *row["rejected"]]
    with pytest.raises(DataError, match=r"turn 2: .*differently once other turns follow"):
        tokenise_pairs([row], ChatTemplate(tokenizer), data())


def test_several_processes_make_the_same(
    language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert language.template
    rows = [{**talk(f"return {at}", "long " * (at % 40)), "id": str(at)} for at in range(200)]
    rows[70]["messages"][1]["content"] = rows[150]["messages"][1]["content"] = f"a {TURN_END} b"
    settings = data(100, max_error_rate=0.1, max_dropped_rate=1.0)
    alone = tokenise_conversations(rows, language.template, settings, len(rows))
    monkeypatch.setattr(workers, "_FEW_ROWS", 1)
    monkeypatch.setattr(workers, "_ROWS_PER_GROUP", 7)
    monkeypatch.setattr(workers, "_FEW_PROCESSES", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    together = tokenise_conversations(rows, language.template, settings, len(rows))
    for one, other in zip(alone.rows, together.rows, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.learnt.tolist() == other.learnt.tolist()
    counts = ("read", "kept", "truncated", "dropped", "faults")
    assert [getattr(alone, name) for name in counts] == [getattr(together, name) for name in counts]
    assert (alone.read, len(alone.faults)) == (200, 2)
    assert alone.dropped > 0
