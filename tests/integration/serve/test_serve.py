"""`tunesmith serve` with the official client, from the first probe to the last process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import members
from transformers import AutoModelForCausalLM

from tunesmith.config import Recipe
from tunesmith.config.load import dump_recipe, load_recipe
from tunesmith.pipeline import Stages
from tunesmith.serve.govern.archive import read_log
from tunesmith.serve.govern.database import open_gateway

KEY = "a-secret-key"
MESSAGES: Any = [{"role": "user", "content": "What is 3 plus 3?"}]


@dataclass
class Served:
    """A running gateway."""

    process: subprocess.Popen[str]
    url: str
    artifact: str
    early: dict[str, tuple[int, dict[str, str], Any]]
    """Answers to requests made while the engine was loading."""

    def get(self, path: str) -> tuple[int, dict[str, str], Any]:
        request = urllib.request.Request(
            f"{self.url}{path}", headers={"Authorization": f"Bearer {KEY}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, dict(response.headers), json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.load(error)

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, stages_of: Callable[..., Stages]
) -> tuple[Path, str]:
    """A recipe whose adapter is made, as a file; and the adapter's id."""
    folder = tmp_path_factory.mktemp("served")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    stages = stages_of(
        folder,
        llama,
        train={"method": "lora", "lora": {"r": 4}},
        serve={"port": port, "model": "adapter", "api_key_env": "BOT_KEY"},
        engine={"max_num_seqs": 24, "kv_cache_gib": 0.2},
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(stages.made(stages.base).root)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    with stages.store.write(stages.trained, stages.recipe) as work:
        adapted.save_pretrained(work.out)
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(stages.recipe))
    return path, stages.trained.id


def start(recipe: Path, *overrides: str, key: str = KEY) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith.cli", "serve", str(recipe), "--json", *overrides],
        env=os.environ | {"BOT_KEY": key},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def served(recipe: tuple[Path, str]) -> Iterator[Served]:
    path, artifact = recipe
    port = load_recipe(path).serve.port  # type: ignore[union-attr]
    process = start(path)
    found = Served(process, f"http://127.0.0.1:{port}", artifact, {})
    try:
        deadline_s = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
            try:
                status, _, _ = found.get("/readyz")
            except OSError:
                status = 0
            if status == 503 and not found.early:
                paths = ("/healthz", "/readyz", "/v1/models", "/v1/files")
                found.early = {path: found.get(path) for path in paths}
            if status == 200:
                break
            time.sleep(0.1)
        yield found
    finally:
        process.kill()
        process.communicate()


def test_while_the_engine_loads_probes_tell_and_requests_are_put_off(served: Served) -> None:
    status = {path: answer[0] for path, answer in served.early.items()}
    assert status == {"/healthz": 200, "/readyz": 503, "/v1/models": 200, "/v1/files": 503}
    _, headers, body = served.early["/v1/files"]
    assert int(headers["Retry-After"]) > 0 and body["error"]["code"] == "loading"
    assert all(
        answer[1]["x-tunesmith-artifact"] == served.artifact for answer in served.early.values()
    )


