"""Bad input ends with exit code 2, names the place and says the way out; nothing is spent."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def conversations(count: int, length: int = 1) -> str:
    """That many different ones."""
    return lines(
        *(
            {
                "messages": [
                    {"role": "user", "content": f"say {n}"},
                    {"role": "assistant", "content": f"{n} " * length},
                ]
            }
            for n in range(count)
        )
    )


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def tunesmith(
    folder: Path, command: str, base: Path, *prefix: str, env: dict[str, str] | None = None,
    **sections: Any,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run one command on a recipe with these sections."""
    recipe: dict[str, Any] = {
        "name": "bad",
        "model": {"base": str(base)},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "train": {"method": "lora", "max_steps": 1},
    }
    for name, section in sections.items():
        recipe[name] = section and recipe.get(name, {}) | section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return subprocess.run(
        [*prefix, sys.executable, "-m", "tunesmith.cli", *command.split(), "recipe.yaml"],
        capture_output=True, text=True, cwd=folder, timeout=120, env=os.environ | (env or {}),
    )  # fmt: skip


def check(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["rows.jsonl: no such file"]),
        ("", ["rows.jsonl: no rows"]),
        (lines(GOOD, GOOD, '{"messages": [', GOOD), ["rows.jsonl:3", "JSON"]),
        (lines({"prompt": "a", "completion": "b"}), ["messages", "prompt_completion"]),
        (lines({"messages": GOOD["messages"][:1]}), ["rows.jsonl:1", "assistant"]),
    ],
    ids=["missing", "empty", "invalid JSON", "wrong column", "no assistant turn"],
)
def test_data(tmp_path: Path, llama: Path, content: str | None, expected: list[str]) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    check(tunesmith(tmp_path, "train", llama), *expected)


def test_a_base_without_a_chat_template(tmp_path: Path, llama: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "chat_template.jinja").unlink()
    (tmp_path / "rows.jsonl").write_text(conversations(30))
    check(tunesmith(tmp_path, "train", bare), "chat template", "model.chat_template")


def test_an_unknown_scheme(tmp_path: Path, llama: Path) -> None:
    done = tunesmith(tmp_path, "quantize", llama, quantize={"scheme": "w3a7"})
    check(done, "recipe.yaml:", "quantize.scheme", "w8a8-int8")


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(conversations(30))
    check(tunesmith(tmp_path, "train", tmp_path / "absent"), "no such folder")


def test_a_taken_port(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(conversations(30))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = tunesmith(tmp_path, "serve", llama, serve={"port": port, "model": "base"})
    check(done, f"127.0.0.1:{port} is taken", "serve.port=")


def test_a_full_disk_keeps_what_there_is_and_resumes(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(conversations(2000, length=200))
    (tmp_path / "small").mkdir()
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    on_small_disk = (
        "unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
        'mount -t tmpfs -o size=1m none small && exec "$@"', "sh",
    )  # fmt: skip
    store = {"folder": "small/store"}
    done = tunesmith(tmp_path, "data", llama, *on_small_disk, store=store)
    check(done, "no space left on the disk", "run the same command again")
    assert tunesmith(tmp_path, "data", llama, store=store).returncode == 0


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("train", "torch", "train"),
        ("train", "peft", "train"),
        ("quantize", "llmcompressor", "quantize"),
        ("serve", "aiohttp", "infer"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, llama: Path, command: str, module: str, extra: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(conversations(30))
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    sections: dict[str, Any] = {
        "quantize": {"quantize": {"scheme": "w8a8-int8"}, "train": None},
        "serve": {"serve": {"model": "base"}},
    }
    if command == "quantize":
        assert tunesmith(tmp_path, "data", llama).returncode == 0
    done = tunesmith(
        tmp_path, command, llama, env={"PYTHONPATH": str(tmp_path / "blocked")},
        **sections.get(command, {}),
    )  # fmt: skip
    check(done, f"tunesmith[{extra}]", module)
