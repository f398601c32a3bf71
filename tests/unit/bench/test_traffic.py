"""The same work for every variant, never a prompt twice, arrivals of a true Poisson process."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.bench.arrivals import (
    arrivals,
    gamma_arrivals,
    poisson_arrivals,
    read_moments,
    replayed,
)
from tunesmith.bench.traffic import (
    Prompt,
    read_log,
    read_prompts,
    synthetic_prompts,
    unique_prompts,
)
from tunesmith.config import DataError
from tunesmith.config.schema.bench import Bench


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


def test_unique_prompts_differ_from_their_first_word_on():
    prompts = [
        Prompt("chat/completions", {"messages": [{"role": "system", "content": "be kind"}]}),
        Prompt("completions", {"prompt": "once upon"}),
    ]
    before = [dict(prompt.body) for prompt in prompts]
    sent = [
        prompt.body.get("prompt") or prompt.body["messages"][0]["content"]
        for phase in ("batch 0", "batch 1", "serve 0")
        for prompt in unique_prompts(prompts, 500, 17, phase)
    ]
    assert len({text[:8] for text in sent}) == 1500
    assert all(text[8:] in ("\nbe kind", "\nonce upon") for text in sent)
    assert [prompt.body for prompt in prompts] == before
    again = [p.body for p in unique_prompts(prompts, 3, 17, "batch 0")]
    assert again == [p.body for p in unique_prompts(prompts, 3, 17, "batch 0")]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_bursts_have_the_variance_that_was_asked_for(burstiness):
    gaps = np.diff(gamma_arrivals(8.0, burstiness, 40_001, seed=1))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.1)


def test_even_arrivals():
    assert arrivals(Bench(arrivals="constant"), 4.0, 3, seed=1) == [0.0, 0.25, 0.5]


def test_a_trace_keeps_its_bursts_at_another_rate():
    found = replayed([100.0, 101.0, 101.1, 104.0], rate=2.0, count=9)
    assert found[0] == 0 and len(found) == 9
    gaps = np.diff(found)
    assert gaps[1] / gaps[0] == pytest.approx(0.1)
    assert gaps[4:7] == pytest.approx(gaps[0:3]), "from the start again"
    assert gaps[:8].mean() == pytest.approx(0.5)
    with pytest.raises(DataError, match="two arrivals"):
        replayed([1.0], 2.0, 3)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_a_trace_is_read_from_any_kind_of_file(tmp_path, name):
    moments, path = [5.0, 5.5, 9.25], tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"seq": [1, 2, 3], "at_s": moments}), path)
    elif name.endswith("csv"):
        path.write_text("seq,at_s\n1,5.0\n2,5.5\n3,9.25\n")
    else:
        path.write_text("".join(json.dumps({"at_s": at}) + "\n" for at in moments))
    assert read_moments(path) == moments
    bench = Bench(arrivals="trace", trace=path)
    assert arrivals(bench, 1.0, 3, seed=0) == pytest.approx([0, 0.5 * 2 / 4.25, 2])
    path.write_text("nothing\n1\n")
    with pytest.raises(DataError, match="at_s"):
        read_moments(path)


def log_row(path="/v1/chat/completions", status=200, body=None, inputs=9, outputs=4):
    return {
        "seq": 1,
        "at_s": 10.0,
        "path": path,
        "status": status,
        "prompt_tokens": inputs,
        "output_tokens": outputs,
        "request_body": body,
    }


def test_a_log_is_asked_again_as_it_was(tmp_path):
    """Columns as `tunesmith.serve.govern.archive` writes them."""
    chat = {"model": "bot", "messages": [{"role": "user", "content": "hi"}], "temperature": 1}
    rows = [
        log_row(body=json.dumps(chat), outputs=7),
        log_row(inputs=30, outputs=5),
        log_row(body='{"messages": [{"role"', inputs=31),
        log_row(path="/v1/completions", body=json.dumps({"prompt": "once"})),
        log_row(status=429, outputs=0),
        log_row(path="/v1/embeddings"),
    ]
    folder = tmp_path / "requests"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "01.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "02.parquet")
    found = read_log(folder)
    assert [(p.endpoint, p.max_tokens, p.random_tokens) for p in found] == [
        ("chat/completions", 7, None),
        ("completions", 5, 30),
        ("completions", 4, 31),
        ("completions", 4, None),
    ]
    assert found[0].body == {"messages": chat["messages"]}, "its sampling is the benchmark's"
    pq.write_table(pa.Table.from_pylist(rows[4:]), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no answered request"):
        read_log(tmp_path / "none.parquet")


def test_a_mix_has_its_shares_exactly():
    lengths = [
        {"input_tokens": 10, "output_tokens": 1},
        {"input_tokens": 20, "output_tokens": 2, "share": 2},
    ]
    bench = Bench(prompts="synthetic", requests=10, lengths=lengths)
    prompts = synthetic_prompts(bench, seed=4)
    assert Counter(p.random_tokens for p in prompts) == {10: 3, 20: 7}
    drawn = [p.body["prompt"] for p in unique_prompts(prompts, 20, 4, "a", vocabulary=range(99))]
    assert {len(tokens) for tokens in drawn} == {10, 20}
    assert len(set(map(tuple, drawn))) == 20
    reused = [
        p.body["prompt"]
        for phase in "ab"
        for p in unique_prompts(prompts, 10, 4, phase, vocabulary=range(99), reuse=True)
    ]
    assert reused[:10] == reused[10:]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"arrivals": "trace"}, "needs a file"),
        ({"trace": "t.csv"}, "exactly when arrivals is trace"),
        ({"burstiness": 3}, "for arrivals: gamma"),
        ({"prompts": "synthetic"}, "lengths is given exactly"),
        ({"prompts": "log"}, "log is given exactly"),
    ],
)
def test_what_does_not_go_together_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        Bench(**section)
