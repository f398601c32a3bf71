"""Supervised tokens per second and peak memory of LoRA training, against TRL's SFTTrainer.

Both train the same base on the same rows with the same hyper-parameters, in turns, and both
adapters are judged by the same held-out loss: speed counts only where what was learnt is equal.

    python tests/benchmarks/train_vs_trl.py --rounds 3 --out docs/measured/train-vs-trl-cpu.json

TRL comes into a folder of its own, unless it is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import commit, machine

from tunesmith.config import load_recipe
from tunesmith.pipeline import Stages
from tunesmith.train import model as models
from tunesmith.train.language import EVALUATION_FILE, read_language
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.peer import find_trl, run_trl

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "tunesmith": None,
    "trl defaults": {},
    "trl best": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"},
}
"""Name → what is changed in TRL's defaults."""

LEARNING_RATE, BATCH_SIZE, MAX_LENGTH, SEED = 2e-3, 8, 768, 17


@dataclass(frozen=True)
class Workload:
    """What all contenders share."""

    recipe: Path
    data: Path
    """Folder of the data set's rows."""
    base: Path
    """Folder of the model."""


def main() -> None:
    """Measure every workload in turns and write the figures."""
    options = _options()
    models.quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = find_trl(folder / "peers")
        figures = {
            workload: _measure(folder / workload, workload, options, environment)
            for workload in ("skewed", "fixed")
        }
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "workloads": figures,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--base", default="builtin/tiny-llama")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _measure(
    folder: Path, workload: str, options: argparse.Namespace, environment: dict[str, str]
) -> Any:
    """Every contender in every round, each round with a seed of its own, since the order of rows
    alone moves the loss by a percent; medians, and ratios of the pairs of one round."""
    work = _prepare(folder, workload, options)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for at in range(options.rounds):
        order = list(CONTENDERS)
        for name in order if at % 2 == 0 else reversed(order):
            settings = CONTENDERS[name]
            run = (
                _tunesmith(work.recipe, SEED + at)
                if settings is None
                else _trl(work, environment, settings | {"seed": SEED + at})
            )
            run["loss"] = _held_out_loss(work, Path(run.pop("adapter")))
            runs[name].append(run)
            print(workload, at, name, {k: round(v, 4) for k, v in run.items()}, file=sys.stderr)
    ours = runs["tunesmith"]
    return {
        name: {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}
        | {
            "times_slower": [
                round(our["tokens_per_s"] / run["tokens_per_s"], 3)
                for our, run in zip(ours, found, strict=True)
            ],
            "our_memory_share": [
                round(our["peak_gib"] / run["peak_gib"], 3)
                for our, run in zip(ours, found, strict=True)
            ],
        }
        for name, found in runs.items()
    }


def _prepare(folder: Path, workload: str, options: argparse.Namespace) -> Workload:
    """Make the data set and the base."""
    folder.mkdir()
    data: dict[str, Any] = {"max_length": MAX_LENGTH}
    if workload == "skewed":
        data |= {"train": "builtin/stdlib", "max_rows": options.rows}
    else:
        data |= {"train": str(_fixed_rows(folder, options.rows))}
    path = folder / "recipe.yaml"
    recipe = {
        "name": workload,
        "seed": SEED,
        "model": {"base": options.base},
        "data": data,
        "store": {"folder": str(folder / "store")},
        "train": {
            "method": "lora",
            "learning_rate": LEARNING_RATE,
            "per_device_train_batch_size": BATCH_SIZE,
            "merge": False,
        },
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _tunesmith(path, SEED)
    stages = Stages(load_recipe(path))
    rows = stages.made(stages.dataset).root
    # From now on the seed chooses no rows.
    recipe["data"] = {
        "train": str(rows / "train.jsonl"),
        "evaluation": str(rows / "evaluation.jsonl"),
        "max_length": MAX_LENGTH,
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Workload(path, rows, stages.made(stages.base).root)


def _fixed_rows(folder: Path, count: int) -> Path:
    """Conversations of one length: so many words to read, so many to repeat."""
    words = [
        "the",
        "value",
        "of",
        "a",
        "list",
        "is",
        "not",
        "none",
        "if",
        "it",
        "has",
        "name",
        "type",
        "and",
        "file",
    ]
    dice = random.Random(SEED)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            told = dice.choices(words, k=200)
            turns = [("user", told), ("assistant", sorted(told[:40]))]
            messages = [{"role": role, "content": " ".join(said)} for role, said in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _tunesmith(recipe: Path, seed: int) -> dict[str, Any]:
    for adapter in (recipe.parent / "store" / "artifacts").glob("adapter-*"):
        shutil.rmtree(adapter)
    command = [
        sys.executable,
        "-m",
        "tunesmith.cli",
        "train",
        str(recipe),
        f"seed={seed}",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    trained = json.loads(done.stdout)["trained"]
    return {
        "tokens_per_s": trained["supervised_tokens_seen"] / trained["train_s"],
        "seconds": trained["train_s"],
        "peak_gib": trained["peak_memory_gib"],
        "adapter": trained["path"],
    }


def _trl(work: Workload, environment: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    out = work.recipe.parent / "trl"
    shutil.rmtree(out, ignore_errors=True)
    found = run_trl(
        {
            "base": str(work.base),
            "rows": str(work.data / "train.jsonl"),
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "arguments": {
                "output_dir": str(out),
                "max_length": MAX_LENGTH,
                "assistant_only_loss": True,
                "learning_rate": LEARNING_RATE,
                "num_train_epochs": 1,
                "per_device_train_batch_size": BATCH_SIZE,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03,
                "optim": "adamw_torch_fused",
            }
            | settings,
            "save": True,
        },
        environment,
    )
    return {
        "tokens_per_s": found["supervised_tokens"] / found["seconds"],
        "seconds": found["seconds"],
        "peak_gib": found["peak_memory_gib"],
        "adapter": str(out),
    }


@torch.no_grad()
def _held_out_loss(work: Workload, adapter: Path) -> float:
    """Nats per learnt token of the held-out rows, by one and the same code for all."""
    recipe = load_recipe(work.recipe)
    assert recipe.data
    stages = Stages(recipe)
    language = read_language(work.base, recipe)
    rows = language.tokenise(stages.made(stages.dataset), EVALUATION_FILE, recipe.data).rows
    base = models.load_base(work.base, torch.bfloat16, torch.device("cpu"))
    loss = TokenLoss(models.load_adapter(base, adapter), torch.bfloat16).eval()
    nats = tokens = 0.0
    for row in rows:
        batch = collate([row])
        nats += float(loss(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum())
        tokens += len(batch.targets_N)
    return nats / tokens


if __name__ == "__main__":
    main()
