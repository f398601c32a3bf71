"""The same work for every variant, never a prompt twice, arrivals of a true Poisson process."""

from __future__ import annotations

import json

import numpy as np

from tunesmith.bench.traffic import Prompt, poisson_arrivals, read_prompts, salted_prompts


def test_arrivals_are_poisson():
    gaps = np.diff(poisson_arrivals(8.0, 20_001, seed=1))
    assert abs(gaps.mean() - 1 / 8) < 3 * (1 / 8) / 20_000**0.5
    assert abs(gaps.std() / gaps.mean() - 1) < 0.03
    # Counts per second spread as their mean does; even gaps would not spread at all.
    counts = np.bincount(np.cumsum(gaps).astype(int))[:-1]
    assert abs(counts.var() / counts.mean() - 1) < 0.1
    assert poisson_arrivals(8.0, 50, seed=1) == poisson_arrivals(8.0, 50, seed=1)
    assert poisson_arrivals(8.0, 50, seed=1) != poisson_arrivals(8.0, 50, seed=2)


def test_a_prompt_is_the_conversation_before_its_answer(tmp_path):
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"id": "1", "messages": [ask, answer]},
        {"id": "2", "messages": [ask, answer, ask, answer]},
        {"id": "3", "messages": [answer]},
        {"id": "4", "text": "t" * 3000},
    ]
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = read_prompts(path, seed=0)
    assert sorted(len(p.body.get("messages", ())) for p in prompts) == [0, 1, 3]
    text = next(p for p in prompts if "prompt" in p.body)
    assert text.endpoint == "completions" and len(text.body["prompt"]) == 1000


def test_salted_prompts_differ_from_their_first_word_on():
    prompts = [
        Prompt("chat/completions", {"messages": [{"role": "system", "content": "be kind"}]}),
        Prompt("completions", {"prompt": "once upon"}),
    ]
    before = [dict(prompt.body) for prompt in prompts]
    sent = [
        prompt.body.get("prompt") or prompt.body["messages"][0]["content"]
        for phase in ("batch 0", "batch 1", "serve 0")
        for prompt in salted_prompts(prompts, 500, 17, phase)
    ]
    assert len({text[:8] for text in sent}) == 1500
    assert all(text[8:] in ("\nbe kind", "\nonce upon") for text in sent)
    assert [prompt.body for prompt in prompts] == before
    again = [p.body for p in salted_prompts(prompts, 3, 17, "batch 0")]
    assert again == [p.body for p in salted_prompts(prompts, 3, 17, "batch 0")]
