"""A batch that is killed at random points and started again: what is lost, doubled and redone.

    python tests/benchmarks/batch_durability.py --model FOLDER --out FILE.json

`FOLDER` is a chat model. The job runs once untouched; then with SIGKILL of its whole process group,
with SIGKILL of only the engine, and with SIGTERM, each at so many random points, until it is done.
Ends with exit code 3 when a row is lost or doubled, more than the in-flight window was redone after
a stop, or fewer than 99 % of the greedy answers are those of the untouched run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark import describe, finish

SEQUENCES = 32
WINDOW = 3 * SEQUENCES
RECIPE = f"""
name: durable
model: {{base: MODEL, dtype: float32}}
batch: {{input: prompts.jsonl, output: answers.jsonl, max_tokens: 24}}
engine: {{kv_cache_gib: 0.2, max_num_seqs: {SEQUENCES}, max_model_len: 256}}
"""


@dataclass
class Job:
    """A folder with a recipe, and the command that is run in it again and again."""

    folder: Path
    codes: list[int] = field(default_factory=list)
    rework: list[int] = field(default_factory=list)
    """Per stop: rows that engines had been given and no shard has."""

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json"],
            cwd=self.folder,
            stdout=(self.folder / "result.json").open("wb"),
            stderr=(self.folder / "log").open("ab"),
            start_new_session=True,
        )

    def committed(self) -> int:
        return sum(len(shard.read_bytes().splitlines()) - 1 for shard in self._shards("*.jsonl"))

    def handed(self) -> int:
        return sum(int(path.read_bytes() or 0) for path in self._shards("handed"))

    def _shards(self, pattern: str) -> list[Path]:
        return list(self.folder.glob(f".tunesmith/work/*/scratch/shards/{pattern}"))

    def wait_for(self, process: subprocess.Popen[bytes], rows: int) -> bool:
        """Until so many rows are committed; False when it ended before."""
        while self.committed() < rows:
            if process.poll() is not None:
                return False
            time.sleep(0.005)
        return True


def main() -> None:
    """Measure, write the figures, and say whether they are within their bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--stops", type=int, default=5, help="random points of each way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["group", "engine", "term"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/batch-durability"))
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    untouched = make_job(options, "untouched")
    untouched.start().wait()
    expected = answers(untouched)
    assert len(expected) == options.rows, (untouched.folder / "log").read_text()
    found: dict[str, Any] = {"rows": options.rows, "in_flight_window": WINDOW}
    for way in options.ways:
        points = sorted(
            chance.sample(range(options.rows // 50, options.rows * 9 // 10), options.stops)
        )
        found[way] = measure(make_job(options, way), way, points, expected)
        print(json.dumps({way: found[way]}), flush=True)
    finish(options.out, describe(parser, found), faults(found, options))


def make_job(options: argparse.Namespace, name: str) -> Job:
    folder = options.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(options.model.absolute())))
    with (folder / "prompts.jsonl").open("w") as file:
        for at in range(options.rows):
            prompt = f"def add_{at}(a, b): return the sum of {at} and both. " + "x = 1; " * (at % 9)
            file.write(json.dumps({"id": at, "prompt": prompt}) + "\n")
    return Job(folder)


def measure(
    job: Job, way: str, points: list[int], expected: list[dict[str, Any]]
) -> dict[str, Any]:
    """Stop the job at each point in one way, let it end, and compare."""
    process = job.start()
    for point in points:
        # A stop while the command loads is no stop of rows in flight.
        if not job.wait_for(process, max(point, job.committed() + 1)):
            break
        if way == "engine":
            os.killpg(engine_group(process.pid), signal.SIGKILL)
            continue
        if way == "group":
            # The engine is in a group of its own, which its guard ends with this one.
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
        job.codes.append(process.wait())
        job.rework.append(job.handed() - job.committed() - sum(job.rework))
        process = job.start()
    job.codes.append(process.wait())
    rows = answers(job)
    ids = [row["id"] for row in rows]
    result = json.loads((job.folder / "result.json").read_text())
    same = sum(row["answer"] == other["answer"] for row, other in zip(rows, expected, strict=False))
    return {
        "points": points,
        "exit_codes": job.codes,
        "lost": len(set(range(len(expected))) - set(ids)),
        "duplicated": len(ids) - len(set(ids)),
        "in_order": ids == sorted(ids),
        "errors": result["errors"],
        "rework_rows_per_stop": job.rework,
        "rework_rows": result["rework_rows"],
        "restarts": result["restarts"],
        "equal_answers": same / len(expected),
        "generation_s": result["generation_s"],
    }


def answers(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "answers.jsonl").open()]


def engine_group(pid: int) -> int:
    """The guard of the engine, which is the leader of its process group."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)


def faults(found: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What is out of bounds."""
    wrong = []
    for way in options.ways:
        made = found[way]
        stops = options.stops if way != "engine" else 0
        code = {"group": -signal.SIGKILL, "term": 75}.get(way, 0)
        checks = {
            "rows were lost": made["lost"] == 0,
            "rows are there twice": made["duplicated"] == 0,
            "the output is not in input order": made["in_order"],
            "rows have errors": not made["errors"],
            "a stop cost more than the window": max(made["rework_rows_per_stop"], default=0)
            <= WINDOW,
            "engines were not started again": way != "engine" or made["restarts"] == options.stops,
            "the work redone is more than the windows": made["rework_rows"]
            <= options.stops * WINDOW,
            "answers differ": made["equal_answers"] >= 0.99,
            "exit codes are wrong": made["exit_codes"] == [*[code] * stops, 0],
        }
        wrong += [f"{way}: {name}" for name, is_well in checks.items() if not is_well]
    return wrong


if __name__ == "__main__":
    main()
