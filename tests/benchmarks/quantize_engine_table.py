"""Every quantization scheme in the real engine: the parent, the merged model, and LoRA on top.

Each cell works, or is refused with a typed error that names the devices that would run it; each
is a process of its own with a time limit. On a CPU, with the quickstart's trained store:
python tests/benchmarks/quantize_engine_table.py --out docs/measured/quantize-engine-table-cpu.json
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tunesmith.config import load_recipe
from tunesmith.config.schema import Recipe
from tunesmith.config.schemes import SCHEMES
from tunesmith.ledger import describe_environment
from tunesmith.pipeline import Stages

CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in SCHEMES},
    "w4a16 asymmetric": {"symmetric": False},
    "w4a16 awq": {"algorithm": "awq"},
    "w4a16 spinquant": {"rotation": "spinquant"},
    "w8a8-int8 smoothquant": {"smoothquant": 0.5},
    "w8a8-int8 kv fp8": {"kv_cache": "fp8"},
}
"""Name, which begins with the scheme → further keys of `quantize`."""

COLUMNS = ("parent", "merged", "lora on top")
_LIMIT_S = 240
_DEVICE = re.compile(r"it runs on .+nearest here|does not fit \(on any device\)")


def main() -> None:
    """Fill the table; exit code 3 when a cell neither works nor is refused in words."""
    options = _options()
    if options.cell:
        print(json.dumps(_load(options)), flush=True)
        return
    table: dict[str, dict[str, Any]] = {}
    for name in options.only or list(CASES):
        table[name] = _row(options, name)
        print(f"{name}: {json.dumps(table[name])}", file=sys.stderr, flush=True)
        _write(options, table)
    bad = [
        f"{name} / {column}"
        for name, row in table.items()
        for column, cell in row.items()
        if cell["outcome"] not in ("works", "refused")
    ]
    print(f"untyped: {', '.join(bad)}" if bad else f"{len(table) * len(COLUMNS)} cells, all typed")
    sys.exit(3 if bad else 0)


def _row(options: argparse.Namespace, name: str) -> dict[str, Any]:
    keys = {"scheme": name.split()[0], "calibration_rows": 32, **CASES[name]}
    overrides = [f"quantize.{key}={json.dumps(value)}" for key, value in keys.items()]
    recipe = load_recipe(
        options.recipe, [f"store.folder={options.store}", "quantize.verify_rows=0", *overrides]
    )
    adapter = Stages(recipe).trained.id
    parent, merged = (
        _made(options, one) for one in (recipe.model_copy(update={"train": None}), recipe)
    )
    store = options.store / "artifacts"
    return {
        "parent": _cell(options, store / parent),
        "merged": _cell(options, store / merged),
        "lora on top": _cell(options, store / parent, store / adapter),
    }


def _made(options: argparse.Namespace, recipe: Recipe) -> str:
    from tunesmith.quantize.command import run

    (made,) = run(Stages(recipe, path=str(options.recipe)))["checkpoints"].values()
    return str(made["id"])


def _cell(options: argparse.Namespace, model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """One model in an engine of its own; a silent or lasting one is an outcome too."""
    command = [sys.executable, __file__, "--recipe", str(options.recipe), "--cell", str(model)]
    if adapter:
        command += ["--adapter", str(adapter)]
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"outcome": f"no answer in {_LIMIT_S} s"}
    seconds = round(time.monotonic() - started_s, 1)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"outcome": f"exit code {done.returncode}", "stderr": done.stderr[-500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"seconds": seconds}


def _load(options: argparse.Namespace) -> dict[str, Any]:
    """Inside the cell's process: load it and have it answer."""
    from tunesmith.config import ModelError
    from tunesmith.engine import EngineSpec, lora_request, open_llm

    recipe = load_recipe(options.recipe)
    spec = EngineSpec(
        model=options.cell,
        settings=recipe.engine.model_copy(update={"max_num_seqs": 4}),
        dtype=recipe.model.dtype,
        served_name="cell",
        adapter=options.adapter,
    )
    try:
        llm = open_llm(spec)
    except ModelError as error:
        is_named = bool(_DEVICE.search(str(error)))
        return {"outcome": "refused" if is_named else "refused without a device", "why": str(error)}
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False)
    prompt = TokensPrompt(prompt_token_ids=[5, 6, 7, 8, 9])
    request = lora_request(spec)
    (answer,) = llm.generate(prompt, params, use_tqdm=False, lora_request=request)
    return {"outcome": "works", "tokens": list(answer.outputs[0].token_ids)}


def _write(options: argparse.Namespace, table: dict[str, Any]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "environment": describe_environment(),
        "table": table,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--store", type=Path, default=Path(".tunesmith"))
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", type=Path, help="load this model, as one cell does")
    parser.add_argument("--adapter", type=Path, help="with this adapter on top")
    return parser.parse_args()


if __name__ == "__main__":
    main()
