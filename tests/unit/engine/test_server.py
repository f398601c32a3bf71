"""How the server is watched, with a small stand-in for vLLM in its process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import members

from tunesmith.config import ModelError, TunesmithError
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec

HEALTHY = """
import http.server, signal, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
subprocess.Popen(["sleep", "300"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(0)))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
REFUSING = """
print("ValueError: no kernel for this")
raise SystemExit(1)
"""
SLOW = "import time; time.sleep(60)"

Make = Callable[[str], EngineServer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A server whose process runs the given code in place of vLLM."""

    def _make(code: str) -> EngineServer:
        package = tmp_path / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for folder in (package, package.parent, package.parent.parent):
            (folder / "__init__.py").touch()
        (package / "api_server.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        spec = EngineSpec(
            model=tmp_path, settings=Engine(start_timeout_s=2), dtype="float32", served_name="x"
        )
        return EngineServer(spec, log_path=tmp_path / "logs" / "engine.log")

    return _make


def test_a_healthy_server_is_ready_drains_and_leaves_nothing(make: Make) -> None:
    server = make(HEALTHY)
    with server:
        group = server.pid
        assert server.is_alive and server.load_s > 0 and group
        assert server.url.startswith("http://127.0.0.1:") and server.url.endswith("/v1")
    assert not server.is_alive and server.pid is None
    assert "drained" in server.log_path.read_text()
    assert not members(group)
    server.stop()  # again is harmless


def test_an_early_end_is_an_error_with_its_cause_at_once(make: Make) -> None:
    server = make(REFUSING)
    started_s = time.monotonic()
    with pytest.raises(ModelError, match="no kernel for this"):
        server.start()
    assert time.monotonic() - started_s < 1.9
    assert server.pid is None


def test_a_start_that_takes_too_long_is_ended(make: Make) -> None:
    server = make(SLOW)
    with pytest.raises(TunesmithError, match="not ready .* after 2 s; raise engine.start_timeout"):
        server.start()
    assert server.pid is None
