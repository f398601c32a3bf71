"""The real engine, offline and as a server, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import members
from transformers import AutoModelForCausalLM

HEAD = """
import json, os, sys
from pathlib import Path
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import *

def spec(model, adapter=None, **settings):
    return EngineSpec(
        model=Path(model), adapter=adapter and Path(adapter), dtype="float32", served_name="bot",
        settings=Engine(kv_cache_gib=0.1, max_num_seqs=8, max_model_len=128, **settings))
"""
SHORT = """
import sys
from pathlib import Path
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineSpec, open_llm, prepare_process

if __name__ == "__main__":
    settings = Engine(kv_cache_gib=0.1, max_num_seqs=8, max_model_len=128)
    spec = EngineSpec(Path(sys.argv[1]), settings, "bfloat16", "bot")
    prepare_process()
    llm = open_llm(spec)
    (answer,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], use_tqdm=False)
    print(len(answer.outputs[0].token_ids))
"""
OFFLINE = f"""{HEAD}
from tunesmith.config import ModelError

def ask(key, prompt_ids, max_tokens):
    sampling = {{"max_tokens": max_tokens, "temperature": 0.0, "stop_token_ids": [2]}}
    return Request(key, prompt_ids, sampling=sampling)

def answers(model, adapter=None):
    opened = spec(model, adapter)
    llm = open_llm(opened)
    requests = [ask(at, [5 + at, 6, 7], 1 + at % 5) for at in range(40)]
    requests[7] = ask(7, [5] * 200, 4)
    requests.append(Request(40, [5, 6, 7], "score", parts=[[8, 9], [10]]))
    requests.append(Request(41, [5, 6, 7], "score", parts=[[8], [10]]))
    by_token = {{"max_tokens": 30, "temperature": 0.0, "stop": ["e", "t"], "logprobs": 1}}
    requests.append(Request(42, [5, 6, 7], sampling=by_token))
    taken, found, most = 0, {{}}, 0

    def taking():
        nonlocal taken
        for taken, request in enumerate(requests, 1):
            yield request

    for key, answer in stream(llm, taking(), window=16, spec=opened):
        most = max(most, taken - len(found))
        found[key] = answer
    children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    said = [request for request in requests if request.kind == "generate" and request.key != 7]
    texts = [made.outputs[0].text for made in plain_answers(llm, said, opened)]
    assert texts == [found[request.key].outputs[0].text for request in said]
    assert any(texts)
    close_llm(llm)
    return found, (most, len(children))

def plain_answers(llm, requests, opened):
    from vllm import SamplingParams
    prompts = [{{"prompt_token_ids": request.prompt_ids}} for request in requests]
    params = [SamplingParams(**request.sampling) for request in requests]
    return llm.generate(prompts, params, use_tqdm=False, lora_request=lora_request(opened))

if __name__ == "__main__":
    model, adapter = sys.argv[1:]
    plain, (most, children) = answers(model)
    tuned, _ = answers(model, adapter)
    again, _ = answers(model)
    refusal = plain.pop(7), again.pop(7)
    by_token, _ = (found.pop(42).outputs[0] for found in (plain, again))
    scores, _ = ((found.pop(40).scores, found.pop(41).scores) for found in (plain, again))
    try:
        open_llm(spec(model), max_model_len=10**6)
    except ModelError as error:
        print(json.dumps({{
            "rows": len(plain), "children": children, "most": most, "same": plain == again,
            "scores": scores,
            "changed": sum(tuned[key].outputs != plain[key].outputs for key in plain),
            "refused": type(refusal[0]).__name__, "error": str(error),
            "threads": sys.modules["torch"].get_num_threads(),
            "one": [plain[4].prompt_tokens, plain[4].output_tokens],
            "tokens": [one["token"] for one in by_token.logprobs],
            "by_token": [by_token.output_tokens, by_token.text],
        }}))
