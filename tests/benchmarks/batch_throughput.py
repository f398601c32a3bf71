"""Speed and memory of a batch beside plain `LLM.generate`, vLLM's own run-batch, and itself.

    python tests/benchmarks/batch_throughput.py --model FOLDER --part peers --out FILE.json

`FOLDER` is a chat model. Everything is measured in turns, in processes of their own, and the median
ratio counts. Loading the model is in no figure; reading, tokenising and keeping rows is in ours.
Ends with exit code 3 when a bound is missed:

    peers   the same prompts: ours / LLM.generate at least 0.97, ours / run-batch at least 1.1
    reuse   half the rows share long prefixes and the cache is small: in our order / as they come at
            least 1.2; 30 % of the rows are there twice: at least 1.25
    memory  peak of all processes with 100,000 rows - with 1,000 rows: at most 50 MB
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmark import describe, finish

BOUNDS = {"generate": 0.97, "run_batch": 1.1, "prefixes": 1.2, "duplicates": 1.25}
MOST_GROWTH_MB = 50
RECIPE = """
name: speed
model: {{base: {model}, dtype: float32}}
batch: {{input: {rows}, output: out.jsonl, max_tokens: 1}}
engine: {{kv_cache_gib: {gib}, max_num_seqs: {sequences}, max_model_len: 1024}}
"""
# Generates once for each line that it is sent, and says how many seconds it took.
PLAIN = """
import json, sys, time
from pathlib import Path
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineSpec, open_llm, prepare_process

if __name__ == "__main__":
    model, gib, sequences, rows = sys.argv[1:]
    prepare_process()
    settings = Engine(kv_cache_gib=float(gib), max_num_seqs=int(sequences), max_model_len=1024)
    llm = open_llm(EngineSpec(Path(model), settings, "float32", "plain"))
    from vllm import SamplingParams
    bodies = [json.loads(line)["body"] for line in open(rows)]
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        for body in bodies
    ]
    params = [SamplingParams(temperature=0, max_tokens=body["max_tokens"]) for body in bodies]
    print("ready", flush=True)
    for _ in sys.stdin:
        llm.reset_prefix_cache()
        started_s = time.monotonic()
        made = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - started_s
        print(json.dumps([seconds, sum(len(one.outputs[0].token_ids) for one in made)]), flush=True)
"""
# vLLM's own program, with a clock around its work.
RUN_BATCH = """
import asyncio, json, time
from vllm.entrypoints.launchers import run_batch as module

original = module.run_batch

async def timed(*arguments):
    started_s = time.monotonic()
    await original(*arguments)
    print(json.dumps(time.monotonic() - started_s), flush=True)

module.run_batch = timed
if __name__ == "__main__":
    asyncio.run(module.main(module.parse_args()))
"""


def main() -> None:
    """Measure one part, add its figures to the file, and say whether they are within bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--part", choices=["peers", "reuse", "memory"], required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="of the model, in part memory")
    parser.add_argument("--many-rows", type=int, default=100_000)
    parser.add_argument("--work", type=Path, default=Path("/tmp/batch-throughput"))
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    options = parser.parse_args()
    options.model = options.model.absolute()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    parts = {"peers": peers, "reuse": reuse, "memory": memory}
    found, faults = parts[options.part](options)
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    finish(options.out, before | {options.part: describe(parser, found)}, faults)


