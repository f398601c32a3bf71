"""What is learnt is what serving would have the model write, for each family, or it is refused."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.chat import ChatTemplate, Supervised
from tunesmith.chat.template import HistoryDiffers
from tunesmith.config.errors import DataError, ModelError

FAMILIES = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text(encoding="utf-8"))

words = st.text(min_size=1, max_size=40).filter(
    lambda text: text.strip() and "</think>" not in text
)
"""Any text at all, line breaks, controls and other scripts included; reasoning has its own test."""


@st.composite
def conversations(draw: Any) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(words)})
        messages.append({"role": "assistant", "content": draw(words)})
    return messages


def learnt(chat: ChatTemplate, supervised: Supervised) -> list[str]:
    """The text of each run of supervised tokens."""
    found = []
    tokens = zip(supervised.input_ids, supervised.mask, strict=True)
    for is_learnt, run in groupby(tokens, key=lambda token: token[1]):
        if is_learnt:
            found.append(chat.tokenizer.decode([token for token, _ in run]))
    return found


def expected(family: dict[str, Any], text: str) -> str:
    if family.get("trims"):
        text = text.strip()
    if family.get("leading_newlines_dropped"):
        text = text.lstrip("\n")
    return family.get("lead", "") + text + family["end"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "always_reasoning"])
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
def test_learns_the_answers_and_their_ends_exactly(
    name: str, messages: list[dict[str, str]], family_chat: Any
) -> None:
    family, chat = FAMILIES[name], family_chat(name)
    if not family.get("system", True) and messages[0]["role"] == "system":
        with pytest.raises(DataError, match="rejects"):
            chat.supervise(messages)
        messages = messages[1:]
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    try:
        examples = chat.examples(messages)
    except DataError as error:
        # Hypothesis also takes texts from the code that is loaded: a token that ends a turn, say.
        if "the token that ends a turn" in str(error):
            assert any(chat._ending.token in answer for answer in answers)
            return
        # White space may merge with the end of the prompt; nothing else is refused.
        assert "merges" in str(error)
        assert any(answer[0].isspace() for answer in answers)
        assert not family.get("trims")
        return
    assert [text for each in examples for text in learnt(chat, each)] == [
        expected(family, answer) for answer in answers
    ]
    turns = [at for at, turn in enumerate(messages) if turn["role"] == "assistant"]
    for example, turn in zip(examples, turns, strict=False):
        assert example.input_ids[: example.mask.index(True)] == chat.prompt_ids(messages[:turn])
    has_system = messages[0]["role"] == "system"
    rewritten = {"rewritten": True, "rewritten_with_system": has_system}
    is_split = rewritten.get(family.get("history", "kept"), False) and len(turns) > 1
    assert len(examples) == (len(turns) if is_split else 1)
    if is_split:
        with pytest.raises(HistoryDiffers, match="differently once other turns follow"):
            chat.supervise(messages)


HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure, here."}]
CALL = {"type": "function", "function": {"name": "double", "arguments": {"number": 2}}}
TOOLS = [{"type": "function", "function": {"name": "double", "parameters": {}}}]


def test_learns_tool_calls_and_not_what_the_tool_says(family_chat: Any) -> None:
    chat = family_chat("qwen2.5")
    messages = [
        {"role": "user", "content": "double 2"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    supervised = chat.supervise(messages, tools=TOOLS)
    assert learnt(chat, supervised) == [
        '<tool_call>\n{"name": "double", "arguments": {"number": 2}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ]
    assert '"name": "double", "parameters"' in chat.tokenizer.decode(supervised.input_ids)


def test_learns_only_the_turns_asked_for(family_chat: Any) -> None:
    chat = family_chat("chatml")
    second = [*HELLO, HELLO[0], {"role": "assistant", "content": "Again."}]
    assert learnt(chat, chat.supervise(second, turns=[3])) == ["Again.<|im_end|>"]


@pytest.mark.parametrize(
    "answer",
    [
        HELLO[1] | {"reasoning": "They greet me."},
        HELLO[1] | {"content": "<think>\nThey greet me.\n</think>\n\nSure, here."},
    ],
)
def test_learns_reasoning_where_the_template_writes_it(
    answer: dict[str, str], family_chat: Any
) -> None:
    chat = family_chat("qwen3")
    (text,) = learnt(chat, chat.supervise([HELLO[0], answer]))
    assert text == "<think>\nThey greet me.\n</think>\n\nSure, here.<|im_end|>"


def test_a_template_that_always_reasons_learns_the_rows_that_do(family_chat: Any) -> None:
    chat = family_chat("always_reasoning")
    reasoned = HELLO[1] | {"reasoning": "They greet me."}
    (text,) = learnt(chat, chat.supervise([HELLO[0], reasoned]))
    assert text == "They greet me.\n</think>\n\nSure, here.<|im_end|>"
    with pytest.raises(DataError, match="turn 2: the tokenizer splits the end of the prompt"):
        chat.supervise(HELLO)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        pytest.param(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "never learn to stop",
            id="no end-of-turn token",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant: <think>{% endif %}",
            "does not go on from the prompt that serving sends",
            id="another generation prompt than the turn",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}:"
            "{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "marks of the chat template leave out part of the",
            id="marks around the wrong text",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content[:3] }}"
            "{% endgeneration %}{{ m.content[3:] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "marks of the chat template leave out part of the",
            id="marks around part of the text",
        ),
        pytest.param(
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
            "leaves out the assistant's text",
            id="no assistant text at all",
        ),
    ],
)
def test_a_template_that_cannot_be_proven_is_refused(
    template: str, fault: str, template_chat: Any
) -> None:
    with pytest.raises(ModelError, match=fault):
        template_chat(template).supervise(HELLO)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("one<|im_end|>two", "contains '<|im_end|>'"),
        ("\n\nSure.", "remove white space"),
    ],
)
def test_an_answer_that_cannot_be_learnt_is_refused(
    answer: str, fault: str, family_chat: Any
) -> None:
    messages = [HELLO[0], {"role": "assistant", "content": answer}]
    with pytest.raises(DataError) as raised:
        family_chat("chatml").supervise(messages)
    assert fault in str(raised.value)
    assert "turn 2" in str(raised.value)


def test_a_prompt_that_the_tokenizer_splits_otherwise_before_an_answer_is_refused(
    template_chat: Any,
) -> None:
    family = FAMILIES["llama3"]
    chat = template_chat(
        family["template"], tuple(family["tokens"]), family["bos"], family["eos"], words=None
    )
    with pytest.raises(ModelError, match="splits the end of the prompt .* differently"):
        chat.supervise(HELLO)


def test_a_conversation_without_an_answer_is_refused(family_chat: Any) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        family_chat("chatml").supervise(HELLO[:1])
