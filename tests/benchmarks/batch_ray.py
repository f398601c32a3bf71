"""The same batch on one machine and on a Ray cluster of two nodes, of which one is killed midway.

    python tests/benchmarks/batch_ray.py --out docs/measured/batch-ray-cpu.json

Each round answers the rows once with a node killed when half of them are committed, and once with
the command stopped (SIGTERM) and killed (SIGKILL) on the way and started again. Exit code 3 when a
row is lost, is there twice, or when fewer than 99 % of the greedy answers are those of one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS / "support"))

from ray_nodes import TwoNodes, two_nodes  # noqa: E402
from tiny import make_model  # noqa: E402

from tunesmith.ledger import describe_environment  # noqa: E402

LEAST_EQUAL = 0.99
LONGEST_LEFT_S = 30.0
RECIPE = """
name: bot
model: {{base: {base}, dtype: float32}}
batch: {{input: prompts.jsonl, output: answers.jsonl, max_tokens: 32}}
engine: {{kv_cache_gib: 0.1, max_num_seqs: 16, max_model_len: 128}}
"""


def main() -> None:
    """Run the rounds and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        base = make_model(Path(scratch) / "llama", "llama")
        local = make_job(Path(scratch) / "local", base, options.rows)
        expected, local_s = finish(start(local, None), local)
        for at in range(options.rounds):
            with two_nodes() as nodes:
                node = make_job(Path(scratch) / f"node-{at}", base, options.rows)
                found = {"node_killed": lose_node(node, nodes, options.rows, expected)}
                print(found, file=sys.stderr, flush=True)
            with two_nodes() as nodes:
                driver = make_job(Path(scratch) / f"driver-{at}", base, options.rows)
                found["command_killed"] = lose_command(driver, nodes, options.rows, expected)
                print(found, file=sys.stderr, flush=True)
            rounds.append(found)
    environment = describe_environment()
    report = {
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            key: environment[key] for key in ("cpu", "cpu_count", "memory_gib", "versions")
        },
        "rows": options.rows,
        "one_machine_s": local_s,
        "rounds": rounds,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    sys.exit(0 if all(is_good(one) for found in rounds for one in found.values()) else 3)


def is_good(found: dict[str, Any]) -> bool:
    """Whether nothing was lost, doubled or left behind."""
    return (
        found["lost"] == found["duplicated"] == found["errors"] == 0
        and found["equal"] >= LEAST_EQUAL
        and found.get("engines_gone_after_s", 0.0) < LONGEST_LEFT_S
        and found.get("stopped", {}).get("exit_code", 75) == 75
        and not found.get("stopped", {}).get("engines_left")
    )


def make_job(folder: Path, base: Path, rows: int) -> Path:
    """A recipe and its prompts."""
    folder.mkdir()
    prompts = [{"id": at, "prompt": f"What is {at} plus {at}?"} for at in range(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (folder / "prompts.jsonl").write_text(lines)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base))
    return folder


def lose_node(folder: Path, nodes: TwoNodes, rows: int, expected: list[Any]) -> dict[str, Any]:
    """Kill the other node when half of the rows are there."""
    process = start(folder, nodes.address)
    wait_for_rows(folder, rows // 2, process)
    engines, at_kill = len(nodes.engines()), committed(folder)
    nodes.kill_other()
    answers, seconds = finish(process, folder)
    return {"engines": engines, "killed_at_row": at_kill} | compare(
        folder, rows, answers, expected, seconds
    )


def lose_command(folder: Path, nodes: TwoNodes, rows: int, expected: list[Any]) -> dict[str, Any]:
    """Stop the command at an eighth of the rows and kill it at a quarter; then let it end."""
    process = start(folder, nodes.address)
    wait_for_rows(folder, rows // 8, process)
    process.terminate()
    process.communicate(timeout=120)
    stopped = {"exit_code": process.returncode, "kept_rows": committed(folder)}
    stopped["engines_left"] = len(nodes.engines_left(LONGEST_LEFT_S))
    process = start(folder, nodes.address)
    wait_for_rows(folder, max(rows // 4, stopped["kept_rows"] + rows // 8), process)
    process.kill()
    process.wait()
    killed_s, at_kill = time.monotonic(), committed(folder)
    nodes.engines_left(LONGEST_LEFT_S)
    gone_s = round(time.monotonic() - killed_s, 2)
    answers, seconds = finish(start(folder, nodes.address), folder)
    found = {"stopped": stopped, "killed_at_row": at_kill, "engines_gone_after_s": gone_s}
    return found | compare(folder, rows, answers, expected, seconds)


def compare(
    folder: Path, rows: int, answers: list[Any], expected: list[Any], seconds: float
) -> dict[str, Any]:
    """What became of the rows, in the output and against one machine."""
    times = Counter(row["id"] for row in answers)
    pairs = zip(answers, expected, strict=False)
    return {
        "lost": sum(times[at] == 0 for at in range(rows)),
        "duplicated": sum(count - 1 for count in times.values()),
        "in_order": [row["id"] for row in answers] == list(range(rows)),
        "errors": sum(row["error"] is not None for row in answers),
        "equal": sum(one["answer"] == other["answer"] for one, other in pairs) / rows,
        "seconds": seconds,
    }


def start(folder: Path, address: str | None) -> subprocess.Popen[str]:
    """The command, on the cluster where there is an address."""
    overrides = ["batch.cluster=ray"] if address else []
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json", *overrides],
        cwd=folder,
        env=os.environ | ({"RAY_ADDRESS": address} if address else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], folder: Path) -> tuple[list[Any], float]:
    """The output's rows, and the seconds until then."""
    started_s = time.monotonic()
    _, words = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"{folder} failed with {process.returncode}:\n{words[-3000:]}")
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], round(time.monotonic() - started_s, 1)


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen[str]) -> None:
    """Until so many are committed."""
    while committed(folder) < rows:
        if process.poll() is not None:
            raise SystemExit(f"{folder} ended early:\n{process.communicate()[1][-3000:]}")
        time.sleep(0.02)


def committed(folder: Path) -> int:
    """Rows in shards."""
    shards = (folder / ".tunesmith" / "work").glob("*/scratch/shards/*.jsonl")
    return sum(len(shard.read_bytes().splitlines()) - 1 for shard in shards)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=TESTS, capture_output=True, check=True)
    return found.stdout.decode().strip()


if __name__ == "__main__":
    main()
