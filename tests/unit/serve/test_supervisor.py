"""An engine that dies is started again; the stand-in for vLLM answers, refuses, or ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import members

from tunesmith.config import ModelError
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec
from tunesmith.serve.supervisor import Supervisor

STAND_IN = """
import http.server, pathlib, sys
if pathlib.Path({flag!r}).exists():
    raise ValueError("no kernel for this")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineServer:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    code = STAND_IN.format(flag=str(tmp_path / "refuse"))
    (package / "api_server.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spec = EngineSpec(model=tmp_path, settings=Engine(), dtype="float32", served_name="x")
    return EngineServer(spec, log_path=tmp_path / "engine.log")


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_dead_engine_is_started_again_and_its_log_kept(
    server: EngineServer, tmp_path: Path
) -> None:
    async def story() -> None:
        supervisor = Supervisor(server)
        assert not supervisor.is_ready
        task = supervisor.start()
        await until(lambda: supervisor.is_ready)
        first = server.pid
        assert first
        os.killpg(first, signal.SIGKILL)
        await until(lambda: not supervisor.is_ready, 1)
        await until(lambda: supervisor.is_ready)
        assert server.pid != first and supervisor.restarts == 1
        assert (tmp_path / "engine.died.log").exists()
        # It may also fail to come back: tried again, with pauses, until it does.
        (tmp_path / "refuse").touch()
        os.killpg(server.pid or 0, signal.SIGKILL)
        await until(lambda: supervisor.restarts == 3)
        (tmp_path / "refuse").unlink()
        await until(lambda: supervisor.is_ready)
        last = server.pid
        await supervisor.stop()
        assert task.done() and not task.exception() and not supervisor.is_ready
        assert last and not members(last)

    asyncio.run(story())


def test_a_first_start_that_fails_is_the_end(server: EngineServer, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()

    async def story() -> None:
        supervisor = Supervisor(server)
        with pytest.raises(ModelError, match="no kernel for this"):
            await supervisor.start()
        await supervisor.stop()

    asyncio.run(story())


def test_a_stop_in_the_middle_of_a_start_leaves_nothing(server: EngineServer) -> None:
    async def story() -> None:
        supervisor = Supervisor(server)
        task = supervisor.start()
        await until(lambda: server.pid is not None)
        group = server.pid
        await asyncio.wait_for(supervisor.stop(), 5)
        assert task.done() and not task.exception()
        assert group and not members(group)

    asyncio.run(story())
