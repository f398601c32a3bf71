"""`tunesmith run` from data to report, again without work, and after a kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config import load_recipe
from tunesmith.ledger import Store
from tunesmith.pipeline import Stages
from tunesmith.pipeline.run import steps

pytestmark = pytest.mark.timeout(1200)  # the whole pipeline, begun eight times, is one fixture

HALF_MADE = {
    "data": "scratch",
    "adapter": "scratch/**/step-????????",
    "tuned": "scratch/*",
    "w8a8-int8": "scratch/quantize.log",
    "eval tuned": "scratch",
    "batch": "scratch/shards",
    "bench batch": "scratch/tuned.json",
}
"""Artifact → what its work folder holds when it is half made."""


def write_recipe(folder: Path, base: Path, rows: list[dict[str, Any]]) -> Path:
    """Every section, on sixty conversations and a random model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {n} plus {n}?"}) + "\n" for n in range(5))
    )
    recipe = {
        "name": "sums",
        "model": {"base": str(base), "dtype": "bfloat16"},
        "data": {"train": "rows.jsonl", "max_length": 96, "evaluation_fraction": 0.2},
        "train": {
            "method": "lora",
            "lora": {"r": 4, "lora_alpha": 8},
            "max_steps": 12,
            "save_steps": 3,
            "per_device_train_batch_size": 4,
        },
        "quantize": {"scheme": "w8a8-int8", "calibration_rows": 8, "verify_rows": 8},
        "evaluate": {"variants": ["tuned", "w8a8-int8"], "max_rows": 6, "max_tokens": 8},
        "engine": {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.25},
        "batch": {"input": "prompts.jsonl", "output": "answers.jsonl", "max_tokens": 8},
        "bench": {"rounds": 1, "requests": 8, "concurrency": 4, "request_rate": 8, "max_tokens": 8},
        "price": {"gpu_hour_usd": 1.0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def tunesmith(command: str, path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", command, path.name, *overrides, "--json"],
        capture_output=True, text=True, cwd=path.parent, timeout=540,
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, rows: list[dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """A run that was killed in the middle of each stage, and then finished by the same command."""
    path = write_recipe(tmp_path_factory.mktemp("run"), llama, rows)
    work = path.parent / ".tunesmith" / "work"
    with contextlib.chdir(path.parent):
        stages = Stages(load_recipe(path))
        ids = {draft.label: draft.id for step in steps(stages) for draft in step.makes}
    for label, begun in HALF_MADE.items():
        kill_when(path, work / ids[label], begun)
    done = tunesmith("run", path)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["ids"] == ids
    return path, result


def test_every_section_leaves_its_artifact_and_the_report(
    first: tuple[Path, dict[str, Any]],
) -> None:
    path, result = first
    assert set(result["ids"]) == {
        "data", "base", "adapter", "tuned", "w8a8-int8", "eval tuned", "eval w8a8-int8", "batch",
        "bench batch", "bench serve", "fidelity w8a8-int8",
    }  # fmt: skip
    store = Store(path.parent / ".tunesmith")
    for artifact_id in result["ids"].values():
        _, faults = store.verify(artifact_id)
        assert faults == []
    answers = (path.parent / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 5
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert all(artifact_id in page for artifact_id in result["ids"].values())
    assert {row[0] for row in result["summary"]["rows"]} >= {"tuned", "w8a8-int8"}


def test_a_second_run_does_nothing_and_has_the_same_ids(
    first: tuple[Path, dict[str, Any]],
) -> None:
    path, result = first
    again = tunesmith("run", path)
    assert again.returncode == 0
    assert json.loads(again.stdout)["ids"] == result["ids"]
    assert ": making" not in again.stderr
    assert again.stderr.count("made already") == 6


def test_a_changed_byte_of_data_gives_new_ids_downstream_and_keeps_the_base(
    first: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = first
    recipe = load_recipe(path)
    monkeypatch.chdir(path.parent)
    before = Stages(recipe)
    ids = {name: draft.id for name, draft in before.variants.items()}
    rows = path.parent / "rows.jsonl"
    whole = rows.read_text()
    try:
        rows.write_text(whole.replace("1 plus 1", "1 plus 7", 1))
        after = Stages(recipe)
        changed = {name: draft.id for name, draft in after.variants.items()}
        assert changed["base"] == ids["base"]
        assert after.dataset.id != before.dataset.id
        for name in ("adapter", "tuned", "w8a8-int8"):
            assert changed[name] != ids[name]
            assert after.evaluation(name).id != before.evaluation(name).id
        assert after.bench("serve").id != before.bench("serve").id
    finally:
        rows.write_text(whole)


def test_what_was_killed_left_nothing_behind_and_the_adapter_of_a_whole_training(
    first: tuple[Path, dict[str, Any]], llama: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path, result = first
    killed, ids = Store(path.parent / ".tunesmith"), result["ids"]
    made = {folder.name for folder in (path.parent / ".tunesmith" / "artifacts").iterdir()}
    assert made == set(ids.values())
    assert not list((path.parent / ".tunesmith" / "work").glob("*/scratch"))
    whole = write_recipe(tmp_path, llama, rows)
    for stage in ("data", "train"):
        done = tunesmith(stage, whole)
        assert done.returncode == 0, done.stderr[-4000:]
    reference = Store(tmp_path / ".tunesmith").get(ids["adapter"])
    weights = "adapter_model.safetensors"
    assert killed.get(ids["adapter"]).manifest.files[weights] == reference.manifest.files[weights]


def kill_when(path: Path, work: Path, begun: str) -> None:
    """Start the run and kill its whole process group once this is in the artifact's work folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith.cli", "run", path.name], cwd=path.parent,
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline_s = time.monotonic() + 200
    while not list(work.glob(begun)):
        assert process.poll() is None and time.monotonic() < deadline_s, work.name
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (work.parent.parent / "artifacts" / work.name).exists()