def test_models_chat_and_stream_with_the_official_client(served: Served) -> None:
    with served.client() as client:
        assert [model.id for model in client.models.list()] == ["test"]
        assert client.models.retrieve("test").id == "test"
        asked: Any = {"model": "test", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        asked["extra_body"] = {"ignore_eos": True}
        raw = client.chat.completions.with_raw_response.create(**asked)
        assert raw.headers["x-tunesmith-artifact"] == served.artifact
        whole = raw.parse()
        assert re.fullmatch(r"test@[0-9a-f]{12}", whole.model) and whole.usage
        assert whole.usage.completion_tokens == 12
        assert whole.choices[0].finish_reason == "length"
        pieces = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert pieces[-1].usage and pieces[-1].usage.completion_tokens == 12
        assert pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        assert all(piece.usage is None for piece in pieces[:-1])
        plain = client.completions.create(model="test", prompt="3 plus", max_tokens=4)
        assert plain.usage and plain.usage.completion_tokens <= 4


def test_errors_are_those_the_client_knows(served: Served) -> None:
    with served.client() as client:
        with pytest.raises(openai.NotFoundError, match="other"):
            client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.chat.completions.create(model="test", messages=MESSAGES, max_tokens=-1)
    with served.client("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert KEY not in str(caught.value)


def test_what_cannot_work_is_told_before_the_engine_starts(
    served: Served, recipe: tuple[Path, str]
) -> None:
    for overrides, key, words in [
        ((), KEY, "is taken by another process"),
        ((), "", "BOT_KEY is not set"),
        (("serve.host=0.0.0.0", "serve.api_key_env=null"), KEY, "serve.api_key_env"),
        (("serve.model=tuned", "serve.port=1"), KEY, "has not been made"),
    ]:
        process = start(recipe[0], *overrides, key=key)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2, said
        assert words in said and "loading" not in said


def test_an_adapter_is_replaced_while_it_is_asked(
    served: Served, recipe: tuple[Path, str], tmp_path: Path
) -> None:
    """v1 → v2 → v1: no request fails, each answer is wholly of one version, and what was let go is
    no danger to the engine, its folders deleted."""
    loaded = load_recipe(recipe[0])
    base = Stages(loaded).made(Stages(loaded).base).root
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules="all-linear", lora_alpha=64, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "v2")
    pins = loaded.store.folder / "serve" / "adapters"
    (first,) = [folder.name for folder in pins.iterdir()]
    answers: list[tuple[str, str, str]] = []
    faults: list[Exception] = []
    is_over = threading.Event()

    def ask(model: str = "test") -> tuple[str, str, str]:
        with served.client() as client:
            raw = client.completions.with_raw_response.create(
                model=model, prompt="3 plus 3", max_tokens=8, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            found = raw.parse()
            return found.model, found.choices[0].text, raw.headers["x-tunesmith-artifact"]

    def load() -> None:
        while not is_over.is_set():
            try:
                answers.append(ask())
            except openai.OpenAIError as error:
                faults.append(error)

    askers = [threading.Thread(target=load) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        rollout(loaded, "swap", "test", "--to", str(tmp_path / "v2"))
        shutil.rmtree(tmp_path / "v2")
        while (pins / first).exists():
            time.sleep(0.1)
    finally:
        is_over.set()
        for asker in askers:
            asker.join()
    assert faults == []
    by_version = {
        one: {answer[1:] for answer in answers if answer[0] == one} for one, *_ in answers
    }
    assert len(by_version) == 2 and by_version.keys() > {f"test@{first}"}
    assert all(len(texts) == 1 for texts in by_version.values())
    assert len({text for texts in by_version.values() for text, _ in texts}) == 2
    assert answers[-1][2].startswith("folder:")
    second = answers[-1][0].partition("@")[2]
    assert [folder.name for folder in pins.iterdir()] == [second]
    rollout(loaded, "swap", "test", "--to", "adapter")
    assert ask()[0] == f"test@{first}" and ask()[2] == served.artifact
    with served.client() as client:
        for gone in (f"test@{second}", f"test@{first}", "test.base"):
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model=gone, prompt="x")
    with pytest.raises(AssertionError, match="is no adapter"):
        rollout(loaded, "swap", "test", "--to", str(tmp_path))
    assert ask()[0] == f"test@{first}"


def rollout(recipe: Recipe, *arguments: str) -> str:
    command = [sys.executable, "-m", "tunesmith.cli", "rollout", *arguments]
    found = subprocess.run(
        [*command, "--store", str(recipe.store.folder)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_stop_lets_open_streams_end_and_leaves_no_process(
    served: Served, recipe: tuple[Path, str]
) -> None:
    """The last test of the module: it stops the server."""
    group = engine_group(served.process.pid)
    assert len(members(group)) >= 3
    with served.client() as client:
        streams = [
            client.chat.completions.create(
                model="test", messages=MESSAGES, max_tokens=400, temperature=0, stream=True,
                extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
            )
            for _ in range(20)
        ]  # fmt: skip
        served.process.send_signal(signal.SIGTERM)
        stopped_s = time.monotonic()
        while served.get("/readyz")[0] != 503:
            assert time.monotonic() - stopped_s < 1
        assert served.get("/readyz")[2]["error"]["code"] == "shutting_down"
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="test", prompt="x")
        for pieces in map(list, streams):
            assert pieces[-1].usage and pieces[-1].usage.completion_tokens == 400
            assert any(piece.choices and piece.choices[0].finish_reason for piece in pieces)
    out, said = served.process.communicate(timeout=60)
    assert served.process.returncode == 0, said
    assert members(group) == []
    result = json.loads(out)
    assert result["model"] == "test" and result["requests"] >= 6
    assert f"{served.url}/v1 model test" in said and "try: curl" in said
    assert KEY not in said and "$BOT_KEY" in said
    store = load_recipe(recipe[0]).store.folder
    log = read_log(
        open_gateway(store), store / "serve", ["status", "output_tokens", "ending", "artifact"]
    ).to_pylist()
    longest = [line for line in log if line["output_tokens"] == 400]
    assert [line["ending"] for line in longest] == ["complete"] * len(streams)
    assert all(line["artifact"] for line in log)
    assert {200, 400, 404, 503} <= {line["status"] for line in log}


def engine_group(parent: int) -> int:
    """The guard of the engine: the gateway's one child."""
    listing = Path(f"/proc/{parent}/task").glob("*/children")
    (child,) = [pid for file in listing for pid in file.read_text().split()]
    return int(child)
