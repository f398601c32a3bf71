"""vLLM's OpenAI server as a supervised subprocess on loopback."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.config.errors import ModelError, TunesmithError
from tunesmith.engine.adapters import check_later_adapter
from tunesmith.engine.environment import has_gpu_engine, server_environment
from tunesmith.engine.failures import start_failure
from tunesmith.engine.group import end_group, start_group
from tunesmith.engine.spec import EngineSpec, engine_arguments

_HOST = "127.0.0.1"
_POLL_INTERVAL_S = 0.1
_STOP_TIMEOUT_S = 10.0
_ADAPTER_TIMEOUT_S = 120.0


class EngineServer:
    """One model behind vLLM's OpenAI API, for as long as the `with` block lasts.

    The process group is gone afterwards, and also when this process dies by SIGKILL.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        port: int | None = None,
        log_path: Path,
        drain_timeout_s: int = 0,
    ) -> None:
        self.spec = spec
        self.log_path = log_path
        self.load_s = 0.0
        """Seconds from the start of the process until it was ready."""
        self._port = port
        self._drain_timeout_s = drain_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._arguments: dict[str, Any] = {}

    @property
    def url(self) -> str:
        """The API's base, such as `http://127.0.0.1:41733/v1`."""
        return f"http://{_HOST}:{self._port}/v1"

    @property
    def pid(self) -> int | None:
        """The guard's pid, which is the id of the whole process group; None while it is down."""
        return self._process.pid if self._process else None

    @property
    def is_alive(self) -> bool:
        """Whether the processes are there; a killed engine takes the whole group with it."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> EngineServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it answers.

        Raises ModelError when vLLM refuses the model, TunesmithError when it ends or takes
        longer than `engine.start_timeout_s`.
        """
        gpu = has_gpu_engine()
        started_s = time.monotonic()
        self._port = self._port or _free_port()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *self._flags(gpu)]
        with self.log_path.open("wb") as log:
            environment = server_environment(gpu=gpu, adapters_change=self.spec.adapter_slots > 0)
            self._process = start_group(command, log=log, environment=environment)
        try:
            self._wait_ready(started_s)
        except BaseException:
            self.kill()
            raise
        self.load_s = time.monotonic() - started_s

    def stop(self) -> None:
        """SIGTERM, wait until open requests had `drain_timeout_s`, then SIGKILL of the group."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._drain_timeout_s + _STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End every process of the group now, and wait until their memory is free again."""
        process, self._process = self._process, None
        if process is not None:
            end_group(process)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Have the engine know a further adapter by a name that it has not had yet, now and
        whenever it is started again; its folder has to stay as it is meanwhile.

        Raises ModelError when it does not fit, or has no room.
        """
        spec = self.spec
        if len(spec.adapters) >= spec.adapter_slots:
            raise ModelError(
                f"the engine holds {len(spec.adapters)} adapters, as many as it has room for; "
                "raise adapter_slots of its upstream, or take one of its routes elsewhere first"
            )
        if self.is_alive:
            check_later_adapter(spec.model, folder, self._arguments)
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self.spec = replace(spec, adapters={**spec.adapters, name: folder})

    def remove_adapter(self, name: str) -> None:
        """Have the engine forget an adapter that no request asks for any more."""
        kept = {other: folder for other, folder in self.spec.adapters.items() if other != name}
        self.spec = replace(self.spec, adapters=kept)
        if self.is_alive:
            self._post("unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: dict[str, str]) -> None:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_ADAPTER_TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")
            raise ModelError(f"vLLM refuses {body['lora_name']}: {said}") from error
        except OSError as error:
            raise TunesmithError(f"the engine does not answer: {error}") from error

    def _wait_ready(self, started_s: float) -> None:
        timeout_s = self.spec.settings.start_timeout_s
        while not _is_healthy(f"http://{_HOST}:{self._port}/health"):
            if not self.is_alive:
                text = self.log_path.read_text(encoding="utf-8", errors="replace")
                raise start_failure(text, self.spec, self.log_path)
            if time.monotonic() - started_s > timeout_s:
                raise TunesmithError(
                    f"vLLM was not ready with {self.spec.model} after {timeout_s} s; raise "
                    f"engine.start_timeout_s, or see its log: {self.log_path}"
                )
            time.sleep(_POLL_INTERVAL_S)

    def _flags(self, gpu: bool) -> list[str]:
        spec = self.spec
        self._arguments = engine_arguments(spec, gpu=gpu)
        arguments: dict[str, Any] = self._arguments | {
            "host": _HOST,
            "port": self._port,
            "served_model_name": spec.served_name,
            "shutdown_timeout": self._drain_timeout_s,
            "disable_uvicorn_access_log": True,
            # Tokens that the prefix cache had are told apart in the usage.
            "enable_prompt_tokens_details": True,
        }
        if spec.chat_template:
            arguments["chat_template"] = str(spec.chat_template)
        if spec.adapter:
            arguments["served_model_name"] = f"{spec.served_name}.base"
            arguments["lora_modules"] = f"{spec.served_name}={spec.adapter}"
        elif spec.adapters:
            named = spec.adapters.items()
            arguments["lora_modules"] = [f"{name}={path}" for name, path in named if path]
        return command_line(arguments)


def command_line(arguments: dict[str, Any]) -> list[str]:
    """`{"max_num_seqs": 8, "enforce_eager": True}` → `--max-num-seqs 8 --enforce-eager`."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *value]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
