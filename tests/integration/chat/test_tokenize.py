"""What training reads before an answer is what the engine is sent: a thousand conversations."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat import ChatTemplate
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec

pytest.importorskip("vllm")

PIECES = [
    "plus", " is ", "\n", "\n\n", "  ", "\t", "Grüße", "世界", "🎶", "👩\u200d👧", "e\u0301",
    "\u200b", "{{ x }}", "<b>", "it's", "def f(x):\n    return x\n", "0.1", "...", "\u00a0",
    "user", "assistant\n", "|>",
]  # fmt: skip


def conversation(dice: random.Random) -> list[dict[str, str]]:
    def text() -> str:
        return "".join(dice.choices(PIECES, k=dice.randint(1, 12)))

    turns = [{"role": "system", "content": text()}] if dice.random() < 0.5 else []
    for _ in range(dice.randint(1, 4)):
        turns.append({"role": "user", "content": text()})
        turns.append({"role": "assistant", "content": text()})
    return turns


def test_a_thousand_prompts_are_those_of_the_chat_endpoint(llama: Path, tmp_path: Path) -> None:
    template, dice = ChatTemplate.load(llama), random.Random(5)
    settings = Engine(max_num_seqs=2, max_model_len=512, kv_cache_gib=0.1)
    spec = EngineSpec(model=llama, settings=settings, dtype="float32", served_name="bot")
    with EngineServer(spec, log_path=tmp_path / "engine.log") as server:
        url = server.url.removesuffix("/v1") + "/tokenize"

        def sent(messages: list[dict[str, str]]) -> list[int]:
            body = json.dumps({"model": "bot", "messages": messages}).encode()
            headers = {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
                found: dict[str, Any] = json.load(answer)
            return found["tokens"]

        for _ in range(1000):
            messages = conversation(dice)
            learnt = template.supervise(messages)
            prompt = sent(messages[:-1])
            assert learnt.input_ids[: len(prompt)] == prompt
            # What is learnt of the last turn begins right there.
            assert learnt.mask[len(prompt)] and not learnt.mask[len(prompt) - 1]
