"""`tunesmith serve` and `tunesmith rollout` with their processes, over a stand-in for vLLM that
starts in a moment, loads adapters, and answers with the hash of what it has loaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import members
from transformers import AutoModelForCausalLM

from tunesmith.config import ModelError, UserError
from tunesmith.config.load import dump_recipe
from tunesmith.pipeline import Stages
from tunesmith.serve.build import Builder, Part
from tunesmith.serve.control import ask_gateway
from tunesmith.serve.govern.database import open_gateway

STAND_IN = """
import hashlib, http.server, json, pathlib, sys

def after(flag):
    found = []
    for one in sys.argv[sys.argv.index(flag) + 1:] if flag in sys.argv else []:
        if one.startswith("--"):
            break
        found.append(one)
    return found

BASE = after("--served-model-name")[0]
LOADED = {}

def load(name, path):
    weights = (pathlib.Path(path) / "adapter_model.safetensors").read_bytes()
    LOADED[name] = hashlib.sha256(weights).hexdigest()[:8]

for one in after("--lora-modules"):
    load(*one.split("=", 1))

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_):
        pass
    def say(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.say({"data": [{"id": BASE, "max_model_len": 4096, "owned_by": "vllm"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/load_lora_adapter"):
            load(body["lora_name"], body["lora_path"])
            return self.say("ok")
        if self.path.endswith("/unload_lora_adapter"):
            del LOADED[body["lora_name"]]
            return self.say("ok")
        text = LOADED.get(body["model"], "base" if body["model"] == BASE else None)
        if text is None:
            return self.say({"error": {"message": "no such model"}}, 404)
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        self.say({"id": "c", "model": body["model"], "choices": [{"text": text}], "usage": usage})

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

Server(("127.0.0.1", int(after("--port")[0])), Handler).serve_forever()
"""


class Gateway:
    """`tunesmith serve` as a process."""

    def __init__(self, recipe: Path, store: Path, port: int, stand_in: Path) -> None:
        self.recipe, self.store, self.port = recipe, store, port
        self._environment = os.environ | {"PYTHONPATH": str(stand_in)}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "serve", str(self.recipe), "--json"],
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.until(lambda: self.get("/readyz") == 200)

    def until(self, condition: Callable[[], bool], longest_s: float = 60.0) -> None:
        assert self.process
        deadline_s = time.monotonic() + longest_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def get(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def ask(self, model: str = "test") -> tuple[str, str, str]:
        """Version, answer and artifact."""
        body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body,
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)
            artifact = answer.headers["x-tunesmith-artifact"]
            return found["model"], found["choices"][0]["text"], artifact

    def engines(self) -> list[int]:
        """The guards of the engines: the children of the gateway."""
        assert self.process
        listing = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in listing for pid in file.read_text().split()]

    def rollout(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunesmith.cli", "rollout", *arguments]
        return subprocess.run(
            [*command, "--store", str(self.store)], capture_output=True, text=True, timeout=60
        )


def adapter(base: Path, folder: Path, seed: int, rank: int = 4) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def served(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]
) -> Iterator[tuple[Gateway, Path]]:
    """A gateway that serves an adapter, and the folder of the base."""
    package = tmp_path / "stand_in" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(STAND_IN)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    stages = stages_of(
        tmp_path,
        llama,
        train={"method": "lora", "lora": {"r": 4}},
        serve={"port": port, "model": "adapter", "rollout": {"min_requests": 5}},
    )
    base = stages.made(stages.base).root
    with stages.store.write(stages.trained, stages.recipe) as work:
        adapter(base, work.out, 1)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(stages.recipe))
    gateway = Gateway(path, stages.store.folder, port, tmp_path / "stand_in")
    gateway.start()
    try:
        yield gateway, base
    finally:
        assert gateway.process
        gateway.process.kill()
        gateway.process.communicate()


def test_routes_move_on_a_running_server_and_stay_moved(
    served: tuple[Gateway, Path], tmp_path: Path
) -> None:
    gateway, base = served
    assert gateway.process
    first, text, artifact = gateway.ask()
    pins = gateway.store / "serve" / "adapters"
    assert first.startswith("test@") and artifact.startswith("adapter-")

    database = open_gateway(gateway.store)

    def swap(route: str, to: object) -> None:
        ask_gateway(database, route, "swap", str(to))

    def pinned() -> set[str]:
        return {path.name for path in pins.iterdir() if path.is_dir()}

    # Another version of the adapter, whose folder is deleted as soon as it is loaded.
    swap("test", adapter(base, tmp_path / "v2", 2))
    shutil.rmtree(tmp_path / "v2")
    second, other, artifact = gateway.ask()
    assert second != first and other != text and artifact.startswith("folder:")
    gateway.until(lambda: pinned() == {second.partition("@")[2]})

    # What does not fit is refused, and nothing changes.
    for folder, words in [
        (adapter(base, tmp_path / "large", 3, rank=64), "room for 64"),
        (tmp_path, "is no adapter"),
        (tmp_path / "nowhere", "nowhere"),
    ]:
        with pytest.raises(UserError, match=words):
            swap("test", folder)
    with pytest.raises(UserError, match="no gateway"):
        swap("pal", "base")
    assert gateway.ask()[:2] == (second, other)

    # An engine that dies comes back with what it held last.
    (guard,) = gateway.engines()
    os.killpg(guard, signal.SIGKILL)
    gateway.until(lambda: gateway.get("/readyz") == 503)
    gateway.until(lambda: gateway.get("/readyz") == 200)
    assert gateway.ask()[:2] == (second, other)

    # So does a gateway.
    (guard,) = gateway.engines()
    gateway.process.kill()
    gateway.process.communicate()
    deadline_s = time.monotonic() + 5
    while members(guard):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    gateway.start()
    assert gateway.ask() == (second, other, artifact)

    # Another model on an engine of its own; the old one is let go.
    swap("test", "base")
    assert gateway.ask()[:2] == ("base", "base")
    gateway.until(lambda: len(gateway.engines()) == 1)

    # A rollout, by hand.
    began = gateway.rollout("start", "test", "--to", "adapter", "--json")
    assert "1% of test" in json.loads(began.stdout)["result"], began.stderr
    with pytest.raises(UserError, match="promote or abort"):
        swap("test", "adapter")
    assert len(gateway.engines()) == 2
    report = status(gateway)
    assert (report["state"], report["share_percent"]) == ("running", 1.0)
    ask_gateway(database, "test", "abort")
    gateway.until(lambda: len(gateway.engines()) == 1)
    assert gateway.ask()[0] == "base"
    ask_gateway(database, "test", "start", "adapter")
    ask_gateway(database, "test", "promote")
    assert gateway.ask()[1:] == (text, report["artifact"])
    report = status(gateway)
    assert report["state"] == "promoted"
    assert "promote" in [decision["action"] for decision in report["decisions"]]


def test_a_recipe_names_engines_adapters_on_them_and_urls(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = adapter(llama, tmp_path / "other", 2)
    upstreams: dict[str, dict[str, Any]] = {
        "bot": {"model": "adapter", "adapter_slots": 3, "max_open_requests": 9},
        "plain": {"model": "base", "gpu_memory_utilization": 0.3},
        "legal": {"adapter": str(other), "on": "bot"},
        "far": {"url": "http://127.0.0.1:9/v1", "model": "large", "api_key_env": "FAR_KEY"},
    }
    stages = stages_of(
        tmp_path,
        llama,
        train={"method": "lora", "lora": {"r": 4}},
        serve={"upstreams": upstreams, "routes": {"a": {"arms": {"bot": 1}, "fallback": ["far"]}}},
    )
    assert stages.recipe.serve
    with stages.store.write(stages.trained, stages.recipe) as work:
        adapter(llama, work.out, 1)
    builder = Builder(stages, stages.recipe.serve)
    with pytest.raises(UserError, match="FAR_KEY is not set"):
        builder.fleet()
    monkeypatch.setenv("FAR_KEY", "s3cret")
    fleet = builder.fleet()
    found = fleet.table.upstreams
    assert list(found) == list(upstreams) and list(fleet.engines) == ["bot", "plain"]
    assert found["bot"].place is found["legal"].place and found["bot"].load.most_open == 9
    spec = fleet.engines["bot"].supervisor.server.spec
    assert list(spec.adapters) == [found["bot"].model, found["legal"].model]
    assert found["legal"].model.startswith("legal@") and spec.served_name == "bot.base"
    assert fleet.engines["plain"].supervisor.server.spec.settings.gpu_memory_utilization == 0.3
    assert found["far"].headers == {"Authorization": "Bearer s3cret"}
    assert fleet.table.routes["a"].order("bot") == ("bot", "far")

    # The same adapter by another way is the same version; one for another base is none at all.
    again = builder.resolve(fleet, "a", stages.trained.id)
    assert (
        isinstance(again, Part)
        and again.upstream.model.split("@")[1] == (found["bot"].model.split("@")[1])
    )
    assert builder.resolve(fleet, "a", "far") is found["far"]
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="another chat template"):
        builder.resolve(fleet, "a", str(other))
    with pytest.raises(ModelError, match="cannot be served"):
        builder.resolve(fleet, "a", stages.dataset.id)
    fleet.engines["bot"].model_id = "base-of-another"
    with pytest.raises(UserError, match="no engine here serves adapters over base-"):
        builder.resolve(fleet, "a", stages.trained.id)


def status(gateway: Gateway) -> dict[str, Any]:
    found = gateway.rollout("status", "test", "--replay", "--json")
    assert found.returncode == 0, found.stderr
    newest: dict[str, Any] = json.loads(found.stdout)["rollouts"][0]
    return newest