def peers(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Rows per second of the three on one file, in turns."""
    rows = options.work / "rows.jsonl"
    write_rows(rows, [f"Add {at} to b{at % 7}" for at in range(options.rows)], options.max_tokens)
    taken_s: dict[str, list[float]] = {"ours": [], "generate": [], "run_batch": []}
    tokens: dict[str, int] = {}
    arguments = [str(options.model), "0.25", "64", str(rows)]
    with subprocess.Popen(
        [sys.executable, "-c", PLAIN, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as plain:  # fmt: skip
        assert plain.stdin and plain.stdout
        assert plain.stdout.readline() == "ready\n"
        for _ in range(options.rounds):
            result = ours(options, rows, gib=0.25, sequences=64)
            taken_s["ours"].append(result["generation_s"])
            tokens["ours"] = result["output_tokens"]
            plain.stdin.write("go\n")
            plain.stdin.flush()
            seconds, tokens["generate"] = json.loads(plain.stdout.readline())
            taken_s["generate"].append(seconds)
            taken_s["run_batch"].append(run_batch(options, rows))
            print(json.dumps(taken_s), flush=True)
        plain.stdin.close()
    ratios = {name: ratio(taken_s[name], taken_s["ours"]) for name in ("generate", "run_batch")}
    return {"rows": options.rows, "seconds": taken_s, "output_tokens": tokens, "ratios": ratios}, [
        f"ours / {name} is {value}, below {BOUNDS[name]}"
        for name, value in ratios.items()
        if value < BOUNDS[name]
    ]


def reuse(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """With `batch.reuse` and without, on prefixes that return and on rows that are equal."""
    chance = random.Random(1)
    words = [f"w{at}" for at in range(500)]
    prefixes = [" ".join(chance.choices(words, k=250)) for _ in range(options.rows // 20)]
    shared = [f"{prefixes[at % len(prefixes)]} {at}" for at in range(options.rows // 2)]
    others = [f"Add {at} to itself" for at in range(options.rows - len(shared))]
    once = [f"Add {at} to b{at % 7}" for at in range(options.rows * 7 // 10)]
    twice = once + once[: options.rows - len(once)]
    found: dict[str, Any] = {"rows": options.rows, "seconds": {}, "ratios": {}}
    for name, prompts, limit, gib, sequences in (
        ("prefixes", shared + others, 4, 0.03, 16),
        ("duplicates", twice, options.max_tokens, 0.25, 64),
    ):
        chance.shuffle(prompts)
        rows = options.work / f"{name}.jsonl"
        write_rows(rows, prompts, limit)
        taken_s: dict[str, list[float]] = {"reuse": [], "as_they_come": []}
        for _ in range(options.rounds):
            for way, is_on in (("reuse", "true"), ("as_they_come", "false")):
                asked = f"batch.reuse={is_on}"
                result = ours(options, rows, asked, gib=gib, sequences=sequences)
                taken_s[way].append(result["generation_s"])
                found[f"{name}_{way}"] = {
                    key: result[key]
                    for key in ("prompt_tokens", "cached_tokens", "deduplicated_rows")
                }
            print(json.dumps({name: taken_s}), flush=True)
        found["seconds"][name] = taken_s
        found["ratios"][name] = ratio(taken_s["as_they_come"], taken_s["reuse"])
    return found, [
        f"{name}: {value}, below {BOUNDS[name]}"
        for name, value in found["ratios"].items()
        if value < BOUNDS[name]
    ]


def memory(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The highest sum of resident memory over all processes, with few rows and with many."""
    peaks_mb: dict[str, dict[str, float]] = {}
    for count in (1000, options.many_rows):
        rows = options.work / "rows.jsonl"
        write_rows(rows, [f"Row {at} of many" for at in range(count)], 1)
        peaks_mb[str(count)] = {}
        override = f"model.dtype={options.dtype}"
        ours(options, rows, override, gib=0.01, sequences=64, peaks_mb=peaks_mb[str(count)])
        print(json.dumps(peaks_mb), flush=True)
    few, many = peaks_mb.values()
    growth_mb = round(many["all"] - few["all"], 1)
    return {"dtype": options.dtype, "peaks_mb": peaks_mb, "growth_mb": growth_mb}, (
        [f"memory grew by {growth_mb} MB, above {MOST_GROWTH_MB}"]
        if growth_mb > MOST_GROWTH_MB
        else []
    )


def ours(
    options: argparse.Namespace,
    rows: Path,
    *overrides: str,
    gib: float,
    sequences: int,
    peaks_mb: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What the whole command says, begun from nothing; every row is in its output, in order."""
    folder = options.work / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    recipe = RECIPE.format(model=options.model, rows=rows, gib=gib, sequences=sequences)
    (folder / "recipe.yaml").write_text(recipe)
    command = [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json", *overrides]
    with (
        (folder / "log").open("wb") as log,
        (folder / "result.json").open("wb") as result,
        subprocess.Popen(command, cwd=folder, stdout=result, stderr=log) as process,
    ):
        while process.poll() is None:
            time.sleep(0.1)
            if peaks_mb is not None:
                note_memory(process.pid, peaks_mb)
    assert process.returncode == 0, (folder / "log").read_text()
    with rows.open() as asked, (folder / "out.jsonl").open() as made:
        for line, answer in zip(asked, made, strict=True):
            assert json.loads(line)["custom_id"] == json.loads(answer)["custom_id"]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def run_batch(options: argparse.Namespace, rows: Path) -> float:
    """Seconds that vLLM's program takes, as it comes, once its engine is up."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-c", RUN_BATCH, "-i", str(rows),
            "-o", str(options.work / "theirs.jsonl"), "--model", str(options.model),
            "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "1024",
            "--max-num-seqs", "64", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28),
        ],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


def write_rows(path: Path, prompts: list[str], max_tokens: int) -> None:
    """A file in the OpenAI batch form, which all three read."""
    with path.open("w") as file:
        for at, prompt in enumerate(prompts):
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            call = {"custom_id": str(at), "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps(call | {"body": body}) + "\n")


def note_memory(pid: int, peaks_mb: dict[str, float]) -> None:
    """Resident memory of a process and of all below it, where it is the highest so far."""
    own, below = resident_mb(pid), 0.0
    waiting = children(pid)
    while waiting:
        child = waiting.pop()
        below += resident_mb(child)
        waiting += children(child)
    for name, value in (("command", own), ("engine", below), ("all", own + below)):
        peaks_mb[name] = round(max(peaks_mb.get(name, 0.0), value), 1)


def children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = (line.split() for line in text.splitlines())
    return sum(int(line[1]) / 1000 for line in lines if line[0] == "VmRSS:") * 1.024


def ratio(theirs_s: list[float], ours_s: list[float]) -> float:
    """The median over the rounds of how many times faster ours is."""
    return round(statistics.median(a / b for a, b in zip(theirs_s, ours_s, strict=True)), 3)


if __name__ == "__main__":
    main()
