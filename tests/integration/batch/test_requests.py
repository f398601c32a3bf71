"""What rows ask for becomes the tokens and the parameters that serving would use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tunesmith.batch.errors import RowError
from tunesmith.batch.requests import Ask, RequestMaker
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineSpec, Request

USER = [{"role": "user", "content": "What is 2 plus 2?"}]
LONGEST = 48


@pytest.fixture(scope="module")
def maker(llama: Path) -> RequestMaker:
    spec = EngineSpec(
        model=llama,
        settings=Engine(),
        dtype="float32",
        served_name="bot",
        adapters={"formal": Path("/formal"), "plain": None},
        seed=100,
    )
    return RequestMaker.open(spec, LONGEST)


def made(maker: RequestMaker, **ask: Any) -> Request:
    found = maker.request(7, Ask(**ask))
    assert isinstance(found, Request), found
    return found


def fault(maker: RequestMaker, **ask: Any) -> RowError:
    found = maker.request(7, Ask(**ask))
    assert isinstance(found, RowError)
    return found


def test_a_chat_is_rendered_and_stops_at_its_end_of_turn(maker: RequestMaker, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    wanted = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    found = made(maker, messages=USER, sampling={"max_tokens": 99, "temperature": 0.0, "seed": 5})
    assert list(found.prompt_ids) == wanted
    # As many tokens as there is room for, and no seed where nothing is drawn.
    assert found.sampling == {
        "max_tokens": LONGEST - len(wanted),
        "temperature": 0.0,
        "stop_token_ids": [2],
    }
    plain = made(maker, prompts=["What is 2 plus 2?"], sampling={"temperature": 1.0})
    assert list(plain.prompt_ids) == tokenizer("What is 2 plus 2?")["input_ids"]
    assert "stop_token_ids" not in plain.sampling and plain.sampling["seed"] == 107
    assert made(maker, prompts=[[5, 6]], sampling={"seed": 3}).sampling["seed"] == 3


def test_equal_questions_have_equal_digests(maker: RequestMaker) -> None:
    greedy: dict[str, Any] = {"messages": USER, "sampling": {"temperature": 0.0, "max_tokens": 4}}
    one, two = (maker.request(at, Ask(**greedy)) for at in (1, 2))
    assert isinstance(one, Request) and isinstance(two, Request)
    assert one.digest == two.digest and one.key != two.key
    others = [
        maker.request(3, Ask(**greedy, adapter="formal")),
        maker.request(4, Ask(**{**greedy, "sampling": {"temperature": 0.0, "max_tokens": 5}})),
        maker.request(5, Ask(**{**greedy, "sampling": {"temperature": 1.0}})),
        maker.request(6, Ask(**{**greedy, "sampling": {"temperature": 1.0}})),
        maker.request(7, Ask(messages=USER, kind="score", completions=["a"])),
        maker.request(8, Ask(messages=USER, kind="score", completions=["b"])),
        maker.request(9, Ask(prompts=["a"], kind="embed")),
    ]
    digests = {other.digest for other in others if isinstance(other, Request)}
    assert len(digests | {one.digest}) == 8


def test_completions_go_on_from_the_prompt(maker: RequestMaker, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = made(maker, prompts=["What is"], kind="score", completions=[" 2", " 2 plus", "x"])
    for prompt, completion in zip(found.prompts, [" 2", " 2 plus", "x"], strict=True):
        assert tokenizer.decode(prompt) == f"What is{completion}"
    assert found.sampling == {} and found.longest == max(map(len, found.prompts))
    chat = made(maker, messages=USER, kind="score", completions=["2"])
    assert tokenizer.decode(chat.parts[0]) == "2"


def test_lists_of_prompts_are_parts(maker: RequestMaker) -> None:
    found = made(maker, prompts=[[5, 6], [7]], sampling={"max_tokens": 2})
    assert found.prompts == [[5, 6], [7]]
    one = made(maker, prompts=[[5, 6]], kind="embed", sampling={})
    assert one.prompts == [[5, 6]] and one.sampling == {}


def test_what_the_model_cannot_take_has_its_type(maker: RequestMaker) -> None:
    assert fault(maker, prompts=[[5] * LONGEST]).type == "prompt_too_long"
    assert made(maker, prompts=[[5] * LONGEST], kind="embed").longest == LONGEST
    long = fault(maker, prompts=[[5], [5] * (LONGEST + 1)], kind="embed")
    assert long.type == "prompt_too_long" and f"{LONGEST + 1} tokens" in long.detail
    score = fault(maker, prompts=[[5] * 46], kind="score", completions=["a b c"])
    assert score.type == "prompt_too_long"
    unknown = fault(maker, prompts=["x"], adapter="legal")
    assert unknown.type == "unknown_adapter" and "formal, plain" in unknown.detail
    assert made(maker, prompts=["x"], adapter="plain").adapter == "plain"
    wrong = [{"role": "user", "content": [{"type": "text"}]}]
    assert fault(maker, messages=wrong).type == "invalid_messages"
