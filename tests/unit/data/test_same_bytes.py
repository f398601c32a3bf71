"""The bytes of data sets that exist: whatever reads them, the same recipe must not give others.

The hashes were recorded while all rows were still held in memory.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data import make_dataset
from tunesmith.data.dataset import ERRORS_FILE, EVALUATION_FILE, TRAIN_FILE

WORDS = ["alpha", "beta", "γάμμα", "delta\u2028", "\U0001f40d", 'quo"te', "a,b", "line\nbreak"]


def write_messages(path: Path, count: int, seed: int) -> None:
    """Repeated questions, repeated rows, turns without an answer, and every fiftieth row bad."""
    draw = random.Random(seed)
    lines = []
    for at in range(count):
        turns = [
            {"role": "user", "content": f"{draw.choice(WORDS)} {draw.randrange(60)}"},
            {"role": "assistant", "content": draw.choice(WORDS)},
        ]
        turns += [{"role": "user", "content": "more?"}] * draw.randrange(2)
        lines.append("{bad" if at % 50 == 7 else json.dumps({"messages": turns, "extra": at}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_texts(path: Path, count: int) -> None:
    draw = random.Random(3)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "number"])
        for at in range(count):
            writer.writerow([" ".join(draw.choices(WORDS, k=draw.randrange(3))), at])


CASES: dict[str, dict[str, Any]] = {
    "chosen": {"train": "a.jsonl", "max_rows": 150, "evaluation_fraction": 0.1},
    "held_out": {"train": "a.jsonl", "evaluation": "b.jsonl"},
    "texts": {"train": "c.csv", "format": "text", "max_error_rate": 0.5},
}
RECORDED = {
    "chosen": (
        "dataset-2d7f60b0590b",
        "f34b7adca2db2fa2",
        "d97b8996ed4bf874",
        "be04408cf542e27c",
        "876e2c1ef2d420cb",
    ),
    "held_out": (
        "dataset-fcf711235110",
        "d6d1f5e21f85c0e1",
        "f95066c82393a6b9",
        "2677a4a693080ade",
        "5f6090bad33b45db",
    ),
    "texts": (
        "dataset-13895b33ee43",
        "db41f81f077804ab",
        "fc93a25b1a5e1b3e",
        "fee0163e5020165a",
        "15ea8de7d9a7dc7f",
    ),
}
"""Artifact id, then hashes of the training, held-out and dropped rows and of the metrics."""


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_that_were_recorded(
    case: str, make_stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_messages(Path("a.jsonl"), 400, seed=1)
    write_messages(Path("b.jsonl"), 60, seed=2)
    write_texts(Path("c.csv"), 300)
    artifact = make_dataset(make_stages(**{"max_error_rate": 0.1, **CASES[case]}))
    files = [(artifact.root / name) for name in (TRAIN_FILE, EVALUATION_FILE, ERRORS_FILE)]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files]
    metrics = {key: value for key, value in artifact.manifest.metrics.items() if key != "sources"}
    figures = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()[:16]
    assert (artifact.id, *hashes, figures) == RECORDED[case]
    assert metrics["dropped_rows"]
    assert metrics["duplicate_rows"]
