"""The prompts that training proves its masks against are those that the engine makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("vllm")

CONVERSATIONS = [
    [{"role": "user", "content": " Grüße,\n\n 世界 🎶 \t"}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": "again\n"},
    ],
]
CALLS = [
    {"role": "user", "content": "double 2"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "double", "arguments": '{"number": 2}'},
            }
        ],
    },
    {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "1"},
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}


def _unit_fixtures() -> ModuleType:
    path = Path(__file__).parents[2] / "unit" / "chat" / "conftest.py"
    spec = importlib.util.spec_from_file_location("chat_fixtures", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIXTURES = _unit_fixtures()


def engine_prompt_ids(folder: Path, messages: list[dict[str, Any]]) -> list[int]:
    """What vLLM's chat endpoint makes of messages, by its own functions."""
    from vllm.config import ModelConfig
    from vllm.renderers.chat_utils import parse_chat_messages
    from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template
    from vllm.tokenizers.hf import CachedHfTokenizer

    model_config = ModelConfig(model=str(folder), tokenizer=str(folder), max_model_len=2048)
    tokenizer = CachedHfTokenizer.from_pretrained(str(folder))
    content_format = resolve_chat_template_content_format(
        None, None, "auto", tokenizer, model_config=model_config
    )
    conversation, _, _ = parse_chat_messages(
        json.loads(json.dumps(messages)), model_config, content_format
    )
    return safe_apply_chat_template(
        model_config, tokenizer, conversation, tokenize=True, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", FIXTURES.FAMILIES)
def test_prompts_are_those_of_the_engine(name: str, tmp_path: Path) -> None:
    family = FIXTURES.FAMILIES[name]
    chat = FIXTURES.template_chat_of(name)
    chat.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    conversations = CONVERSATIONS[: 2 if family.get("system", True) else 1]
    if name == "qwen2.5":
        conversations = [*conversations, CALLS]
    for messages in conversations:
        assert chat.prompt_ids(messages) == engine_prompt_ids(tmp_path, messages)


TURNS = "{% for m in messages %}BODY{% endfor %}"
LOOP = "{% for part in SUBJECT %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        TURNS.replace("BODY", LOOP.replace("SUBJECT", subject))
        for subject in ("m.content", "m['content']", "m.content | list", "m.tool_calls", "content")
    ]
    + [
        "{% set rest = messages[1:] %}"
        + TURNS.replace("messages", "rest").replace("BODY", LOOP.replace("SUBJECT", "m.content"))
    ]
    + [
        "{% macro show(PARAMETER) %}LOOP{% endmacro %}".replace("LOOP", LOOP)
        .replace("SUBJECT", subject)
        .replace("PARAMETER", parameter)
        + TURNS.replace("BODY", call)
        for parameter, subject, call in [
            ("parts", "parts", "{{ show(m.content) }}"),
            ("parts", "parts", "{{ show(parts=m['content']) }}"),
            ("parts", "parts", "{{ show(m.tool_calls) }}"),
            ("content", "content", "{{ show(m.role) }}"),
            ("turn", "turn.content", "{{ show(m) }}"),
            ("m", "m.content", "{{ show(m) }}"),
        ]
    ],
)
def test_content_is_handed_over_as_the_engine_does(template: str) -> None:
    from vllm.renderers.hf import _detect_content_format

    from tunesmith.chat.jinja import loops_over_content, parse

    engine_loops = _detect_content_format(template, default="string") == "openai"
    assert loops_over_content(parse(template)) == engine_loops
