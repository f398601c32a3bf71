"""What a batch can ask of the real engine: an OpenAI file, embeddings, adapters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = """
name: bot
model: {{base: {base}, dtype: float32}}
batch: {{input: in.jsonl, output: out.jsonl, adapters: {{formal: {adapter}}}}}
engine: {{kv_cache_gib: 0.1, max_num_seqs: 8, max_model_len: 128}}
price: {{gpu_hour_usd: 3.6}}
"""
# Without white space in it, which a model of random weights might write for ever.
SCHEMA = {"type": "integer", "minimum": 0, "maximum": 9}


def batch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def make_job(folder: Path, base: Path, adapter: Path, rows: list[Any]) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, adapter=adapter))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def call(name: str, url: str = "chat/completions", **body: Any) -> dict[str, Any]:
    if url == "chat/completions":
        body = {"messages": [{"role": "user", "content": "What is 2 plus 2?"}], **body}
    body = {"model": "a-hub-id", "temperature": 0, **body}
    return {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}


GOOD = [
    call("plain", max_tokens=8, logprobs=True),
    call("formal", max_tokens=8, logprobs=True, model="formal"),
    call("several", max_tokens=4, n=3, temperature=0.8, logprobs=True, top_logprobs=2),
    call("schema", max_tokens=60, structured_outputs={"json": SCHEMA}),
    call("regex", max_tokens=9, structured_outputs={"regex": "[0-9]{3}"}),
    call("choice", max_tokens=9, structured_outputs={"choice": ["yes", "no"]}),
    call("texts", "completions", prompt=["2 plus 2 is", [5, 6, 7]], max_tokens=3, logprobs=1),
    *(call(f"more-{at}", max_tokens=2, seed=at, temperature=1.0) for at in range(8)),
]
BAD: list[tuple[Any, str]] = [
    ("{bad", "malformed_line"),
    (call("plain"), "duplicate_id"),
    (call("rerank", "rerank"), "unsupported_request"),
    (call("typo", temprature=1), "unsupported_request"),
    (call("long", messages=[{"role": "user", "content": "long " * 400}]), "prompt_too_long"),
    (call("hot", temperature=-1), "invalid_parameter"),
    (call("nonsense", structured_outputs={"json": {"type": "nonsense"}}), "invalid_schema"),
    (call("open", structured_outputs={"regex": "("}), "invalid_schema"),
]


@pytest.fixture(scope="module")
def openai_job(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, adapter: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("openai")
    rows = [*GOOD[:4], *(row for row, _ in BAD), *GOOD[4:]]
    make_job(folder, llama, adapter, rows)
    return folder, batch(folder, "batch.max_error_rate=0.5")


def test_an_openai_file_is_answered_line_by_line(openai_job: Any) -> None:
    folder, done = openai_job
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    names = [line["custom_id"] for line in lines]
    assert names[:4] == [row["custom_id"] for row in GOOD[:4]] and len(lines) == 23
    answers: dict[str, Any] = {}
    for line in lines:
        if line["error"] is None:
            is_text = line["custom_id"] == "texts"
            kind: Any = Completion if is_text else ChatCompletion
            answers[line["custom_id"]] = kind.model_validate(line["response"]["body"])
    assert list(answers) == [row["custom_id"] for row in GOOD]
    text = {
        name: one.choices[0].message.content for name, one in answers.items() if name != "texts"
    }
    assert answers["plain"].model != answers["formal"].model
    several = answers["several"]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(several.choices[0].logprobs.content[0].top_logprobs) == 2
    assert several.usage.completion_tokens == sum(len(c.logprobs.content) for c in several.choices)
    assert text["schema"].strip() in list("0123456789")
    assert re.fullmatch("[0-9]{3}", text["regex"]) and text["choice"] in ("yes", "no")
    assert len(answers["texts"].choices) == 2 and answers["texts"].usage.completion_tokens <= 6
    assert len({text[f"more-{at}"] for at in range(8)}) > 4


def test_rows_with_and_without_an_adapter_share_a_step(
    openai_job: Any, llama: Path, adapter: Path
) -> None:
    folder, _ = openai_job
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    prompt = AutoTokenizer.from_pretrained(llama).apply_chat_template(
        GOOD[0]["body"]["messages"], add_generation_prompt=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        plain = model(**prompt).logits[0, -1].log_softmax(-1).max()
        tuned = PeftModel.from_pretrained(model, adapter)(**prompt)
        formal = tuned.logits[0, -1].log_softmax(-1).max()
    assert abs(plain - formal) > 0.01
    for line, wanted in zip(lines, (plain, formal), strict=False):
        (choice,) = line["response"]["body"]["choices"]
        found = choice["logprobs"]["content"][0]["logprob"]
        assert found == pytest.approx(float(wanted), abs=1e-3)


def test_each_bad_line_is_typed_and_kept_with_its_place(openai_job: Any) -> None:
    folder, done = openai_job
    result = json.loads(done.stdout)
    errors = [json.loads(line) for line in Path(result["errors_file"]).read_text().splitlines()]
    assert [(error["line"], error["type"]) for error in errors] == [
        (5 + at, kind) for at, (_, kind) in enumerate(BAD)
    ]
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    for line, (_, kind) in zip(lines[4:], BAD, strict=False):
        assert line["error"]["code"] == kind and line["response"]["status_code"] == 400
        assert line["response"]["body"]["error"]["message"]
    again = batch(folder, "batch.max_error_rate=0.1", "batch.output=other.jsonl")
    assert again.returncode == 3 and "8 of 23 rows have no answer" in again.stderr
    assert (folder / "other.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()


def test_embeddings_are_those_of_the_model(tmp_path: Path, llama: Path, adapter: Path) -> None:
    texts = ["What is 2 plus 2?", "rain"]
    rows = [
        call("both", "embeddings", input=texts),
        call("chat"),
        call("one", "embeddings", input="x"),
    ]
    for row in rows:
        row["body"].pop("temperature")
    make_job(tmp_path, llama, adapter, rows)
    done = batch(tmp_path, "batch.adapters={}", "batch.max_error_rate=0.4")
    assert done.returncode == 0, done.stderr
    both, chat, one = (
        json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    )
    assert chat["error"]["code"] == "unsupported_request"
    assert CreateEmbeddingResponse.model_validate(one["response"]["body"]).data[0].index == 0
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for text, found in zip(texts, both["response"]["body"]["data"], strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            last = model.model(ids).last_hidden_state[0, -1]
        wanted = (last / last.norm()).tolist()
        assert found["embedding"] == pytest.approx(wanted, abs=1e-3)