"""
SAMPLED = f"""{HEAD}
def answers(model, most_tokens):
    opened = spec(model, max_num_batched_tokens=most_tokens)
    llm = open_llm(opened)
    requests = [
        Request(at, [3 + (at * place) % 90 for place in range(60)],
                sampling={{"max_tokens": 6, "temperature": 1.0, "seed": at}})
        for at in range(24)
    ]
    found = dict(stream(llm, requests, window=16, spec=opened))
    close_llm(llm)
    return [found[at].outputs[0].text for at in range(24)]

if __name__ == "__main__":
    cut, whole = (answers(sys.argv[1], most_tokens) for most_tokens in (40, 1024))
    print(json.dumps([cut, whole]))
"""
SERVER = f"""{HEAD}
import time
if __name__ == "__main__":
    model, adapter, log = sys.argv[1:]
    opened = spec(model, adapter, max_num_batched_tokens=16)  # less than a prompt has
    with EngineServer(opened, log_path=Path(log)) as server:
        print(json.dumps({{"url": server.url, "group": server.pid, "load_s": server.load_s}}),
              flush=True)
        time.sleep(300)
"""


def test_offline_answers_a_stream_with_and_without_an_adapter(llama: Path, adapter: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(llama), str(adapter)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any(found["tokens"]) and found["by_token"][0] == len(found["tokens"])
    assert found["by_token"][1]
    assert found["rows"] == 39 and found["same"]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    several, single = found["scores"]
    assert several[0] == pytest.approx(log_likelihoods(model, [5, 6, 7], [8, 9]), abs=1e-3)
    assert single == [[pytest.approx(several[0][0], abs=1e-3)], pytest.approx(several[1], abs=1e-3)]
    assert found["changed"] > 20
    assert found["refused"] == "VLLMValidationError"
    assert "max_model_len" in found["error"] and "does not take" in found["error"]
    assert found["children"] == 0 and 8 < found["most"] <= 17  # one of them was refused
    assert 1 <= found["threads"] <= len(os.sched_getaffinity(0))
    assert found["one"] == [3, 5]
    assert "INFO" not in done.stderr and "WARNING" not in done.stderr


def test_seeded_prompts_that_are_read_in_several_steps(llama: Path) -> None:
    """vLLM 0.32 dies of them on a CPU; what they draw does not depend on the steps either."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLED, str(llama)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    cut, whole = json.loads(done.stdout.splitlines()[-1])
    assert len(set(whole)) > 12
    # Numbers that are added up in other parts may turn a draw.
    assert sum(a == b for a, b in zip(cut, whole, strict=True)) >= 22


def test_a_short_first_prompt_in_bfloat16(llama: Path) -> None:
    """Of all products that lead to its attention none is large enough for oneDNN to ask for AMX."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(llama)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


def log_likelihoods(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    first = len(prompt) - 1
    return [float(logits[first + at, token]) for at, token in enumerate(completion)]


def test_server_answers_and_sigkill_of_its_owner_leaves_no_process(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SERVER, str(llama), str(adapter), str(tmp_path / "log")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout
        line = owner.stdout.readline()
        assert line, (tmp_path / "log").read_text()
        ready = json.loads(line)
        tuned = chat(ready["url"], "bot")
        base = chat(ready["url"], "bot.base")
        assert tuned["usage"]["completion_tokens"] == base["usage"]["completion_tokens"] == 8
        assert tuned["choices"][0]["logprobs"] != base["choices"][0]["logprobs"]
        drawn = [chat(ready["url"], "bot", temperature=1, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0]["usage"]["prompt_tokens"] > 16
        texts = [answer["choices"][0]["message"]["content"] for answer in drawn]
        assert texts[0] == texts[1] != texts[2]
        assert len(members(ready["group"])) >= 3
    finally:
        owner.kill()
        killed_s = time.monotonic()
        owner.communicate()
    while members(ready["group"]) and time.monotonic() - killed_s < 5:
        time.sleep(0.05)
    assert members(ready["group"]) == []


def chat(url: str, model: str, **parameters: int) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is 3 plus 3?"}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        **parameters,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
