"""Data larger than memory: what a process takes must not grow with its rows' texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROW_BYTES = 5_000
_MEASURE = """
import sys
from pathlib import Path
from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset
from tunesmith.pipeline.stages import Stages

def peak_mib():
    # Not ru_maxrss, in which a process begins with the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def make(name, **data):
    recipe = {
        "name": "test", "store": {"folder": "store"}, "model": {"base": "x/y"},
        "data": {"train": name, "format": "text", **data},
    }
    return make_dataset(Stages(Recipe.model_validate(recipe))).manifest.metrics

make("small.jsonl")
before = peak_mib()
metrics = make(sys.argv[1], max_rows=6_000)
print(peak_mib() - before, metrics["train_rows"], metrics["unused_rows"])
"""


@pytest.mark.parametrize(
    ("suffix", "rows"), [(".jsonl", 40_000), (".json", 8_000), (".csv", 8_000)]
)
def test_a_large_file_takes_a_few_megabytes(tmp_path: Path, suffix: str, rows: int) -> None:
    (tmp_path / "small.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    path = tmp_path / f"large{suffix}"
    with path.open("w", encoding="utf-8") as file:
        file.write({".jsonl": "", ".json": "[", ".csv": "text\n"}[suffix])
        for at in range(rows):
            text = f"{at} " + "x" * ROW_BYTES
            if suffix == ".csv":
                file.write(f"{text}\n")
            else:
                file.write("," if at and suffix == ".json" else "")
                file.write(json.dumps({"text": text}) + "\n")
        file.write("]" if suffix == ".json" else "")
    assert path.stat().st_size > ROW_BYTES * rows
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, path.name],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown_mib, used, unused = done.stdout.split()
    assert int(used) == 6_000
    assert int(unused) > 1_000
    assert float(grown_mib) < 15
    path.unlink()
