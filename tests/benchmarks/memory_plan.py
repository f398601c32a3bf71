"""Predicted against measured peak memory of trainings on a CPU, each in a process of its own.

python tests/benchmarks/memory_plan.py --out docs/measured/memory-plan-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import commit, machine
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tunesmith.train.tokenizer import learn_tokenizer

MOST_OVER, MOST_UNDER = 0.10, 0.03

NARROW = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
DEEP = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 16}
WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6}
LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 8}

CASES: dict[str, dict[str, Any]] = {
    "lora": {"shape": NARROW, "vocabulary": 8192},
    "lora float32": {"shape": NARROW, "vocabulary": 8192, "dtype": "float32"},
    "lora checkpointing": {
        "shape": DEEP, "vocabulary": 32000, "train": {"gradient_checkpointing": True},
    },
    "lora deep": {"shape": DEEP, "vocabulary": 4096},
    "lora large vocabulary": {"shape": NARROW, "vocabulary": 128000, "rows": 4},
    "lora large": {"shape": LARGE, "vocabulary": 64000, "rows": 2, "tokens": 128},
    "dora dropout": {
        "shape": NARROW, "vocabulary": 8192,
        "train": {"lora": {"use_dora": True, "lora_dropout": 0.1}},
    },
    "lora accumulation": {
        "shape": NARROW, "vocabulary": 16000, "rows": 8,
        "train": {"gradient_accumulation_steps": 2, "lora": {"r": 64}},
    },
    "qlora": {"shape": WIDE, "vocabulary": 32000, "rows": 4, "train": {"method": "qlora"}},
    "qlora checkpointing": {
        "shape": LARGE, "vocabulary": 64000, "rows": 4, "tokens": 128,
        "train": {"method": "qlora", "gradient_checkpointing": True},
    },
    "full": {
        "shape": WIDE, "vocabulary": 32000, "rows": 4, "tokens": 256, "train": {"method": "full"},
    },
    "full 8-bit": {
        "shape": WIDE, "vocabulary": 64000, "rows": 4, "tokens": 128,
        "train": {"method": "full", "optim": "adamw_8bit"},
    },
    "full float32 checkpointing": {
        "shape": DEEP, "vocabulary": 64000, "rows": 8, "tokens": 256, "dtype": "float32",
        "train": {"method": "full", "gradient_checkpointing": True, "optim": "adamw_torch"},
    },
    "pretrain": {"shape": NARROW, "vocabulary": 16000, "train": {"method": "pretrain"}},
    "lora qwen3": {
        "shape": NARROW | {"head_dim": 64}, "vocabulary": 32000, "family": "qwen3", "rows": 8,
    },
    "lora gemma3": {
        "shape": NARROW | {"head_dim": 64}, "vocabulary": 32000, "family": "gemma3_text", "rows": 8,
    },
}  # fmt: skip
"""Name → what differs from: a Llama in bfloat16, LoRA, 16 rows of 512 tokens a pass."""


def main() -> None:
    """Train the cases and write the figures; exit code 3 when one is out of bounds."""
    options = _options()
    names = options.only or list(CASES)
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(Path(scratch), CASES[name])
        print(name, found, file=sys.stderr, flush=True)
        report = _add(options.out, name, found)
    print(json.dumps(report, indent=1))
    bad = max(report["largest_over"] - MOST_OVER, -report["largest_under"] - MOST_UNDER)
    sys.exit(3 if bad > 0 else 0)


def _add(path: Path, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The report with one more case, on disk."""
    before = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    found |= {"commit": commit(), "command": shlex.join(["python", *sys.argv])}
    cases = {one: (before | {name: found})[one] for one in CASES if one in {*before, name}}
    errors = [one["error"] for one in cases.values()]
    report = {
        "machine": machine(),
        "error": "predicted / measured - 1",
        "largest_over": max(errors),
        "largest_under": min(errors),
        "cases": cases,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def measure(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One plan and one training through the real commands."""
    recipe = prepare(folder, case)
    planned = _tunesmith("plan", recipe)["memory"]
    predicted = planned["peak_gib"]
    measured = _tunesmith("train", recipe)["trained"]["peak_memory_gib"]
    return {
        "predicted_gib": predicted,
        "measured_gib": measured,
        "error": round(predicted / measured - 1, 4),
        "parts_gib": planned["parts_gib"],
        "case": case,
    }


def _tunesmith(command: str, recipe: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", command, str(recipe), "--json"],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{recipe} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def prepare(folder: Path, case: dict[str, Any]) -> Path:
    """Rows of random words, a base with random weights, and the recipe of a case."""
    tokens, dtype = case.get("tokens", 512), case.get("dtype", "bfloat16")
    dice = random.Random(17)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(300)]
    texts = [" ".join(dice.choices(words, k=2 * tokens)) for _ in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    rows = case.get("rows", 16)
    train = {
        "method": "lora",
        "max_steps": 2,
        "eval_steps": 2,
        "merge": False,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "max_eval_rows": rows,
        **case.get("train", {}),
    }
    model: dict[str, Any] = {"dtype": dtype}
    shape = case["shape"] | {
        "vocab_size": case["vocabulary"],
        "num_attention_heads": case["shape"]["hidden_size"] // 64,
        "num_key_value_heads": case["shape"]["hidden_size"] // 128,
        "max_position_embeddings": 2048,
    }
    if train["method"] == "pretrain":
        train["architecture"] = shape
    else:
        model["base"] = str(folder / "base")
        _make_base(
            folder / "base", case.get("family", "llama"), shape, getattr(torch, dtype), texts
        )
    recipe = {
        "name": "memory",
        "store": {"folder": str(folder / "store")},
        "model": model,
        "data": {"train": str(folder / "rows.jsonl"), "format": "text", "max_length": tokens},
        "train": train,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _make_base(
    folder: Path, family: str, shape: dict[str, Any], dtype: torch.dtype, texts: list[str]
) -> None:
    tokenizer = learn_tokenizer(texts, 1000, 2048)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CONFIG_MAPPING[family](**shape, **special, bos_token_id=None)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="some of the cases")
    parser.add_argument("--out", type=Path, required=True, help="other cases in it are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
