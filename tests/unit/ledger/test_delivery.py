"""A model that leaves the store: whole, unchanged, and without what belongs to this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest

from tunesmith.config import GateError, Recipe, TunesmithError, UserError
from tunesmith.ledger import Artifact, Draft, Store, deliver, hash_file

RECIPE = Recipe.model_validate({"name": "bot", "model": {"base": "some/model"}})
FILES = ["README.md", "config.json", "deep/weights.bin", "manifest.json"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def model(store: Store) -> Artifact:
    what = Draft("checkpoint", "w4a16", "bot", {"seed": 0})
    with store.write(what, RECIPE) as work:
        (work.out / "config.json").write_text("{}")
        (work.out / "deep").mkdir()
        (work.out / "deep" / "weights.bin").write_bytes(bytes(range(256)))
        work.metrics["scheme"] = "w4a16"
    found = store.find(what.id)
    assert found is not None
    return found


def test_a_folder_has_every_byte_and_a_card(store: Store, model: Artifact, tmp_path: Path) -> None:
    target = tmp_path / "far" / "model"
    assert deliver(store, model, str(target)) == str(target)
    found = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert found == FILES
    for name, entry in model.manifest.files.items():
        if name != "recipe.resolved.yaml":
            assert hash_file(target / name) == entry.sha256
    card = (target / "README.md").read_text()
    assert model.id in card and "| scheme | w4a16 |" in card and "vllm serve ." in card
    with pytest.raises(UserError, match="exists already"):
        deliver(store, model, str(target))


def test_storage_gets_the_manifest_last(store: Store, model: Artifact) -> None:
    target = "memory://bucket/model"
    assert deliver(store, model, target) == target
    system = fsspec.filesystem("memory")
    stored = sorted(path.removeprefix("/bucket/model/") for path in system.find("/bucket/model"))
    assert stored == FILES
    assert system.cat("/bucket/model/deep/weights.bin") == bytes(range(256))
    times = {name: system.created(f"/bucket/model/{name}") for name in FILES}
    assert max(times, key=lambda name: times[name]) == "manifest.json"
    with pytest.raises(UserError, match="holds a model already"):
        deliver(store, model, target)
    with pytest.raises(UserError, match="nowhere"):
        deliver(store, model, "nowhere://bucket/model")


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a commit of small files needs."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, body))  # type: ignore[attr-defined]
        if self.server.refuses:  # type: ignore[attr-defined]
            return self._answer(403, {"error": "not yours"})
        if self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            return self._answer(200, {"files": modes})
        url = f"http://127.0.0.1:{self.server.server_port}/me/bot"  # type: ignore[attr-defined]
        return self._answer(
            200, {"url": url, "id": "me/bot", "commitUrl": f"{url}/commit/1", "commitOid": "1"}
        )

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/bot"})

    def _answer(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_gets_one_commit_in_a_private_repository(
    store: Store, model: Artifact, hub: Any
) -> None:
    assert deliver(store, model, "hub:me/bot").endswith("/me/bot/commit/1")
    path, body = hub.seen[0]
    assert path == "/api/repos/create"
    asked = json.loads(body)
    assert asked.get("private", asked.get("visibility")) in (True, "private")
    commits = [body for path, body in hub.seen if path.endswith("/commit/main")]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    assert sorted(line["value"]["path"] for line in lines if line["key"] == "file") == FILES
    assert lines[0]["value"]["summary"] == f"Export {model.id}"
    hub.refuses = True
    with pytest.raises(TunesmithError, match="the hub refused it"):
        deliver(store, model, "hub:me/bot")
    with pytest.raises(UserError, match="hub:OWNER/NAME"):
        deliver(store, model, "hub:bot")


def test_what_is_damaged_or_no_model_does_not_leave(
    store: Store, model: Artifact, tmp_path: Path
) -> None:
    (model.folder / "config.json").write_text("[]")
    with pytest.raises(GateError, match="damaged and stays here"):
        deliver(store, model, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    rows = Draft("dataset", "data", "bot", {"seed": 0})
    with store.write(rows, RECIPE) as work:
        (work.out / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="is no model"):
        deliver(store, store.get(rows.id), str(tmp_path / "rows"))
